"""The proof of MetaCLIP: its pool is what it says, its arms are equal, and it runs at a tiny size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("ahocorasick")

from clipworks.proofs import metaclip as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
SMALL = replace(proof.SIZES["small"], pairs=4000, concepts=40, pictures=3, test=2)
TINY = replace(SMALL, pairs=600, concepts=12, pictures=2, test=1, samples=512, batch_size=64)


@pytest.fixture(scope="module")
def pool() -> proof.Pool:
    return proof.make_pool(SEED, SMALL)


def test_captions_are_true_bare_or_wrong_as_often_as_they_should_be(pool: proof.Pool) -> None:
    assert np.bincount(pool.kinds) / 4000 == pytest.approx([0.7, 0.15, 0.15], abs=0.02)
    truths = []
    for row, caption in enumerate(pool.captions):
        scene = pool.scenes[pool.pictures[row]]
        true = (
            [pool.names[pool.concepts[row]], scene.objects[0].texture]
            if pool.kinds[row] != proof.BARE
            else []
        )
        named = [name for name in pool.names if name in caption]
        assert len(named) == (pool.kinds[row] != proof.BARE)
        if pool.kinds[row] == proof.TRUE:
            assert all(word in caption for word in true)
        elif pool.kinds[row] == proof.WRONG:
            truths.append(named[0] == true[0])
    assert np.mean(truths) < 0.3


def test_a_concept_is_one_look_and_test_pictures_are_new_and_balanced(pool: proof.Pool) -> None:
    looks = {}
    for concept, place in zip(pool.concepts, pool.pictures):
        scene = pool.scenes[place]
        look = (scene.objects[0].color, scene.background, scene.style)
        assert looks.setdefault(concept, look) == look
    assert len(set(looks.values())) == len(looks)
    assert np.bincount(pool.labels).tolist() == [2] * 40
    assert {scene.index for scene in pool.test}.isdisjoint(scene.index for scene in pool.scenes)
    assert np.bincount(pool.concepts)[0] > 10 * np.bincount(pool.concepts, minlength=40)[20:].mean()


def test_arms_are_of_one_size_and_the_balanced_one_has_more_of_the_tail(pool: proof.Pool) -> None:
    arms, details = proof.choose(pool, SEED, replace(SMALL, factors=(0.5,)))
    sizes = {name: len(rows) for name, rows in arms.items()}
    assert sizes["metaclip"] == pytest.approx(1000, rel=0.1)
    equal = {"random", "matched", "noise_free", "metaclip", "ceiling"}
    assert {sizes[name] for name in equal} == {sizes["metaclip"]}
    assert sizes["permuted"] == pytest.approx(sizes["metaclip"], rel=0.15)
    assert all(len(set(rows.tolist())) == len(rows) for rows in arms.values())
    assert not (pool.kinds[arms["matched"]] == proof.BARE).any()
    assert (pool.kinds[arms["noise_free"]] == proof.TRUE).all()
    share = {name: float((pool.concepts[rows] >= 20).mean()) for name, rows in arms.items()}
    assert share["metaclip"] > 1.5 * share["matched"] and share["permuted"] < 1.4 * share["matched"]
    assert set(arms["metaclip_t_0.5"].tolist()) < set(arms["metaclip"].tolist())
    assert details["t"] > 1 and 0 < details["p"] < 0.5


@pytest.mark.parametrize("towers", [False, True])
def test_the_experiment_measures_every_arm_and_repeats_itself(towers: bool) -> None:
    size = replace(TINY, towers=towers, pixels=32, samples=64 if towers else 512)
    outcome = proof.experiment(SEED, size)
    arms = {name for name, value in outcome.details.items() if isinstance(value, dict)}
    assert arms == {"random", "matched", "noise_free", "metaclip", "permuted", "ceiling", "pool"}
    for name in arms:
        assert all(0 <= outcome.details[name][part] <= 1 for part in ("tail", "head", "all"))
    assert outcome.baseline == outcome.details["matched"]["tail"]
    assert outcome.method == outcome.details["metaclip"]["tail"]
    if not towers:
        assert proof.experiment(SEED, size) == outcome
