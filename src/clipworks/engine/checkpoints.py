"""Checkpoints of a training: written so that a crash at any moment leaves a whole one behind.

A checkpoint is a folder `step-00001200/`:

    weights.safetensors      model and objective (`clip.*`, `objective.*`)
    average.safetensors      averaged model, if one is kept
    state.pt                 optimizer and counters; plain tensors and numbers, loaded with weights_only
    shared/                  in their stead, tensors that processes share out (FSDP2): a file of each process
    process-0.pt             of each process: random states, position in the data
    checkpoint.json          recipe, step, and size and SHA-256 of the files above

It is written under a temporary name, flushed to disk and renamed. Reading checks the digests and falls
back to the checkpoint before. Tensors have names and whole shapes in either form, so that any number of
processes reads what any other number wrote (`carrying`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipworks.engine.sharding import is_sharded, part_of
from clipworks.engine.shared_files import write_shared
from clipworks.errors import CheckpointError, ConfigError, DataError

FORMAT = 1
_PREFIX = "step-"
_UNFINISHED = ".writing-"
_SHARED = "shared"


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written and how many are kept. The last step is always saved.

    Attributes:
        minutes: time between two checkpoints; None for no such rule.
        steps: steps between two checkpoints; None for no such rule.
        keep: number of newest checkpoints that stay.
        shared: under FSDP2 each process writes its part; False gathers everything into the first process,
            which writes what a training in one process writes.
    """

    minutes: float | None = 10.0
    steps: int | None = None
    keep: int = 2
    shared: bool = True

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"keep must be at least 1, not {self.keep}")


@dataclass
class Snapshot:
    """A checkpoint once read; tensors that processes shared out are still in the folder `shared`."""

    path: Path
    summary: dict[str, Any]
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    state: dict[str, Any]
    process: dict[str, Any] = field(default_factory=dict)
    shared: Path | None = None


def tensors_once(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, tensors of any shape, each shared one under its first name only."""
    seen: set[Any] = set()
    once: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        # A tensor that processes share out has no memory of its own to be known by.
        key = id(tensor) if is_sharded(tensor) else (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        once[name] = tensor.detach()
    return once


def load_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], *, elsewhere: bool = False
) -> dict[str, Tensor]:
    """Put back what `tensors_once` gave, tensors of any shape, whole ones into sharded ones too.

    Args:
        elsewhere: whether some may be missing.

    Returns:
        The module's tensors that are missing.

    Raises:
        CheckpointError: if names or shapes are not those of the module.
    """
    own = tensors_once(module)
    odd = sorted(tensors.keys() - own.keys() if elsewhere else own.keys() ^ tensors.keys())
    if odd:
        raise CheckpointError(f"the checkpoint is of another model: {odd[0]} is in one of them only")
    with torch.no_grad():
        for name, saved in tensors.items():
            tensor = own.pop(name)
            if tensor.shape != saved.shape:
                raise CheckpointError(
                    f"the checkpoint is of another model: {name} is {tuple(saved.shape)} there "
                    f"and {tuple(tensor.shape)} here"
                )
            tensor.copy_(part_of(saved, tensor))
    return own


class CheckpointFolder:
    """The checkpoints of one training, as process `rank` of `processes` sees them."""

    def __init__(self, folder: Path, keep: int, rank: int = 0, processes: int = 1):
        self.folder = folder
        self.keep = keep
        self.rank = rank
        self.processes = processes

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first."""
        found = self.folder.glob(f"{_PREFIX}*") if self.folder.is_dir() else ()
        return sorted(int(path.name[len(_PREFIX) :]) for path in found if path.name[len(_PREFIX) :].isdigit())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def write_process(self, step: int, process: dict[str, Any]) -> None:
        """Write what belongs to this process; every process calls it, before `write` of the first one."""
        folder = self._unfinished(step)
        folder.mkdir(parents=True, exist_ok=True)
        _save(require_plain(process, "process"), folder / f"process-{self.rank}.pt")

    def write_shared(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write sharded tensors of any shape; every process calls it, before `write` of the first one."""
        if tensors:
            folder = self._unfinished(step) / _SHARED
            folder.mkdir(parents=True, exist_ok=True)
            write_shared(tensors, folder)
            _flush(folder)

    def write(
        self,
        step: int,
        *,
        weights: Mapping[str, Tensor],
        average: Mapping[str, Tensor] | None,
        state: dict[str, Any],
        summary: dict[str, Any],
    ) -> Path:
        """Complete a checkpoint, tensors of any shape, and delete the oldest; the first process calls it."""
        unfinished = self._unfinished(step)
        _save_tensors(weights, unfinished / "weights.safetensors")
        if average is not None:
            _save_tensors(average, unfinished / "average.safetensors")
        _save(state, unfinished / "state.pt")
        files = {
            path.relative_to(unfinished).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        document = {"format": FORMAT, "step": step, **summary, "files": files}
        write_durably(unfinished / "checkpoint.json", json.dumps(document, indent=1).encode())
        _flush(unfinished)
        final = self.path(step)
        if final.exists():  # damaged, and passed over when this run resumed
            self._remove(step)
        unfinished.replace(final)
        _flush(self.folder)
        for old in self.steps()[: -self.keep]:
            self._remove(old)
        return final

    def newest(self) -> Snapshot | None:
        """The newest whole checkpoint; None if there is none at all.

        A damaged one is passed over with a warning.

        Raises:
            CheckpointError: if there are checkpoints and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                self._verify(self.path(step))
                return self.read(step)
            except CheckpointError as error:
                warnings.warn(f"{error}; falling back to the checkpoint before", stacklevel=2)
        if steps:
            raise CheckpointError(
                f"{self.folder}: all {len(steps)} checkpoints are damaged; start with resume=False"
            )
        return None

    def clear(self) -> None:
        """Delete all checkpoints."""
        for step in self.steps():
            self._remove(step)

    def tidy(self) -> None:
        """Delete what a run left that was killed while it wrote."""
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _remove(self, step: int) -> None:
        # Renamed first, so that a crash in the middle leaves no half checkpoint under a whole one's name.
        doomed = self.folder / f"{_UNFINISHED}old-{step}"
        self.path(step).replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _unfinished(self, step: int) -> Path:
        return self.folder / f"{_UNFINISHED}{step:08d}"

    def read(self, step: int) -> Snapshot:
        """The checkpoint of a step that is known to be whole.

        Raises:
            CheckpointError: if it is not.
        """
        path = self.path(step)
        with _damage(path):
            summary = json.loads((path / "checkpoint.json").read_text())
            # Another number of processes goes on together, from where the first one stood.
            same = summary.get("processes", self.processes) == self.processes
            process = path / f"process-{self.rank if same else 0}.pt"
            return Snapshot(
                path=path,
                summary=summary,
                weights=load_file(path / "weights.safetensors"),
                average=load_file(path / "average.safetensors")
                if "average.safetensors" in summary["files"]
                else None,
                state=torch.load(path / "state.pt", weights_only=True),
                process=torch.load(process, weights_only=True) if process.exists() else {},
                shared=path / _SHARED if (path / _SHARED).is_dir() else None,
            )

    def _verify(self, path: Path) -> None:
        with _damage(path):
            summary = json.loads((path / "checkpoint.json").read_text())
            if summary["format"] != FORMAT:
                raise CheckpointError(f"{path}: format {summary['format']}, this version reads {FORMAT}")
            for name, expected in summary["files"].items():
                size = (path / name).stat().st_size
                if size != expected["bytes"] or _digest(path / name) != expected["sha256"]:
                    raise CheckpointError(f"{path / name}: not what was written")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes a reader raise, as one error that names the checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})".splitlines()[0]) from error


def require_plain(value: Any, place: str) -> Any:
    """Give the value back if it is made of tensors, numbers, strings, lists and mappings.

    Raises:
        DataError: naming the first thing that a checkpoint cannot hold safely.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            require_plain(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            require_plain(item, f"{place}[{index}]")
    elif type(value) not in (type(None), bool, int, float, str, bytes) and not isinstance(value, Tensor):
        raise DataError(
            f"{place} is a {type(value).__name__}; a checkpoint holds tensors, numbers and strings only"
        )
    return value


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _save(value: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()
