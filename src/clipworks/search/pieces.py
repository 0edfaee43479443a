"""What is embedded piece by piece: a shard is a piece, and so are each thousand pictures of a folder.

A piece is small enough to be done anew when it is interrupted, and large enough that starting it costs
nothing. It pickles, so that a worker anywhere can read it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from clipworks.core.pictures import find_pictures
from clipworks.data.parquet import ParquetExamples
from clipworks.data.shards import ShardPieces, expand_braces, is_remote, locate
from clipworks.data.source import Example, Skipped
from clipworks.errors import ConfigError, DataError
from clipworks.search.files import caption_file, read_caption

SHARDS = (".tar", ".parquet")
PICTURES = 1024  # of a folder that make a piece
_ROW_GROUPS = 1 << 28  # bytes of a Parquet file that are kept
_OF_RECORDS = {"unreadable record", "unreadable picture", "record without picture"}


class Piece(Protocol):
    """One unit of work; `name` is what its results are called, `source` where it comes from."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    def stamp(self) -> str | None:
        """Changes when the content does; None where there is nothing to tell by."""
        ...

    def examples(self, skipped: Skipped) -> Iterator[Example]:
        """Its records from front to back; what cannot be read is counted."""
        ...


@dataclass(frozen=True)
class Shard:
    """A `.tar` or `.parquet` file, or a tar file behind an address or a command."""

    name: str
    source: str

    def stamp(self) -> str | None:
        """Size and time of change of a file."""
        return None if is_remote(self.source) else _stamp([self.source])

    def examples(self, skipped: Skipped) -> Iterator[Example]:
        """Its records from front to back; what cannot be read is counted."""
        if not self.source.endswith(".parquet"):
            shard = ShardPieces([self.source])
            shard.skipped = skipped
            yield from (example for _, example in shard.read(0))
            return
        try:
            rows = ParquetExamples([self.source], memory=_ROW_GROUPS)
        except DataError as error:
            skipped.add("unreadable shard", self.source, str(error))
            return
        groups = rows.pieces
        groups.skipped = skipped
        for group in range(len(groups)):
            yield from (example for _, example in groups.read(group))


@dataclass(frozen=True)
class Pictures:
    """Picture files, each under its path below a folder; a caption may lie beside one."""

    name: str
    source: str
    paths: tuple[str, ...]

    def stamp(self) -> str | None:
        """Names, sizes and times of change."""
        return _stamp(self.paths)

    def examples(self, skipped: Skipped) -> Iterator[Example]:
        """The pictures; one that cannot be read is noticed when it is encoded."""
        for path in self.paths:
            caption = read_caption(caption_file(path))
            key = os.path.relpath(path, self.source)
            yield Example(key, Path(path), {} if caption is None else {"alt": caption})


def find_pieces(locations: str | Path | Iterable[str | Path]) -> list[Piece]:
    """The pieces that paths, patterns, brace ranges, folders and addresses stand for, in order.

    A folder that holds shards stands for these, any other for the pictures below it.

    Raises:
        DataError: if one stands for nothing.
        ConfigError: if two shards have one name, of file and folder.
    """
    shards: list[str] = []
    folders: list[Path] = []
    for location in [locations] if isinstance(locations, (str, Path)) else locations:
        for one in expand_braces(str(location)):
            inside = sorted(str(path) for path in Path(one).rglob("*") if path.suffix in SHARDS)
            if inside and Path(one).is_dir():
                shards += inside
            elif Path(one).is_dir():
                folders.append(Path(one))
            elif is_remote(one):
                shards.append(one)
            elif one.endswith(SHARDS):
                shards += locate(one)
            else:
                raise DataError(f"{one}: neither a folder nor a shard ({', '.join(SHARDS)})")
    for shard in shards:
        if is_remote(shard) and shard.endswith(".parquet"):
            raise DataError(f"{shard}: Parquet files are read from local files; copy or mount them")
        if not is_remote(shard) and not Path(shard).is_file():
            raise DataError(f"{shard}: no such file")
    absolute = [shard if is_remote(shard) else os.path.abspath(shard) for shard in shards]  # noqa: PTH100
    named: list[tuple[str, Piece]] = [
        (name, Shard(name, source)) for name, source in zip(_names(absolute), absolute, strict=True)
    ]
    for folder in folders:
        found = find_pictures(folder.resolve())
        if not found:
            raise DataError(f"{folder}: neither a shard ({', '.join(SHARDS)}) nor a picture in it")
        paths = [str(path) for path in found]
        for number, start in enumerate(range(0, len(paths), PICTURES)):
            name = f"{folder.resolve().name}-{number:05d}"
            part = tuple(paths[start : start + PICTURES])
            named.append((name, Pictures(name, str(folder.resolve()), part)))
    if not named:
        raise DataError("nothing to embed was named")
    twice = next((name for name, count in Counter(name for name, _ in named).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"two pieces are named {twice!r}: give each shard once, and embed the rest apart")
    return [piece for _, piece in named]


def is_whole(counts: Iterable[str]) -> bool:
    """Whether reasons to skip concern records alone, and not a file that could not be read to its end."""
    return _OF_RECORDS.issuperset(counts)


def _names(sources: list[str]) -> list[str]:
    """The files' names without suffix; of those that are equal, with their folders in front."""
    paths = [PurePosixPath(source.split("?")[0].rstrip("/ ")) for source in sources]
    stems = Counter(path.stem for path in paths)
    return [path.stem if stems[path.stem] == 1 else f"{path.parent.name}-{path.stem}" for path in paths]


def _stamp(paths: Iterable[str]) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            entry = Path(path).stat()
        except OSError:
            return None
        digest.update(f"{path}\0{entry.st_size} {entry.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
