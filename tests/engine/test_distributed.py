"""Several processes take the very steps of one with the whole batch, and read each other's checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.conftest import Dropping
from tests.engine.several import Recorded, Share, Stopped, rank, run_in_processes

from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.engine import Evaluate, Recipe, Saving
from clipworks.engine.device import default_fabric
from clipworks.engine.groups import parameter_groups
from clipworks.engine.loop import Resume
from clipworks.engine.optimizers import optimizer_of
from clipworks.engine.sharding import apart, gathered, part_of
from clipworks.engine.table import Table
from clipworks.errors import ConfigError
from clipworks.methods.pretrain.clip import ClipObjective

pytest.importorskip("lightning.fabric")
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by fork"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]
ROOT = Path(__file__).resolve().parents[2]

FORMS = ("softmax", "sigmoid")
STRATEGIES = ("ddp", "fsdp2")
PARTS = (1, 2)  # of `accumulate`
CASES = [f"{strategy}-{form}-{parts}" for strategy, form, parts in product(STRATEGIES, FORMS, PARTS)]
BASE = Recipe(steps=3, warmup=2, lr=1e-3, precision="fp32", clip_gradient=0.5)

WHENEVER = Saving()


def model() -> Clip:
    """The smallest Clip for `Batches`; in fp64, so that an error is told from rounding."""
    blocks = uniform_blocks(depth=2, width=32, heads=2)
    vision, text = VisionConfig(16, 8, 32, blocks), TextConfig(8, 64, 32, blocks)
    return Clip.from_config(Config(width=16, image=vision, text=text)).double()


def training(
    folder: Path, recipe: Recipe, objective: Any, saving: Saving = WHENEVER, stop: int | None = None
) -> Recorded:
    """A training in the folder, of one process or of this one of several."""
    torch.set_num_threads(1)
    fabric = default_fabric(recipe.strategy)
    return Recorded(model(), objective, Share(), recipe, folder, saving, fabric, stop=stop)


# Losses and gradients ---------------------------------------------------------------------------------


def steps_of(case: str, folder: Path) -> None:
    """Take the steps of a case; the first process writes what it saw of them."""
    strategy, form, parts = case.split("-")
    recipe = replace(BASE, strategy=strategy, accumulate=int(parts))  # type: ignore[arg-type]
    run = training(folder / case, recipe, ClipObjective(form, fresh=True))  # type: ignore[arg-type]
    run.run("auto", [])
    if rank() == 0:
        torch.save((run.losses, run.gradients), folder / f"{case}.pt")


@pytest.fixture(scope="module")
def taken(tmp_path_factory: Any) -> Callable[[int], Path]:
    """For a number of processes, the folder in which they took the steps of all cases; each number once."""
    known: dict[int, Path] = {}

    def take(world: int) -> Path:
        if world not in known:
            known[world] = folder = tmp_path_factory.mktemp(f"world-{world}")

            def all_cases() -> None:
                for case in CASES:
                    steps_of(case, folder)

            if world == 1:
                for form in FORMS:
                    steps_of(f"ddp-{form}-1", folder)
            else:
                run_in_processes(world, all_cases, folder)
        return known[world]

    return take


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(
    taken: Callable[[int], Path], world: int, case: str
) -> None:
    form = case.split("-")[1]
    losses, gradients = torch.load(taken(world) / f"{case}.pt", weights_only=True)
    expected, whole = torch.load(taken(1) / f"ddp-{form}-1.pt", weights_only=True)
    assert len(losses) == 3 and losses == pytest.approx(expected, abs=1e-9)
    for ours, theirs in zip(gradients, whole, strict=True):
        assert ours.keys() == theirs.keys() and {"clip.scale", "clip.image.class_token"} <= ours.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(
                ours[name], gradient, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


# Checkpoints ------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[int, str, bool]] = {  # processes, strategy, checkpoints shared out
    "one": (1, "ddp", True),
    "two-ddp": (2, "ddp", True),
    "two-fsdp2": (2, "fsdp2", True),
    "two-fsdp2-gathered": (2, "fsdp2", False),
    "four-fsdp2": (4, "fsdp2", True),
}
# Who goes on from whom: every kind of checkpoint whole and in two parts, and the others from both kinds.
PAIRS = [
    *product(WAYS, ("one", "two-fsdp2")),
    *product(("one", "two-fsdp2"), ("two-ddp", "four-fsdp2")),
]


def head() -> Dropping:
    """An objective with weights of its own and no random numbers."""
    return Dropping(share=0.0).double()


def half(way: str, folder: Path, resume: Resume, stop: int | None) -> None:
    """Train in the folder up to a step, or go on in it to the end, in one of the ways."""
    _, strategy, shared = WAYS[way]
    recipe = replace(BASE, steps=6, ema=0.9, strategy=strategy)  # type: ignore[arg-type]
    run = training(folder, recipe, head(), Saving(steps=3, shared=shared), stop)
    try:
        run.run(resume, [])
    except Stopped:
        assert stop is not None
    else:
        assert stop is None and run.steps == 6 and len(run.losses) == 3


@pytest.fixture(scope="module")
def halves(tmp_path_factory: Any) -> Path:
    """Folders `<way>` with a training that each way began, and `<way>, <other>` that another finished."""
    folder: Path = tmp_path_factory.mktemp("halves")
    for world in (1, 2, 4):
        mine = [way for way, (count, _, _) in WAYS.items() if count == world]

        def begin(mine: list[str] = mine) -> None:
            for way in mine:
                half(way, folder / way, False, 3)

        begin() if world == 1 else run_in_processes(world, begin, folder)
    for first, second in PAIRS:
        shutil.copytree(folder / first, folder / f"{first}, {second}")
    for world in (1, 2, 4):
        pairs = [(first, second) for first, second in PAIRS if WAYS[second][0] == world]

        def finish(pairs: list[tuple[str, str]] = pairs) -> None:
            for first, second in pairs:
                half(second, folder / f"{first}, {second}", True, None)

        finish() if world == 1 else run_in_processes(world, finish, folder)
    return folder


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights and the average of the finished model: what `Clip.save` and the last checkpoint hold."""
    clip = load_file(folder / "clip" / "model.safetensors")
    return {f"clip.{name}": tensor for name, tensor in clip.items()}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_any_way_goes_on_from_a_checkpoint_of_any_other(halves: Path, first: str, second: str) -> None:
    expected = saved(halves / "one, one")
    found = saved(halves / f"{first}, {second}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_shared_checkpoint_is_a_file_a_process_and_a_gathered_one_is_that_of_one(halves: Path) -> None:
    def files(way: str) -> list[str]:
        place = halves / way / "checkpoints" / "step-00000003"
        return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())

    four = files("four-fsdp2")
    assert len([name for name in four if name.startswith("shared/")]) == 4
    assert {f"process-{i}.pt" for i in range(4)} <= set(four)
    assert set(files("two-fsdp2-gathered")) == {*files("one"), "process-1.pt"}
    for name in ("weights", "average"):
        one, gathered = (
            load_file(halves / way / "checkpoints" / "step-00000003" / f"{name}.safetensors")
            for way in ("one", "two-fsdp2-gathered")
        )
        assert one.keys() == gathered.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(gathered[key], tensor, atol=1e-9, rtol=1e-7)


def test_on_another_number_of_processes_the_global_batch_stays(tmp_path: Path, halves: Path) -> None:
    shutil.copytree(halves / "two-ddp", tmp_path / "run")
    recipe = replace(BASE, steps=6, ema=0.9)
    small = Recorded(model(), head(), Share(size=4, count=8), recipe, tmp_path / "run", Saving(), None)
    with pytest.raises(ConfigError, match="batches of 8 over all processes, and these are of 4"):
        small.run(True, [])


# Shared weights ---------------------------------------------------------------------------------------


def test_evaluations_and_the_result_see_whole_weights_under_fsdp2(tmp_path: Path) -> None:
    def watched(folder: Path, strategy: str) -> None:
        recipe = replace(BASE, steps=4, ema=0.5, strategy=strategy, checkpoint_activations=True)  # type: ignore[arg-type]
        run = training(folder, recipe, ClipObjective())

        def look(clip: Clip) -> dict[str, float]:
            pixels = torch.full((1, 3, 16, 16), 0.3, dtype=torch.float64)
            return {
                "value": clip.image(pixels).sum().item(),
                "weight": clip.text.embedding.weight.sum().item(),
            }

        run.run("auto", [Evaluate(look, every=2)])
        assert not run.clip.image.checkpointing
        weights = {name: tensor.clone() for name, tensor in run.clip.state_dict().items()}
        torch.save(weights, folder / f"clip-{rank()}.pt")

    watched(tmp_path / "one", "ddp")
    run_in_processes(2, lambda: watched(tmp_path / "two", "fsdp2"), tmp_path)
    one, two = (Table(tmp_path / name / "metrics.csv").read() for name in ("one", "two"))
    assert [row["step"] for row in two] == [2, 4]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)
    results = [torch.load(tmp_path / "two" / f"clip-{i}.pt", weights_only=True) for i in range(2)]
    kept = load_file(tmp_path / "two" / "clip" / "model.safetensors")
    for name, tensor in results[0].items():
        assert type(tensor) is torch.Tensor and torch.equal(tensor, results[1][name])
        assert name not in kept or torch.equal(tensor, kept[name])


def test_each_process_holds_its_share_of_weights_gradients_and_optimizer(tmp_path: Path) -> None:
    def count() -> None:
        run = training(tmp_path / "run", replace(BASE, steps=1, strategy="fsdp2"), ClipObjective())
        run.run("auto", [])
        sizes = {"weights": 0, "gradients": 0, "optimizer": 0}
        for parameter in run.stage.parameters():
            if parameter.dim():
                sizes["weights"] += parameter.to_local().numel()  # type: ignore[attr-defined]
                sizes["gradients"] += parameter.grad.to_local().numel()  # type: ignore[union-attr]
                memory = run.optimizer.state[parameter]
                sizes["optimizer"] += memory["exp_avg"].to_local().numel()
        torch.save(sizes, tmp_path / f"sizes-{rank()}.pt")

    run_in_processes(2, count, tmp_path)
    whole = sum(parameter.numel() for parameter in model().parameters() if parameter.dim())
    shares = [torch.load(tmp_path / f"sizes-{i}.pt", weights_only=True) for i in range(2)]
    for kind in ("weights", "gradients", "optimizer"):
        assert sum(share[kind] for share in shares) == whole
        assert max(share[kind] for share in shares) < 0.6 * whole


def test_muon_makes_whole_matrices_orthogonal_and_not_their_parts(tmp_path: Path) -> None:
    def step(strategy: Any) -> dict[str, torch.Tensor]:
        clip = model().float()
        dice = torch.Generator().manual_seed(0)
        gradients = {name: torch.randn(p.shape, generator=dice) for name, p in clip.named_parameters()}
        default_fabric(strategy).setup_module(clip)
        for name, parameter in clip.named_parameters():
            parameter.grad = part_of(gradients[name], parameter)
        groups = apart(parameter_groups(clip, weight_decay=0.1))
        optimizer_of(replace(BASE, optimizer="muon"), groups, clip).step()
        return {name: gathered(p.detach()).clone() for name, p in clip.named_parameters()}

    expected = step("ddp")
    run_in_processes(2, lambda: torch.save(step("fsdp2"), tmp_path / f"{rank()}.pt"), tmp_path)
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    start = {name: parameter.detach() for name, parameter in model().float().named_parameters()}
    for name, tensor in expected.items():
        ours, theirs = found[name] - start[name], tensor - start[name]
        # The iterations are in bf16: 1.5 % from the exact matrix in one process, 3 % in parts.
        assert (ours - theirs).norm() <= 0.06 * theirs.norm(), name


@pytest.mark.slow
def test_killed_while_processes_write_their_shares_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    recipe = replace(BASE, steps=6, strategy="fsdp2")

    def run(folder: Path, die: int | None = None, victim: int = 0) -> None:
        if die is not None and rank() == victim:
            kill_at_fsync(die)
        training(folder, recipe, Dropping().double(), Saving(steps=1)).run("auto", [])

    assert run_in_processes(2, lambda: run(tmp_path / "whole"), tmp_path / "a")
    for number, (die, victim) in enumerate([(1, 1), (4, 0), (2, 1), (9, 0)]):
        at = tmp_path / f"b-{number}"
        assert not run_in_processes(2, lambda: run(tmp_path / "cut", die, victim), at, deaths=True)  # noqa: B023
    assert run_in_processes(2, lambda: run(tmp_path / "cut"), tmp_path / "c")
    expected, found = saved(tmp_path / "whole"), saved(tmp_path / "cut")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torchrun_starts_it(tmp_path: Path, strategy: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.engine.test_distributed import *\n"
        f"recipe = replace(BASE, strategy={strategy!r})\n"
        "training(Path(sys.argv[1]), recipe, ClipObjective()).run('auto', [])\n"
    )
    path = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(script), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=280,
    )
    training(tmp_path / "one", BASE, ClipObjective()).run("auto", [])
    two, one = saved(tmp_path / "run"), saved(tmp_path / "one")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-9, rtol=1e-7)


def kill_at_fsync(count: int) -> None:
    """Make this process die when it waits for the disk for the `count`-th time."""
    flush = os.fsync

    def dying(descriptor: int) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), 9)
        flush(descriptor)

    os.fsync = dying  # type: ignore[assignment]
