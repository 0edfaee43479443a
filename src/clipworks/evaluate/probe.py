"""Linear probe: logistic regression on frozen image features, as in Radford et al., ICML 2021, section 3.2.

scikit-learn's logistic regression with L-BFGS, at most 1000 iterations. C, the inverse of the weight decay,
is chosen on a validation split by a search from coarse to fine over 97 values spaced evenly on a logarithmic
scale in [1e-6, 1e6], eight a decade (appendix A.3): first 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4 and 1e6, then both
sides of the best with half the distance, until the distance is an eighth of a decade. The probe that is
tested is fitted with that C on training and validation split together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clipworks.errors import DataError, ShapeError, require

STEPS_A_DECADE = 8
LOWEST, HIGHEST = -6, 6  # powers of ten
ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """A linear probe's accuracy.

    Attributes:
        accuracy: on the test split, in [0, 1].
        c: the chosen inverse of the weight decay.
        validation: accuracy on the validation split of every C that was tried, by C.
        classifier: the fitted `sklearn.linear_model.LogisticRegression`.
    """

    accuracy: float
    c: float
    validation: dict[float, float]
    classifier: Any


def linear_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> Probe:
    """Accuracy of a logistic regression on features of a frozen tower.

    Args:
        train, validation, test: features (n, D) and labels (n,) int64 each; what the image tower gives,
            as it is or of unit length.
        iterations: of L-BFGS at most.
        seed: of the solver.

    Raises:
        ShapeError: if features and labels do not fit together.
        DataError: if the training split has fewer than two classes, or a split is empty.
        MissingExtra: without scikit-learn.
    """
    linear_model = require("sklearn.linear_model", extra="evaluate", purpose="a linear probe")
    splits = {
        name: _arrays(name, *split)
        for name, split in (("train", train), ("validation", validation), ("test", test))
    }
    widths = {features.shape[1] for features, _ in splits.values()}
    if len(widths) > 1:
        raise ShapeError(f"the splits have features of different widths, {sorted(widths)}")
    if len(np.unique(splits["train"][1])) < 2:
        raise DataError("a linear probe needs at least two classes in its training split")

    def fit(features: NDArray[np.float32], labels: NDArray[np.int64], c: float) -> Any:
        classifier = linear_model.LogisticRegression(
            C=c, solver="lbfgs", max_iter=iterations, random_state=seed
        )
        with warnings.catch_warnings():
            # The protocol stops after so many iterations, converged or not.
            warnings.filterwarnings("ignore", category=_not_converged())
            return classifier.fit(features, labels)

    def score(c: float) -> float:
        return float(fit(*splits["train"], c).score(*splits["validation"]))

    c, tried = best_c(score)
    (x, y), (more_x, more_y) = splits["train"], splits["validation"]
    classifier = fit(np.concatenate((x, more_x)), np.concatenate((y, more_y)), c)
    return Probe(float(classifier.score(*splits["test"])), c, tried, classifier)


def best_c(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The C with the highest score, searched from coarse to fine, and the scores of all that were tried.

    Of equal scores the smaller C, the more regularized probe, is the better.
    """
    tried: dict[int, float] = {}  # by place on the grid, in eighths of a decade

    def look(places: list[int]) -> None:
        for place in places:
            if place not in tried and LOWEST * STEPS_A_DECADE <= place <= HIGHEST * STEPS_A_DECADE:
                tried[place] = score(_c(place))

    def best() -> int:
        return max(tried, key=lambda place: (tried[place], -place))

    step = 2 * STEPS_A_DECADE
    look(list(range(LOWEST * STEPS_A_DECADE, HIGHEST * STEPS_A_DECADE + 1, step)))
    while step > 1:
        step //= 2
        look([best() - step, best() + step])
    return _c(best()), {_c(place): tried[place] for place in sorted(tried)}


def _c(place: int) -> float:
    return float(10.0 ** (place / STEPS_A_DECADE))


def _arrays(name: str, features: Tensor, labels: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features (n, D) and labels (n,) as arrays."""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ShapeError(
            f"{name}: features must be (n, D) and labels (n,), "
            f"not {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if not len(labels):
        raise DataError(f"{name}: no examples")
    return features.detach().float().cpu().numpy(), labels.cpu().numpy()


def _not_converged() -> type[Warning]:
    from sklearn.exceptions import ConvergenceWarning

    warning: type[Warning] = ConvergenceWarning
    return warning
