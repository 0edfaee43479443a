"""The Lance table under the index: its columns, and the few things that are done to it.

One row a path. Every write is one atomic commit, so a process that is killed leaves the table as it was
before or after it, never between. What the index says of itself (its model, its format) lies in the
table's schema, so that it travels with the data to wherever Lance can write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clipworks.errors import ConfigError, DataError, require

NAME = "pictures"
FORMAT = 1
ABOUT = b"clipworks"
FIELDS = ("path", "hash", "mtime_ns", "size", "width", "height", "caption", "model")
_PATHS_A_FILTER = 500


class Table:
    """Rows of pictures with unit vectors (D,) fp32. `about` is what `create` was given."""

    def __init__(self, path: Path, table: Any) -> None:
        self.path = path
        self._table = table
        self.about: dict[str, Any] = _about(path, table)

    @classmethod
    def create(cls, path: Path, width: int, about: Mapping[str, Any]) -> Table:
        """An empty table for vectors of D = `width`.

        Raises:
            DataError: if there is an index at that path, or something else.
        """
        lancedb, pa = _libraries()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DataError(f"{path}: cannot make an index there, something is there already")
        kinds = {"mtime_ns": pa.int64(), "size": pa.int64(), "width": pa.int32(), "height": pa.int32()}
        columns = [(name, kinds.get(name, pa.string())) for name in FIELDS]
        schema = pa.schema(
            [*columns, ("vector", pa.list_(pa.float32(), width))],
            metadata={ABOUT: json.dumps({"format": FORMAT, **about}).encode()},
        )
        return cls(path, lancedb.connect(str(path)).create_table(NAME, schema=schema))

    @classmethod
    def open(cls, path: Path) -> Table:
        """The table at a path.

        Raises:
            DataError: if there is none, or it is of a format that this version does not know.
        """
        lancedb, _ = _libraries()
        if not exists(path):
            raise DataError(
                f"{path}: no index there; make one with `clipworks index build FOLDER --index {path}`"
            )
        try:
            return cls(path, lancedb.connect(str(path)).open_table(NAME))
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{path}: the index cannot be opened ({_first_line(error)})") from error

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def append(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> None:
        """Write rows with their vectors (n, D) in one commit; none of their paths may be in the table."""
        if rows:
            self._table.add(self._batch(rows, vectors))

    def upsert(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> None:
        """Write rows with their vectors (n, D) in one commit; a row whose path is there is replaced.

        Compares with every path of the table; `append` does not.
        """
        if rows:
            write = self._table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            write.execute(self._batch(rows, vectors))

    def _batch(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> Any:
        _, pa = _libraries()
        schema = self._table.schema
        columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in FIELDS]
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
        return pa.Table.from_arrays(columns, schema=schema)

    def delete(self, paths: Sequence[str]) -> None:
        """Remove the rows of these paths."""
        for start in range(0, len(paths), _PATHS_A_FILTER):
            self._table.delete(_among("path", paths[start : start + _PATHS_A_FILTER]))

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[dict[str, list[Any]]]:
        """The named columns in pieces of bounded size, in no order."""
        query = self._table.search().select(list(columns))
        if where is not None:
            query = query.where(where)
        for batch in query.to_batches(batch_size=8192):
            yield batch.to_pydict()

    def vectors(self, digests: Sequence[str]) -> dict[str, np.ndarray]:
        """By content hash, the vector (D,) of each picture that some row already has."""
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(digests), _PATHS_A_FILTER):
            for piece in self.scan(
                ("hash", "vector"), _among("hash", digests[start : start + _PATHS_A_FILTER])
            ):
                for digest, vector in zip(piece["hash"], piece["vector"], strict=True):
                    found[digest] = np.asarray(vector, dtype=np.float32)
        return found

    def nearest(self, vector: np.ndarray, k: int, where: str | None = None) -> list[dict[str, Any]]:
        """The k rows with the largest cosine to a vector (D,), best first; `_distance` is 1 − cosine.

        Raises:
            ConfigError: if `where` is not a condition on the columns.
        """
        query = self._table.search(np.asarray(vector, dtype=np.float32)).distance_type("cosine")
        if where is not None:
            query = query.where(where, prefilter=True)
        try:
            return query.select([*FIELDS, "_distance"]).limit(k).to_list()
        except (ValueError, RuntimeError) as error:
            if where is None:
                raise
            raise ConfigError(f"the condition {where!r} cannot be applied: {_first_line(error)}") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from building while the block runs; a process that dies lets go.

        Raises:
            DataError: if another one is building.
        """
        try:
            import fcntl
        except ImportError:  # Windows: whoever builds twice at once there is not stopped
            yield
            return
        with (self.path / "build.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(
                    f"{self.path}: another process is building this index; wait for it"
                ) from error
            yield

    def compact(self) -> None:
        """Join the small pieces that many commits leave, and forget versions nobody reads any more."""
        self._table.optimize()


def exists(path: Path) -> bool:
    """Whether an index lies at a path."""
    return (path / f"{NAME}.lance").is_dir()


def _libraries() -> tuple[Any, Any]:
    purpose = "the picture index"
    lancedb, pyarrow = (require(name, extra="search", purpose=purpose) for name in ("lancedb", "pyarrow"))
    return lancedb, pyarrow


def _about(path: Path, table: Any) -> dict[str, Any]:
    try:
        about = json.loads((table.schema.metadata or {})[ABOUT])
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: a Lance table, but not an index that clipworks wrote") from error
    if about.get("format") != FORMAT:
        raise DataError(
            f"{path}: an index of format {about.get('format')}; this version reads format {FORMAT}"
        )
    return dict(about)


def _among(column: str, values: Sequence[str]) -> str:
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
