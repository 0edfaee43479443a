"""The four baselines are what their equations say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import ConfigError
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.nearest_mean import NearestMean
from clipworks.methods.adapt.wise_ft import WiSEFT
from clipworks.methods.adapt.zero_shot import ZeroShot


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


NAMES = ["cat", "dog", "fish"]
Y = np.arange(24) % 3


def features(views: int = 1, seed: int = 0) -> Tensor:
    """Three overlapping clouds of raw features (24, V, 16), fp64."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(24, views, 16, generator=generator, dtype=torch.float64)
    return 3 * (centers[Y % 3][:, None] + 1.5 * noise)


def test_zero_shot_is_classify(clip: Clip) -> None:
    pictures = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    estimator = ZeroShot(clip, NAMES).fit()
    expected = clip.classify(pictures, NAMES).probabilities.numpy()
    assert np.allclose(estimator.predict_proba(pictures), expected, atol=1e-6)
    # Examples name the classes, and change nothing else.
    other = ZeroShot(clip).fit(list(pictures), ["cat", "dog", "fish", "cat", "dog"])
    assert np.allclose(other.predict_proba(pictures), expected, atol=1e-6)


def test_nearest_mean_is_the_naive_loop() -> None:
    X, weights = features(views=2), np.random.default_rng(0).uniform(0.1, 2, 24)
    means = []
    for label in range(3):
        total = torch.zeros(16, dtype=torch.float64)
        for i in np.flatnonzero(label == Y):
            for view in X[i]:
                total += weights[i] * view / view.norm()
        means.append(total / total.norm())
    test = features(seed=9)[:, 0]
    cosines = (test / test.norm(dim=1, keepdim=True)) @ torch.stack(means).T
    estimator = NearestMean().fit(X, Y, sample_weight=weights)
    assert torch.allclose(estimator.class_features(), torch.stack(means), atol=1e-7)
    assert np.allclose(estimator.logits(test), 100 * cosines, atol=1e-5)


@pytest.mark.parametrize("c", [0.1, 31.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_probe_is_at_scikit_learns_optimum(c: float, weighted: bool) -> None:
    X = features()[:, 0]
    weights = np.random.default_rng(0).uniform(0.1, 2, 24) if weighted else None
    peer = LogisticRegression(C=c, max_iter=10_000, tol=1e-10).fit(unit(X).numpy(), Y, weights)
    ours = LinearProbe(C=c, tolerance=1e-9).fit(X, Y, sample_weight=weights)
    test = features(seed=9)[:, 0]
    assert np.allclose(ours.predict_proba(test), peer.predict_proba(unit(test).numpy()), atol=1e-5)
    assert np.allclose(ours.coef_.numpy(), peer.coef_, atol=1e-3 * abs(peer.coef_).max())


def test_the_probes_coordinates_save_iterations() -> None:
    """Features with a spread of scales, as CLIP's: at the optimum in half the plain form's iterations."""
    generator = np.random.default_rng(0)
    y = np.arange(400) % 8
    X = generator.normal(size=(8, 32))[y] + generator.normal(size=(400, 32))
    X = X * 10.0 ** -np.linspace(0, 2, 32)
    X[:, 0] += 3  # and a common direction
    X /= np.linalg.norm(X, axis=1, keepdims=True)

    def loss(weights: Any, intercept: Any) -> float:
        logs = (torch.from_numpy(X @ weights.T) + torch.from_numpy(intercept)).log_softmax(dim=1)
        return float(31.6 * -logs[np.arange(400), y].sum() + (weights**2).sum() / 2)

    def peer(iterations: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=31.6, max_iter=iterations, tol=0.0).fit(X, y)
        return loss(fitted.coef_, fitted.intercept_)

    ours = LinearProbe(iterations=15, tolerance=0.0).fit(X, y)
    least = peer(10_000)
    assert loss(ours.coef_.numpy(), ours.intercept_.numpy()) < 1.001 * least < peer(30)


def test_the_probe_searches_c_on_validation_data_and_keeps_the_training_data_for_the_fit() -> None:
    X, held = features()[:, 0], features(seed=3)[:, 0]
    probe = LinearProbe(C="auto").fit(X, Y, validation=(held, Y))
    at_c = LinearProbe(C=probe.c_).fit(X, Y)
    assert np.allclose(probe.predict_proba(held), at_c.predict_proba(held), atol=1e-6)
    scores = [LinearProbe(C=10.0**power).fit(X, Y).score(held, Y) for power in range(-6, 7, 2)]
    assert probe.score(held, Y) >= max(scores)
    alone = LinearProbe(C="auto").fit(X, Y)
    assert np.allclose(
        alone.predict_proba(held), LinearProbe(C=alone.c_).fit(X, Y).predict_proba(held), atol=1e-6
    )
    for wrong in (0, -1.0, "best"):
        with pytest.raises(ConfigError, match="C must be"):
            LinearProbe(C=wrong).fit(X, Y)  # type: ignore[arg-type]


def pictures() -> Tensor:
    return torch.randint(
        0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def tuned(clip: Clip) -> WiSEFT:
    return WiSEFT(clip, NAMES, lr=1e-3, epochs=2, batch_size=8).fit(pictures(), Y)


def test_wise_ft_goes_from_zero_shot_to_fine_tuned(clip: Clip, tuned: WiSEFT) -> None:
    X = pictures()[:6]
    at_zero = tuned.set_params(alpha=0.0).predict_proba(X)
    assert np.allclose(at_zero, ZeroShot(clip, NAMES).fit().predict_proba(X), atol=1e-6)
    with torch.no_grad():
        vectors = unit(tuned.module_["image"](X))
        expected = (tuned.scale * vectors @ tuned.module_["head"].weight.T).softmax(dim=1)
    assert np.allclose(tuned.set_params(alpha=1.0).predict_proba(X), expected, atol=1e-6)
    assert abs(expected.numpy() - at_zero).max() > 1e-3


def test_wise_ft_averages_every_weight(clip: Clip, tuned: WiSEFT) -> None:
    tuned.set_params(alpha=0.3)
    mixed, first, last = (
        tuned._tower(),
        dict(clip.image.named_parameters()),
        dict(tuned.module_["image"].named_parameters()),
    )
    assert mixed.keys() == first.keys()
    for name, weight in mixed.items():
        assert torch.allclose(weight, 0.7 * first[name] + 0.3 * last[name], atol=1e-7), name
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert len(moved) == len(first)


def test_wise_ft_on_features_learns_the_head_alone(clip: Clip, tmp_path: Path) -> None:
    X = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    head = WiSEFT(clip, NAMES, lr=0.01, epochs=3).fit(X, Y)
    assert head.trainable_parameters == 3 * 16
    zero, one = (head.set_params(alpha=alpha).logits(X) for alpha in (0.0, 1.0))
    assert torch.allclose(head.set_params(alpha=0.25).logits(X), 0.75 * zero + 0.25 * one, atol=1e-4)
    assert head.predict(pictures()).shape == (24,)
    head.save(tmp_path)
    loaded = Adapter.load(tmp_path, clip)
    assert np.array_equal(loaded.predict_proba(X), head.predict_proba(X))
    with pytest.raises(ConfigError, match="alpha"):
        WiSEFT(clip, NAMES, alpha=1.5).fit(X, Y)
