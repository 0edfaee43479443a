"""Two processes with DDP take the very steps of one process with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.one_of_several import run

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, steps: int, accumulate: int, world: int = 2) -> None:
    """What torchrun does, without its agent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    command = [
        sys.executable,
        str(Path(__file__).with_name("one_of_several.py")),
        str(folder),
        str(steps),
        str(accumulate),
    ]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_like_one(tmp_path: Path, accumulate: int) -> None:
    pytest.importorskip("lightning.fabric")
    launch(tmp_path / "two", 6, accumulate)
    run(tmp_path / "one", 6, accumulate)
    two, one = (
        load_file(tmp_path / name / "checkpoints" / "step-00000006" / "weights.safetensors")
        for name in ("two", "one")
    )
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert (tmp_path / "two" / "checkpoints" / "step-00000006" / "process-1.pt").exists()
