"""`fit`: train a Clip on an objective, from first step to saved model, through crashes.

A step is: pictures of the size the schedule asks for, `features` of this process's rows, rows of all
processes gathered, `loss`, backward pass, optimizer, bound of the scale, average of the weights. The
training's folder then holds

    checkpoints/     see `checkpoints`
    log.csv          loss, learning rate and speed
    loss.png         the same, drawn
    clip/            the trained model, as `Clip.save` writes it

Killed at any moment and started again with the same arguments, it continues and ends with the same
weights, bit for bit on a CPU in fp32.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipworks.engine.accumulate import backward_in_parts
from clipworks.engine.average import Average
from clipworks.engine.callbacks import Bar, Callback, CsvLog, Lines, LossPlot, State
from clipworks.engine.checkpoints import CheckpointFolder, Saving, Snapshot, load_tensors, tensors_once
from clipworks.engine.device import default_fabric
from clipworks.engine.gather import gather_features
from clipworks.engine.groups import parameter_groups
from clipworks.engine.meter import Meter
from clipworks.engine.precision import resolve
from clipworks.engine.randomness import (
    own_randomness,
    random_state,
    restore_random_state,
    untouched_randomness,
)
from clipworks.engine.recipe import Recipe
from clipworks.engine.schedule import image_size, learning_rate_factor, resize
from clipworks.engine.stage import Stage, total
from clipworks.errors import CheckpointError, ClipworksError, ConfigError, DataError

Resume = Literal["auto"] | bool
Show = Literal["auto", "bar", "text", "json", "nothing"]
DEFAULT_SAVING = Saving()
CHECK_EVERY = 50  # steps between two looks at the loss on a device where each look is a wait


class Diverged(ClipworksError):
    """The loss or the gradient is no longer finite."""


class Interrupted(ClipworksError):
    """The training was asked to stop, and has written a checkpoint."""


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
        folder: where everything lies.
    """

    clip: nn.Module
    step: int
    samples: int
    loss: float
    metrics: dict[str, float]
    seconds: float
    folder: Path


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
        fabric: a launched `lightning.fabric.Fabric`; by default one device in this
            process, or under `torchrun` all processes with DDP.

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
        return _Training(clip, objective, data, recipe, folder, saving, fabric).run(
            resume, _watchers(show, callbacks)
        )
    stages = len(objective)
    recipes = [recipe] * stages if isinstance(recipe, Recipe) else list(recipe)
    sources = list(data) if isinstance(data, (list, tuple)) and len(data) == stages else [data] * stages
    if not stages or len(recipes) != stages:
        raise ConfigError(f"{stages} objectives need as many recipes, not {len(recipes)}")
    for number, (each, source, own) in enumerate(zip(objective, sources, recipes, strict=True), start=1):
        place = folder / f"stage-{number}"
        training = _Training(clip, each, source, own, place, saving, fabric)
        result = training.run(
            resume if number == 1 or resume is False else "auto", _watchers(show, callbacks)
        )
        clip = result.clip
    return replace(result, folder=folder)


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


class _Training:
    """One stage."""

    def __init__(
        self,
        clip: nn.Module,
        objective: nn.Module,
        data: Any,
        recipe: Recipe,
        folder: Path,
        saving: Saving,
        fabric: Any,
    ):
        fabric = default_fabric() if fabric is None else fabric
        self.fabric = fabric
        self.recipe = recipe
        self.data = data
        self.folder = folder
        self.saving = saving
        self.initial = clip
        self.objective: Any = objective
        self.checkpoints = CheckpointFolder(folder / "checkpoints", saving.keep, fabric.global_rank)
        self.steps = _length(recipe, data)
        self.epoch = 0
        self.position = 0  # batches taken in this epoch
        self.fresh = True  # whether the data still stands where the caller left it
        self.restored_data: dict[str, Any] | None = None
        self.meter = Meter()

    def run(self, resume: Resume, watchers: list[Callback]) -> Result:
        """Train to the end."""
        self.watchers = watchers if self.fabric.global_rank == 0 else []
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        with own_randomness(self.recipe.seed + self.fabric.global_rank), _polite_end() as asked_to_stop:
            self.asked_to_stop = asked_to_stop
            snapshot = self._find(resume)
            self._set_up(snapshot)
            start = self.started = time.monotonic()
            if snapshot is None or not self.state.done:
                self._call("on_start")
                self._train()
                self._call("on_end")
            if self.average is not None:
                with torch.no_grad():
                    for mine, averaged in zip(
                        self.stage.clip.parameters(), self.average.module.parameters(), strict=True
                    ):
                        mine.copy_(averaged)
            clip: Any = self.stage.clip.eval()
            if self.fabric.global_rank == 0 and hasattr(clip, "save"):
                clip.save(self.folder / "clip")
            self.fabric.barrier()
            return Result(
                clip=clip,
                step=self.state.step,
                samples=self.state.samples,
                loss=self.state.loss,
                metrics=dict(self.state.metrics),
                seconds=time.monotonic() - start,
                folder=self.folder,
            )

    def _find(self, resume: Resume) -> Snapshot | None:
        if self.fabric.global_rank == 0:
            self.checkpoints.tidy()
            if resume is False:
                self.checkpoints.clear()
        self.fabric.barrier()
        snapshot = self.checkpoints.newest()
        if snapshot is None:
            if resume is True:
                raise CheckpointError(f"{self.checkpoints.folder}: no checkpoint to resume from")
            return None
        self._same_training(snapshot)
        return snapshot

    def _same_training(self, snapshot: Snapshot) -> None:
        now = self._identity()
        before = {name: snapshot.summary[name] for name in now}
        before |= before.pop("recipe")
        now |= now.pop("recipe")
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            changes = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
            raise ConfigError(
                f"{self.folder} holds a training with another recipe: {changes}; "
                "use another folder or resume=False"
            )

    def _identity(self) -> dict[str, Any]:
        """What must not change when a training is resumed."""
        return {
            "recipe": self.recipe.to_dict(),
            "total_steps": self.steps,
            "objective": type(self.objective).__name__,
            "processes": self.fabric.world_size,
        }

    def _set_up(self, snapshot: Snapshot | None) -> None:
        recipe, fabric = self.recipe, self.fabric
        clip = self.objective.prepare(self.initial)
        clip.train()
        self.objective.train()
        self.precision = (
            snapshot.summary["precision"] if snapshot else resolve(recipe.precision, fabric.device)
        )
        self.stage = Stage(clip, self.objective, self.precision).to(fabric.device)
        self.average = Average(clip, recipe.ema) if recipe.ema is not None else None
        groups = getattr(self.objective, "groups", None)
        self.groups = (
            groups(clip)
            if groups is not None
            else parameter_groups(self.stage, weight_decay=recipe.weight_decay)
        )
        for group in self.groups:
            group.setdefault("weight_decay", recipe.weight_decay)
            group["highest_lr"] = group.pop("lr", recipe.lr)
        self.optimizer = torch.optim.AdamW(
            self.groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True
        )
        if recipe.compile:
            for tower in (clip.image, clip.text):
                getattr(tower, "compile_blocks", tower.compile)()
        self.module, self.stepper = fabric.setup(self.stage, self.optimizer)
        self.state = State(
            step=0,
            steps=self.steps,
            folder=self.folder,
            recipe=recipe,
            clip=self.average.module if self.average is not None else clip,
        )
        if snapshot is not None:
            self._restore(snapshot)

    def _restore(self, snapshot: Snapshot) -> None:
        load_tensors(self.stage, snapshot.weights)
        if self.average is not None:
            load_tensors(self.average.module, snapshot.average or {})
            self.average.updates = snapshot.state["average_updates"]
        self.optimizer.load_state_dict(snapshot.state["optimizer"])
        self.state.step = snapshot.summary["step"]
        self.state.samples = snapshot.state["samples"]
        self.state.terms = snapshot.state["terms"]
        self.epoch, self.position = snapshot.state["epoch"], snapshot.state["position"]
        self.restored_data = snapshot.process["data"]
        restore_random_state(snapshot.process["random"])

    def _train(self) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=self.fabric.device)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
        length = _batches_in(self.data)
        while not self.state.done:
            self.state.epoch = self.epoch
            with closing(self.meter.waiting_for(self._batches(length))) as batches:
                for batch in batches:
                    self.position += 1
                    self._step(batch)
                    if self.state.done:
                        break
            if self.position == 0:
                raise DataError(f"epoch {self.epoch} has no batch: is the batch larger than the data set?")
            if not self.state.done or self.position == length:
                self._call("on_epoch")
            self.epoch, self.position = self.epoch + 1, 0
        if self.saved_step != self.state.step:
            self._save()

    def _batches(self, length: int | None) -> Iterable[Any]:
        """The batches that are left of this epoch."""
        data, state = self.data, self.restored_data
        if state is not None:
            self.restored_data = None
            data.load_state_dict(state)
            # A loader that has given its last batch may already stand at the next epoch.
            over = self.position == length if not hasattr(data, "epoch") else data.epoch != self.epoch
            return () if over else data
        # Asked only where the loader is elsewhere: a stream goes on from where the last epoch left it.
        if hasattr(data, "set_epoch") and (self.fresh or getattr(data, "epoch", None) != self.epoch):
            data.set_epoch(self.epoch)
        self.fresh = False
        return _skip(data, self.position) if self.position else data

    def _step(self, batch: Any) -> None:
        recipe, state = self.recipe, self.state
        factor = learning_rate_factor(state.step, self.steps, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest_lr"] * factor
        batch = batch.to(self.fabric.device)
        if recipe.image_sizes and batch.images is not None:
            batch = replace(batch, images=resize(batch.images, image_size(state.step, self.steps, recipe)))

        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(batch)
        norm = self._check_and_clip(terms)
        self.stepper.step()
        with torch.no_grad():
            scale = getattr(self.stage.clip, "scale", None)
            if scale is not None and recipe.scale_limit is not None:
                scale.clamp_(max=recipe.scale_limit)
            if self.average is not None:
                self.average.update(self.stage.clip)

        state.step += 1
        state.samples += len(batch) * self.fabric.world_size
        state.terms, state.gradient_norm, state.lr = terms, norm, recipe.lr * factor
        self.meter.step(len(batch) * self.fabric.world_size)
        state.rate, state.waiting = self.meter.rate, self.meter.waiting
        state.seconds = time.monotonic() - self.started
        self._call("on_step")
        if self._due():
            self._save()
        if self.asked_to_stop.is_set():
            if self.saved_step != state.step:
                self._save()
            raise Interrupted(f"stopped after step {state.step} of {self.steps}; run again to continue")

    def _backward(self, batch: Any) -> dict[str, Tensor]:
        objective = self.objective
        local = getattr(objective, "local", ())
        go_back = getattr(objective, "backward", None) or (lambda terms: total(terms).backward())
        if self.recipe.accumulate == 1:
            terms = objective.loss(gather_features(self.module(batch), local))
            go_back(terms)
        else:
            terms = backward_in_parts(
                list(batch.split(self.recipe.accumulate)),
                self.module,
                objective.loss,
                go_back,
                module=self.stage,
                local=local,
                unsynchronized=lambda enabled: self.fabric.no_backward_sync(self.module, enabled),
            )
        named = {name: term.detach() for name, term in terms.items()}
        return {"loss": total(named)} | {name: term for name, term in named.items() if name != "loss"}

    def _check_and_clip(self, terms: dict[str, Tensor]) -> Tensor:
        parameters = [
            p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.finite &= torch.isfinite(terms["loss"]) & torch.isfinite(norm)
        if self.fabric.device.type == "cpu" or self.state.step % CHECK_EVERY == 0:
            self._require_finite(terms)
        if self.recipe.clip_gradient is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_gradient, norm)
        return norm

    def _require_finite(self, terms: dict[str, Tensor]) -> None:
        if not self.finite:
            values = ", ".join(f"{name} {float(term):.4g}" for name, term in terms.items())
            raise Diverged(
                f"not finite at step {self.state.step + 1} ({values}); nothing was saved since step "
                f"{self.saved_step}: lower lr, lengthen warmup or set clip_gradient"
            )

    def _due(self) -> bool:
        saving, state = self.saving, self.state
        due = saving.steps is not None and state.step % saving.steps == 0
        if saving.minutes is not None:
            due |= time.monotonic() - self.saved_at >= 60 * saving.minutes
        if (
            self.fabric.world_size > 1 and saving.minutes is not None
        ):  # clocks differ: the first process decides
            due = self.fabric.broadcast(due)
        return due

    def _save(self) -> None:
        state = self.state
        self._require_finite(state.terms)
        has_position = hasattr(self.data, "state_dict")
        self.checkpoints.write_process(
            state.step,
            {"random": random_state(), "data": self.data.state_dict() if has_position else None},
        )
        self.fabric.barrier()
        if self.fabric.global_rank == 0:
            self.checkpoints.write(
                state.step,
                weights=tensors_once(self.stage),
                average=tensors_once(self.average.module) if self.average is not None else None,
                state={
                    "optimizer": self.optimizer.state_dict(),
                    "average_updates": self.average.updates if self.average is not None else 0,
                    "samples": state.samples,
                    "terms": state.terms,
                    "epoch": self.epoch,
                    "position": self.position,
                },
                summary={**self._identity(), "precision": self.precision},
            )
        self.fabric.barrier()
        self.saved_at, self.saved_step = time.monotonic(), state.step
        self.meter.pause()

    def _call(self, event: str) -> None:
        with untouched_randomness():
            for watcher in self.watchers:
                handler = getattr(watcher, event, None)
                if handler is not None:
                    handler(self.state)


def _length(recipe: Recipe, data: Any) -> int:
    if recipe.steps is not None:
        return recipe.steps
    if recipe.epochs is None:
        raise ConfigError("a recipe needs epochs or steps")
    length = _batches_in(data)
    if length is None:
        raise ConfigError("the length of the data is not known: give the recipe steps instead of epochs")
    if not length:
        raise DataError("the data has no batch: is the batch larger than the data set?")
    return recipe.epochs * length


def _batches_in(data: Any) -> int | None:
    """Batches in an epoch; None where nobody knows."""
    try:
        return len(data)
    except (TypeError, ConfigError):  # a stream
        return None


def _skip(batches: Iterable[Any], count: int) -> Iterator[Any]:
    iterator = iter(batches)
    for _ in range(count):
        next(iterator, None)
    yield from iterator


@contextmanager
def _polite_end() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C set the event instead of ending the process; a second Ctrl-C ends it."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
