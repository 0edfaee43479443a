"""Tip-Adapter is its formula with one-hot values, and its limits are classifiers that everybody knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import ConfigError
from clipworks.methods.adapt import tip_adapter
from clipworks.methods.adapt.tip_adapter import TipAdapter, TipAdapterF
from clipworks.methods.adapt.zero_shot import ZeroShot

NAMES = ["cat", "dog", "fish"]
WIDTH = 16
Y = np.arange(24) % 3


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(seed: int = 0, views: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clouds = torch.randn(24, 1, WIDTH, generator=generator) + 2 * torch.eye(WIDTH)[Y][:, None]
    return clouds + 0.3 * torch.randn(24, views, WIDTH, generator=generator)


def test_logits_are_the_formula_with_one_hot_values(clip: Clip) -> None:
    X, f = features(views=4), features(1)[:, 0]
    keys = X.mean(dim=1) / X.mean(dim=1).norm(dim=1, keepdim=True)
    values = F.one_hot(torch.from_numpy(Y), 3).float()
    zero_shot = ZeroShot(clip, NAMES).fit().logits(f)
    expected = zero_shot + 2.5 * torch.exp(-3.0 * (1 - unit(f) @ keys.mT)) @ values
    tip = TipAdapter(clip, NAMES, alpha=2.5, beta=3.0).fit(X, Y)
    torch.testing.assert_close(tip.logits(f), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(tip.logits(7 * f), expected, rtol=0, atol=1e-5)


def test_without_memory_it_is_zero_shot(clip: Clip) -> None:
    f = features(1)[:, 0]
    zero_shot = ZeroShot(clip, NAMES).fit().logits(f)
    assert torch.equal(TipAdapter(clip, NAMES, alpha=0).fit(features(), Y).logits(f), zero_shot)
    small = TipAdapter(clip, NAMES, alpha=1e-6).fit(features(), Y).logits(f)
    torch.testing.assert_close(small, zero_shot, rtol=0, atol=1e-5)


def test_a_blunt_memory_counts_shots_and_a_sharp_one_is_the_nearest_neighbor(clip: Clip) -> None:
    X, f = features(), features(1)[:, 0]
    zero_shot = ZeroShot(clip, NAMES).fit().logits(f)
    blunt = TipAdapter(clip, NAMES, alpha=2.0, beta=0.0).fit(X[:-2], Y[:-2])
    shots = torch.from_numpy(np.bincount(Y[:-2])).float()
    torch.testing.assert_close(blunt.logits(f) - zero_shot, (2 * shots).expand(24, 3), rtol=0, atol=1e-4)
    sharp = TipAdapter(clip, NAMES, alpha=1e150, beta=300.0).fit(X.double(), Y)
    nearest = (unit(f.double()) @ unit(X[:, 0].double()).mT).argmax(dim=1)
    assert (sharp.predict(f.double()) == Y[nearest]).all()


def test_sample_weights_are_values(clip: Clip) -> None:
    X, f = features(), features(1)[:, 0]
    weights = np.random.default_rng(0).random(24)
    weights[0] = 0
    tip = TipAdapter(clip, NAMES).fit(X, Y, sample_weight=weights)
    values = F.one_hot(torch.from_numpy(Y), 3) * torch.from_numpy(weights / weights.mean())[:, None]
    expected = torch.exp(unit(f) @ unit(X[:, 0]).mT - 1) @ values.float()
    found = tip.logits(f) - ZeroShot(clip, NAMES).fit().logits(f)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_validation_data_choose_as_the_authors_loop_does(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tip_adapter, "BETAS", 12)
    X, held = features(), features(5)[:, 0]
    zero_shot, best, expected = ZeroShot(clip, NAMES).fit().logits(held), 0, (0.0, 0.0)
    labels = torch.from_numpy(Y)
    for i in range(12):
        for j in range(20):
            beta, alpha = i * (6 - 0.1) / 12 + 0.1, j * (3 - 0.1) / 20 + 0.1
            read = torch.exp(-(beta - beta * unit(held) @ unit(X[:, 0]).mT)) @ F.one_hot(labels, 3).float()
            right = int(((zero_shot + alpha * read).argmax(dim=1) == labels).sum())
            if right > best:
                best, expected = right, (alpha, beta)
    tip = TipAdapter(clip, NAMES, search=(3, 6)).fit(X, Y, validation=(held, Y))
    assert (tip.alpha_, tip.beta_) == pytest.approx(expected)
    assert tip.score(held, Y) == pytest.approx(best / 24)
    tied = TipAdapter(clip, NAMES, search=(3, 6)).fit(X, Y, validation=(held[:2], Y[:2]))
    assert tied.alpha_ <= tip.alpha_ or tied.beta_ <= tip.beta_


def test_training_starts_at_the_untrained_memory_and_moves_only_its_keys(clip: Clip) -> None:
    X, f = features(views=3), features(1)[:, 0]
    tip = TipAdapter(clip, NAMES, alpha=2.0, beta=5.0).fit(X, Y)
    still = TipAdapterF(clip, NAMES, alpha=2.0, beta=5.0, lr=1e-12, epochs=1, progress=False).fit(X, Y)
    torch.testing.assert_close(still.logits(f), tip.logits(f), rtol=0, atol=1e-5)
    trained = TipAdapterF(clip, NAMES, alpha=2.0, beta=5.0, lr=0.01, epochs=30, progress=False).fit(X, Y)
    assert trained.losses_[-1] < trained.losses_[0]
    assert trained.trainable_parameters == 24 * WIDTH
    assert (trained.memory.keys.norm(dim=1) - 1).abs().max() > 1e-3
    assert torch.equal(trained.weights_, still.weights_)
    assert (trained.alpha_, trained.beta_) == (2.0, 5.0)


def test_after_training_validation_data_choose_with_the_trained_keys(clip: Clip) -> None:
    X, held = features(views=3), (features(5)[:, 0], Y)
    trained = TipAdapterF(clip, NAMES, lr=0.01, progress=False).fit(X, Y, validation=held)
    plain = TipAdapterF(clip, NAMES, lr=0.01, progress=False).fit(X, Y)
    assert torch.equal(trained.memory.keys, plain.memory.keys)
    assert trained.score(*held) >= plain.score(*held)
    zero_shot = ZeroShot(clip, NAMES).fit().logits(held[0])
    chosen = tip_adapter.search(plain.memory, zero_shot, held[0], torch.from_numpy(Y), (5.0, 12.0))
    assert (trained.alpha_, trained.beta_) == chosen


@pytest.mark.parametrize("method", [TipAdapter, TipAdapterF])
@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"beta": -0.5}, {"search": (0.1, 5)}])
def test_settings_without_meaning_are_named(clip: Clip, method: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        method(clip, NAMES, **wrong).fit(features(), Y)
