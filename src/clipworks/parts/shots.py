"""What an estimator is fitted on: labeled features or pictures, and how what people have is told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipworks.data.randomness import fold, key_number
from clipworks.errors import EstimatorInputError
from clipworks.parts.features import Views

_VIEW = 0x71E3


@dataclass
class Shots:
    """n labeled examples.

    Attributes:
        labels: (n,) int64, places in the estimator's classes; all 0 where there are no labels.
        weights: (n,) float32 with mean 1.
        features: (n, V, D), V views of each picture as the encoder gives them, or None.
        pixels: (n, 3, H, W) bytes or floats in [0, 1], or None; kept if a method trains with pictures.
        keys: a name a picture that depends on its content alone; empty for features.
        views: how views are made of pixels.
        mean_weight: by what `weights` were divided to have mean 1.
    """

    labels: Tensor
    weights: Tensor
    features: Tensor | None = None
    pixels: Tensor | None = None
    keys: Sequence[str] = ()
    views: Views = field(default_factory=Views)
    mean_weight: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def vectors(self) -> Tensor:
        """Features (n, V, D).

        Raises:
            EstimatorInputError: if there are pictures instead.
        """
        if self.features is None:
            raise EstimatorInputError("this method works on features, and was given pixels")
        return self.features

    def counts(self, classes: int) -> Tensor:
        """How many examples each class has, (C,) int64."""
        return torch.bincount(self.labels, minlength=classes)

    def select(self, rows: Tensor | NDArray[np.int64]) -> Shots:
        """Some of the examples, by place (k,) int64; weights keep their proportions."""
        at = torch.as_tensor(rows)
        mean = float(self.weights[at].mean()) or 1.0
        return replace(
            self,
            labels=self.labels[at],
            weights=self.weights[at] / mean,
            mean_weight=self.mean_weight * mean,
            features=None if self.features is None else self.features[at],
            pixels=None if self.pixels is None else self.pixels[at],
            keys=[self.keys[int(row)] for row in at] if self.keys else (),
        )

    def inputs(self, rows: Tensor, epoch: int) -> Tensor:
        """What a training step sees of some rows: one view of each.

        Returns:
            Features (b, D), of the V views one drawn anew in every epoch; or pixels (b, 3, H, W), of which
            every epoch makes a new view (or the plain picture, where views are not wanted).
        """
        if self.pixels is not None:
            keys = [self.keys[int(row)] for row in rows]
            return self.views.make(self.pixels[rows], keys, epoch)
        return self.vectors[rows, self.view_numbers(rows, epoch)]

    def view_numbers(self, rows: Tensor, epoch: int) -> Tensor:
        """Which of V cached views each row (b,) shows in an epoch, (b,) int64: each once in V epochs."""
        count = self.vectors.shape[1]
        if count == 1:
            return torch.zeros_like(rows)
        turn = epoch // count
        numbers = []
        for row in rows.tolist():
            name = key_number(self.keys[row]) if self.keys else row
            # A rotation by a whole number drawn anew in every round of V epochs.
            numbers.append((epoch + fold(name, turn, self.views.seed, _VIEW) % count) % count)
        return torch.tensor(numbers, dtype=torch.int64)

    def plain(self, rows: Tensor) -> Tensor:
        """The same without randomness: first views of features (b, D), or pixels (b, 3, H, W) as they are."""
        return self.vectors[rows, 0] if self.pixels is None else self.pixels[rows]


@dataclass
class Step:
    """What a training step works on.

    Attributes:
        inputs: features (b, D), or pixels (b, 3, H, W) where a method trains with pictures.
        labels: (b,) int64.
        weights: (b,) float32, 1 on average over the whole set.
        rows: (b,) int64 on the CPU, which of the shots these are.
        epoch: from 0; with `rows` it says which view each is.
        shots: all of them.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor
    rows: Tensor
    epoch: int
    shots: Shots


def weights_of(sample_weight: Any, count: int) -> tuple[Tensor, float]:
    """Sample weights (n,) as float32 with mean 1, and the mean that they had; None is 1 for each.

    Raises:
        EstimatorInputError: if there is not one finite, non-negative weight an example, or all are zero.
    """
    if sample_weight is None:
        return torch.ones(count), 1.0
    try:
        weights = np.asarray(sample_weight, np.float64)
    except (TypeError, ValueError) as error:
        raise EstimatorInputError(f"sample_weight must be numbers ({error})") from error
    if weights.ndim == 0:
        weights = np.full(count, float(weights))
    if weights.shape != (count,):
        form = "Sample weights must be 1D array or scalar" if weights.ndim > 1 else "sample_weight"
        raise EstimatorInputError(f"{form}: {weights.shape} weights for {count} examples")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise EstimatorInputError("sample_weight must be finite and not negative")
    if not weights.any():
        raise EstimatorInputError("every sample_weight is zero: nothing is left to learn from")
    mean = float(weights.mean())
    return torch.from_numpy((weights / mean).astype(np.float32)), mean


def are_features(given: Any) -> bool:
    """Whether something is a table of features (n, D) rather than pictures."""
    if isinstance(given, (str, bytes, Image.Image)) or hasattr(given, "read"):
        return False
    if isinstance(given, Tensor):
        return given.ndim <= 2
    if isinstance(given, np.ndarray):
        texts_or_things = given.dtype.kind in "US" or (given.dtype == object and given.ndim == 1)
        return given.ndim <= 2 and not texts_or_things
    if isinstance(given, (list, tuple)):
        if not given:
            return False
        first = given[0]
        # The rows of a table are numbers, one after the other; a picture as nested lists nobody has.
        return isinstance(first, (int, float, list, tuple)) or (
            isinstance(first, (np.ndarray, Tensor)) and first.ndim <= 1
        )
    return len(getattr(given, "shape", ())) in (1, 2) or hasattr(given, "__array__")


def view_features(given: Any) -> Tensor | None:
    """Features of several views, (n, V, D) floats, if they are that: three axes, the last at least 5 wide."""
    if isinstance(given, np.ndarray) and given.ndim == 3 and given.dtype.kind == "f":
        given = torch.from_numpy(given)
    if isinstance(given, Tensor) and given.ndim == 3 and given.is_floating_point() and given.shape[-1] > 4:
        return given.detach().cpu()
    return None


def as_table(given: Any) -> Any:
    """A tensor (n, D) as an array on the CPU (half precision as fp32); anything else as it is."""
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], Tensor):
        given = torch.stack(list(given))
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        return (given.float() if given.dtype in (torch.float16, torch.bfloat16) else given).numpy()
    return given
