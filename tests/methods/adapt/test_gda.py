"""GDA is what its equations say, against scikit-learn's discriminant analysis and naive loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import ConfigError
from clipworks.methods.adapt import gda
from clipworks.methods.adapt.gda import GDA, Statistics, UnsupervisedGDA
from clipworks.methods.adapt.zero_shot import ZeroShot

NAMES = ["cat", "dog", "fish"]
Y = np.arange(24) % 3
WIDTH = 16


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(count: int = 24, views: int = 1, seed: int = 0) -> Tensor:
    """Three overlapping clouds with a common direction, raw (n, V, 16) fp64; views of a picture are alike."""
    centers = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, WIDTH, generator=generator, dtype=torch.float64)
    wobble = torch.randn(count, views, WIDTH, generator=generator, dtype=torch.float64)
    return 3 * (centers[np.arange(count) % 3][:, None] + 1.0 + noise + 0.3 * wobble)


def centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=1, keepdim=True)


def naive(X: Tensor, y: Tensor, classes: int = 3) -> tuple[Tensor, Tensor, Tensor, float]:
    """μ (C, D), S (D, D), P (D, D) and t, by loops and an explicit inverse, of unit vectors (N, D)."""
    means = torch.stack([X[y == label].mean(dim=0) for label in range(classes)])
    scatter = torch.zeros(X.shape[1], X.shape[1], dtype=X.dtype)
    for vector, label in zip(X, y, strict=True):
        scatter += torch.outer(vector - means[label], vector - means[label])
    ridge = float(scatter.trace()) / (len(X) - 1)
    identity = torch.eye(X.shape[1], dtype=X.dtype)
    return means, scatter, X.shape[1] * torch.linalg.inv(scatter + ridge * identity), ridge


def scores(X: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    return centered(X @ precision @ means.T - 0.5 * ((means @ precision) * means).sum(dim=1))


def test_without_weight_it_is_zero_shot_bit_for_bit(clip: Clip) -> None:
    X = features().float()
    test = features(seed=9)[:, 0].float()
    found = GDA(clip, NAMES, alpha=0).fit(X, Y).logits(test)
    assert torch.equal(found, ZeroShot(clip, NAMES).fit(X, Y).logits(test))


def test_it_is_the_naive_formula_with_weights_as_repetitions(clip: Clip) -> None:
    X, weights = features(views=2), np.random.default_rng(0).integers(0, 3, 24)
    flat = unit(X).repeat_interleave(torch.from_numpy(weights), dim=0).flatten(0, 1)
    y = torch.from_numpy(Y.repeat(weights)).repeat_interleave(2)
    means, _, precision, _ = naive(flat, y)
    test = features(seed=9)[:, 0]
    fitted = GDA(clip, NAMES, alpha=0.5).fit(X, Y, sample_weight=weights)
    expected = scores(unit(test), means, precision)
    # The base keeps weights in fp32.
    torch.testing.assert_close(centered(fitted.gaussian_logits(test)), expected, rtol=1e-5, atol=1e-5)
    zero_shot = ZeroShot(clip, NAMES).fit().logits(test)
    torch.testing.assert_close(
        centered(fitted.logits(test) - zero_shot), 0.5 * expected, rtol=1e-5, atol=1e-4
    )
    assert fitted.likelihood_ == pytest.approx(0.5 * WIDTH / (len(flat) - 1))


def test_it_is_scikit_learns_discriminant_with_that_covariance(clip: Clip) -> None:
    X = unit(features()[:, 0])
    ridge = naive(X, torch.from_numpy(Y))[3]

    class Ridged:
        def fit(self, own: Any) -> Ridged:
            self.covariance_ = np.cov(own.T, bias=True) + ridge / len(X) * np.eye(WIDTH)
            return self

    peer = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Ridged(), priors=[1 / 3] * 3)
    expected = torch.from_numpy(peer.fit(X.numpy(), Y).decision_function(X.numpy()))
    found = GDA(clip, NAMES, alpha=1.0).fit(X, Y).gaussian_logits(X)
    torch.testing.assert_close(centered(found) * len(X) / WIDTH, centered(expected), rtol=1e-9, atol=1e-9)


def classifier(X: Tensor, y: Tensor, form: Any = "ks") -> tuple[Tensor, Tensor]:
    statistics = Statistics.of(X, y, torch.ones(len(X)), 3)
    means = statistics.means
    return gda.discriminant(means, gda.ridged(statistics.scatter, statistics.total, means, form))


def test_gaussian_logits_do_not_see_rotation_scale_or_translation() -> None:
    X, y = unit(features()[:, 0]), torch.from_numpy(Y)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).double())[0]
    W, b = classifier(X, y)
    expected = X @ W.T + b
    for other in (X @ rotation, 7 * X, X + torch.arange(WIDTH) / 10):
        W, b = classifier(other, y)
        torch.testing.assert_close(centered(other @ W.T + b), centered(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["isotropic", "diagonal"])
def test_controls_take_less_of_the_covariance(form: str) -> None:
    X, y = unit(features()[:, 0]), torch.from_numpy(Y)
    means, S, _, ridge = naive(X, y)
    less = S.diagonal() if form == "diagonal" else S.diagonal().mean().expand(WIDTH)
    W, b = classifier(X, y, form)
    expected = scores(X, means, WIDTH * torch.diag(1 / (less + ridge)))
    torch.testing.assert_close(centered(X @ W.T + b), expected, rtol=1e-9, atol=1e-9)


def test_repeated_features_are_counted_as_if_they_were_independent() -> None:
    X, y, r = unit(features()[:, 0]), torch.from_numpy(Y), 4
    means, S, _, ridge = naive(X, y)
    N, identity = len(X), torch.eye(WIDTH, dtype=X.dtype)
    smaller = ridge * r * (N - 1) / (r * N - 1)
    expected = scores(X, means, WIDTH * torch.linalg.inv(r * S + smaller * identity))
    W, b = classifier(X.repeat(r, 1), y.repeat(r))
    torch.testing.assert_close(centered(X @ W.T + b), expected, rtol=1e-9, atol=1e-9)
    W, b = classifier(X, y)
    assert (centered(X @ W.T + b) - expected).abs().max() > 1
    assert torch.linalg.cond(S + ridge * identity) <= N


def test_statistics_add_up_over_shards_and_subtract_for_folds() -> None:
    X, y, ones = unit(features(count=12)[:, 0]), torch.from_numpy(Y[:12]), torch.ones(12)
    whole, late = Statistics.of(X, y, ones, 3), Statistics.of(X[5:], y[5:], ones[5:], 3)
    early = Statistics.of(X[:5], y[:5], ones[:5], 3)
    for one, other in ((late + early, whole), (whole - late, early)):
        for name in ("counts", "sums", "second", "scatter"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-12)
    # Fewer examples than dimensions, as in this case, are enough.
    assert all(tensor.isfinite().all() for tensor in classifier(X, y))


def test_the_error_of_two_gaussians_tends_to_bayes() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    shift = 0.5 * torch.randn(8, generator=generator, dtype=torch.float64) @ root
    y = torch.arange(20_000) % 2
    X = torch.randn(20_000, 8, generator=generator, dtype=torch.float64) @ root + y[:, None] * shift
    distance = float((shift @ torch.linalg.inv(root.T @ root) @ shift).sqrt())
    bayes = 0.5 * math.erfc(distance / 2 / math.sqrt(2))

    def error(form: Any) -> float:
        statistics = Statistics.of(X[:10_000], y[:10_000], torch.ones(10_000), 2)
        directions = gda.ridged(statistics.scatter, statistics.total, statistics.means, form)
        W, b = gda.discriminant(statistics.means, directions)
        return float(((X[10_000:] @ W.T + b).argmax(dim=1) != y[10_000:]).double().mean())

    assert abs(error("ks") - bayes) < 0.01
    assert error("isotropic") > bayes + 0.03


def test_one_picture_a_class_needs_views(clip: Clip) -> None:
    X = features(count=3, views=10)
    with pytest.raises(ConfigError, match="single vector"):
        GDA(clip, NAMES).fit(X[:, :1], Y[:3])
    fitted = GDA(clip, NAMES).fit(X, Y[:3])
    assert fitted.alpha_ == gda.NO_FOLDS and np.isfinite(fitted.predict_proba(X[:, 0])).all()
    with pytest.raises(ConfigError, match=r"'dog'.*one vector"):
        GDA(clip, NAMES, covariance="class-mean").fit(
            features()[[0, 1, 2, 3, 5]], ["cat", "dog", "fish", "cat", "fish"]
        )
    with pytest.raises(ConfigError, match=r"'dog'.*counts"):
        GDA(clip).fit(features()[:6], NAMES * 2, sample_weight=[1, 0, 1, 1, 0, 1])


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"alpha": "best"}, {"covariance": "oas"}])
def test_settings_without_meaning_are_named(clip: Clip, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GDA(clip, NAMES, **wrong).fit(features(), Y)


def test_validation_data_choose_the_first_best_weight(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    X, held = features(), features(count=30, seed=5)[:, 0]
    y = np.arange(30) % 3
    accuracies = [GDA(clip, NAMES, alpha=alpha).fit(X, Y).score(held, y) for alpha in gda.ALPHAS]
    fitted = GDA(clip, NAMES).fit(X, Y, validation=(held, y))
    assert len(set(accuracies)) > 1
    assert fitted.alpha_ == gda.ALPHAS[int(np.argmax(accuracies))]
    monkeypatch.setattr(GDA, "_right", lambda *_: torch.zeros(len(gda.ALPHAS)))
    assert GDA(clip, NAMES).fit(X, Y, validation=(held, y)).alpha_ == 0.1


def test_folds_choose_the_likelihoods_weight_with_all_views_of_a_picture_away(
    clip: Clip,
) -> None:
    X, right = features(views=3), np.zeros(len(gda.LIKELIHOODS))
    for fold in range(4):
        away = np.arange(24) // 3 % 4 == fold  # pictures of a class take turns
        N = 3 * (~away).sum()
        for place, likelihood in enumerate(gda.LIKELIHOODS):
            alpha = likelihood * (N - 1) / WIDTH
            one = GDA(clip, NAMES, alpha=alpha).fit(X[~away], Y[~away])
            right[place] += (one.predict(X[away].flatten(0, 1)) == Y[away].repeat(3)).sum()
    fitted = GDA(clip, NAMES).fit(X, Y)
    assert len(set(right)) > 1
    assert fitted.likelihood_ == pytest.approx(gda.LIKELIHOODS[int(right.argmax())])
    assert fitted.alpha_ == pytest.approx(fitted.likelihood_ * (72 - 1) / WIDTH)
    # After the search the classifier is that of all examples.
    same = GDA(clip, NAMES, alpha=1.0).fit(X, Y)
    assert torch.equal(fitted.weights_, same.weights_)


@pytest.mark.parametrize(
    ("pictures", "views", "folds"), [(1, 9, None), (2, 1, None), (2, 2, 2), (3, 1, 3), (9, 1, 4)]
)
def test_no_fold_leaves_a_class_without_covariance(pictures: int, views: int, folds: int | None) -> None:
    labels = torch.tensor([0, 1] * pictures + [0, 0])
    found = gda.folds_of(labels, torch.bincount(labels), views)
    assert (None if found is None else int(found.max()) + 1) == folds


def test_class_mean_is_the_pseudo_inverse_of_the_mean_covariance(clip: Clip) -> None:
    """Unequal classes tell it from the pooled one; one dimension without variance tells its cut."""
    X = features(count=60)
    X[..., 0] = 0
    labels = np.array([0] * 30 + [1] * 20 + [2] * 10)
    z = unit(X[:, 0])
    own = [np.cov(z[labels == label].numpy().T) for label in range(3)]
    precision = torch.linalg.pinv(torch.from_numpy(np.mean(own, axis=0)), rtol=1e-9)
    means = torch.stack([z[labels == label].mean(dim=0) for label in range(3)])
    fitted = GDA(clip, NAMES, alpha=1.0, covariance="class-mean").fit(X, labels)
    expected = scores(z, means, precision)
    torch.testing.assert_close(centered(fitted.gaussian_logits(z)), expected, rtol=1e-6, atol=1e-6)
    assert fitted.likelihood_ == fitted.alpha_


def test_new_classes_are_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, X = (unit(torch.randn(n, 3, generator=generator, dtype=torch.float64)) for n in (4, 9))
    means, precision = [], torch.zeros(3, 3, dtype=torch.float64)
    for text in texts:
        near = X[(X @ text).argsort(descending=True)[:2]]
        means.append((near[0] + near[1] + text) / 3)
        S = sum(torch.outer(z - text, z - text) for z in near)
        precision += 3 * torch.linalg.inv(S + S.trace() / 1 * torch.eye(3)) / 4
    found = gda.stand_ins(texts, X, neighbors=2, copies=1)
    torch.testing.assert_close(found[0], torch.stack(means))
    torch.testing.assert_close(found[1], torch.stack(means) @ precision)


def test_other_names_are_columns_if_known_and_stand_ins_if_new(clip: Clip) -> None:
    X, test = features(), features(seed=9)[:, 0]
    fitted = GDA(clip, NAMES, alpha=1.0).fit(X, Y)
    two = fitted.for_classes(["fish", "cat"])
    expected = fitted.logits(test)[:, [2, 0]]  # integers count the names as given
    # The text tower runs in fp32, in batches of other sizes.
    torch.testing.assert_close(two.logits(test).softmax(dim=1), expected.softmax(dim=1), rtol=1e-5, atol=1e-5)
    one, other = fitted.for_classes(["owl", "bee", "ant"]), fitted.for_classes(["ant", "owl", "bee"])
    assert np.allclose(one.predict_proba(test)[:, [2, 0, 1]], other.predict_proba(test))
    assert one.alpha_ == fitted.likelihood_
    texts = one.class_features().double()
    kept = unit(X[:, 0]).half().double()
    W, b = gda.discriminant(*gda.stand_ins(texts, kept))
    zero_shot = ZeroShot(clip, ["ant", "bee", "owl"]).fit().logits(test)[:, [2, 1, 0]]
    expected = zero_shot + fitted.likelihood_ * (unit(test) @ W.T + b)
    torch.testing.assert_close(one.logits(test), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ConfigError, match="keep_features"):
        GDA(clip, NAMES, alpha=1.0, keep_features=False).fit(X, Y).for_classes(["ant", "bee"])


def test_maximization_averages_covariances_over_classes() -> None:
    """Against loops; blobs of unequal size and spread tell the class mean from the pooled covariance."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    z[20:] *= 3
    gamma = torch.rand(30, 3, generator=generator, dtype=torch.float64)
    gamma[20:, 2] += 5
    gamma = gamma / gamma.sum(dim=1, keepdim=True)
    gamma = torch.cat([gamma, torch.zeros(30, 1)], dim=1)  # a class of which nothing is left
    before = torch.arange(16.0, dtype=torch.float64).view(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    means, covariance = gda.maximization(z, gamma, before)
    for k in range(3):
        mean = (gamma[:, k, None] * z).sum(dim=0) / gamma[:, k].sum()
        torch.testing.assert_close(means[k], mean)
        for i in range(30):
            expected += gamma[i, k] * torch.outer(z[i] - mean, z[i] - mean) / gamma[:, k].sum() / 3
    torch.testing.assert_close(covariance, expected)
    assert torch.equal(means[3], before[3])


def test_expectation_maximization_labels_separated_blobs_in_any_order(clip: Clip) -> None:
    texts = ZeroShot(clip, NAMES).fit().class_features().double()
    apart = unit(texts - texts.mean(dim=0))  # blobs on their texts' side of a common mean
    noise = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = np.arange(60) % 3
    X = texts.mean(dim=0) + 0.5 * apart[y] + 0.05 * noise
    fitted = UnsupervisedGDA(clip, NAMES).fit(X)
    assert [NAMES[label] for label in y] == list(fitted.predict(X))
    assert fitted.alpha_ == (60 - 1) / WIDTH and fitted.n_iter_ <= 20
    order = np.random.default_rng(0).permutation(60)
    other = UnsupervisedGDA(clip, NAMES).fit(X[order])
    assert np.allclose(other.predict_proba(X), fitted.predict_proba(X), atol=1e-8)
    with pytest.raises(ConfigError, match="without labels"):
        UnsupervisedGDA(clip, NAMES).fit(X, y)
    with pytest.raises(ConfigError, match="alike"):
        UnsupervisedGDA(clip, NAMES).fit(X[:1].repeat(5, 1))
