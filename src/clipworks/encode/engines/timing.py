"""How fast engines are on one model and machine: timed in turns, and kept in a small file.

Pictures are random pixels, as many at once as will be encoded, in three classes; texts are as long as
captions are (6 to 16 tokens) and share no beginnings. A tower that takes long for them gets fewer. An engine
that is clearly slower than another is not asked again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.checkpoints.onnx import Kind
from clipworks.core.clip import Clip
from clipworks.core.tokenizer import Tokens
from clipworks.encode.engines import places

SIZES = (1, 8, 32)
ROUNDS, PATIENCE = 5, 2.0  # seconds that one call may take
HOPELESS = 1.4  # times the best
SHORTEST, LONGEST = 6, 16


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        size: the class of how many come at once.
        per_second: pictures or texts, by engine.
        left_out: why the others were not timed.
    """

    size: int
    per_second: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)

    def ranked(self, share: float = 1.0) -> list[str]:
        """The engines, fastest first.

        Args:
            share: of the positions of these texts, how many the tower itself computes, which lays equal
                beginnings once; in (0, 1].
        """
        speeds = {name: speed / (share if name == "torch" else 1) for name, speed in self.per_second.items()}
        return sorted(speeds, key=lambda name: -speeds[name])


def size_class(rows: int) -> int:
    """The class of a number of rows: 1, 8 or 32."""
    return max(size for size in SIZES if size <= max(1, rows))


def file(clip: Clip, kind: Kind, size: int) -> Path:
    """Where the timing of this model on this machine is kept."""
    return places.folder(clip, kind) / f"auto-{size}-{places.machine_mark()}.json"


def read(path: Path) -> Timing | None:
    """What was measured before; None if nothing was, or if the file is damaged."""
    kept: Any = places.remembered(path)
    try:
        speeds = {str(name): float(speed) for name, speed in kept["per_second"].items()}
        reasons = {str(name): str(reason) for name, reason in kept["left_out"].items()}
        if "torch" in speeds and all(0 < speed < math.inf for speed in speeds.values()):
            return Timing(int(kept["size"]), speeds, reasons)
    except (TypeError, KeyError, ValueError, AttributeError):
        pass
    return None


def write(path: Path, timing: Timing) -> None:
    """Keep what was measured, with the machine it was measured on."""
    places.remember(path, {**vars(timing), "machine": places.machine()})


def measure(
    clip: Clip, kind: Kind, size: int, calls: Mapping[str, Callable[[Any], object]]
) -> dict[str, float]:
    """Pictures or texts a second of each; `torch` must be among them."""
    given = sample(clip, kind, 1)
    calls["torch"](given)
    rows = max(1, min(size, int(PATIENCE / _seconds(calls["torch"], given))))
    given = sample(clip, kind, rows)
    best: dict[str, float] = {}
    for call in calls.values():
        call(given)
    for _ in range(ROUNDS):
        fastest = min(best.values(), default=math.inf)
        for name, call in calls.items():
            if best.get(name, 0.0) <= HOPELESS * fastest:
                best[name] = min(_seconds(call, given), best.get(name, math.inf))
    return {name: round(rows / seconds, 3) for name, seconds in best.items()}


def sample(clip: Clip, kind: Kind, rows: int) -> Tensor | Tokens:
    """Pixels (rows, 3, n, n), or as many texts of the length of captions; always the same."""
    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        side = clip.config.image.image_size
        return torch.rand(rows, 3, side, side, generator=generator)
    text = clip.config.text
    if getattr(clip.tokenizer, "pad_full", False):
        lengths = torch.full((rows,), text.context_length)
    else:
        lengths = torch.randint(SHORTEST, LONGEST + 1, (rows,), generator=generator)
    lengths = lengths.clamp(max=text.context_length)
    ids = torch.randint(text.vocab_size, (rows, int(lengths.max())), generator=generator)
    return Tokens(ids, lengths - 1)


def _seconds(call: Callable[[Any], object], given: Tensor | Tokens) -> float:
    start = time.perf_counter()
    call(given)
    return time.perf_counter() - start
