"""Towers with gates on channels, heads and MLP units, and the smaller Clip that is left when some close.

A gate is a factor in [0, 1]. Gates of residual channels act on what enters the residual stream (embedding
and positions, attention, MLP), those of heads on their mixtures, those of MLP units behind the activation.
All are factors of weights, so a gated tower is a variant: gradients reach its weights and its gates. Every
layer norm takes its statistics over the channels that are not closed, and gives 0 on the others. Queries,
keys, values, the entrance of the MLP and the projection are not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipworks.checkpoints import own
from clipworks.core.clip import Clip
from clipworks.core.config import BlockConfig
from clipworks.core.towers import TextTower, VisionTower
from clipworks.core.variant import variant
from clipworks.errors import ConfigError

TOWERS = ("image", "text")


@dataclass(frozen=True)
class Gates:
    """Gates of one tower: residual channels (w,), each block's heads (h,) and MLP units (m,)."""

    hidden: Tensor
    heads: tuple[Tensor, ...]
    units: tuple[Tensor, ...]


def check_gateable(clip: Clip) -> None:
    """Both towers must be transformers of this package that read tokens through a norm and a projection.

    Raises:
        ConfigError: naming the tower that is not.
    """
    for label in TOWERS:
        tower = getattr(clip, label)
        if not isinstance(tower, (VisionTower, TextTower)):
            raise ConfigError(f"the {label} tower is no transformer, so its heads and channels have no gates")
        if isinstance(tower.projection, nn.Identity) or getattr(tower, "pool", None) is not None:
            raise ConfigError(
                f"the {label} tower has an attention pool or no projection: its channels are those of the "
                "embedding and cannot be closed"
            )


def gated(clip: Clip, gates: Mapping[str, Gates]) -> Clip:
    """The Clip with gates on its towers `image` and `text`, (w,), (h,), (m,): a variant.

    Raises:
        ConfigError: for a tower that cannot have them.
    """
    check_gateable(clip)
    makers = {
        label: lambda tower, one=one: _gated_tower(cast(VisionTower, tower), one)
        for label, one in gates.items()
    }
    return variant(clip, modules=makers)


def _gated_tower(tower: VisionTower | TextTower, gates: Gates) -> VisionTower | TextTower:
    z = gates.hidden
    weights = {"positions": tower.positions * z}
    if isinstance(tower, TextTower):
        weights["embedding.weight"] = tower.embedding.weight * z
    else:
        entrance = "patches.out" if tower.config.stem else "patches"
        layer = cast(nn.Conv2d, tower.get_submodule(entrance))
        weights[f"{entrance}.weight"] = layer.weight * z[:, None, None, None]
        if layer.bias is not None:
            weights[f"{entrance}.bias"] = layer.bias * z
        if tower.config.class_token:
            weights["class_token"] = tower.class_token * z
    for i, block in enumerate(tower.config.blocks):
        inner = {
            "attention.out": gates.heads[i].repeat_interleave(block.head_width),
            "mlp.proj": gates.units[i],
        }
        for name, factor in inner.items():
            linear = cast(nn.Linear, tower.get_submodule(f"blocks.{i}.{name}"))
            weights[f"blocks.{i}.{name}.weight"] = z[:, None] * linear.weight * factor
            weights[f"blocks.{i}.{name}.bias"] = z * linear.bias
    kept = (z != 0).to(z.dtype)
    norms = [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.LayerNorm) and name.rsplit(".", 1)[-1].startswith("ln_")
    ]
    return variant(tower, weights, {name: lambda norm: GatedNorm(norm, kept) for name in norms})


class GatedNorm(nn.Module):
    """Layer norm over the channels that are kept, (..., w) to (..., w); the others become 0.

    Args:
        norm: the `LayerNorm` whose gain and bias it has.
        kept: (w,), 0 or 1.
    """

    def __init__(self, norm: nn.Module, kept: Tensor):
        super().__init__()
        layer = cast(nn.LayerNorm, norm)
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., w) to (..., w), computed in at least fp32."""
        x, kept = (x if x.dtype == torch.float64 else x.float()), cast(Tensor, self.kept)
        n = kept.sum().clamp(min=1)
        centered = kept * (x - (kept * x).sum(-1, keepdim=True) / n)
        variance = centered.square().sum(-1, keepdim=True) / n
        return kept * (centered * torch.rsqrt(variance + self.eps) * self.weight + self.bias)


@torch.no_grad()
def cut(clip: Clip, gates: Mapping[str, Gates]) -> Clip:
    """The smaller plain Clip that computes what the Clip under these gates, (w,), (h,), (m,), computes.

    What is closed is gone; other gates are multiplied into the weights. A block whose heads are all closed
    keeps what its attention still adds, a bias.
    """
    weights: dict[str, Tensor] = dict(gated(clip, gates).state_dict())
    towers: dict[str, Any] = {}
    for label, one in gates.items():
        config = getattr(clip.config, label)
        widths = [block.head_width for block in config.blocks]
        places = Gates(
            _open(one.hidden),
            tuple(_open(heads.repeat_interleave(d)) for heads, d in zip(one.heads, widths, strict=True)),
            tuple(_open(units) for units in one.units),
        )
        blocks = tuple(
            BlockConfig(len(heads) // d, d, len(units))
            for heads, units, d in zip(places.heads, places.units, widths, strict=True)
        )
        towers[label] = replace(config, width=len(places.hidden), blocks=blocks)
        for name in [name for name in weights if name.startswith(f"{label}.")]:
            for axis, kept in _axes(name.removeprefix(f"{label}."), places, weights[name]):
                weights[name] = weights[name].index_select(axis, kept)
    config = replace(clip.config, **towers)
    return own.build(config, weights, "cut", clip.tokenizer, clip.preprocessing).to(clip.device)


def _open(gates: Tensor) -> Tensor:
    return gates.nonzero()[:, 0]


def _axes(name: str, places: Gates, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Which axes of a tower's weight, named within the tower, are cut, and what is kept along them."""
    hidden = places.hidden
    match = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        if name in ("positions", "embedding.weight", "projection.weight"):
            yield 1, hidden
        elif name.startswith(("class_token", "ln_", "patches.weight", "patches.bias", "patches.out.")):
            yield 0, hidden
        return
    block, layer, kind = int(match[1]), match[2], match[3]
    heads, units = places.heads[block], places.units[block]
    packed = torch.cat([heads + len(tensor) // 3 * part for part in range(3)])
    axes = {
        "ln_1": (hidden,),
        "ln_2": (hidden,),
        "attention.qkv": (packed, hidden),
        "attention.out": (hidden, heads),
        "mlp.fc": (units, hidden),
        "mlp.proj": (hidden, units),
    }.get(layer, ())  # norms of queries and keys are as wide as a head
    yield from enumerate(axes[:1] if kind == "bias" else axes)
