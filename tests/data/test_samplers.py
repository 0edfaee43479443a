from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipworks.data.mixture import Mixture, Part
from clipworks.data.samplers import ByLabel, Sampler, Sequential, Shuffled, UniqueLabels
from clipworks.data.source import Example, Examples
from clipworks.errors import ConfigError, DataError


def labeled(counts: list[int]) -> Examples:
    return Examples(
        Example(f"{label}-{number}", label=label)
        for label, count in enumerate(counts)
        for number in range(count)
    )


def most_batches(counts: list[int], size: int) -> int:
    """Oracle: serve the `size` classes with most pictures left until there are not enough classes."""
    left, batches = sorted(counts, reverse=True), 0
    while sum(count > 0 for count in left) >= size:
        left = sorted([count - 1 for count in left[:size]] + left[size:], reverse=True)
        batches += 1
    return batches


@given(st.lists(st.integers(1, 12), min_size=2, max_size=8), st.integers(1, 5), st.integers(0, 3))
def test_unique_labels_fill_as_many_batches_as_can_be_filled(
    counts: list[int], size: int, epoch: int
) -> None:
    source = labeled(counts)
    if len(counts) < size:
        with pytest.raises(DataError, match="without repeated classes"):
            UniqueLabels().steps(source, size)
        return
    table = UniqueLabels().table(source, size, 7, epoch)
    assert table.shape == (most_batches(counts, size), size)
    assert UniqueLabels().steps(source, size) == len(table)
    assert len(set(table.ravel().tolist())) == table.size
    assert source.labels is not None
    for row in source.labels[table]:
        assert len(set(row.tolist())) == size


def test_unique_labels_leave_out_less_than_a_batch_of_a_balanced_set() -> None:
    table = UniqueLabels().table(labeled([50] * 18), 16, 0, 0)
    assert 18 * 50 - table.size < 16


def test_unique_labels_meet_every_picture_and_every_pair_of_classes_in_the_long_run() -> None:
    source, met = labeled([20] * 6), np.zeros(120, dtype=int)
    together = np.zeros((6, 6), dtype=int)
    assert source.labels is not None
    for epoch in range(60):
        table = UniqueLabels().table(source, 4, 0, epoch)
        met += np.bincount(table.ravel(), minlength=120)
        one_hot = np.zeros((len(table), 6), dtype=int)
        np.put_along_axis(one_hot, source.labels[table], 1, axis=1)
        together += one_hot.T @ one_hot
    assert met.min() == met.max() == 60  # 120 pictures are 30 full batches of 4
    pairs = together[~np.eye(6, dtype=bool)]
    assert pairs.min() > 0.9 * pairs.mean()
    assert pairs.max() < 1.1 * pairs.mean()


@pytest.mark.parametrize("sampler", [Sequential(), Shuffled(), Shuffled(drop_last=False)])
@given(count=st.integers(1, 40), size=st.integers(1, 9), epoch=st.integers(0, 2))
def test_a_pass_meets_every_example_once(sampler: Sampler, count: int, size: int, epoch: int) -> None:
    table = sampler.table(labeled([count]), size, 3, epoch)
    assert table.shape == (sampler.steps(labeled([count]), size), size)
    met = [index for index in table.ravel().tolist() if index >= 0]
    assert len(set(met)) == len(met)
    whole = count if sampler != Shuffled() else count // size * size
    assert len(met) == whole


def test_shuffles_differ_by_seed_and_epoch() -> None:
    source = labeled([50] * 4)
    for sampler in (Shuffled(), UniqueLabels(), ByLabel()):
        tables = [sampler.table(source, 4, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
        assert not any((tables[a] == tables[b]).all() for a, b in [(0, 1), (0, 2), (1, 2)])
        assert (sampler.table(source, 4, 0, 0) == tables[0]).all()


def test_by_label_draws_small_classes_as_often_as_large_ones() -> None:
    source = labeled([10, 500, 0, 2000])
    assert source.labels is not None
    counts = np.bincount(source.labels[ByLabel().table(source, 10, 0, 0)].ravel(), minlength=4)
    assert counts[2] == 0
    assert (abs(counts[[0, 1, 3]] - 2510 / 3) < 120).all()


@given(st.integers(4, 9), st.integers(3, 20), st.integers(1, 3), st.integers(0, 40))
def test_a_mixture_takes_its_numbers_and_never_repeats_within_a_batch(
    large: int, small: int, share: int, start: int
) -> None:
    mixture = Mixture([(labeled([large] * 5), 4, UniqueLabels()), (labeled([small]), share)])
    assert mixture.batch_size == 4 + share
    seen: dict[int, list[int]] = {}
    for step in range(start, start + small // share):
        rows = mixture.batch(5, *divmod(step, mixture.steps))
        assert [row.part for row in rows] == [0] * 4 + [1] * share
        assert len({(row.part, row.index) for row in rows}) == len(rows)
        for row in rows[4:]:
            seen.setdefault(row.view, []).append(row.index)
    for indices in seen.values():  # within one pass of the small source nothing comes twice
        assert len(set(indices)) == len(indices)


def test_a_step_of_a_mixture_does_not_depend_on_how_it_was_reached() -> None:
    def make() -> Mixture:
        return Mixture([(labeled([30] * 5), 4, UniqueLabels()), Part(labeled([7]), 2)])

    walked, mixture = [], make()
    for epoch in range(3):
        walked += [mixture.batch(1, epoch, step) for step in range(mixture.steps)]
    assert make().batch(1, 2, 5) == walked[2 * mixture.steps + 5]


def test_parts_with_the_same_source_have_orders_of_their_own() -> None:
    rows = Mixture([(labeled([40]), 20), (labeled([40]), 20)]).batch(0, 0, 0)
    assert [row.index for row in rows[:20]] != [row.index for row in rows[20:]]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Mixture([]), ConfigError, "at least one part"),
        (lambda: Mixture([(labeled([3]), 0)]), ConfigError, "positive"),
        (lambda: Mixture([(labeled([3]), 4)]), DataError, "3 examples, too few for 4"),
        (lambda: Mixture([(Examples([Example("a")] * 9), 2, UniqueLabels())]), DataError, "has a label"),
    ],
)
def test_a_mixture_that_cannot_work_says_why(
    make: Callable[[], Mixture], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make()
