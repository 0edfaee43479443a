"""CLIP's ModifiedResNet as an open tower: its tokens are maps, its blocks the four stages.

Radford et al., ICML 2021, section 2.4: a stem of three convolutions, an average pool before every
convolution with a stride, and a query-key-value pool in place of the global average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipworks.core.attention import Attention, Mask
from clipworks.core.config import ResNetConfig
from clipworks.core.towers import At, Tower, check_pixels, resize_positions
from clipworks.errors import ConfigError

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual; a stride is an average pool after the second one."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        out = width * EXPANSION
        self.conv_1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_2 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv_3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn_3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: Shortcut | None = None
        if stride > 1 or channels != out:
            self.shortcut = Shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) to (B, 4 width, h / stride, w / stride)."""
        y = self.relu(self.bn_1(self.conv_1(x)))
        y = self.pool(self.relu(self.bn_2(self.conv_2(y))))
        y = self.bn_3(self.conv_3(y))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Shortcut(nn.Module):
    """The residual path where the shape changes: average pool, 1x1 convolution, norm."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv = nn.Conv2d(channels, out, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) to (B, out, h / stride, w / stride)."""
        return self.bn(self.conv(self.pool(x)))


class Stage(nn.Sequential):
    """A run of bottlenecks, called as a block is."""

    def forward(self, tokens: Tensor, mask: Mask = None, **halves: object) -> Tensor:  # type: ignore[override]
        """Maps (B, c, h, w) to maps (B, c', h', w').

        Raises:
            ConfigError: if a mask or a half is handed in; a stage of convolutions has none.
        """
        if mask is not None or any(half is not None for half in halves.values()):
            raise ConfigError(
                "a stage of a ResNet has no attention: it takes neither mask nor attend nor feed"
            )
        return super().forward(tokens)


class ModifiedResNet(Tower):
    """Pixels (B, 3, H, W) in [0, 1] to vectors (B, D); `run` walks through four stages of maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ResNetConfig, out_width: int):
        super().__init__()
        self.config = config
        self.out_width = out_width
        width = config.width
        self.set_statistics(config.mean, config.std)
        self.stem = nn.Sequential()
        for number, (channels, out) in enumerate(
            [(3, width // 2), (width // 2, width // 2), (width // 2, width)], 1
        ):
            stride = 2 if number == 1 else 1
            self.stem.add_module(f"conv_{number}", nn.Conv2d(channels, out, 3, stride, padding=1, bias=False))
            self.stem.add_module(f"bn_{number}", nn.BatchNorm2d(out))
            self.stem.add_module(f"relu_{number}", nn.ReLU())
        self.stem.add_module("pool", nn.AvgPool2d(2))
        channels = width
        stages = []
        for i, depth in enumerate(config.layers):
            stage = Stage()
            for j in range(depth):
                stage.append(Bottleneck(channels, width * 2**i, stride=2 if i and not j else 1))
                channels = width * 2**i * EXPANSION
            stages.append(stage)
        self.blocks = nn.ModuleList(stages)
        self.width = channels
        self.positions = nn.Parameter(torch.zeros(config.grid**2 + 1, channels))
        self.pool = Attention(channels, config.heads, channels // config.heads, out_width)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Check and scale pixels (B, 3, H, W): bytes to [0, 1] floats.

        Raises:
            ShapeError: if they are not (B, 3, H, W), or H or W is not a multiple of 32.
        """
        return check_pixels(pixels, 32)

    def read(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), floats in [0, 1] or bytes, to the stem's maps (B, width, H / 4, W / 4)."""
        pixels = (self.prepare(pixels) - self.mean) / self.std
        return self.stem(pixels.to(self.positions.dtype))

    def place(self, content: Tensor, extra: Tensor | None = None) -> Tensor:
        """Maps (B, c, h, w) pass as they are.

        Raises:
            ConfigError: for extra tokens; a map has no room for them.
        """
        if extra is not None:
            raise ConfigError("a ResNet's tokens are maps: extra tokens cannot be appended")
        return content

    def project(self, tokens: Tensor, at: At = None) -> Tensor:
        """Maps (B, C, h, w) of the last stage to vectors, not normalised.

        Args:
            at: None for the attention pool; an index (B,) int64 into the h w cells, row by row; or `"all"`.

        Returns:
            (B, D), or (B, D, h, w) for `"all"`. A single cell is read as if the pool had attended to it
            alone: its value through the output projection, as MaskCLIP does.
        """
        if at is None:
            return self._attend(tokens)
        cells = tokens.flatten(2).transpose(1, 2)
        if isinstance(at, Tensor):
            return self._values(cells[torch.arange(len(cells), device=cells.device), at])
        return self._values(cells).transpose(1, 2).unflatten(2, tokens.shape[2:])

    def _values(self, cells: Tensor) -> Tensor:
        return self.pool.out(self.pool.qkv(cells).chunk(3, dim=-1)[2])

    def _attend(self, maps: Tensor) -> Tensor:
        cells = maps.flatten(2).transpose(1, 2)
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)
        tokens = tokens + resize_positions(self.positions, maps.shape[2:], 1)
        return self.pool.first(tokens)[:, 0]

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] or bytes to vectors (B, D), not normalised."""
        return self.project(self.run(self.place(self.read(pixels))))
