"""The proof of sparse-cbm: its experiment measures every arm at any size and repeats itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from clipworks.proofs import sparse_cbm as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size(240, 60, epochs=1)


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    outcome = proof.experiment(SEED, TINY)
    found = outcome.details
    bottlenecks = {f"{kind}_{init}" for kind in proof.KINDS for init in ("uniform", "identity")}
    assert bottlenecks | {"spread_uniform", "search_centered", "linear", "zero_shot_bare"} <= found.keys()
    assert all(0 <= arm.get("accuracy", 0) <= 1 for arm in found.values())
    assert outcome.method == found["gumbel_uniform"]["accuracy"]
    assert outcome.baseline == max(
        found[f"{kind}_uniform"]["accuracy"] for kind in ("l1", "contrastive", "none")
    )
    assert proof.experiment(SEED, TINY) == outcome


def test_a_detector_of_the_truth_is_faithful_and_needs_no_other() -> None:
    truth = np.random.default_rng(0).integers(0, 2, (50, 4)).astype(np.uint8)
    truth[:, 3] = 1  # always true, so nothing can be detected
    assert proof.fidelity(torch.from_numpy(truth).double(), truth) == 1
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    areas = [roc_auc_score(truth[:, m], noise[:, m].numpy()) for m in range(3)]
    assert proof.fidelity(noise, truth) == pytest.approx(float(np.mean(areas)))
    assert proof.needed(torch.tensor([[0.0, -9.0, 0.1], [1.0, 1.0, 1.0]])) == pytest.approx(2.0)
