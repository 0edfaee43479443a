"""The proof of Fusioner: its questions, the rules of its metric, and arms that know nothing of a name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clipworks.parts.segmentation import Segmentation
from clipworks.proofs import fusioner as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED, detail

SEED = 0
assert SEED < FIRST_EVALUATION_SEED


class Fixed:
    """Answers every question with the same scores (4, 64, 64)."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def segment(self, image: Any, names: list[str]) -> Segmentation:
        return Segmentation.of(names, self.scores, (64, 64), (64, 64))


@pytest.fixture(scope="module")
def some() -> proof.Mosaics:
    names = ["red star", "blue ring", "green square", "yellow circle", "red ring"]
    return proof.mosaics(proof.things(SEED, 6000), names, 6, np.random.default_rng(0))


def test_a_mosaic_shows_four_names_in_its_quarters(some: proof.Mosaics) -> None:
    for image, mask, asked in zip(some.images, some.masks, some.asked, strict=True):
        assert image.shape == (64, 64, 3) and len(set(asked)) == 4
        for place, which in enumerate(asked):
            top, left = 32 * (place // 2), 32 * (place % 2)
            assert (mask[top : top + 32, left : left + 32] == which).all()
    assert some.first(2).asked == some.asked[:2]


def test_things_are_found_by_the_name_of_what_they_show() -> None:
    pool = proof.things(SEED, 300)
    for name, numbers in list(pool.items())[:20]:
        for number in numbers:
            (main,) = proof.sample(proof.CONFIG, number >> 20, number & 0xFFFFF).objects
            assert f"{main.color} {main.shape}" == name


def test_the_truth_has_an_iou_of_one_and_equal_scores_a_quarter(some: proof.Mosaics) -> None:
    quarters = torch.zeros(4, 64, 64)
    for place in range(4):
        top, left = 32 * (place // 2), 32 * (place % 2)
        quarters[place, top : top + 32, left : left + 32] = 0.9
    assert proof.measured(Fixed(quarters), some) == {"best": 1, "there": 1}  # type: ignore[arg-type]
    equal = torch.full((4, 64, 64), 0.6)
    assert proof.measured(Fixed(equal), some) == {"best": 0.25, "there": 0.25}  # type: ignore[arg-type]
    first = quarters.roll(1, 0)  # every name in the quarter of another
    assert proof.measured(Fixed(first), some) == {"best": 0, "there": 0}  # type: ignore[arg-type]


def test_constant_and_meaningless_vectors_depend_on_nothing_or_on_the_name_alone() -> None:
    constant = proof.Constant(8).vectors(["a", "b"])
    assert torch.equal(constant[0], constant[1])
    vectors = proof.Meaningless(8)
    assert torch.equal(vectors.vectors(["a", "b"])[1], vectors.vectors(["b"])[0])
    assert not torch.allclose(vectors.vectors(["a"]), vectors.vectors(["b"]))


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    size = proof.Size(train=16, test=4, epochs=1)
    outcome = proof.experiment(SEED, size)
    assert outcome.baseline == outcome.details["maskclip"]["unseen"]["best"]
    assert outcome.method == outcome.details["fusioner"]["unseen"]["best"]
    assert outcome.details["blind"]["unseen"]["best"] == 0.25
    for path in proof.PROOF.controls:
        assert 0 <= detail({"details": outcome.details}, path) <= 1
    assert proof.experiment(SEED, size) == outcome
