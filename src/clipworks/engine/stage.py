"""Model and objective as one module, so that a wrapper (DDP, FSDP2) sees one forward pass a step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipworks.core.towers import Tower
from clipworks.engine.precision import computing
from clipworks.errors import ConfigError


class Objective(Protocol):
    """What `fit` asks of an objective; `methods/pretrain/base.py` states it in full.

    Optional besides: `local` (names of entries that are not gathered), `groups(clip)` (groups for the
    optimizer), `backward(terms)` (in place of the backward pass of the terms' sum), `set_epoch(epoch)`
    (called when an epoch begins or goes on).
    """

    def prepare(self, clip: nn.Module) -> nn.Module:
        """The model that is trained."""

    def features(self, clip: nn.Module, batch: Any) -> dict[str, Any]:
        """This process's rows."""

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """Named 0-D terms, from the rows of the global batch."""


class Stage(nn.Module):
    """`forward(batch)` is `objective.features(clip, batch)` in the training's precision.

    Floating entries come out in fp32 (fp64 stays), ready for a loss.
    """

    def __init__(self, clip: nn.Module, objective: nn.Module, precision: str):
        super().__init__()
        self.clip = clip
        self.objective: Any = objective  # an `Objective` that is a module
        self.precision = precision

    def forward(self, batch: Any) -> dict[str, Any]:
        """A batch to named features."""
        device = next(self.clip.parameters()).device
        with computing(self.precision, device):
            features = self.objective.features(self.clip, batch)
        return {name: _full(value) for name, value in features.items()}


def total(terms: dict[str, Tensor]) -> Tensor:
    """The 0-D loss that is minimized: `terms["loss"]` if there is one, else the sum of all terms."""
    return terms["loss"] if "loss" in terms else torch.stack(list(terms.values())).sum()


def checkpoint_activations(clip: nn.Module) -> list[Tower]:
    """Let the towers of a model recompute their blocks in the backward pass; gives back those it changed.

    Raises:
        ConfigError: if none of them can.
    """
    towers = [module for module in clip.modules() if isinstance(module, Tower)]
    if not towers:
        raise ConfigError("checkpoint_activations: the model has no tower whose blocks could be recomputed")
    changed = [tower for tower in towers if not tower.checkpointing]
    for tower in changed:
        tower.checkpointing = True
    return changed


def _full(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad and (value.is_leaf or value._is_view()):
        # Wrappers hang a hook on every output: on a parameter they would pile up, on a view they may be lost.
        value = value.clone()
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
