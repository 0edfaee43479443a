"""MaskCLIP: names for patches from a CLIP that is left as it is.

Zhou, Loy and Dai, Extract Free Dense Labels from CLIP, ECCV 2022 (not the later paper of that name). The
last block's attention mixes all patches for the sake of the class token; without it a patch keeps what it
has seen. In the last block (features F)

    u = out(V ln_1(x)),   u ← u + x,   u ← u + mlp(ln_2(u)),   F = proj(ln_post(u)),

which is the block with its attention matrix replaced by the identity; a ResNet's attention pool is its value
and output projection, at every place. Scores are P = softmax_c(τ⁻¹ F̂·t_c), 1/τ = 100, t_c the mean over the
sentences of class c.

The published code runs OpenAI's tower with exact GELU, other statistics of pixels and LayerNorm's ε 1e-6;
ours is the tower's own. It compares plain cosines, whose likeliest label is the same. Two refinements that
its configurations hold are settings here:

- prompt denoising: a class whose highest P in the window is below `denoise` is no candidate;
- key smoothing: where max_c P < `key_smoothing`, P ← K P with K the cosines of the last block's keys over
  places. The published code normalizes keys along the tokens' axis, and after the output projection, so
  that they are no cosines; here they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipworks.core.attention import Attention, Mask
from clipworks.core.clip import unit
from clipworks.core.hooks import Around, BlockCall
from clipworks.core.towers import VisionTower
from clipworks.errors import ConfigError
from clipworks.methods.dense.base import Asked, Segmenter
from clipworks.parts.dense import LastValues, all_vectors

SHARPNESS = 100.0


@dataclass(eq=False, repr=False)
class MaskCLIP(Segmenter):
    """Open-vocabulary segmentation without training.

    Args:
        residual: keep the last block's residual sum and MLP, as the paper does.
        denoise: classes whose highest probability is lower are left out; the paper's value is 0.5.
        key_smoothing: probabilities that are lower are smoothed over places with similar keys; the paper's
            value is 1.
    """

    residual: bool = True
    denoise: float | None = None
    key_smoothing: float | None = None

    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        listening = _Keys(len(self.tower.blocks) - 1) if self.key_smoothing is not None else None
        features = self.places(pixels, listening)
        likely = probabilities(features, asked.vectors)
        if self.denoise is not None:
            kept = likely.amax(dim=(2, 3), keepdim=True) >= self.denoise
            # Where no class is sure of any place, all of them stay.
            likely = likely * (kept | ~kept.any(dim=1, keepdim=True))
        if listening is not None:
            likely = smoothed(likely, listening.keys, float(self.key_smoothing or 0))
        return likely

    def places(self, pixels: Tensor, listening: _Keys | None = None) -> Tensor:
        """F: windows (B, 3, H, W) to features (B, D, h, w), not of unit length."""
        tower = self.tower
        if not isinstance(tower, VisionTower):
            if listening is not None or not self.residual:
                raise ConfigError("a ResNet has neither keys to smooth with nor a residual to leave out")
            return all_vectors(tower, pixels)[1]
        last = LastValues(len(tower.blocks) - 1, self.residual)
        hook: Around = last if listening is None else listening.before(last)
        return all_vectors(tower, pixels, around=hook)[1]


def probabilities(features: Tensor, vectors: Tensor) -> Tensor:
    """P: features (B, D, h, w) and unit vectors (K, D) to (B, K, h, w) fp32, summing to one."""
    cosines = torch.einsum("bdhw,kd->bkhw", unit(features.movedim(1, -1)).movedim(-1, 1), vectors.float())
    return (SHARPNESS * cosines).softmax(dim=1)


def smoothed(likely: Tensor, keys: Tensor, below: float) -> Tensor:
    """P ← K P where max P is below a bound, K the cosines of keys (B, h w, d), renormalized at each place."""
    directions = unit(keys)
    flat = likely.flatten(2).mT
    mixed = (directions @ (directions.mT @ flat)).clamp(min=0)
    mixed = mixed / mixed.sum(dim=2, keepdim=True).clamp(min=1e-12)
    unsure = flat.amax(dim=2, keepdim=True) < below
    return torch.where(unsure, mixed, flat).mT.unflatten(2, likely.shape[2:])


class _Keys:
    """Listens to the keys of a block's places."""

    keys: Tensor

    def __init__(self, i: int) -> None:
        self.i = i

    def before(self, hook: Around) -> Around:
        """The hook, with the keys of block `i` kept."""

        def both(i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
            if i == self.i:
                block(tokens, attend=self._listen)
            return hook(i, block, tokens)

        return both

    def _listen(self, attention: Attention, x: Tensor, mask: Mask) -> Tensor:
        self.keys = attention.qkv(x).chunk(3, dim=-1)[1]
        return torch.zeros_like(x)
