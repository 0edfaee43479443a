"""Fine-tuning on one's own pairs, without losing what the model knew.

The loss is CLIP's (Radford et al., ICML 2021, figure 3; for a model with a bias SigLIP's), with guards:

- Captions of a batch that say the same are positives of each other. With key k_i of caption i and
  l_ij = exp(scale) I_i · T_j, the targets are t_ij = [k_i = k_j]; each row and each column is normalized.
- The learning rate falls from the head to the input (`parts/layer_decay`). Scale and bias stay: a small batch
  would move them to what suits a small batch.
- Statistics of batch norms stay those of the start. Weights and optimizer are fp32 where products are bf16.
- A batch larger than memory is encoded in parts, with the gradient of the whole (`engine/accumulate`).
- After every epoch retrieval on held-out pairs is measured, and how much was forgotten on a probe. Training
  ends when retrieval has not risen for some epochs.
- The result lies between the start and the best epoch (`parts/interpolate`), where retrieval on the held-out
  pairs is best among the models that forget no more than is allowed. It may be the start itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.data.augment import RandomView
from clipworks.data.batch import Batch
from clipworks.data.loader import Loader, Reading
from clipworks.data.pairs import Pairs, all_captions
from clipworks.data.source import Source
from clipworks.engine.checkpoints import load_tensors, tensors_once
from clipworks.engine.recipe import Precision, Recipe
from clipworks.engine.reports import CsvLog
from clipworks.engine.table import Table
from clipworks.engine.training import Resume, Show, fit
from clipworks.errors import ConfigError, DataError
from clipworks.evaluate.before_after import Change, Curves, changes, draw_curves, write_report
from clipworks.evaluate.held import Gauges, HeldPairs, Probe, agreement_probe
from clipworks.methods.pretrain.base import Objective, pairs
from clipworks.parts.contrastive import Targets, contrastive_loss
from clipworks.parts.duplicates import CaptionKeys, token_keys
from clipworks.parts.interpolate import Point, best, interpolate, walk
from clipworks.parts.keep_best import KeepBest
from clipworks.parts.layer_decay import layer_groups

SHARES = tuple(number / 10 for number in range(11))
FEWEST = 8  # pairs held out, and pairs trained on
MOST_HELD = 1000
LEEWAY = {"accuracy": 1.0, "agreement": 5.0}  # agreement falls whatever is learned
CACHE_BYTES = 1 << 31  # of decoded pictures
BEST = "best.safetensors"


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned.

    Attributes:
        epochs: at most so many passes over the pairs.
        batch_size: pairs that are compared with each other; all of them where there are fewer.
        at_once: pairs that are encoded at once, for memory; does not change the gradient.
        lr: highest learning rate, of the head.
        layer_decay: factor of the learning rate from one block to the one below.
        weight_decay: of AdamW, on matrices.
        warmup: share of the steps in which the learning rate rises.
        crop: least part of a picture's area that a training view shows.
        flip: mirror half of the views; not for pictures with writing.
        same_captions: captions that say the same are positives.
        frozen_scale: keep scale and bias.
        frozen_statistics: keep the statistics of batch norms.
        patience: epochs without a better retrieval after which training ends; None for none.
        forget: how far the probe may fall, in [0, 1], and five times as far a probe of agreement; None
            takes the weights as the training leaves them.
        held_out: share of the pairs that is kept for validation.
        precision: of the products; weights are fp32.
        seed: of order, views, split and everything else.
    """

    epochs: int = 30
    batch_size: int = 256
    at_once: int = 64
    lr: float = 1e-4
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup: float = 0.1
    crop: float = 0.5
    flip: bool = True
    same_captions: bool = True
    frozen_scale: bool = True
    frozen_statistics: bool = True
    patience: int | None = 5
    forget: float | None = 0.01
    held_out: float = 0.15
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "at_once"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.lr <= 0:
            raise ConfigError(f"lr must be positive, not {self.lr}")
        for name in ("warmup", "held_out", "forget"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} is a share in [0, 1), not {value}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience must be at least 1 or None, not {self.patience}")

    def unguarded(self, lr: float = 1e-4) -> FineTuning:
        """Plain training of the same length on the same batches, to compare with: nothing is guarded."""
        return replace(
            self,
            lr=lr,
            layer_decay=1.0,
            same_captions=False,
            frozen_scale=False,
            frozen_statistics=False,
            patience=None,
            forget=None,
        )


class FineTune(Objective):
    """CLIP's loss with the guards that are part of a step; see the head of this module.

    A batch may bring the keys of its captions as the feature `caption` (B,) int64 (`parts/duplicates`);
    without it, captions of equal tokens are the same.
    """

    def __init__(self, settings: FineTuning | None = None, *, source: str = "alt"):
        super().__init__()
        settings = settings or FineTuning()
        self.layer_decay, self.weight_decay = settings.layer_decay, settings.weight_decay
        self.same_captions = settings.same_captions
        self.frozen_scale = settings.frozen_scale
        self.frozen_statistics = settings.frozen_statistics
        self.source = source

    def prepare(self, clip: Clip) -> Clip:
        """The same model with fp32 weights, all trained but scale and bias."""
        clip.float().requires_grad_(True)
        for number in (clip.scale, clip.bias):
            if number is not None:
                number.requires_grad_(not self.frozen_scale)
        return clip

    def groups(self, clip: Clip) -> list[dict[str, Any]]:
        """Parameters by their distance from the head."""
        return layer_groups(clip, decay=self.layer_decay, weight_decay=self.weight_decay)

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image` and `text` (B, D), unit length; `scale` and `bias`; `caption` (B,) int64."""
        if self.frozen_statistics:
            for module in clip.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        features: dict[str, Any] = pairs(clip, batch, self.source)
        if self.same_captions:
            keys = batch.features.get("caption")
            features["caption"] = token_keys(batch.texts[self.source]) if keys is None else keys
        return features

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`contrastive`, 0-D, over all pairs of the global batch."""
        keys, bias = features.get("caption"), features.get("bias")
        loss = contrastive_loss(
            features["image"],
            features["text"],
            features["scale"].exp(),
            bias,
            form="softmax" if bias is None else "sigmoid",
            targets=None if keys is None else Targets((keys, keys)),
        )
        return {"contrastive": loss}


@dataclass(frozen=True)
class Measures:
    """What a fine-tuning is measured by.

    Attributes:
        validation: pairs by which the result is chosen; None holds out a part of the training pairs.
        probe: what shall not be forgotten; None asks the starting model (`evaluate.held.agreement_probe`).
        test: pairs that choose nothing, for the report.
        further: more measurements for the report, `clip -> {name: share}`.
    """

    validation: Source | None = None
    probe: Probe | None = None
    test: Source | None = None
    further: tuple[Callable[[Clip], Mapping[str, float]], ...] = ()


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning gave.

    Attributes:
        clip: the model, in evaluation mode.
        share: where it lies between the start (0) and the best epoch (1).
        epochs: passes over the pairs that were made.
        table: numbers in [0, 1] of `start`, `best epoch`, `tuned` and, if asked for, `plain training`.
        line: the models between start and best epoch.
        report: the page with curves and examples.
        folder: where everything lies.
    """

    clip: Clip
    share: float
    epochs: int
    table: dict[str, dict[str, float]]
    line: tuple[Point, ...]
    report: Path
    folder: Path


def finetune(
    clip: Clip,
    data: Pairs,
    folder: str | Path,
    settings: FineTuning = FineTuning(),
    measures: Measures = Measures(),
    *,
    compare: bool = False,
    resume: Resume = "auto",
    show: Show = "auto",
) -> Tuned:
    """Fine-tune a Clip (in place) on pairs, and write the result and a report.

    Args:
        clip: the model to start from.
        data: pictures with captions, see `data.pairs.open_pairs`.
        folder: gets `clip/` (the result), `report.html`, `curves.png`, `result.json`, and in `training/` what
            `engine.fit` writes; an interrupted training is continued.
        settings: how it is trained.
        measures: what it is measured by.
        compare: also train the same model on the same batches without the guards, for the report.
        resume, show: as `engine.fit` takes them.

    Raises:
        DataError: for too few pairs or unreadable pictures.
        ConfigError: under `torchrun`; or if the folder holds a training with other settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("fine-tuning runs in one process; `clipworks pretrain --init` trains on several")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clip.float().eval()
    start = {name: tensor.clone() for name, tensor in tensors_once(clip).items()}
    training, validation = split(data, measures.validation, settings)
    gauges = _gauges(clip, validation, measures, settings.seed)
    before, table = gauges.shown.similarity(clip), {"start": gauges.everything(clip)}
    if compare:
        _train(clip, training, gauges, folder / "plain", settings.unguarded(), resume, show)
        table["plain training"] = gauges.everything(clip)
        load_tensors(clip, start)
    run = _train(clip, training, gauges, folder / "training", settings, resume, show)
    if settings.forget is not None:
        tuned = load_file(folder / "training" / BEST)

        def at(share: float) -> tuple[float, float]:
            load_tensors(clip, interpolate(start, tuned, share))
            found = gauges.every_epoch(clip)
            return found["recall"], found[gauges.probe.kind]

        run.least = table["start"][f"probe {gauges.probe.kind}"] - settings.forget * LEEWAY[gauges.probe.kind]
        run.line = walk(at, SHARES)
        at(1.0)
        table["best epoch"] = gauges.everything(clip)
        run.share = best(run.line, run.least).share
        at(run.share)
    table["tuned"] = gauges.everything(clip)
    clip.eval().save(folder / "clip")
    shown = changes(gauges.shown, before, gauges.shown.similarity(clip))
    report = _report(folder, run, table, gauges, shown)
    line = [asdict(point) for point in run.line]
    result = {"share": run.share, "epochs": run.epochs, "table": table, "line": line}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return Tuned(clip, run.share, run.epochs, table, tuple(run.line), report, folder)


def split(data: Pairs, validation: Source | None, settings: FineTuning) -> tuple[Pairs, Source]:
    """What is trained on and what is held out of it, or the pairs given for validation.

    Raises:
        DataError: if either is too small.
    """
    training: Pairs = data
    if validation is None:
        count = min(max(FEWEST, round(settings.held_out * len(data))), MOST_HELD)
        if len(data) < 2 * FEWEST:
            raise DataError(
                f"{len(data)} pairs are too few to hold {FEWEST} out: give more, or others for validation"
            )
        training, validation = data.split(count, settings.seed)
    if len(training) < FEWEST:
        raise DataError(f"{len(training)} pairs are too few to train on: give at least {FEWEST}")
    return training, validation


def _gauges(clip: Clip, validation: Source, measures: Measures, seed: int) -> Gauges:
    held = HeldPairs.of(clip, validation)
    probe = measures.probe or agreement_probe(clip, held.pixels, seed=seed)
    test = None if measures.test is None else HeldPairs.of(clip, measures.test)
    return Gauges(held, probe, test, measures.further)


@dataclass
class _Run:
    """What happened: epochs made, losses, evaluations; then the line, and what was taken of it."""

    epochs: int
    loss: list[tuple[float, float]]
    metrics: list[dict[str, float]]
    line: list[Point] = field(default_factory=list)
    share: float = 1.0
    least: float | None = None


def _train(
    clip: Clip,
    training: Pairs,
    gauges: Gauges,
    folder: Path,
    settings: FineTuning,
    resume: Resume,
    show: Show,
) -> _Run:
    size = min(settings.batch_size, len(training))
    if clip.tokenizer is None:
        raise ConfigError("this Clip has no tokenizer, so captions cannot be read; load one with it")
    keys = CaptionKeys(all_captions(training), clip.tokenizer) if settings.same_captions else None
    side = gauges.held.pixels.shape[-1]
    view = RandomView(side, crop=(settings.crop, 1.0), flip=settings.flip, seed=settings.seed)
    loader = Loader(
        training,
        clip.preprocessing,
        clip.tokenizer,
        size,
        seed=settings.seed,
        reading=Reading(cache="memory" if len(training) * side * side * 3 <= CACHE_BYTES else None),
        transform=lambda batch: view.of(batch if keys is None else keys.of(batch)),
    )
    steps = settings.epochs * len(loader)
    recipe = Recipe(
        epochs=settings.epochs,
        lr=settings.lr,
        warmup=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        accumulate=math.ceil(size / settings.at_once),
        precision=settings.precision,
        scale_limit=None if settings.frozen_scale else math.log(100),
        seed=settings.seed,
    )
    meter = KeepBest(gauges.every_epoch, "recall", folder / BEST, settings.patience)
    log = CsvLog(every=max(1, steps // 500), name="steps.csv")
    objective = FineTune(settings)
    result = fit(
        clip, objective, loader, recipe, folder=folder, callbacks=[log, meter], resume=resume, show=show
    )
    # From the files: where the training was already over, the callbacks were not started.
    losses = [(row["step"], row["loss"]) for row in Table(folder / log.name).read()]
    return _Run(result.step // len(loader), losses, Table(folder / f"{meter.name}.csv").read())


def _report(
    folder: Path,
    run: _Run,
    table: Mapping[str, Mapping[str, float]],
    gauges: Gauges,
    shown: Sequence[Change],
) -> Path:
    kind = gauges.probe.kind
    line = [{"share": point.share, "recall": point.new, kind: point.old} for point in run.line]
    curves = Curves(run.loss, run.metrics, line, run.share if line else None, run.least)
    draw_curves(curves, ("recall", kind), folder / "curves.png")
    notes = [
        f"{run.epochs} epochs. Recall is the mean of recall at 1, 5 and 10 in both directions, on "
        f"{len(gauges.held.pixels)} pictures that were not trained on."
    ]
    if line:
        taken = (
            f"{run.share:.0%} of the way from the start to the best epoch"
            if run.share
            else "the start itself"
        )
        notes.append(
            f"The result is {taken}: the best on validation with {kind} of at least {run.least:.1%}."
        )
    if kind == "agreement":
        notes.append(
            "Agreement is how often the model still says what the starting model said of these pictures. "
            "Give a labeled set as the probe to see what is forgotten elsewhere."
        )
    pixels = gauges.shown.pixels
    return write_report(folder, "Fine-tuning", notes, table, folder / "curves.png", shown, pixels)
