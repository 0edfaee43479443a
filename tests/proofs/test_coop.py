"""The proof of CoOp: its experiment measures every arm at any size and repeats itself."""

from __future__ import annotations

from clipworks.proofs import coop as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size((1, 2), (2, 3), views=2, test=30, epochs=1, conditional_epochs=1, variants=True)


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    outcome = proof.experiment(SEED, TINY)
    assert outcome.details.keys() == {"1", "2", "new_classes"}
    last = outcome.details["2"]
    assert {"coop", "coop_3", "per_class", "permuted_labels", "tip_adapter_f", "probe"} < last.keys()
    assert all(0 <= value <= 1 for value in last.values())
    assert (outcome.baseline, outcome.method) == (last["zero_shot"], last["coop"])
    for arm in ("zero_shot", "seven_templates"):
        assert last[arm] == outcome.details["1"][arm]
    halves = outcome.details["new_classes"]
    assert halves.keys() == {"zero_shot", "coop", "cocoop"}
    assert all(found.keys() == {"base", "new", "harmonic"} for found in halves.values())
    assert proof.experiment(SEED, TINY) == outcome
