"""Few-shot protocols: the draw, base and new classes, transfer, calibration.

As CoOp and its followers have them (Zhou et al., IJCV and CVPR 2022).

The draw is theirs number for number: Python's `random`, seeded with the run's seed; labels in order of first
appearance; of each class `random.sample(items, K)`, first of the training part, then min(K, 4) of the
validation part from the same stream.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipworks.data.captions import ClassTexts
from clipworks.errors import ConfigError, DataError, EstimatorInputError, ShapeError, require

MOST_VALIDATION = 4
OnShort = Literal["raise", "all", "repeat"]


@dataclass(frozen=True)
class Draw:
    """Places of the drawn examples, (k,) int64 each, class by class; `validation` may be empty."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]


def few_shot(
    train: Sequence[int] | NDArray[Any],
    shots: int,
    seed: int,
    validation: Sequence[int] | NDArray[Any] | None = None,
    *,
    on_short: OnShort = "raise",
) -> Draw:
    """K examples a class, drawn as CoOp draws them.

    Args:
        train: (n,) the label of each training example, in the order of the split.
        shots: K.
        seed: the run's.
        validation: (m,) labels of the validation part, of which min(K, 4) a class are drawn.
        on_short: for a class with fewer than K: `raise`; `all` takes what there is, as CoOp does; `repeat`
            draws with replacement, as Tip-Adapter does.

    Raises:
        ConfigError: for less than one shot.
        EstimatorInputError: for a class with fewer examples than shots, if `on_short` is `raise`.
    """
    if shots < 1:
        raise ConfigError(f"shots must be at least 1, not {shots}")
    generator = random.Random(seed)
    parts = [_draw(train, shots, generator, on_short)]
    if validation is not None:
        parts.append(_draw(validation, min(shots, MOST_VALIDATION), generator, "all"))
    else:
        parts.append(np.empty(0, np.int64))
    return Draw(*parts)


def _draw(
    labels: Sequence[int] | NDArray[Any], shots: int, generator: random.Random, on_short: OnShort
) -> NDArray[np.int64]:
    groups: dict[Any, list[int]] = {}
    for place, label in enumerate(np.asarray(labels).tolist()):
        groups.setdefault(label, []).append(place)
    drawn: list[int] = []
    for label, places in groups.items():
        if len(places) >= shots:
            drawn += generator.sample(places, shots)
        elif on_short == "raise":
            raise EstimatorInputError(
                f"class {label!r} has {len(places)} pictures, fewer than the {shots} shots asked for"
            )
        elif on_short == "all":
            drawn += places
        else:
            drawn += generator.choices(places, k=shots)
    return np.array(drawn, np.int64)


def base_new(labels: Sequence[int] | NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The base classes and the new ones: the first ⌈C/2⌉ of the sorted labels, and the rest."""
    classes = np.unique(np.asarray(labels))
    half = -(-len(classes) // 2)
    return classes[:half], classes[half:]


def harmonic_mean(base: float, new: float) -> float:
    """H = 2·base·new / (base + new), 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def take(things: Any, places: NDArray[np.int64] | Sequence[int]) -> Any:
    """Some rows of a tensor or an array, or some entries of a list or a source."""
    if isinstance(things, (Tensor, np.ndarray)):
        return things[np.asarray(places)]
    return [things[int(place)] for place in places]


def accuracy_on(fitted: Any, X: Any, y: NDArray[Any], classes: ClassTexts | None = None) -> float:
    """Top-1 accuracy, in [0, 1], of a fitted estimator, as it is or for other class names.

    Args:
        fitted: an estimator of the family `adapt`.
        X: pictures or features.
        y: (n,) labels; with `classes`, integers that count them.
        classes: for another data set, a shifted one with some of the classes, or the new half of one.

    Raises:
        DataError: without examples.
    """
    if not len(y):
        raise DataError("no examples to measure accuracy on")
    if classes is not None:
        fitted = fitted.for_classes(classes)
        return float((fitted.predict_proba(X).argmax(axis=1) == places_in(classes, fitted)[y]).mean())
    return float((fitted.predict(X) == y).mean())


def places_in(classes: ClassTexts, fitted: Any) -> NDArray[np.int64]:
    """Where an estimator has each of some classes, (C,): its order is that of its labels."""
    order = {name: place for place, name in enumerate(fitted.texts_.names)}
    return np.array([order[name] for name in classes.names], np.int64)


@dataclass(frozen=True)
class BaseToNew:
    """Accuracies in [0, 1] among base names alone and among new names alone, and their harmonic mean."""

    base: float
    new: float
    harmonic: float


def base_to_new(
    estimator: Any,
    train: tuple[Any, NDArray[Any]],
    test: tuple[Any, NDArray[Any]],
    classes: ClassTexts,
    *,
    shots: int = 16,
    seed: int = 1,
    on_short: OnShort = "all",
) -> BaseToNew:
    """Fit to K shots of the base classes; measure on the test part of both halves.

    The draw is over all classes and the halves are taken after it, so that base shots equal those of the run
    over all classes.

    Args:
        estimator: with settings, not fitted; it must be able to serve new class names (`for_classes`).
        train, test: pictures or features with labels (n,) that count `classes`.
        classes: all of them.
        shots, seed, on_short: see `few_shot`.
    """
    from sklearn.base import clone

    (X, y), (X_test, y_test) = train, (test[0], np.asarray(test[1]))
    y = np.asarray(y)
    base, new = base_new(y)
    drawn = few_shot(y, shots, seed, on_short=on_short).train
    drawn = drawn[np.isin(y[drawn], base)]
    texts = classes.select([int(label) for label in base])
    fitted = clone(estimator).set_params(class_names=texts)
    fitted.fit(take(X, drawn), np.searchsorted(base, y[drawn]))

    def measured(half: NDArray[Any], names: ClassTexts | None) -> float:
        rows = np.flatnonzero(np.isin(y_test, half))
        return accuracy_on(fitted, take(X_test, rows), np.searchsorted(half, y_test[rows]), names)

    on_base = measured(base, None)
    on_new = measured(new, classes.select([int(label) for label in new]))
    return BaseToNew(on_base, on_new, harmonic_mean(on_base, on_new))


def calibration_error(
    probabilities: NDArray[Any] | Tensor, labels: NDArray[Any] | Tensor, bins: int = 15
) -> float:
    """Expected calibration error (Guo et al., ICML 2017) of the likeliest class, in [0, 1].

    Args:
        probabilities: (n, C), rows sum to one.
        labels: (n,) int, places of the right classes.
        bins: equally wide ones over the confidence.

    Raises:
        ShapeError: if the shapes do not fit together.
        MissingExtra: without torchmetrics.
    """
    functional = require(
        "torchmetrics.functional.classification", extra="evaluate", purpose="a calibration error"
    )
    likely = torch.as_tensor(np.asarray(probabilities), dtype=torch.float32)
    right = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    if likely.ndim != 2 or right.shape != likely.shape[:1]:
        raise ShapeError(
            f"probabilities (n, C) go with labels (n,), not {tuple(likely.shape)} with {tuple(right.shape)}"
        )
    error = functional.multiclass_calibration_error(
        likely, right, num_classes=likely.shape[1], n_bins=bins, norm="l1"
    )
    return float(error)
