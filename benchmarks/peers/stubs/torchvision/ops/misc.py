"""The one layer that open_clip names; it is used only when a ResNet's tower is locked."""

from torch import nn


class FrozenBatchNorm2d(nn.Module):
    """Not provided."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("locking a ResNet needs the real torchvision")
