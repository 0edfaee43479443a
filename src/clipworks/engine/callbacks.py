"""What watches a training: logs, plots, bars, evaluations.

A callback has any of `on_start`, `on_step`, `on_epoch`, `on_end`; each is given the `State`. Callbacks run in
the first process only and change nothing: random numbers they draw do not reach the training.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipworks.engine.recipe import Recipe
from clipworks.errors import ConfigError, require


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
        scale = getattr(self.clip, "scale", None)
        if scale is not None:
            row["scale"] = float(scale.detach())
        return row | {"samples_per_second": self.rate, "waiting": self.waiting, "seconds": self.seconds}


class Callback:
    """Does nothing; override what is needed."""

    def on_start(self, state: State) -> None:
        """Before the first step; `state.step` is above 0 when the training was resumed."""

    def on_step(self, state: State) -> None:
        """After an optimizer step, before a checkpoint of it is written."""

    def on_epoch(self, state: State) -> None:
        """After the last step of an epoch."""

    def on_end(self, state: State) -> None:
        """After the last step of the training."""


class Table:
    """A CSV file that grows by rows with increasing `step`, whole after any crash.

    A column that appears later (a new term) rewrites the file with it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] = []

    def open(self, step: int) -> None:
        """Keep rows up to `step` only: later ones are repeated by the resumed training."""
        rows = [row for row in self.read() if row["step"] <= step]
        self.columns = list(rows[0]) if rows else []
        if self.path.exists():
            self._rewrite(rows)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; it is handed to the system at once."""
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self.read()
            self.columns += new
            self._rewrite([*rows, dict(row)])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._format(row))

    def read(self) -> list[dict[str, float]]:
        """All whole rows, empty cells as NaN; a row that a crash cut short is left out."""
        if not self.path.exists():
            return []
        whole, newline, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        rows = []
        for row in csv.DictReader(io.StringIO(whole + newline)):
            try:
                rows.append({name: float(value) if value else math.nan for name, value in row.items()})
            except (TypeError, ValueError):
                continue
        return [row for row in rows if not math.isnan(row.get("step", math.nan))]

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        temporary = self.path.with_suffix(".writing")
        header = ",".join(self.columns) + "\n" if self.columns else ""
        temporary.write_text(header + "".join(self._format(row) for row in rows), encoding="utf-8")
        temporary.replace(self.path)

    def _format(self, row: Mapping[str, float]) -> str:
        return ",".join(_cell(row.get(name, math.nan)) for name in self.columns) + "\n"


class CsvLog(Callback):
    """`log.csv` in the training's folder: one row every `every` steps, and the last step."""

    def __init__(self, every: int = 50, name: str = "log.csv"):
        self.every = every
        self.name = name

    def on_start(self, state: State) -> None:
        self.table = Table(state.folder / self.name)
        self.table.open(state.step)

    def on_step(self, state: State) -> None:
        if state.step % self.every == 0 or state.done:
            self.table.append(state.row())


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
        if self.every is not None and state.step % self.every == 0:
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


class LossPlot(Callback):
    """`loss.png`: loss, learning rate and evaluations against the step; every few minutes and at the end.

    It draws what `CsvLog` and `Evaluate` have written, so it comes after them.
    """

    def __init__(
        self, minutes: float = 5.0, log: str = "log.csv", metrics: tuple[str, ...] = ("metrics.csv",)
    ):
        require("matplotlib", extra="train", purpose="the loss plot")
        self.minutes = minutes
        self.log = log
        self.metrics = metrics
        self.drawn = time.monotonic()

    def on_step(self, state: State) -> None:
        if time.monotonic() - self.drawn > 60 * self.minutes:
            self.draw(state.folder)

    def on_end(self, state: State) -> None:
        self.draw(state.folder)

    def draw(self, folder: Path) -> None:
        """Draw `loss.png` from the tables in a folder."""
        from matplotlib.figure import Figure

        self.drawn = time.monotonic()
        rows = Table(folder / self.log).read()
        if not rows:
            return
        steps = [row["step"] for row in rows]
        measured = [table for name in self.metrics if (table := Table(folder / name).read())]
        figure = Figure(figsize=(8, 3 * (2 + bool(measured))))
        axes = figure.subplots(2 + bool(measured), 1, sharex=True)
        axes[0].plot(steps, [row["loss"] for row in rows], linewidth=0.6, alpha=0.4, color="C0")
        axes[0].plot(steps, _smooth([row["loss"] for row in rows]), color="C0")
        axes[0].set_ylabel("loss")
        axes[1].plot(steps, [row["lr"] for row in rows], color="C1")
        axes[1].set_ylabel("learning rate")
        for table in measured:
            for name in [name for name in table[0] if name not in ("step", "epoch")]:
                axes[2].plot(
                    [row["step"] for row in table], [row[name] for row in table], marker=".", label=name
                )
        if measured:
            axes[2].legend()
        axes[-1].set_xlabel("step")
        temporary = folder / ".loss.writing"
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(folder / "loss.png")


class Bar(Callback):
    """A progress bar with loss, learning rate, samples a second, share of waiting and time left."""

    def __init__(self, every_seconds: float = 0.5):
        self.every_seconds = every_seconds

    def on_start(self, state: State) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.task = self.progress.add_task("training", total=state.steps, completed=state.step, said="")
        self.progress.start()
        self.shown = 0.0

    def on_step(self, state: State) -> None:
        if time.monotonic() - self.shown >= self.every_seconds or state.done:
            self.shown = time.monotonic()
            self.progress.update(self.task, completed=state.step, said=describe(state))

    def on_end(self, state: State) -> None:
        self.progress.stop()


class Lines(Callback):
    """One line every few seconds, for people (`text`) or for machines (`json`), to standard output."""

    def __init__(self, form: str = "text", every_seconds: float = 30.0):
        if form not in ("text", "json"):
            raise ConfigError(f"form must be text or json, not {form!r}")
        self.form = form
        self.every_seconds = every_seconds
        self.shown = -math.inf

    def on_step(self, state: State) -> None:
        if time.monotonic() - self.shown >= self.every_seconds or state.done:
            self.shown = time.monotonic()
            if self.form == "json":
                line = json.dumps(state.row() | state.metrics)
            else:
                line = f"step {state.step}/{state.steps}  {describe(state)}"
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


def describe(state: State) -> str:
    """The state in one line for people."""
    left = "?" if math.isinf(state.remaining) else f"{_clock(state.remaining)} left"
    parts = [
        f"loss {state.loss:.4f}",
        f"lr {state.lr:.2e}",
        f"{state.rate:.0f}/s",
        f"waiting {state.waiting:.0%}",
        left,
    ]
    parts += [f"{name} {value:.4g}" for name, value in list(state.metrics.items())[:3]]
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _cell(value: float) -> str:
    if isinstance(value, float) and math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.8g}"


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed
