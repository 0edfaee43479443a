"""What a training changed: the queries that moved most, and a page that shows them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipworks.evaluate.before_after import Change, Curves, changes, draw_curves, write_report
from clipworks.evaluate.held import HeldPairs


def held(n: int = 8) -> HeldPairs:
    pixels = torch.randint(
        0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return HeldPairs(pixels, tuple(f"caption <{row}>" for row in range(n)), torch.eye(n, dtype=torch.bool))


def cosines(ranks: list[int]) -> torch.Tensor:
    """(n, n) in which caption i finds its picture i at the given rank."""
    n = len(ranks)
    scores = torch.stack(
        [
            torch.linspace(0.9, 0.1, n)[torch.randperm(n, generator=torch.Generator().manual_seed(row))]
            for row in range(n)
        ]
    )
    for row, rank in enumerate(ranks):
        place = int(scores[row].argsort(descending=True)[rank - 1])
        scores[row, [row, place]] = scores[row, [place, row]]
    return scores


def test_the_largest_gains_come_first_and_then_the_largest_losses() -> None:
    was, now = [8, 4, 2, 1, 1, 3, 5, 5], [1, 2, 1, 8, 2, 3, 5, 4]
    before, after = cosines(was), cosines(now)
    found = changes(held(), before, after, count=6)
    # Gains in log-rank: caption 0 by log 8, 1 and 2 by log 2, 7 by log 5/4; losses: 3 by log 8, 4 by log 2.
    assert [one.text for one in found] == [f"caption <{row}>" for row in (0, 1, 2, 7, 3, 4)]
    assert [(one.before, one.after) for one in found] == [(was[row], now[row]) for row in (0, 1, 2, 7, 3, 4)]
    for one in found:
        row = one.own[0]
        assert one.answers_after == tuple(after[row].argsort(descending=True)[:5].tolist())
        assert (one.answers_after[0] == row) == (one.after == 1)


def test_no_two_shown_gains_ask_for_one_picture() -> None:
    matches = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
    pairs = HeldPairs(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), ("a", "b", "c"), matches)
    before = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.2, 0.1, 0.3]])
    after = torch.tensor([[0.9, 0.2, 0.3], [0.9, 0.2, 0.3], [0.2, 0.25, 0.3]])
    assert [one.text for one in changes(pairs, before, after)] == ["a", "c"]


def test_nothing_changed_shows_nothing() -> None:
    same = cosines([1, 2, 3, 4, 5, 6, 7, 8])
    assert changes(held(), same, same) == []


def test_the_page_stands_alone_and_shows_words_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = Curves(
        [(1, 2.0), (2, 1.5)],
        [{"step": 0, "recall": 0.1, "accuracy": 0.5}, {"step": 2, "recall": 0.3, "accuracy": 0.4}],
        [{"share": 0.0, "recall": 0.1, "accuracy": 0.5}, {"share": 1.0, "recall": 0.3, "accuracy": 0.4}],
        0.5,
        0.45,
    )
    draw_curves(curves, ("recall", "accuracy"), tmp_path / "curves.png")
    shown = [
        Change("a <b>dog</b> & cat", (1,), 7, 1, (3, 0, 1), (1, 0, 3)),
        Change("x", (2,), 1, 5, (2, 1), (0, 1)),
    ]
    table = {"start": {"recall": 0.123}, "tuned": {"recall": 0.5, "other": 0.25}}
    page = write_report(
        tmp_path, "Fine <tuning>", ["note & more"], table, tmp_path / "curves.png", shown, held().pixels
    )
    text = page.read_text(encoding="utf-8")
    assert (
        "<b>dog" not in text
        and "a &lt;b&gt;dog&lt;/b&gt; &amp; cat" in text
        and "Fine &lt;tuning&gt;" in text
    )
    assert "12.3 %" in text and "25.0 %" in text and "rank 7 before, 1 after" in text
    assert (
        text.index("Better now")
        < text.index("rank 7")
        < text.index("Worse now")
        < text.index("rank 1 before")
    )
    sources = re.findall(r'src="([^"]+)"', text)
    assert len(sources) == 1 + 6 + 4 and all(one.startswith("data:image/png;base64,") for one in sources)
    sizes = [Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))).size for one in sources]
    assert sizes[1:] == [(8, 8)] * 10 and sizes[0][0] > 500
    assert text.count("class=own") == 3
    assert "http" not in text


def test_a_run_without_a_line_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_curves(Curves([], [{"step": 0, "recall": 0.1}]), ("recall",), tmp_path / "c.png")
    assert Image.open(io.BytesIO((tmp_path / "c.png").read_bytes())).size[0] > 300
