"""Which parameters decay: matrices; not gains, biases, scales, position tables and learned tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from clipworks.errors import ConfigError

# Tables and tokens that are added to or stand among activations, as norms' biases do.
_ADDED = ("position", "class_token", "class_embedding", "cls_token", "probe", "query_token")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to the parameter of this dotted name."""
    last = name.rsplit(".", 1)[-1]
    return parameter.dim() >= 2 and not any(part in last for part in _ADDED)


def parameter_groups(*modules: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer, with and without weight decay, of all that is trained in the modules."""
    decayed: dict[int, nn.Parameter] = {}
    free: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                (decayed if decays(name, parameter) else free)[id(parameter)] = parameter
    for key in free.keys() & decayed.keys():  # shared under two names: the cautious one holds
        del decayed[key]
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(free.values()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("nothing to train: every parameter of the model and the objective is frozen")
    return groups
