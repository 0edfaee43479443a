"""What methods of the family share that say how unusual pictures and pixels are.

A scorer sees a picture as a whole, squashed to a square. One that is looked at larger than a window
(`size="full"`, or a size above `window`) has its map made of overlapping windows, and its score of the whole
picture squashed to a window. It is a dataclass over `Scorer` with its settings as fields, and defines

    `_ready() -> Any`         what one call needs of what was learned, made once
    `_judge(pixels, ready)`   of bytes (B, 3, H, W), scores in [0, 1]: of pictures (B,), of places (B, h, w)
    `smoothing`               σ of the Gaussian over a map, in sides of the square
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipworks.engine.precision import computing
from clipworks.errors import ConfigError, DataError, PictureError
from clipworks.methods.dense.base import DenseMethod, Scores, Unreadable
from clipworks.parts.frozen import undisturbed
from clipworks.parts.heat import smoothed
from clipworks.parts.progress import with_bar
from clipworks.parts.segmentation import Segmentation
from clipworks.parts.windows import Canvas, aligned_stride, stretch, window_starts

AT_ONCE = 16  # pictures or windows that go through the tower together
THRESHOLDS = ("threshold_", "image_threshold_")

S = TypeVar("S", bound="Scorer")


@dataclass(eq=False, repr=False)
class Scorer(DenseMethod):
    """Scores of pictures and maps of their places; `calibrate` sets `threshold_` and `image_threshold_`.

    `window` is by default the square of `size`, or with `"full"` that of `size=None`.
    """

    smoothing: ClassVar[float] = 0.0

    # --- what a user calls ---

    def score(self, images: Iterable[Any]) -> Scores:
        """How unusual pictures and their pixels are; see `score_all` for many large ones.

        Raises:
            ConfigError: before anything was learned.
            PictureError: for a picture that cannot be read.
        """
        found = [one for one in self.score_all(images) if isinstance(one, Scores)]
        image = torch.cat([one.image for one in found]) if found else torch.empty(0)
        return Scores(image, [one.maps[0] for one in found])

    def score_all(
        self,
        images: Iterable[Any],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> Iterator[Scores | Unreadable]:
        """Scores of one picture after the other, of any size, in their order.

        Args:
            images: pictures, read one after the other.
            on_error: `raise` at the first picture that cannot be read, or `skip` it: an `Unreadable` comes in
                its place.
            progress: show a bar; None takes the method's setting.

        Raises:
            ConfigError: before anything was learned.
            PictureError: for a picture that cannot be read, with `on_error="raise"`.
        """
        images = several(images)
        stride = aligned_stride(self._window, self.overlap, self.patch)
        with undisturbed(self.clip), torch.no_grad():
            ready = self._ready()
        count = len(images) if isinstance(images, Sequence) else 0
        shown = self.progress if progress is None else progress
        waiting: list[_Picture | Unreadable] = []
        held = 0
        for number, image in enumerate(with_bar(images, count, "scoring", shown)):
            try:
                waiting.append(_Picture(*self._scaled(image)))
                held += waiting[-1].array.size  # type: ignore[union-attr]
            except PictureError as error:
                if on_error == "raise":
                    raise
                waiting.append(Unreadable(number, str(error)))
            # Large pictures do not wait for each other.
            if held >= 3 * AT_ONCE * self.side**2:
                yield from self._scored(waiting, ready, stride)
                waiting, held = [], 0
        yield from self._scored(waiting, ready, stride)

    def calibrate(self: S, faultless: Iterable[Any], quantile: float = 0.99) -> S:
        """Set thresholds that this share of faultless pictures stays below.

        `threshold_` is for pixels: that many of these pictures have none above it. `image_threshold_` is for
        the scores of pictures.

        Raises:
            ConfigError: for a quantile outside 0 … 1.
            DataError: without pictures.
        """
        if not 0 <= quantile <= 1:
            raise ConfigError(f"quantile must be from 0 to 1, not {quantile}")
        highest, image = [], []
        for found in self.score_all(faultless):
            if isinstance(found, Scores):
                highest.append(found.maps[0].max())
                image.append(found.image[0])
        if not image:
            raise DataError("thresholds need at least one faultless picture")
        self.threshold_ = float(torch.stack(highest).quantile(quantile))
        self.image_threshold_ = float(torch.stack(image).quantile(quantile))
        return self

    def segment(self, image: Any, labels: Sequence[str] | None = None) -> Segmentation:
        """Which pixels are unusual: those of the map above the threshold, ½ if there was no calibration.

        Args:
            image: anything that `read_picture` takes.
            labels: what usual and unusual pixels are called; None for the method's own names.

        Returns:
            A segmentation whose scores are the map, bent so that the threshold is ½, and one minus it.

        Raises:
            ConfigError: for other than two different labels.
        """
        names = self._names if labels is None else tuple(labels)
        if isinstance(labels, str) or len(names) != 2 or len(set(names)) != 2:
            raise ConfigError(f"labels are two names, for what is usual and what is not, not {labels!r}")
        [found] = self.score([image]).maps
        limit = float(vars(self).get("threshold_", 0.5))
        below, above = found / (2 * max(limit, 1e-12)), 1 - (1 - found) / (2 * max(1 - limit, 1e-12))
        bent = torch.where(found <= limit, below, above).clamp(0, 1)
        size = (found.shape[0], found.shape[1])
        return Segmentation.of(names, torch.stack([1 - bent, bent]), size, size, background=0)

    # --- what a method defines ---

    @property
    def _names(self) -> tuple[str, str]:
        """What usual and unusual pixels are called."""
        return "normal", "anomalous"

    def _ready(self) -> Any:
        raise NotImplementedError

    def _judge(self, pixels: Tensor, ready: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    # --- pictures ---

    @property
    def side(self) -> int:
        """Pixels of the square to which a picture is squashed to be seen as a whole."""
        return self._window if self.size == "full" else min(self._squared, self._window)

    @property
    def _squared(self) -> int:
        short = (
            self.enlarged * self.clip.preprocessing.image_size if self.size in (None, "full") else self.size
        )
        if not isinstance(short, int) or short < 1:
            raise ConfigError(f"size must be a number of pixels, 'full' or None, not {self.size!r}")
        return max(self.patch, short // self.patch * self.patch)

    @property
    def _window(self) -> int:
        # Looking through windows of the tower's own size would halve the scale at which all was learned.
        return (
            self._squared if self.window is None else max(self.patch, self.window // self.patch * self.patch)
        )

    def _scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """A square, or for `"full"` the picture's own size; whole patches, for padding would look unusual."""
        if self.size != "full":
            return self._squared, self._squared
        height, width = (max(self.patch, round(length / self.patch) * self.patch) for length in size)
        return height, width

    def _scored(
        self, pictures: Sequence[_Picture | Unreadable], ready: Any, stride: int
    ) -> Iterator[Scores | Unreadable]:
        squares = [square(one.array, self.side) for one in pictures if isinstance(one, _Picture)]
        seen = self._in_batches(squares, ready)
        for one in pictures:
            if isinstance(one, Unreadable):
                yield one
                continue
            image, coarse = next(seen)
            scaled = (one.array.shape[0], one.array.shape[1])
            if scaled != (self.side, self.side):
                coarse = self._in_windows(one.array, ready, stride)
            yield Scores(image[None], [self._map(coarse, scaled, one.size)])

    def _in_batches(self, arrays: Sequence[np.ndarray], ready: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The score () and the map (h, w) of each of some pictures (H, W, 3) of one size."""
        for start in range(0, len(arrays), AT_ONCE):
            pixels = stacked(arrays[start : start + AT_ONCE]).to(self.clip.device)
            with undisturbed(self.clip), torch.no_grad(), computing(self._precision, pixels.device):
                image, maps = self._judge(pixels, ready)
            yield from zip(image.float().cpu(), maps.float().cpu(), strict=True)

    def _in_windows(self, array: np.ndarray, ready: Any, stride: int) -> Tensor:
        """The map (h, w) of a picture (H, W, 3) from windows that fade into each other."""
        (height, width), window, patch = array.shape[:2], self._window, self.patch
        canvas = Canvas(1, height // patch, width // patch, self.blend)
        corners = [
            (top, left)
            for top in window_starts(height, window, stride)
            for left in window_starts(width, window, stride)
        ]
        cut = [array[top : top + window, left : left + window] for top, left in corners]
        for (top, left), (_, found) in zip(corners, self._in_batches(cut, ready), strict=True):
            canvas.add(top // patch, left // patch, found[None])
        return canvas.blended()[0]

    def _map(self, coarse: Tensor, scaled: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """A map of cells (h, w), smoothed, at the picture's own size (H, W)."""
        cells = (coarse.shape[0], coarse.shape[1])
        fine = smoothed(stretch(coarse[None], cells, scaled)[0], self.smoothing * self.side)
        return (fine if scaled == size else stretch(fine[None], scaled, size)[0]).clamp(0, 1)

    # --- disk ---

    def _facts(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in THRESHOLDS if name in vars(self)}

    def _restore_facts(self, about: Mapping[str, Any]) -> None:
        for name in THRESHOLDS:
            if name in about:
                setattr(self, name, float(about[name]))


@dataclass(frozen=True, eq=False)
class _Picture:
    """A picture (H', W', 3) at the size it is looked at, and its own height and width."""

    array: np.ndarray
    size: tuple[int, int]


def several(images: Iterable[Any]) -> Iterable[Any]:
    """The pictures, if they are not one.

    Raises:
        ConfigError: for a single one.
    """
    if isinstance(images, (str, bytes, PathLike, Image.Image)):
        raise ConfigError(f"pictures are a list or an iterator of them, not one {type(images).__name__}")
    return images


def square(array: np.ndarray, side: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 squashed to (side, side, 3)."""
    if array.shape[:2] == (side, side):
        return array
    return np.asarray(Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC))


def stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) uint8 of one size to (B, 3, H, W)."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
