"""Model and objective as one module, so that a wrapper (DDP, FSDP2) sees one forward pass a step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipworks.engine.precision import computing


class Objective(Protocol):
    """What `fit` asks of an objective; `methods/pretrain/base.py` states it in full.

    Optional besides: `local` (names of entries that are not gathered), `groups(clip)` (groups for the
    optimizer), `backward(terms)` (in place of the backward pass of the terms' sum).
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


def _full(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
