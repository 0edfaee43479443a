"""Where a training runs: one device of this process, or what Lightning Fabric was told.

Importing Lightning costs seconds and one process needs nothing of it, so `OneDevice` offers the handful of
Fabric's methods that `fit` calls. Started by `torchrun`, or given a Fabric, the training is Fabric's.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from clipworks.errors import require


class OneDevice:
    """This process alone, with the interface of `lightning.fabric.Fabric` as far as `fit` uses it."""

    global_rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def setup(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as they are."""
        return module, optimizer

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
        """Nothing is synchronized."""
        return nullcontext()

    def barrier(self) -> None:
        """Nobody to wait for."""

    def broadcast(self, value: Any) -> Any:
        """The value itself."""
        return value


def default_fabric() -> Any:
    """This process's own device, or under `torchrun` a launched Fabric over all processes (DDP)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneDevice()
    lightning = require("lightning.fabric", extra="train", purpose="training with several processes")
    local, nodes = (
        int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
        int(os.environ.get("GROUP_WORLD_SIZE", "1")),
    )
    fabric = lightning.Fabric(accelerator="auto", devices=local, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return fabric
