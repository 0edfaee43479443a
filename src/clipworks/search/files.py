"""What the index knows of a picture or a text without a model: content, size, dimensions, caption, fields."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import Image

from clipworks.core.pictures import FORMATS, describe
from clipworks.errors import PictureError

Kind = Literal["image", "text"]
Content = str | Callable[[], Any]
"""What goes through the model: a text; or a picture's path or bytes, asked for when its turn has come."""

_BLOCK = 1 << 20
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
LONGEST_CAPTION = 4096


@dataclass(frozen=True)
class Facts:
    """One item, a picture or a text.

    Attributes:
        path: its name in the index: of a picture file the absolute path.
        digest: sha256 of its content, in hexadecimal.
        mtime_ns, size: of its file; of a picture in a shard, the shard's time and the picture's own size.
        width, height: of the picture turned upright; 0 where the header does not tell, and for texts.
        caption: what is said of the picture; a text itself.
        content: what goes through the model.
        kind: `image` or `text`.
        file: the shard or table that holds it; None for a file of its own.
        detail: changes whenever caption or fields do, where these have a place of their own; else 0.
        fields: whatever else is known of it, by name: strings, numbers, truth values.
    """

    path: str
    digest: str
    mtime_ns: int
    size: int
    width: int
    height: int
    caption: str | None
    content: Content
    kind: Kind = "image"
    file: str | None = None
    detail: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change, by which a file that nobody touched is told without reading it.

    Raises:
        PictureError: if there is no such file, or its name cannot be kept in a table.
    """
    try:
        path.encode()
        entry = Path(path).stat()
    except UnicodeEncodeError as error:
        raise PictureError(
            f"{describe(path)}: a name that is not UTF-8 cannot be indexed; rename it"
        ) from error
    except OSError as error:
        raise PictureError(f"{describe(path)}: {error.strerror}") from error
    return entry.st_size, entry.st_mtime_ns


def is_gone(path: str) -> bool:
    """Whether a file does not exist; one that is merely out of reach (permissions, a disk) is not gone."""
    try:
        Path(path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def read_facts(path: str) -> Facts:
    """Read a picture file once for its hash, and its header for its dimensions; it is not decoded.

    Raises:
        PictureError: if the file cannot be read, or changes meanwhile.
    """
    digest, (size, mtime_ns) = _digest(path)
    width, height = dimensions(path)
    caption = read_caption(caption_file(path))
    return Facts(path, digest, mtime_ns, size, width, height, caption, lambda: path)


def read_text(path: str) -> Facts:
    """A file with one text as an item of its own.

    Raises:
        PictureError: if the file cannot be read, changes meanwhile, or holds no text.
    """
    _, (size, mtime_ns) = _digest(path)
    text = read_caption(path)
    if text is None:
        raise PictureError(f"{describe(path)}: holds no text")
    return text_facts(path, text, size=size, mtime_ns=mtime_ns)


def text_facts(path: str, text: str, **others: Any) -> Facts:
    """A text as an item; `others` are further attributes of `Facts`."""
    known = {"mtime_ns": 0, "size": len(text.encode("utf-8", "surrogatepass")), **others}
    return Facts(
        path, digest_of_text(text), width=0, height=0, caption=text, content=text, kind="text", **known
    )


def digest_of_text(text: str) -> str:
    """The sha256 of a text, which no file's bytes share."""
    return hashlib.sha256(b"text\0" + text.encode("utf-8", "surrogatepass")).hexdigest()


def caption_file(path: str) -> str:
    """Where the caption of a picture file would lie: in the file of the same name that ends in `.txt`."""
    return os.path.splitext(path)[0] + ".txt"  # noqa: PTH122  with_suffix refuses names such as "a."


def read_caption(path: str) -> str | None:
    """The text of a file, shortened where it is very long; None if there is no such file or no text in it."""
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as stream:
            return stream.read(LONGEST_CAPTION).strip() or None
    except OSError:
        return None


def dimensions(picture: str | bytes) -> tuple[int, int]:
    """Width and height of a path's or a file's picture turned upright; (0, 0) where the header is damaged."""
    Image.init()
    source: str | BinaryIO = BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
    except Exception:  # noqa: BLE001  Pillow raises anything on hostile bytes; decoding will say what is wrong
        return 0, 0
    return (height, width) if turned else (width, height)


def _digest(path: str) -> tuple[str, tuple[int, int]]:
    before = stamp(path)
    digest = hashlib.sha256()
    try:
        if not Path(path).is_file():
            raise PictureError(f"{describe(path)}: not a regular file")
        with Path(path).open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise PictureError(f"{describe(path)}: {error.strerror}") from error
    if stamp(path) != before:
        raise PictureError(f"{describe(path)}: changed while it was read; build the index again")
    return digest.hexdigest(), before
