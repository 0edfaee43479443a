"""Names of weights in other tools' files, as rules that read in both directions.

A rule says under which names a weight of ours stands in another layout and how its numbers lie there. The
rules of a layout, written out for one geometry, are a bijection: `read` and `write` undo each other, and a
name that no rule mentions is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
        shares: how ours is parted among several names, `(1, 2)` for a third and two thirds; empty for equally.
    """

    ours: str
    theirs: tuple[str, ...]
    change: Change = "same"
    ones: int = 0
    shares: tuple[int, ...] = ()


def rule(ours: str, *theirs: str, change: Change = "same", ones: int = 0, shares: tuple[int, ...] = ()) -> Rule:
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


def read(rules: Iterable[Rule], weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights (...) under their names to weights under ours.

    Raises:
        CheckpointError: if a name is missing or left over.
    """
    left = dict(weights)
    ours: dict[str, Tensor] = {}
    missing = []
    for one in rules:
        parts = [left.pop(name, None) for name in one.theirs]
        if one.ours.endswith("num_batches_tracked") and parts[0] is None:
            parts = [torch.tensor(0)]  # absent from older files, and without influence
        if any(part is None for part in parts):
            missing += [name for name, part in zip(one.theirs, parts, strict=True) if part is None]
            continue
        tensor = parts[0] if len(parts) == 1 else torch.cat([part for part in parts if part is not None])
        assert tensor is not None
        if one.change == "transposed":
            tensor = tensor.T
        elif one.change == "leading":
            tensor = tensor.reshape(tensor.shape[one.ones :]) if tensor.shape[: one.ones] == (1,) * one.ones else tensor
        ours[one.ours] = tensor
    if missing or left:
        what = [f"{len(missing)} tensors are missing, the first is {missing[0]}"] if missing else []
        what += [f"{len(left)} tensors belong nowhere, the first is {min(left)}"] if left else []
        raise CheckpointError(f"{source}: {'; '.join(what)}")
    return ours


def write(rules: Iterable[Rule], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights (...) under our names to weights under theirs; the inverse of `read`."""
    theirs: dict[str, Tensor] = {}
    for one in rules:
        tensor = weights[one.ours]
        if one.change == "transposed":
            tensor = tensor.T
        elif one.change == "leading":
            tensor = tensor.reshape((1,) * one.ones + tuple(tensor.shape))
        shares = one.shares or (1,) * len(one.theirs)
        unit = tensor.shape[0] // sum(shares) if len(shares) > 1 else 1
        parts = tensor.split([unit * share for share in shares]) if len(shares) > 1 else (tensor,)
        for name, part in zip(one.theirs, parts, strict=True):
            theirs[name] = part.contiguous()
    return theirs
