"""From a baseline and a method on several seeds to an interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from clipworks.errors import DataError, require
from clipworks.papers import Verdict

CONFIDENCE = 0.95


def paired_interval(
    differences: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Student's t interval for the mean of paired differences; None for fewer than two of them.

    Raises:
        DataError: if a difference is not finite.
        MissingExtra: without SciPy.
    """
    n = len(differences)
    if not all(math.isfinite(difference) for difference in differences):
        raise DataError(f"a difference is not finite: {list(differences)}")
    if n < 2:
        return None
    stats = require("scipy.stats", extra="evaluate", purpose="a confidence interval")
    mean = math.fsum(differences) / n
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(variance / n)
    return mean - half, mean + half


def judge(interval: tuple[float, float] | None, direction: Literal[1, -1], margin: float) -> Verdict:
    """What an interval for (method - baseline) says of "better by more than the margin".

    `holds` if the whole interval lies beyond the margin, `does not hold` if none of it does, else
    `undecided`; without an interval, `undecided`.
    """
    if interval is None:
        return "undecided"
    low, high = sorted(direction * end for end in interval)
    if low > margin:
        return "holds"
    return "undecided" if high > margin else "does not hold"
