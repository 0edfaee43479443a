"""Interpolation keeps its ends bit for bit, is the formula between them, and chooses under a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipworks.errors import CheckpointError, ConfigError
from clipworks.parts.interpolate import Point, best, interpolate, walk


def states(dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [
        {"w": torch.randn(3, 4, generator=generator).to(dtype), "count": torch.tensor(number)}
        for number in (3, 8)
    ]
    return made[0], made[1]


def test_the_ends_are_the_models_themselves_and_copies() -> None:
    start, tuned = states()
    for share, end in ((0, start), (1.0, tuned)):
        found = interpolate(start, tuned, share)
        assert torch.equal(found["w"], end["w"]) and found["w"].data_ptr() != end["w"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_between_them_it_is_the_formula_rounded_once(dtype: torch.dtype) -> None:
    start, tuned = states(dtype)
    for share in (0.1, 0.5, 0.75, -0.5):
        a, b = (s["w"].to(torch.float64).numpy() for s in (start, tuned))
        expected = torch.from_numpy(a + share * (b - a)).to(dtype)
        found = interpolate(start, tuned, share)
        torch.testing.assert_close(
            found["w"], expected, rtol=1e-15 if dtype == torch.float64 else 0, atol=1e-15
        )
        assert found["w"].dtype == dtype


def test_what_is_no_float_stays_that_of_the_start() -> None:
    start, tuned = states()
    assert all(int(interpolate(start, tuned, share)["count"]) == 3 for share in (0, 0.5, 1))


def test_equal_models_have_nothing_between_them() -> None:
    start, _ = states()
    assert all(
        torch.equal(interpolate(start, start, share)["w"], start["w"]) for share in np.linspace(0, 1, 7)
    )


def test_different_models_are_refused_with_the_name() -> None:
    start, tuned = states()
    with pytest.raises(CheckpointError, match=r"w is \(3, 4\) at the start and \(4,\) tuned"):
        interpolate(start, {**tuned, "w": torch.zeros(4)}, 0.5)
    with pytest.raises(CheckpointError, match="v is not in the start weights"):
        interpolate(start, {**tuned, "v": torch.zeros(1)}, 0.5)
    with pytest.raises(CheckpointError, match="count is not in the tuned weights"):
        interpolate(start, {"w": tuned["w"]}, 0.5)


def test_the_best_point_is_best_at_the_new_task_within_the_bound() -> None:
    points = walk(lambda share: (share * (1.6 - share), 1 - share), [0, 0.25, 0.5, 0.75, 1])
    assert best(points, 0.0).share == 0.75
    assert best(points, 0.4).share == 0.5
    assert best(points, 1.0).share == 0


def test_of_equal_points_the_nearest_to_the_start_is_taken() -> None:
    assert best([Point(share, 0.5, 1.0) for share in (0.2, 0.1, 0.3)], 0.0).share == 0.1


def test_where_none_is_good_enough_the_one_that_forgot_least_is_taken() -> None:
    assert best([Point(0.5, 0.9, 0.2), Point(1.0, 1.0, 0.1)], 0.8).share == 0.5
    with pytest.raises(ConfigError, match="at least one share"):
        best([], 0.0)
