"""The optimizers of a recipe: AdamW, or Muon for the matrices inside the blocks and AdamW for all else.

Muon (K. Jordan et al., 2024) steps along the nearest semi-orthogonal matrix to the momentum, found by
Newton-Schulz iterations in bf16, so that every direction of a matrix learns at the same speed. It is for
matrices that map hidden features to hidden features; tables, projections between spaces, convolutions, gains
and biases keep AdamW. Its updates are scaled to the size of AdamW's (Liu et al., Muon is Scalable for LLM
Training, 2025), so one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clipworks.engine.recipe import Recipe


def optimizer_of(recipe: Recipe, groups: list[dict[str, Any]], module: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over groups of parameters of `module`."""
    adamw: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps, "fused": True}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    hidden = hidden_matrices(module)
    inside: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    for group in groups:
        parts = (
            [p for p in group["params"] if id(p) in hidden],
            [p for p in group["params"] if id(p) not in hidden],
        )
        for part, into in zip(parts, (inside, outside)):
            if part:
                into.append({**group, "params": part})
    if not inside:
        return torch.optim.AdamW(outside, **adamw)
    muon = torch.optim.Muon(inside, lr=recipe.lr, adjust_lr_fn="match_rms_adamw")
    return Together([muon, torch.optim.AdamW(outside, **adamw)] if outside else [muon])


def hidden_matrices(module: nn.Module) -> set[int]:
    """Identities of the weights of linear layers that stand in a `blocks` of the module."""
    return {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "blocks" in name.split(".")
    }


class Together(torch.optim.Optimizer):
    """Several optimizers as one; its groups are theirs."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
