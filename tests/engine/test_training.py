"""`fit`: what it minimizes, what it writes, and that a crash leaves no trace in the weights."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipworks.engine import Callback, Diverged, Evaluate, Interrupted, Recipe, Saving, State, fit
from clipworks.engine.stage import Stage, checkpoint_activations, total
from clipworks.engine.table import Table
from clipworks.errors import CheckpointError, ConfigError, DataError

OFTEN = Saving(steps=2)


def weights(clip: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in clip.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class StopAt(Callback):
    """Raises after a step, as a crash between two checkpoints would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: State) -> None:
        if state.step == self.step:
            raise ZeroDivisionError


@pytest.fixture
def train(small: Callable[..., Any], batches: Any, dropping: Any, short: Recipe) -> Callable[..., Any]:
    """Run the standard small training in a folder; anything may be replaced."""

    def run(folder: Path, recipe: Recipe = short, **changes: Any) -> Any:
        torch.set_num_threads(1)
        options: dict[str, Any] = {"saving": OFTEN, "show": "nothing"} | changes
        clip = options.pop("clip", None) or small()
        objective = options.pop("objective", None) or dropping()
        data = options.pop("data", None) or batches()
        return fit(clip, objective, data, recipe, folder=folder, **options)

    return run


def test_training_lowers_the_loss_and_leaves_all_its_files(train: Any, tmp_path: Path, short: Recipe) -> None:
    result = train(
        tmp_path, dataclasses.replace(short, epochs=30), callbacks=[Evaluate(lambda clip: {"one": 1.0})]
    )
    rows = Table(tmp_path / "log.csv").read()
    assert (
        result.step == 120 and result.samples == 960 and result.loss < 1.0 < 2.0 < train(tmp_path / "b").loss
    )
    assert [row["step"] for row in rows] == [50, 100, 120] and rows[-1]["epoch"] == 29
    assert rows[-1]["forth"] + rows[-1]["back"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert result.metrics == {"one": 1.0} and len(Table(tmp_path / "metrics.csv").read()) == 30
    assert (tmp_path / "loss.png").exists() and (tmp_path / "clip").is_dir()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000118",
        "step-00000120",
    ]


def test_one_step_is_adamw_on_the_summed_terms(
    train: Any, tmp_path: Path, small: Any, batches: Any, dropping: Any
) -> None:
    recipe = Recipe(steps=1, warmup=1, lr=1e-2, precision="fp32", weight_decay=0.3)
    result = train(tmp_path, recipe, objective=dropping(share=0.0))
    clip, objective = small(), dropping(share=0.0)
    sum(objective.loss(objective.features(clip, next(iter(batches())))).values()).backward()  # type: ignore[union-attr]
    for name, parameter in clip.named_parameters():
        # The first step of Adam is the sign of the gradient, nearly.
        assert parameter.grad is not None
        decayed = (
            parameter * (1 - 1e-2 * 0.3) if name.endswith("weight") and parameter.dim() > 1 else parameter
        )
        expected = decayed - 1e-2 * parameter.grad / (parameter.grad.abs() + 1e-6)
        torch.testing.assert_close(result.clip.get_parameter(name), expected, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9}, {"accumulate": 3}, {"image_sizes": ((0.5, 8), (0.5, 16))}]
)
def test_a_resumed_training_ends_with_the_same_weights(
    train: Any, tmp_path: Path, short: Recipe, options: dict[str, Any]
) -> None:
    recipe = dataclasses.replace(short, **options)
    expected = weights(train(tmp_path / "whole", recipe).clip)
    for step in (3, 4, 9, 12):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / str(step), recipe, callbacks=[StopAt(step)])
        result = train(tmp_path / str(step), recipe, resume=True)
        assert equal(weights(result.clip), expected), f"stopped after step {step}"
        log = Table(tmp_path / str(step) / "log.csv").read()
        assert [row["step"] for row in log] == [12]


def test_plain_lists_of_batches_resume_by_skipping(train: Any, tmp_path: Path, batches: Any) -> None:
    data = list(batches())
    expected = weights(train(tmp_path / "whole", data=data).clip)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", data=data, callbacks=[StopAt(7)])
    assert equal(weights(train(tmp_path / "cut", data=data).clip), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child to kill is made by fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_ten_times_and_while_a_checkpoint_is_written_it_ends_with_the_same_weights(
    train: Any, tmp_path: Path, short: Recipe
) -> None:
    recipe = dataclasses.replace(short, epochs=12, ema=0.9)
    expected = weights(train(tmp_path / "whole", recipe).clip)
    generator = torch.Generator().manual_seed(0)
    moments = [*(round(48 * (kill + 0.5) / 10) for kill in range(10)), None]  # steps; None: within a writing
    for moment in moments:
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            if moment is None:
                kill_at_fsync(11)
            try:
                train(tmp_path / "killed", recipe, saving=Saving(steps=2), callbacks=[Tell(tell)])
            finally:
                os._exit(0)
        os.close(tell)
        with os.fdopen(told, "rb", buffering=0) as steps:
            while moment is not None and steps.read(1)[0] < moment:
                pass
            if moment is not None:
                time.sleep(0.01 * torch.rand((), generator=generator).item())
                os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    result = train(tmp_path / "killed", recipe, saving=Saving(steps=2))
    assert result.step == 48 and equal(weights(result.clip), expected)
    assert [row["step"] for row in Table(tmp_path / "killed" / "log.csv").read()] == [48]


class Tell(Callback):
    """Writes the number of each step, as one byte, into a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step(self, state: State) -> None:
        os.write(self.pipe, bytes([state.step]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child to kill is made by fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_any_wait_for_the_disk_it_ends_with_the_same_weights(
    train: Any, tmp_path: Path, short: Recipe
) -> None:
    recipe = dataclasses.replace(short, epochs=2, ema=0.9)
    expected = weights(train(tmp_path / "whole", recipe).clip)
    for count in (0, 1, 2, 4, 6, 7, 9):
        child = os.fork()
        if child == 0:
            kill_at_fsync(count)
            try:
                train(tmp_path / "killed", recipe, saving=Saving(steps=1))
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert equal(weights(train(tmp_path / "killed", recipe, saving=Saving(steps=1)).clip), expected)


def kill_at_fsync(count: int) -> None:
    """Make this process die when it waits for the disk for the `count`-th time."""
    flush = os.fsync

    def dying(descriptor: int) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = dying  # type: ignore[assignment]


def test_a_finished_training_is_only_loaded(train: Any, tmp_path: Path) -> None:
    first = train(tmp_path)
    steps: list[int] = []

    class Count(Callback):
        def on_step(self, state: State) -> None:
            steps.append(state.step)

    again = train(tmp_path, callbacks=[Count()])
    assert not steps and equal(weights(first.clip), weights(again.clip)) and again.loss == first.loss


def test_resuming_with_another_recipe_names_what_changed(
    train: Any, tmp_path: Path, short: Recipe, batches: Any
) -> None:
    train(tmp_path)
    with pytest.raises(ConfigError, match=r"lr was 0\.003 and is 0\.001"):
        train(tmp_path, dataclasses.replace(short, lr=1e-3))
    with pytest.raises(ConfigError, match="epochs was 3 and is 5"):
        train(tmp_path, dataclasses.replace(short, epochs=5))
    with pytest.raises(ConfigError, match="total_steps was 12 and is 15"):
        train(tmp_path, data=batches(count=5))
    assert train(tmp_path, dataclasses.replace(short, lr=1e-3), resume=False).step == 12


def test_resuming_with_another_setting_of_the_objective_names_it(
    train: Any, tmp_path: Path, dropping: Any
) -> None:
    def objective(margin: float) -> nn.Module:
        made = dropping()
        made.margin = margin
        return made  # type: ignore[no-any-return]

    train(tmp_path, objective=objective(0.1))
    with pytest.raises(ConfigError, match=r"objective\.margin was 0\.1 and is 0\.2"):
        train(tmp_path, objective=objective(0.2))


def test_resume_true_insists_on_a_checkpoint(train: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(tmp_path, resume=True)


def test_damaged_newest_checkpoint_costs_steps_but_not_the_result(train: Any, tmp_path: Path) -> None:
    expected = weights(train(tmp_path / "whole").clip)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", callbacks=[StopAt(9)])
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "weights.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="step-00000008"):
        result = train(tmp_path / "cut")
    assert equal(weights(result.clip), expected)


def test_the_average_is_what_is_evaluated_and_returned(
    train: Any, tmp_path: Path, short: Recipe, small: Any
) -> None:
    trained = small()
    expected = {name: p.detach().clone() for name, p in trained.named_parameters()}
    last: list[dict[str, Tensor]] = []

    class Follow(Callback):
        def on_step(self, state: State) -> None:
            decay = min(0.5, state.step / (9 + state.step))
            for name, p in trained.named_parameters():
                expected[name].lerp_(p.detach(), 1 - decay)
            last.append(weights(state.clip))

    result = train(tmp_path, dataclasses.replace(short, ema=0.5), clip=trained, callbacks=[Follow()])
    assert result.clip is trained and equal(weights(trained), last[-1])
    for name, value in expected.items():
        torch.testing.assert_close(last[-1][name], value, atol=1e-6, rtol=1e-5)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    train: Any, tmp_path: Path, dropping: Any
) -> None:
    class Exploding(dropping):  # type: ignore[misc]
        steps = 0

        def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
            self.steps += 1
            factor = float("nan") if self.steps == 6 else 1.0
            return {name: factor * term for name, term in super().loss(features).items()}

    with pytest.raises(Diverged, match=r"step 6 \(loss nan.*since step 4"):
        train(tmp_path, objective=Exploding())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_scale_stays_below_its_bound(train: Any, tmp_path: Path, short: Recipe, small: Any) -> None:
    clip = small()
    with torch.no_grad():
        clip.scale.fill_(4.6051)
    assert train(tmp_path, dataclasses.replace(short, lr=0.1), clip=clip).clip.scale.item() <= 4.60518


def test_termination_is_a_checkpoint_and_a_clear_end(train: Any, tmp_path: Path) -> None:
    class Terminate(Callback):
        def on_step(self, state: State) -> None:
            if state.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    expected = weights(train(tmp_path / "whole").clip)
    with pytest.raises(Interrupted, match="step 5 of 12"):
        train(tmp_path / "cut", callbacks=[Terminate()], saving=Saving())
    assert equal(weights(train(tmp_path / "cut").clip), expected)


def test_training_leaves_the_global_generators_as_they_were(
    train: Any, tmp_path: Path, small: Any, dropping: Any
) -> None:
    clip, objective = small(), dropping()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    train(tmp_path, clip=clip, objective=objective)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_callbacks_that_draw_random_numbers_change_nothing(train: Any, tmp_path: Path) -> None:
    class Draw(Callback):
        def on_step(self, state: State) -> None:
            torch.rand(3)

    plain, watched = train(tmp_path / "a"), train(tmp_path / "b", callbacks=[Draw()])
    assert equal(weights(plain.clip), weights(watched.clip))


def test_stages_run_one_after_the_other_and_resume(
    train: Any, tmp_path: Path, short: Recipe, dropping: Any
) -> None:
    recipes = [short, dataclasses.replace(short, epochs=2, lr=1e-3)]
    one = train(tmp_path / "1", recipes[0], objective=dropping())
    expected = weights(train(tmp_path / "2", recipes[1], objective=dropping(), clip=one.clip).clip)
    both = train(tmp_path / "both", recipes, objective=[dropping(), dropping()])
    assert equal(weights(both.clip), expected) and both.folder == tmp_path / "both"

    class StopInSecond(Callback):
        def on_step(self, state: State) -> None:
            if state.steps == 8 and state.step == 5:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", recipes, objective=[dropping(), dropping()], callbacks=[StopInSecond()])
    resumed = train(tmp_path / "cut", recipes, objective=[dropping(), dropping()])
    assert equal(weights(resumed.clip), expected)


def test_an_objective_may_choose_its_groups_and_its_backward_pass(
    train: Any, tmp_path: Path, dropping: Any, small: Any
) -> None:
    class Own(dropping):  # type: ignore[misc]
        def groups(self, clip: Any) -> list[dict[str, Any]]:
            return [{"params": list(clip.text.parameters()), "lr": 1e-4}]

        def backward(self, terms: dict[str, Tensor]) -> None:
            (terms["forth"] * 2).backward()

    clip = small()
    before = weights(clip)
    after = weights(train(tmp_path, clip=clip, objective=Own()).clip)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith("text.")
    }
    assert Table(tmp_path / "log.csv").read()[-1]["back"] > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_activation_checkpointing_takes_the_same_steps_and_is_gone_afterwards(
    train: Any, tmp_path: Path, short: Recipe, small: Any, dropping: Any, accumulate: int
) -> None:
    def run(name: str, checkpointed: bool) -> nn.Module:
        recipe = dataclasses.replace(
            short, accumulate=accumulate, checkpoint_activations=checkpointed, scale_limit=None
        )
        clip = small().double()
        return train(tmp_path / name, recipe, clip=clip, objective=dropping().double()).clip  # type: ignore[no-any-return]

    whole, kept = run("whole", False), run("kept", True)
    assert not any(getattr(module, "checkpointing", False) for module in kept.modules())
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(kept)[name], tensor, atol=1e-10, rtol=1e-8, msg=name)


def test_activation_checkpointing_has_equal_gradients_and_keeps_less(
    small: Any, batches: Any, dropping: Any
) -> None:
    def step(checkpointed: bool) -> tuple[dict[str, Tensor], int]:
        stage = Stage(small().train(), dropping(share=0.0), "fp32").double()
        if checkpointed:
            assert len(checkpoint_activations(stage.clip)) == 2
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = total(stage.objective.loss(stage(next(iter(batches())))))
        loss.backward()
        return {name: p.grad for name, p in stage.named_parameters()}, sum(kept.values())

    (plain, much), (again, little) = step(False), step(True)
    assert little < 0.6 * much
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


def test_a_model_without_towers_has_nothing_to_checkpoint() -> None:
    with pytest.raises(ConfigError, match="no tower"):
        checkpoint_activations(nn.Linear(2, 2))


def test_how_a_step_is_computed_may_change_when_a_training_is_resumed(
    train: Any, tmp_path: Path, short: Recipe
) -> None:
    recipe = dataclasses.replace(short, eps=1e-3)
    expected = train(tmp_path / "whole", recipe)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", recipe, callbacks=[StopAt(7)])
    other = dataclasses.replace(recipe, accumulate=1, checkpoint_activations=True, strategy="fsdp2")
    found = train(tmp_path / "cut", other)
    for name, tensor in weights(expected.clip).items():
        torch.testing.assert_close(weights(found.clip)[name], tensor, atol=1e-6, rtol=1e-4, msg=name)


def test_the_log_says_how_much_of_the_device_is_used(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, show="text")
    row = Table(tmp_path / "log.csv").read()[-1]
    assert 0 < row["utilization"] < 1 and row["scale"] == pytest.approx(2.6, abs=0.2)
    assert "utilization" in capsys.readouterr().out


def test_no_length_and_no_data_are_clear_errors(train: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="epochs or steps"):
        train(tmp_path / "a", Recipe())
    with pytest.raises(ConfigError, match="length of the data is not known"):
        train(tmp_path / "b", Recipe(epochs=1), data=iter(()))
    with pytest.raises(DataError, match="no batch"):
        train(tmp_path / "c", Recipe(steps=3), data=iter(()))
    with pytest.raises(ConfigError, match="loud"):
        train(tmp_path / "d", show="loud")


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)  # torch, of itself
def test_compiled_towers_take_the_same_steps(train: Any, tmp_path: Path, short: Recipe) -> None:
    plain = train(tmp_path / "plain")
    compiled = train(tmp_path / "compiled", dataclasses.replace(short, compile=True, ema=0.5))
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)
    assert weights(compiled.clip).keys() == weights(plain.clip).keys()
