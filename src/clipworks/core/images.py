"""The preprocessing of the reference: pictures to squares of bytes, one or many.

`Preprocessing` turns a picture into bytes (3, n, n) exactly as the pipeline of openai/CLIP and open_clip
does; `prepare_many` and `prepare_stream` do so for many pictures on several threads and report what they
had to skip. `fit` is the same geometry for tensors, with a gradient. Mean and deviation are not here: they
belong to the tower. What can be read, and how, is in `pictures`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from clipworks.core.pictures import (
    MAX_PIXELS,
    Decoded,
    Resize,
    Source,
    decode,
    describe,
    quiet,
    resized_size,
)
from clipworks.errors import ConfigError, PictureError, ShapeError, nearest

Interpolation: TypeAlias = Literal["bicubic", "bilinear"]
OnError: TypeAlias = Literal["raise", "skip"]
Color: TypeAlias = "tuple[int, int, int]"

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZES = ("shortest", "squash", "longest")
# Above this a resize before the crop is not worth its memory: a 1 x 60000 strip would become
# 224 x 13 million pixels on the way to 224 x 224.
_LARGEST_RESIZE = 1 << 24
# Pixels from which freed memory is worth giving back to the system at once.
_LARGE = 1 << 24


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
        with ExitStack() as held, quiet:
            # Nothing here keeps the decoded picture: it is gone when its pixels are given back.
            return self._array(
                decode(
                    source,
                    plan=None if exact else lambda size: resized_size(size, self.image_size, self.resize),
                    exif=not self.faithful,
                    eight_bit=not self.faithful,
                    max_pixels=max_pixels,
                    reserve=lambda pixels: held.enter_context(budget.take(pixels)) if budget else None,
                ),
                source,
            )

    def _array(self, decoded: Decoded, source: Source) -> np.ndarray:
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

    def _compose(self, decoded: Decoded) -> Image.Image:
        """Resize, crop or pad, convert."""
        n, image, box = self.image_size, decoded.image, decoded.box
        if self.background is not None and image.has_transparency_data:
            image = image.convert("RGBA")
        elif image.mode == "PA" and not self.faithful:
            image = image.convert("RGBA")  # the reference would interpolate between palette indices
        width, height = resized_size(decoded.size, n, self.resize)
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
    width, height = resized_size((pixels.shape[3], pixels.shape[2]), size, mode)
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
