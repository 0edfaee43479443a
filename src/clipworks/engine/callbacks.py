"""What watches a training, and what it is shown.

A callback has any of `on_start`, `on_step`, `on_epoch`, `on_end`; each is given the `State`. Callbacks run in
the first process only and change nothing: random numbers they draw do not reach the training. One that looks
at the model's weights in `on_step` says so in `reads_clip`, which every process asks: where processes share
the weights out, they are put together for it, and are otherwise those of the last time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipworks.data.source import Skipped
from clipworks.engine.recipe import Recipe
from clipworks.engine.table import Table
from clipworks.errors import ConfigError


@dataclass
class State:
    """Where a training stands.

    Attributes:
        step: optimizer steps done.
        steps: steps in all.
        epoch: the epoch under way, from 0.
        samples: examples seen, over all processes and since the very start.
        terms: the last loss terms, 0-D tensors; `loss` is what was minimized.
        lr: learning rate of the last step.
        gradient_norm: norm of the last gradient, before clipping, 0-D tensor.
        clip: the model to evaluate: the averaged one where an average is kept, else the trained one.
        metrics: the newest results of evaluations.
        seconds: time spent since this process started training.
        rate: samples a second, over the last steps.
        waiting: share of the time spent waiting for data, over the last steps.
        utilization: arithmetic that the towers need over what the devices could do in that time (see
            `flops`), over the last steps; NaN where the towers are not those of a `Config`.
        scale: the trained model's logit scale, 0-D tensor, a logarithm; None without one.
        skipped: at the end, what the data could not read, in all processes; None where it does not say.
        folder: where the training writes.
        recipe: its recipe.
    """

    step: int
    steps: int
    folder: Path
    recipe: Recipe
    clip: nn.Module
    epoch: int = 0
    samples: int = 0
    lr: float = 0.0
    terms: dict[str, Tensor] = field(default_factory=dict)
    gradient_norm: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    rate: float = 0.0
    waiting: float = 0.0
    utilization: float = math.nan
    scale: Tensor | None = None
    skipped: Skipped | None = None

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.steps

    @property
    def loss(self) -> float:
        """The last loss; asks the device."""
        return float(self.terms["loss"]) if "loss" in self.terms else math.nan

    @property
    def remaining(self) -> float:
        """Seconds left at the present rate; infinite before the first step."""
        per_step = self.samples / max(1, self.step)
        return (self.steps - self.step) * per_step / self.rate if self.rate else math.inf

    def row(self) -> dict[str, float]:
        """All numbers worth keeping, by name."""
        row: dict[str, float] = {
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            "loss": self.loss,
        }
        row |= {name: float(term) for name, term in self.terms.items() if name != "loss"}
        row["lr"] = self.lr
        if self.gradient_norm is not None:
            row["gradient_norm"] = float(self.gradient_norm)
        if self.scale is not None:
            row["scale"] = float(self.scale)
        return row | {
            "samples_per_second": self.rate,
            "waiting": self.waiting,
            "utilization": self.utilization,
            "seconds": self.seconds,
        }


class Callback:
    """Does nothing; override what is needed."""

    def reads_clip(self, state: State) -> bool:
        """Whether `on_step` will look at the weights of `state.clip` in this step; alike in all processes."""
        return False

    def on_start(self, state: State) -> None:
        """Before the first step; `state.step` is above 0 when the training was resumed."""

    def on_step(self, state: State) -> None:
        """After an optimizer step, before a checkpoint of it is written."""

    def on_epoch(self, state: State) -> None:
        """After the last step of an epoch."""

    def on_end(self, state: State) -> None:
        """After the last step of the training."""


class Evaluate(Callback):
    """Call `function(clip) -> {name: number}` during the training and keep its results in a CSV file.

    The model is in evaluation mode and gradients are off while the function runs; it is the averaged
    model where an average is kept.

    Args:
        function: for instance a zero-shot evaluation.
        every: steps between two calls; None calls it after each epoch. The end is always evaluated.
        name: of the file, without its ending.
    """

    def __init__(
        self, function: Callable[[Any], Mapping[str, float]], every: int | None = None, name: str = "metrics"
    ):
        if every is not None and every < 1:
            raise ConfigError(f"every must be at least 1, not {every}")
        self.function = function
        self.every = every
        self.name = name

    def reads_clip(self, state: State) -> bool:
        """In the steps in which it is called."""
        return self.every is not None and state.step % self.every == 0

    def on_start(self, state: State) -> None:
        self.table = Table(state.folder / f"{self.name}.csv")
        self.table.open(state.step)
        rows = self.table.read()
        self.last = int(rows[-1]["step"]) if rows else -1
        if rows:
            state.metrics.update(
                {name: value for name, value in rows[-1].items() if name not in ("step", "epoch")}
            )

    def on_step(self, state: State) -> None:
        if self.reads_clip(state):
            self._evaluate(state)

    def on_epoch(self, state: State) -> None:
        if self.every is None:
            self._evaluate(state)

    def on_end(self, state: State) -> None:
        self._evaluate(state)

    def _evaluate(self, state: State) -> None:
        if state.step == self.last:
            return
        training = state.clip.training
        state.clip.eval()
        try:
            with torch.no_grad():
                results = {name: float(value) for name, value in self.function(state.clip).items()}
        finally:
            state.clip.train(training)
        self.last = state.step
        state.metrics.update(results)
        self.table.append({"step": state.step, "epoch": state.epoch, **results})
