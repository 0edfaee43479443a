"""Contact sheets: pictures with the words under them, for people to look at."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_FOLDERS_ELSEWHERE = ("/Library/Fonts", "/System/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")
_CHINESE = (
    "notosanscjk", "notosanssc", "sourcehansans", "wqy-", "droidsansfallback", "pingfang", "msyh", "simhei",
)  # fmt: skip
_LATIN = ("dejavusans.ttf", "liberationsans-regular", "notosans-regular", "arial.ttf", "segoeui.ttf")
NO_FONT = "(Chinese text: no font for it on this system)"


@lru_cache(maxsize=8)
def _font(chinese: bool, height: int) -> Any:
    """A font of the system, or None for lack of one."""
    wanted = _CHINESE if chinese else _LATIN
    for folder in _FOLDERS + (_FOLDERS_ELSEWHERE if sys.platform != "linux" else ()):
        for path in sorted(Path(folder).expanduser().glob("**/*.[to]t[fc]")):
            if path.name.lower().startswith(wanted):
                return ImageFont.truetype(str(path), height)
    return None


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Breaks at spaces, and between any two letters where a script has none."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        pieces = list(paragraph) if _is_chinese(paragraph) else paragraph.split(" ")
        glue = "" if _is_chinese(paragraph) else " "
        for piece in pieces:
            longer = f"{line}{glue}{piece}" if line else piece
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = piece
            else:
                line = longer
        lines.append(line)
    return lines


def _without_accents(text: str) -> str:
    text = text.replace("ß", "ss").replace("œ", "oe")
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def contact_sheet(
    tiles: Sequence[tuple[np.ndarray, str]], *, columns: int | None = None, text_width: int = 0
) -> Image.Image:
    """Pictures in rows with their words below.

    Args:
        tiles: pairs of a picture (H, W, 3) uint8 and its label; pictures may differ in width. A line break
            in a label begins a new paragraph. Chinese is shown if the system has a font for it, otherwise
            a note stands in its place.
        columns: how many tiles a row has; by default about as wide as a page.
        text_width: the least width of a tile in pixels.
    """
    height = 12
    plain = ImageFont.load_default(size=height)
    width = max([text_width, 140, *(picture.shape[1] for picture, _ in tiles)])
    columns = columns or max(1, min(len(tiles), 1200 // (width + 12)))
    labels: list[list[tuple[str, bool]]] = []
    for _, label in tiles:
        lines: list[tuple[str, bool]] = []
        for paragraph in label.split("\n"):
            chinese = _is_chinese(paragraph)
            if chinese and _font(True, height) is None:
                paragraph, chinese = NO_FONT, False
            if not chinese and _font(False, height) is None:
                paragraph = _without_accents(paragraph)  # Pillow's own font knows plain letters only
            font = _font(chinese, height) or plain
            lines += [(line, chinese) for line in _wrap(paragraph, font, width)]
        labels.append(lines)
    gap, step = 12, height + 4
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    heights = [max(tiles[i][0].shape[0] + step * len(labels[i]) for i in row) + gap + 4 for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, tall in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            left = gap + place * (width + gap)
            sheet.paste(Image.fromarray(tiles[i][0]), (left, top))
            for k, (line, chinese) in enumerate(labels[i]):
                at = (left, top + tiles[i][0].shape[0] + 4 + k * step)
                draw.text(at, line, font=_font(chinese, height) or plain, fill=(20, 20, 20))
        top += tall
    return sheet
