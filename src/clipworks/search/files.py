"""What the index knows of a picture file without a model: content, size, dimensions, caption."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipworks.core.pictures import FORMATS, describe
from clipworks.errors import PictureError

_BLOCK = 1 << 20
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
LONGEST_CAPTION = 4096


@dataclass(frozen=True)
class Facts:
    """One file.

    Attributes:
        path: absolute.
        digest: sha256 of its bytes, in hexadecimal.
        mtime_ns, size: of its entry in the folder.
        width, height: of the picture turned upright; 0 where the header does not tell.
        caption: the text of the file of the same name that ends in `.txt`, if there is one.
    """

    path: str
    digest: str
    mtime_ns: int
    size: int
    width: int
    height: int
    caption: str | None


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
    """Read a file once for its hash, and its header for its dimensions; the picture is not decoded.

    Raises:
        PictureError: if the file cannot be read, or changes meanwhile.
    """
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
    width, height = _dimensions(path)
    return Facts(path, digest.hexdigest(), before[1], before[0], width, height, _caption(path))


def _dimensions(path: str) -> tuple[int, int]:
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
    except Exception:  # noqa: BLE001  Pillow raises anything on hostile bytes; decoding will say what is wrong
        return 0, 0
    return (height, width) if turned else (width, height)


def _caption(path: str) -> str | None:
    # Datasets keep a picture's caption in a text file of the same name.
    beside = Path(os.path.splitext(path)[0] + ".txt")  # noqa: PTH122  with_suffix refuses names such as "a."
    try:
        with beside.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(LONGEST_CAPTION).strip() or None
    except OSError:
        return None
