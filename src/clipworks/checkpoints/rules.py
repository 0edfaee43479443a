"""Names of weights in other tools' files, as rules that read in both directions.

A rule says under which names a weight of ours stands in another layout and how its numbers lie there. The
rules of a layout, written out for one geometry, are a bijection: `read` and `write` undo each other, and a
name that no rule mentions is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipworks.errors import CheckpointError

Change = Literal["same", "transposed", "leading"]


@dataclass(frozen=True)
class Rule:
    """One weight of ours and where it stands in another layout.

    Attributes:
        ours: our name.
        theirs: their name, or several whose tensors, stacked along the first dimension, are ours.
        change: `same`; `transposed` (a matrix lies the other way round); `leading` (theirs has leading
            dimensions of one that ours has not, as many as `ones`).
        ones: how many, for `leading`.
        shares: how ours is parted among several names: `(1, 2)` for a third and two thirds, empty equally.
    """

    ours: str
    theirs: tuple[str, ...]
    change: Change = "same"
    ones: int = 0
    shares: tuple[int, ...] = ()


def rule(
    ours: str, *theirs: str, change: Change = "same", ones: int = 0, shares: tuple[int, ...] = ()
) -> Rule:
    """A rule; with one name for both layouts give only `ours`."""
    return Rule(ours, theirs or (ours,), change, ones, shares)


def linear(ours: str, theirs: str) -> Iterator[Rule]:
    """Weight and bias of a linear layer, a convolution or a norm."""
    yield rule(f"{ours}.weight", f"{theirs}.weight")
    yield rule(f"{ours}.bias", f"{theirs}.bias")


def batch_norm(ours: str, theirs: str) -> Iterator[Rule]:
    """Weights and statistics of a batch norm."""
    yield from linear(ours, theirs)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        yield rule(f"{ours}.{name}", f"{theirs}.{name}")


def read(
    rules: Iterable[Rule], weights: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], source: str
) -> dict[str, Tensor]:
    """Weights of any shape, from under their names to under ours.

    Args:
        shapes: the shape that each weight of ours must have.
        source: the file, for messages.

    Raises:
        CheckpointError: for the first tensor that is missing, left over, of another shape or not finite.
    """
    left = dict(weights)
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    for one in rules:
        if one.ours.endswith("num_batches_tracked"):
            # Absent from older files, and without influence on what a trained model answers.
            left.setdefault(one.theirs[0], torch.tensor(0))
        absent = [name for name in one.theirs if name not in left]
        if absent:
            missing += absent
            continue
        parts = [left.pop(name) for name in one.theirs]
        for name, part in zip(one.theirs, parts, strict=True):
            _check(name, part, theirs_shape(one, one.theirs.index(name), shapes[one.ours]), source)
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if one.change == "transposed":
            tensor = tensor.T
        elif one.change == "leading":
            tensor = tensor.reshape(tensor.shape[one.ones :])
        ours[one.ours] = tensor
    if missing or left:
        what = [f"{_tensors(len(missing))} missing, the first is {missing[0]}"] if missing else []
        what += [f"{_tensors(len(left))} too many, the first is {min(left)}"] if left else []
        raise CheckpointError(f"{source}: the weights do not belong together: {'; '.join(what)}")
    return ours


def write(rules: Iterable[Rule], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any shape, from under our names to under theirs; the inverse of `read`."""
    theirs: dict[str, Tensor] = {}
    for one in rules:
        tensor = weights[one.ours]
        if one.change == "transposed":
            tensor = tensor.T
        elif one.change == "leading":
            tensor = tensor.reshape((1,) * one.ones + tuple(tensor.shape))
        parts = tensor.split(_sizes(one, tensor.shape[0])) if len(one.theirs) > 1 else (tensor,)
        for name, part in zip(one.theirs, parts, strict=True):
            theirs[name] = part.contiguous()
    return theirs


def theirs_shape(one: Rule, place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a rule's tensor number `place` in the other layout, for a weight of ours of this shape."""
    if one.change == "transposed":
        return tuple(reversed(shape))
    if len(one.theirs) > 1:
        return (_sizes(one, shape[0])[place], *shape[1:])
    return (1,) * one.ones + tuple(shape)


def _sizes(one: Rule, rows: int) -> list[int]:
    shares = one.shares or (1,) * len(one.theirs)
    return [rows // sum(shares) * share for share in shares]


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], source: str) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model needs {shape}")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{source}: {name} holds values that are not finite")


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"
