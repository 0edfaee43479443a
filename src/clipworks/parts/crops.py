"""Random crops of a picture together with its mask, as a pure function of (seed, index, view number).

A picture is scaled so that its shorter side is a random multiple of `short`, and a square is cut out of it.
What the picture does not fill is black and has no class. Only the square is computed, never the scaled
picture. Pixels are antialiased and bilinear, as Pillow has it; a label is that of the nearest place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipworks.data.randomness import Draws
from clipworks.errors import ConfigError, ShapeError

_CROP, _COLOR = 0xC409, 0xC010
TRIES = 10  # at a crop that one class does not fill; the last one is taken as it is


@dataclass(frozen=True)
class MaskedCrop:
    """A square of `size` pixels out of a picture and its mask.

    Attributes:
        size: n, the side of what comes out.
        short: the shorter side that a scale of 1 gives the picture; None for `size`.
        scale: least and largest scale, uniform between them; both sides have the same one.
        flip: mirror half of the views left to right.
        largest_share: at most this share of the pixels with a class should have the same one, or None.
        ignore: the mask's number for pixels without a class.

    Raises:
        ConfigError: for a size, a range or a share that cannot be.
    """

    size: int
    short: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    largest_share: float | None = None
    ignore: int = 255

    def __post_init__(self) -> None:
        if self.size < 1 or (self.short is not None and self.short < 1):
            raise ConfigError(f"a crop needs positive sides, not size={self.size} and short={self.short}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale is a range of positive numbers, not {self.scale}")
        if self.largest_share is not None and not 0 < self.largest_share <= 1:
            raise ConfigError(f"largest_share is a share in (0, 1], not {self.largest_share}")

    def __call__(
        self, pixels: Tensor, mask: Tensor, *, seed: int, index: int, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One view of a picture.

        Args:
            pixels: (3, H, W) uint8.
            mask: (H, W) of whole numbers.
            seed, index, view: of the randomness: which picture, and which of its views.

        Returns:
            (3, n, n) uint8, and (n, n) of the mask's type.

        Raises:
            ShapeError: if the mask has another size, or the pixels are no bytes.
        """
        if pixels.ndim != 3 or len(pixels) != 3 or pixels.dtype != torch.uint8:
            raise ShapeError(
                f"a crop is cut out of bytes (3, H, W), not {pixels.dtype} {tuple(pixels.shape)}"
            )
        if mask.shape != pixels.shape[1:]:
            raise ShapeError(f"a mask {tuple(mask.shape)} for a picture of {tuple(pixels.shape[1:])}")
        draws = Draws(seed, index, view, _CROP)
        height, width = mask.shape
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * draws.random()
        factor = scale * (self.short or self.size) / min(height, width)
        rows, columns = (min(self.size, max(1, round(side * factor))) for side in (height, width))
        mirrored = self.flip and draws.random() < 0.5
        for _ in range(TRIES):
            top, left = (
                draws.random() * max(0.0, side - count / factor)
                for side, count in ((height, rows), (width, columns))
            )
            labels = mask[_nearest(top, factor, rows, height)][:, _nearest(left, factor, columns, width)]
            if self.largest_share is None or self._is_mixed(labels):
                break
        box = (left, top, min(width, left + columns / factor), min(height, top + rows / factor))
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        cut = np.array(picture.resize((columns, rows), Image.Resampling.BILINEAR, box=box))
        found = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        found[:, :rows, :columns] = torch.from_numpy(cut).permute(2, 0, 1)
        kept = torch.full((self.size, self.size), self.ignore, dtype=mask.dtype)
        kept[:rows, :columns] = labels
        return (found.flip(2), kept.flip(1)) if mirrored else (found, kept)

    def _is_mixed(self, labels: Tensor) -> bool:
        counts = torch.unique(labels[labels != self.ignore], return_counts=True)[1]
        return len(counts) > 1 and int(counts.max()) <= (self.largest_share or 1) * int(counts.sum())


def _nearest(start: float, factor: float, count: int, length: int) -> Tensor:
    """Which of `length` pixels lies under the center of each of `count` cells from `start` on, (count,)."""
    places = start + (torch.arange(count, dtype=torch.float64) + 0.5) / factor
    return places.long().clamp(max=length - 1)


def recolored(pixels: Tensor, *, seed: int, index: int, view: int = 0) -> Tensor:
    """Other light and colors: brightness, contrast, saturation and hue, each changed half of the time.

    Liu et al., SSD, ECCV 2016, as segmentation toolkits have it: brightness by up to 32 of 255, contrast and
    saturation by a factor of 0.5 to 1.5, hue by up to a tenth of the circle.

    Args:
        pixels: (3, H, W) uint8.
        seed, index, view: of the randomness.

    Returns:
        (3, H, W) uint8.
    """
    draws = Draws(seed, index, view, _COLOR)

    def amount(reach: float) -> float:
        """From -reach to reach, and 0 half of the time; draws two numbers in any case."""
        happens, size = draws.random() < 0.5, draws.random()
        return reach * (2 * size - 1) * happens

    brightness, contrast, saturation, hue = amount(32), 1 + amount(0.5), 1 + amount(0.5), amount(0.1)
    first = draws.random() < 0.5  # contrast before or behind the colors
    values = pixels.float() + brightness
    if first:
        values = values * contrast
    colors = values.clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    hsv = np.array(Image.fromarray(colors).convert("HSV"))
    hsv[..., 0] += np.uint8(round(256 * hue) % 256)  # wraps around, as the circle does
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255).astype(np.uint8)
    values = torch.from_numpy(np.array(Image.fromarray(hsv, "HSV").convert("RGB"))).permute(2, 0, 1).float()
    return (values if first else values * contrast).clamp(0, 255).byte()
