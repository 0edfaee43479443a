"""Well-known sets in the forms in which the hub has them.

Each function returns an ordinary `Source`; nothing else in the library knows these sets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipworks.data.backgrounds import Background, Plain, Varied
from clipworks.data.captions import AnyOf, CaptionGrid, ClassTexts, class_indices, class_texts
from clipworks.data.parquet import ParquetExamples
from clipworks.data.randomness import fold, key_number
from clipworks.data.shards import TarShards
from clipworks.data.source import ClassCaptioned, Example, Selected, Source, TextChoices
from clipworks.data.templates import EMOJI_TEMPLATES, TRAINING_TEMPLATES
from clipworks.errors import DataError, nearest

LANGUAGES = ("en", "de", "fr", "es", "zh")
_HELD_OUT = 0x4E1D
_KEYWORDS = 4  # of them in one caption


class LabeledSet(ClassCaptioned):
    """A source of labeled pictures with captions of their class as `alt`.

    Attributes:
        classes: names and synonyms, in the order of the labels.
    """

    def __init__(self, source: Source, classes: ClassTexts, templates: Sequence[str]) -> None:
        super().__init__(source, classes.grids(templates))
        self.classes = classes


def labeled_parquet(
    folder: str | Path,
    split: str,
    classes: Sequence[int | str] | None = None,
    *,
    templates: Sequence[str] = TRAINING_TEMPLATES,
    shards: int | None = None,
) -> LabeledSet:
    """A folder with `<split>-*.parquet` and `classes.json`: Tiny-ImageNet, CIFAR-10 and many others.

    Args:
        folder: where the files are.
        split: `train`, `val` or `test`.
        classes: only these, by index or name; labels then count in the order given.
        templates: what training draws captions from.
        shards: only the first so many files.

    Raises:
        DataError: if files are missing or there is no such split or class.
    """
    folder = Path(folder)
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        splits = sorted({file.name.rsplit("-", 1)[0] for file in folder.glob("*-*.parquet")})
        raise DataError(f"{folder}: no files {split}-*.parquet{nearest(split, splits)}; there are {splits}")
    source: Source = ParquetExamples(files[:shards])
    texts = class_texts(folder / "classes.json")
    labels = _labels(source, folder)
    if classes is not None:
        chosen = class_indices(texts.names, classes)
        position = np.full(len(texts), -1, dtype=np.int64)
        position[chosen] = np.arange(len(chosen))
        kept = np.flatnonzero(position[labels] >= 0)
        source = Selected(source, kept, position[labels[kept]])
        texts = texts.select(chosen)
    return LabeledSet(source, texts, templates)


def tiny_imagenet(
    folder: str | Path,
    split: str,
    classes: Sequence[int | str] | None = None,
    *,
    templates: Sequence[str] = TRAINING_TEMPLATES,
    shards: int | None = None,
) -> LabeledSet:
    """Tiny-ImageNet: 200 classes, 64 × 64 pixels; `train` in eight balanced shards, or `val`.

    Arguments and errors as in `labeled_parquet`.
    """
    return labeled_parquet(folder, split, classes, templates=templates, shards=shards)


def cifar10(
    folder: str | Path,
    split: str,
    classes: Sequence[int | str] | None = None,
    *,
    templates: Sequence[str] = TRAINING_TEMPLATES,
) -> LabeledSet:
    """CIFAR-10: ten classes, 32 × 32 pixels, `train` or `test`.

    Arguments and errors as in `labeled_parquet`.
    """
    return labeled_parquet(folder, split, classes, templates=templates)


class Emoji:
    """Emoji with their names and keywords in several languages; see `emoji`."""

    def __init__(
        self,
        source: Source,
        records: Sequence[dict[str, Any]],
        languages: Sequence[str],
        background: Background,
    ) -> None:
        self.source, self.records, self.languages = source, list(records), tuple(languages)
        self._background = background
        self.labels: NDArray[np.int64] | None = np.arange(len(self.records), dtype=np.int64)
        self._texts = [self._texts_of(record) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Example:
        example = self.source[index]
        record = self.records[index]
        return replace(
            example,
            texts=self._texts[index],
            label=index,
            background=self._background,
            extra={"emoji": record["emoji"], "words": record["en"]["keywords"]},
        )

    def names(self, language: str = "en") -> list[str]:
        """The name of every emoji in one language, in the order of the labels."""
        return [record[language]["name"] for record in self.records]

    def _texts_of(self, record: dict[str, Any]) -> dict[str, TextChoices]:
        texts: dict[str, TextChoices] = {}
        for language in self.languages:
            name, keywords = record[language]["name"], record[language]["keywords"]
            others = [word for word in keywords if word.casefold() != name.casefold()]
            comma, opening, closing = ("、", "（", "）") if language == "zh" else (", ", " (", ")")
            listed = f"{name}{opening}{comma.join(others[:_KEYWORDS])}{closing}"
            texts[language] = CaptionGrid([name, listed] if others else [name], EMOJI_TEMPLATES[language])
        return {"alt": AnyOf(list(texts.values())), **texts}


def emoji(
    folder: str | Path,
    languages: Sequence[str] = LANGUAGES,
    held_out: bool | None = False,
    *,
    background: Background | None = None,
) -> Emoji:
    """Emoji, `all-*.tar` with `annotations.json`.

    Each has a text in every language under its code, and `alt`, which is any of them.

    Args:
        folder: where the files are.
        languages: which languages, of en, de, fr, es, zh.
        held_out: a tenth of the emoji, chosen by a hash of their keys, is kept for evaluation: False is
            all but those, True those alone, None all.
        background: what is behind the emoji; None is a varied plain color for training and white for
            the held-out ones.

    Raises:
        DataError: if files are missing or do not fit together, or a language is not there.
    """
    folder = Path(folder)
    for language in languages:
        if language not in LANGUAGES:
            raise DataError(f"no language {language!r} among {', '.join(LANGUAGES)}")
    source = TarShards(sorted(folder.glob("all-*.tar")) or folder / "all-*.tar")
    try:
        records = {
            record["key"]: record
            for record in json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: annotations.json is not a list of emoji with keys ({error})") from error
    keys = source.keys
    unknown = [key for key in keys if key not in records]
    if unknown:
        raise DataError(f"{folder}: {len(unknown)} pictures have no annotation, the first is {unknown[0]}")
    kept = [index for index, key in enumerate(keys) if held_out is None or is_held_out(key) == held_out]
    if background is None:
        background = Plain() if held_out else Varied()
    return Emoji(Selected(source, kept), [records[keys[index]] for index in kept], languages, background)


def is_held_out(key: str, tenths: int = 1) -> bool:
    """Whether a key is among the given tenths that evaluation keeps for itself; the same on every machine."""
    return fold(key_number(key), _HELD_OUT) % 10 < tenths


def captioned(folder: str | Path, split: str) -> TarShards:
    """Shards `<split>-*.tar` of photographs with their captions as `alt`: Flickr8k, COCO and their like.

    Raises:
        DataError: if there is no such split.
    """
    folder = Path(folder)
    files = sorted(folder.glob(f"{split}-*.tar"))
    if not files:
        splits = sorted({file.name.rsplit("-", 1)[0] for file in folder.glob("*-*.tar")})
        raise DataError(f"{folder}: no files {split}-*.tar{nearest(split, splits)}; there are {splits}")
    return TarShards(files)


def _labels(source: Source, folder: Path) -> NDArray[np.int64]:
    labels = source.labels
    if labels is None:
        raise DataError(f"{folder}: the files have no column of labels")
    return labels
