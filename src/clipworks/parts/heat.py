"""Maps of how unusual pixels are: smoothed, and laid over their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.pictures import read_picture
from clipworks.errors import ConfigError, ShapeError

# Colors of the values 0, ¼, ½, ¾ and 1: the same value has the same color in every picture, always.
COLORS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)


def smoothed(values: Tensor, sigma: float) -> Tensor:
    """A map (H, W) after a Gaussian of σ pixels, cut at 4σ; behind a border it is mirrored with its edge."""
    radius = int(4 * sigma + 0.5)
    if not radius:
        return values
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(values)
    for _ in range(2):  # down the columns, then, turned, along the rows
        length = len(values)
        places = torch.arange(-radius, length + radius) % (2 * length)
        padded = values[torch.minimum(places, 2 * length - 1 - places)]
        values = F.conv2d(padded[None, None], kernel[None, None, :, None])[0, 0].T
    return values.contiguous()


def heat(values: Tensor) -> np.ndarray:
    """The colors (H, W, 3) uint8 of values (H, W) in [0, 1]; the range is fixed and never a picture's own."""
    flat = values.clamp(0, 1).numpy(force=True)
    places = np.linspace(0, 1, len(COLORS))
    channels = [np.interp(flat, places, COLORS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def overlay(
    image: Any, values: Tensor, opacity: float = 0.5, *, threshold: float | None = None
) -> Image.Image:
    """A picture with the colors of its map over it, and beside it a scale from 0 to 1.

    Args:
        image: anything that `read_picture` takes.
        values: (H, W) in [0, 1], H and W the picture's.
        opacity: of the colors, from 0 to 1.
        threshold: marked on the scale, and outlined in the picture in white.

    Raises:
        ShapeError: for a picture of another size.
        ConfigError: for an opacity outside 0 … 1.
    """
    if not 0 <= opacity <= 1:
        raise ConfigError(f"opacity must be from 0 to 1, not {opacity}")
    below = read_picture(image).convert("RGB")
    if (below.height, below.width) != tuple(values.shape):
        raise ShapeError(f"the picture is {below.height}x{below.width}, its map {tuple(values.shape)}")
    shown = np.asarray(Image.blend(below, Image.fromarray(heat(values)), opacity)).copy()
    if threshold is not None:
        inside = F.pad((values > threshold).float()[None, None], (1, 1, 1, 1), mode="replicate")
        border = (-F.max_pool2d(-inside, 3, stride=1) < 1)[0, 0] & (values > threshold)
        shown[border.numpy(force=True)] = 255
    return _with_scale(Image.fromarray(shown), threshold)


def _with_scale(shown: Image.Image, threshold: float | None) -> Image.Image:
    width, height = max(8, shown.width // 24), shown.height
    values = torch.linspace(1, 0, height)[:, None].expand(height, width)
    wide = Image.new("RGB", (shown.width + 2 * width, height), "white")
    wide.paste(shown)
    wide.paste(Image.fromarray(heat(values)), (shown.width + width // 2, 0))
    if threshold is not None:
        y = round((1 - threshold) * (height - 1))
        ImageDraw.Draw(wide).line((shown.width, y, wide.width, y), fill="black", width=max(1, height // 200))
    return wide
