"""Zero-shot CLIP, the baseline of every adaptation. Radford et al., ICML 2021, section 3.1.

Nothing is learned: a class's vector is the mean over its sentences (templates, synonyms, descriptions) of
unit text vectors, unit again; logits are s·f̂·t̂ᵀ. Labels and pictures given to `fit` only name the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipworks.methods.adapt.base import Adapter
from clipworks.parts.features import Views
from clipworks.parts.shots import Shots


@dataclass(eq=False, repr=False, kw_only=True)
class ZeroShot(Adapter):
    """Classification by the names of the classes; `ZeroShot(clip, names).fit()` needs no example."""

    labels_needed: ClassVar[bool | None] = None
    every_class: ClassVar[bool] = False
    retargets: ClassVar[bool] = True

    def fit(self, X: Any = None, y: Any = None, **options: Any) -> ZeroShot:
        """Settle the classes: those of `class_names`, else those of the labels."""
        return super().fit(X, y, **options)

    def _read(self, X: Any, y: Any, sample_weight: Any) -> Shots:
        if X is not None:
            return super()._read(X, y, sample_weight)
        self.classes_, self.texts_ = self._settle(None)
        self.fitted_on_, self.n_features_in_ = "pictures", self._model.width
        return Shots(torch.empty(0, dtype=torch.int64), torch.empty(0))

    def _from_pictures(self, images: list[Any], labels: Tensor, weights: Tensor, views: Views) -> Shots:
        return Shots(labels, weights)  # no picture has to be encoded

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        return

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # it learns nothing from the data
        return tags
