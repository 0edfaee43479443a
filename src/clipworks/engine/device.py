"""Where a training runs: one device of this process, or what Lightning Fabric was told.

Importing Lightning costs seconds and one process needs nothing of it, so `OneDevice` offers the handful of
Fabric's methods that `fit` calls. Started by `torchrun`, or given a Fabric, the training is Fabric's: with
the whole model in every process (DDP) or with its weights shared out (FSDP2), as the recipe says. A Fabric of
one's own shares out by `sharding.shard`, given to its `ModelParallelStrategy`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from clipworks.engine.recipe import Strategy
from clipworks.engine.sharding import shard
from clipworks.errors import require


class OneDevice:
    """This process alone, with the interface of `lightning.fabric.Fabric` as far as `fit` uses it."""

    global_rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def setup_module(self, module: nn.Module) -> nn.Module:
        """The module as it is."""
        return module

    def setup_optimizers(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer as it is."""
        return optimizer

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
        """Nothing is synchronized."""
        return nullcontext()

    def barrier(self) -> None:
        """Nobody to wait for."""

    def broadcast(self, value: Any) -> Any:
        """The value itself."""
        return value


def default_fabric(strategy: Strategy = "ddp") -> Any:
    """This process's own device, or under `torchrun` a launched Fabric over all processes.

    Args:
        strategy: `ddp`, where every process holds the whole model, or `fsdp2`, where they share it out.

    Raises:
        MissingExtra: with several processes and without Lightning.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneDevice()
    lightning = require("lightning.fabric", extra="train", purpose="training with several processes")
    world = int(os.environ["WORLD_SIZE"])
    local, nodes = (
        int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        int(os.environ.get("GROUP_WORLD_SIZE", "1")),
    )
    parallel: Any = "ddp"
    if strategy == "fsdp2":
        parallel = lightning.strategies.ModelParallelStrategy(
            lambda module, mesh: shard(module, mesh["data_parallel"]),
            data_parallel_size=world,
            tensor_parallel_size=1,
        )
    fabric = lightning.Fabric(accelerator="auto", devices=local, num_nodes=nodes, strategy=parallel)
    fabric.launch()
    return fabric


def shares_weights(fabric: Any) -> bool:
    """Whether a Fabric shares the weights out over its processes, which changes the modules it is given."""
    return hasattr(type(getattr(fabric, "strategy", None)), "device_mesh")
