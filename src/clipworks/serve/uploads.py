"""Pictures as clients send them: base64, data URLs, files; refused by size before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import re
from io import BytesIO

from PIL import Image
from torch import Tensor

from clipworks.core.images import Preprocessing
from clipworks.core.pictures import read_picture
from clipworks.errors import PictureError

MOST_SCANS = 256
"""Of one JPEG. A progressive one has about ten; each scan costs as much as decoding a whole picture."""

_DATA = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w-]+=[\w.-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def is_address(picture: str) -> bool:
    """Whether a text is an address other than a data URL."""
    return _SCHEME.match(picture) is not None and picture[:5].casefold() != "data:"


def decoded(picture: str) -> bytes:
    """The bytes that base64 or a data URL stands for.

    Raises:
        PictureError: if it is neither.
    """
    head = _DATA.match(picture)
    text = picture[head.end() :] if head else picture
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError("a picture is neither base64 nor a data URL with base64") from error
    if not data:
        raise PictureError("a picture is empty")
    return data


def pixels_of(data: bytes, preprocessing: Preprocessing, most_pixels: int) -> Tensor:
    """Bytes of a file to the bytes (3, n, n) that a tower reads; what `embed_images` makes of them.

    Raises:
        PictureError: if they are no picture, a damaged one, or one that would take too much.
    """
    _check_scans(data)
    return preprocessing(_Sent(data), fast=True, max_pixels=most_pixels)


class _Sent(BytesIO):
    """A file without a name of its own: what the client calls it is never looked at."""

    name = "picture"


def picture_of(data: bytes, side: int, most_pixels: int) -> Image.Image:
    """Bytes of a file to a picture whose longer side has at most `side` pixels.

    Raises:
        PictureError: if they are no picture, a damaged one, or one that would take too much.
    """
    _check_scans(data)
    return _small(read_picture(_Sent(data), target=side, max_pixels=most_pixels), side)


def thumbnail(path: str, side: int, most_pixels: int) -> bytes:
    """A picture of an index as a JPEG whose longer side has at most `side` pixels.

    Raises:
        PictureError: if it cannot be read.
    """
    from clipworks.search.items import picture_at

    picture = _small(read_picture(picture_at(path), target=side, max_pixels=most_pixels), side)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _small(picture: Image.Image, side: int) -> Image.Image:
    picture = picture.convert("RGB")
    picture.thumbnail((side, side))
    return picture


def _check_scans(data: bytes) -> None:
    # Within a scan a byte 0xFF is followed by 0 or a restart marker: so these are scans, also of a thumbnail.
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8\xff") else 0
    if scans > MOST_SCANS:
        raise PictureError(f"refused, a JPEG of {scans} scans; save it again with an ordinary program")
