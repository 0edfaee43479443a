"""WebDataset shards: tar files whose members `<key>.<extension>` make one example.

Local shards are indexed once (only headers are read) and are then a `Source` with random access, since
a tar file's members lie at known offsets. Shards behind an address or a command can only be read from
front to back; `ShardPieces` reads those, and local ones, for a `Stream`.

The tar files are read with the standard library and not with webdataset's own pipeline, because that
shuffles through a reservoir fed by several workers, whose order cannot be resumed in mid-epoch;
webdataset still opens what is not a local file.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from clipworks.data.records import label_of, texts_of
from clipworks.data.source import Example, Skipped, label_array
from clipworks.errors import DataError, require

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm")
"""Members that are taken for the picture, the first that is there."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?$")
_MOST_SHARDS = 10_000_000


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}.{tar,tgz}` as every text it stands for, the last brace turning fastest.

    A range keeps the leading zeros of its ends, may count down and may have a step (`{0..8..2}`).
    Braces without a comma or a range stand for themselves.

    Raises:
        DataError: if it stands for more than ten million names.
    """
    for match in _BRACES.finditer(pattern):
        choices = _choices(match.group(1))
        if choices is None:
            continue
        rest = expand_braces(pattern[match.end() :])
        if len(choices) * len(rest) > _MOST_SHARDS:
            raise DataError(f"{pattern}: stands for more than {_MOST_SHARDS:,} names")
        # What stands before the first brace that means something holds only braces that do not.
        return [f"{pattern[: match.start()]}{choice}{tail}" for choice in choices for tail in rest]
    return [pattern]


def _choices(inside: str) -> list[str] | None:
    if "," in inside:
        return inside.split(",")
    match = _RANGE.match(inside)
    if match is None:
        return None
    first, last = int(match.group(1)), int(match.group(2))
    step = abs(int(match.group(3))) if match.group(3) else 1
    if step == 0:
        return None
    if abs(last - first) // step >= _MOST_SHARDS:
        raise DataError(f"{{{inside}}}: stands for more than {_MOST_SHARDS:,} names")
    ends = (match.group(1).lstrip("-"), match.group(2).lstrip("-"))
    width = max(map(len, ends)) if any(len(end) > 1 and end[0] == "0" for end in ends) else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{'-' if number < 0 else ''}{abs(number):0{width}d}" for number in numbers]


def is_remote(location: str) -> bool:
    """Whether a location is an address or a command (`pipe:…`) and not a local path."""
    return location.startswith("pipe:") or re.match(r"[a-z0-9+]+://", location) is not None


def locate(locations: str | Path | Iterable[str | Path]) -> list[str]:
    """All shards that paths, folders, patterns, brace ranges and addresses stand for, in order.

    Raises:
        DataError: if there are none, or a pattern or folder has none.
    """
    if isinstance(locations, (str, Path)):
        locations = [locations]
    found: list[str] = []
    for location in locations:
        for one in expand_braces(str(location)):
            if is_remote(one):
                found.append(one)
            elif Path(one).is_dir():
                found += _some(sorted(map(str, Path(one).glob("*.tar"))), one, "a folder without tar files")
            elif any(mark in one for mark in "*?[") and not Path(one).exists():
                found += _some(sorted(glob(one)), one, "no shard matches")  # noqa: PTH207  absolute or not
            else:
                found.append(one)
    return _some(found, locations, "no shard was named")


def _some(found: list[str], place: object, complaint: str) -> list[str]:
    if not found:
        raise DataError(f"{place}: {complaint}")
    return found


def split_name(name: str) -> tuple[str, str] | None:
    """A member's name as key and extension, at the first dot of its last part; None for what is neither.

    >>> split_name("a.b/0001.seg.png")
    ('a.b/0001', 'seg.png')
    """
    path = PurePosixPath(name)
    stem, dot, extension = path.name.partition(".")
    if not stem or not dot or not extension or name.startswith("__"):
        return None
    folder = "" if str(path.parent) == "." else f"{path.parent}/"
    return f"{folder}{stem}", extension.lower()


class TarShards:
    """Local shards as a source with random access.

    Args:
        locations: paths, folders, patterns (`*`), brace ranges (`{000..099}`).
        texts: for each source of texts the field of the JSON member, or the extension, that holds it;
            None finds captions under their usual names.
        strict: raise for what is missing or damaged instead of counting it.

    Attributes:
        skipped: shards and records that could not be read.

    Raises:
        DataError: if no shard can be read, or one is not local.
    """

    def __init__(
        self,
        locations: str | Path | Iterable[str | Path],
        *,
        texts: Mapping[str, str] | None = None,
        strict: bool = False,
    ) -> None:
        self.shards = locate(locations)
        remote = next((shard for shard in self.shards if is_remote(shard)), None)
        if remote is not None:
            raise DataError(f"{remote}: is not a local file; read it with Stream(ShardPieces(…))")
        self.skipped = Skipped()
        self._texts, self._strict = texts, strict
        self._index: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, shard in enumerate(self.shards):
            for key, members in _grouped(_headers(shard, self.skipped, strict)):
                self._index.append((number, key, members))
        if not self._index:
            raise DataError(f"{self.shards[0]}: no example in {len(self.shards)} shards; {self.skipped}")
        self._labels: tuple[NDArray[np.int64] | None] | None = None

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int, /) -> Example:
        shard, key, members = self._index[index]
        return example_of(key, self._read(shard, members), self._texts)

    @property
    def keys(self) -> list[str]:
        """All keys in order."""
        return [key for _, key, _ in self._index]

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels from `.cls` members or the field `label` of `.json`, (n,) int64; None if any lacks one."""
        if self._labels is None:
            self._labels = (label_array(map(self._label, range(len(self)))),)
        return self._labels[0]

    def _label(self, index: int) -> int | None:
        shard, key, members = self._index[index]
        wanted = {extension: place for extension, place in members.items() if extension in ("cls", "json")}
        try:
            return example_of(key, self._read(shard, wanted), self._texts).label if wanted else None
        except DataError:
            return None

    def _read(self, shard: int, members: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
        try:
            with Path(self.shards[shard]).open("rb") as file:
                contents = {}
                for extension, (offset, size) in members.items():
                    file.seek(offset)
                    contents[extension] = file.read(size)
                return contents
        except OSError as error:
            raise DataError(f"{self.shards[shard]}: cannot be read any more ({error.strerror})") from error


class ShardPieces:
    """Shards, local or not, each read from front to back, for a `Stream`.

    Args:
        locations: as for `TarShards`; also addresses (`https://…`) and commands (`pipe:…`).
        texts: as for `TarShards`.
        strict: raise for what is missing or damaged instead of counting it.

    Attributes:
        skipped: shards and records that could not be read.
    """

    def __init__(
        self,
        locations: str | Path | Iterable[str | Path],
        *,
        texts: Mapping[str, str] | None = None,
        strict: bool = False,
    ) -> None:
        self.shards = locate(locations)
        self.skipped = Skipped()
        self._texts, self._strict = texts, strict

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, piece: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        """The examples of one shard from record `start` on, with their number within the shard."""
        shard = self.shards[piece]
        for record, (key, members) in enumerate(_grouped(_contents(shard, self.skipped, self._strict))):
            if record < start:
                continue
            try:
                yield record, example_of(key, members, self._texts)
            except DataError as error:
                if self._strict:
                    raise DataError(f"{shard}: {error}") from error
                self.skipped.add("unreadable record", f"{shard}: {key}", str(error))


def example_of(key: str, members: Mapping[str, bytes], texts: Mapping[str, str] | None = None) -> Example:
    """The members of one key as an example.

    The picture is the first of `IMAGE_EXTENSIONS`; `.txt` is a caption, `.json` holds further fields,
    `.cls` the label; all else goes to `extra` as it is.

    Raises:
        DataError: if a member is not what its extension says.
    """
    record: dict[str, Any] = {}
    image: bytes | None = None
    picture = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    extra: dict[str, Any] = {}
    label: int | None = None
    wanted = set(texts.values()) if texts else set()
    try:
        for extension, content in members.items():
            if extension == picture:
                image = content
            elif extension == "json":
                fields = json.loads(content)
                if not isinstance(fields, dict):
                    raise DataError(f"its json is a {type(fields).__name__}, not an object")
                record |= fields
            elif extension == "cls":
                label = label_of(content.decode("ascii").strip())
            elif extension == "txt" or extension in wanted:
                record[extension] = content.decode("utf-8").strip()
            else:
                extra[extension] = content
        if label is None and isinstance(record.get("label"), int):
            label = label_of(record["label"])
        found = texts_of(record, texts)
    except (ValueError, DataError) as error:
        raise DataError(f"{key}: {error}") from error
    used = {"txt", "label", *(texts.values() if texts else (*found, "caption", "captions", "text"))}
    extra |= {name: value for name, value in record.items() if name not in used}
    return Example(key, image, found, label, extra=extra)


def member_places(
    shard: str, skipped: Skipped, strict: bool = False
) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The keys of a local shard, each with offset and size of its members by extension; reads only headers.

    Raises:
        DataError: for a missing or damaged shard if `strict`; else it is counted in `skipped`.
    """
    yield from _grouped(_headers(shard, skipped, strict))


def _headers(shard: str, skipped: Skipped, strict: bool) -> Iterator[tuple[str, tuple[int, int]]]:
    """The complete members of a local shard as (name, (offset, size)); damage is counted."""
    try:
        length = Path(shard).stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for member in _members(tar, shard, skipped, strict):
                if member.offset_data + member.size > length:
                    _complain(skipped, strict, "truncated shard", shard, f"ends within {member.name}")
                    return
                yield member.name, (member.offset_data, member.size)
            _check_end(shard, tar.offset, length, skipped, strict)
    except (OSError, tarfile.TarError) as error:
        _unreadable(shard, error, skipped, strict)


def _contents(shard: str, skipped: Skipped, strict: bool) -> Iterator[tuple[str, bytes]]:
    """The complete members of any shard as (name, content), read from front to back."""
    if not is_remote(shard):
        try:
            with Path(shard).open("rb") as file:
                for name, (offset, size) in _headers(shard, skipped, strict):
                    file.seek(offset)
                    yield name, file.read(size)
        except OSError as error:
            _unreadable(shard, error, skipped, strict)
        return
    opener = require("webdataset", extra="train", purpose="reading shards that are not local files").gopen
    try:
        with opener(shard) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in _members(tar, shard, skipped, strict):
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if len(data) != member.size:
                    _complain(skipped, strict, "truncated shard", shard, f"ends within {member.name}")
                    return
                yield member.name, data
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  openers raise whatever their protocol does
        _unreadable(shard, error, skipped, strict)


def _members(tar: tarfile.TarFile, shard: str, skipped: Skipped, strict: bool) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = tar.next()
        except tarfile.TarError as error:
            _complain(skipped, strict, "truncated shard", shard, str(error))
            return
        tar.members.clear()  # type: ignore[attr-defined]  # a tar file remembers all of them otherwise
        if member is None:
            return
        if member.isfile():
            yield member


def _check_end(shard: str, offset: int, length: int, skipped: Skipped, strict: bool) -> None:
    """The standard library takes a damaged header, or none, for the end; only zeros are one."""
    with Path(shard).open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if not block or len(block) < tarfile.BLOCKSIZE:
        _complain(skipped, strict, "truncated shard", shard, "has no end mark")
    elif block.strip(b"\0"):
        _complain(skipped, strict, "damaged shard", shard, f"no header at byte {offset} of {length}")


def _unreadable(shard: str, error: Exception, skipped: Skipped, strict: bool) -> None:
    missing = isinstance(error, FileNotFoundError)
    reason = "missing shard" if missing else "unreadable shard"
    detail = "no such file" if missing else (str(error).splitlines() or [type(error).__name__])[0]
    _complain(skipped, strict, reason, shard, detail)


def _complain(skipped: Skipped, strict: bool, reason: str, shard: str, detail: str) -> None:
    if strict:
        raise DataError(f"{shard}: {reason}, {detail}")
    skipped.add(reason, shard, detail)


def _grouped(members: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Neighboring members of one key together; what has no key is left out."""
    current: str | None = None
    group: dict[str, Any] = {}
    for name, content in members:
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        if key != current or extension in group:
            if current is not None and group:
                yield current, group
            current, group = key, {}
        group[extension] = content
    if current is not None and group:
        yield current, group


def write_shards(
    examples: Iterable[Example], folder: str | Path, per_shard: int = 1000, *, prefix: str = "shard"
) -> list[Path]:
    """Write examples as shards `<prefix>-000000.tar`, each complete or not there at all.

    Pictures given as bytes or paths are written as they are, all others as PNG. Texts and what JSON can
    hold of `extra` go to `.json`, bytes in `extra` to members of their own, labels to `.cls`.

    Raises:
        DataError: if a key is empty, twice in a shard, or has a dot in its last part, where a shard's
            keys end; or if something in `extra` can be written in neither way.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    iterator = iter(examples)
    example = next(iterator, None)
    while example is not None:
        path = folder / f"{prefix}-{len(written):06d}.tar"
        temporary = path.with_name(f".{path.name}.part")
        seen: set[str] = set()
        try:
            with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                while example is not None and len(seen) < per_shard:
                    _write_example(tar, example, seen)
                    example = next(iterator, None)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        written.append(path)
    return written


def _write_example(tar: tarfile.TarFile, example: Example, seen: set[str]) -> None:
    split = split_name(f"{example.key}.x")
    if split is None or split != (example.key, "x"):
        raise DataError(
            f"key {example.key!r} cannot be written: it is empty, or has a dot, where a shard's keys end"
        )
    if example.key in seen:
        raise DataError(f"key {example.key!r} is twice in one shard")
    seen.add(example.key)
    members: dict[str, bytes] = {}
    if example.image is not None:
        extension, content = _encoded(example.image)
        members[extension] = content
    fields: dict[str, Any] = {
        name: text if isinstance(text, str) else list(text) for name, text in example.texts.items()
    }
    for name, value in example.extra.items():
        if isinstance(value, bytes):
            members[name] = value
        else:
            fields[name] = value
    if fields:
        try:
            members["json"] = json.dumps(fields, ensure_ascii=False).encode()
        except TypeError as error:
            raise DataError(f"{example.key}: its extra cannot be written as JSON ({error})") from error
    if example.label is not None:
        members["cls"] = str(example.label).encode()
    for extension, content in members.items():
        info = tarfile.TarInfo(f"{example.key}.{extension}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _encoded(image: Any) -> tuple[str, bytes]:
    if isinstance(image, (str, Path)):
        path = Path(image)
        return path.suffix.lstrip(".").lower() or "jpg", path.read_bytes()
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _extension(bytes(image[:16])), bytes(image)
    from clipworks.core.pictures import read_picture

    buffer: IO[bytes] = io.BytesIO()
    read_picture(image).save(buffer, format="PNG")
    buffer.seek(0)
    return "png", buffer.read()


def _extension(head: bytes) -> str:
    if head.startswith(b"\x89PNG"):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"GIF8"):
        return "gif"
    return "jpg"
