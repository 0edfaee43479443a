"""Estimators that each break one promise of the family `adapt`, and one that keeps them all.

They are what shows that the checks of the contract can fail.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.methods.adapt.base import ImageTower, TrainedAdapter
from clipworks.parts.shots import Shots, Step


@dataclass(eq=False, repr=False, kw_only=True)
class Sound(TrainedAdapter):
    """Keeps every promise: a learned shift of all class vectors, with noise at its start."""

    lr: float = 0.5
    epochs: int = 2
    strength: float = 0.1
    retargets: ClassVar[bool] = True
    slug: ClassVar[str] = "sound"

    def _prepare(self, shots: Shots | None) -> nn.Module:
        return nn.ParameterDict({"shift": self.strength * torch.randn(self._model.width)})

    def _class_features(self) -> Tensor:
        return unit(super()._class_features() + self.module_["shift"])


class NotASum(Sound):
    def predict_proba(self, X: Any) -> Any:
        return 2 * super().predict_proba(X)


class WritesToTheClip(Sound):
    def _backward(self, step: Step) -> Tensor:
        with torch.no_grad():
            self._model.scale.add_(1e-6)
        return super()._backward(step)


class OtherOnPictures(Sound):
    def _from_pictures(self, *given: Any) -> Shots:
        shots = super()._from_pictures(*given)
        assert shots.features is not None
        shots.features = shots.features.flip(0)
        return shots


class DrawsWithoutItsSeed(Sound):
    def _prepare(self, shots: Shots | None) -> nn.Module:
        generator = torch.Generator()
        generator.seed()
        return nn.ParameterDict({"shift": torch.randn(self._model.width, generator=generator)})


class LeavesARandomState(Sound):
    def predict(self, X: Any) -> Any:
        random.random()
        return super().predict(X)


class CopiesTheClip(Sound):
    shared: ClassVar[tuple[str, ...]] = ()


class ForgetsASetting(Sound):
    def set_params(self, **settings: Any) -> Any:
        settings.pop("seed", None)
        return super().set_params(**settings)


class SavesHalf(Sound):
    def _learned(self) -> dict[str, Tensor]:
        return {name: 0 * tensor for name, tensor in super()._learned().items()}


class SavesTheClip(Sound):
    def save(self, folder: Any) -> Path:
        super().save(folder)
        self._model.save(Path(folder) / "clip")
        return Path(folder)


class TakesAnyClip(Sound):
    @classmethod
    def load(cls, folder: Any, clip: Clip | None = None, **settings: Any) -> Any:
        try:
            return super().load(folder, clip, **settings)
        except Exception:
            return Sound(clip)


class OtherLogits(Sound):
    def logits(self, features: Tensor) -> Tensor:
        return super().logits(features) * torch.arange(len(self.classes_))


class LongVectors(Sound):
    def class_features(self, image_features: Tensor | None = None) -> Tensor:
        return 2 * super().class_features(image_features)


class LabelsInTheirOwnOrder(Sound):
    def predict(self, X: Any) -> Any:
        return np.sort(self.classes_)[::-1][self._scores(X).argmax(dim=1).numpy()]


class IgnoresNaN(Sound):
    def _features(self, X: Any, y: Any, *, reset: bool) -> Any:
        return super()._features(np.nan_to_num(np.asarray(X)), y, reset=reset)


class CountsWeights(Sound):
    def _loss(self, step: Step) -> Tensor:
        return super()._loss(step) * (2 - (step.shots.mean_weight == 1))


class EncodesAgain(Sound):
    def _encoded(self, images: Any, views: Any) -> Tensor:
        self._encode(torch.zeros(1, 3, 32, 32))
        return super()._encoded(images, views)


class OldClasses(Sound):
    def for_classes(self, class_names: Any) -> Any:
        return self


class AsksForMore(Sound):
    image_tower: ClassVar[ImageTower] = "frozen"

    def fit(self, X: Any, y: Any = None, **options: Any) -> Any:
        if len(X) < 12:
            raise RuntimeError("more, please")
        return super().fit(X, y, **options)
