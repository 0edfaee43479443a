"""The linear probe: its search against trying every C, and its accuracy on data with a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipworks.errors import DataError, ShapeError
from clipworks.evaluate.probe import best_c, linear_probe

GRID = [10 ** (k / 8) for k in range(-48, 49)]


@given(st.integers(0, 96))
def test_the_search_finds_the_top_of_a_single_hill_among_all_97_values(top: int) -> None:
    best, tried = best_c(lambda c: -abs(math.log10(c) - math.log10(GRID[top])))
    assert best == pytest.approx(GRID[top])
    assert len(tried) <= 7 + 2 * 4


def test_the_first_values_are_those_of_the_paper_and_all_lie_on_the_grid() -> None:
    asked: list[float] = []
    best_c(lambda c: asked.append(c) or -c)  # type: ignore[func-returns-value]
    assert asked[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert all(min(abs(math.log(c / g)) for g in GRID) < 1e-9 for c in asked)
    assert len(set(asked)) == len(asked), "a C was fitted twice"


def test_of_equal_scores_the_most_regularized_wins() -> None:
    assert best_c(lambda c: 0.5)[0] == pytest.approx(1e-6)


def clouds(n: int, seed: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return torch.eye(3)[labels] + noise * torch.randn(n, 3, generator=generator), labels


def test_separable_classes_are_told_apart_and_shuffled_labels_are_not() -> None:
    train, validation, test = clouds(60, 0, 0.05), clouds(30, 1, 0.05), clouds(90, 2, 0.05)
    assert linear_probe(train, validation, test, iterations=50).accuracy == 1
    shuffled = (test[0], test[1][torch.randperm(90, generator=torch.Generator().manual_seed(0))])
    assert linear_probe(train, validation, shuffled, iterations=50).accuracy < 0.6


def test_the_final_probe_learns_from_the_validation_split_too() -> None:
    features, labels = clouds(60, 0, 0.05)
    known = labels < 2
    found = linear_probe((features[known], labels[known]), (features, labels), clouds(9, 2), iterations=50)
    assert set(found.classifier.classes_) == {0, 1, 2}


def test_the_choice_never_sees_the_test_split() -> None:
    train, validation = clouds(45, 0, 1.0), clouds(45, 1, 1.0)
    one = linear_probe(train, validation, clouds(30, 2, 1.0), iterations=50)
    other = linear_probe(train, validation, clouds(30, 3, 1.0), iterations=50)
    assert (one.c, one.validation) == (other.c, other.validation)


def test_splits_that_do_not_fit_are_named() -> None:
    good = clouds(9, 0)
    with pytest.raises(ShapeError, match="validation: features"):
        linear_probe(good, (good[0], good[1][:3]), good)
    with pytest.raises(ShapeError, match="different widths"):
        linear_probe(good, good, (good[0][:, :2], good[1]))
    with pytest.raises(DataError, match="two classes"):
        linear_probe((good[0], torch.zeros(9, dtype=torch.int64)), good, good)
    with pytest.raises(DataError, match="test: no examples"):
        linear_probe(good, good, (good[0][:0], good[1][:0]))
