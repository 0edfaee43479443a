"""Logs that survive crashes, evaluations, plots and lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipworks.engine.callbacks import Evaluate, State
from clipworks.engine.recipe import Recipe
from clipworks.engine.reports import Bar, CsvLog, Lines, LossPlot
from clipworks.engine.table import Table
from clipworks.errors import ConfigError


def state(folder: Path, step: int = 0, steps: int = 20) -> State:
    return State(step=step, steps=steps, folder=folder, recipe=Recipe(steps=steps), clip=nn.Linear(2, 2))


def advance(now: State, watchers: list[Any], until: int) -> None:
    while now.step < until:
        now.step += 1
        now.samples += 8
        now.terms = {"loss": torch.tensor(1 / now.step), "extra": torch.tensor(2.0)}
        now.rate = 100.0
        for watcher in watchers:
            watcher.on_step(now)


@given(crash=st.integers(1, 19), saved=st.integers(0, 19), cut=st.integers(0, 60))
def test_log_has_each_step_once_after_a_crash(
    tmp_path_factory: Any, crash: int, saved: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    saved = min(saved, crash)
    log = CsvLog(every=1)
    now = state(folder)
    log.on_start(now)
    advance(now, [log], crash)
    path = folder / "log.csv"
    # The crash cuts the file anywhere after the last step that was saved.
    kept = sum(len(line) + 1 for line in path.read_text().split("\n")[: saved + 1])
    path.write_text(path.read_text()[: max(kept, len(path.read_text()) - cut)])
    log = CsvLog(every=1)
    now = state(folder, saved)
    log.on_start(now)
    advance(now, [log], 20)
    rows = Table(path).read()
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(row["loss"] == pytest.approx(1 / row["step"]) and row["extra"] == 2 for row in rows)


def test_log_starts_anew_with_a_new_training(tmp_path: Path) -> None:
    for _ in range(2):
        log, now = CsvLog(every=5), state(tmp_path)
        log.on_start(now)
        advance(now, [log], 12)
    assert [row["step"] for row in Table(tmp_path / "log.csv").read()] == [5, 10]


def test_a_column_that_comes_later_joins_the_table(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv")
    table.open(0)
    table.append({"step": 1, "a": 2})
    table.append({"step": 2, "b": 3})
    table.append({"step": 3, "a": 4, "b": 5})
    rows = table.read()
    assert [row["b"] for row in rows[1:]] == [3, 5] and math.isnan(rows[0]["b"]) and math.isnan(rows[1]["a"])


def test_evaluation_runs_in_evaluation_mode_and_once_a_step(tmp_path: Path) -> None:
    calls = []

    def function(clip: nn.Module) -> dict[str, float]:
        calls.append((clip.training, torch.is_grad_enabled()))
        return {"top1": 0.5}

    evaluate, now = Evaluate(function, every=4), state(tmp_path, steps=8)
    now.clip.train()
    evaluate.on_start(now)
    advance(now, [evaluate], 8)
    evaluate.on_end(now)
    assert calls == [(False, False)] * 2 and now.clip.training and now.metrics == {"top1": 0.5}
    assert [row["step"] for row in Table(tmp_path / "metrics.csv").read()] == [4, 8]


def test_plot_is_drawn_at_the_end_and_during_the_training(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, plot, now = CsvLog(every=1), LossPlot(minutes=0), state(tmp_path)
    evaluate = Evaluate(lambda clip: {"top1": 0.5}, every=2)
    for watcher in (log, evaluate):
        watcher.on_start(now)
    advance(now, [log, evaluate, plot], 3)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "loss.png").unlink()
    plot.on_end(now)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_json_lines_are_json_and_text_lines_say_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = state(tmp_path, steps=2)
    advance(now, [Lines("json", 0)], 2)
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [1, 2]
    now = state(tmp_path, steps=1)
    advance(now, [Lines("text", 0)], 1)
    assert "step 1/1  loss 1.0000" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="xml"):
        Lines("xml")


def test_bar_reaches_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar, now = Bar(), state(tmp_path, steps=3)
    bar.on_start(now)
    advance(now, [bar], 3)
    bar.on_end(now)
    assert bar.progress.finished
