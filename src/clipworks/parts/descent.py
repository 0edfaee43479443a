"""Gradient descent on a few parameters over labeled shots: the loop that prompt-like methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipworks.engine.precision import computing
from clipworks.errors import ConfigError, EstimatorInputError
from clipworks.parts.progress import with_bar
from clipworks.parts.schedules import Schedule, rows_of_epoch, steps_of_epoch
from clipworks.parts.shots import Shots, Step


def descend(
    shots: Shots,
    groups: list[dict[str, Any]],
    backward: Callable[[Step], Tensor],
    schedule: Schedule,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    precision: str = "fp32",
    stop: Callable[[int], bool] | None = None,
    words: str = "fitting",
    bar: bool | None = None,
) -> list[float]:
    """Fit the parameters of some groups to shots; `descend_rows` says how.

    Args:
        shots: the examples; every epoch sees another view of each, where there are several.
        backward: leaves gradients in the parameters and gives back the loss, detached.

    Returns:
        The mean loss of each epoch.
    """

    def step(rows: Tensor, epoch: int) -> Tensor:
        return backward(
            Step(
                shots.inputs(rows, epoch).to(device),
                shots.labels[rows].to(device),
                shots.weights[rows].to(device),
                rows,
                epoch,
                shots,
            )
        )

    return descend_rows(
        len(shots),
        groups,
        step,
        schedule,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        precision=precision,
        stop=stop,
        words=words,
        bar=bar,
    )


def descend_rows(
    count: int,
    groups: list[dict[str, Any]],
    backward: Callable[[Tensor, int], Tensor],
    schedule: Schedule,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    precision: str = "fp32",
    stop: Callable[[int], bool] | None = None,
    words: str = "fitting",
    bar: bool | None = None,
) -> list[float]:
    """Fit the parameters of some groups; the order of the examples is a function of the seed.

    Args:
        count: how many examples there are.
        groups: as an optimizer takes them.
        backward: of the rows (b,) of a batch and the number of the epoch; leaves gradients in the parameters
            and gives back the loss, detached.
        schedule: optimizer and course of the learning rate.
        lr: the highest learning rate.
        epochs: at most.
        batch_size: examples a step.
        seed: of the order.
        device: where steps are computed.
        precision: `fp32` or `bf16`.
        stop: called after each epoch (from 0); True ends the fit.
        words: what the bar says.
        bar: None shows it on a terminal.

    Returns:
        The mean loss of each epoch.

    Raises:
        ConfigError: for settings that cannot work, or if the loss is not finite.
    """
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise ConfigError(
            "epochs and batch_size must be at least 1 and lr above 0, "
            f"not epochs={epochs}, batch_size={batch_size}, lr={lr}"
        )
    optimizer = schedule.make(groups, lr)
    steps = epochs * steps_of_epoch(count, batch_size, schedule.drop_last)
    means: list[float] = []
    number = 0
    for epoch in with_bar(range(epochs), epochs, words, bar):
        losses = []
        for rows in rows_of_epoch(count, batch_size, seed, epoch, schedule.drop_last):
            rate, decay = schedule.lr(lr, epoch, epochs, number, steps), schedule.decay_factor(number, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
                group["weight_decay"] = group["first_weight_decay"] * decay
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad(), computing(precision, device):
                losses.append(backward(rows, epoch))
            if schedule.clip_norm is not None:
                held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                nn.utils.clip_grad_norm_(held, schedule.clip_norm)
            optimizer.step()
            number += 1
        means.append(float(torch.stack(losses).mean()))
        if not math.isfinite(means[-1]):
            raise ConfigError(f"the loss became {means[-1]} in epoch {epoch}: lower lr ({lr})")
        if stop is not None and stop(epoch):
            break
    return means


def hold_out(shots: Shots, seed: int) -> tuple[Shots, Shots]:
    """Training and validation examples: a fifth of every class, at least one example, is held out.

    Raises:
        EstimatorInputError: if a class has a single example.
    """
    generator = np.random.default_rng(seed)
    labels, away = shots.labels.numpy(), np.zeros(len(shots), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) == 1:
            raise EstimatorInputError(
                "a class with a single picture has none to hold out: give validation=(X, y) or patience=None"
            )
        away[generator.permutation(rows)[: max(1, len(rows) // 5)]] = True
    return shots.select(np.flatnonzero(~away)), shots.select(np.flatnonzero(away))
