"""`fit`: train a Clip on an objective, from first step to saved model, through crashes.

A step is: pictures of the size the schedule asks for, `features` of this process's rows, rows of all
processes gathered, `loss`, backward pass, optimizer, bound of the scale, average of the weights. The
training's folder then holds

    checkpoints/     see `checkpoints`
    log.csv          loss, learning rate and speed
    loss.png         the same, drawn
    skipped.txt      what the data could not read
    clip/            the trained model, as `Clip.save` writes it

Killed at any moment and started again with the same arguments, it continues and ends with the same
weights, bit for bit on a CPU in fp32.

On another number of processes it continues as follows. The global batch must stay what it was. Weights,
average, optimizer, step and schedule are those of the checkpoint. A loader with random access gives the very
batches that it would have given; a stream, whose readers each stand somewhere else, begins its next turn.
Random numbers (dropout) are drawn anew, from the seed, the process and the step. So a training without
dropout on data with random access ends with the same weights, up to rounding.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from clipworks.data.source import Skipped
from clipworks.engine.callbacks import Callback
from clipworks.engine.checkpoints import Saving
from clipworks.engine.interruption import Interrupted
from clipworks.engine.loop import Diverged, Resume, Training
from clipworks.engine.recipe import Recipe
from clipworks.engine.reports import Bar, CsvLog, Lines, LossPlot
from clipworks.errors import ConfigError

__all__ = ["Diverged", "Interrupted", "Result", "Resume", "Show", "fit"]

Show = Literal["auto", "bar", "text", "json", "nothing"]
DEFAULT_SAVING = Saving()


@dataclass(frozen=True)
class Result:
    """What a training gave.

    Attributes:
        clip: the trained model, in evaluation mode; its weights are the average where one was kept.
        step: optimizer steps done.
        samples: examples seen.
        loss: the last loss.
        metrics: the last evaluations.
        seconds: time spent by this process; less than the training's if it was resumed.
        skipped: what the data could not read, in all processes; None where it does not say, or where the
            training had already ended.
        folder: where everything lies.
    """

    clip: nn.Module
    step: int
    samples: int
    loss: float
    metrics: dict[str, float]
    seconds: float
    folder: Path
    skipped: Skipped | None = None


def fit(
    clip: nn.Module,
    objective: nn.Module | Sequence[nn.Module],
    data: Any,
    recipe: Recipe | Sequence[Recipe],
    *,
    folder: str | Path,
    callbacks: Sequence[Callback] = (),
    resume: Resume = "auto",
    saving: Saving = DEFAULT_SAVING,
    show: Show = "auto",
    fabric: Any = None,
) -> Result:
    """Train `clip` (in place) and save it.

    Args:
        clip: the model; the objective's `prepare` may give another one to train in its stead.
        objective: what is minimized (see `methods/pretrain/base.py`); several are stages, run one after
            the other, each from the weights that the one before ended with.
        data: an iterable of `Batch`, anew in each epoch, or one for each stage. `len(data)` is needed for a
            recipe in epochs. With `state_dict`/`load_state_dict` it resumes at once, otherwise by skipping;
            `set_epoch(e)` is called where there is one.
        recipe: one for all stages, or one for each.
        folder: where the training writes; stages write into folders of their own in it.
        callbacks: called besides the log, the plot and the bar.
        resume: `"auto"` continues where there is a checkpoint; True insists on one; False starts anew.
        saving: when checkpoints are written.
        show: a progress `bar`, lines of `text` or `json`, or `nothing`; `auto` is a bar on a terminal
            and text elsewhere.
        fabric: a launched `lightning.fabric.Fabric`; by default one device in this process, or under
            `torchrun` all processes with the strategy of the recipe (see `device`).

    Raises:
        ConfigError: for a recipe without length, or one that is not that of the checkpoint.
        CheckpointError: if `resume=True` finds none, or all are damaged.
        DataError: if an epoch is empty.
        Diverged: when the loss is no longer finite; the last checkpoint is from before.
        Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    folder = Path(folder)
    if isinstance(objective, nn.Module):
        if not isinstance(recipe, Recipe):
            raise ConfigError("one objective takes one recipe")
        training = Training(clip, objective, data, recipe, folder, saving, fabric)
        training.run(resume, _watchers(show, callbacks))
        return _result(training)
    stages = len(objective)
    recipes = [recipe] * stages if isinstance(recipe, Recipe) else list(recipe)
    sources = list(data) if isinstance(data, (list, tuple)) and len(data) == stages else [data] * stages
    if not stages or len(recipes) != stages:
        raise ConfigError(f"{stages} objectives need as many recipes, not {len(recipes)}")
    for number, (each, source, own) in enumerate(zip(objective, sources, recipes, strict=True), start=1):
        place = folder / f"stage-{number}"
        training = Training(clip, each, source, own, place, saving, fabric)
        training.run(resume if number == 1 or resume is False else "auto", _watchers(show, callbacks))
        clip = training.clip
    return replace(_result(training), folder=folder)


def _result(training: Training) -> Result:
    state = training.state
    return Result(
        clip=training.clip,
        step=state.step,
        samples=state.samples,
        loss=state.loss,
        metrics=dict(state.metrics),
        seconds=training.seconds,
        folder=training.folder,
        skipped=state.skipped,
    )


def _watchers(show: Show, callbacks: Sequence[Callback]) -> list[Callback]:
    if show == "auto":
        show = "bar" if sys.stdout.isatty() else "text"
    shown: dict[str, list[Callback]] = {
        "bar": [Bar()],
        "text": [Lines("text")],
        "json": [Lines("json")],
        "nothing": [],
    }
    if show not in shown:
        raise ConfigError(f"show {show!r} is none of auto, {', '.join(shown)}")
    plot = [LossPlot()] if importlib.util.find_spec("matplotlib") else []
    return [CsvLog(), *callbacks, *plot, *shown[show]]
