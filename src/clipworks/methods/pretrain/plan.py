"""A plan: everything a pre-training consists of, as one YAML file.

    objective: clip
    model: {width: 256, image: {...}, text: {...}}      a Config, or the name of a model to start from
    tokenizer: {kind: train, vocab_size: 8192}          or {kind: clip}
    views: {crop: [0.35, 1.0], flip: true}
    data:
      - {kind: tiny-imagenet, path: tiny-imagenet, per_batch: 160, unique_labels: true, hold_out: "9::10"}
      - {kind: emoji, path: noto-emoji, per_batch: 48}
    recipe: {epochs: 30, lr: 0.001, ...}

Paths are relative to the folder given as `--data`. `hold_out` is a slice or a list of class indices that no
training example may come from.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from clipworks.data.sets import LabeledSet
from clipworks.data.source import Selected, Source
from clipworks.data.templates import SIMPLE_TEMPLATES
from clipworks.engine.callbacks import Callback, Evaluate
from clipworks.engine.checkpoints import Saving
from clipworks.engine.recipe import Recipe
from clipworks.engine.training import Result, Resume, Show, fit
from clipworks.errors import ConfigError, DataError, nearest, require
from clipworks.evaluate.sets import class_slice
from clipworks.evaluate.zeroshot import labeled_batches, zero_shot
from clipworks.methods.pretrain.base import Objective


@dataclass(frozen=True)
class SourcePlan:
    """Where examples come from and how many of them are in each batch.

    Attributes:
        kind: the form of the set; `labeled` is Parquet with `classes.json`, `captioned` tar shards.
        path: folder, relative to the data folder; unused for `world`.
        per_batch: examples in each batch.
        split: which files.
        unique_labels: no class twice in a batch.
        hold_out: class indices left out, `"9::10"` or `"3,5"`.
        languages: for `emoji` and `world`.
        examples: for `world`, how many scenes there are.
        scenes: for `world`, which scenes; settings of its `SceneConfig`, one to three things if not said.
    """

    kind: Literal["tiny-imagenet", "labeled", "emoji", "captioned", "world"]
    path: str = ""
    per_batch: int = 64
    split: str = "train"
    unique_labels: bool = False
    hold_out: str = ""
    languages: tuple[str, ...] = ("en", "de", "fr", "es", "zh")
    examples: int = 100_000
    scenes: dict[str, Any] = field(default_factory=dict)


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
    objective: str = "clip"
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


def open_source(plan: SourcePlan, root: Path) -> Source:
    """The examples of one entry of a plan.

    Raises:
        DataError: if its files are missing.
    """
    from clipworks.data import sets

    folder = root / plan.path
    if plan.kind in ("tiny-imagenet", "labeled"):
        from clipworks.data.captions import class_names

        names = class_names(folder / "classes.json")
        held = set(class_slice(plan.hold_out, len(names)))
        kept = [index for index in range(len(names)) if index not in held]
        return sets.labeled_parquet(folder, plan.split, kept)
    if plan.kind == "emoji":
        return sets.emoji(folder, plan.languages, held_out=plan.split != "train")
    if plan.kind == "captioned":
        return sets.captioned(folder, plan.split)
    from clipworks.data.world.dataset import WorldCaptions
    from clipworks.data.world.scenes import SceneConfig
    from clipworks.data.world.words import LANGUAGES

    config = build(SceneConfig, {"count": [1, 3], **plan.scenes})
    spoken = [language for language in plan.languages if language in LANGUAGES]
    return WorldCaptions(config, length=plan.examples, languages=spoken)


def open_sources(plan: Plan, root: Path) -> list[Source]:
    """The examples of every entry of a plan; what one entry holds out, by its classes' names, no entry shows.

    Raises:
        DataError: if files are missing.
    """
    sources = [open_source(entry, root) for entry in plan.data]
    held = [name for entry in plan.data if entry.hold_out for name in held_out_names(entry, root)]
    if not held:
        return sources
    return [
        source if entry.kind in ("tiny-imagenet", "labeled") else without_words(source, held)
        for source, entry in zip(sources, plan.data, strict=True)
    ]


def held_out_names(plan: SourcePlan, root: Path) -> list[str]:
    """All names of the classes that an entry holds out."""
    from clipworks.data.captions import class_texts

    texts = class_texts(root / plan.path / "classes.json")
    return [name for index in class_slice(plan.hold_out, len(texts)) for name in texts.all_names(index)]


def without_words(source: Source, names: Sequence[str]) -> Source:
    """The examples none of whose texts mentions one of the names, in singular or plural, as whole words."""
    listed = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    mention = re.compile(rf"\b(?:{listed})(?:s|es)?\b", re.IGNORECASE)

    def mentions(index: int) -> bool:
        example = source[index]
        texts = [
            text
            for choices in example.texts.values()
            for text in ([choices] if isinstance(choices, str) else choices)
        ]
        return any(mention.search(text) for text in [*texts, *map(str, example.extra.get("words", ()))])

    return Selected(source, [index for index in range(len(source)) if not mentions(index)])


def open_tokenizer(
    plan: TokenizerPlan, sources: Sequence[Source], context_length: int, seed: int = 0
) -> Tokenizer:
    """The tokenizer of a plan: CLIP's, or one trained on captions drawn from the sources."""
    if plan.kind == "clip":
        return ClipTokenizer(context_length=context_length)
    return train_tokenizer(list(_captions(sources, seed)), plan.vocab_size, context_length=context_length)


def _captions(sources: Sequence[Source], seed: int) -> Sequence[str]:
    """Up to 60,000 captions a source, drawn as training draws them."""
    captions: list[str] = []
    for number, source in enumerate(sources):
        texts = _texts_of(source)
        rounds = max(1, -(-2000 // max(1, len(texts))))
        for view in range(min(rounds, 20)):
            for index, choices in enumerate(texts):
                captions.append(draw_text(choices, Draws(seed, number, view, index)))
    if not captions:
        raise DataError("the sources have no captions to train a tokenizer on")
    return captions


def _texts_of(source: Source) -> list[Any]:
    """The choices of texts in a source, one entry a class or an example, without reading pictures twice."""
    by_class = getattr(source, "captions", None)
    if by_class is not None:
        return list(by_class)
    every = [source[index].texts["alt"] for index in range(min(len(source), 60_000))]
    return [text for choices in every for text in ([choices] if isinstance(choices, str) else choices)]


def open_loader(
    plan: Plan, sources: Sequence[Source], clip: Clip, *, workers: int = 1, cache: bool = True
) -> Loader:
    """Batches of a plan: mixed, drawn, cropped."""
    parts = [
        Part(source, entry.per_batch, UniqueLabels() if entry.unique_labels else Shuffled())
        for source, entry in zip(sources, plan.data, strict=True)
    ]
    image_size = clip.config.image.image_size
    return Loader(
        Mixture(list(parts)),
        clip.preprocessing,
        clip.tokenizer,
        texts=("alt",),
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


def objective_named(name: str) -> Objective:
    """The objective of a paper, by its slug, with its default options.

    Raises:
        ConfigError: if no file of this family has it, with the nearest names.
    """
    known = [path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py")]
    known = sorted(set(known) - {"--init--", "base", "plan"})
    if name not in known:
        raise ConfigError(f"no objective {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    module = importlib.import_module(f"clipworks.methods.pretrain.{name.replace('-', '_')}")
    own = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Objective) and thing.__module__ == module.__name__
    ]
    return own[0]()


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
    folder.mkdir(parents=True, exist_ok=True)
    sources = open_sources(plan, root)
    if init is not None:
        clip = load(init)
    else:
        kept = folder / "tokenizer"
        if kept.is_dir() and resume is not False:
            tokenizer: Tokenizer = FileTokenizer.load(kept)
        else:
            tokenizer = open_tokenizer(
                plan.tokenizer, sources, plan.model.text.context_length, plan.recipe.seed
            )
            if isinstance(tokenizer, FileTokenizer):
                tokenizer.save(kept)
        clip = fresh_clip(plan, tokenizer)
    loader = open_loader(plan, sources, clip)
    watch = list(callbacks)
    if plan.evaluation is not None:
        watch.append(Evaluate(evaluation(plan.evaluation, root), every=plan.evaluation.steps))
    result = fit(
        clip,
        objective_named(plan.objective),
        loader,
        plan.recipe,
        folder=folder,
        callbacks=watch,
        resume=resume,
        saving=saving,
        show=show,
    )
    (folder / "skipped.txt").write_text(f"{loader.skipped}\n", encoding="utf-8")
    return result
