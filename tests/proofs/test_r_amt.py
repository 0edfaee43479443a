"""The proof of R-AMT: its experiment measures every arm, and its controls mask as much as R-AMT does."""

from __future__ import annotations

import pytest
import torch

from clipworks.checkpoints.zoo import load
from clipworks.methods.adapt.r_amt import RAMT
from clipworks.proofs import r_amt as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size(1, epochs=2, views=1, test=20)


def test_the_experiment_measures_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two epochs of one step reach the threshold at a higher rate alone.
    monkeypatch.setattr(proof, "arms", lambda clip, texts, _: {"r_amt": RAMT(clip, texts, lr=4e-3)})
    outcome = proof.experiment(SEED, TINY)
    masked = outcome.details["masked"]
    assert masked.keys() == {"r_amt", "random_mask", "smallest_weights"}
    assert len({arm["masked_share"] for arm in masked.values()}) == 1
    assert all(-1 <= arm["forgotten_new_classes"] <= 1 for arm in masked.values())
    assert outcome.method == masked["r_amt"]["accuracy"]
    zero_shot = outcome.details["on_features"]["zero_shot"]
    assert outcome.baseline == max(zero_shot, masked["random_mask"]["accuracy"])


def test_controls_mask_as_much_of_each_tensor_elsewhere() -> None:
    clip = load("seedling")
    name = "blocks.0.attention.out.weight"
    mask = torch.rand(clip.image.get_parameter(name).shape, generator=torch.Generator().manual_seed(0)) > 0.1
    random, small = proof.at_random(SEED)(name, mask), proof.smallest(clip)(name, mask)
    assert int(random.sum()) == int(mask.sum()) == int(small.sum())
    assert not torch.equal(random, mask)
    weight = clip.image.get_parameter(name).detach().abs()
    assert weight[~small].max() <= weight[small].min()


def test_blind_dropout_ignores_signs_and_keeps_as_often() -> None:
    g_a, g_b = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    blind = proof.BlindDropout(drop=1.0)._applied(g_a, g_b) != 0
    own = RAMT(drop=1.0)._applied(g_a, g_b) != 0
    assert float(blind.float().mean()) == pytest.approx(float(own.float().mean()), abs=0.01)
    agree = g_a * g_b > 0
    assert own[agree].float().mean() > 0.99
    assert float(blind[agree].float().mean()) == pytest.approx(float(blind.float().mean()), abs=0.01)
