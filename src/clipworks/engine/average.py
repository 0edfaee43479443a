"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from clipworks.engine.sharding import local


class Average:
    """A copy of a module whose weights follow it: `average = d * average + (1 - d) * weights`.

    The decay warms up as `d = min(decay, (1 + t) / (10 + t))` in update t, so that the random start is
    soon forgotten. Buffers are copied.

    Attributes:
        module: the averaged module, in evaluation mode, without gradients; sharded if `shard` was applied to
            it as to the module that it follows.
        updates: how often it was updated.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def decay_at(self, update: int) -> float:
        """The decay of update `update`, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the weights of `module`, which has the structure of the averaged one."""
        share = 1 - self.decay_at(self.updates)
        self.updates += 1
        ours, theirs = ([local(p.detach()) for p in side.parameters()] for side in (self.module, module))
        torch._foreach_lerp_(ours, theirs, share)
        for mine, other in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(other)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give `module` the averaged weights."""
        for theirs, averaged in zip(module.parameters(), self.module.parameters(), strict=True):
            theirs.copy_(averaged)
