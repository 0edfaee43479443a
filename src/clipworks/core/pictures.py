"""Reading pictures safely.

`read_picture` takes whatever people have (paths, bytes, Pillow pictures, arrays, tensors) and either
gives a fully decoded Pillow picture or raises one `PictureError`; `find_pictures` looks for files. What
Pillow would decode only in part, or with the help of another program, is refused.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from glob import iglob
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from clipworks.errors import ConfigError, DataError, PictureError, ShapeError

Source: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image"
    " | np.ndarray | torch.Tensor"
)

Resize: TypeAlias = Literal["shortest", "squash", "longest"]

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
    plan = None if target is None or not fast else lambda size: resized_size(size, target, "shortest")
    return decode(source, plan=plan, exif=exif, eight_bit=eight_bit, max_pixels=max_pixels).image


class Decoded(NamedTuple):
    """A decoded picture and what is known of its file."""

    image: Image.Image
    size: tuple[int, int]  # of the upright picture at full resolution
    box: tuple[float, float, float, float]  # where the whole picture lies in `image`


def decode(
    source: Source,
    *,
    plan: Callable[[tuple[int, int]], tuple[int, int]] | None,
    exif: bool,
    eight_bit: bool,
    max_pixels: int,
    reserve: Callable[[int], None] = lambda pixels: None,
) -> Decoded:
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
        with quiet, _LOCKS[id(source) % len(_LOCKS)]:
            return _load(source, label, None, exif, eight_bit, max_pixels, reserve)
    with _opened(source, label) as stream, quiet:
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
) -> Decoded:
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
        return Decoded(image, (width, height), box)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"{label}: {_pillows_limit(error)}") from error
    except MemoryError as error:
        raise PictureError(f"{label}: too large for this machine's memory ({width}x{height})") from error
    except Exception as error:  # and so do its decoders
        raise PictureError(f"{label}: {_damaged(image.format or 'picture', error)}") from error


def _whole(image: Image.Image) -> Decoded:
    return Decoded(image, image.size, (0.0, 0.0, float(image.width), float(image.height)))


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


class Quiet:
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


quiet = Quiet()
_LOCKS = tuple(threading.Lock() for _ in range(64))


# ---------------------------------------------------------------------------------------------
# Preprocessing


def resized_size(size: tuple[int, int], n: int, resize: Resize) -> tuple[int, int]:
    """The (width, height) to which a picture is resized before it is cropped or padded to n x n."""
    width, height = size
    if resize == "squash":
        return n, n
    if resize == "shortest":  # the longer side is truncated, not rounded
        return (n, int(n * height / width)) if width <= height else (int(n * width / height), n)
    ratio = max(width / n, height / n)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


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
