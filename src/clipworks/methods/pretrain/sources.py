"""Where the examples of a plan come from."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipworks.core.config import build
from clipworks.data.pairs import open_examples
from clipworks.data.rewrite import read_rewrites
from clipworks.data.rewritten import Rewritten
from clipworks.data.shards import ShardPieces, is_remote
from clipworks.data.source import Selected, Source
from clipworks.data.streams import Stream
from clipworks.errors import ConfigError
from clipworks.evaluate.sets import class_slice


@dataclass(frozen=True)
class SourcePlan:
    """Where examples come from and how many of them are in each batch.

    Attributes:
        kind: the form of the set; `labeled` is Parquet with `classes.json`, `captioned` tar shards of a
            split, `pairs` a table, folder or shards of one's own (see `open_pairs`), `stream` tar shards by
            path, pattern or address that are read from front to back, and then are all of the data.
        path: folder, relative to the data folder; of a `stream` it may be an address; unused for `world`.
        per_batch: examples in each batch.
        split: which files.
        unique_labels: no class twice in a batch.
        hold_out: class indices left out, `"9::10"` or `"3,5"`.
        languages: for `emoji` and `world`.
        examples: for `world`, how many scenes there are; for `stream`, how long an epoch is, by default one
            reading of all shards.
        texts: for `pairs` and `stream`, the field or column of each source of texts; if not said, the usual
            names (`caption`, `synthetic`, `long`, `short`, ...).
        rewrites: file that `clipworks curate rewrite` wrote, relative to the data folder; its rewrites stand
            with the caption as texts `rewrite`.
        scenes: for `world`, which scenes; settings of its `SceneConfig`, one to three things if not said.
    """

    kind: Literal["tiny-imagenet", "labeled", "emoji", "captioned", "pairs", "stream", "world"]
    path: str = ""
    per_batch: int = 64
    split: str = "train"
    unique_labels: bool = False
    hold_out: str = ""
    languages: tuple[str, ...] = ("en", "de", "fr", "es", "zh")
    examples: int | None = None
    texts: dict[str, str] = field(default_factory=dict)
    rewrites: str = ""
    scenes: dict[str, Any] = field(default_factory=dict)


def open_source(plan: SourcePlan, root: Path, wanted: Collection[str] = ("alt",)) -> Source:
    """The examples of one entry of a plan.

    Args:
        plan: the entry; not a stream.
        root: what its paths start from.
        wanted: the sources of texts that the training reads.

    Raises:
        DataError: if its files are missing.
    """
    source = _open(plan, root, wanted)
    if plan.rewrites:
        return Rewritten(source, read_rewrites(root / plan.rewrites))
    return Rewritten(source) if "rewrite" in wanted else source


def _open(plan: SourcePlan, root: Path, wanted: Collection[str]) -> Source:
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
    if plan.kind == "pairs":
        return open_examples(folder, texts=plan.texts or None)
    if plan.kind == "stream":
        raise ConfigError("a stream is all of the data of its plan, and cannot be mixed or looked into")
    from clipworks.data.world.dataset import WorldCaptions, WorldScenes
    from clipworks.data.world.scenes import SceneConfig
    from clipworks.data.world.words import LANGUAGES

    config = build(SceneConfig, {"count": [1, 3], **plan.scenes})
    spoken = [language for language in plan.languages if language in LANGUAGES]
    length = 100_000 if plan.examples is None else plan.examples
    if set(wanted) <= {"alt"}:
        return WorldCaptions(config, length=length, languages=spoken)
    return WorldScenes(config, length=length, sources=sorted({"alt", *wanted}))


def open_sources(
    entries: Sequence[SourcePlan], root: Path, wanted: Collection[str] = ("alt",)
) -> list[Source]:
    """The examples of every entry of a plan; what one entry holds out, by its classes' names, no entry shows.

    Raises:
        DataError: if files are missing.
    """
    sources = [open_source(entry, root, wanted) for entry in entries]
    held = [name for entry in entries if entry.hold_out for name in held_out_names(entry, root)]
    if not held:
        return sources
    return [
        source if entry.kind in ("tiny-imagenet", "labeled") else without_words(source, held)
        for source, entry in zip(sources, entries, strict=True)
    ]


def held_out_names(plan: SourcePlan, root: Path) -> list[str]:
    """All names of the classes that an entry holds out."""
    from clipworks.data.captions import class_texts

    texts = class_texts(root / plan.path / "classes.json")
    return [name for index in class_slice(plan.hold_out, len(texts)) for name in texts.all_names(index)]


def open_stream(plan: SourcePlan, root: Path) -> Stream:
    """The shards of an entry of kind `stream`, read from front to back and shuffled in a window.

    Raises:
        ConfigError: for settings that a stream cannot have.
        DataError: if there is no such shard.
    """
    if plan.unique_labels or plan.hold_out or plan.rewrites:
        raise ConfigError("a stream has no labels to be unique or held out, and takes no file of rewrites")
    location = plan.path if is_remote(plan.path) else str(root / plan.path)
    if Path(location).is_dir():
        location = str(Path(location) / "*.tar")
    return Stream(ShardPieces(location, texts=plan.texts or None), examples=plan.examples)


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
