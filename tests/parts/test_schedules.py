"""Learning rates are the papers' closed forms; the order of examples is a function of the seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipworks.errors import ConfigError
from clipworks.parts.schedules import DASSL, Schedule, rows_of_epoch, steps_of_epoch


def test_the_dassl_schedule_warms_up_one_epoch_and_does_not_reach_zero() -> None:
    rates = [DASSL.lr(0.002, epoch, 5, 0, 0) for epoch in range(5)]
    assert rates[0] == 1e-5
    assert [round(rate / 0.002, 4) for rate in rates[1:]] == [1, 0.9045, 0.6545, 0.3455]
    assert [DASSL.lr(0.0026, epoch, 2, 0, 0) for epoch in range(2)] == [1e-5, 0.0026]


def test_cosine_by_epoch_without_warm_up_and_by_step() -> None:
    by_epoch = Schedule("adam", decay="epoch")
    assert [by_epoch.lr(1.0, e, 30, 0, 0) for e in range(30)] == pytest.approx(
        [(1 + math.cos(math.pi * e / 30)) / 2 for e in range(30)]
    )
    by_step = Schedule("adamw", decay="step")
    assert [by_step.lr(1e-3, 0, 1, t, 9) for t in range(9)] == pytest.approx(
        [0.5e-3 * (1 + math.cos(math.pi * t / 9)) for t in range(9)]
    )
    warm = Schedule("adamw", decay="step", warmup_share=0.1)
    assert [warm.lr(1.0, 0, 1, t, 20) for t in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert Schedule(decay="constant").lr(3.0, 7, 9, 5, 6) == 3.0


def test_every_example_is_met_once_an_epoch_and_an_order_can_be_made_again() -> None:
    first = torch.cat(list(rows_of_epoch(37, 8, 1, 0, False)))
    assert first.sort()[0].tolist() == list(range(37))
    assert torch.equal(first, torch.cat(list(rows_of_epoch(37, 8, 1, 0, False))))
    assert not torch.equal(first, torch.cat(list(rows_of_epoch(37, 8, 1, 1, False))))
    assert not torch.equal(first, torch.cat(list(rows_of_epoch(37, 8, 2, 0, False))))


@pytest.mark.parametrize(("count", "size"), [(37, 8), (5, 8), (16, 8)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_set_smaller_than_a_batch_is_one_small_batch(count: int, size: int, drop_last: bool) -> None:
    sizes = [len(rows) for rows in rows_of_epoch(count, size, 0, 0, drop_last)]
    assert len(sizes) == steps_of_epoch(count, size, drop_last)
    assert sum(sizes) == (count if not drop_last or count < size else count // size * size)


def test_groups_keep_their_proportion_and_their_decay() -> None:
    slow, fast = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = Schedule("adamw", weight_decay=0.1).make(
        [{"params": [slow], "lr": 0.01, "weight_decay": 0.0}, {"params": [fast]}], 0.1
    )
    assert [group["share"] for group in made.param_groups] == pytest.approx([0.1, 1.0])
    assert [group["weight_decay"] for group in made.param_groups] == [0.0, 0.1]
    with pytest.raises(ConfigError, match="lion"):
        Schedule("lion").make([{"params": [slow]}], 0.1)  # type: ignore[arg-type]
