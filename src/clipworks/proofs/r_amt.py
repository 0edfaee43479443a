"""R-AMT: do learned masks adapt, and does dropout by agreement keep old knowledge? (Zheng et al., ICCV 2023)

The seedling meets single shapes, 10 classes, in a style that it was not trained on, with K labeled pictures a
class in batches of 8. Same draw, same views, same number of steps:

- zero-shot, CoOp with 4 vectors, a linear probe (on features of random views);
- R-AMT with λ = 1, and AMT, which is λ = 0;
- two controls without training, which mask as much of each tensor as R-AMT does: entries at random (is it the
  choice?), and those of the smallest weights (is it pruning?);
- at full size also λ = 0.3, no mask on the patches, masks on the MLPs, no penalty; blind dropout, which keeps
  with each tensor's mean probability whatever the signs are (is it agreement, or noise?); and the sum of both
  gradients (is it distillation?).

Forgetting is zero-shot accuracy before less after, of the tower alone: on 10 further classes in the new
style, and on all 20 in a style that the seedling knows. A random mask may well forget by being broken.

Expected: R-AMT above zero-shot and CoOp, a random mask below zero-shot, less than a tenth masked, and less
forgotten than by AMT. That masks adapt is refuted if R-AMT is not above the better of zero-shot and the
random mask. Blind dropout may equal it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected, Source
from clipworks.data.splits import examples_of, world_style
from clipworks.evaluate.fewshot import accuracy_on, base_new, few_shot
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.coop import CoOp
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.r_amt import RAMT, keep_probability
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.features import Views, encode_views, pixels_of
from clipworks.proofs.base import Budget, Outcome, Proof

STYLE, KNOWN_STYLE = "sketch", "photo"  # the seedling has seen every one but the first
BATCH = 8
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        shots: pictures a class.
        epochs: of masks and of CoOp.
        views: random views of each picture, for the methods on features.
        test: pictures of all classes, of either style.
        variants: whether the arms of the full size are run.
    """

    shots: int
    epochs: int
    views: int
    test: int
    variants: bool = False


SIZES: dict[Budget, Size] = {
    "small": Size(8, epochs=30, views=8, test=500),
    "full": Size(16, epochs=30, views=8, test=1000, variants=True),
}


@dataclass(frozen=True)
class Shown:
    """Pictures as pixels (3, n, n), and labels (n,) that count the classes asked for."""

    pictures: list[Tensor]
    labels: Labels


class BlindDropout(RAMT):
    """Drops as often as R-AMT in each tensor, whatever the signs are."""

    def _applied(self, g_a: Tensor, g_b: Tensor) -> Tensor:
        generator = self._once("blind", lambda: torch.Generator(g_a.device).manual_seed(self.seed))
        uniform = torch.rand(g_a.shape, generator=generator, device=g_a.device)
        kept = keep_probability(g_a, g_b).mean() > uniform
        return torch.where(kept, g_a, (1 - self.drop) * g_a)


class Distilled(RAMT):
    """Follows both gradients."""

    def _applied(self, g_a: Tensor, g_b: Tensor) -> Tensor:
        return g_a + g_b


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    clip = load("seedling")
    edge = clip.preprocessing.image_size
    splits, known = (world_style(style, edge, seed) for style in (STYLE, KNOWN_STYLE))
    base, new = base_new(np.arange(len(splits.classes)))
    texts, others = (splits.classes.select([int(label) for label in half]) for half in (base, new))
    draw = few_shot(labels_of(splits.train), size.shots, seed, labels_of(splits.validation))
    rows = np.arange(size.test)
    train = shown(clip, splits.train, draw.train, base)
    held = shown(clip, splits.validation, draw.validation, base)
    test = shown(clip, splits.test, rows, base)
    old = [
        (shown(clip, splits.test, rows, new), others),
        (shown(clip, known.test, rows, np.arange(len(known.classes))), known.classes),
    ]
    found = on_features(clip, texts, train, held, test, size, seed)
    before = remembered(ZeroShot(clip, texts).fit(), old)

    def measured(masked: RAMT) -> dict[str, float]:
        after = remembered(masked, old)
        return {
            "accuracy": masked.score(test.pictures, test.labels),
            "forgotten_new_classes": before[0] - after[0],
            "forgotten_known_style": before[1] - after[1],
            "masked_share": masked.masked_share_,
            "reach": masked.reach_,
        }

    masked: dict[str, dict[str, float]] = {}
    for name, method in arms(clip, texts, size).items():
        method.set_params(epochs=size.epochs, batch_size=BATCH, progress=False, seed=seed)
        method.fit(train.pictures, train.labels)
        masked[name] = measured(method)
        if name == "r_amt":
            masked["random_mask"] = measured(with_masks(method, at_random(seed)))
            masked["smallest_weights"] = measured(with_masks(method, smallest(clip)))
    return Outcome(
        baseline=max(found["zero_shot"], masked["random_mask"]["accuracy"]),
        method=masked["r_amt"]["accuracy"],
        details={"on_features": found, "masked": masked, "remembered_before": before},
    )


def labels_of(source: Source) -> Labels:
    """(n,)."""
    labels = source.labels
    return np.empty(0, np.int64) if labels is None else labels


def shown(clip: Clip, source: Source, rows: Labels, classes: Labels) -> Shown:
    """Those pictures of some rows that are of some classes."""
    labels = labels_of(source)
    chosen = rows[np.isin(labels[rows], classes)]
    pictures, _ = examples_of(Selected(source, chosen))
    pixels = torch.cat(list(pixels_of(pictures, clip.preprocessing, 64)))
    return Shown(list(pixels), np.searchsorted(classes, labels[chosen]))


def on_features(
    clip: Clip, texts: ClassTexts, train: Shown, held: Shown, test: Shown, size: Size, seed: int
) -> dict[str, float]:
    """Accuracy in [0, 1] of the arms that leave the tower alone."""

    def encoded(part: Shown, views: int = 0) -> Tensor:
        made = Views(views, (0.5, 1.0), seed=seed)
        return encode_views(part.pictures, clip.image, clip.preprocessing, made)

    views, validation, X = encoded(train, size.views), encoded(held)[:, 0], encoded(test)[:, 0]
    learners: dict[str, Adapter] = {
        "zero_shot": ZeroShot(clip, texts),
        "coop": CoOp(clip, texts, context_length=4, epochs=size.epochs, batch_size=BATCH),
        "probe": LinearProbe(clip, texts, C="auto"),
    }
    found = {}
    for name, method in learners.items():
        method.set_params(progress=False, seed=seed)
        method.fit(views, train.labels, validation=(validation, held.labels) if name == "probe" else None)
        found[name] = method.score(X, test.labels)
    return found


def arms(clip: Clip, texts: ClassTexts, size: Size) -> dict[str, RAMT]:
    """The masked arms, not fitted."""
    found = {"r_amt": RAMT(clip, texts), "amt": RAMT(clip, texts, drop=0.0)}
    if size.variants:
        found |= {
            "weak_dropout": RAMT(clip, texts, drop=0.3),
            "patches_kept": RAMT(clip, texts, patch_embedding=False),
            "with_mlp": RAMT(clip, texts, where="attention+mlp"),
            "no_penalty": RAMT(clip, texts, penalty=0.0),
            "blind_dropout": BlindDropout(clip, texts),
            "distilled": Distilled(clip, texts),
        }
    return found


def remembered(method: Adapter, old: list[tuple[Shown, ClassTexts]]) -> list[float]:
    """Accuracy in [0, 1] of a tower on other pictures, by the words of their classes."""
    return [accuracy_on(method, part.pictures, part.labels, texts) for part, texts in old]


def with_masks(fitted: RAMT, choose: Callable[[str, Tensor], Tensor]) -> RAMT:
    """A copy with other bits; `choose` is given a weight's name and its mask."""
    twin = copy.copy(fitted)
    twin.masks_ = {name: choose(name, mask) for name, mask in fitted.masks_.items()}
    return twin


def at_random(seed: int) -> Callable[[str, Tensor], Tensor]:
    """As many zeros in each mask, anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def choose(_: str, mask: Tensor) -> Tensor:
        return mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)

    return choose


def smallest(clip: Clip) -> Callable[[str, Tensor], Tensor]:
    """As many zeros in each mask, at the smallest weights."""
    weights: Mapping[str, Any] = dict(clip.image.named_parameters())

    def choose(name: str, mask: Tensor) -> Tensor:
        order = weights[name].detach().abs().flatten().argsort()
        found = torch.ones(mask.numel(), dtype=torch.bool)
        found[order[: int((~mask).sum())]] = False
        return found.view_as(mask)

    return choose


PROOF = Proof(
    slug="r-amt",
    claim="Learning which weights of the attention to switch off adapts CLIP: the choice, not their number, "
    "is what counts.",
    baseline="the better of zero-shot and a random mask with the same number of zeros in each tensor",
    method="R-AMT with gradient dropout, λ = 1",
    metric="accuracy on 10 classes with 8 pictures a class in a style never seen (16 at full size)",
    run=run,
    controls={
        "masked.random_mask.accuracy": "the choice of the entries",
        "masked.smallest_weights.accuracy": "the learning of the choice, which the size of the weights makes",
    },
)
