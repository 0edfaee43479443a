"""WiSE-FT: robust fine-tuning by averaging weights. Wortsman et al., CVPR 2022.

Fine-tune, from the zero-shot model, then go back part of the way in weight space (eq. 1):

    θ(α) = (1 − α)·θ₀ + α·θ₁

θ₀: CLIP's image tower with a head of its class vectors, logits = s·W·f̂ with W = T; θ₁: both after training.
α = 0 is zero-shot, α = 1 plain fine-tuning; between them accuracy under shift rises at little cost at home.
Given features, only the head is trained, the paper's "linear classifier" form.

The recipe is the paper's end-to-end one (AdamW, lr 3e-5, decay 0.1, cosine by step, gradient norm 1); its 500
warm-up steps are a tenth of all steps here, since few shots have fewer than 500.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clipworks.core.clip import unit
from clipworks.errors import ConfigError
from clipworks.methods.adapt.base import ImageTower, TrainedAdapter
from clipworks.parts.schedules import Schedule
from clipworks.parts.shots import Shots


@dataclass(eq=False, repr=False, kw_only=True)
class WiSEFT(TrainedAdapter):
    """Fine-tuning and zero-shot averaged in weight space.

    Args:
        alpha: the share of the fine-tuned weights, in [0, 1]; may be set after `fit`.
    """

    alpha: float = 0.5
    crop: tuple[float, float] = (0.9, 1.0)
    views: int = 1
    lr: float = 3e-5
    epochs: int = 10
    batch_size: int = 64

    image_tower: ClassVar[ImageTower] = "either"
    schedule: ClassVar[Schedule] = Schedule(
        "adamw", weight_decay=0.1, decay="step", warmup_share=0.1, clip_norm=1.0
    )

    def _prepare(self, shots: Shots | None) -> nn.Module:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is a share in [0, 1], not {self.alpha}")
        start = super()._class_features()
        head = nn.utils.skip_init(nn.Linear, start.shape[1], start.shape[0], bias=False, device=start.device)
        with torch.no_grad():
            head.weight.copy_(start)
        learned = nn.ModuleDict({"head": head})
        if self.fitted_on_ == "pictures":
            learned["image"] = copy.deepcopy(self._model.image).requires_grad_(True)
        return learned.eval()

    def _encode(self, pixels: Tensor) -> Tensor:
        if self.fitted_on_ == "features":
            return super()._encode(pixels)
        tower = self.module_["image"]
        if self._learning:
            return tower(pixels)
        return functional_call(tower, self._once(f"tower {self.alpha}", self._tower), (pixels,))

    def _head(self) -> Tensor:
        """W(α), (C, D)."""
        tuned = self.module_["head"].weight
        return tuned if self._learning else torch.lerp(super()._class_features(), tuned, self.alpha)

    def _tower(self) -> dict[str, Tensor]:
        """θ(α) of the image tower."""
        first = dict(self._model.image.named_parameters())
        return {
            name: torch.lerp(first[name], tuned.detach(), self.alpha)
            for name, tuned in self.module_["image"].named_parameters()
        }

    def class_features(self, image_features: Tensor | None = None) -> Tensor:
        """The rows of the averaged head (C, D), made unit."""
        self._check_fitted()
        with torch.no_grad(), self._undisturbed():
            return unit(self._head())

    def _logits(self, features: Tensor) -> Tensor:
        vectors = unit(features)
        return self.scale * vectors @ self._head().to(vectors.dtype).mT
