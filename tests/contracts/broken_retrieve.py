"""Rankers that each break one promise of the family `retrieve`, and one that keeps them all.

They are what shows that the checks of the contract can fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.core.clip import Clip, unit
from clipworks.methods.retrieve.base import Ranker, Ranking


@dataclass(eq=False, repr=False)
class Sound(Ranker):
    """Keeps every promise: cosines, a mean removed that `fit` learns, with a little noise from the seed."""

    weight: float = 0.5
    seed: int = 0

    def fit(self, gallery: Tensor, labels: Any = None) -> Any:
        super().fit(gallery, labels)
        self.mean_ = gallery.mean(dim=0)
        return self

    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        noise = 1e-3 * torch.randn(queries.shape[1], generator=generator)
        center = self.weight * self.mean_ + noise
        return unit(queries - center) @ unit(gallery - center).T

    def _learned(self) -> dict[str, Tensor]:
        return {"mean": self.mean_}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.mean_ = tensors["mean"]


class HalfPrecision(Sound):
    def similarity(self, queries: Tensor, gallery: Tensor | None = None) -> Tensor:
        return super().similarity(queries, gallery).half()


class CenteredByTheQueries(Sound):
    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        return super()._similarity(unit(queries - queries.mean(dim=0)), gallery)


class FirstOfTheGalleryCountMore(Sound):
    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        return super()._similarity(queries, gallery) + torch.linspace(0.1, 0, len(gallery))


class WorstFirst(Sound):
    def rank(self, queries: Tensor, gallery: Any = None, k: Any = None, exclude: Any = None) -> Ranking:
        best = super().rank(queries, gallery, None, exclude)
        return Ranking(best.indices.flip(1)[:, :k], best.scores.flip(1)[:, :k])


class RanksTheQueryItself(Sound):
    def rank(self, queries: Tensor, gallery: Any = None, k: Any = None, exclude: Any = None) -> Ranking:
        return super().rank(queries, gallery, k)


class GlobalNoise(Sound):
    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        return super()._similarity(queries, gallery) + 1e-3 * torch.rand(len(queries), 1)


class ChangesTheClip(Sound):
    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        with torch.no_grad():
            self.clip.scale.add_(1e-3)
        return super()._similarity(queries, gallery)


class LeavesGradients(Sound):
    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        (self.clip.scale * queries.sum()).backward()
        return super()._similarity(queries, gallery)


class CopiesTheClip(Sound):
    def __sklearn_clone__(self) -> Any:
        import copy

        return type(self)(copy.deepcopy(self.clip), self.weight, self.seed)


class ForgetsWhatItLearned(Sound):
    def _learned(self) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(self.mean_)}


class TakesAnyClip(Sound):
    @classmethod
    def load(cls, folder: Any, clip: Clip, **settings: Any) -> Any:
        from clipworks.parts import fitted

        about, tensors = fitted.read(Path(folder))
        loaded = cls(clip, **{**about["settings"], **settings})
        loaded.gallery_ = tensors.pop("gallery")
        loaded._restore(tensors)
        return loaded


class TakesAnyShape(Sound):
    def _checked(self, features: Tensor, what: str) -> Tensor:
        return features
