"""CLIP-Adapter: a bottleneck behind the image tower. Gao et al., IJCV 2023.

Instead of the prompt, the picture's feature f is bent, a share ρ of the way:

    A(f) = ReLU(W₂·ReLU(W₁·f)),    W₁ (D/r, D), W₂ (D, D/r), no biases
    f* = ρ·A(f) + (1 − ρ)·f,       logits = s·f̂*·t̂ᵀ

W₁ and W₂ are fitted by cross-entropy; the classes' vectors t̂ are zero-shot ones. A is positively homogeneous,
A(c·f) = c·A(f), so the length of f changes no logit, and features of unit length stand for raw ones.

The paper also has a text-side adapter, and searches ρ for each data set; its code is the image side with
ρ = 0.2. Here ρ is 0.2, or chosen on validation data (`ratio="auto"`). The recipe is ours, for cached
features: AdamW 1e-3, cosine by step; the paper's rate is 1e-5, its code takes CoOp's recipe.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clipworks.core.clip import unit
from clipworks.engine.randomness import own_randomness
from clipworks.errors import ConfigError
from clipworks.methods.adapt.base import TrainedAdapter
from clipworks.parts.descent import hold_out
from clipworks.parts.schedules import Schedule
from clipworks.parts.shots import Shots

RATIOS = (0.2, 0.4, 0.6, 0.8)


@dataclass(eq=False, repr=False, kw_only=True)
class ClipAdapter(TrainedAdapter):
    """A bottleneck behind the image tower, with a residual.

    Args:
        ratio: ρ in [0, 1], or `"auto"`: the best of 0.2, 0.4, 0.6 and 0.8 on the validation data; without
            such, a fifth of each class is held out.
        reduction: r, by how much the bottleneck is narrower.
    """

    ratio: float | Literal["auto"] = 0.2
    reduction: int = 4
    views: int = 8
    lr: float = 1e-3

    schedule: ClassVar[Schedule] = Schedule("adamw", weight_decay=0.01, decay="step")
    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        width = self.n_features_in_
        if not 1 <= self.reduction <= width:
            raise ConfigError(f"reduction must lie in [1, {width}], not {self.reduction}")
        narrow = width // self.reduction
        layers = [nn.Linear(width, narrow, bias=False), nn.Linear(narrow, width, bias=False)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        if self.ratio != "auto":
            if not (isinstance(self.ratio, (int, float)) and 0 <= self.ratio <= 1):
                raise ConfigError(f"ratio is a share in [0, 1] or 'auto', not {self.ratio!r}")
            self.ratio_ = float(self.ratio)
            super()._fit(shots, validation)
            return
        if validation is None:
            shots, validation = hold_out(shots, self.seed)
        best: tuple[float, float, Any] = (-1.0, 0.0, None)
        for self.ratio_ in RATIOS:
            with own_randomness(self.seed):  # each from the same start
                super()._fit(shots, validation)
            accuracy = self._accuracy(validation)
            if accuracy > best[0]:
                best = (accuracy, self.ratio_, copy.deepcopy(self.module_))
        _, self.ratio_, self.module_ = best

    def adapted(self, features: Tensor) -> Tensor:
        """f̂*, (B, D) of unit length, of features (B, D) of any length."""
        vectors = unit(features)
        bent = self.module_(vectors.to(self.module_[0].weight.dtype)).to(vectors.dtype)
        return unit(self.ratio_ * bent + (1 - self.ratio_) * vectors)

    def _logits(self, features: Tensor) -> Tensor:
        return super()._logits(self.adapted(features))
