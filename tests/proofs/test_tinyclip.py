"""The proof of TinyCLIP: its controls are what they are called, and its experiment runs at any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipworks.methods.pretrain.tinyclip import inherit
from clipworks.proofs import laboratory
from clipworks.proofs import tinyclip as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

TINY = replace(
    proof.SIZES["small"], train=96, test=16, samples=96, steps=4, batch_size=16, teacher=(2, 64),
    student=(1, 32), every=2,
)  # fmt: skip
SEED = 0
assert SEED < FIRST_EVALUATION_SEED


@pytest.fixture(scope="module")
def teacher() -> laboratory.Clip:
    tokenizer = laboratory.tokenizer_of([f"a red circle {i}" for i in range(50)], 300)
    return laboratory.fresh_clip(tokenizer, SEED, width=64, depth=2)


def test_a_shuffled_student_has_the_same_numbers_in_other_places(teacher: laboratory.Clip) -> None:
    small = inherit(teacher, (1, 32), (1, 32))
    other = proof.shuffled(small, SEED)
    for name, tensor in small.named_parameters():
        found = other.get_parameter(name)
        assert torch.equal(tensor.flatten().sort().values, found.flatten().sort().values)
        assert tensor.numel() == 1 or tensor.unique().numel() == 1 or not torch.equal(tensor, found)


def test_random_channels_make_a_model_of_the_same_size_from_the_teachers_own_rows(
    teacher: laboratory.Clip,
) -> None:
    small = inherit(teacher, (1, 32), (1, 32))
    found = proof.random_channels(teacher, small, SEED)
    assert found.config.text == small.config.text
    assert found.config.image.blocks == small.config.image.blocks
    rows = {tuple(row.tolist()) for row in teacher.text.embedding.weight.T.detach()}
    assert all(tuple(row.tolist()) in rows for row in found.text.embedding.weight.T.detach())


def test_the_experiment_measures_every_arm_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = proof.experiment(SEED, TINY)
    main = {"scratch", "scratch_affinity", "inherited_affinity", "shuffled_affinity"}
    assert outcome.details.keys() == main | {"teacher"}
    assert outcome.method == outcome.details["inherited_affinity"]["final"]
    monkeypatch.setattr(proof, "MASK_STEPS", 2)
    everything = proof.experiment(SEED, replace(TINY, all_arms=True)).details
    assert len(everything) == 10 and {name: everything[name] for name in outcome.details} == outcome.details
