"""The loop of one training, or of one stage of it; `training.fit` is the way in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipworks.engine.accumulate import backward_in_parts
from clipworks.engine.average import Average
from clipworks.engine.callbacks import Callback, State
from clipworks.engine.checkpoints import CheckpointFolder, Saving, Snapshot, load_tensors, tensors_once
from clipworks.engine.device import default_fabric
from clipworks.engine.feed import Feed
from clipworks.engine.gather import gather_features
from clipworks.engine.groups import parameter_groups
from clipworks.engine.interruption import Interrupted, polite_end
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
CHECK_EVERY = 50  # steps between two looks at the loss on a device where each look is a wait
AGREE_EVERY = 10  # steps between two agreements of several processes on whether to save or stop


class Diverged(ClipworksError):
    """The loss or the gradient is no longer finite."""


class Training:
    """One model, one objective, one recipe, one folder. `run` trains; afterwards `clip` is the result."""

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
        self.feed = Feed(data)
        self.folder = folder
        self.saving = saving
        self.initial = clip
        self.objective: Any = objective
        self.checkpoints = CheckpointFolder(folder / "checkpoints", saving.keep, fabric.global_rank)
        self.steps = _steps(recipe, self.feed)
        self.settings = _settings(objective)
        self.meter = Meter()

    def run(self, resume: Resume, watchers: Sequence[Callback]) -> None:
        """Train to the end, from the newest checkpoint where there is one."""
        self.watchers = watchers if self.fabric.global_rank == 0 else []
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        with own_randomness(self.recipe.seed + self.fabric.global_rank), polite_end() as self.asked_to_stop:
            snapshot = self._find(resume)
            self._set_up(snapshot)
            self.started = time.monotonic()
            if snapshot is None or not self.state.done:
                self._call("on_start")
                self._train()
                self._call("on_end")
            if self.average is not None:
                self.average.copy_to(self.stage.clip)
            clip: Any = self.stage.clip.eval()
            if self.fabric.global_rank == 0 and hasattr(clip, "save"):
                clip.save(self.folder / "clip")
            self.fabric.barrier()
            self.clip: nn.Module = clip
            self.seconds = time.monotonic() - self.started

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
        before = {name: snapshot.summary[name] for name in now if name in snapshot.summary}
        for part in ("recipe", "settings"):
            before |= before.pop(part, {})
            now |= now.pop(part)
        # What an older version did not write down is not compared.
        changed = [name for name in now if name in before and before[name] != now[name]]
        if changed:
            changes = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in changed)
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
            "settings": self.settings,
            "processes": self.fabric.world_size,
        }

    def _set_up(self, snapshot: Snapshot | None) -> None:
        recipe, fabric = self.recipe, self.fabric
        clip = self.objective.prepare(self.initial)
        clip.train()
        self.objective.train()
        self.precision = (
            snapshot.summary["precision"]
            if snapshot
            else fabric.broadcast(resolve(recipe.precision, fabric.device))
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
        self.feed.restore(snapshot.state["epoch"], snapshot.state["position"], snapshot.process["data"])
        restore_random_state(snapshot.process["random"])

    def _train(self) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=self.fabric.device)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
        feed = self.feed
        while not self.state.done:
            self.state.epoch = feed.epoch
            with closing(self.meter.waiting_for(feed.rest())) as batches:
                for batch in batches:
                    feed.position += 1
                    self._step(batch)
                    if self.state.done:
                        break
            if feed.position == 0:
                raise DataError(f"epoch {feed.epoch} has no batch: is the batch larger than the data set?")
            if not self.state.done or feed.at_end:
                self._call("on_epoch")
            feed.next_epoch()
        if self.saved_step != self.state.step:
            self._save()

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
        self._save_or_stop()

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

    def _save_or_stop(self) -> None:
        saving, step = self.saving, self.state.step
        save = saving.steps is not None and step % saving.steps == 0
        late = saving.minutes is not None and time.monotonic() - self.saved_at >= 60 * saving.minutes
        stop = self.asked_to_stop.is_set()
        if self.fabric.world_size > 1:  # clocks and signals differ; what the first process says holds for all
            late, stop = self.fabric.broadcast((late, stop)) if step % AGREE_EVERY == 0 else (False, False)
        if save or late or stop:
            self._save()
        if stop and not self.state.done:
            raise Interrupted(f"stopped after step {step} of {self.steps}; run again to continue")

    def _save(self) -> None:
        state = self.state
        self._require_finite(state.terms)
        self.checkpoints.write_process(state.step, {"random": random_state(), "data": self.feed.state()})
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
                    "epoch": self.feed.epoch,
                    "position": self.feed.position,
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


def _steps(recipe: Recipe, feed: Feed) -> int:
    """Steps in all."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.epochs is None:
        raise ConfigError("a recipe needs epochs or steps")
    if feed.length is None:
        raise ConfigError("the length of the data is not known: give the recipe steps instead of epochs")
    if not feed.length:
        raise DataError("the data has no batch: is the batch larger than the data set?")
    return recipe.epochs * feed.length


def _settings(objective: nn.Module) -> dict[str, Any]:
    """The plain public attributes of an objective, as it was made: they decide what is minimized."""
    plain = (bool, int, float, str, type(None))
    return {
        f"objective.{name}": value
        for name, value in vars(objective).items()
        if isinstance(value, plain) and not name.startswith("_") and name != "training"
    }
