"""A feature pyramid with its segmentation head: four maps of falling size to logits at the first one's size.

Kirillov et al., Panoptic Feature Pyramid Networks, CVPR 2019, as segmentation toolkits build "Semantic FPN":
1x1 convolutions to one width, sums from the smallest map down, a 3x3 convolution on each; then each map is
brought to the first one's size by steps of (3x3 convolution, BatchNorm, ReLU, twice the size), and the sum is
classified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.errors import ShapeError


class Pyramid(nn.Module):
    """Four maps (B, C_i, h_i, w_i), each about half the size of the one before, to four of one width.

    Args:
        channels: C_1 to C_4.
        width: of what comes out.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        _start(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, width, h_i, w_i), largest first.

        Raises:
            ShapeError: if their number is another one.
        """
        if len(maps) != len(self.laterals):
            raise ShapeError(f"a pyramid of {len(self.laterals)} levels cannot take {len(maps)} maps")
        sums = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(sums) - 2, -1, -1):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], size=sums[i].shape[2:], mode="nearest")
        return [output(x) for output, x in zip(self.outputs, sums, strict=True)]


class PyramidHead(nn.Module):
    """Maps of a pyramid to logits (B, K, h_1, w_1).

    Args:
        width: of the maps.
        classes: K.
        levels: how many maps.
        dropout: of whole channels before the classifier.
    """

    def __init__(self, width: int, classes: int, levels: int = 4, dropout: float = 0.1):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
                )
                for _ in range(max(1, level))
            )
            for level in range(levels)
        )
        _start(self)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits at the first map's size."""
        size = maps[0].shape[2:]
        total = torch.zeros((), device=maps[0].device, dtype=maps[0].dtype)
        for level, (branch, x) in enumerate(zip(self.branches, maps, strict=True)):
            for step in branch:  # type: ignore[attr-defined]
                x = step(x)
                if level:
                    x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
            if x.shape[2:] != size:  # odd sides
                x = F.interpolate(x, size=size, mode="bilinear")
            total = total + x
        return self.classify(self.dropout(total))


def _start(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
