"""Intervals against the printed table of Student's t, verdicts against their definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipworks.errors import DataError
from clipworks.proofs.statistics import judge, paired_interval

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from the usual table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042}


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_the_interval_is_mean_and_table_value_times_standard_error(freedom: int, quantile: float) -> None:
    values = [math.sin(3.0 * i) for i in range(freedom + 1)]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom / len(values))
    interval = paired_interval(values)
    assert interval is not None
    assert interval == pytest.approx((mean - quantile * error, mean + quantile * error), abs=1e-3 * quantile)


def test_one_seed_gives_no_interval_and_equal_differences_one_without_width() -> None:
    assert paired_interval([0.3]) is None
    assert paired_interval([0.25] * 5) == (0.25, 0.25)
    with pytest.raises(DataError, match="not finite"):
        paired_interval([0.1, math.nan])


@pytest.mark.parametrize(
    ("interval", "margin", "verdict"),
    [
        ((0.1, 0.3), 0.0, "holds"),
        ((-0.1, 0.3), 0.0, "undecided"),
        ((-0.3, -0.1), 0.0, "does not hold"),
        ((0.0, 0.0), 0.0, "does not hold"),
        ((0.1, 0.3), 0.2, "undecided"),
        ((0.1, 0.3), 0.3, "does not hold"),
        (None, 0.0, "undecided"),
    ],
)
def test_a_claim_holds_when_the_whole_interval_lies_beyond_the_margin(
    interval: tuple[float, float] | None, margin: float, verdict: str
) -> None:
    assert judge(interval, 1, margin) == verdict


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_less_is_better_is_the_mirror_image(low: float, width: float, margin: float) -> None:
    assert judge((low, low + width), 1, margin) == judge((-low - width, -low), -1, margin)
