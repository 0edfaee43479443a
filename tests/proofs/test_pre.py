"""The proof of PRE: its experiment measures every arm, and its controls are what they are named."""

from __future__ import annotations

import torch

from clipworks.checkpoints.zoo import load
from clipworks.data.captions import ClassTexts
from clipworks.methods.adapt.pre import PRE
from clipworks.proofs import pre as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size(1, views=1, epochs=2, test=40)


def test_the_experiment_measures_every_arm() -> None:
    outcome = proof.experiment(SEED, TINY)
    found = outcome.details["arms"]
    assert found.keys() == proof.arms(load("seedling"), ClassTexts(["a", "b"]), 1, SEED).keys()
    assert all(0 <= value <= 1 for arm in found.values() for value in arm.values())
    assert outcome.method == found["pre"]["new"]
    assert outcome.baseline == found[outcome.details["best_coop"]]["new"]


def test_the_controls_begin_where_pre_begins_and_learn_less() -> None:
    clip = load("seedling")
    X = torch.randn(4, clip.width, generator=torch.Generator().manual_seed(0))
    arms = proof.arms(clip, ClassTexts(["cat", "dog"]), 1, SEED)
    starts, counts = {}, {}
    for name in ("pre", "frozen_encoder", "same_start", "gain_from_zero"):
        arm = arms[name].set_params(seed=SEED, progress=False, lr=1e-12).fit(X, [0, 1, 0, 1])
        assert isinstance(arm, PRE)
        starts[name], counts[name] = arm.context_, arm.trainable_parameters
    # The first epoch's rate is 1e-5 whatever lr is; the start is what is left to tell apart.
    for name in ("frozen_encoder", "same_start"):
        torch.testing.assert_close(starts[name], starts["pre"], rtol=0, atol=1e-4)
        assert counts[name] == 4 * clip.text.width  # type: ignore[operator]
    assert not torch.allclose(starts["gain_from_zero"], starts["pre"], atol=1e-2)
    assert counts["gain_from_zero"] == counts["pre"] + 1
