"""scikit-learn's own checks of an estimator, and its tools, on feature input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

from clipworks.core.clip import unit
from clipworks.data.randomness import key_number
from clipworks.methods.adapt.base import Adapter, TrainedAdapter
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.nearest_mean import NearestMean
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.shots import Shots


def spelled(names: tuple[str, ...], width: int) -> Tensor:
    """Stands in for a text tower of any width: unit vectors drawn from the spelling of the names."""
    drawn = []
    for name in names:
        generator = torch.Generator().manual_seed(key_number(name) >> 2)
        drawn.append(torch.randn(width, generator=generator))
    return unit(torch.stack(drawn))


@dataclass(eq=False, repr=False, kw_only=True)
class AnyWidthZeroShot(ZeroShot):
    """Zero-shot whose text vectors have the width of the features that the checks make up."""

    reads_text: ClassVar[bool] = False

    def _class_features(self) -> Tensor:
        return spelled(tuple(self.texts_.names), self.n_features_in_)


@dataclass(eq=False, repr=False, kw_only=True)
class LearnedHead(TrainedAdapter):
    """The least a trained method can be: class vectors, from those of the names."""

    lr: float = 0.05
    epochs: int = 40
    reads_text: ClassVar[bool] = False

    def _prepare(self, shots: Shots | None) -> nn.Module:
        return nn.ParameterDict({"classes": spelled(tuple(self.texts_.names), self.n_features_in_)})

    def _class_features(self) -> Tensor:
        return unit(self.module_["classes"])


REPEATS = "check_sample_weight_equivalence_on_dense_data"
EXCEPTIONS: dict[type[Adapter], dict[str, str]] = {
    LearnedHead: {REPEATS: "batches of gradient descent depend on how often an example is repeated"},
    NearestMean: {REPEATS: "equal to 1e-6, not to the 1e-7 asked for: weights are kept in fp32"},
    AnyWidthZeroShot: {
        "check_classifiers_one_label_sample_weights": "labels only name the classes; one whose examples all "
        "weigh nothing stays a class"
    },
}


@parametrize_with_checks(
    [LinearProbe(iterations=100), NearestMean(), AnyWidthZeroShot(), LearnedHead()],
    expected_failed_checks=lambda estimator: EXCEPTIONS.get(type(estimator), {}),
)
def test_an_estimator_is_one_by_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def blobs(seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    y = np.repeat(["a", "b", "c"], 12)
    centers = generator.normal(size=(3, 8))[np.repeat(np.arange(3), 12)]
    return (centers + 0.1 * generator.normal(size=(36, 8))).astype(np.float32), y


@pytest.mark.parametrize("estimator", [LinearProbe(), NearestMean(), LearnedHead()], ids=repr)
def test_tables_in_every_form_give_one_answer(estimator: Adapter) -> None:
    X, y = blobs()
    expected = estimator.fit(X, y).predict_proba(X)
    for form in (
        torch.from_numpy(X),
        X.tolist(),
        X.astype(np.float64),
        torch.from_numpy(X).bfloat16().float(),
    ):
        assert np.allclose(estimator.fit(form, list(y)).predict_proba(form), expected, atol=2e-2)
    views = torch.from_numpy(X)[:, None].expand(-1, 3, -1)
    if not isinstance(
        estimator, LinearProbe
    ):  # three equal views weigh three times as much against its penalty
        assert np.allclose(estimator.fit(views, y).predict_proba(X), expected, atol=1e-5)


@pytest.mark.parametrize("estimator", [LinearProbe(), NearestMean(), LearnedHead(epochs=5)], ids=repr)
def test_pipelines_searches_and_scores_work(estimator: Adapter) -> None:
    X, y = blobs()
    assert cross_val_score(estimator, torch.from_numpy(X), y, cv=3).mean() > 0.9
    assert cross_val_score(estimator, X, y, cv=3, scoring="neg_log_loss").shape == (3,)
    assert make_pipeline(Normalizer(), estimator).fit(X, y).score(X, y) > 0.9
    grid = {"seed": [0, 1]} if not isinstance(estimator, LinearProbe) else {"C": [0.1, 10.0]}
    search = GridSearchCV(estimator, grid, cv=3, scoring=make_scorer(accuracy_score)).fit(X, y)
    assert search.best_score_ > 0.9


def test_pictures_go_through_scikit_learns_tools(tiny_clip: Callable[..., Any]) -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(12)]
    y = ["a", "b"] * 6
    probe = NearestMean(tiny_clip())
    for X in (pictures, np.stack(pictures), torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)):
        assert cross_val_score(probe, X, y, cv=2).shape == (2,)
