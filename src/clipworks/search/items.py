"""What can be put into an index: picture files, records of shards, rows of tables, texts.

An item is one place from which a picture, a text or a picture with its texts comes. It can say without
reading its content that nothing changed, and it can be read. `Inputs` finds the items of whatever a user
names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from clipworks.core.pictures import find_pictures
from clipworks.data.folders import FILE_COLUMNS, read_table
from clipworks.data.parquet import ParquetExamples
from clipworks.data.records import CAPTION_FIELDS, SOURCES, texts_of
from clipworks.data.shards import TarShards, is_remote, locate
from clipworks.data.source import Source, TextChoices
from clipworks.errors import DataError, PictureError
from clipworks.search.files import (
    Facts,
    caption_file,
    dimensions,
    read_facts,
    read_text,
    stamp,
    text_facts,
)
from clipworks.search.known import State, mark

SHARDS = (".tar", ".parquet")
TABLES = (".csv", ".tsv", ".jsonl", ".json")
_ROW_GROUPS = 1 << 28  # bytes of a Parquet file that are kept
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?")
_WHOLE = 2**53  # whole numbers up to here are exact as float64


class Item(Protocol):
    """One place from which items come; `path` is the first one's name in the index."""

    @property
    def path(self) -> str: ...

    @property
    def lies_in(self) -> str:
        """The file that must be there."""
        ...

    def unchanged(self, state: State) -> bool:
        """Whether all that comes from here is as the index knows it, told without reading content.

        Raises:
            PictureError: if there is nothing any more.
        """
        ...

    def read(self) -> list[Facts]:
        """What comes from here: a picture, then its texts.

        Raises:
            PictureError, DataError: if it cannot be read.
        """
        ...


@dataclass(frozen=True)
class PictureFile:
    """A picture in a folder; its caption may lie beside it."""

    path: str

    @property
    def lies_in(self) -> str:
        """The file that must be there."""
        return self.path

    def unchanged(self, state: State) -> bool:
        """By size and time of change."""
        return state.stamp == mark(*stamp(self.path))

    def read(self) -> list[Facts]:
        """The picture."""
        return [read_facts(self.path)]


@dataclass(frozen=True)
class TextFile:
    """A file with one text."""

    path: str

    @property
    def lies_in(self) -> str:
        """The file that must be there."""
        return self.path

    def unchanged(self, state: State) -> bool:
        """By size and time of change."""
        return state.stamp == mark(*stamp(self.path))

    def read(self) -> list[Facts]:
        """The text."""
        return [read_text(self.path)]


@dataclass(frozen=True)
class Record:
    """A record of a shard or a row of a Parquet file.

    Attributes:
        path: the file's path, `#`, the record's key.
        file: the file's path.
        source: the records of the file.
        index: the record's place in it.
        stamp: size and time of change of the file.
        texts: whether its captions become items too.
    """

    path: str
    file: str
    source: Source
    index: int
    stamp: tuple[int, int]
    texts: bool

    @property
    def _detail(self) -> int:
        return mark(*self.stamp, self.texts)

    @property
    def lies_in(self) -> str:
        """The file that must be there."""
        return self.file

    def unchanged(self, state: State) -> bool:
        """By the file's size and time of change."""
        return state.detail == self._detail

    def read(self) -> list[Facts]:
        """The picture, and its captions where they are wanted."""
        example = self.source[self.index]
        content = self._content()
        width, height = dimensions(content)
        label = {} if example.label is None else {"label": example.label}
        return with_texts(
            Facts(
                self.path,
                hashlib.sha256(content).hexdigest(),
                self.stamp[1],
                len(content),
                width,
                height,
                None,
                self._content,
                file=self.file,
                detail=self._detail,
                fields=plain_fields({**label, **example.extra}),
            ),
            example.texts,
            self.texts,
        )

    def _content(self) -> bytes:
        return _image(self.source, self.index, self.path)


def _image(source: Source, index: int, path: str) -> bytes:
    image = source[index].image
    if image is None:
        raise DataError(f"{path}: has no picture")
    return image.read_bytes() if isinstance(image, Path) else bytes(image)


def picture_at(path: str) -> str | bytes:
    """What shows a picture of an index: its file's path, or the bytes of a record in a shard.

    Raises:
        PictureError: if the shard or its record is not there any more.
    """
    for sign in re.finditer("#", path):
        file, key = path[: sign.start()], path[sign.end() :]
        if os.path.exists(path) or not os.path.isfile(file):  # noqa: PTH110, PTH113  strings, as in the index
            continue
        try:
            source, places = _places(file, stamp(file))
            return _image(source, places[key], path)
        except (DataError, KeyError) as error:
            raise PictureError(f"{path}: is not in its shard any more ({error})") from error
    return path


@functools.lru_cache(maxsize=2)
def _places(file: str, size_and_time: tuple[int, int]) -> tuple[Source, dict[str, int]]:
    """The records of a shard as it is now, and where each key stands."""
    source, keys = _opened(file)
    return source, {str(key): place for place, key in enumerate(keys)}


@dataclass(frozen=True)
class TableRow:
    """Rows of a table that describe one picture.

    Attributes:
        path: of the picture.
        table: of the table.
        captions: its texts by source.
        fields: everything else that the first of the rows says.
        texts: whether its captions become items too.
    """

    path: str
    table: str
    captions: Mapping[str, TextChoices]
    fields: Mapping[str, Any]
    texts: bool

    @property
    def _detail(self) -> int:
        return mark(self.table, json.dumps([self.captions, self.fields], sort_keys=True), self.texts)

    @property
    def lies_in(self) -> str:
        """The file that must be there."""
        return self.path

    def unchanged(self, state: State) -> bool:
        """By size and time of change of the picture, and by what the table says."""
        return state.stamp == mark(*stamp(self.path)) and state.detail == self._detail

    def read(self) -> list[Facts]:
        """The picture, and its captions where they are wanted."""
        picture = replace(
            read_facts(self.path), caption=None, file=self.table, detail=self._detail, fields=self.fields
        )
        return with_texts(picture, self.captions, self.texts)


@dataclass(frozen=True)
class Text:
    """A text given as a string, or by a row of a table that names no picture."""

    path: str
    text: str
    table: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def _detail(self) -> int:
        return mark(self.table, self.text, json.dumps(self.fields, sort_keys=True))

    @property
    def lies_in(self) -> str:
        """The file that must be there."""
        return self.table or self.path

    def unchanged(self, state: State) -> bool:
        """By the text and its fields."""
        return state.detail == self._detail

    def read(self) -> list[Facts]:
        """The text."""
        others = {"file": self.table, "detail": self._detail, "fields": self.fields}
        return [text_facts(self.path, self.text, **others)]


@dataclass(frozen=True)
class Inputs:
    """The items of one location.

    Attributes:
        items: each once, read from front to back.
        total: how many, or None where that is not known beforehand.
        files: shards or a table of which all items are among these: others of theirs are gone.
        damaged: says after the items were taken which of `files` could not be read to their end, and why.
        folder: the folder below which files that are gone shall be forgotten, with its last slash.
    """

    items: Iterable[Item]
    total: int | None = None
    files: tuple[str, ...] = ()
    damaged: Callable[[], dict[str, str]] = dict
    folder: str | None = None


def inputs(location: str | Path, texts: bool = False) -> Inputs:
    """What a user names: a folder of pictures or of shards, a pattern, a picture, shards, a table.

    Args:
        location: a folder, in which pictures are looked for and shards where there is no picture; a pattern
            of pictures; shards, `.tar` or `.parquet` (patterns and brace ranges too); a table `.csv`, `.tsv`,
            `.jsonl` or `.json` with a column of files relative to it, or with texts alone.
        texts: make captions items too.

    Raises:
        DataError: if nothing is there.
    """
    name = os.fspath(location)
    if name.endswith(SHARDS):
        return shard_inputs(locate(name), texts)
    if Path(name).suffix.lower() in TABLES and Path(name).is_file():
        return table_inputs(absolute(name), texts)
    pictures = find_pictures(name)
    folder = os.path.join(absolute(name), "") if Path(name).is_dir() else None  # noqa: PTH118  its last slash
    if pictures or folder is None:
        return replace(file_inputs(pictures, texts), folder=folder)
    shards = sorted(str(path) for path in Path(name).rglob("*") if path.suffix in SHARDS)
    return replace(shard_inputs(shards, texts) if shards else Inputs([], 0), folder=folder)


def file_inputs(paths: Iterable[str | os.PathLike[str]], texts: bool = False) -> Inputs:
    """Picture files, and the captions beside them where they are wanted."""
    unique = list(dict.fromkeys(absolute(path) for path in paths))
    if not texts:
        return Inputs(map(PictureFile, unique), len(unique))
    beside = dict.fromkeys(path for path in map(caption_file, unique) if Path(path).is_file())
    both: list[Item] = [*map(PictureFile, unique), *map(TextFile, beside)]
    return Inputs(both, len(both))


def text_inputs(texts: Iterable[str]) -> Inputs:
    """Strings; each is named after itself, so that equal ones are one item."""
    unique = dict.fromkeys(texts)
    return Inputs([Text(f"text:{mark(text):016x}", text) for text in unique], len(unique))


def shard_inputs(shards: Iterable[str], texts: bool = False) -> Inputs:
    """The records of shards, one shard after the other.

    Raises:
        DataError: for one that is not a local file.
    """
    listed = list(shards)
    remote = next((shard for shard in listed if is_remote(shard)), None)
    if remote is not None:
        raise DataError(f"{remote}: shards are indexed from local files; copy or mount them")
    paths = [absolute(shard) for shard in listed]
    damaged: dict[str, str] = {}

    def items() -> Iterator[Item]:
        for path in paths:
            try:
                size_and_time = stamp(path)
                opened, keys = _opened(path)
            except (DataError, PictureError) as error:
                damaged[path] = str(error)
                continue
            if opened.skipped.total:
                damaged[path] = f"{path}: {opened.skipped}"
            for index, key in enumerate(keys):
                yield Record(f"{path}#{key}", path, opened, index, size_and_time, texts)

    return Inputs(items(), files=tuple(paths), damaged=lambda: damaged)


def _opened(path: str) -> tuple[TarShards | ParquetExamples, Iterable[object]]:
    """The records of one shard, and their keys within it."""
    if path.endswith(".parquet"):
        rows = ParquetExamples([path], memory=_ROW_GROUPS)
        return rows, range(len(rows))
    shards = TarShards(path)
    return shards, shards.keys


def table_inputs(table: str, texts: bool = False) -> Inputs:
    """The pictures that a table names with what it says of them, or the texts of a table without pictures.

    Rows of one picture stand next to each other; all but the captions is taken from the first of them.

    Raises:
        DataError: if the table cannot be read, is empty, or has neither pictures nor texts.
    """
    columns, numeric, rows = _survey(table)
    picture = next((column for column in FILE_COLUMNS if column in columns), None)
    text_columns = {*SOURCES, *CAPTION_FIELDS}
    if picture is None and not text_columns & columns.keys():
        raise DataError(f"{table}: neither a column of files nor one of texts among {list(columns)}")
    folder = Path(table).parent

    def fields_of(row: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in row.items() if name not in text_columns and name != picture}
        for name in rest.keys() & numeric:
            if isinstance(rest[name], str):
                rest[name] = float(rest[name]) if rest[name] else None
        return plain_fields(rest)

    def items() -> Iterator[Item]:
        if picture is None:
            for number, row in enumerate(read_table(table), start=1):
                for source, text in _each(texts_of(row)):
                    yield Text(f"{table}#{number}/{source}", text, table, fields_of(row))
            return
        for name, together in groupby(read_table(table), lambda row: row.get(picture)):
            group = list(together)
            if not isinstance(name, str) or not name.strip():
                continue
            merged: dict[str, list[str]] = {}
            for row in group:
                for source, found in texts_of(row).items():
                    merged.setdefault(source, []).extend([found] if isinstance(found, str) else found)
            yield TableRow(absolute(folder / name), table, merged, fields_of(group[0]), texts)

    return Inputs(items(), rows if picture is None else None, (table,))


def with_texts(picture: Facts, captions: Mapping[str, TextChoices], wanted: bool) -> list[Facts]:
    """A picture with its first caption, and where wanted all its captions as items of their own."""
    listed = list(_each(captions))
    first = next((text for name, text in listed if name.startswith("alt/")), listed[0][1] if listed else None)
    result = [replace(picture, caption=first)]
    if wanted:
        shared = {"file": picture.file, "detail": picture.detail, "fields": picture.fields}
        known = {**shared, "mtime_ns": picture.mtime_ns, "size": picture.size}
        result += [text_facts(f"{picture.path}#{name}", text, **known) for name, text in listed]
    return result


def owner(path: str) -> str:
    """The name of the picture whose text this is; any other name is its own."""
    return re.sub(r"#[a-z]+/[0-9]+$", "", path)


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as columns can hold them: names of letters, digits and `_`; nested values as JSON.

    Numbers become float64; whole ones too large for it become strings. Bytes and empty values are left out.
    """
    plain: dict[str, Any] = {}
    for name, value in fields.items():
        column = re.sub(r"\W", "_", name, flags=re.ASCII)
        column = f"_{column}" if not column or column[0].isdigit() else column
        if value is None or isinstance(value, bytes) or value == "":
            continue
        if isinstance(value, (bool, str)):
            plain[column] = value
        elif isinstance(value, (int, float)):
            plain[column] = float(value) if abs(value) <= _WHOLE else str(value)
        else:
            plain[column] = json.dumps(value, ensure_ascii=False, default=str)
    return plain


def absolute(path: str | os.PathLike[str]) -> str:
    """A path from the root, with its symbolic links."""
    return os.path.abspath(path)  # noqa: PTH100  resolve() would follow links


def _survey(table: str) -> tuple[dict[str, None], set[str], int]:
    """A table's columns, those of them that hold numbers alone, and its number of rows; read once through."""
    columns: dict[str, None] = {}
    words: set[str] = set()
    rows = 0
    for row in read_table(table):
        rows += 1
        for name, value in row.items():
            columns.setdefault(name)
            if isinstance(value, str) and value and not _NUMBER.fullmatch(value):
                words.add(name)
    if not rows:
        raise DataError(f"{table}: has no rows")
    return columns, columns.keys() - words, rows


def _each(captions: Mapping[str, TextChoices]) -> Iterator[tuple[str, str]]:
    """All texts with their names, source and number."""
    for source, texts in captions.items():
        for number, text in enumerate([texts] if isinstance(texts, str) else texts):
            yield f"{source}/{number}", text
