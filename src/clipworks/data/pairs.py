"""One's own pictures and what is said about them, whatever form they are in.

    table     CSV, TSV, JSON or JSON Lines: a column of file names, one or several of captions
    folder    a table in it; or beside x.jpg a file x.txt, one caption a line, or x.json, a record of them
    shards    WebDataset tar files or Parquet files: a path, a folder, a pattern or braces

Captions are read once, when the pairs are opened, so that pictures without one are known before anything is
trained. Pictures are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipworks.data.folders import TABLES, CaptionedFolder
from clipworks.data.parquet import ParquetExamples
from clipworks.data.randomness import key_numbers, mix
from clipworks.data.records import texts_of
from clipworks.data.shards import TarShards, is_remote, locate
from clipworks.data.source import Example, Examples, Skipped, Source, TextChoices, iterate
from clipworks.errors import ConfigError, DataError, PictureError

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
_SPLIT = 0x5911


class Pairs:
    """Pictures with one or several captions each, as a source of texts `alt`.

    Args:
        source: the examples.
        captions: of each example, in its order; none for one that is left out.
        rows: which examples, (n,); None takes those with a caption.
        skipped: what could not be used, with counts.

    Attributes:
        captions: of each picture, at least one.
        labels: None; captions are no classes.
    """

    labels: NDArray[np.int64] | None = None

    def __init__(
        self,
        source: Source,
        captions: Sequence[Sequence[str]],
        rows: Iterable[int] | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        self.source = source
        self._rows = [row for row, said in enumerate(captions) if said] if rows is None else list(rows)
        self.captions = [tuple(captions[row]) for row in self._rows]
        self.skipped = skipped or Skipped()
        self._every = captions

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Example:
        return replace(self.source[self._rows[index]], texts={"alt": self.captions[index]})

    def select(self, rows: Iterable[int]) -> Pairs:
        """Some of the pairs, by their places, in that order."""
        return Pairs(self.source, self._every, [self._rows[row] for row in rows], self.skipped)

    def split(self, held_out: int, seed: int = 0) -> tuple[Pairs, Pairs]:
        """All but `held_out` pairs, and these; which ones they are depends on their keys and the seed alone.

        Raises:
            DataError: if either would be empty.
        """
        if not 0 < held_out < len(self):
            raise DataError(f"{held_out} of {len(self)} pairs cannot be held out")
        keys = key_numbers([self[index].key for index in range(len(self))])
        # Equal keys, as two shards may have them, stay together apart from the cut.
        order = np.argsort(mix(keys, _SPLIT, seed), kind="stable").tolist()
        return self.select(sorted(order[held_out:])), self.select(sorted(order[:held_out]))


def open_pairs(location: str | Path, *, image: str | None = None, captions: Sequence[str] = ()) -> Pairs:
    """Open a table, a folder or shards of pictures with captions.

    Args:
        location: see the head of this module.
        image: the column with file names (of Parquet: with pictures); None finds it.
        captions: columns, fields or member extensions that hold captions, all of them counting; none finds
            `alt`, `caption`, `captions`, `text` or `txt`.

    Returns:
        The pairs; `skipped` counts pictures that are missing, damaged records and pictures without caption.

    Raises:
        DataError: if nothing is there, a column is missing, no picture has a caption, or more than half of
            the pictures that a table names are missing.
        ConfigError: for a column of pictures where there are no columns.
    """
    source = open_examples(location, image=image, texts={name: name for name in captions} or None)
    skipped = Skipped()
    found = getattr(source, "skipped", None)
    if isinstance(found, Skipped):
        skipped.update(found)
    _refuse_wrong_folder(location, source, skipped)
    listed: list[list[str]] = []
    others: set[str] = set()
    for index in range(len(source)):
        listed.append([])
        try:
            example = source[index]
        except (DataError, PictureError) as error:
            skipped.add("unreadable record", f"record {index}", str(error))
            continue
        names = captions or ("alt",)
        listed[-1] = [text for name in names for text in _all(example.texts.get(name, ())) if text.strip()]
        if not listed[-1]:
            others |= set(example.texts)
            skipped.add("picture without caption", example.key)
    if not any(listed):
        hint = f"; there are texts {', '.join(sorted(others))}: name one as the captions" if others else ""
        raise DataError(f"{location}: none of {len(source)} pictures has a caption{hint} ({skipped})")
    return Pairs(source, listed, skipped=skipped)


def open_examples(
    location: str | Path, *, image: str | None = None, texts: dict[str, str] | None = None
) -> Source:
    """The examples of a table, a folder or shards, with all sources of texts that they have.

    Args:
        location: see the head of this module.
        image: as in `open_pairs`.
        texts: for each source of texts its column, field or member extension; None finds the usual names.

    Raises:
        DataError: if nothing is there, or a column is missing.
    """
    location = str(location)
    path = Path(location)
    if path.is_file() and path.suffix.casefold() in TABLE_SUFFIXES:
        return CaptionedFolder(path, image=image, texts=texts)
    if path.is_dir():
        if any(path.glob("*.parquet")):
            return ParquetExamples(sorted(path.glob("*.parquet")), image=image, texts=texts)
        if any(path.glob("*.tar")):
            return _tar(location, image, texts)
        if any((path / f"{name}{suffix}").is_file() for name in TABLES for suffix in TABLE_SUFFIXES):
            return CaptionedFolder(path, image=image, texts=texts)
        return _beside(path, image, texts)
    if is_remote(location) or path.suffix == ".tar" or location.endswith((".tar", ".tar}")):
        return _tar(location, image, texts)
    if location.endswith(".parquet"):
        return ParquetExamples(locate(location), image=image, texts=texts)
    if path.exists():
        raise DataError(
            f"{location}: not pairs; they come as a table ({', '.join(TABLE_SUFFIXES)}), a folder, or shards "
            "(.tar, .parquet)"
        )
    raise DataError(f"{location}: no such table, folder or shard")


def _tar(location: str, image: str | None, texts: dict[str, str] | None) -> TarShards:
    if image is not None:
        raise ConfigError(f"{location}: tar shards have no column {image!r}; their pictures are members")
    return TarShards(location, texts=texts)


class _Beside(Examples):
    """Pictures of a folder with the captions in files beside them."""

    def __init__(self, examples: Iterable[Example], skipped: Skipped) -> None:
        super().__init__(examples)
        self.skipped = skipped


def _beside(folder: Path, image: str | None, texts: dict[str, str] | None) -> _Beside:
    from clipworks.core.pictures import find_pictures

    if image is not None:
        raise ConfigError(f"{folder}: has no table, so there is no column {image!r}")
    paths, skipped = find_pictures(folder), Skipped()
    if not paths:
        raise DataError(f"{folder}: no picture in it, no table such as captions.csv, no shards")
    examples = []
    for path in paths:
        key = path.relative_to(folder).as_posix()
        record: dict[str, object] = {}
        try:
            if path.with_suffix(".txt").is_file():
                lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
                record["txt"] = [line.strip() for line in lines if line.strip()]
            if path.with_suffix(".json").is_file():
                fields = json.loads(path.with_suffix(".json").read_text(encoding="utf-8-sig"))
                if not isinstance(fields, dict):
                    raise DataError(f"its json is a {type(fields).__name__}, not an object")
                record |= fields
            found = texts_of(record, texts)
        except (OSError, ValueError, DataError) as error:
            skipped.add("unreadable captions", key, str(error))
            continue
        examples.append(Example(key, path, found))
    return _Beside(examples, skipped)


def _refuse_wrong_folder(location: str | Path, source: Source, skipped: Skipped) -> None:
    missing = skipped.counts.get("missing picture", 0)
    if missing > len(source):
        folder = getattr(source, "folder", "")
        raise DataError(
            f"{location}: {missing} of the {missing + len(source)} pictures it names are missing, the first "
            f"is {skipped.first['missing picture'][0]}; file names start from {folder}"
        )


def _all(texts: TextChoices) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def all_captions(pairs: Source) -> list[str]:
    """Every caption of every picture, in order, repetitions included."""
    if isinstance(pairs, Pairs):
        return [text for said in pairs.captions for text in said]
    return [text for example in iterate(pairs) for text in _all(example.texts.get("alt", ()))]
