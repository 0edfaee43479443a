"""What a segmenter says about a picture: a label for every pixel, scores, and pictures of both."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clipworks.core.pictures import read_picture
from clipworks.errors import ConfigError, DataError, PictureError, ShapeError
from clipworks.parts.windows import stretch

UNKNOWN = -1
AT_ONCE = 1 << 24  # scores of all labels that are in memory at the picture's size at the same time
UNKNOWN_COLOR = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A label for each of H x W pixels.

    Attributes:
        labels: K names.
        map: (H, W) int16, index into `labels`, or -1 where it is unknown.
        coarse: (K, h, w) fp32, the scores at the places that the model looks at, in [0, 1].
        cells: how many places the picture's height and width cover, see `windows.stretch`.
        background: the index of the label that means "none of the others", or None.
        source: what the scores are, if a method has several kinds.
    """

    labels: tuple[str, ...]
    map: Tensor
    coarse: Tensor
    cells: tuple[float, float]
    background: int | None = None
    source: str = ""

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        coarse: Tensor,
        cells: tuple[float, float],
        size: tuple[int, int],
        *,
        background: int | None = None,
        unknown_below: float | None = None,
        source: str = "",
    ) -> Segmentation:
        """The likeliest label of every pixel, unknown where its score is below `unknown_below`.

        The scores are stretched to `size` (H, W) before they are compared, some rows at a time.
        """
        found = torch.empty(size, dtype=torch.int16)
        empty = cls(tuple(labels), found, coarse, cells, background, source)
        for rows, scores in empty.bands():
            best, place = scores.max(dim=0)
            if unknown_below is not None:
                place = place.masked_fill(best < unknown_below, UNKNOWN)
            found[rows] = place.to(torch.int16)
        return empty

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.map.shape[0], self.map.shape[1]

    @property
    def scores(self) -> Tensor:
        """The scores of every label at every pixel, (K, H, W) fp32; K H W numbers, so mind large pictures."""
        return stretch(self.coarse, self.cells, self.size)

    def bands(self) -> Iterator[tuple[slice, Tensor]]:
        """The scores some rows at a time: the rows, and (K, R, W)."""
        step = max(1, AT_ONCE // (len(self.labels) * self.size[1]))
        for start in range(0, self.size[0], step):
            rows = slice(start, min(start + step, self.size[0]))
            yield rows, stretch(self.coarse, self.cells, self.size, rows)

    def shares(self) -> dict[str, float]:
        """The share of the picture that each label has, `"unknown"` too if there is any; they sum to one."""
        counts = torch.bincount(self.map.flatten().long() + 1, minlength=len(self.labels) + 1)
        shares = (counts.double() / counts.sum()).tolist()
        found = dict(zip(self.labels, shares[1:], strict=True))
        return {**found, "unknown": shares[0]} if shares[0] else found

    @property
    def palette(self) -> np.ndarray:
        """A color for each label, (K, 3) uint8: hues as far apart as they can be, the background black."""
        colors = palette(len(self.labels))
        if self.background is not None:
            colors[self.background] = 0
        return colors

    def picture(self) -> Image.Image:
        """The label map as a palette picture, unknown pixels 255.

        Raises:
            ConfigError: for more than 255 labels, which such a file cannot hold.
        """
        if len(self.labels) > 255:
            raise ConfigError(f"a palette picture holds 255 labels, not {len(self.labels)}")
        shown = Image.fromarray(self.map.numpy().astype(np.uint8), "P")
        colors = np.zeros((256, 3), np.uint8)
        colors[: len(self.labels)], colors[255] = self.palette, UNKNOWN_COLOR
        shown.putpalette(colors.flatten().tolist())
        return shown

    def overlay(self, image: Any, opacity: float = 0.55, *, legend: bool = True) -> Image.Image:
        """The picture with its labels' colors laid over it, and their names beside it.

        Args:
            image: the picture that was segmented.
            opacity: of the colors, 0 to 1.
            legend: write the labels that occur, with their shares, to the right.

        Raises:
            ShapeError: if it is a picture of another size.
            ConfigError: for an opacity outside 0 … 1.
        """
        if not 0 <= opacity <= 1:
            raise ConfigError(f"opacity must be from 0 to 1, not {opacity}")
        below = read_picture(image).convert("RGB")
        if (below.height, below.width) != self.size:
            raise ShapeError(f"the picture is {below.height}x{below.width}, its segmentation {self.size}")
        colors = np.concatenate([np.array([UNKNOWN_COLOR], np.uint8), self.palette])
        above = Image.fromarray(colors[self.map.numpy() + 1])
        shown = Image.blend(below, above, opacity)
        return _with_legend(shown, self.shares(), colors, self.labels) if legend else shown

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the label map as a palette PNG, and its labels and shares beside it as JSON."""
        path = Path(path)
        self.picture().save(path.with_suffix(".png"))
        about = {"labels": list(self.labels), "shares": self.shares(), "unknown": 255}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        return path.with_suffix(".png")

    def without_scores(self) -> Segmentation:
        """The same without scores, for many at once."""
        return replace(self, coarse=self.coarse[:, :0, :0])


def palette(count: int) -> np.ndarray:
    """`count` colors (count, 3) uint8, neighbors far apart: hues step by the golden ratio."""
    hues = [(0.58 + 0.61803398875 * place) % 1 for place in range(count)]
    values = [(0.95, 0.7)[place // 8 % 2] for place in range(count)]
    colors = [colorsys.hsv_to_rgb(hue, 0.75, value) for hue, value in zip(hues, values, strict=True)]
    return np.rint(255 * np.array(colors).reshape(count, 3)).astype(np.uint8)


def read_mask(mask: Any, size: tuple[int, int] | None = None, *, where: str = "the mask") -> np.ndarray:
    """A label map (H, W) int64 from an array, a tensor, a picture of indices or grays, its path or bytes.

    Args:
        mask: what holds it.
        size: the height and width that it must have.
        where: how an error names it.

    Raises:
        DataError: if it is no map of whole numbers, or has another size than its picture.
    """
    if isinstance(mask, (str, PathLike, bytes)):
        where = where if isinstance(mask, bytes) else str(mask)
        try:
            mask = read_picture(mask, eight_bit=False)
        except PictureError as error:
            raise DataError(f"not a mask: {error}") from error
    if isinstance(mask, Image.Image) and mask.mode not in ("L", "P", "1", "I", "I;16"):
        raise DataError(f"{where}: a mask holds one number a pixel, not a picture of mode {mask.mode}")
    values = mask.numpy(force=True) if isinstance(mask, Tensor) else np.asarray(mask)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.squeeze(0 if values.shape[0] == 1 else 2)
    if values.ndim != 2 or values.dtype.kind not in "iub":
        raise DataError(f"{where}: a mask is (H, W) of whole numbers, not {values.dtype} {values.shape}")
    if size is not None and values.shape != tuple(size):
        raise DataError(
            f"{where}: a mask of {values.shape[0]}x{values.shape[1]} for a picture of {size[0]}x{size[1]}"
        )
    return values.astype(np.int64)


def _with_legend(
    shown: Image.Image, shares: dict[str, float], colors: np.ndarray, labels: Sequence[str]
) -> Image.Image:
    size = max(11, min(shown.height // 22, 48))
    font = ImageFont.load_default(size)
    lines = []
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        if share > 0:
            place = labels.index(name) + 1 if name in labels else 0
            lines.append((f"{name}  {share:.1%}", tuple(int(value) for value in colors[place])))
    width = 3 * size + max(int(font.getlength(text)) for text, _ in lines)
    height = max(shown.height, int(1.5 * size * len(lines)) + size)
    wide = Image.new("RGB", (shown.width + width, height), "white")
    wide.paste(shown)
    draw = ImageDraw.Draw(wide)
    for row, (text, color) in enumerate(lines):
        top = size // 2 + int(1.5 * size * row)
        left = shown.width + size // 2
        draw.rectangle((left, top, left + size, top + size), fill=color, outline="black")
        draw.text((left + 1.5 * size, top - size // 8), text, fill="black", font=font)
    return wide
