"""Random crops and flips of a whole batch at once, as a pure function of (key, view number).

A crop resized to a square, mirrored or not, is linear and separable: one matrix for the rows and one for
the columns of each picture. Two batched matrix products therefore do the cropping, the antialiased
resizing, the flip and the division by 255 together, on any device and with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clipworks.data.batch import Batch
from clipworks.data.randomness import key_numbers, mix, uniform
from clipworks.errors import ConfigError, ShapeError

_SALT = 0xA06
_AT_ONCE = 1 << 18  # numbers; on a CPU the intermediate results then stay in its cache, twice as fast


@dataclass(frozen=True)
class RandomView:
    """A random crop of each picture, resized to a square, mirrored half of the time.

    Attributes:
        size: n, the side of what comes out.
        crop: least and largest part of the area that is kept.
        ratio: least and largest width of the crop in heights, before it is cut to the picture.
        flip: mirror half of the views left to right.
        seed: another seed, other views.

    Raises:
        ConfigError: if a range is empty or outside of what makes sense.
    """

    size: int
    crop: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"a view needs a positive size, not {self.size}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ConfigError(f"crop is a range of areas within (0, 1], not {self.crop}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"ratio is a range of positive proportions, not {self.ratio}")

    def boxes(
        self, keys: Sequence[str], view: int | Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Where each view lies.

        Args:
            keys: B names.
            view: the view number, one for all or (B,) int64.
            height: rows of the pictures.
            width: columns of the pictures.

        Returns:
            Boxes (B, 4) float32, left, top, right, bottom in pixels, and flips (B,) bool.
        """
        numbers = key_numbers(keys)
        views = np.broadcast_to(np.asarray(view, dtype=np.int64).astype(np.uint64), numbers.shape)
        numbers = mix(numbers ^ mix(views, _SALT, self.seed), _SALT)
        area, shape, across, down, mirror = (uniform(mix(numbers, salt)) for salt in range(5))
        area = (self.crop[0] + (self.crop[1] - self.crop[0]) * area) * height * width
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        proportion = np.exp(low + (high - low) * shape)
        # A crop that would stick out keeps its area and becomes less oblong.
        wide = np.clip(np.sqrt(area * proportion), area / height, width)
        high_ = np.minimum(area / wide, height)
        left, top = across * (width - wide), down * (height - high_)
        boxes = np.stack([left, top, left + wide, top + high_], axis=1).astype(np.float32)
        return torch.from_numpy(boxes), torch.from_numpy((mirror < 0.5) & self.flip)

    def __call__(self, images: Tensor, keys: Sequence[str], view: int | Tensor = 0) -> Tensor:
        """Make one view of each picture.

        Args:
            images: (B, C, H, W), uint8, or float in [0, 1].
            keys: B names.
            view: the view number, one for all or (B,) int64.

        Returns:
            (B, C, size, size) float32 in [0, 1].

        Raises:
            ShapeError: if there is not one key a picture, or the pictures are no batch.
        """
        if images.ndim != 4 or len(images) != len(keys):
            raise ShapeError(
                f"views need images (B, C, H, W) and B keys, not {tuple(images.shape)} and {len(keys)} keys"
            )
        boxes, flips = self.boxes(keys, view.cpu() if isinstance(view, Tensor) else view, *images.shape[2:])
        return resample(images, boxes, flips, self.size)

    def of(self, batch: Batch) -> Batch:
        """The batch with its pictures replaced by views, numbered by its feature `view` (0 without it)."""
        if batch.images is None:
            return batch
        return replace(batch, images=self(batch.images, batch.keys, batch.features.get("view", 0)))


def resample(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Cut a box out of each picture and resize it, antialiased and bilinear, to a square.

    Args:
        images: (B, C, H, W), uint8, or float in [0, 1].
        boxes: (B, 4) float, left, top, right, bottom in pixels, within the picture.
        flips: (B,) bool, mirror left to right.
        size: n.

    Returns:
        (B, C, n, n) float32 in [0, 1].
    """
    boxes, flips = boxes.to(images.device, torch.float32), flips.to(images.device)
    if images.device.type != "cpu":
        return _resample(images, boxes, flips, size)
    views = torch.empty(*images.shape[:2], size, size)
    step = max(1, _AT_ONCE // max(1, images[0].numel())) if len(images) else 1
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        views[part] = _resample(images[part], boxes[part], flips[part], size)
    return views


def _resample(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    count, channels, height, width = images.shape
    columns = _weights(boxes[:, 0], boxes[:, 2], size, width)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    rows = _weights(boxes[:, 1], boxes[:, 3], size, height)
    if not images.is_floating_point():
        columns = columns / 255
    pixels = images.to(torch.float32).reshape(count, channels * height, width)
    pixels = torch.bmm(pixels, columns.transpose(1, 2)).reshape(count * channels, height, size)
    rows = rows.repeat_interleave(channels, dim=0)  # faster than a broadcast product
    return torch.bmm(rows, pixels).reshape(count, channels, size, size).clamp(0, 1)


def _weights(start: Tensor, stop: Tensor, size: int, length: int) -> Tensor:
    """What each of `size` outputs takes from each of `length` inputs, (B, size, length), rows sum to 1.

    A triangle as wide as the step between outputs, at least one input wide, as Pillow's bilinear resize
    of a box has it; inputs outside of the box are not looked at.
    """
    scale = ((stop - start) / size)[:, None, None]
    reach = scale.clamp(min=1)
    centers = start[:, None, None] + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    inputs = torch.arange(length, device=start.device)[None, None, :] + 0.5
    weights = (1 - (inputs - centers).abs() / reach).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)
