"""Mapped: a copy of a table's rows in one file, from which those of a few hits are read in microseconds.

Lance finds the ids of the nearest rows in a millisecond, and takes several more to fetch their vectors and
columns, which lie scattered over its files. So beside an indexed table in a folder lies an Arrow file with
the vectors, in full precision, and the columns that a hit shows, which is mapped into memory: nothing of it
is read but what is asked for, and the operating system keeps that as long as there is room.

It belongs to one version of the table, whose number is in its name. It is written whole or not at all, after
the rows themselves, and one of another version is passed over: it can be missing, but never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipworks.errors import require

if TYPE_CHECKING:
    from clipworks.search.table import Table

_ID, _VECTOR = "_rowid", "vector"
_BATCH = 16_384


class Mapped:
    """The rows of one version of a table.

    Args:
        batches: Arrow record batches with the column `_rowid`, `vector` and others.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._starts = np.cumsum([0, *map(len, batches)])
        self._vectors = [
            batch.column(_VECTOR).flatten().to_numpy().reshape(len(batch), -1) for batch in batches
        ]
        ids = [batch.column(_ID).to_numpy() for batch in batches]
        found = np.concatenate(ids).astype(np.int64) if ids else np.empty(0, dtype=np.int64)
        self._order = np.argsort(found, kind="stable")
        self._ids = found[self._order]

    @classmethod
    def open(cls, file: Path, rows: int) -> Mapped | None:
        """The copy in a file; None if it cannot be read or is of another number of rows."""
        pa = require("pyarrow", extra="search", purpose="the picture index")
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            found = cls([reader.get_batch(place) for place in range(reader.num_record_batches)])
        except (OSError, pa.ArrowException):
            return None
        return found if len(found) == rows else None

    def __len__(self) -> int:
        return len(self._ids)

    def places(self, ids: np.ndarray) -> np.ndarray | None:
        """Where the rows with these ids (n,) stand; None if one of them is not here."""
        if not len(self):
            return None if len(ids) else np.empty(0, dtype=np.int64)
        found = np.minimum(np.searchsorted(self._ids, ids), len(self) - 1)
        return self._order[found] if np.array_equal(self._ids[found], ids) else None

    def vectors(self, places: np.ndarray) -> np.ndarray:
        """Vectors (n, D) fp32 of the rows at places (n,)."""
        batches = np.searchsorted(self._starts, places, side="right") - 1
        offsets = places - self._starts[batches]
        pairs = zip(batches.tolist(), offsets.tolist(), strict=True)
        return np.stack([self._vectors[batch][offset] for batch, offset in pairs])

    def rows(self, places: np.ndarray, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The named columns of the rows at places (n,), in their order."""
        if not columns:
            return [{} for _ in places]
        batches = np.searchsorted(self._starts, places, side="right") - 1
        found: list[dict[str, Any]] = [{}] * len(places)
        for batch in np.unique(batches).tolist():
            wanted = np.flatnonzero(batches == batch)
            piece = self._batches[batch].select(list(columns)).take(places[wanted] - self._starts[batch])
            for place, row in zip(wanted.tolist(), piece.to_pylist(), strict=True):
                found[place] = row
        return found


def name(version: int | str) -> str:
    """The file of a version's copy."""
    return f"rows-{version}.arrow"


def write(table: Table, folder: Path, columns: Sequence[str]) -> None:
    """Write the copy of a table as it is now, and remove older ones; in memory is one batch at a time."""
    pa = require("pyarrow", extra="search", purpose="the picture index")
    whole = table.schema
    fields = [whole.field(column).remove_metadata() for column in (*columns, _VECTOR)]
    schema = pa.schema([pa.field(_ID, pa.uint64()), *fields])
    target, temporary = folder / name(table.version), folder / "rows.writing"
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in table.batches((*columns, _VECTOR), rows=_BATCH, row_ids=True):
                writer.write_batch(batch.select(schema.names).cast(schema))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    for old in folder.glob(name("*")):
        if old != target:
            with suppress(PermissionError):  # Windows, while another process has it mapped
                old.unlink(missing_ok=True)
