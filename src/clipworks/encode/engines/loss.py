"""What rounding to 8 bits costs, measured on pictures that need no file: drawn shapes in eight colors.

Two things are said: the cosine of each rounded vector to the exact one, mean and least, and how often the
zero-shot classifier over the shapes' names is right before and after, and of the same opinion.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from clipworks.checkpoints import onnx
from clipworks.checkpoints.onnx import Kind
from clipworks.core.clip import Clip
from clipworks.encode.engines import places
from clipworks.encode.engines.backends import Run

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
SHAPES = {"circle": 40, "triangle": 3, "square": 4, "hexagon": 6}  # corners


@dataclass(frozen=True)
class Loss:
    """What an engine's vectors lack.

    Attributes:
        mean_cosine, min_cosine: to the fp32 vectors of the same tower.
        exact, rounded: shares of right answers of the zero-shot classifier with both towers in fp32, and with
            this engine's; None for a Clip without tokenizer.
        agreement: the share of pictures of which both say the same; None likewise.
    """

    mean_cosine: float
    min_cosine: float
    exact: float | None = None
    rounded: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        text = f"cosine to fp32 {self.mean_cosine:.4f} (least {self.min_cosine:.4f})"
        if self.exact is None or self.rounded is None:
            return text
        return (
            f"{text}; zero-shot on {len(names())} drawn pictures {self.rounded:.1%} instead of"
            f" {self.exact:.1%}, the same answer for {self.agreement:.1%}"
        )


def names() -> list[str]:
    """What the pictures show, in their order."""
    return [f"a {color} {shape}" for color in COLORS for shape in SHAPES]


def pictures(size: int) -> Tensor:
    """The pictures (32, 3, size, size), floats in [0, 1]: one shape on gray, in the order of `names`."""
    drawn = []
    for color in COLORS:
        for corners in SHAPES.values():
            picture = Image.new("RGB", (256, 256), (128, 128, 128))
            turns = [2 * math.pi * (i + 0.5) / corners + math.pi / 2 for i in range(corners)]
            outline = [(128 + 88 * math.cos(turn), 128 + 88 * math.sin(turn)) for turn in turns]
            ImageDraw.Draw(picture).polygon(outline, fill=color)
            drawn.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def measure(clip: Clip, kind: Kind, run: Run) -> Loss:
    """The loss of a function that stands for one tower of a Clip on the CPU, in evaluation mode.

    Args:
        run: pixels (B, 3, n, n), or ids (B, L) and ends (B,), to unit vectors (B, D).
    """
    pixels = pictures(clip.config.image.image_size)
    if clip.tokenizer is None:
        given = (
            (pixels,)
            if kind == "image"
            else tuple(onnx.examples(clip, kind, 32, torch.Generator().manual_seed(0)).values())
        )
        return Loss(*_cosines(onnx.as_function(clip, kind)(*given), run(*given)))
    tokens = clip.tokenizer([f"a photo of {name}." for name in names()])
    image = onnx.as_function(clip, "image")(pixels)
    text = onnx.as_function(clip, "text")(tokens.ids, tokens.ends)
    if kind == "image":
        found = run(pixels)
        cosines, other = _cosines(image, found), found @ text.T
    else:
        found = run(tokens.ids, tokens.ends)
        cosines, other = _cosines(text, found), image @ found.T
    right = torch.arange(len(image))
    before, after = (image @ text.T).argmax(dim=1), other.argmax(dim=1)
    pairs = (before, right), (after, right), (before, after)
    shares = [float((one == two).float().mean()) for one, two in pairs]
    return Loss(*cosines, *shares)


def known_or_measured(clip: Clip, kind: Kind, run: Run, folder: Path) -> Loss:
    """The loss, remembered for these two towers."""
    other = places.fingerprint(clip, "text" if kind == "image" else "image")
    words = clip.tokenizer.fingerprint() if clip.tokenizer is not None else "none"
    path = folder / f"loss-{other[:12]}-{words[:12]}.json"
    with contextlib.suppress(TypeError):  # nothing is there, or something else
        return Loss(**places.remembered(path))  # type: ignore[arg-type]
    loss = measure(clip, kind, run)
    places.remember(path, vars(loss))
    return loss


def _cosines(exact: Tensor, found: Tensor) -> tuple[float, float]:
    cosines = F.cosine_similarity(exact.float(), found.float(), dim=-1)
    return float(cosines.mean()), float(cosines.min())
