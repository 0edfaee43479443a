"""The proof of CLIP: its data show what they should, and its experiment runs at a size without meaning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clipworks.errors import DataError
from clipworks.proofs import clip as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

TINY = replace(proof.SIZES["small"], train=64, test=24, samples=64, batch_size=32, width=32, depth=1)
SEED = 0
assert SEED < FIRST_EVALUATION_SEED


def test_no_caption_names_an_unseen_class_and_every_label_is_true() -> None:
    pictures = proof.world(SEED, TINY)
    assert len(pictures.classes) == 64
    unseen = {pictures.unseen[i].label for i in range(len(pictures.unseen))}
    labels = set()
    for source in (pictures.train, pictures.seen):
        for i in range(len(source)):
            example = source[i]
            assert example.label is not None and example.label not in unseen
            color, shape = pictures.classes.names[example.label].split()
            assert color in str(example.texts["alt"]) and shape in str(example.texts["alt"])
            labels.add(example.label)
    assert len(labels) <= 48


def test_other_seeds_are_other_scenes_and_the_same_seed_the_same() -> None:
    one, again, other = (proof.world(seed, TINY) for seed in (0, 0, 1))
    texts = [[pictures.train[i].texts["alt"] for i in range(20)] for pictures in (one, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert (one.train[0].image == again.train[0].image).all()
    assert {one.train[i].key for i in range(64)}.isdisjoint(one.seen[i].key for i in range(24))


def test_the_experiment_measures_both_forms_and_repeats_itself() -> None:
    size = replace(TINY, batch_sizes=(8,))
    outcome = proof.experiment(SEED, size)
    assert outcome.baseline == pytest.approx(3 / 64)
    assert outcome.details.keys() == {
        "chance", "unseen_names", "supervised", "softmax_batch_8", "sigmoid_batch_8",
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in [outcome.method, *outcome.details.values()])
    assert proof.experiment(SEED, size) == outcome


def test_without_photographs_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder of Tiny-ImageNet"):
        proof.experiment(SEED, TINY, tmp_path)


def test_photographs_are_of_the_classes_drawn(shelf: Path) -> None:
    pytest.importorskip("pyarrow")
    pictures = proof.photographs(SEED, replace(TINY, classes=8), shelf)
    assert len(pictures.classes) == 8
    assert {pictures.train[i].label for i in range(len(pictures.train))} <= set(range(6))
    assert {pictures.unseen[i].label for i in range(len(pictures.unseen))} <= {6, 7}
