"""Parquet files in the layout of the hub: pictures as `{bytes, path}`, labels, captions in columns.

Two ways in. As a `Source`, rows are asked for in any order; row groups are read when one of their rows
is wanted and kept, the most recently used ones, up to `memory` bytes; files much larger than that are
better streamed than shuffled. As `pieces` of a `Stream`, row
groups are read from front to back a few dozen rows at a time, however large the group.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipworks.data.records import CAPTION_FIELDS, SOURCES, texts_of
from clipworks.data.source import Example, Skipped
from clipworks.errors import DataError, nearest, require

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
_ROWS_AT_ONCE = 64
_READ_BYTES = 1 << 20  # of a column at once, where otherwise all of it in a row group would be read


class ParquetExamples:
    """Examples in Parquet files.

    Keys are the file's name without its suffix and the row: `train-000/17`.

    Args:
        files: paths or patterns, in the order in which they count.
        image: the column with pictures, a struct `{bytes, path}` or binary; None finds it.
        label: the column with class indices; None takes `label` where it is there.
        texts: for each source of texts its column; None takes captions where they are found.
        memory: how many bytes of row groups are kept; at least one group always is.
        strict: raise for a file that cannot be read instead of counting it.

    Attributes:
        skipped: files and rows that could not be read.

    Raises:
        DataError: if no file is found, a column is missing, or the files' columns differ.
    """

    def __init__(
        self,
        files: str | Path | Iterable[str | Path],
        *,
        image: str | None = None,
        label: str | None = None,
        texts: Mapping[str, str] | None = None,
        memory: int = 1 << 30,
        strict: bool = False,
    ) -> None:
        self._parquet = require("pyarrow.parquet", extra="train", purpose="reading Parquet files")
        self.skipped = Skipped()
        self.files: list[Path] = []
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        counts: list[int] = []
        schema: Any = None
        for path in _paths(files):
            try:
                with self._parquet.ParquetFile(path) as opened:
                    found = opened.schema_arrow
                    groups = [
                        opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)
                    ]
            except Exception as error:
                reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
                if strict:
                    raise DataError(f"{path}: {reason} ({_first_line(error)})") from error
                self.skipped.add(reason, str(path), _first_line(error))
                continue
            if schema is not None and found.names != schema.names:
                raise DataError(f"{path}: has the columns {found.names}, the files before it {schema.names}")
            schema = found
            self._groups += [(len(self.files), group) for group in range(len(groups))]
            counts += groups
            self.files.append(path)
        if not self.files:
            raise DataError(f"no Parquet file could be read: {self.skipped}")
        self._choose_columns(schema, image, label, texts)
        self._starts = np.cumsum([0, *counts])
        self._first_group = [
            self._groups.index((file, 0)) if (file, 0) in self._groups else 0
            for file in range(len(self.files))
        ]
        self._memory = memory
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._labels: NDArray[np.int64] | None = None

    def _choose_columns(
        self, schema: Any, image: str | None, label: str | None, texts: Mapping[str, str] | None
    ) -> None:
        names: list[str] = schema.names
        for column in (image, label, *(texts or {}).values()):
            if column is not None and column not in names:
                raise DataError(
                    f"{self.files[0]}: no column {column!r}; there are {names}{nearest(column, names)}"
                )
        types = self._types = {name: str(schema.field(name).type) for name in names}
        pictures = [
            name for name in names if "binary" in types[name] or types[name].startswith("struct<bytes:")
        ]
        self.image = image or next((name for name in _IMAGE_COLUMNS if name in pictures), None)
        if self.image is not None and self.image not in pictures:
            raise DataError(
                f"{self.files[0]}: column {self.image!r} is {types[self.image]}, not pictures as bytes"
            )
        self.label = label or ("label" if types.get("label", "").startswith(("int", "uint")) else None)
        if self.label is not None and not types[self.label].startswith(("int", "uint")):
            raise DataError(
                f"{self.files[0]}: labels are integers, column {self.label!r} is {types[self.label]}"
            )
        wanted = texts if texts is not None else {name: name for name in (*SOURCES, *CAPTION_FIELDS)}
        self._texts = {name: column for name, column in wanted.items() if "string" in types.get(column, "")}
        for name, column in (texts or {}).items():
            if name not in self._texts:
                raise DataError(
                    f"{self.files[0]}: column {column!r} for text {name!r} is {types[column]}, not text"
                )
        self._named = texts is not None
        self._columns = [
            *([self.image] if self.image else []),
            *([self.label] if self.label else []),
            *self._texts.values(),
        ]
        if not self._columns:
            raise DataError(
                f"{self.files[0]}: neither pictures, labels nor captions among the columns {names}"
            )

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_parquet", "_kept", "_lock")  # a process reads with its own
        return {name: value for name, value in self.__dict__.items() if name not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._parquet = require("pyarrow.parquet", extra="train", purpose="reading Parquet files")
        self._kept, self._lock = OrderedDict(), threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._group(group)
        row = index - int(self._starts[group])
        values = {name: table.column(name)[row].as_py() for name in self._columns}
        return self._example(group, row, values)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The label column, (n,) int64; None where there is none. Reads no picture."""
        if self.label is None:
            return None
        if self._labels is None:
            parts = []
            for path in self.files:
                column = self._parquet.read_table(path, columns=[self.label]).column(self.label)
                if column.null_count:
                    raise DataError(f"{path}: {column.null_count} rows have no {self.label}")
                parts.append(column.to_numpy().astype(np.int64))
            self._labels = np.concatenate(parts)
        return self._labels

    @property
    def pieces(self) -> ParquetPieces:
        """The row groups, for `Stream`."""
        return ParquetPieces(self)

    def _group(self, group: int) -> Any:
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            file, number = self._groups[group]
            try:
                with self._parquet.ParquetFile(self.files[file]) as opened:
                    table = opened.read_row_group(number, columns=self._columns).combine_chunks()
            except Exception as error:
                raise DataError(
                    f"{self.files[file]}: row group {number} cannot be read ({_first_line(error)})"
                ) from error
            self._kept[group] = table
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self._memory:
                self._kept.popitem(last=False)
            return table

    def _example(self, group: int, row: int, values: Mapping[str, Any]) -> Example:
        file, _ = self._groups[group]
        place = int(self._starts[group] - self._starts[self._first_group[file]]) + row
        key = f"{self.files[file].stem}/{place}"
        image = None
        if self.image is not None:
            image = values[self.image]
            if isinstance(image, dict):
                image = image.get("bytes") or self._beside(file, image.get("path"))
            if image is None:
                raise DataError(f"{key}: has no picture")
        if self._named:
            texts = {name: values[column] for name, column in self._texts.items() if values[column]}
        else:
            texts = texts_of({column: values[column] for column in self._texts.values()})
        label = None if self.label is None else values[self.label]
        return Example(key, image, texts, label)

    def _beside(self, file: int, path: str | None) -> Path | None:
        """A picture that is named and not contained lies beside the file, and nowhere else."""
        if not path:
            return None
        folder = self.files[file].parent.resolve()
        found = (folder / path).resolve()
        return found if found.is_relative_to(folder) and found.is_file() else None


class ParquetPieces:
    """The row groups of `ParquetExamples`, each read from front to back in bounded memory."""

    def __init__(self, source: ParquetExamples) -> None:
        self.source = source
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self.source._groups)

    def read(self, piece: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        """The examples of one row group from row `start` on, with their row."""
        source = self.source
        file, number = source._groups[piece]
        path = source.files[file]
        row = 0
        try:
            with source._parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as opened:
                for rows in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[number], columns=source._columns):
                    if row + len(rows) <= start:
                        row += len(rows)
                        continue
                    for values in rows.to_pylist():
                        if row >= start:
                            try:
                                yield row, source._example(piece, row, values)
                            except DataError as error:
                                place = f"{path}: row group {number}, row {row}"
                                self.skipped.add("unreadable record", place, str(error))
                        row += 1
        except Exception as error:  # noqa: BLE001  Arrow raises its own, and OSError, and more
            self.skipped.add("unreadable row group", f"{path}: row group {number}", _first_line(error))


def _paths(files: str | Path | Iterable[str | Path]) -> list[Path]:
    if isinstance(files, (str, Path)):
        files = [files]
    paths: list[Path] = []
    for one in map(Path, files):
        if any(mark in one.name for mark in "*?["):
            found = sorted(one.parent.glob(one.name))
            if not found:
                raise DataError(f"{one}: no file matches")
            paths += found
        elif one.is_dir():
            found = sorted(one.glob("*.parquet"))
            if not found:
                raise DataError(f"{one}: a folder without Parquet files")
            paths += found
        else:
            paths.append(one)
    if not paths:
        raise DataError("no Parquet file was named")
    return paths


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
