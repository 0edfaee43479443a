"""What people and machines see of a training: its log, its plot, a bar or lines."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

from clipworks.engine.callbacks import Callback, State
from clipworks.engine.table import Table
from clipworks.errors import ConfigError, require


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
        if state.skipped is not None and state.skipped.total:
            self.progress.console.print(state.skipped, markup=False)


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

    def on_end(self, state: State) -> None:
        if state.skipped is not None and state.skipped.total:
            left_out = json.dumps({"skipped": state.skipped.counts}) if self.form == "json" else state.skipped
            sys.stdout.write(f"{left_out}\n")
            sys.stdout.flush()


def describe(state: State) -> str:
    """The state in one line for people."""
    left = "?" if math.isinf(state.remaining) else f"{_clock(state.remaining)} left"
    parts = [
        f"loss {state.loss:.4f}",
        f"lr {state.lr:.2e}",
        f"{state.rate:.0f}/s",
        f"waiting {state.waiting:.0%}",
        *([] if math.isnan(state.utilization) else [f"utilization {state.utilization:.0%}"]),
        left,
    ]
    parts += [f"{name} {value:.4g}" for name, value in list(state.metrics.items())[:3]]
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed
