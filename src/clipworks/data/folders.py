"""Pictures in folders: one subfolder a class, or pictures with captions in a table or beside them.

Keys are paths relative to the folder, the order is that of the files' names (`img2` before `img10`), so
both are the same on every machine.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipworks.data.records import CAPTION_FIELDS, SOURCES, label_of, texts_of
from clipworks.data.source import Example, Skipped, TextChoices, label_array
from clipworks.errors import DataError, nearest

TABLES = ("captions", "metadata", "annotations", "pairs")
"""Names under which a table of captions is looked for in a folder, with the suffixes of `read_table`."""

FILE_COLUMNS = ("file_name", "filename", "image", "image_path", "filepath", "path", "file", "url")
"""Columns that may name a picture, the first that is there."""

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


class ImageFolder:
    """A folder with one subfolder a class.

    Attributes:
        class_names: the subfolders' names in order; labels are indices into them.
        labels: (n,) int64.

    Raises:
        DataError: if there is no such folder, it has no subfolders, or one of them has no picture.
    """

    def __init__(self, folder: str | Path) -> None:
        from clipworks.core.pictures import find_pictures

        self.folder = _existing(Path(folder))
        classes = sorted(
            one for one in self.folder.iterdir() if one.is_dir() and not one.name.startswith(".")
        )
        if not classes:
            raise DataError(f"{self.folder}: has no subfolders, of which each would be a class")
        self.class_names = [one.name for one in classes]
        self._paths: list[Path] = []
        labels: list[int] = []
        for label, one in enumerate(classes):
            paths = find_pictures(one)
            if not paths:
                raise DataError(
                    f"{one}: has no picture, so class {one.name!r} would be a label without image"
                )
            self._paths += paths
            labels += [label] * len(paths)
        self.labels: NDArray[np.int64] | None = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int, /) -> Example:
        path = self._paths[index]
        label = None if self.labels is None else int(self.labels[index])
        return Example(path.relative_to(self.folder).as_posix(), path, {}, label)


class CaptionedFolder:
    """Pictures with captions: from a table, or from a text file beside each picture.

    A table is CSV, TSV, JSON or JSON Lines with a column of file names, relative to the table's folder,
    and columns of texts; several rows of one picture give it several texts. A column `label` may hold
    class indices or names.

    Args:
        location: the table, or a folder with one (`captions.csv`, `metadata.jsonl` …) or with files
            `x.txt` beside `x.jpg`, one caption a line.
        image: the column with file names; None takes the first of `FILE_COLUMNS`.
        texts: for each source of texts its column; None finds captions under their usual names.
        strict: raise for a picture that is missing instead of counting it.

    Attributes:
        class_names: where labels are names, those names in order; else None.
        skipped: rows without picture, pictures without text.

    Raises:
        DataError: if nothing is found, or a column is not there.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        image: str | None = None,
        texts: Mapping[str, str] | None = None,
        strict: bool = False,
    ) -> None:
        location = Path(location)
        self.skipped = Skipped()
        self.class_names: list[str] | None = None
        table = location if location.is_file() else _find_table(_existing(location))
        self.folder = location if table is None else table.parent
        if table is not None:
            self._examples = self._from_table(table, image, texts)
        else:
            self._examples = self._from_neighbors(location)
        for example in [one for one in self._examples if not one.image.is_file()]:
            if strict:
                raise DataError(f"{table}: names {example.key}, which is not there")
            self.skipped.add("missing picture", example.key)
        self._examples = [one for one in self._examples if one.image.is_file()]
        if not self._examples:
            raise DataError(f"{location}: no picture with a text; {self.skipped}")
        self.labels = label_array(example.label for example in self._examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Example:
        return self._examples[index]

    def _from_table(self, table: Path, image: str | None, texts: Mapping[str, str] | None) -> list[Example]:
        rows = list(read_table(table))
        if not rows:
            raise DataError(f"{table}: has no rows")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        for column in (image, *(texts or {}).values()):
            if column is not None and column not in columns:
                raise DataError(
                    f"{table}: no column {column!r}; there are {columns}{nearest(column, columns)}"
                )
        image = image or next((column for column in FILE_COLUMNS if column in columns), None)
        if image is None:
            raise DataError(f"{table}: no column of file names, such as {FILE_COLUMNS[0]!r}, among {columns}")
        if texts is None and not {*SOURCES, *CAPTION_FIELDS, "label"} & set(columns):
            raise DataError(f"{table}: no column of texts, such as 'caption', or 'label' among {columns}")
        labels = [row.get("label") for row in rows]
        if any(isinstance(label, str) and not label.strip().lstrip("-").isdigit() for label in labels):
            self.class_names = sorted({str(label) for label in labels if label not in (None, "")})
        numbers = {name: number for number, name in enumerate(self.class_names or [])}
        merged: dict[str, dict[str, list[str]]] = {}
        kept: dict[str, int | None] = {}
        for number, row in enumerate(rows, start=1):
            name = row.get(image)
            if not isinstance(name, str) or not name.strip():
                self.skipped.add("row without file name", f"{table}: row {number}")
                continue
            try:
                found = texts_of(row, texts)
                label = (
                    None if row.get("label") in (None, "") else numbers.get(str(row["label"]), row["label"])
                )
                kept.setdefault(name, None if label is None else label_of(label))
            except DataError as error:
                raise DataError(f"{table}: row {number}: {error}") from error
            sources = merged.setdefault(name, {})
            for source, text in found.items():
                sources.setdefault(source, []).extend([text] if isinstance(text, str) else text)
        return [
            Example(
                name, self.folder / name, {key: _one_or_all(text) for key, text in texts.items()}, kept[name]
            )
            for name, texts in merged.items()
        ]

    def _from_neighbors(self, folder: Path) -> list[Example]:
        from clipworks.core.pictures import find_pictures

        examples = []
        paths = find_pictures(folder)
        if not paths:
            raise DataError(f"{folder}: no picture in it, and no table such as captions.csv")
        for path in paths:
            key = path.relative_to(folder).as_posix()
            try:
                lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
            except FileNotFoundError:
                self.skipped.add("picture without text", key)
                continue
            except (OSError, UnicodeDecodeError) as error:
                self.skipped.add("unreadable text", key, str(error))
                continue
            captions = [line.strip() for line in lines if line.strip()]
            if captions:
                examples.append(Example(key, path, {"alt": _one_or_all(captions)}))
            else:
                self.skipped.add("picture without text", key)
        return examples


def read_table(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, TSV, JSON (a list of objects) or JSON Lines file.

    Raises:
        DataError: if it cannot be read or is none of these; says the line.
    """
    path = Path(path)
    suffix = path.suffix.casefold()
    if suffix not in _SUFFIXES:
        raise DataError(f"{path}: a table is one of {', '.join(_SUFFIXES)}, not {suffix or 'without suffix'}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                rows = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
                for number, row in enumerate(rows, start=2):
                    if None in row or None in row.values():
                        raise DataError(f"{path}: line {number} has not {len(rows.fieldnames or ())} columns")
                    yield dict(row)
            else:
                texts = enumerate(file, start=1) if suffix == ".jsonl" else [(1, file.read())]
                for number, text in texts:
                    if text.strip():
                        content = json.loads(text)
                        for row in content if suffix == ".json" and isinstance(content, list) else [content]:
                            if not isinstance(row, dict):
                                raise DataError(
                                    f"{path}: line {number} holds a {type(row).__name__}, not a row"
                                )
                            yield row
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such table") from error
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(f"{path}: cannot be read as {suffix.lstrip('.')} ({error})") from error


def open_folder(location: str | Path) -> ImageFolder | CaptionedFolder:
    """What stands in a folder: captions where there are any, else one class a subfolder.

    Raises:
        DataError: if it is neither.
    """
    path = Path(location)
    if path.is_file() or _find_table(_existing(path)) is not None or any(path.rglob("*.txt")):
        return CaptionedFolder(path)
    return ImageFolder(path)


def _find_table(folder: Path) -> Path | None:
    found = [
        table for name in TABLES for suffix in _SUFFIXES if (table := folder / f"{name}{suffix}").is_file()
    ]
    if len(found) > 1:
        raise DataError(
            f"{folder}: has several tables, {', '.join(one.name for one in found)}; name one of them"
        )
    return found[0] if found else None


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not any(folder.iterdir()):
        raise DataError(f"{folder}: the folder is empty")
    return folder


def _one_or_all(texts: list[str]) -> TextChoices:
    return texts[0] if len(texts) == 1 else texts
