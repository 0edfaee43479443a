"""The proof of AMU-Tuning: its experiment measures every arm and repeats itself, its auxiliary learns."""

from __future__ import annotations

import torch

from clipworks.core.clip import unit
from clipworks.data.augment import RandomView
from clipworks.parts.contrastive import contrastive_loss
from clipworks.proofs import amu_tuning as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED, detail

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size((2,), views=2, test=20, unlabeled=16, steps=1)
SHARES = ("alpha", "epochs")  # what is no share


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    outcome = proof.experiment(SEED, TINY)
    assert outcome.details.keys() == {"2"}
    last = outcome.details["2"]
    assert all(0 <= value <= 1 for name, value in last.items() if name not in SHARES)
    assert outcome.method == last["amu"] and outcome.baseline == last["own_features"]
    assert abs(last["amu"] - last["zero_shot"] - last["corrected"] + last["spoiled"]) < 1e-6
    paths = [path.replace("16.", "2.") for path in proof.PROOF.controls]
    assert all(0 <= detail({"details": outcome.details}, path) <= 1 for path in paths)
    assert proof.experiment(SEED, TINY) == outcome


def test_the_auxiliary_tells_two_views_of_a_picture_from_those_of_others() -> None:
    # Pictures of one color each: what is left of a picture in any of its views.
    pixels = torch.randint(0, 256, (32, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8).expand(-1, -1, 64, 64).contiguous()
    view = RandomView(32, crop=(0.5, 1.0), seed=7)
    keys = [str(number) for number in range(32)]
    one, other = (view(pixels, keys, side) for side in (0, 1))

    def loss(auxiliary: proof.Auxiliary) -> float:
        with torch.no_grad():
            left, right = (unit(auxiliary.head(auxiliary(side))) for side in (one, other))
            return float(contrastive_loss(left, right, 1 / proof.TEMPERATURE))

    state = torch.random.get_rng_state()
    learned = proof.trained(pixels, 12, SEED)
    assert torch.equal(state, torch.random.get_rng_state())
    assert loss(learned) < loss(proof.Auxiliary(SEED)) - 0.1
    assert not any(parameter.requires_grad for parameter in learned.parameters())
