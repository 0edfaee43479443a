"""The recipe of a training: everything that decides which weights come out, and how they are computed.

Two trainings with equal recipes, data and software give equal weights. How often something is logged or
saved is not part of it (see `checkpoints.Saving` and `callbacks`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipworks.core.config import build
from clipworks.errors import ConfigError, require

Precision = Literal["fp32", "bf16", "auto"]
Strategy = Literal["ddp", "fsdp2"]

# What says how a step is computed and not which. It may change when a training is resumed: what comes out
# changes by rounding only.
HOW = frozenset({"accumulate", "compile", "strategy", "checkpoint_activations"})


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Defaults without a remark: Radford et al. 2021, ViT models (table 19, 20).

    Length: give `epochs` or `steps`; with both, `steps` holds and an epoch only ends earlier.

    Attributes:
        epochs: passes over the data.
        steps: optimizer steps.
        lr: highest learning rate, reached at the end of the warm-up.
        final_lr: learning rate that the schedule falls to, as a share of `lr`.
        warmup: steps of linear warm-up.
        schedule: `cosine` or `linear` decay after the warm-up, or `constant`.
        optimizer: `adamw`, or `muon` for the matrices inside the blocks and AdamW for all else.
        betas, eps, weight_decay: of AdamW; the decay applies to matrices only.
        clip_gradient: largest norm of the gradient; None leaves it as it is.
        accumulate: parts into which a batch is cut so that it fits into memory; gradients stay those of
            the whole batch.
        precision: `fp32`; `bf16` (fp32 weights and optimizer, bf16 products); `auto` measures.
        ema: decay of the average of the weights; None keeps none. The average is what is evaluated and saved.
        image_sizes: progressive resolution, pairs (share of the steps, side in pixels) whose shares sum
            to 1; empty takes pictures as they come.
        scale_limit: upper bound of `clip.scale` after each step (it is a logarithm); None for none.
        seed: of everything random inside the model and the objective.
        compile: compile the towers.
        strategy: under `torchrun`, `ddp` keeps the whole model in every process and `fsdp2` shares weights,
            gradients and optimizer out among them.
        checkpoint_activations: keep only what enters each block and compute the block once more in the
            backward pass: less memory for about a third more time.
    """

    epochs: int | None = None
    steps: int | None = None
    lr: float = 5e-4
    final_lr: float = 0.0
    warmup: int = 2000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    clip_gradient: float | None = None  # the paper clips nothing
    accumulate: int = 1
    precision: Precision = "auto"
    ema: float | None = None  # not in the paper
    image_sizes: tuple[tuple[float, int], ...] = ()  # not in the paper
    scale_limit: float | None = math.log(100)
    seed: int = 0
    compile: bool = False
    strategy: Strategy = "ddp"
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.lr <= 0:
            raise ConfigError(f"lr must be positive, not {self.lr}")
        for name in ("warmup", "weight_decay", "final_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, it is {getattr(self, name)}")
        if self.accumulate < 1:
            raise ConfigError(f"accumulate must be at least 1, not {self.accumulate}")
        if self.clip_gradient is not None and self.clip_gradient <= 0:
            raise ConfigError(f"clip_gradient must be positive or None, not {self.clip_gradient}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must lie between 0 and 1, not {self.ema}")
        if self.image_sizes and abs(sum(share for share, _ in self.image_sizes) - 1) > 1e-6:
            shares = ", ".join(f"{share:g}" for share, _ in self.image_sizes)
            raise ConfigError(f"the shares of image_sizes must sum to 1, not {shares}")
        for name, allowed in (
            ("precision", ("fp32", "bf16", "auto")),
            ("schedule", ("cosine", "linear", "constant")),
            ("optimizer", ("adamw", "muon")),
            ("strategy", ("ddp", "fsdp2")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build from plain values.

        Raises:
            ConfigError: on an unknown key (with the nearest name) or a value of the wrong kind.
        """
        floats = {field.name for field in dataclasses.fields(cls) if str(field.type).startswith("float")}
        return build(cls, {k: _number(v) if k in floats else v for k, v in values.items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a YAML file whose keys are the attributes.

        Raises:
            ConfigError: if it is not a mapping, or as `from_dict`.
        """
        yaml = require("yaml", extra="train", purpose="reading a recipe")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: expected keys and values, found {values!r}")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML; the inverse of `from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprint(self) -> str:
        """A hash over all values; equal for equal recipes in any process."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _number(value: Any) -> Any:
    # YAML 1.1 reads 5e-4 as a string, for want of a dot.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
