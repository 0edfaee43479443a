"""A convolutional stem in place of the single patch convolution.

Early convolutions let a small transformer learn from few pictures (Xiao et al., Early Convolutions Help
Transformers See Better, NeurIPS 2021). Each stage halves the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipworks.core.config import StemStage


class ConvolutionalStem(nn.Module):
    """Pixels (B, 3, H, W), normalised, to a map (B, width, H / 2^s, W / 2^s) for s stages."""

    def __init__(self, stages: Sequence[StemStage], width: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in stages:
            layers += [
                nn.Conv2d(channels, stage.width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(stage.width),
                nn.ReLU(),
                *(ResidualPair(stage.width) for _ in range(stage.depth)),
            ]
            channels = stage.width
        self.stages = nn.Sequential(*layers)
        self.out = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, width, H / 2^s, W / 2^s)."""
        # Channels last: what the patches are read as next, and faster on a CPU.
        return self.out(self.stages(x.contiguous(memory_format=torch.channels_last)))


class ResidualPair(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), both convolutions 3x3; (B, c, h, w) to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) to (B, c, h, w)."""
        return self.relu(x + self.bn_2(self.conv_2(self.relu(self.bn_1(self.conv_1(x))))))
