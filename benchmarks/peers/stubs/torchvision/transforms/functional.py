"""The functions behind the transforms, on Pillow's pictures."""

from enum import Enum

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    """How pixels between pixels are found."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


_PILLOW = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}


def get_dimensions(picture):
    """Channels, height and width."""
    return [len(picture.getbands()), picture.height, picture.width]


def resize(picture, size, interpolation=InterpolationMode.BILINEAR):
    """The shorter side to an integer, the longer one truncated; or both sides to (height, width)."""
    if isinstance(size, int):
        short, long = sorted(picture.size)
        other = int(size * long / short)
        size = (other, size) if picture.width <= picture.height else (size, other)
    height, width = size
    if (width, height) == picture.size:
        return picture
    return picture.resize((width, height), _PILLOW[interpolation])


def crop(picture, top, left, height, width):
    """A rectangle; what lies outside of the picture is black."""
    return picture.crop((left, top, left + width, top + height))


def center_crop(picture, size):
    """The middle of a picture."""
    height, width = size
    top, left = round((picture.height - height) / 2.0), round((picture.width - width) / 2.0)
    return crop(picture, top, left, height, width)


def pad(picture, padding, fill=0):
    """A border of (left, top, right, bottom) pixels."""
    left, top, right, bottom = padding
    canvas = Image.new(picture.mode, (picture.width + left + right, picture.height + top + bottom), fill)
    canvas.paste(picture, (left, top))
    return canvas


def to_tensor(picture):
    """Bytes (H, W, 3) to (3, H, W) float in [0, 1]."""
    array = np.array(picture)
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)
