"""The paper's initial weights, drawn from one generator.

Radford et al., ICML 2021, and the published `model.py`: token embedding 0.02, text positions 0.01,
attention w^-0.5, residual projections w^-0.5 (2 layers)^-0.5, MLP entrance (2 w)^-0.5, text projection
w^-0.5, the vision tower's class token, positions and projection w^-0.5; the last norm of a ResNet's
residual branch starts at zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from clipworks.core.attention import Block
from clipworks.core.resnet import Bottleneck, ModifiedResNet
from clipworks.core.stem import ConvolutionalStem, ResidualPair
from clipworks.core.towers import TextTower, VisionTower

if TYPE_CHECKING:
    from clipworks.core.clip import Clip


class Uninitialized(TorchFunctionMode):
    """A context in which layers are made without torch's own random weights.

    Those would be drawn from the global generator, and be overwritten at once. Gains of one and biases and
    statistics of zero are still set.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave a weight (...) as it is where torch.nn.init would fill it; all else passes."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def initialize(clip: Clip, generator: Generator) -> None:
    """Draw all weights of a Clip afresh, in place; the same generator state gives the same weights."""
    for module in clip.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            module.reset_parameters()
    for tower in (clip.image, clip.text):
        if isinstance(tower, (VisionTower, TextTower)):
            _transformer(tower, generator)
        elif isinstance(tower, ModifiedResNet):
            _resnet(tower, generator)


def _normal(weight: Tensor, std: float, generator: Generator) -> None:
    nn.init.normal_(weight, std=std, generator=generator)


def _transformer(tower: VisionTower | TextTower, generator: Generator) -> None:
    width, depth = tower.width, max(1, len(tower.blocks))
    for block in tower.modules():
        if not isinstance(block, Block):
            continue
        _linear(block.attention.qkv, width**-0.5, generator)
        _linear(block.attention.out, width**-0.5 * (2 * depth) ** -0.5, generator)
        _linear(block.mlp.fc, (2 * width) ** -0.5, generator)
        _linear(block.mlp.proj, width**-0.5 * (2 * depth) ** -0.5, generator)
    if isinstance(tower, TextTower):
        _normal(tower.embedding.weight, 0.02, generator)
        _normal(tower.positions, 0.01, generator)
    else:
        _vision(tower, generator)
    if isinstance(tower.projection, nn.Linear):
        _linear(tower.projection, width**-0.5, generator)


def _vision(tower: VisionTower, generator: Generator) -> None:
    width = tower.width
    if tower.config.class_token:
        _normal(tower.class_token, width**-0.5, generator)
    _normal(tower.positions, width**-0.5, generator)
    if isinstance(tower.patches, ConvolutionalStem):
        _convolutions(tower.patches, generator)
        for module in tower.patches.modules():
            if isinstance(module, ResidualPair):
                nn.init.zeros_(module.bn_2.weight)
    else:
        _convolutions(tower.patches, generator)
    if tower.pool is not None:
        _normal(tower.pool.probe, width**-0.5, generator)
        for linear, std in (
            (tower.pool.attention.qkv, width**-0.5),
            (tower.pool.attention.out, width**-0.5),
            (tower.pool.mlp.fc, (2 * width) ** -0.5),
            (tower.pool.mlp.proj, width**-0.5),
        ):
            _linear(linear, std, generator)


def _resnet(tower: ModifiedResNet, generator: Generator) -> None:
    _convolutions(tower, generator)
    std = tower.width**-0.5
    _linear(tower.pool.qkv, std, generator)
    _linear(tower.pool.out, std, generator)
    _normal(tower.positions, std, generator)
    for module in tower.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn_3.weight)


def _linear(linear: nn.Linear, std: float, generator: Generator) -> None:
    _normal(linear.weight, std, generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _convolutions(module: nn.Module, generator: Generator) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_in = part.weight[0].numel()
            _normal(part.weight, (2 / fan_in) ** 0.5, generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
