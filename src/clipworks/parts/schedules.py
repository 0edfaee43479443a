"""How a handful of parameters is fitted: optimizer and learning rate by epoch or by step.

The prompt-learning papers share one recipe (`DASSL`): SGD, cosine by epoch, one warm-up epoch at a constant
small rate. Its rate in epoch e = 0 … E - 1 is 1e-5 for e = 0 and ½·lr·(1 + cos(π(e - 1)/E)) after, which does
not reach zero. Adapters on cached features decay by step to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clipworks.data.randomness import fold
from clipworks.errors import ConfigError

Decay = Literal["epoch", "step", "power", "drop", "constant"]


@dataclass(frozen=True)
class Schedule:
    """An optimizer with the course of its learning rate.

    Attributes:
        optimizer: `sgd` (momentum 0.9), `adam` or `adamw`.
        weight_decay: of all parameters; groups may have their own.
        last_weight_decay: what it has become after the last step, along a cosine; None keeps it. A group's
            own is kept in proportion.
        eps, betas: of Adam.
        decay: cosine over epochs, cosine over steps (to zero after the last), (1 - t / steps)^0.9, one drop
            to a tenth, or none.
        floor: what that power falls to, in place of zero; a group's own is kept in proportion.
        drop_share: share of all steps before that drop.
        warmup_epochs, warmup_lr: epochs at a constant rate before the decay begins, and that rate.
        warmup_share: share of all steps over which the rate rises linearly, lr·(t + 1)/their number, before
            the decay begins.
        clip_norm: the largest norm of the gradient, or None.
        drop_last: leave out the last batch of an epoch if it is not full and not the only one.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    last_weight_decay: float | None = None
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    decay: Decay = "epoch"
    floor: float = 0.0
    drop_share: float = 0.8
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    warmup_share: float = 0.0
    clip_norm: float | None = None
    drop_last: bool = False

    def lr(self, lr: float, epoch: int, epochs: int, step: int, steps: int) -> float:
        """The learning rate in epoch `epoch` of `epochs`, step `step` of `steps` over all epochs, from 0."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        warmup = round(self.warmup_share * steps)
        if step < warmup:
            return lr * (step + 1) / warmup
        if self.decay == "constant":
            return lr
        if self.decay == "power":
            return (lr - self.floor) * (1 - step / steps) ** 0.9 + self.floor
        if self.decay == "drop":
            return lr if step < round(self.drop_share * steps) else lr / 10
        if self.decay == "epoch":
            return lr / 2 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / epochs))
        progress = (step - warmup) / max(1, steps - warmup)
        return lr / 2 * (1 + math.cos(math.pi * progress))

    def decay_factor(self, step: int, steps: int) -> float:
        """By how much the weight decay has grown in step `step` of `steps`, from 0."""
        if self.last_weight_decay is None:
            return 1.0
        fallen = (1 + math.cos(math.pi * step / max(1, steps))) / 2
        return fallen + (1 - fallen) * self.last_weight_decay / self.weight_decay

    def make(self, groups: Iterable[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """The optimizer over groups of parameters.

        A group's own `lr` is kept in proportion to `lr` as the rate falls.
        """
        groups = [{"weight_decay": self.weight_decay, **group} for group in groups]
        if self.optimizer == "sgd":
            made: torch.optim.Optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        elif self.optimizer == "adam":
            made = torch.optim.Adam(groups, lr=lr, betas=self.betas, eps=self.eps)
        elif self.optimizer == "adamw":
            made = torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps)
        else:
            raise ConfigError(f"optimizer must be sgd, adam or adamw, not {self.optimizer!r}")
        for group in made.param_groups:
            group["share"] = group["lr"] / lr
            group["first_weight_decay"] = group["weight_decay"]
        return made


DASSL = Schedule("sgd", weight_decay=5e-4, decay="epoch", warmup_epochs=1, drop_last=True)
"""CoOp and those after it: Zhou et al., IJCV 2022, with the toolkit's defaults."""


def rows_of_epoch(count: int, batch_size: int, seed: int, epoch: int, drop_last: bool) -> Iterator[Tensor]:
    """The rows of each batch of an epoch in random order, (b,) int64; a pure function of (seed, epoch)."""
    generator = torch.Generator().manual_seed(fold(seed, epoch, 0xE90C) >> 1)
    order = torch.randperm(count, generator=generator)
    for rows in order.split(batch_size):
        if len(rows) == batch_size or not drop_last or count < batch_size:
            yield rows


def steps_of_epoch(count: int, batch_size: int, drop_last: bool) -> int:
    """How many batches `rows_of_epoch` gives."""
    return max(1, count // batch_size) if drop_last else -(-count // batch_size)
