"""Nearest class mean: the prototypes of Snell et al., Prototypical Networks, NeurIPS 2017, on CLIP features.

With unit image vectors f̂ of all views of a class's examples, weighted by w,

    μ_c = Σ_{y_i = c} w_i f̂_i / ‖Σ_{y_i = c} w_i f̂_i‖,      logits = s·f̂·μᵀ

The names of the classes are not read. s, the Clip's own scale, makes probabilities of cosines; it does not
change which class is nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipworks.core.clip import unit
from clipworks.methods.adapt.base import Adapter
from clipworks.parts.shots import Shots


@dataclass(eq=False, repr=False, kw_only=True)
class NearestMean(Adapter):
    """The class whose mean feature has the largest cosine."""

    reads_text: ClassVar[bool] = False

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        vectors = unit(shots.vectors) * shots.weights[:, None, None]
        sums = torch.zeros(len(self.classes_), vectors.shape[-1], dtype=vectors.dtype)
        sums.index_add_(0, shots.labels, vectors.sum(dim=1))
        self.means_ = unit(sums).to(self._device)

    def _class_features(self) -> Tensor:
        return self.means_
