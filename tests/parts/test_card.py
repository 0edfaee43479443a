"""The report page: everything is in it, nothing of a user's words is markup, and it repeats itself."""

from __future__ import annotations

import numpy as np
import pytest

from clipworks.parts.card import Curve, Plot, Table, cumulative, html, ranked


def test_words_are_shown_and_never_markup() -> None:
    page = html("<b>", [Table("T & U", ("name", ">n"), [("<script>", 12345), ("x", 0.123456)], note="a < b")])
    assert "<script>" not in page and "&lt;script&gt;" in page and "T &amp; U" in page
    assert '<td class="right">12,345</td>' in page and "0.1235" in page and "a &lt; b" in page


def test_the_same_sections_are_the_same_bytes() -> None:
    pytest.importorskip("matplotlib")
    plot = Plot("P", "x", "y", [Curve("c", [1, 2], [3, 4])], "xy", level=2.0)
    assert html("t", [plot]) == html("t", [plot])
    assert "data:image/png;base64," in html("t", [plot, Plot("empty", "x", "y", [])])


def test_curves_of_counts_are_ranks_and_shares() -> None:
    counts = np.array([0, 5, 1, 0, 4], np.uint64)
    assert ranked("r", counts) == Curve("r", [1, 2, 3], [5, 4, 1])
    assert ranked("r", np.zeros(3, np.uint64)) == Curve("r", [], [])
    shares = cumulative("s", counts)
    assert shares.x == [0.2, 0.4, 0.6, 0.8, 1.0] and shares.y == pytest.approx([0, 0, 0.1, 0.5, 1.0])
    assert len(ranked("r", np.arange(100_000)).x) < 500 > len(cumulative("s", np.arange(100_000)).x)
