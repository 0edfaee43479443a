"""Large pictures in windows, whose maps are blended on one coarse canvas.

A map's cell is `cell` pixels wide, and windows begin at multiples of it, so the cells of all windows fall
together: what overlaps is averaged cell by cell, and only the blended canvas is stretched to the picture's
size, some rows at a time. Memory is that of the canvas, whatever the picture's size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from clipworks.errors import ConfigError

Blend = Literal["smooth", "uniform"]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last one moved inside; [0] if one covers all."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def aligned_stride(window: int, overlap: float, cell: int) -> int:
    """The step between windows for a share of overlap, a multiple of `cell` and at least that.

    Raises:
        ConfigError: for a share outside 0 … 1, 1 excluded, or a window that is no multiple of `cell`.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap must be a share from 0 to below 1, not {overlap}")
    if window < cell or window % cell:
        raise ConfigError(f"a window must be a multiple of {cell} pixels, not {window}")
    return max(cell, math.floor(window * (1 - overlap) / cell + 1e-9) * cell)


def taper(cells: int, blend: Blend) -> Tensor:
    """The weight of each of n cells of a window along one side, (n,), above zero and at most 1.

    `smooth` is sin² from edge to edge (Hann), so that a window fades out where its neighbor fades in and
    nothing jumps at its border; at half overlap the weights of two neighbors sum to one. `uniform` is 1.

    Raises:
        ConfigError: for another name.
    """
    if blend == "uniform":
        return torch.ones(cells)
    if blend != "smooth":
        raise ConfigError(f"blend must be smooth or uniform, not {blend!r}")
    return torch.sin(math.pi * (torch.arange(cells) + 0.5) / cells).square()


class Canvas:
    """Maps of windows, blended: (K, h, w).

    Args:
        channels, height, width: of the canvas, in cells.
        blend: how windows are weighed, see `taper`.
    """

    def __init__(self, channels: int, height: int, width: int, blend: Blend = "smooth") -> None:
        self.sums = torch.zeros(channels, height, width)
        self.weights = torch.zeros(height, width)
        self.blend = blend

    def add(self, top: int, left: int, maps: Tensor) -> None:
        """Lay maps (K, h, w) of a window down, its first cell at (top, left)."""
        height, width = maps.shape[1:]
        weights = taper(height, self.blend)[:, None] * taper(width, self.blend)
        rows, columns = slice(top, top + height), slice(left, left + width)
        self.sums[:, rows, columns] += weights * maps.float().cpu()
        self.weights[rows, columns] += weights

    def blended(self) -> Tensor:
        """The weighted means (K, h, w)."""
        return self.sums / self.weights


def stretch(
    maps: Tensor, cells: tuple[float, float], size: tuple[int, int], rows: slice | None = None
) -> Tensor:
    """Maps (K, h, w) at the pixels of a picture, bilinearly between the centers of cells.

    Args:
        maps: values at cells.
        cells: how many cells the picture's height and width cover, which may be a fraction; what lies behind
            them belongs to padding.
        size: the picture's height H and width W.
        rows: only these rows of the picture.

    Returns:
        (K, R, W), R the number of rows. With whole cells it is torch's `interpolate`, bilinear, corners not
        aligned.
    """
    start, stop, _ = (rows or slice(None)).indices(size[0])
    above, below, down = _between(torch.arange(start, stop), cells[0] / size[0], maps.shape[1])
    left, right, across = _between(torch.arange(size[1]), cells[1] / size[1], maps.shape[2])
    lines = torch.lerp(maps[:, above], maps[:, below], down[:, None].to(maps.dtype))
    return torch.lerp(lines[:, :, left], lines[:, :, right], across.to(maps.dtype))


def _between(pixels: Tensor, cells: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel the cells before and behind it, and how far it is from the first to the second."""
    places = ((pixels.double() + 0.5) * cells - 0.5).clamp(0, count - 1)
    before = places.floor().long()
    return before, (before + 1).clamp(max=count - 1), places - before
