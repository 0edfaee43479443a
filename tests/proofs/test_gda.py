"""The proof of GDA: its experiment measures every arm at any size and repeats itself."""

from __future__ import annotations

from clipworks.proofs import gda as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size((1, 2), views=2, test=30)


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    outcome = proof.experiment(SEED, TINY)
    assert outcome.details.keys() == {"1", "2"}
    assert outcome.details["2"].keys() - outcome.details["1"].keys() == {"plain_views"}
    last = outcome.details["2"]
    assert all(0 <= value <= 1 for name, value in last.items() if name != "alpha")
    assert outcome.method == last["gda"]
    assert outcome.baseline == max(last["tip_adapter"], last["isotropic"])
    assert last["zero_shot"] == outcome.details["1"]["zero_shot"]
    assert proof.experiment(SEED, TINY) == outcome
