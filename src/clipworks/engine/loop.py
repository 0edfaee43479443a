"""The loop of one training, or of one stage of it; `training.fit` is the way in."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipworks.data.source import Skipped
from clipworks.engine.accumulate import backward_in_parts
from clipworks.engine.average import Average
from clipworks.engine.callbacks import Callback, State
from clipworks.engine.carrying import Carrier
from clipworks.engine.checkpoints import CheckpointFolder, Saving, Snapshot, tensors_once
from clipworks.engine.device import default_fabric, shares_weights
from clipworks.engine.feed import Feed
from clipworks.engine.flops import Utilization
from clipworks.engine.gather import gather_features, gather_objects
from clipworks.engine.groups import parameter_groups
from clipworks.engine.identity import identity_of, require_same
from clipworks.engine.interruption import Interrupted, polite_end
from clipworks.engine.meter import Meter
from clipworks.engine.optimizers import optimizer_of
from clipworks.engine.precision import resolve
from clipworks.engine.randomness import (
    own_randomness,
    random_state,
    restore_random_state,
    seed_all,
    untouched_randomness,
)
from clipworks.engine.recipe import Recipe
from clipworks.engine.schedule import image_size, learning_rate_factor, resize
from clipworks.engine.sharding import (
    apart,
    average_numbers,
    clip_gradients,
    copy_whole,
    gradient_norm,
    like_the_first,
    shard,
)
from clipworks.engine.stage import Stage, checkpoint_activations, total
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
        fabric = default_fabric(recipe.strategy) if fabric is None else fabric
        self.fabric = fabric
        self.recipe = recipe
        self.feed = Feed(data)
        self.folder = folder
        self.saving = saving
        self.initial = clip
        self.objective: Any = objective
        self.checkpoints = CheckpointFolder(
            folder / "checkpoints", saving.keep, fabric.global_rank, fabric.world_size
        )
        self.steps = _steps(recipe, self.feed)
        self.identity = identity_of(recipe, self.steps, objective)  # before anybody changes the objective
        self.meter = Meter()

    def run(self, resume: Resume, watchers: Sequence[Callback]) -> None:
        """Train to the end, from the newest checkpoint where there is one."""
        self.watchers = watchers
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        with own_randomness(self.recipe.seed + self.fabric.global_rank), polite_end() as self.asked_to_stop:
            snapshot = self._find(resume)
            self._set_up(snapshot)
            self.started = time.monotonic()
            if snapshot is None or not self.state.done:
                self._call("on_start")
                self._train()
                self._report()
                self._call("on_end")
            clip = self._finish()
            if self.fabric.global_rank == 0 and hasattr(clip, "save"):
                clip.save(self.folder / "clip")
            self.fabric.barrier()
            self.clip: nn.Module = clip
            self.seconds = time.monotonic() - self.started

    def _find(self, resume: Resume) -> Snapshot | None:
        """The newest whole checkpoint; the first process looks for it, and all take the same."""
        snapshot, step, problem = None, None, ""
        if self.fabric.global_rank == 0:
            self.checkpoints.tidy()
            if resume is False:
                self.checkpoints.clear()
            try:
                snapshot = self.checkpoints.newest()
            except CheckpointError as error:
                problem = str(error)
            step = None if snapshot is None else int(snapshot.summary["step"])
        step, problem = self.fabric.broadcast((step, problem))
        if problem:
            raise CheckpointError(problem)
        if step is None:
            if resume is True:
                raise CheckpointError(f"{self.checkpoints.folder}: no checkpoint to resume from")
            return None
        snapshot = snapshot or self.checkpoints.read(step)
        require_same(self.identity, snapshot.summary, self.folder)
        return snapshot

    def _set_up(self, snapshot: Snapshot | None) -> None:
        recipe, fabric = self.recipe, self.fabric
        clip: Any = self.objective.prepare(self.initial)
        clip.train()
        self.objective.train()
        self.precision = (
            snapshot.summary["precision"]
            if snapshot
            else fabric.broadcast(resolve(recipe.precision, fabric.device))
        )
        # Sharing weights out changes modules for good. Then a copy is trained, and `whole` shows its weights.
        self.whole = Stage(clip, self.objective, self.precision)
        self.sharing = shares_weights(fabric)
        self.stage = (copy.deepcopy(self.whole) if self.sharing else self.whole).to(fabric.device)
        clip, self.objective = self.stage.clip, self.stage.objective
        if self.sharing:
            like_the_first(self.stage)
        self.average = Average(clip, recipe.ema) if recipe.ema is not None else None
        if self.sharing and self.average is not None:
            shard(self.average.module, fabric.strategy.device_mesh["data_parallel"])
        self.checkpointed = checkpoint_activations(clip) if recipe.checkpoint_activations else []
        if recipe.compile:
            for tower in (clip.image, clip.text):
                getattr(tower, "compile_blocks", tower.compile)()
        self.module = fabric.setup_module(self.stage)
        groups = getattr(self.objective, "groups", None)
        self.groups = (
            groups(clip)
            if groups is not None
            else parameter_groups(self.stage, weight_decay=recipe.weight_decay)
        )
        for group in self.groups:
            group.setdefault("weight_decay", recipe.weight_decay)
            group["highest_lr"] = group.pop("lr", recipe.lr) * group.pop("lr_scale", 1.0)
        self.optimizer = optimizer_of(recipe, apart(self.groups), self.stage)
        self.stepper = fabric.setup_optimizers(self.optimizer)
        self.carrier = Carrier(self.stage, self.average, self.optimizer)
        self.utilization = Utilization(clip, self.precision, fabric.device, fabric.world_size)
        averaged = self.average is not None and not self.sharing
        self.state = State(
            step=0,
            steps=self.steps,
            folder=self.folder,
            recipe=recipe,
            clip=self.average.module if averaged else self.whole.clip,  # type: ignore[union-attr]
        )
        self.batch_size, self.moved = 0, False
        if snapshot is not None:
            self._restore(snapshot)

    def _restore(self, snapshot: Snapshot) -> None:
        saved, state, fabric = snapshot.state, self.state, self.fabric
        self.carrier.give(snapshot)
        if self.average is not None:
            self.average.updates = saved["average_updates"]
        state.step = snapshot.summary["step"]
        state.samples = saved["samples"]
        state.terms = saved["terms"]
        self.feed.restore(saved["epoch"], saved["position"], snapshot.process["data"])
        if snapshot.summary.get("processes", fabric.world_size) == fabric.world_size:
            restore_random_state(snapshot.process["random"])
        else:  # another number of processes: see `training`
            self.batch_size = saved.get("batch_size", 0)
            self.moved = self.batch_size > 0
            seed_all(self.recipe.seed + fabric.global_rank + 1_000_003 * state.step)

    def _report(self) -> None:
        """Add up what the data could not read, in all processes, and write it down."""
        reports = [report for report in gather_objects(self.feed.skipped) if report is not None]
        if reports:
            self.state.skipped = reduce(Skipped.update, reports, Skipped())
            if self.fabric.global_rank == 0:
                (self.folder / "skipped.txt").write_text(f"{self.state.skipped}\n", encoding="utf-8")

    def _finish(self) -> Any:
        """The trained model, in evaluation mode; its weights are the average where one is kept."""
        for tower in self.checkpointed:
            tower.checkpointing = False
        if self.sharing:
            copy_whole(tensors_once(self.stage), tensors_once(self.whole))
            self._show_weights(everywhere=True)
        elif self.average is not None:
            self.average.copy_to(self.stage.clip)
        return self.whole.clip.eval()

    def _show_weights(self, everywhere: bool = False) -> None:
        """Put shared weights together, for whoever looks at `state.clip`."""
        shown = self.stage.clip if self.average is None else self.average.module
        keep = everywhere or self.fabric.global_rank == 0
        copy_whole(tensors_once(shown), tensors_once(self.whole.clip), keep)

    def _train(self) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=self.fabric.device)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
        feed = self.feed
        while not self.state.done:
            self.state.epoch = feed.epoch
            set_epoch = getattr(self.objective, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(feed.epoch)
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
            group["lr"] = group["highest_lr"] * (factor if group.get("scheduled", True) else 1.0)
        rows = len(batch) * self.fabric.world_size
        self._same_batch(rows)
        side = image_size(state.step, self.steps, recipe)
        flops = self.utilization.needed(batch, side)
        batch = batch.to(self.fabric.device)
        if recipe.image_sizes and batch.images is not None:
            batch = replace(batch, images=resize(batch.images, side))

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
        state.samples += rows
        state.terms, state.gradient_norm, state.lr = terms, norm, recipe.lr * factor
        scale = getattr(self.stage.clip, "scale", None)
        state.scale = None if scale is None else scale.detach()
        self.meter.step(rows, flops)
        state.rate, state.waiting = self.meter.rate, self.meter.waiting
        state.utilization = self.meter.flops_rate / self.utilization.peak
        state.seconds = time.monotonic() - self.started
        self._call("on_step")
        self._save_or_stop()

    def _same_batch(self, rows: int) -> None:
        """On another number of processes, a step is on as many rows as before."""
        if self.moved and rows != self.batch_size and not self.feed.at_end:  # the last batch may be smaller
            raise ConfigError(
                f"the training was on batches of {self.batch_size} over all processes, and these are of "
                f"{rows}: keep the global batch when the number of processes changes"
            )
        self.moved, self.batch_size = False, max(rows, self.batch_size)

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
        if self.sharing:
            average_numbers(self.stage.parameters())
        named = {name: term.detach() for name, term in terms.items()}
        return {"loss": total(named)} | {name: term for name, term in named.items() if name != "loss"}

    def _check_and_clip(self, terms: dict[str, Tensor]) -> Tensor:
        gradients = [
            p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = gradient_norm(gradients)
        self.finite &= torch.isfinite(terms["loss"]) & torch.isfinite(norm)
        if self.fabric.device.type == "cpu" or self.state.step % CHECK_EVERY == 0:
            self._require_finite(terms)
        if self.recipe.clip_gradient is not None:
            clip_gradients(gradients, self.recipe.clip_gradient, norm)
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
        state, first = self.state, self.fabric.global_rank == 0
        self._require_finite(state.terms)
        self.checkpoints.write_process(state.step, {"random": random_state(), "data": self.feed.state()})
        self.fabric.barrier()
        content, shared = self.carrier.take(shared=self.saving.shared, keep=first)
        self.checkpoints.write_shared(state.step, shared)
        self.fabric.barrier()
        if first:
            self.checkpoints.write(
                state.step,
                weights=content["weights"],
                average=content["average"],
                state={
                    "optimizer": content["optimizer"],
                    "average_updates": self.average.updates if self.average is not None else 0,
                    "samples": state.samples,
                    "terms": state.terms,
                    "epoch": self.feed.epoch,
                    "position": self.feed.position,
                    "batch_size": self.batch_size,
                },
                summary={
                    **self.identity,
                    "precision": self.precision,
                    "processes": self.fabric.world_size,
                },
            )
        self.fabric.barrier()
        self.saved_at, self.saved_step = time.monotonic(), state.step
        self.meter.pause()

    def _call(self, event: str) -> None:
        shown = self.sharing and (event != "on_step" or self._looked_at())
        if shown:
            self._show_weights()
        if self.fabric.global_rank != 0:
            return
        clip = self.state.clip
        home = next(clip.parameters()).device
        with untouched_randomness():
            if shown:
                clip.to(self.fabric.device)
            for watcher in self.watchers:
                handler = getattr(watcher, event, None)
                if handler is not None:
                    handler(self.state)
            if shown:
                clip.to(home)

    def _looked_at(self) -> bool:
        """Whether a watcher will look at the weights in this step; the same in every process."""
        return any(reads(self.state) for w in self.watchers if (reads := getattr(w, "reads_clip", None)))


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
