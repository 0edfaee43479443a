"""Learning rates that fall towards the input: what all tasks share changes least.

As in Clark et al., ELECTRA (ICLR 2020), and Bao et al., BEiT (ICLR 2022): a tower of K blocks has levels 0
(head) to K + 1 (patches or words, positions), and level l learns at decay^l times the learning rate.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from clipworks.engine.groups import decays
from clipworks.errors import ConfigError

_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?|resblocks|stages)\.(\d+)\.")
_HEAD = re.compile(r"(?:^|\.)(?:ln_post|ln_final|projection|pool|head|final_\w*norm\w*|visual_projection)\b")


def level(name: str, depth: int) -> int:
    """How far below the head the parameter of this dotted name lies in a tower of `depth` blocks.

    >>> level("projection.weight", 12), level("blocks.11.ln_1.bias", 12), level("patches.weight", 12)
    (0, 1, 13)
    """
    block = _BLOCK.search(name)
    if block is not None:
        return depth - int(block.group(1))
    return 0 if _HEAD.search(name) else depth + 1


def layer_groups(clip: nn.Module, *, decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimizer: what is trained, by level and by whether weight decay applies.

    Each child of `clip` (its towers) is counted by itself; parameters of none, such as the scale, are of
    level 0 and do not decay. A parameter under two names takes the lower rate. `lr_scale` is the factor.

    Raises:
        ConfigError: for a decay outside of (0, 1], or if nothing is trained.
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"layer decay must lie in (0, 1], not {decay}")
    depths: dict[str, int] = {}
    for name, _ in clip.named_parameters(remove_duplicate=False):
        child, _, rest = name.partition(".")
        block = _BLOCK.search(rest)
        depths[child] = max(depths.get(child, 0), int(block.group(1)) + 1 if block else 0)
    chosen: dict[int, tuple[int, bool, nn.Parameter]] = {}
    for name, parameter in clip.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        child, _, rest = name.partition(".")
        here = level(rest, depths[child]) if rest else 0
        before = chosen.get(id(parameter), (here, True, parameter))
        chosen[id(parameter)] = (max(here, before[0]), decays(name, parameter) and before[1], parameter)
    if not chosen:
        raise ConfigError("nothing to train: every parameter of the model is frozen")
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for here, decayed, parameter in chosen.values():
        groups.setdefault((here, decayed), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": decay**here, "weight_decay": weight_decay if decayed else 0.0}
        for (here, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
