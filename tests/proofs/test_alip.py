"""ALIP's experiment: its controls are what they claim to be, and its noise is the noise that it knows of."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipworks.data.randomness import Draws
from clipworks.data.world.scenes import SceneConfig, sample
from clipworks.methods.pretrain.alip import Alip
from clipworks.proofs.alip import Permuted, Reversed, area, caption_of, raw_text


def features(n: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(n, 4, generator=generator), dim=1) for _ in range(3)]


def test_permuted_weights_are_the_same_numbers_of_other_samples() -> None:
    own, other = (kind(start="batch").gates(*features()) for kind in (Alip, Permuted))
    for one, two in zip((own.sample, own.text), (other.sample, other.text), strict=True):
        assert torch.equal(one.sort().values, two.sort().values) and not torch.equal(one, two)
    pairs = {tuple(p) for p in torch.stack([own.sample, own.text, own.caption], 1).tolist()}
    assert pairs == {tuple(p) for p in torch.stack([other.sample, other.text, other.caption], 1).tolist()}


def test_the_figures_sign_weighs_up_what_fits_less() -> None:
    own, other = (kind(start="batch").gates(*features()) for kind in (Alip, Reversed))
    torch.testing.assert_close(own.text * other.text, torch.ones(40))
    assert torch.equal(own.sample, other.sample)


def test_area_is_the_share_of_pairs_in_order() -> None:
    scores, positive = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert area(scores, positive) == pytest.approx((2 + 1 + 0.5) / 4)
    assert area(scores, torch.zeros(4, dtype=torch.bool)) == 0.5


def test_texts_name_what_they_are_for() -> None:
    scene = sample(SceneConfig(count=(1, 1)), 0, 0)
    thing = scene.objects[0]
    raw = [raw_text(scene, Draws(i)) for i in range(50)]
    assert all(thing.shape in text for text in raw) and any(thing.color in text for text in raw)
    assert not any(scene.background in text for text in raw)
    assert caption_of(scene).startswith(f"a {thing.shape} ") and thing.color not in caption_of(scene)
