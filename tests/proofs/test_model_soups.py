"""The proof of model soups: its experiment measures every arm, and equal weights are measured once."""

from __future__ import annotations

import pytest

from clipworks.proofs import model_soups as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED, detail

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size(shots=1, held=12, test=10, shift=4, runs=2, epochs=1)


def test_the_experiment_measures_every_arm() -> None:
    outcome = proof.experiment(SEED, TINY)
    found = outcome.details
    arms = {name: one for name, one in found.items() if name not in ("runs", "held", "ingredients")}
    assert all(0 <= one[place] <= 1 for one in arms.values() for place in ("home", "shift"))
    assert outcome.method == found["uniform"]["shift"]
    assert outcome.baseline == found["best"]["shift"]
    assert all(0 <= detail({"details": found}, path) <= 1 for path in proof.PROOF.controls)
    # The best run is one of the runs, and the mean is theirs.
    assert found["best"]["shift"] in [one["shift"] for one in found["runs"]]
    assert found["mean"]["home"] == pytest.approx(sum(one["home"] for one in found["runs"]) / 2)
    # Of two runs the soup without the largest rate is the first of them.
    assert found["without_largest"]["home"] == found["runs"][0]["home"]
    assert found["held"]["greedy"] >= max(found["held"]["runs"])
    # Equal distance is equal distance; the start has none, and other starts lie further away.
    assert found["start"]["distance"] == 0
    for name in ("uniform", "greedy"):
        assert found[f"as_near_as_{name}"]["distance"] == pytest.approx(found[name]["distance"], rel=1e-3)
    assert found["strangers"]["distance"] > 2 * found["uniform"]["distance"]
