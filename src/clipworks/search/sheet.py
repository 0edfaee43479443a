"""Contact sheets of hits: thumbnails in rows, the score and the file's name under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipworks.core.pictures import Source, read_picture
from clipworks.errors import ConfigError, PictureError
from clipworks.search.index import Hit
from clipworks.search.items import picture_at

_GAP, _TEXT, _TITLE = 12, 13, 18
_PAPER, _INK, _PALE, _FRAME = (255, 255, 255), (24, 24, 24), (110, 110, 110), (222, 222, 222)
_MARK = (30, 150, 70)


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet, with a strong line and a pale one below it."""

    picture: Source
    caption: str
    detail: str = ""
    marked: bool = False


def tiles(hits: Sequence[Hit], marked: str = "") -> list[Tile]:
    """The tiles of a query's hits: score and file name; the file of the name `marked` gets a frame."""
    names = [Path(hit.path).name for hit in hits]
    return [
        Tile(hit.path, f"{place}.  {hit.score:.3f}", name, name == marked)
        for place, (hit, name) in enumerate(zip(hits, names, strict=True), 1)
    ]


def contact_sheet(
    groups: Sequence[tuple[str, Sequence[Tile]]], *, columns: int = 5, side: int = 180
) -> Image.Image:
    """Groups of pictures, each under its title, as one picture.

    Args:
        groups: (title, tiles); an empty title takes no room.
        columns: tiles in a row.
        side: width and height in pixels of the square into which each picture is fitted whole.

    A picture that can no longer be read is an empty square that says so.

    Raises:
        ConfigError: without any tile, or for a column count or side that leaves no room.
    """
    if columns < 1 or side < 32:
        raise ConfigError(
            f"a sheet needs columns of at least 1 and a side of at least 32, not {columns} and {side}"
        )
    if not any(row for _, row in groups):
        raise ConfigError("nothing to show on a contact sheet: there are no pictures")
    columns = min(columns, max(len(row) for _, row in groups))
    below = 2 * (_TEXT + 5)
    step_x, step_y = side + _GAP, side + below + _GAP
    heights = [(_TITLE + _GAP if title else 0) + step_y * -(-len(row) // columns) for title, row in groups]
    sheet = Image.new("RGB", (step_x * columns + _GAP, sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title_font, font = ImageFont.load_default(size=_TITLE), ImageFont.load_default(size=_TEXT)
    top = _GAP
    for (title, row), height in zip(groups, heights, strict=True):
        start = top
        if title:
            draw.text(
                (_GAP, start), _fitted(title, title_font, sheet.width - 2 * _GAP), font=title_font, fill=_INK
            )
            start += _TITLE + _GAP
        for place, tile in enumerate(row):
            left, upper = _GAP + step_x * (place % columns), start + step_y * (place // columns)
            frame = (left, upper, left + side - 1, upper + side - 1)
            draw.rectangle(frame, fill=(246, 246, 246), outline=_FRAME)
            thumbnail = _thumbnail(tile.picture, side - 2)
            if thumbnail is None:
                draw.text((left + 8, upper + 8), "cannot be read", font=font, fill=_PALE)
            else:
                middle = (left + (side - thumbnail.width) // 2, upper + (side - thumbnail.height) // 2)
                sheet.paste(thumbnail, middle)
            if tile.marked:
                draw.rectangle(frame, outline=_MARK, width=4)
            draw.text((left, upper + side + 4), _fitted(tile.caption, font, side), font=font, fill=_INK)
            draw.text(
                (left, upper + side + _TEXT + 7), _fitted(tile.detail, font, side), font=font, fill=_PALE
            )
        top += height
    return sheet


def _thumbnail(picture: Source, side: int) -> Image.Image | None:
    try:
        shown = picture_at(picture) if isinstance(picture, str) else picture
        image = read_picture(shown, target=side).convert("RGBA")
    except PictureError:
        return None
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    ground = Image.new("RGBA", size, (*_PAPER, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text in one line, shortened in its middle where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head, tail = -(-kept // 2), kept // 2
        shorter = f"{text[:head]}…{text[len(text) - tail :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return "…"
