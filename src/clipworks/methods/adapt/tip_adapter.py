"""Tip-Adapter: the shots as a memory of keys and values beside zero-shot CLIP. Zhang et al., ECCV 2022.

Keys K are the unit features of the N labeled pictures, values L their labels, one-hot; with unit image
features f̂ and class vectors W,

    logits = s·f̂·Wᵀ + α·exp(−β·(1 − f̂·Kᵀ))·L

α weighs the memory, β is its sharpness. Nothing is trained. A key is the mean over random views of a picture.
**Tip-Adapter-F** then trains the keys, and nothing else, by cross-entropy at the α and β of the start: AdamW
1e-3, 20 epochs, batch 256, cosine by step; the keys are not made unit again.

On validation data α and β are searched as the authors search them, β in 200 steps and α in 20 from 0.1 up;
the first best one stands. For -F this comes after training.

Deviations. s is the Clip's own scale, which in the released models is the paper's 100. The authors choose
α and β on the whole validation split, on ImageNet on the test split, and report for -F the best epoch on the
test split: here only what is given as validation data chooses, and the last epoch is deployed. Sample weights
(1 on average) multiply the values. Views are encoded once, 10 a picture, in training too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clipworks.core.clip import unit
from clipworks.errors import ConfigError
from clipworks.methods.adapt.base import Adapter, TrainedAdapter
from clipworks.parts.schedules import Schedule
from clipworks.parts.shots import Shots

BETAS, ALPHAS = 200, 20  # values on the grids
AT_ONCE = 64  # features whose affinities are read together


@dataclass(frozen=True)
class Memory:
    """Keys and values.

    Attributes:
        keys: K, (N, D).
        labels: (N,) int64, the class of each key.
        weights: (N,), what each value has in place of one.
        classes: C.
    """

    keys: Tensor
    labels: Tensor
    weights: Tensor
    classes: int

    @classmethod
    def of(cls, shots: Shots, classes: int) -> Memory:
        """One key a picture: the mean over its views, made unit."""
        return cls(unit(shots.vectors.mean(dim=1)), shots.labels, shots.weights, classes)

    def affinities(self, features: Tensor) -> Tensor:
        """f̂·Kᵀ, (B, N), of features (B, D) of any length."""
        vectors = unit(features)
        return vectors @ self.keys.to(vectors).mT

    def read(self, affinities: Tensor, beta: float) -> Tensor:
        """exp(−β·(1 − f̂·Kᵀ))·L, (B, C), of affinities (B, N)."""
        found = torch.exp(-beta * (1 - affinities))
        if not bool((self.weights == 1).all()):
            found = found * self.weights.to(affinities)
        # A product with one-hot rows is a sum over the keys of each class.
        labels = self.labels.to(found.device)
        each = len(labels) // self.classes
        if torch.equal(labels, torch.arange(self.classes, device=labels.device).repeat_interleave(each)):
            return found.unflatten(1, (self.classes, each)).sum(dim=2)  # as many keys each, in order
        return found.new_zeros(len(found), self.classes).index_add(1, labels, found)


def search(
    memory: Memory, zero_shot: Tensor, features: Tensor, labels: Tensor, ends: tuple[float, float]
) -> tuple[float, float]:
    """The first α and β on the grids that are best on some labeled features, β in the outer loop.

    Args:
        memory: keys and values.
        zero_shot: logits (n, C).
        features: (n, D) of any length.
        labels: (n,) int64.
        ends: of the grids of α and β, themselves left out.
    """
    affinities = memory.affinities(features)
    alphas = [0.1 + j * (ends[0] - 0.1) / ALPHAS for j in range(ALPHAS)]
    best, chosen = -1, (0.0, 0.0)
    for i in range(BETAS):
        beta = 0.1 + i * (ends[1] - 0.1) / BETAS
        read = memory.read(affinities, beta)
        right = [int(((zero_shot + a * read).argmax(dim=1) == labels).sum()) for a in alphas]
        if max(right) > best:
            best = max(right)
            chosen = alphas[right.index(best)], beta
    return chosen


def check(alpha: float, beta: float, ends: tuple[float, float]) -> None:
    """Raises ConfigError for values that mean nothing."""
    if alpha < 0 or beta < 0 or len(ends) != 2 or min(ends) <= 0.1:
        raise ConfigError(
            "alpha and beta must not be negative and both ends of the search must be above 0.1, "
            f"not alpha={alpha}, beta={beta}, search={ends}"
        )


@dataclass(eq=False, repr=False, kw_only=True)
class TipAdapter(Adapter):
    """Zero-shot logits and a memory of the shots; training-free.

    Args:
        alpha: α, the weight of the memory; 0 is zero-shot. Validation data choose another.
        beta: β, its sharpness. Validation data choose another.
        search: where the grids of α and β end.
    """

    alpha: float = 1.0
    beta: float = 1.0
    search: tuple[float, float] = (5.0, 12.0)
    views: int = 10

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        check(self.alpha, self.beta, self.search)
        self.alpha_, self.beta_ = float(self.alpha), float(self.beta)
        memory = Memory.of(shots, len(self.classes_))
        order = memory.labels.argsort(stable=True)
        self.keys_, self.labels_, self.weights_ = (
            tensor[order].to(self._device) for tensor in (memory.keys, memory.labels, memory.weights)
        )
        if validation is not None:
            self.alpha_, self.beta_ = chosen(self.memory, super()._logits, validation, self)

    @property
    def memory(self) -> Memory:
        """K and L."""
        return Memory(self.keys_, self.labels_, self.weights_, len(self.classes_))

    def _logits(self, features: Tensor) -> Tensor:
        memory = self.memory
        # The product wants many rows; what follows goes faster over a few that stay in the cache.
        affinities = memory.affinities(features).split(AT_ONCE)
        parts = [memory.read(few, self.beta_) for few in affinities]
        return super()._logits(features) + self.alpha_ * torch.cat(parts)


@dataclass(eq=False, repr=False, kw_only=True)
class TipAdapterF(TrainedAdapter):
    """Tip-Adapter whose keys are trained.

    Args:
        alpha, beta: α and β of the training; validation data choose others after it.
        search: where the grids of α and β end.
    """

    alpha: float = 1.0
    beta: float = 1.0
    search: tuple[float, float] = (5.0, 12.0)
    views: int = 10
    lr: float = 1e-3
    epochs: int = 20
    batch_size: int = 256

    slug: ClassVar[str] = "tip-adapter-f"
    schedule: ClassVar[Schedule] = Schedule("adamw", weight_decay=0.01, eps=1e-4, decay="step")

    def _prepare(self, shots: Shots | None) -> nn.Module:
        if shots is None:  # made to be loaded into; the labels have been read already
            return nn.ParameterDict({"cache": torch.empty(len(self.labels_), self.n_features_in_)})
        memory = Memory.of(shots, len(self.classes_))
        self.labels_: Tensor = memory.labels.to(self._device)
        self.weights_: Tensor = memory.weights.to(self._device)
        return nn.ParameterDict({"cache": memory.keys.float()})

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        check(self.alpha, self.beta, self.search)
        self.alpha_, self.beta_ = float(self.alpha), float(self.beta)
        super()._fit(shots, validation)
        if validation is not None:
            self.alpha_, self.beta_ = chosen(self.memory, super()._logits, validation, self)

    @property
    def memory(self) -> Memory:
        """K, as trained, and L."""
        return Memory(self.module_["cache"], self.labels_, self.weights_, len(self.classes_))

    def _logits(self, features: Tensor) -> Tensor:
        memory = self.memory
        read = memory.read(memory.affinities(features), self.beta_)
        return super()._logits(features) + self.alpha_ * read


@torch.no_grad()
def chosen(
    memory: Memory,
    zero_shot: Callable[[Tensor], Tensor],
    validation: Shots,
    fitted: TipAdapter | TipAdapterF,
) -> tuple[float, float]:
    """α and β by the plain views of validation data."""
    features = validation.vectors[:, 0].to(memory.keys.device)
    labels = validation.labels.to(features.device)
    return search(memory, zero_shot(features), features, labels, fitted.search)
