"""A plan: everything a pre-training consists of, as one YAML file.

    objective: clip                                     or {name: alip, gamma_pair: 1.0}
    model: {width: 256, image: {...}, text: {...}}      a Config, or the name of a model to start from
    tokenizer: {kind: train, vocab_size: 8192}          or {kind: clip}
    views: {crop: [0.35, 1.0], flip: true}
    data:
      - {kind: tiny-imagenet, path: tiny-imagenet, per_batch: 160, unique_labels: true, hold_out: "9::10"}
      - {kind: emoji, path: noto-emoji, per_batch: 48}
    recipe: {epochs: 30, lr: 0.001, ...}

Paths are relative to the folder given as `--data`. `hold_out` is a slice or a list of class indices that no
training example may come from. The objective says which texts of an example it reads: `alt`, or for instance
`alt` and `synthetic`. A `teacher` among its options is the name or folder of a model.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.core.config import Config, TokenizerConfig, build
from clipworks.core.tokenizer import ClipTokenizer, FileTokenizer, Tokenizer, train_tokenizer
from clipworks.data.augment import RandomView
from clipworks.data.captions import draw_text
from clipworks.data.loader import Loader, Process, Reading
from clipworks.data.mixture import Mixture, Part
from clipworks.data.randomness import Draws
from clipworks.data.samplers import Shuffled, UniqueLabels
from clipworks.data.sentences import TextChoice
from clipworks.data.sets import LabeledSet
from clipworks.data.source import Source
from clipworks.data.streams import Stream
from clipworks.data.templates import SIMPLE_TEMPLATES
from clipworks.engine.callbacks import Callback, Evaluate
from clipworks.engine.checkpoints import Saving
from clipworks.engine.recipe import Recipe
from clipworks.engine.training import Result, Resume, Show, fit
from clipworks.errors import ConfigError, DataError, nearest, require
from clipworks.evaluate.zeroshot import labeled_batches, zero_shot
from clipworks.methods.pretrain.base import Objective
from clipworks.methods.pretrain.sources import SourcePlan, open_source, open_sources, open_stream


@dataclass(frozen=True)
class TokenizerPlan:
    """CLIP's own vocabulary, or one trained on the captions."""

    kind: Literal["clip", "train"] = "clip"
    vocab_size: int = 8192


@dataclass(frozen=True)
class ViewPlan:
    """Random crops of a picture; see `RandomView`."""

    crop: tuple[float, float] = (0.35, 1.0)
    flip: bool = True


@dataclass(frozen=True)
class EvaluationPlan:
    """A labeled set that is classified zero-shot after every so many steps (None: after every epoch)."""

    kind: Literal["tiny-imagenet", "labeled"]
    path: str
    split: str = "val"
    hold_out: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class Plan:
    """A whole pre-training; the module's docstring shows one."""

    model: Config
    data: tuple[SourcePlan, ...]
    recipe: Recipe
    objective: str | dict[str, Any] = "clip"
    tokenizer: TokenizerPlan = TokenizerPlan()
    views: ViewPlan = ViewPlan()
    evaluation: EvaluationPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        return asdict(self) | {"model": self.model.to_dict(), "recipe": self.recipe.to_dict()}


def read_plan(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Read a YAML file; `overrides` replace entries of its recipe.

    Raises:
        ConfigError: for an unknown key (with the nearest name), a missing one or a value of the wrong kind.
    """
    yaml = require("yaml", extra="train", purpose="reading a plan")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected keys and values, found {values!r}")
    values = dict(values)
    try:
        values["recipe"] = Recipe.from_dict({**values.get("recipe", {}), **(overrides or {})})
        return build(Plan, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def open_tokenizer(
    plan: TokenizerPlan,
    sources: Sequence[Source],
    context_length: int,
    seed: int = 0,
    wanted: Collection[str] = ("alt",),
) -> Tokenizer:
    """The tokenizer of a plan: CLIP's, or one trained on captions drawn from the sources."""
    if plan.kind == "clip":
        return ClipTokenizer(context_length=context_length)
    return train_tokenizer(
        list(_captions(sources, seed, wanted)), plan.vocab_size, context_length=context_length
    )


def _captions(sources: Sequence[Source], seed: int, wanted: Collection[str]) -> Sequence[str]:
    """Up to 60,000 captions a source, drawn as training draws them."""
    captions: list[str] = []
    for number, source in enumerate(sources):
        texts = _texts_of(source, wanted)
        rounds = max(1, -(-2000 // max(1, len(texts))))
        for view in range(min(rounds, 20)):
            for index, choices in enumerate(texts):
                captions.append(draw_text(choices, Draws(seed, number, view, index)))
    if not captions:
        raise DataError("the sources have no captions to train a tokenizer on")
    return captions


def _texts_of(source: Source, wanted: Collection[str]) -> list[Any]:
    """The choices of texts in a source, one entry a class or an example, without reading pictures twice."""
    by_class = getattr(source, "captions", None)
    if by_class is not None:
        return list(by_class)
    found: list[Any] = []
    for index in range(min(len(source), 60_000)):
        # A training goes on without what cannot be read, and counts it.
        with contextlib.suppress(DataError):
            texts = source[index].texts
            found += [texts[name] for name in wanted if name in texts]
    return [text for choices in found for text in ([choices] if isinstance(choices, str) else choices)]


def open_loader(
    plan: Plan,
    sources: Sequence[Source] | Stream,
    clip: Clip,
    texts: Mapping[str, int | None] = {"alt": 1},
    *,
    workers: int = 1,
    cache: bool = True,
) -> Loader:
    """Batches of a plan: mixed, drawn, cropped; `texts` as an objective names them."""
    image_size = clip.config.image.image_size
    mixed: Stream | Mixture
    if isinstance(sources, Stream):
        mixed, cache = sources, False
    else:
        mixed = Mixture(
            [
                Part(source, entry.per_batch, UniqueLabels() if entry.unique_labels else Shuffled())
                for source, entry in zip(sources, plan.data, strict=True)
            ]
        )
    return Loader(
        mixed,
        clip.preprocessing,
        clip.tokenizer,
        plan.data[0].per_batch if isinstance(mixed, Stream) else None,
        texts=TextChoice(texts),
        seed=plan.recipe.seed,
        process=this_process(),
        reading=Reading(workers=workers, cache="memory" if cache else None),
        transform=RandomView(
            image_size, crop=plan.views.crop, flip=plan.views.flip, seed=plan.recipe.seed
        ).of,
    )


def this_process() -> Process:
    """Which of the processes that `torchrun` started this is."""
    return Process(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def fresh_clip(plan: Plan, tokenizer: Tokenizer) -> Clip:
    """A model with initial weights whose vocabulary is that of the tokenizer."""
    settings = plan.model.tokenizer
    if isinstance(tokenizer, FileTokenizer):
        settings = TokenizerConfig(kind="file", fingerprint=tokenizer.fingerprint())
    text = replace(plan.model.text, vocab_size=tokenizer.vocab_size)
    config = replace(plan.model, text=text, tokenizer=settings)
    return Clip.from_config(config, tokenizer, seed=plan.recipe.seed)


def objective_named(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of a paper, by its slug, with its default options or others.

    Raises:
        ConfigError: if no file of this family has it, with the nearest names, or it lacks such an option.
    """
    known = [path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py")]
    known = sorted(set(known) - {"--init--", "base", "plan", "sources"})
    if name not in known:
        raise ConfigError(f"no objective {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    module = importlib.import_module(f"clipworks.methods.pretrain.{name.replace('-', '_')}")
    own = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Objective) and thing.__module__ == module.__name__
    ]
    given = dict(options or {})
    taken = list(inspect.signature(own[0]).parameters)
    for option in given:
        if option not in taken:
            raise ConfigError(
                f"the objective {name} has no option {option!r}{nearest(option, taken)}; "
                f"it has {', '.join(taken) or 'none'}"
            )
    if isinstance(given.get("teacher"), str):
        given["teacher"] = load(given["teacher"])
    return own[0](**given)


def objective_of(plan: Plan) -> Objective:
    """The objective of a plan.

    Raises:
        ConfigError: as `objective_named`, or if it has no name.
    """
    if isinstance(plan.objective, str):
        return objective_named(plan.objective)
    options = dict(plan.objective)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("the objective is a name, or has one beside its options: {name: alip, ...}")
    return objective_named(name, options)


def evaluation(plan: EvaluationPlan, root: Path) -> Callable[[Clip], dict[str, float]]:
    """The function that classifies a plan's evaluation set zero-shot, top-1 and top-5 in [0, 1].

    Raises:
        ConfigError: if the set has no labels.
    """
    source = open_source(
        SourcePlan(kind=plan.kind, path=plan.path, split=plan.split, hold_out=plan.hold_out), root
    )
    if not isinstance(source, LabeledSet):
        raise ConfigError(f"an evaluation needs labels; {plan.kind} has none")
    classes = replace(source.classes, templates=SIMPLE_TEMPLATES)

    def classify(clip: Clip) -> dict[str, float]:
        batches, _ = labeled_batches(clip, source, workers=1)
        found = zero_shot(clip, batches, classes, precision="auto")
        return {"top1": found.top1, "top5": found.top5}

    return classify


def train(
    plan: Plan,
    root: Path,
    folder: Path,
    *,
    init: str | Path | None = None,
    resume: Resume = "auto",
    show: Show = "auto",
    callbacks: Sequence[Callback] = (),
    saving: Saving = Saving(),  # noqa: B008  frozen
) -> Result:
    """Carry out a plan.

    Args:
        plan: what to train on what.
        root: the folder that the plan's paths start from.
        folder: where the training writes.
        init: name or folder of a model to start from; its tokenizer and geometry hold, not the plan's.
        resume, show, callbacks, saving: as `engine.fit` takes them.
    """
    objective = objective_of(plan)
    streams = [entry for entry in plan.data if entry.kind == "stream"]
    sources: Sequence[Source] | Stream
    if streams:
        if len(plan.data) > 1:
            raise ConfigError("a stream is all of the data of its plan, and cannot be mixed")
        if init is None and plan.tokenizer.kind == "train":
            raise ConfigError(
                "no tokenizer is trained on a stream; take {kind: clip} or a model to start from"
            )
        sources = open_stream(streams[0], root)
    else:
        sources = open_sources(plan.data, root, objective.texts)
    folder.mkdir(parents=True, exist_ok=True)
    if init is not None:
        clip = load(init)
    else:
        kept = folder / "tokenizer"
        if kept.is_dir() and resume is not False:
            tokenizer: Tokenizer = FileTokenizer.load(kept)
        else:
            tokenizer = open_tokenizer(
                plan.tokenizer,
                () if isinstance(sources, Stream) else sources,
                plan.model.text.context_length,
                plan.recipe.seed,
                objective.texts,
            )
            if isinstance(tokenizer, FileTokenizer):
                tokenizer.save(kept)
        clip = fresh_clip(plan, tokenizer)
    # The loader cuts texts at the length that the objective will give the model.
    loader = open_loader(plan, sources, objective.prepare(clip), objective.texts)
    watch = list(callbacks)
    if plan.evaluation is not None:
        watch.append(Evaluate(evaluation(plan.evaluation, root), every=plan.evaluation.steps))
    return fit(
        clip,
        objective,
        loader,
        plan.recipe,
        folder=folder,
        callbacks=watch,
        resume=resume,
        saving=saving,
        show=show,
    )
