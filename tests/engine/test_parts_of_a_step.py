"""Average, decay groups, accumulation, precision and randomness, each against its own definition."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipworks.engine.accumulate import backward_in_parts
from clipworks.engine.average import Average
from clipworks.engine.groups import parameter_groups
from clipworks.engine.precision import resolve
from clipworks.engine.randomness import (
    own_randomness,
    random_state,
    restore_random_state,
    untouched_randomness,
)
from clipworks.engine.stage import Stage, total
from clipworks.errors import ConfigError


def test_average_is_the_closed_form_of_its_recursion() -> None:
    module = nn.BatchNorm1d(3)
    average = Average(module, decay=0.9)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, generator=generator) for _ in range(200)]
    expected = module.weight.detach().clone().double()
    for t, value in enumerate(values):
        module.weight.data.copy_(value)
        module.running_mean.copy_(value)
        average.update(module)
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value.double()
    torch.testing.assert_close(average.module.weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(average.module.running_mean, values[-1])
    assert not average.module.training and not average.module.weight.requires_grad


def test_only_matrices_decay(small: Callable[..., Any]) -> None:
    clip = small()
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(clip, weight_decay=0.2)
    )
    assert decayed | free == set(names.values()) and not decayed & free
    expected = {n for n, p in clip.named_parameters() if n.endswith(".weight") and p.dim() >= 2}
    assert decayed == expected
    assert {"scale", "image.positions", "text.positions", "image.class_token"} <= free


def test_frozen_parameters_are_in_no_group_and_nothing_to_train_is_an_error(
    small: Callable[..., Any],
) -> None:
    clip = small()
    clip.image.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(clip, weight_decay=0.2) for p in group["params"]}
    assert grouped == {id(p) for p in clip.parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="frozen"):
        parameter_groups(clip.requires_grad_(False), weight_decay=0.2)


def gradients(stage: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    small: Callable[..., Any], batches: Any, dropping: Any, parts: int
) -> None:
    stage = Stage(small().double(), dropping(share=0.0).double(), "fp32")
    batch = next(iter(batches(size=8)))
    terms = stage.objective.loss(stage(batch))
    total(terms).backward()
    whole = gradients(stage)
    stage.zero_grad(set_to_none=True)
    in_parts = accumulate(stage, batch, parts)
    assert total(in_parts).item() == pytest.approx(total(terms).item(), abs=1e-12)
    assert whole.keys() == gradients(stage).keys() and "clip.scale" in whole
    for name, gradient in gradients(stage).items():
        torch.testing.assert_close(
            gradient, whole[name], atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def accumulate(stage: Stage, batch: Any, parts: int) -> dict[str, torch.Tensor]:
    return backward_in_parts(
        list(batch.split(parts)),
        stage,
        stage.objective.loss,
        lambda terms: total(terms).backward(),
        module=stage,
        unsynchronized=lambda enabled: contextlib.nullcontext(),
    )


def test_the_second_pass_repeats_the_dropout_of_the_first(
    small: Callable[..., Any], batches: Any, dropping: Any
) -> None:
    """With dropout the gradient is that of the loss that was measured: a finite difference says so."""
    stage = Stage(small().double(), dropping(share=0.3).double(), "fp32").train()
    batch = next(iter(batches(size=8)))

    def run() -> float:
        with own_randomness(7):
            return total(accumulate(stage, batch, 4)).item()

    stage.zero_grad()
    run()
    weight = stage.objective.head.weight
    slope = weight.grad[2, 3].item()
    values = []
    for shift in (1e-5, -2e-5):
        with torch.no_grad():
            weight[2, 3] += shift
        values.append(run())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_batch_statistics_are_counted_once_when_accumulating(batches: Any) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def features(self, clip: nn.Module, batch: Any) -> dict[str, Any]:
            return {"x": self.norm(batch.images.float().mean((2, 3)))}

        def loss(self, features: dict[str, Any]) -> dict[str, torch.Tensor]:
            return {"loss": features["x"].square().mean()}

    objective = Normed()
    accumulate(Stage(nn.Linear(1, 1), objective, "fp32"), next(iter(batches())), 4)
    assert objective.norm.num_batches_tracked == 4


def test_bf16_step_is_close_to_fp32_and_weights_stay_fp32(
    small: Callable[..., Any], batches: Any, dropping: Any
) -> None:
    batch = next(iter(batches(size=16)))
    found = {}
    for precision in ("fp32", "bf16"):
        stage = Stage(small(), dropping(share=0.0), precision)
        features = stage(batch)
        assert all(value.dtype == torch.float32 for value in features.values())
        total(stage.objective.loss(features)).backward()
        found[precision] = torch.cat([g.flatten() for g in gradients(stage).values()])
        assert found[precision].dtype == torch.float32
    assert not torch.equal(found["fp32"], found["bf16"])
    cosine = torch.nn.functional.cosine_similarity(found["fp32"], found["bf16"], dim=0)
    assert cosine > 0.995


def test_automatic_precision_is_one_of_the_two() -> None:
    assert resolve("auto", torch.device("cpu")) in ("fp32", "bf16")
    assert resolve("bf16", torch.device("cpu")) == "bf16"


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def test_random_state_can_be_put_back() -> None:
    with own_randomness(3):
        state = random_state()
        first = draws()
        restore_random_state(state)
        assert draws() == first


@pytest.mark.usefixtures("untouched_rng")
def test_a_training_gives_the_callers_random_state_back() -> None:
    with own_randomness(3):
        first = draws()
        with untouched_randomness():
            draws()
        second = draws()
    with own_randomness(3):
        assert (draws(), draws()) == (first, second)
