"""Rows of every process, with exact gradients. The only collectives of a training step besides DDP's own.

Every process computes the whole loss L from all rows. The backward pass of a gather sums what all
processes ask of this process's rows, which is `world` times dL/drows; DDP averages gradients over the
processes, which gives dL/dweights: exactly the gradient of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipworks.errors import DataError


def gather_features(features: dict[str, Any], local: Collection[str] = ()) -> dict[str, Any]:
    """All rows of every per-sample entry, in the order of the processes.

    Args:
        features: this process's rows; tensors (B, ...), 0-D tensors and anything else.
        local: names of entries that stay this process's own.

    Returns:
        The same names. 0-D tensors, `local` entries and what is not a tensor pass through.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return features
    return {
        name: gather_rows(value)
        if isinstance(value, Tensor) and value.dim() > 0 and name not in local
        else value
        for name, value in features.items()
    }


def gather_objects(value: Any) -> list[Any]:
    """A picklable value of every process, in their order; every process calls it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """This process's (B, ...) to all processes' (world * B, ...), differentiable.

    Raises:
        DataError: if the processes hold different numbers of rows.
    """
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    if len({int(count) for count in counts}) > 1:
        raise DataError(
            f"processes hold different numbers of rows ({[int(c) for c in counts]}); drop the last batch"
        )
    return _Gather.apply(rows.contiguous())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
