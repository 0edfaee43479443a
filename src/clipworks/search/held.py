"""Held: the pictures of an index as a graph in memory, for services that answer in a millisecond.

The graph is usearch's (Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using
HNSW graphs, TPAMI 2020) over vectors in half precision. Each is filed under 63 bits of its path and content,
so that bringing the graph up to date is a difference of two sets. What a hit shows lies beside it as Arrow
columns. Both follow the table when they are made or refreshed, not in between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipworks.errors import DataError, require
from clipworks.search.known import mark
from clipworks.search.neighbors import WANTED, K, exact, matrix, sample
from clipworks.search.table import SHOWN, Table

FILE = "pictures.usearch"
_CONNECTIVITY, _BUILD_BREADTH = 16, 128
_BREADTHS = (32, 64, 96, 128, 192, 256, 384, 512)
_SAVE_EVERY = 100_000
_WHERE = "kind = 'image'"


class Held:
    """A table's pictures, held in memory.

    Args:
        table: it may change meanwhile; `refresh` follows.
        folder: where the graph is kept for the next time; None keeps it nowhere.
        texts: (n, D) unit vectors of texts, by which recall is measured too.

    Raises:
        MissingExtra: without usearch.
        DataError: if the graph that was kept cannot be read.

    Attributes:
        recall: the share of the exact ten nearest that the graph finds, measured on the table's own rows and,
            where there are some, on texts: the lesser of both.
        breadth: how many candidates a search keeps, found out by that measurement.
        seconds: how long it took to make.
    """

    def __init__(self, table: Table, folder: Path | None = None, texts: np.ndarray | None = None) -> None:
        library = require("usearch.index", extra="search", purpose="an index held in memory")
        start = time.monotonic()
        self._table, self._file = table, folder / FILE if folder is not None else None
        self._texts = texts
        self._graph = library.Index(
            ndim=int(table.about["width"]),
            metric="cos",
            dtype="f16",
            connectivity=_CONNECTIVITY,
            expansion_add=_BUILD_BREADTH,
        )
        if self._file is not None and self._file.is_file():
            try:
                self._graph.load(str(self._file))
            except (RuntimeError, ValueError) as error:
                raise DataError(f"{self._file}: not a graph that can be read; delete it") from error
        self.recall, self.breadth = 1.0, _BREADTHS[0]
        self._load()
        self.seconds = time.monotonic() - start

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def bytes(self) -> int:
        """Memory of graph and columns."""
        return int(self._graph.memory_usage) + int(self._columns.nbytes) + self._keys.nbytes

    def refresh(self) -> None:
        """Follow the table."""
        if self._table.version != self._version:
            self._load()

    def search(self, vector: np.ndarray, k: int) -> list[Mapping[str, Any]]:
        """The k pictures nearest to a vector (D,), best first: their columns, and `_distance`, 1 - cosine."""
        if not len(self):
            return []
        keys, distances = self._ask(vector, k)
        rows = self._columns.take(np.searchsorted(self._keys, keys)).to_pylist()
        for row, distance in zip(rows, distances.tolist(), strict=True):
            row["_distance"] = distance
        return list(rows)

    def near(self, vectors: np.ndarray, count: int) -> Iterator[tuple[int, str, float]]:
        """For vectors (n, D): which of them, the path of one of its `count` nearest, and their cosine."""
        if not len(self):
            return
        paths = self._columns.column("path")
        self._graph.expansion_search = max(self.breadth, 2 * count)
        found = self._graph.search(np.asarray(vectors, dtype=np.float32).reshape(len(vectors), -1), count)
        keys, cosines = np.atleast_2d(found.keys), 1 - np.atleast_2d(found.distances)
        for row in range(len(vectors)):
            for key, cosine in zip(keys[row].astype(np.int64), cosines[row].tolist(), strict=True):
                place = int(np.searchsorted(self._keys, key))
                if place < len(self) and self._keys[place] == key:
                    yield row, paths[place].as_py(), cosine

    def _ask(self, vector: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self._graph.expansion_search = max(self.breadth, 2 * k if k < 1000 else k)
        found = self._graph.search(np.asarray(vector, dtype=np.float32), k, threads=1)
        return found.keys.astype(np.int64), found.distances

    def _load(self) -> None:
        """Columns from the table, then the graph's difference to them."""
        pa = require("pyarrow", extra="search", purpose="the picture index")
        self._version = self._table.version
        columns = (*SHOWN, *self._table.fields)
        pieces, keys, ids = [], [], []
        for batch in self._table.batches(columns, _WHERE, row_ids=True):
            paths, hashes = batch.column("path").to_pylist(), batch.column("hash").to_pylist()
            keys += list(map(mark, paths, hashes))
            ids.append(batch.column("_rowid").to_numpy().astype(np.int64))
            pieces.append(batch.select(list(columns)))
        unsorted = np.array(keys, dtype=np.int64)
        order = np.argsort(unsorted)
        self._keys = unsorted[order]
        self._ids = np.concatenate(ids)[order] if ids else np.empty(0, dtype=np.int64)
        self._columns = pa.Table.from_batches(pieces).take(order) if pieces else pa.table({})
        if self._follow():
            self._save()
        self._tune()

    def _follow(self) -> bool:
        """Bring the graph up to date; whether it changed."""
        there = np.asarray(self._graph.keys, dtype=np.uint64).astype(np.int64)
        gone = np.setdiff1d(there, self._keys)
        if len(gone):
            self._graph.remove(gone.astype(np.uint64))
        missing = np.setdiff1d(self._keys, there)
        if not len(missing):
            return bool(len(gone))
        unsaved = 0
        for batch in self._table.batches(("path", "hash", "vector"), _WHERE):
            keys = np.array(
                list(map(mark, batch.column("path").to_pylist(), batch.column("hash").to_pylist()))
            )
            chosen = np.isin(keys, missing)
            if chosen.any():
                self._graph.add(keys[chosen].astype(np.uint64), matrix(batch)[chosen])
                unsaved += int(chosen.sum())
            if unsaved >= _SAVE_EVERY:
                self._save()
                unsaved = 0
        return True

    def _save(self) -> None:
        """Whole or not at all."""
        if self._file is not None:
            temporary = self._file.with_suffix(".writing")
            self._graph.save(str(temporary))
            temporary.replace(self._file)

    def _tune(self) -> None:
        """The least breadth that finds enough of what an exact search finds."""
        own = sample(self._table, where=_WHERE)
        questions = own if self._texts is None else np.concatenate([own, self._texts])
        if not len(questions) or not len(self):
            return
        truth, _ = exact(self._table, questions, K + 1, _WHERE)
        by_id = np.argsort(self._ids)
        right = self._keys[by_id[np.searchsorted(self._ids[by_id], truth)]]
        for self.breadth in _BREADTHS:
            shares = [
                self._share(question, row, skip=place < len(own))
                for place, (question, row) in enumerate(zip(questions, right, strict=True))
            ]
            halves = [shares[: len(own)], shares[len(own) :]]
            self.recall = min(float(np.mean(half)) for half in halves if half)
            if self.recall >= WANTED:
                return

    def _share(self, question: np.ndarray, right: np.ndarray, skip: bool) -> float:
        found, _ = self._ask(question, K + 1)
        expected = right[1:] if skip else right[:K]
        if not len(expected):
            return 1.0
        return len(set(expected.tolist()) & set(found[: K + skip].tolist())) / len(expected)
