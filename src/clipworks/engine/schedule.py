"""What changes with the step: the learning rate and the side of the pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.engine.recipe import Recipe


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step `step` (from 0) of `steps`, as a multiple of the highest one.

    The warm-up rises linearly and reaches 1 in its last step; the decay starts after it and would reach
    `final_lr` in step `steps`, one after the last.
    """
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - recipe.warmup) / max(1, steps - recipe.warmup))
    left = (1 + math.cos(math.pi * progress)) / 2 if recipe.schedule == "cosine" else 1 - progress
    return recipe.final_lr + (1 - recipe.final_lr) * left


def image_size(step: int, steps: int, recipe: Recipe) -> int | None:
    """The side of the pictures in step `step` (from 0) of `steps`; None leaves them as they are."""
    end = 0.0
    for share, size in recipe.image_sizes:
        end += share
        if step < round(end * steps):
            return size
    return recipe.image_sizes[-1][1] if recipe.image_sizes else None


def resize(pixels: Tensor, size: int | None) -> Tensor:
    """Pixels (B, 3, H, W), floats in [0, 1] or bytes, to (B, 3, size, size); bilinear with antialiasing."""
    if size is None or pixels.shape[-2:] == (size, size):
        return pixels
    if pixels.dtype == torch.uint8 and pixels.device.type != "cpu":  # bytes are resized on the CPU only
        pixels = pixels.float() / 255
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
