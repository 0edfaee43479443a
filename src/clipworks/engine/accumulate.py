"""A batch larger than memory, with the gradients of the whole batch.

A contrastive loss does not split into parts: every row meets every other. So the parts are encoded once
without a graph, the loss of all rows gives the gradient of each feature, and the parts are encoded again,
now with a graph, and given that gradient (Gao et al., Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup, 2021). Exact, except that batch norms see the statistics of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from clipworks.engine.gather import gather_features
from clipworks.engine.randomness import Replay
from clipworks.errors import DataError

Encode = Callable[[Any], dict[str, Any]]
Terms = dict[str, Tensor]


def backward_in_parts(
    parts: Sequence[Any],
    encode: Encode,
    loss: Callable[[dict[str, Any]], Terms],
    backward: Callable[[Terms], None],
    *,
    module: nn.Module,
    local: Collection[str] = (),
    unsynchronized: Callable[[bool], AbstractContextManager[object]],
) -> Terms:
    """Encode, lose and go back, part by part; gradients are left in the parameters.

    Args:
        parts: the batch, cut.
        encode: a part to its features; called twice a part, with the same random numbers.
        loss: features of the global batch to terms.
        backward: carries the terms back.
        module: what `encode` runs; its buffers are updated once, by the second pass.
        local: names of features that are not gathered.
        unsynchronized: `unsynchronized(True)` is a context without gradient synchronization.

    Returns:
        The terms, still attached to nothing but the features.
    """
    device = next(module.parameters()).device
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    moments: list[Replay] = []
    encoded: list[dict[str, Any]] = []
    with torch.no_grad():
        for part in parts:
            moments.append(Replay(device))
            encoded.append(encode(part))
        for buffer, before in buffers:  # the second pass updates them again
            buffer.copy_(before)

    features = _join(encoded)
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in features.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    terms = loss(gather_features({**features, **leaves}, local))
    backward(terms)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    last = torch.get_rng_state() if device.type == "cpu" else None
    row = 0
    for i, (part, moment) in enumerate(zip(parts, moments, strict=True)):
        moment.rewind()
        with unsynchronized(i < len(parts) - 1):
            again = encode(part)
            rows = _rows(again)
            _carry_back(again, gradients, row, len(parts))
            row += rows
    if last is not None:
        torch.set_rng_state(last)
    return {name: term.detach() for name, term in terms.items()}


def _carry_back(part: dict[str, Any], gradients: dict[str, Tensor], row: int, parts: int) -> None:
    tensors, grads = [], []
    for name, gradient in gradients.items():
        value = part[name]
        if not value.requires_grad:
            continue
        tensors.append(value)
        # A 0-D entry was averaged over the parts.
        grads.append(gradient / parts if value.dim() == 0 else gradient[row : row + len(value)])
    torch.autograd.backward(tensors, grads)


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if not isinstance(first, Tensor):
            joined[name] = first if not isinstance(first, list) else [x for value in values for x in value]
        elif first.dim() == 0:
            joined[name] = torch.stack(values).mean() if first.is_floating_point() else first
        else:
            joined[name] = torch.cat(values)
    return joined


def _rows(features: dict[str, Any]) -> int:
    for value in features.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise DataError("an objective gave no per-sample features; nothing can be accumulated")
