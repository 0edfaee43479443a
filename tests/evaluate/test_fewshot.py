"""The few-shot protocol is CoOp's, number for number."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clipworks.core.clip import Clip
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.captions import ClassTexts
from clipworks.errors import ConfigError, DataError, EstimatorInputError, ShapeError
from clipworks.evaluate.fewshot import (
    accuracy_on,
    base_new,
    base_to_new,
    calibration_error,
    few_shot,
    harmonic_mean,
    take,
)
from clipworks.methods.adapt.zero_shot import ZeroShot

LABELS = [3, 1, 1, 0, 3, 3, 0, 1, 2, 2, 3, 2, 0, 0, 1, 2]


def theirs(train: list[int], validation: list[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """A loop as their code has it, on the module's own generator, which is given back as it was."""
    state = random.getstate()
    try:
        random.seed(seed)
        drawn = []
        for labels, count in ((train, shots), (validation, min(shots, 4))):
            tracker: dict[int, list[int]] = {}
            for item, label in enumerate(labels):
                tracker.setdefault(label, []).append(item)
            chosen: list[int] = []
            for items in tracker.values():
                chosen += random.sample(items, count) if len(items) >= count else items
            drawn.append(chosen)
        return drawn[0], drawn[1]
    finally:
        random.setstate(state)


@pytest.mark.parametrize("shots", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_draw_is_theirs(shots: int, seed: int, untouched_rng: None) -> None:
    validation = LABELS[::-1]
    draw = few_shot(LABELS, shots, seed, validation, on_short="all")
    expected = theirs(LABELS, validation, shots, seed)
    assert (draw.train.tolist(), draw.validation.tolist()) == expected


def test_more_shots_than_pictures_are_refused_or_handled_as_asked() -> None:
    with pytest.raises(EstimatorInputError, match="4 pictures, fewer than the 5 shots"):
        few_shot(LABELS, 5, 1)
    assert len(few_shot(LABELS, 5, 1, on_short="all").train) == 16
    repeated = few_shot(LABELS, 5, 1, on_short="repeat").train
    assert np.bincount(np.array(LABELS)[repeated]).tolist() == [5, 5, 5, 5]
    with pytest.raises(ConfigError, match="0"):
        few_shot(LABELS, 0, 1)


@pytest.mark.parametrize(("classes", "base"), [(37, 19), (47, 24), (101, 51), (10, 5)])
def test_base_classes_are_the_first_half_rounded_up(classes: int, base: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes) * 3, 2))
    first, rest = base_new(labels)
    assert len(first) == base
    assert np.concatenate([first, rest]).tolist() == sorted(set(labels.tolist()))


def test_the_harmonic_mean_of_the_papers_averages() -> None:
    assert harmonic_mean(82.69, 63.22) == pytest.approx(71.66, abs=5e-3)
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_calibration_error_is_the_binned_gap() -> None:
    generator = np.random.default_rng(0)
    likely = generator.dirichlet(np.ones(4), 300)
    labels = generator.integers(0, 4, 300)
    confidence, right = likely.max(axis=1), likely.argmax(axis=1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration_error(likely, labels) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(np.eye(4)[labels], labels) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ShapeError, match="300"):
        calibration_error(likely, labels[:5])


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


NAMES = ["zebra", "ant", "cow", "bee", "dog"]


def test_base_to_new_measures_each_half_among_its_own_names(clip: Clip) -> None:
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 16, generator=generator), np.arange(40) % 5
    found = base_to_new(ZeroShot(clip), (X, y), (X, y), ClassTexts(NAMES), shots=2)
    for names, half, accuracy in ((NAMES[:3], [0, 1, 2], found.base), (NAMES[3:], [3, 4], found.new)):
        rows = np.flatnonzero(np.isin(y, half))
        logits = X[rows] @ clip.class_features(names).T
        expected = (logits.argmax(dim=1).numpy() == y[rows] - half[0]).mean()
        assert accuracy == pytest.approx(expected)
    assert found.harmonic == harmonic_mean(found.base, found.new)


def test_a_fitted_estimator_is_measured_under_other_names_in_their_order(clip: Clip) -> None:
    X, y = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), np.arange(30) % 5
    by_name = ZeroShot(clip).fit(list(torch.zeros(2, 3, 32, 32)), ["x", "y"])
    by_number = ZeroShot(clip, ["x", "y"]).fit(list(torch.zeros(2, 3, 32, 32)), [0, 1])
    expected = float((X @ clip.class_features(NAMES).T).argmax(dim=1).eq(torch.from_numpy(y)).float().mean())
    for fitted in (by_name, by_number):
        assert accuracy_on(fitted, X, y, ClassTexts(NAMES)) == pytest.approx(expected)
    with pytest.raises(DataError, match="no examples"):
        accuracy_on(by_name, X[:0], y[:0])


def test_rows_are_taken_of_tensors_and_lists() -> None:
    assert take(["a", "b", "c"], [2, 0]) == ["c", "a"]
    assert take(torch.arange(3), np.array([2, 0])).tolist() == [2, 0]
