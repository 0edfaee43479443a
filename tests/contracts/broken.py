"""Objectives that each break one promise of the family `pretrain`, and one that keeps them all.

They are what shows that the checks of the contract can fail.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.data.batch import Batch
from clipworks.methods.pretrain.base import Objective, pairs


class Sound(Objective):
    """Keeps every promise: a contrastive loss with noise from torch's generator and a counter in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(()))

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        self.steps += 1
        noise = 1e-3 * torch.randn(len(batch), clip.width)
        rows = pairs(clip, batch)
        return rows | {"image": rows["image"] + noise, "weight": self.weight * self.steps.clone()}

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        return {"pairs": contrastive(features), "penalty": 0.1 * (features["weight"] - 2) ** 2}


def contrastive(features: dict[str, Any], weights: Tensor | None = None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        logits = features["scale"].float().exp() * features["image"].float() @ features["text"].float().T
        each = F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
        return (each if weights is None else each * weights).mean()


class Plain(Objective):
    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        return pairs(clip, batch)

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        return {"pairs": contrastive(features)}


class NotFinite(Plain):
    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        return {"pairs": contrastive(features) + torch.log(torch.zeros(()))}


class TooFewRows(Plain):
    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        return pairs(clip, batch) | {"mean": pairs(clip, batch)["text"].mean(dim=0, keepdim=True)}


class ForgottenParameter(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))


class DetachedTexts(Plain):
    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        rows = pairs(clip, batch)
        return rows | {"text": rows["text"].detach()}


class FirstRowsCountMore(Plain):
    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        rows = len(features["image"])
        return {"pairs": contrastive(features, torch.linspace(2, 0, rows))}


class CenteredByTheBatch(Plain):
    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        rows = pairs(clip, batch)
        return rows | {"image": rows["image"] - rows["image"].mean(dim=0)}


class Collective(Plain):
    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        loss = contrastive(features)
        if dist.is_initialized():
            dist.all_reduce(loss.detach())
        return {"pairs": loss}


class PythonsGenerator(Plain):
    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        return pairs(clip, batch) | {"noise": torch.full((len(batch),), random.random())}


class RandomLoss(Plain):
    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        return {"pairs": contrastive(features) + 0 * torch.rand(())}


class RandomStart(Plain):
    def prepare(self, clip: Clip) -> Clip:
        with torch.no_grad():
            clip.scale.add_(torch.rand(()))
        return clip


class CountsInAnAttribute(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        self.steps += 1
        return pairs(clip, batch)

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        return {"pairs": contrastive(features) / self.steps}


class HalfPrecisionLoss(Plain):
    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        logits = features["scale"].exp() * features["image"] @ features["text"].T
        return {"pairs": F.cross_entropy(logits, torch.arange(len(logits)))}
