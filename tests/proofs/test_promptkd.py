"""The proof of promptkd: its experiment measures every arm at any size and repeats itself."""

from __future__ import annotations

import numpy as np
import pytest

from clipworks.proofs import promptkd as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size(1, tuning=1, pictures=40, epochs=1, test=40, fewer=(36,), controls=True)
ARMS = {"zero_shot", "tuned", "teacher", "promptkd", "base_pictures", "projector_alone", "prompts_alone"}


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    outcome = proof.experiment(SEED, TINY)
    found = outcome.details
    assert ARMS | {"hard_labels", "untuned_teacher", "pictures_36", "agreement"} == found.keys()
    agreement = found.pop("agreement")
    assert all(0 <= value <= 1 for arm in found.values() for value in (*arm.values(), agreement))
    assert outcome.method == found["promptkd"]["new"]
    assert outcome.baseline == found["zero_shot"]["new"]
    again = proof.experiment(SEED, proof.Size(1, tuning=1, pictures=40, epochs=1, test=40)).details
    assert again["promptkd"] == found["promptkd"] and again["agreement"] == agreement


def test_each_half_is_told_apart_among_its_own_classes() -> None:
    scores = np.array([[0.1, 0.2, 0.7, 0.0], [0.3, 0.2, 0.5, 0.0], [0.6, 0.0, 0.1, 0.3]])
    found = proof.halves(scores, np.array([1, 1, 3]), base=2)
    assert found == {"base": 0.5, "new": 1.0, "h": pytest.approx(2 / 3)}
