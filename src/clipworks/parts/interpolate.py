"""Between two models of one start: weights along the straight line from one to the other.

Wortsman et al., Robust Fine-Tuning of Zero-Shot Models (WiSE-FT), CVPR 2022, eq. 2: between a model and what
fine-tuning made of it lie models that keep most of the one and have most of the other,

    θ(a) = (1 - a) θ₀ + a θ₁.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipworks.errors import CheckpointError, ConfigError, nearest

State = Mapping[str, Tensor]


def interpolate(start: State, tuned: State, share: float) -> dict[str, Tensor]:
    """θ(share) of two state dicts with the same names; tensors of any shape, computed in fp64.

    Share 0 gives `start` and 1 gives `tuned`, bit for bit; others in between, or beyond. Tensors that are not
    of floats (counters, indices) are those of `start`.

    Raises:
        CheckpointError: if a name is missing on one side or two shapes differ.
    """
    for name in [*start, *tuned]:
        if name not in start or name not in tuned:
            side = "tuned" if name in start else "start"
            raise CheckpointError(f"{name} is not in the {side} weights{nearest(name, [*start, *tuned])}")
        if start[name].shape != tuned[name].shape:
            raise CheckpointError(
                f"{name} is {tuple(start[name].shape)} at the start and {tuple(tuned[name].shape)} tuned: "
                "weights of different models have nothing between them"
            )
    if share in (0, 1):
        chosen = tuned if share else start
        return {
            name: (chosen if value.is_floating_point() else start)[name].clone()
            for name, value in start.items()
        }
    return {
        name: torch.lerp(value.double(), tuned[name].to(value.device).double(), share).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in start.items()
    }


@dataclass(frozen=True)
class Point:
    """A model on the line: its share, how well it does the new task, and how well it does the old one."""

    share: float
    new: float
    old: float


def walk(measure: Callable[[float], tuple[float, float]], shares: Iterable[float]) -> list[Point]:
    """`measure(share) -> (new, old)` at each of the shares."""
    return [Point(share, *measure(share)) for share in shares]


def best(points: Sequence[Point], least: float) -> Point:
    """The point best at the new task among those whose old task is at least `least`.

    Of equally good ones the nearest to the start, which was changed least. Where none is good enough, the one
    best at the old task.

    Raises:
        ConfigError: if there is no point.
    """
    if not points:
        raise ConfigError("there is no model to choose from: give at least one share")
    allowed = [point for point in points if point.old >= least]
    if not allowed:
        return max(points, key=lambda point: (point.old, -point.share))
    return max(allowed, key=lambda point: (point.new, -point.share))
