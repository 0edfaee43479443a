"""Records in JSONL, Parquet and WebDataset files: read from front to back, written whole or not at all.

A record is a dict of fields with a `key`. Unlike an `Example` it keeps every field under the name it has in
its file, so that what is filtered comes out as it went in. Of a tar file `.json` gives fields of its own,
`.txt` a text, and every other member a `Located`, which is read only when somebody asks for its bytes. The
output of a file has its format, and for the same records the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from clipworks.data.shards import expand_braces, is_remote, member_places
from clipworks.data.source import Skipped
from clipworks.errors import DataError, require

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".tar")
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Located:
    """Bytes within a file; `bytes(located)` reads them."""

    path: str
    offset: int
    size: int

    def __bytes__(self) -> bytes:
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def find_files(locations: str | Path | Iterable[str | Path]) -> tuple[Path, list[str]]:
    """All record files that paths, folders, patterns and brace ranges stand for.

    Returns:
        The folder that they share, and their paths below it, sorted and each once.

    Raises:
        DataError: if there are none, or one is not a local file of `SUFFIXES`.
    """
    if isinstance(locations, (str, Path)):
        locations = [locations]
    found: set[Path] = set()
    roots: list[Path] = []
    for location in locations:
        for one in expand_braces(str(location)):
            if is_remote(one):
                raise DataError(f"{one}: is not a local file; mount the store or copy its shards")
            path = Path(one)
            if path.is_dir():
                below = [file for file in path.rglob("*") if _is_shard(file, path)]
                roots.append(path.resolve())
            elif any(mark in one for mark in "*?[") and not path.exists():
                below = [Path(file) for file in glob(one, recursive=True) if _is_shard(Path(file))]  # noqa: PTH207
                roots += [file.resolve().parent for file in below]
            else:
                if not path.name.endswith(SUFFIXES):
                    raise DataError(f"{one}: is none of {', '.join(SUFFIXES)}")
                if not path.is_file():
                    raise DataError(f"{one}: no such file")
                below = [path]
                roots.append(path.resolve().parent)
            if not below:
                raise DataError(f"{one}: no file of {', '.join(SUFFIXES)} there")
            found |= {file.resolve() for file in below}
    if not found:
        raise DataError("no file of records was named")
    root = Path(os.path.commonpath(roots))
    return root, sorted(file.relative_to(root).as_posix() for file in found)


def _is_shard(path: Path, root: Path | None = None) -> bool:
    parts = path.relative_to(root).parts if root else (path.name,)
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and path.name.endswith(SUFFIXES) and path.is_file()


def read_records(
    root: Path, name: str, skipped: Skipped, fields: Sequence[str] | None = None
) -> Iterator[Record]:
    """The records of the file `root / name` from front to back; damage is counted and left out.

    A record without a `key` gets the file's name and its place in it: `part/000/17`.

    Args:
        root: the pool's folder.
        name: the file, relative to it.
        skipped: takes what could not be read.
        fields: the fields that are needed besides the key; None is all. Others may be left out, which
            saves reading the columns of a Parquet file.
    """
    path = root / name
    stem = next(name[: -len(suffix)] for suffix in SUFFIXES if name.endswith(suffix))
    reader = _tar if name.endswith(".tar") else _parquet if name.endswith(".parquet") else _jsonl
    try:
        for row, record in reader(path, skipped, fields):
            if record.get("key") is None:
                record["key"] = f"{stem}/{row}"
            yield record
    except (OSError, EOFError) as error:  # gzip says EOFError for a file that was cut off
        missing = isinstance(error, FileNotFoundError)
        skipped.add("missing shard" if missing else "unreadable shard", str(path), str(error))


def _jsonl(path: Path, skipped: Skipped, _: Sequence[str] | None) -> Iterator[tuple[int, Record]]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for row, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"a {type(record).__name__}, not an object")
            except ValueError as error:
                skipped.add("unreadable record", f"{path}: line {row + 1}", str(error))
                continue
            yield row, record


def _parquet(path: Path, skipped: Skipped, fields: Sequence[str] | None) -> Iterator[tuple[int, Record]]:
    parquet = require("pyarrow.parquet", extra="curate", purpose="reading Parquet files")
    row = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as opened:
            names = opened.schema_arrow.names
            columns = None if fields is None else [name for name in names if name in (*fields, "key")]
            for group in range(opened.num_row_groups):
                start = row
                row += opened.metadata.row_group(group).num_rows
                if columns == []:  # nothing of it is needed, but its rows count
                    yield from ((number, {}) for number in range(start, row))
                    continue
                number = start
                try:
                    for rows in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                        for record in rows.to_pylist():
                            yield number, record
                            number += 1
                except (OSError, ValueError) as error:  # Arrow's errors are both
                    skipped.add("unreadable row group", f"{path}: row group {group}", _first_line(error))
    except ValueError as error:
        skipped.add("unreadable shard", str(path), _first_line(error))


def _tar(path: Path, skipped: Skipped, _: Sequence[str] | None) -> Iterator[tuple[int, Record]]:
    for row, (key, members) in enumerate(member_places(str(path), skipped)):
        record: Record = {"key": key}
        try:
            for extension, (offset, size) in members.items():
                place = Located(str(path), offset, size)
                if extension == "json":
                    content = json.loads(bytes(place))
                    if not isinstance(content, dict):
                        raise ValueError(f"its json is a {type(content).__name__}, not an object")
                    twice = content.keys() & (members.keys() - {"json"})
                    if twice:
                        raise ValueError(f"its json has a field {min(twice)!r}, which is a member as well")
                    record |= content | {"key": key}
                elif extension == "txt":
                    record["txt"] = bytes(place).decode("utf-8").strip()
                else:
                    record[extension] = place
        except ValueError as error:
            skipped.add("unreadable record", f"{path}: {key}", str(error))
            continue
        yield row, record


def write_records(records: Iterable[Record], path: Path, like: Path) -> None:
    """Write records to `path`, complete or not there at all.

    Args:
        records: in the order in which they are written.
        path: with the suffix of the format.
        like: the file that they came from; a Parquet file takes its columns from it.

    Raises:
        DataError: if a record has a field that the format cannot hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        writer = (
            _write_tar
            if path.name.endswith(".tar")
            else _write_parquet
            if path.name.endswith(".parquet")
            else _write_jsonl
        )
        writer(records, temporary, path, like)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends without an error.

    Its name has the process's number, so that a process which is about to end and the one that takes over
    its work do not write into the same file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_jsonl(records: Iterable[Record], temporary: Path, path: Path, like: Path) -> None:
    with temporary.open("wb") as file:
        # Neither a name nor a time in the header of gzip: the same records are the same bytes.
        lines: Any = (
            gzip.GzipFile("", "wb", fileobj=file, mtime=0, compresslevel=6)
            if path.name.endswith(".gz")
            else file
        )
        for record in records:
            try:
                lines.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            except UnicodeEncodeError:  # half a surrogate pair, which only JSON's own escape can hold
                lines.write(json.dumps(record).encode() + b"\n")
            except TypeError as error:
                raise DataError(f"{like}: {record.get('key')} cannot be written as JSON ({error})") from error
        if lines is not file:
            lines.close()


def _write_parquet(records: Iterable[Record], temporary: Path, path: Path, like: Path) -> None:
    parquet = require("pyarrow.parquet", extra="curate", purpose="writing Parquet files")
    arrow = require("pyarrow", extra="curate", purpose="writing Parquet files")
    try:
        schema = parquet.read_schema(like)
    except (OSError, ValueError):
        schema = arrow.schema([])  # unreadable: it gives no record either
    if "key" not in schema.names:
        schema = schema.append(arrow.field("key", arrow.string()))
    with parquet.ParquetWriter(temporary, schema) as file:
        for rows in _chunks(records, _ROWS_AT_ONCE * 16):
            unknown = set().union(*rows) - set(schema.names)
            if unknown:
                raise DataError(f"{path}: {like} has no column {min(unknown)!r}")
            try:
                file.write_table(arrow.Table.from_pylist(rows, schema))
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}: does not fit the columns of {like} ({error})") from error


def _write_tar(records: Iterable[Record], temporary: Path, path: Path, like: Path) -> None:
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for record in records:
            key = str(record["key"])
            members: dict[str, Any] = {}
            fields: Record = {}
            for name, value in record.items():
                if isinstance(value, (bytes, Located)):
                    members[name] = value
                elif name == "txt" and isinstance(value, str):
                    members[name] = value.encode("utf-8", "surrogatepass")
                else:
                    fields[name] = value
            if fields.keys() - {"key"} or not members:
                try:
                    members["json"] = json.dumps(fields).encode()
                except TypeError as error:
                    raise DataError(f"{like}: {key} cannot be written as JSON ({error})") from error
            for extension, value in members.items():
                content = bytes(value)
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
