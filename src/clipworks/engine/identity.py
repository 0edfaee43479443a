"""What makes a training this one and no other: a checkpoint of another is not continued by mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clipworks.engine.recipe import HOW, Recipe
from clipworks.errors import ConfigError


def identity_of(recipe: Recipe, steps: int, objective: nn.Module) -> dict[str, Any]:
    """What must not change when a training is resumed, besides what is in `HOW`.

    The public attributes of the objective that are plain or dataclasses decide what is minimized.
    """
    plain = (bool, int, float, str, type(None))
    settings = {
        f"objective.{name}": value if isinstance(value, plain) else repr(value)
        for name, value in vars(objective).items()
        if isinstance(value, plain) or is_dataclass(value)
        if not name.startswith("_") and name != "training"
    }
    return {
        "recipe": recipe.to_dict(),
        "total_steps": steps,
        "objective": type(objective).__name__,
        "settings": settings,
    }


def require_same(now: Mapping[str, Any], summary: Mapping[str, Any], folder: Path) -> None:
    """Compare with what a checkpoint in the folder says of its training.

    Raises:
        ConfigError: naming everything that is not the same.
    """
    before = {name: summary[name] for name in now if name in summary}
    now = dict(now)
    for part in ("recipe", "settings"):
        before |= before.pop(part, {})
        now |= now.pop(part)
    # What an older version did not write down is not compared, nor what changes rounding only.
    changed = [name for name in now if name in before and before[name] != now[name] and name not in HOW]
    if changed:
        changes = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in changed)
        raise ConfigError(
            f"{folder} holds a training with another recipe: {changes}; use another folder or resume=False"
        )
