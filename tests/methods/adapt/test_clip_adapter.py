"""CLIP-Adapter bends features as its equations say, and not at all at ratio 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import ConfigError
from clipworks.methods.adapt import clip_adapter
from clipworks.methods.adapt.clip_adapter import ClipAdapter
from clipworks.methods.adapt.zero_shot import ZeroShot

NAMES = ["cat", "dog", "fish"]
WIDTH = 16
Y = np.arange(24) % 3


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, WIDTH, generator=generator) + 2 * torch.eye(WIDTH)[Y]


def fitted(clip: Clip, **settings: Any) -> ClipAdapter:
    return ClipAdapter(clip, NAMES, **{"epochs": 5, "progress": False, **settings}).fit(features(), Y)


def test_at_ratio_0_it_is_zero_shot(clip: Clip) -> None:
    expected = ZeroShot(clip, NAMES).fit().logits(features(1))
    torch.testing.assert_close(fitted(clip, ratio=0).logits(features(1)), expected, rtol=0, atol=1e-5)
    assert (fitted(clip, ratio=0.5).logits(features(1)) - expected).abs().max() > 1e-2


def test_logits_are_the_formula_and_blind_to_the_features_length(clip: Clip) -> None:
    adapter, f = fitted(clip, ratio=0.3, lr=0.01), features(1)
    first, second = adapter.module_[0].weight.detach(), adapter.module_[2].weight.detach()
    assert first.shape == (WIDTH // 4, WIDTH)
    bent = (second @ (first @ f.mT).clamp(min=0)).clamp(min=0).mT  # of raw features
    star = 0.3 * bent + 0.7 * f
    texts = ZeroShot(clip, NAMES).fit().class_features()
    expected = float(clip.scale.detach().exp()) * unit(star) @ texts.mT
    for length in (1, 7):
        torch.testing.assert_close(adapter.logits(length * f), expected, rtol=0, atol=1e-5)
    assert adapter.trainable_parameters == 2 * WIDTH * WIDTH // 4


def test_a_feature_is_only_ever_added_to(clip: Clip) -> None:
    adapter, f = fitted(clip, ratio=0.4, lr=0.1), unit(features(1))
    with torch.no_grad():
        added = 0.4 * adapter.module_(f)
        torch.testing.assert_close(adapter.adapted(f), unit(added + 0.6 * f))
    assert (added >= 0).all()
    assert added.any()


def test_training_lowers_the_loss_and_serves_other_names(clip: Clip) -> None:
    adapter = fitted(clip, ratio=0.8, epochs=60, lr=0.02)
    assert adapter.losses_[-1] < 0.9 * adapter.losses_[0]
    assert adapter.for_classes(["owl", "bee"]).logits(features()).shape == (24, 2)


def test_validation_data_choose_the_first_best_ratio(clip: Clip) -> None:
    held = (features(5), Y)
    scores = [fitted(clip, ratio=ratio, lr=0.05).score(*held) for ratio in clip_adapter.RATIOS]
    assert len(set(scores)) > 1
    chosen = ClipAdapter(clip, NAMES, ratio="auto", lr=0.05, epochs=5, progress=False)
    chosen.fit(features(), Y, validation=held)
    assert chosen.ratio_ == clip_adapter.RATIOS[int(np.argmax(scores))]
    same = fitted(clip, ratio=chosen.ratio_, lr=0.05)
    assert torch.equal(chosen.logits(features()), same.logits(features()))


@pytest.mark.parametrize("wrong", [{"ratio": 1.5}, {"ratio": "best"}, {"reduction": 17}])
def test_settings_without_meaning_are_named(clip: Clip, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        fitted(clip, **wrong)
