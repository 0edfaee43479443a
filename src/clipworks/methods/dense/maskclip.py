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
- key smoothing: after that, where max_c P < `key_smoothing`, P ← K P with K the cosines of the last block's
  keys over places. The published code normalizes keys along the tokens' axis, and after the output
  projection, so that they are no cosines; here they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipworks.core.clip import unit
from clipworks.core.towers import VisionTower
from clipworks.errors import ConfigError
from clipworks.methods.dense.base import Asked, Segmenter
from clipworks.parts.dense import LastValues, all_vectors, probabilities


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
        features, keys = self._places(pixels)
        likely = probabilities(features, asked.vectors)
        if self.denoise is not None:
            likely = denoised(likely, self.denoise)
        if self.key_smoothing is not None and keys is not None:
            likely = smoothed(likely, keys, self.key_smoothing)
        return likely

    def places(self, pixels: Tensor) -> Tensor:
        """F: pixels (B, 3, H, W) to features (B, D, h, w), not of unit length."""
        return self._places(pixels)[0]

    def _places(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """F, and the last block's keys at the same places, (B, h w, w)."""
        tower = self.tower
        if not isinstance(tower, VisionTower):
            if self.key_smoothing is not None or not self.residual:
                raise ConfigError("a ResNet has neither keys to smooth with nor a residual to leave out")
            return all_vectors(tower, pixels)[1], None
        last = LastValues(len(tower.blocks) - 1, self.residual)
        features = all_vectors(tower, pixels, around=last)[1]
        return features, last.keys[:, int(tower.config.class_token) :]


def denoised(likely: Tensor, below: float) -> Tensor:
    """P (B, K, h, w) without classes that reach the bound nowhere; the others sum to one again.

    Where no class reaches it, all of them stay.
    """
    kept = likely.amax(dim=(2, 3), keepdim=True) >= below
    likely = likely * (kept | ~kept.any(dim=1, keepdim=True))
    return likely / likely.sum(dim=1, keepdim=True).clamp(min=1e-12)


def smoothed(likely: Tensor, keys: Tensor, below: float) -> Tensor:
    """P ← K P where max P is below a bound, K the cosines of keys over places; then they sum to one again.

    Args:
        likely: P, (B, K, h, w).
        keys: (B, h w, d).
        below: the bound.

    Returns:
        (B, K, h, w). What becomes negative is zero; where nothing is left, P stays.
    """
    with torch.autocast(likely.device.type, enabled=False):
        directions = unit(keys)
        flat = likely.flatten(2).mT
        mixed = (directions @ (directions.mT @ flat)).clamp(min=0)
        total = mixed.sum(dim=2, keepdim=True)
        unsure = (flat.amax(dim=2, keepdim=True) < below) & (total > 0)
        return torch.where(unsure, mixed / total.clamp(min=1e-12), flat).mT.unflatten(2, likely.shape[2:])
