"""Weights, gradients and optimizer shared out over processes (FSDP2: `torch.distributed.fsdp.fully_shard`).

Each block of a tower is a unit of its own: it is put together before it runs and parted again after it, so
that a process never holds more than one block besides its share. All the rest (embeddings, position tables,
projections, the objective's own weights) is one more unit, whole from the beginning of `Stage.forward` to the
end of the backward pass: an objective may use any weight of it in `features`. Numbers (scale, bias) cannot be
parted; every process keeps them, and their gradients are averaged here.

A sharded tensor is a `DTensor`, parted along its first dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Ways into a block besides calling it; through each, its weights have to be put together first.
_WAYS = ("first",)


def shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Share out the weights of a module over the processes of a one-dimensional mesh, in place."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    kept = {parameter for parameter in module.parameters() if parameter.dim() == 0}
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh, ignored_params=kept)
        for way in _WAYS:
            if hasattr(block, way):
                register_fsdp_forward_method(block, way)
    fully_shard(module, mesh=mesh, ignored_params=kept)
    return module


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """All blocks of all towers in a module, each once."""
    found: dict[int, nn.Module] = {}
    for part in module.modules():
        blocks = getattr(part, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            found |= {id(block): block for block in blocks if any(True for _ in block.parameters())}
    return list(found.values())


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes share this tensor, of any shape, out among them."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor (n, ...): some rows of a sharded one, else the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of any shape; every process calls it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor of any shape, known to every process, shared out as `like` is."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(device=like.device, dtype=like.dtype)
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(source: Mapping[str, Tensor], into: Mapping[str, Tensor], keep: bool = True) -> None:
    """Copy tensors of any shape, sharded or not, into whole ones of their names; every process calls it.

    Args:
        keep: whether this process wants them; otherwise it only gives its share.
    """
    for name, tensor in source.items():
        whole = gathered(tensor)
        if keep:
            into[name].copy_(whole)


@torch.no_grad()
def like_the_first(module: nn.Module) -> None:
    """Give a module the weights and buffers that it has in the first process; every process calls it."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, 0)


def apart(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups for an optimizer, none of which mixes sharded parameters with others: no kernel takes both."""
    split = []
    for group in groups:
        for sharded in (True, False):
            parameters = [p for p in group["params"] if is_sharded(p) is sharded]
            if parameters:
                split.append({**group, "params": parameters})
    return split


@torch.no_grad()
def average_numbers(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters () that every process keeps, as a wrapper does for all others."""
    for parameter in parameters:
        if parameter.dim() == 0 and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm () of gradients (...), some of which may be sharded."""
    parted = [local(gradient) for gradient in gradients if is_sharded(gradient)]
    if not parted:
        return nn.utils.get_total_norm(gradients)
    squares = nn.utils.get_total_norm(parted).square()
    dist.all_reduce(squares)
    whole = [gradient for gradient in gradients if not is_sharded(gradient)]
    return (squares + nn.utils.get_total_norm(whole).square()).sqrt() if whole else squares.sqrt()


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], largest: float, norm: Tensor) -> None:
    """Shrink gradients (...), whose norm () is given, so that it is at most `largest`."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
