"""Pictures: reading them safely, and the preprocessing of the reference.

`read_picture` takes whatever people have (paths, bytes, Pillow pictures, arrays, tensors) and
either gives a fully decoded Pillow picture or raises one `PictureError`. `Preprocessing` turns a
picture into bytes (3, n, n) exactly as the pipeline of openai/CLIP and open_clip does;
`prepare_many` and `prepare_stream` do so for many pictures on several threads and report what they
had to skip. `fit` is the same geometry for tensors, with a gradient.

Mean and deviation are not here: they belong to the tower. The file is longer than others because
refusing bad files and matching the reference are decided in the same few places.
"""

from __future__ import annotations

import codecs
import ctypes
import math
import os
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from glob import iglob
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from clipworks.errors import ConfigError, DataError, PictureError, ShapeError, nearest

Source: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image"
    " | np.ndarray | torch.Tensor"
)
Resize: TypeAlias = Literal["shortest", "squash", "longest"]
Interpolation: TypeAlias = Literal["bicubic", "bilinear"]
OnError: TypeAlias = Literal["raise", "skip"]
Color: TypeAlias = "tuple[int, int, int]"

# The size from which Pillow itself refuses (twice its warning threshold).
MAX_PIXELS = 178_956_970

# Formats that decode in this process from the file alone. Left out on purpose: EPS starts
# Ghostscript, stubs such as HDF5 or GRIB cannot be loaded, and TGA, which has no signature, takes
# almost any bytes for a picture.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JPEG2000"),
    *("PPM", "ICO", "PSD", "QOI", "SGI", "PCX", "DDS"),
)
SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff"),
        *(".bmp", ".dib", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
        *(".ico", ".psd", ".qoi", ".sgi", ".pcx", ".dds"),
    )
)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZES = ("shortest", "squash", "longest")
# Above this a resize before the crop is not worth its memory: a 1 x 60000 strip would become
# 224 x 13 million pixels on the way to 224 x 224.
_LARGEST_RESIZE = 1 << 24
# Pixels from which freed memory is worth giving back to the system at once.
_LARGE = 1 << 24
# EXIF orientation -> (swap the axes, then mirror x, then mirror y), and Pillow's name for it.
_UPRIGHT = {
    2: (False, True, False, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (False, True, True, Image.Transpose.ROTATE_180),
    4: (False, False, True, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (True, False, False, Image.Transpose.TRANSPOSE),
    6: (True, True, False, Image.Transpose.ROTATE_270),
    7: (True, True, True, Image.Transpose.TRANSVERSE),
    8: (True, False, True, Image.Transpose.ROTATE_90),
}
_ORIENTATION = 0x0112


# ---------------------------------------------------------------------------------------------
# Reading one picture


def read_picture(
    source: Source,
    *,
    target: int | None = None,
    fast: bool = True,
    exif: bool = True,
    eight_bit: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Read a picture completely, or say in one line why not.

    Args:
        source: a path; the bytes of a file; a binary file object (read from where it stands to its
            end); a Pillow picture; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a tensor
            (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are uint8, bool or float in
            [0, 1]; an array (H, W) may be uint16.
        target: the length in pixels to which the shorter side will be resized. Given, a JPEG much
            larger than that is decoded at a half, a quarter or an eighth of its size.
        fast: allow that. The shorter side stays at least twice `target`, so the final picture
            differs from the exact one by less than a level in 255 on average, by up to ten at single
            sharp edges. Everything but a large JPEG is read exactly.
        exif: turn the picture upright as its EXIF orientation says. The reference pipeline does
            not; `exif=False` is its behavior.
        eight_bit: scale 16-bit, integer and float grays to 8 bits (mode "L"). The reference clips
            them at 255, which leaves white; `eight_bit=False` leaves them as Pillow reads them.
        max_pixels: a picture whose header claims more is refused before anything is decoded.
            Pillow's own limit (`PIL.Image.MAX_IMAGE_PIXELS`, twice) holds besides.

    Returns:
        A loaded Pillow picture in its own mode ("RGB", "L", "P", "CMYK" …); the first frame of an
        animation. A Pillow picture that needs no change is returned as it is.

    Raises:
        PictureError: the source is missing, not a regular file, not a picture, truncated, damaged,
            too large, or an array with a shape or values that no picture has.
    """
    if target is not None and target < 1:
        raise ConfigError(f"target must be a positive number of pixels, got {target}")
    plan = None if target is None or not fast else lambda size: _resized(size, target, "shortest")
    return _decode(source, plan=plan, exif=exif, eight_bit=eight_bit, max_pixels=max_pixels).image


class _Decoded(NamedTuple):
    image: Image.Image
    size: tuple[int, int]  # of the upright picture at full resolution
    box: tuple[float, float, float, float]  # where the whole picture lies in `image`


def _decode(
    source: Source,
    *,
    plan: Callable[[tuple[int, int]], tuple[int, int]] | None,
    exif: bool,
    eight_bit: bool,
    max_pixels: int,
    reserve: Callable[[int], None] = lambda pixels: None,
) -> _Decoded:
    """Open, check, decode, turn upright.

    `plan` maps a size to the size it will be resized to; `reserve` is told how many pixels are about
    to be decoded, and may wait.
    """
    label = describe(source)
    if isinstance(source, np.ndarray):
        return _whole(_from_array(source, label, max_pixels, eight_bit))
    if isinstance(source, torch.Tensor):
        return _whole(_from_tensor(source, label, max_pixels))
    if isinstance(source, Image.Image):
        # Two threads may have been handed the same picture, and loading one is not atomic.
        with _quiet, _LOCKS[id(source) % len(_LOCKS)]:
            return _load(source, label, None, exif, eight_bit, max_pixels, reserve)
    with _opened(source, label) as stream, _quiet:
        head = stream.read(512)
        try:
            image = Image.open(stream, formats=_formats())
        except Image.DecompressionBombError as error:
            raise PictureError(f"{label}: {_pillows_limit(error)}") from error
        except UnidentifiedImageError as error:
            raise PictureError(f"{label}: {_not_a_picture(head)}") from error
        except Exception as error:  # Pillow's parsers raise anything on hostile bytes
            raise PictureError(f"{label}: {_damaged(sniff(head), error)}") from error
        with image:
            return _load(image, label, plan, exif, eight_bit, max_pixels, reserve)


def _load(
    image: Image.Image,
    label: str,
    plan: Callable[[tuple[int, int]], tuple[int, int]] | None,
    exif: bool,
    eight_bit: bool,
    max_pixels: int,
    reserve: Callable[[int], None],
) -> _Decoded:
    width, height = image.size
    _check_size(width, height, label, max_pixels)
    box: tuple[float, float, float, float] = (0.0, 0.0, float(width), float(height))
    try:
        if plan is not None:
            wide, high = plan(image.size)
            drafted = image.draft(None, (2 * wide, 2 * high))  # type: ignore[arg-type]
            if drafted is not None:
                box = tuple(map(float, drafted[1]))  # type: ignore[assignment]
        reserve(image.width * image.height)
        image.load()
        # Some formats (icons, TIFF) know their true size only now.
        _check_size(*image.size, label, max_pixels)
        if (math.ceil(box[2]), math.ceil(box[3])) != image.size:
            box, (width, height) = (0.0, 0.0, float(image.width), float(image.height)), image.size
        orientation = _orientation(image) if exif else 1
        if orientation in _UPRIGHT:
            swap, mirror_x, mirror_y, method = _UPRIGHT[orientation]
            left, top, right, bottom = box
            if swap:
                left, top, right, bottom = top, left, bottom, right
                width, height = height, width
            image = image.transpose(method)
            if mirror_x:
                left, right = image.width - right, image.width - left
            if mirror_y:
                top, bottom = image.height - bottom, image.height - top
            box = (left, top, right, bottom)
        if eight_bit and (image.mode in ("I", "F") or image.mode.startswith("I;16")):
            image = _eight_bit(image)
        return _Decoded(image, (width, height), box)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"{label}: {_pillows_limit(error)}") from error
    except MemoryError as error:
        raise PictureError(f"{label}: too large for this machine's memory ({width}x{height})") from error
    except Exception as error:  # and so do its decoders
        raise PictureError(f"{label}: {_damaged(image.format or 'picture', error)}") from error


def _whole(image: Image.Image) -> _Decoded:
    return _Decoded(image, image.size, (0.0, 0.0, float(image.width), float(image.height)))


def _check_size(width: int, height: int, label: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{label}: a picture of {width}x{height} pixels has nothing to show")
    if width * height > max_pixels:
        raise PictureError(
            f"{label}: refused, its {width}x{height} are {width * height:,} pixels and the limit is"
            f" {max_pixels:,}; raise max_pixels if you trust it"
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or where the EXIF block cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value)
    except Exception:  # noqa: BLE001  broken metadata must not cost the picture
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep grays (I;16*, I, F) as "L".

    16 bits are divided by 257, so that white stays white. Integers beyond 16 bits, and floats that
    fit neither [0, 1] nor bytes nor 16 bits, are stretched from their least to their largest value.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= 1:
            values = values * 255
        elif low >= 0 and high <= 65535:
            values = values / 257 if high > 255 else values
        else:
            values = (values - low) * (255 / (high - low or 1.0))
    elif values.size and (int(values.min()) < 0 or int(values.max()) > 65535):
        wide = values.astype(np.float64)
        values = (wide - wide.min()) * (255 / (float(wide.max() - wide.min()) or 1.0))
    else:
        values = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(np.rint(values).astype(np.uint8))


# ---------------------------------------------------------------------------------------------
# Arrays and tensors


def _from_array(array: np.ndarray, label: str, max_pixels: int, eight_bit: bool) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        shape = tuple(array.shape)
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; for (channels, H, W) give a tensor"
        elif array.ndim == 4:
            hint = "; give the pictures of a batch one by one"
        raise PictureError(
            f"{label}: an array of shape {shape} is not (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){hint}"
        )
    _check_size(array.shape[1], array.shape[0], label, max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint16 and array.ndim == 2:
        deep = Image.fromarray(np.ascontiguousarray(array))
        return _eight_bit(deep) if eight_bit else deep
    return Image.fromarray(np.ascontiguousarray(_bytes(array, label)))


def _from_tensor(tensor: torch.Tensor, label: str, max_pixels: int) -> Image.Image:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        shape = tuple(tensor.shape)
        hint = ""
        if tensor.ndim == 3 and tensor.shape[2] in (1, 3, 4):
            hint = "; for (H, W, channels) give an array"
        elif tensor.ndim == 4:
            hint = "; give the pictures of a batch one by one"
        raise PictureError(
            f"{label}: a tensor of shape {shape} is not (1, H, W), (3, H, W) or (4, H, W){hint}"
        )
    _check_size(tensor.shape[2], tensor.shape[1], label, max_pixels)
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array = _bytes(tensor.numpy(), label)
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def _bytes(array: np.ndarray, label: str) -> np.ndarray:
    """uint8, bool or float in [0, 1] as uint8; a float beyond by less than one byte level is clamped."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind != "f":
        raise PictureError(f"{label}: type {array.dtype} is ambiguous; give uint8 or float in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1 / 255 and high <= 1 + 1 / 255):  # written so that NaN is refused too
        raise PictureError(f"{label}: float values must be in [0, 1], these are in [{low:.4g}, {high:.4g}]")
    return np.rint(np.clip(array, 0, 1).astype(np.float32) * 255).astype(np.uint8)


def to_pixels(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A picture or a batch of them as `pixels (B, 3, H, W)` float in [0, 1].

    Args:
        pictures: a tensor (3, H, W), (1, H, W), (B, 3, H, W) or (B, 1, H, W), or an array (H, W),
            (H, W, 3), (H, W, 1), (B, H, W, 3) or (B, H, W, 1); uint8 or float. Bytes are divided by
            255; floats keep their type, device and gradient and are not clamped. Gray becomes three
            equal channels.

    Raises:
        ShapeError: any other shape or type.
    """
    given = tuple(pictures.shape)
    if isinstance(pictures, np.ndarray):
        tensor = torch.from_numpy(np.array(pictures))  # a copy: the array may be read-only
        if tensor.ndim == 2:
            tensor = tensor[..., None]
        if tensor.ndim in (3, 4):
            tensor = tensor.movedim(-1, -3)
    else:
        tensor = pictures
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        raise ShapeError(f"pictures of shape {given} are neither (B, 3, H, W) nor an array (B, H, W, 3)")
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    elif not tensor.is_floating_point():
        raise ShapeError(f"pictures of type {tensor.dtype} are ambiguous; give uint8 or float in [0, 1]")
    return tensor.expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------------------------
# Opening files


def _opened(source: object, label: str) -> BinaryIO:
    """A seekable binary stream over the source, without ever blocking on a pipe or a device."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(bytes(source))
    if isinstance(source, (str, os.PathLike)):
        return _opened_path(Path(os.fsdecode(source)), label)
    if hasattr(source, "read"):
        try:
            data = source.read()
        except (OSError, ValueError) as error:
            raise PictureError(f"{label}: cannot be read ({error})") from error
        if not isinstance(data, bytes):
            raise PictureError(f"{label}: gives text; open the file in binary mode")
        return BytesIO(data)
    raise PictureError(
        f"{label}: not something to read a picture from; give a path, bytes, a binary file, a Pillow picture,"
        " an array or a tensor"
    )


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow has; asked each time, for HEIF may be registered later."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened_path(path: Path, label: str) -> BinaryIO:
    try:
        # Asked before opening, because opening a device can have effects; and again afterwards,
        # because the path may have been exchanged in between. O_NONBLOCK keeps a pipe from waiting.
        _check_regular(path.stat().st_mode, label)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise PictureError(f"{label}: a symbolic link to a file that does not exist") from error
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", label):
            raise PictureError(f"{label}: addresses are not fetched; give a downloaded file") from error
        raise PictureError(f"{label}: no such file") from error
    except PermissionError as error:
        raise PictureError(f"{label}: no permission to read it") from error
    except (OSError, ValueError) as error:  # too long a name, a loop of links, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PictureError(f"{label}: cannot be opened ({reason})") from error
    try:
        _check_regular(os.fstat(descriptor).st_mode, label)
        return cast(BinaryIO, os.fdopen(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(mode: int, label: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for test, name in kinds if test(mode)), "a device")
    raise PictureError(f"{label}: {kind}, not a picture file")


def describe(source: object) -> str:
    """One printable line that names a source: its path, or what kind of thing it is."""
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source) or "an empty path"
    elif isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        return "array" if isinstance(source, np.ndarray) else "tensor"
    elif isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"{source.mode} picture"
    else:
        name = getattr(source, "name", None) or type(source).__name__
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return name if len(name) <= 160 else f"{name[:70]}…{name[-70:]}"


_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\x7fELF", "a program"),
    (b"\x1aE\xdf\xa3", "a Matroska video"),
    (b"OggS", "Ogg sound or video"),
    (b"ID3", "MP3 sound"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"PAR1", "Parquet"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
)
_PICTURE_KINDS = ("JPEG", "PNG", "GIF", "TIFF", "WebP", "AVIF", "HEIF", "BMP")


def sniff(head: bytes) -> str:
    """What the first bytes of a file look like, in words: "PNG", "text", "PDF" …"""
    if not head:
        return "an empty file"
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[:4] == b"RIFF":
        return {b"WEBP": "WebP", b"WAVE": "WAVE sound", b"AVI ": "AVI video"}.get(head[8:12], "RIFF")
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF"}.get(
            brand, "MP4 or QuickTime video"
        )
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "BMP"
    if not head.strip(b"\0"):
        return "nothing but zeros"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "SVG"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML"
    if text.startswith(b"<?xml"):
        return "XML"
    try:
        # Incremental, because the prefix may end within a character.
        decoded = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return f"bytes {head[:4].hex(' ')}"
    printable = all(c.isprintable() or c in "\t\r\n\f" for c in decoded)
    return "text" if printable else f"bytes {head[:4].hex(' ')}"


def _not_a_picture(head: bytes) -> str:
    kind = sniff(head)
    if kind in _PICTURE_KINDS:
        if kind == "HEIF":
            return "HEIF, which Pillow reads only with pillow-heif and its register_heif_opener()"
        return f"truncated or damaged {kind}; its header cannot be read"
    return f"not a picture that Pillow can read (found {kind})"


def _pillows_limit(error: Exception) -> str:
    claim = str(error).partition(",")[0].replace("Image size", "its size")
    return f"refused, {claim} (twice PIL.Image.MAX_IMAGE_PIXELS)"


def _damaged(kind: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    kind = kind if kind in _PICTURE_KINDS or kind.isupper() else "picture"
    return f"truncated or damaged {kind} ({reason[:120]})"


class _Quiet:
    """Keeps Pillow's warnings from the user while any thread reads a picture.

    `warnings.catch_warnings` would do it for one thread: it restores the process-wide list when it
    leaves, and so undoes what another thread has just set. Here one filter, for Pillow's modules
    alone, is put in by the first thread that enters and taken out by the last that leaves.
    """

    # The empty group makes the entry ours: a user's equal-looking filter is never removed.
    _PATTERN = r"PIL\.(?:)"
    _ENTRY = ("ignore", None, Warning, re.compile(_PATTERN), 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._ENTRY not in warnings.filters:
                warnings.filterwarnings("ignore", module=self._PATTERN)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers and self._ENTRY in warnings.filters:
                cast("list[Any]", warnings.filters).remove(self._ENTRY)


_quiet = _Quiet()
_LOCKS = tuple(threading.Lock() for _ in range(64))


class _Budget:
    """Bounds how many pixels are held at once by all threads; a single picture always may pass."""

    def __init__(self, pixels: int) -> None:
        self._capacity = self._left = pixels
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._capacity)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            if pixels > _LARGE:
                _trim_memory()
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


def _trim_memory() -> None:
    """Give freed memory back to the system, where the C library is one that would keep it.

    glibc keeps an arena a thread and returns little of it, so that eight threads that decode one
    large picture after the other would end up holding eight of them.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


# ---------------------------------------------------------------------------------------------
# Preprocessing


def _resized(size: tuple[int, int], n: int, resize: Resize) -> tuple[int, int]:
    """The (width, height) to which a picture is resized before it is cropped or padded to n x n."""
    width, height = size
    if resize == "squash":
        return n, n
    if resize == "shortest":  # the longer side is truncated, not rounded
        return (n, int(n * height / width)) if width <= height else (int(n * width / height), n)
    ratio = max(width / n, height / n)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the bytes a tower reads; equals the pipeline of openai/CLIP and open_clip.

    Resize, center crop (or padding) to n x n, conversion to RGB, in this order, as the reference
    has it: a palette picture is therefore resized as indices, with the nearest neighbor, and
    transparency is dropped rather than composited. Two things the reference does are not followed
    unless `faithful` is set: it ignores the EXIF orientation, and it clips 16-bit, integer and
    float grays to white.

    Args:
        image_size: n, the side of the square that comes out.
        resize: "shortest" resizes the shorter side to n and crops the center (CLIP), "squash"
            resizes to n x n whatever the shape (SigLIP), "longest" resizes the longer side to n and
            pads.
        interpolation: "bicubic" or "bilinear", with antialiasing.
        background: the color (r, g, b) in 0..255 on which transparent pictures are laid and with
            which "longest" pads. None is the reference: alpha is dropped, and padding is zero in
            the picture's own mode: black, white for CMYK, the first color of a palette.
        faithful: follow the reference bit for bit, always decoding at full size.
    """

    image_size: int = 224
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    background: Color | None = None
    faithful: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.image_size, bool) or not isinstance(self.image_size, int) or self.image_size < 1:
            raise ConfigError(f"image_size must be a positive whole number, got {self.image_size!r}")
        if self.resize not in _RESIZES:
            raise ConfigError(f"resize must be {' or '.join(_RESIZES)}, got {self.resize!r}")
        if self.interpolation not in _FILTERS:
            raise ConfigError(f"interpolation must be {' or '.join(_FILTERS)}, got {self.interpolation!r}")
        if self.background is not None:
            color = tuple(self.background)
            if len(color) != 3 or not all(isinstance(level, int) and 0 <= level <= 255 for level in color):
                raise ConfigError(f"background must be three integers in 0..255, got {self.background!r}")
            object.__setattr__(self, "background", color)

    def __call__(self, source: Source, *, fast: bool = False, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
        """Prepare one picture.

        Args:
            source: anything that `read_picture` takes.
            fast: decode large JPEGs at a reduced size (see `read_picture`); off here, because the
                result then only comes close to the reference.
            max_pixels: see `read_picture`.

        Returns:
            uint8 (3, n, n).

        Raises:
            PictureError: the source is no picture.
        """
        return torch.from_numpy(self._prepare(source, fast=fast, max_pixels=max_pixels))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint."""
        values = asdict(self)
        values["background"] = None if self.background is None else list(self.background)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`; what is left out has its default.

        Raises:
            ConfigError: an unknown key, or a value that cannot work.
        """
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"preprocessing has no setting {key!r}{nearest(str(key), names)}")
        return cls(**values)

    def _prepare(
        self, source: Source, *, fast: bool, max_pixels: int, budget: _Budget | None = None
    ) -> np.ndarray:
        exact = self.faithful or not fast
        with ExitStack() as held, _quiet:
            # Nothing here keeps the decoded picture: it is gone when its pixels are given back.
            return self._array(
                _decode(
                    source,
                    plan=None if exact else lambda size: _resized(size, self.image_size, self.resize),
                    exif=not self.faithful,
                    eight_bit=not self.faithful,
                    max_pixels=max_pixels,
                    reserve=lambda pixels: held.enter_context(budget.take(pixels)) if budget else None,
                ),
                source,
            )

    def _array(self, decoded: _Decoded, source: Source) -> np.ndarray:
        try:
            image = self._compose(decoded)
        except (OSError, ValueError, MemoryError) as error:
            width, height = decoded.size
            raise PictureError(
                f"{describe(source)}: mode {decoded.image.mode} of {width}x{height} pixels cannot be"
                f" resized and converted ({error})"
            ) from error
        # A copy even where the memory order fits already, as at n = 1: Pillow's bytes are read-only.
        return np.array(np.asarray(image).transpose(2, 0, 1), order="C")

    def _compose(self, decoded: _Decoded) -> Image.Image:
        """Resize, crop or pad, convert."""
        n, image, box = self.image_size, decoded.image, decoded.box
        if self.background is not None and image.has_transparency_data:
            image = image.convert("RGBA")
        elif image.mode == "PA" and not self.faithful:
            image = image.convert("RGBA")  # the reference would interpolate between palette indices
        width, height = _resized(decoded.size, n, self.resize)
        left, top = max(0, round((width - n) / 2)), max(0, round((height - n) / 2))
        right, bottom = min(width, left + n), min(height, top + n)
        if image.size == decoded.size and width * height <= _LARGEST_RESIZE:
            if image.size != (width, height):
                image = image.resize((width, height), _FILTERS[self.interpolation])
            if (left, top, right, bottom) != (0, 0, width, height):
                image = image.crop((left, top, right, bottom))
        else:
            # Only the part that the crop keeps is resized. Not bit for bit the same as resizing all
            # and cropping: Pillow takes the box in single precision, and the order of its two passes,
            # between which it rounds and clips, depends on the sizes.
            across, down = (box[2] - box[0]) / width, (box[3] - box[1]) / height
            part = (
                max(box[0] + left * across, 0.0),
                max(box[1] + top * down, 0.0),
                min(box[0] + right * across, image.width),
                min(box[1] + bottom * down, image.height),
            )
            image = image.resize((right - left, bottom - top), _FILTERS[self.interpolation], box=part)
        if self.background is not None:
            if image.mode in ("RGBA", "LA"):
                ground = Image.new("RGBA", image.size, (*self.background, 255))
                image = Image.alpha_composite(ground, image.convert("RGBA"))
            image = image.convert("RGB")
        if image.size != (n, n):
            padded = Image.new(image.mode, (n, n), self.background or 0)
            if image.palette is not None:
                padded.putpalette(image.palette)
            padded.paste(image, ((n - image.width) // 2, (n - image.height) // 2))
            image = padded
        return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------------------------------------
# Many pictures


@dataclass(frozen=True)
class Prepared:
    """Pictures ready for a tower, and what became of the others.

    Attributes:
        pixels: uint8 (k, 3, n, n), in the order of the sources.
        kept: k positions among the sources, counted from 0.
        errors: (position, message) of each source that was skipped.
    """

    pixels: torch.Tensor
    kept: list[int]
    errors: list[tuple[int, str]]

    def summary(self) -> str:
        """One line: "skipped 3 of 40: a.jpg: …"; empty when nothing was skipped."""
        return summarize(self.errors, len(self.kept) + len(self.errors))


def summarize(errors: Iterable[tuple[int, str]], total: int, *, shown: int = 3) -> str:
    """One line on what was skipped: "skipped 3 of 40: a.jpg: …; b.jpg: …"; empty for no errors."""
    messages = [message for _, message in errors]
    if not messages:
        return ""
    rest = len(messages) - shown
    listed = "; ".join(messages[:shown]) + (f"; and {rest} more" if rest > 0 else "")
    return f"skipped {len(messages)} of {total}: {listed}"


def prepare_many(
    sources: Iterable[Source],
    preprocessing: Preprocessing,
    *,
    workers: int | None = None,
    on_error: OnError = "raise",
    fast: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Prepared:
    """Prepare all the sources at once, on several threads, in their order.

    Args:
        sources: anything that `read_picture` takes, each.
        preprocessing: what to make of them.
        workers: threads; None is one for each processor this process may use, 0 none at all.
        on_error: "raise" stops at the first bad picture, "skip" leaves it out and reports it.
        fast: decode large JPEGs at a reduced size; see `read_picture`.
        max_pixels: a picture that claims more is refused. It also bounds how many pixels are being
            decoded at the same time, whatever the number of threads.

    Raises:
        PictureError: a bad picture, under `on_error="raise"`.
    """
    listed = list(_several(sources))
    n = preprocessing.image_size
    pixels = np.empty((len(listed), 3, n, n), dtype=np.uint8)
    kept: list[int] = []
    errors: list[tuple[int, str]] = []
    for index, result in _results(listed, preprocessing, workers, on_error, fast, max_pixels, ahead=0):
        if isinstance(result, PictureError):
            errors.append((index, str(result)))
        else:
            pixels[len(kept)] = result
            kept.append(index)
    return Prepared(torch.from_numpy(pixels[: len(kept)]), kept, errors)


def prepare_stream(
    sources: Iterable[Source],
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_error: OnError = "raise",
    fast: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prepared]:
    """Prepare any number of sources in batches, reading ahead by up to two batches.

    Every batch but the last has `batch_size` pictures; positions in `kept` and `errors` count from
    the beginning of the stream. If pictures were skipped after the last good one, the last batch
    may be empty and hold only their errors. The sources may be endless; closing the iterator stops
    the threads. Arguments and errors as in `prepare_many`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be a positive whole number, got {batch_size}")
    several, ahead = _several(sources), 2 * batch_size
    results = _results(several, preprocessing, workers, on_error, fast, max_pixels, ahead=ahead)
    return _batches(results, preprocessing.image_size, batch_size)


def _several(sources: Iterable[Source]) -> Iterable[Source]:
    if isinstance(sources, (str, bytes, os.PathLike)) or not isinstance(sources, Iterable):
        raise ConfigError(
            f"sources must be a list or an iterator of pictures, got one {type(sources).__name__}"
        )
    return sources


def _batches(
    results: Iterator[tuple[int, np.ndarray | PictureError]], n: int, batch_size: int
) -> Iterator[Prepared]:
    pictures: list[np.ndarray] = []
    kept: list[int] = []
    errors: list[tuple[int, str]] = []

    def batch() -> Prepared:
        stacked = np.stack(pictures) if pictures else np.empty((0, 3, n, n), dtype=np.uint8)
        return Prepared(torch.from_numpy(stacked), kept, errors)

    try:
        for index, result in results:
            if isinstance(result, PictureError):
                errors.append((index, str(result)))
                continue
            pictures.append(result)
            kept.append(index)
            if len(pictures) == batch_size:
                yield batch()
                pictures, kept, errors = [], [], []
        if pictures or errors:
            yield batch()
    finally:
        cast(Any, results).close()


def _results(
    sources: Iterable[Source],
    preprocessing: Preprocessing,
    workers: int | None,
    on_error: OnError,
    fast: bool,
    max_pixels: int,
    ahead: int,
) -> Iterator[tuple[int, np.ndarray | PictureError]]:
    """(position, bytes or error) in order; checks its arguments before the first picture is asked for."""
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"on_error must be raise or skip, got {on_error!r}")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {workers}")
    budget = _Budget(max_pixels)

    def attempt(source: Source) -> np.ndarray | PictureError:
        try:
            return preprocessing._prepare(source, fast=fast, max_pixels=max_pixels, budget=budget)
        except PictureError as error:
            if on_error == "raise":
                raise
            # Kept without its traceback, whose frames would hold on to the decoded picture.
            return PictureError(str(error))

    return _in_order(attempt, sources, workers, max(ahead, 4 * workers))


def _in_order(
    attempt: Callable[[Source], np.ndarray | PictureError],
    sources: Iterable[Source],
    workers: int,
    window: int,
) -> Iterator[tuple[int, np.ndarray | PictureError]]:
    if workers == 0:
        for index, source in enumerate(sources):
            yield index, attempt(source)
        return
    waiting: deque[tuple[int, Future[np.ndarray | PictureError]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="clipworks-pictures") as pool:
        try:
            for index, source in enumerate(sources):
                waiting.append((index, pool.submit(attempt, source)))
                if len(waiting) >= window:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


# ---------------------------------------------------------------------------------------------
# Tensors, with a gradient


def fit(
    pixels: torch.Tensor,
    size: int,
    mode: Resize = "shortest",
    *,
    interpolation: Interpolation = "bicubic",
) -> torch.Tensor:
    """Resize pixels to a square, differentiably, with the geometry of `Preprocessing`.

    Args:
        pixels: (B, 3, H, W) float in [0, 1]; any number of channels will do.
        size: n.
        mode: "shortest" (resize and crop the center), "squash", or "longest" (resize and pad with 0).
        interpolation: "bicubic" or "bilinear", antialiased.

    Returns:
        (B, 3, n, n) in [0, 1], of the type of `pixels`; what bicubic overshoots is clamped. Equal to
        `Preprocessing` up to the rounding that Pillow does between its two passes.

    Raises:
        ShapeError: `pixels` is not (B, C, H, W) float.
    """
    if pixels.ndim != 4 or not pixels.is_floating_point() or 0 in pixels.shape[2:]:
        shape = tuple(pixels.shape)
        raise ShapeError(f"fit takes float pixels (B, 3, H, W), got {pixels.dtype} of shape {shape}")
    if mode not in _RESIZES or interpolation not in _FILTERS:
        raise ConfigError(f"fit knows no mode {mode!r} with interpolation {interpolation!r}")
    if size < 1:
        raise ConfigError(f"size must be a positive whole number, got {size}")
    width, height = _resized((pixels.shape[3], pixels.shape[2]), size, mode)
    left, top = max(0, round((width - size) / 2)), max(0, round((height - size) / 2))
    if (height, width) != pixels.shape[2:]:
        # Half precision would round the weights; the sum is formed in single.
        wide = pixels.float() if pixels.dtype in (torch.float16, torch.bfloat16) else pixels
        # Where the width becomes 1, torch 2.13 gives every row the value of the first; not on its side.
        on_side, shape = width == 1, (height, width)
        if on_side:
            wide, shape = wide.mT.contiguous(), (width, height)
        wide = functional.interpolate(wide, shape, mode=interpolation, antialias=True, align_corners=False)
        pixels = (wide.mT if on_side else wide).clamp(0, 1).to(pixels.dtype)
    pixels = pixels[:, :, top : top + size, left : left + size]
    right, down = size - pixels.shape[3], size - pixels.shape[2]
    if right or down:
        pixels = functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
    return pixels


# ---------------------------------------------------------------------------------------------
# Finding pictures


def find_pictures(folder_or_glob: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """Picture files by their suffix, in natural order (`img2` before `img10`).

    Args:
        folder_or_glob: a folder, a pattern such as `"photos/**/*.jpg"`, or one file.
        recursive: look into folders inside the folder. Folders behind symbolic links are not
            entered, so a loop of links does no harm.

    Returns:
        Paths that begin with what was given. Hidden files and folders are left out. A file that a
        suffix promises to be a picture is listed even if it cannot be read: reading says so.

    Raises:
        DataError: there is no such folder or file.
    """
    given = os.fspath(folder_or_glob)
    if Path(given).is_dir():
        return sorted(_walk(given, recursive), key=_natural)
    if os.path.lexists(given):
        return [Path(given)]
    if any(mark in given for mark in "*?["):
        # glob leaves out hidden names unless the pattern spells the dot.
        found = map(Path, iglob(given, recursive=recursive))  # noqa: PTH207  Path.glob takes no absolute pattern
        # Unlike the walk, `**` follows links: what a loop shows again is dropped, the shortest name kept.
        places = {
            (path.parent.resolve(), path.name): path
            for path in sorted(found, key=lambda path: len(path.parts), reverse=True)
            if _is_candidate(path)
        }
        return sorted(places.values(), key=_natural)
    raise DataError(f"{describe(given)}: no such folder or file")


def _walk(folder: str, recursive: bool) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        warnings.warn(f"{describe(error.filename)}: skipped, {error.strerror}", stacklevel=2)

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")] if recursive else []
        yield from (Path(parent, name) for name in names if _is_candidate(Path(name)))


def _is_candidate(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _natural(path: Path) -> tuple[tuple[tuple[int, int, str], ...], ...]:
    def chunks(name: str) -> tuple[tuple[int, int, str], ...]:
        split = (part for part in re.split(r"([0-9]+)", name) if part)
        return tuple((0, int(part), part) if part[0] in "0123456789" else (1, 0, part) for part in split)

    folded = tuple(chunks(part.casefold()) for part in path.parts)
    return (*folded, ((2, 0, str(path)),))
