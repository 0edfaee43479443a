"""A training's tensors on their way into a checkpoint and out of it, whoever wrote it and whoever reads it.

Weights, and what the optimizer remembers of each, go by the weights' names, which are the same in every
process and under every strategy. So a training saved by four processes that share everything out goes on in
one, and the other way. Rates and decays are the recipe's and are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipworks.engine.average import Average
from clipworks.engine.checkpoints import Snapshot, load_tensors, tensors_once
from clipworks.engine.sharding import gathered, is_sharded, part_of
from clipworks.engine.shared_files import read_shared


class Carrier:
    """Takes tensors out of a training, and puts them back.

    Args:
        stage: the module that is trained.
        average: the averaged model, or None.
        optimizer: over the parameters of `stage`.
    """

    def __init__(self, stage: nn.Module, average: Average | None, optimizer: torch.optim.Optimizer):
        self.stage = stage
        self.average = average
        self.optimizer = optimizer

    def take(self, *, shared: bool, keep: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that a checkpoint holds; every process calls it.

        Args:
            shared: leave sharded tensors as they are instead of gathering them.
            keep: whether this process wants the gathered ones.

        Returns:
            `weights`, `average` (or None) and `optimizer`, plain; and by name the sharded ones, of any shape.
        """
        parted: dict[str, Tensor] = {}

        def plain(name: str, tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or not is_sharded(tensor):
                return tensor
            if shared:
                parted[name] = tensor
                return None
            whole = gathered(tensor)
            return whole.cpu() if keep else None

        def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            every = {name: plain(f"{prefix}.{name}", tensor) for name, tensor in tensors.items()}
            return {name: tensor for name, tensor in every.items() if tensor is not None}

        memory = {
            name: {key: plain(f"optimizer.{name}.{key}", value) for key, value in entries.items()}
            for name, parameter, optimizer in self._optimized()
            if (entries := optimizer.state.get(parameter))
        }
        average = None if self.average is None else named("average", tensors_once(self.average.module))
        weights = named("weights", tensors_once(self.stage))
        return {"weights": weights, "average": average, "optimizer": memory}, parted

    @torch.no_grad()
    def give(self, snapshot: Snapshot) -> None:
        """Put back what a checkpoint holds; every process calls it.

        Raises:
            CheckpointError: if it is of another model.
        """
        elsewhere = snapshot.shared is not None
        missing = load_tensors(self.stage, snapshot.weights, elsewhere=elsewhere)
        parted = {f"weights.{name}": tensor for name, tensor in missing.items()}
        if self.average is not None:
            missing = load_tensors(self.average.module, snapshot.average or {}, elsewhere=elsewhere)
            parted |= {f"average.{name}": tensor for name, tensor in missing.items()}
        memory = snapshot.state["optimizer"]
        if "param_groups" in memory:  # as torch gives it; checkpoints without names
            self.optimizer.load_state_dict(memory)
            return
        for name, parameter, optimizer in self._optimized():
            for key, value in memory.get(name, {}).items():
                if value is None:
                    value = parted[f"optimizer.{name}.{key}"] = torch.zeros_like(parameter)
                elif isinstance(value, Tensor):
                    like = value.shape == parameter.shape
                    value = part_of(value, parameter) if like else value
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
        if snapshot.shared is not None:
            read_shared(parted, snapshot.shared)

    def _optimized(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Every trained parameter with its name and the optimizer that steps it."""
        owners = {
            id(parameter): optimizer
            for optimizer in getattr(self.optimizer, "parts", [self.optimizer])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in self.stage.named_parameters():
            if id(parameter) in owners:
                yield name, parameter, owners[id(parameter)]
