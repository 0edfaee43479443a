"""CLIP: Learning Transferable Visual Models From Natural Language Supervision. Radford et al., ICML 2021.

The right caption of each picture shall have the largest cosine in the batch, and the right picture that of
each caption. With unit vectors I_i, T_j and l_ij = exp(scale) I_i · T_j:

    L = 1/2 mean_i (-log softmax_j(l_i.)_i) + 1/2 mean_j (-log softmax_i(l_.j)_j)      (figure 3)

The sigmoid form (SigLIP: Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023) asks of each
pair by itself whether it belongs together, with a learned bias b, z_ij = 1 for i = j and else -1:

    L = - 1/N sum_ij log sigmoid(z_ij (l_ij + b))                                       (eq. 1)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.data.batch import Batch
from clipworks.engine.recipe import Recipe
from clipworks.methods.pretrain.base import Objective, pairs
from clipworks.parts.contrastive import Form, contrastive_loss

# Table 20 for ViT-B/32, at a batch of 32,768.
RECIPE = Recipe(epochs=32, lr=5e-4, warmup=2000, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)
# The same at a batch of 256 to 1,024, where fewer steps are taken.
SMALL_RECIPE = Recipe(epochs=32, lr=1e-3, warmup=500, weight_decay=0.1)


class ClipObjective(Objective):
    """The loss of CLIP, or of SigLIP with `form="sigmoid"`.

    Args:
        form: `softmax` or `sigmoid`.
        source: which texts of the batch, one a picture.
        fresh: give the model the paper's initial scale, ln(1/0.07) or ln 10, and for the sigmoid form a bias
            of -10; False leaves a model that is already trained as it is.
    """

    def __init__(self, form: Form = "softmax", *, source: str = "alt", fresh: bool = False):
        super().__init__()
        self.form = form
        self.source = source
        self.fresh = fresh

    def prepare(self, clip: Clip) -> Clip:
        """The same model, with the initial scale and bias of the form where `fresh`."""
        if self.form == "sigmoid" and clip.bias is None:
            clip.bias = nn.Parameter(torch.zeros_like(clip.scale))
            clip.config = replace(clip.config, sigmoid=True)
            clip.config = dataclasses.replace(clip.config, sigmoid=True)
        if self.fresh:
            with torch.no_grad():
                clip.scale.fill_(math.log(10) if self.form == "sigmoid" else math.log(1 / 0.07))
                if clip.bias is not None:
                    clip.bias.fill_(-10.0 if self.form == "sigmoid" else 0.0)
        return clip

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image` and `text` (B, D), unit length; `scale` and `bias`."""
        return pairs(clip, batch, self.source)

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`contrastive`, 0-D, over all pairs of the global batch."""
        loss = contrastive_loss(
            features["image"], features["text"], features["scale"].exp(), features.get("bias"), form=self.form
        )
        return {"contrastive": loss}
