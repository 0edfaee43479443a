"""The Lance table under the index: its columns, and the few things that are done to it.

One row an item. Every write is one atomic commit, so a process that is killed leaves the table as it was
before or after it, never between. What the index says of itself (its model, its format, how its neighbor
index is to be asked) lies in the table's schema, so that it travels with the data to wherever Lance can
write.
"""

from __future__ import annotations

import json
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clipworks.errors import ConfigError, DataError, require
from clipworks.search import mapped

NAME = "items"
FORMAT = 2
ABOUT = b"clipworks"
FIELDS = (
    *("path", "kind", "file", "hash", "mtime_ns", "size", "width", "height"),
    *("caption", "model", "revision", "detail"),
)
SHOWN = ("path", "kind", "hash", "width", "height", "caption")
"""The columns of every hit; those of further fields come after them."""

_NOT_TEXT = {"mtime_ns": "int64", "size": "int64", "width": "int32", "height": "int32", "detail": "int64"}
_VALUES_A_FILTER = 500
_KEPT = timedelta(hours=1)  # how long a version is kept for those who still read it
_INDEX = "vector_idx"  # as LanceDB names an index of the column `vector`

T = TypeVar("T")


class Table:
    """Rows of items with unit vectors (D,) fp32.

    Attributes:
        location: a folder, or the URI of one.
        about: what `create` was given.
    """

    def __init__(self, location: str, table: Any) -> None:
        self.location = location
        self.about: dict[str, Any] = _about(location, table)
        self._table = table
        self._told: dict[str, Any] = {}  # what is asked for with every query; valid until the table changes

    @classmethod
    def create(
        cls, location: str, width: int, about: Mapping[str, Any], options: Mapping[str, str] | None = None
    ) -> Table:
        """An empty table for vectors of D = `width`; `options` are for object storage, as LanceDB has them.

        Raises:
            DataError: if there is an index at that location, or something else.
        """
        _, pa = _libraries()
        path = local(location)
        taken = exists(location, options) or (
            path is not None and path.exists() and (not path.is_dir() or any(path.iterdir()))
        )
        if taken:
            raise DataError(f"{location}: cannot make an index there, something is there already")
        columns = [(name, getattr(pa, _NOT_TEXT.get(name, "string"))()) for name in FIELDS]
        schema = pa.schema(
            [*columns, ("vector", pa.list_(pa.float32(), width))],
            metadata={ABOUT: json.dumps({"format": FORMAT, **about}).encode()},
        )
        return cls(location, run(_connect(location, options).create_table(NAME, schema=schema)))

    @classmethod
    def open(cls, location: str, options: Mapping[str, str] | None = None) -> Table:
        """The table at a location.

        Raises:
            DataError: if there is none, or it is of a format that this version does not know.
        """
        _libraries()
        if not exists(location, options):
            raise DataError(
                f"{location}: no index there; make one with `clipworks index build FOLDER --index {location}`"
            )
        try:
            return cls(location, run(_connect(location, options).open_table(NAME)))
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{location}: the index cannot be opened ({first_line(error)})") from error

    def __len__(self) -> int:
        return int(run(self._table.count_rows()))

    @property
    def version(self) -> int:
        """Rises with every commit."""
        return int(run(self._table.version()))

    @property
    def schema(self) -> Any:
        """The Arrow schema of the rows."""
        return run(self._table.schema())

    @property
    def fields(self) -> dict[str, str]:
        """The columns of further fields, and what they hold: `bool`, `double` or `string`."""
        if "fields" not in self._told:
            fixed = {*FIELDS, "vector"}
            self._told["fields"] = {f.name: str(f.type) for f in self.schema if f.name not in fixed}
        return dict(self._told["fields"])

    @property
    def has_texts(self) -> bool:
        """Whether there are texts beside the pictures."""
        if "texts" not in self._told:
            self._told["texts"] = bool(self.count("kind = 'text'"))
        return bool(self._told["texts"])

    @property
    def mapped(self) -> mapped.Mapped | None:
        """The copy of these rows for quick answers; None if there is none of this version."""
        if "mapped" not in self._told:
            folder = local(self.location)
            copy = None if folder is None else folder / mapped.name(self.version)
            self._told["mapped"] = None if copy is None else mapped.Mapped.open(copy, len(self))
        return self._told["mapped"]  # type: ignore[no-any-return]

    @property
    def is_indexed(self) -> bool:
        """Whether the index of the vectors knows every row."""
        if "indexed" not in self._told:
            about = run(self._table.index_stats(_INDEX))
            self._told["indexed"] = about is not None and not about.num_unindexed_rows
        return bool(self._told["indexed"])

    @property
    def lance(self) -> Any:
        """The LanceDB table, of its asynchronous kind, which answers sooner; see `run`."""
        return self._table

    def refresh(self) -> None:
        """See what other processes have committed."""
        self._told.clear()
        run(self._table.checkout_latest())

    def count(self, where: str) -> int:
        """How many rows meet a condition."""
        return int(run(self._table.count_rows(where)))

    # ---------------------------------------------------------------------------------------- writing

    def append(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> None:
        """Write rows with their vectors (n, D) in one commit; none of their paths may be in the table."""
        if rows:
            self._told.clear()
            run(self._table.add(self._batch(rows, vectors)))

    def upsert(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> None:
        """Write rows with their vectors (n, D) in one commit; a row whose path is there is replaced.

        Compares with every path of the table; `append` does not.
        """
        if rows:
            self._told.clear()
            write = self._table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            run(write.execute(self._batch(rows, vectors)))

    def widen(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a column for every further field that these rows have and the table lacks."""
        _, pa = _libraries()
        known = {*self.schema.names, *FIELDS}
        kinds: dict[str, set[type]] = {}
        for row in rows:
            for name, value in row.items():
                if name not in known and value is not None:
                    kinds.setdefault(name, set()).add(type(value))
        if kinds:
            self._told.clear()
            types: dict[frozenset[type], Any] = {
                frozenset([bool]): pa.bool_(),
                frozenset([float]): pa.float64(),
            }
            columns = [(name, types.get(frozenset(kind), pa.string())) for name, kind in kinds.items()]
            run(self._table.add_columns(pa.schema(columns)))

    def _batch(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> Any:
        _, pa = _libraries()
        schema = self.schema
        columns = []
        for field in schema:
            if field.name == "vector":
                flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
            else:
                columns.append(pa.array([row.get(field.name) for row in rows], field.type))
        return pa.Table.from_arrays(columns, schema=schema)

    def delete(self, paths: Sequence[str]) -> None:
        """Remove the rows of these paths."""
        self._told.clear()
        for start in range(0, len(paths), _VALUES_A_FILTER):
            run(self._table.delete(among("path", paths[start : start + _VALUES_A_FILTER])))

    def compact(self) -> None:
        """Join the small pieces that many commits leave, and forget versions nobody reads any more."""
        self._told.clear()
        run(self._table.optimize(cleanup_older_than=_KEPT))

    def map(self) -> None:
        """Write the copy for quick answers, where the table lies in a folder."""
        folder = local(self.location)
        if folder is not None:
            self._told.clear()
            mapped.write(self, folder, (*SHOWN, *self.fields))
            self._told.clear()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from building while the block runs; a process that dies lets go.

        Only where the table lies in a folder of this machine: object storage knows no such lock.

        Raises:
            DataError: if another one is building.
        """
        path = local(self.location)
        try:
            import fcntl
        except ImportError:  # Windows: whoever builds twice at once there is not stopped
            path = None
        if path is None:
            self.refresh()
            yield
            return
        with (path / "build.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(
                    f"{self.location}: another process is building this index; wait for it"
                ) from error
            self.refresh()
            yield

    # ---------------------------------------------------------------------------------------- settings

    def setting(self, name: str) -> dict[str, Any] | None:
        """What `keep` kept under a name."""
        kept = (self.schema.field("vector").metadata or {}).get(f"clipworks-{name}".encode())
        return None if kept is None else dict(json.loads(kept))

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a few values with the table, under a name."""
        before = self.version
        metadata = {f"clipworks-{name}": json.dumps(value)}
        run(self._table.update_field_metadata({"path": "vector", "metadata": metadata}))
        folder = local(self.location)
        if folder is not None and (copy := folder / mapped.name(before)).is_file():
            copy.replace(folder / mapped.name(self.version))  # the rows are as they were
        self._told.clear()

    # ---------------------------------------------------------------------------------------- reading

    def scan(
        self, columns: Sequence[str], where: str | None = None, rows: int = 8192
    ) -> Iterator[dict[str, list[Any]]]:
        """The named columns in pieces of at most so many rows, in no order."""
        for batch in self.batches(columns, where, rows):
            yield batch.to_pydict()

    def batches(
        self, columns: Sequence[str], where: str | None = None, rows: int = 8192, *, row_ids: bool = False
    ) -> Iterator[Any]:
        """The same as Arrow record batches, with `_rowid` if wanted.

        Raises:
            ConfigError: if `where` is not a condition on the columns.
        """
        query = self._table.query().select(list(columns))
        if where is not None:
            query = query.where(where)
        if row_ids:
            query = query.with_row_id()
        with condition(where):
            reader = run(query.to_batches(max_batch_length=rows))
            while (batch := run(_next(reader))) is not None:
                yield batch

    def vectors(self, digests: Sequence[str]) -> dict[str, np.ndarray]:
        """By content hash, the vector (D,) of each item that some row already has."""
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(digests), _VALUES_A_FILTER):
            for piece in self.scan(
                ("hash", "vector"), among("hash", digests[start : start + _VALUES_A_FILTER])
            ):
                for digest, vector in zip(piece["hash"], piece["vector"], strict=True):
                    found[digest] = np.asarray(vector, dtype=np.float32)
        return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine of LanceDB's, from where there may be a running loop or none."""
    from lancedb.background_loop import LOOP

    return LOOP.run(work)  # type: ignore[no-any-return]


async def _next(reader: Any) -> Any:
    return await anext(reader, None)


@contextmanager
def condition(where: str | None) -> Iterator[None]:
    """Say of an error in the block that it is the condition's fault, if there is one."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if where is None:
            raise
        raise ConfigError(f"the condition {where!r} cannot be applied: {first_line(error)}") from error


def exists(location: str, options: Mapping[str, str] | None = None) -> bool:
    """Whether an index lies at a location."""
    path = local(location)
    if path is not None:
        return (path / f"{NAME}.lance").is_dir()
    try:
        return NAME in run(_connect(location, options).list_tables()).tables
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"{location}: cannot be reached ({first_line(error)})") from error


def local(location: str) -> Path | None:
    """The folder of a location on this machine; None for any other URI."""
    if location.startswith("file://"):
        return Path(location.removeprefix("file://"))
    return None if "://" in location else Path(location)


def among(column: str, values: Sequence[str]) -> str:
    """A condition: the column is one of these values."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def quoted(value: str) -> str:
    """A string as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _libraries() -> tuple[Any, Any]:
    purpose = "the picture index"
    lancedb, pyarrow = (require(name, extra="search", purpose=purpose) for name in ("lancedb", "pyarrow"))
    return lancedb, pyarrow


def _connect(location: str, options: Mapping[str, str] | None) -> Any:
    lancedb, _ = _libraries()
    path = local(location)
    return run(
        lancedb.connect_async(str(path or location), storage_options=dict(options) if options else None)
    )


def _about(location: str, table: Any) -> dict[str, Any]:
    try:
        about = json.loads((run(table.schema()).metadata or {})[ABOUT])
    except (KeyError, ValueError) as error:
        raise DataError(f"{location}: a Lance table, but not an index that clipworks wrote") from error
    if about.get("format") != FORMAT:
        raise DataError(
            f"{location}: an index of format {about.get('format')}; this version reads format {FORMAT}:"
            " build it anew"
        )
    return dict(about)
