"""Second encoders beside a CLIP: modules with a size and statistics of their own, ResNet-50 from a file."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints.files import read
from clipworks.core.images import fit
from clipworks.core.initialize import Uninitialized
from clipworks.errors import CheckpointError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """An auxiliary encoder with a size and statistics of its own.

    Args:
        module: normalized pixels (B, 3, size, size) to features (B, D_a).
        size: that pixels are resized to.
        mean, std: of the three colors.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        self.module, self.size = module, size
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to features (B, D_a)."""
        features: Tensor = self.module((fit(pixels, self.size) - self.mean) / self.std)
        return features


class ResNet50(nn.Module):
    """He et al., CVPR 2016, the stride in the 3x3 convolution; names of the weights are torchvision's.

    Normalized pixels (B, 3, H, W) to the pooled features (B, 2048).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, depth in enumerate((3, 4, 6, 3)):
            blocks = nn.Sequential()
            for place in range(depth):
                blocks.append(_Bottleneck(channels, 64 << stage, 2 if stage and not place else 1))
                channels = 256 << stage
            self.add_module(f"layer{stage + 1}", blocks)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.mean(dim=(2, 3))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width)
            )
            if channels != 4 * width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet50(path: str | PathLike[str], size: int = 224) -> Encoder:
    """A ResNet-50 from a file with torchvision's names, or from one of MoCo v3's pre-training.

    Of the latter the base encoder is taken, without its projection head.

    Raises:
        CheckpointError: for a weight that is missing, left over or of another shape.
    """
    weights, prefix = read(Path(path)).weights, "module.base_encoder."
    if any(name.startswith(prefix) for name in weights):
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    with Uninitialized():
        tower = ResNet50()
    try:
        tower.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{path}: not a ResNet-50: {reason}") from error
    return Encoder(tower.float().requires_grad_(False).eval(), size)
