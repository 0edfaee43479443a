"""Contact sheets: every picture is there, whole and in its place, whatever is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

pytest.importorskip("lancedb")

from clipworks.errors import ConfigError
from clipworks.search.index import Hit
from clipworks.search.sheet import Tile, _fitted, contact_sheet, tiles

COLORS = [
    (200, 30, 40),
    (30, 180, 60),
    (40, 50, 210),
    (230, 200, 20),
    (120, 20, 130),
    (20, 160, 170),
    (90, 60, 20),
]


@given(st.integers(1, 7), st.integers(1, 5), st.sampled_from([40, 64]))
def test_every_picture_stands_in_its_place_in_reading_order(count: int, columns: int, side: int) -> None:
    row = [Tile(Image.new("RGB", (30 + 9 * i, 30), COLORS[i]), str(i)) for i in range(count)]
    sheet = np.asarray(contact_sheet([("", row)], columns=columns, side=side)).astype(int)
    centers = []
    for color in COLORS[:count]:
        near = np.abs(sheet - color).sum(axis=2) < 6
        assert near.any()
        centers.append(tuple(np.argwhere(near).mean(axis=0)))
    rows = [int(y // (side + 48)) for y, _ in centers]
    assert rows == [i // columns for i in range(count)]
    for i in range(1, count):
        if rows[i] == rows[i - 1]:
            assert centers[i][1] - centers[i - 1][1] > side


def test_groups_follow_each_other_under_their_titles() -> None:
    first, second = Image.new("RGB", (40, 40), COLORS[0]), Image.new("RGB", (40, 40), COLORS[1])
    sheet = np.asarray(contact_sheet([("one", [Tile(first, "a")]), ("two", [Tile(second, "b")])])).astype(int)
    tops = [np.argwhere(np.abs(sheet - color).sum(axis=2) < 6)[:, 0].min() for color in COLORS[:2]]
    assert tops[1] > tops[0] + 180
    assert (sheet[: tops[0] - 4].sum(axis=2) < 150).any(), "no title above the first group"


def test_a_picture_that_cannot_be_read_leaves_an_empty_place(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    sheet = contact_sheet([("", [Tile(str(tmp_path / "text.jpg"), "a"), Tile("none.png", "b")])])
    assert sheet.size[0] > 2 * 180


def test_a_transparent_picture_stands_on_white_and_a_mark_is_a_frame() -> None:
    clear = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
    plain = np.asarray(contact_sheet([("", [Tile(clear, "")])])).astype(int)
    marked = np.asarray(contact_sheet([("", [Tile(clear, "", marked=True)])])).astype(int)
    assert (plain[60:120, 60:120] == 255).all()
    changed = np.argwhere(np.abs(plain - marked).sum(axis=2) > 0)
    assert changed.min() == 12
    assert changed.max() == 12 + 180 - 1


@given(st.text(max_size=300), st.integers(20, 200))
def test_a_caption_never_is_wider_than_its_picture(text: str, width: int) -> None:
    font = ImageFont.load_default(size=13)
    fitted = _fitted(text, font, width)
    assert font.getlength(fitted) <= width or fitted == "…"
    if font.getlength(" ".join(text.split())) <= width:
        assert fitted == " ".join(text.split())


def test_hits_become_tiles_with_score_and_name() -> None:
    hits = [Hit("/a/one.png", 0.5, 1, 1, None, ""), Hit("/b/two.png", 0.25, 1, 1, None, "")]
    assert tiles(hits, marked="two.png") == [
        Tile("/a/one.png", "1.  0.500", "one.png", False),
        Tile("/b/two.png", "2.  0.250", "two.png", True),
    ]


@pytest.mark.parametrize(("columns", "side"), [(0, 100), (3, 10)])
def test_a_sheet_without_room_or_pictures_is_refused(columns: int, side: int) -> None:
    with pytest.raises(ConfigError, match="a sheet needs"):
        contact_sheet([("", [Tile(Image.new("RGB", (9, 9)), "")])], columns=columns, side=side)
    with pytest.raises(ConfigError, match="nothing to show"):
        contact_sheet([("title", [])])
