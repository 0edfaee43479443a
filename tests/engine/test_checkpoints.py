"""Checkpoints: whole or not there, and only of the model they were written for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipworks.engine.checkpoints import CheckpointFolder, Saving, load_tensors, require_plain, tensors_once
from clipworks.errors import CheckpointError, ConfigError, DataError


def write(folder: CheckpointFolder, step: int, value: float = 0.0) -> Path:
    folder.write_process(step, {"random": {}, "data": {"step": step}})
    weights = {"w": torch.full((100,), float(step) + value)}
    return folder.write(step, weights=weights, average=None, state={"x": [1.5]}, summary={"recipe": {}})


def test_newest_checkpoint_is_read_back_and_old_ones_go(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.newest() is None
    for step in (5, 10, 100):
        write(folder, step)
    assert folder.steps() == [10, 100]
    snapshot = folder.newest()
    assert (
        snapshot is not None and snapshot.summary["step"] == 100 and snapshot.process["data"] == {"step": 100}
    )
    assert torch.equal(snapshot.weights["w"], torch.full((100,), 100.0)) and snapshot.state == {"x": [1.5]}


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "process-0.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_newest_checkpoint_falls_back_with_one_warning(
    tmp_path: Path, name: str, damage: str
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    path = write(folder, 2) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match="falling back") as warned:
        snapshot = folder.newest()
    assert len(warned) == 1 and snapshot is not None and snapshot.summary["step"] == 1


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    (write(folder, 1) / "state.pt").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="falling back"),
        pytest.raises(CheckpointError, match="resume=False"),
    ):
        folder.newest()


def test_a_damaged_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    (write(folder, 2) / "state.pt").write_bytes(b"")
    write(folder, 2, value=0.5)
    snapshot = folder.newest()
    assert snapshot is not None and snapshot.weights["w"][0] == 2.5


def test_what_a_killed_run_left_is_never_read_and_is_tidied_away(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    write(folder, 1)
    folder.write_process(2, {"random": {}, "data": None})
    snapshot = folder.newest()
    assert snapshot is not None and snapshot.summary["step"] == 1
    folder.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    path = write(folder, 1)

    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Harmful()}, path / "state.pt")
    summary = json.loads((path / "checkpoint.json").read_text())
    content = (path / "state.pt").read_bytes()
    summary["files"]["state.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "checkpoint.json").write_text(json.dumps(summary))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError):
        folder.newest()
    assert not (tmp_path / "ran").exists()


def test_shared_tensors_are_kept_once_and_come_back_shared() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    tensors = {name: tensor.clone() for name, tensor in tensors_once(module).items()}
    assert sorted(tensors) == ["0.bias", "0.weight", "1.bias"]
    with torch.no_grad():
        module[0].weight.zero_()
    load_tensors(module, tensors)
    assert torch.equal(module[1].weight, tensors["0.weight"])


def test_tensors_of_another_model_are_refused_by_name() -> None:
    module = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="other"):
        load_tensors(module, {**tensors_once(module), "other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"weight is \(2, 3\) there"):
        load_tensors(module, {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})


def test_state_that_cannot_be_stored_safely_is_named() -> None:
    with pytest.raises(DataError, match=r"process.data.position\[1\] is a int64"):
        require_plain({"data": {"position": [1, np.int64(2)]}}, "process")
    with pytest.raises(ConfigError, match="keep"):
        Saving(keep=0)
