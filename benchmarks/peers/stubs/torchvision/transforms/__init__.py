"""The transforms that open_clip names: those of evaluation work, those of training raise."""

from torch import nn

from . import functional
from .functional import InterpolationMode


class Compose:
    """One transform after the other."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, picture):
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class Resize(nn.Module):
    """The shorter side to `size`, or both sides to (height, width)."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, picture):
        return functional.resize(picture, self.size, self.interpolation)


class CenterCrop(nn.Module):
    """The middle (height, width) of a picture."""

    def __init__(self, size):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, picture):
        return functional.center_crop(picture, self.size)


class ToTensor:
    """A picture to (3, H, W) float in [0, 1]."""

    def __call__(self, picture):
        return functional.to_tensor(picture)


class Normalize(nn.Module):
    """`(x - mean) / std` for each channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, tensor):
        mean, std = (tensor.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (tensor - mean) / std


class _TrainingOnly(nn.Module):
    def __init__(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} needs the real torchvision")


class RandomResizedCrop(_TrainingOnly):
    """Not provided."""


class ColorJitter(_TrainingOnly):
    """Not provided."""


class Grayscale(_TrainingOnly):
    """Not provided."""
