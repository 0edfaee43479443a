"""Trainings in several processes: forks of the test, so that nothing is imported twice."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tests.engine.conftest import Batches
from torch import Tensor

from clipworks.data.batch import Batch
from clipworks.engine.loop import Training
from clipworks.engine.sharding import gathered

# Imported before forking, where every fork would import them for itself.
HEAVY = (
    "lightning.fabric.strategies",
    "torch._dynamo",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)


def run_in_processes(count: int, function: Callable[[], None], folder: Path, *, deaths: bool = False) -> bool:
    """Call a function in `count` forks with the environment that torchrun gives.

    Args:
        folder: where a fork writes what it raised.
        deaths: whether forks may die; then the others are ended too.

    Returns:
        Whether all came to their end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in HEAVY:
        importlib.import_module(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
            _be_one(function, folder / f"error-{rank}.txt")
        children.append(child)
    codes = _wait(children)
    if any(codes) and not deaths:
        said = "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
        raise AssertionError(f"processes ended with {codes}:\n{said}")
    return not any(codes)


def _be_one(function: Callable[[], None], errors: Path) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        function()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        errors.write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(children: list[int]) -> list[int]:
    """Exit codes; once one has failed, the others get ten seconds, and none outlives the test."""
    codes: dict[int, int] = {}
    end = float("inf")
    try:
        while len(codes) < len(children) and time.monotonic() < end:
            for child in children:
                if child not in codes and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    if codes[child]:
                        end = min(end, time.monotonic() + 10)
            time.sleep(0.005)
    finally:
        for child in children:
            if child not in codes:
                os.kill(child, signal.SIGKILL)
                codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]


def rank() -> int:
    """Which process this is."""
    return int(os.environ.get("RANK", "0"))


class Share(Batches):
    """This process's rows of every batch."""

    def __iter__(self) -> Iterator[Batch]:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        for batch in super().__iter__():
            rows = len(batch) // world
            yield batch.slice(rank() * rows, (rank() + 1) * rows)


class Stopped(Exception):
    """The training stands where the test wanted it."""


class Recorded(Training):
    """A training that keeps the loss and the whole gradients of every step, and may stop after one."""

    def __init__(self, *arguments: Any, stop: int | None = None) -> None:
        super().__init__(*arguments)
        self.stop = stop
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def _check_and_clip(self, terms: dict[str, Tensor]) -> Tensor:
        self.losses.append(float(terms["loss"]))
        self.gradients.append(
            {n: gathered(p.grad).clone() for n, p in self.stage.named_parameters() if p.grad is not None}
        )
        return super()._check_and_clip(terms)

    def _save_or_stop(self) -> None:
        super()._save_or_stop()
        if self.state.step == self.stop:
            raise Stopped
