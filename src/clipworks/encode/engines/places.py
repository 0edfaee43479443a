"""Where engines keep what is costly to make, and what tells one model and one machine from another.

    CLIPWORKS_CACHE, else XDG_CACHE_HOME/clipworks, else ~/.cache/clipworks
      engines/<kind>-<fingerprint of the tower>/
        onnx/model.onnx, int8/model.onnx     the tower in files
        compiled-<machine>/model.pt2         the tower as machine code
        loss-<other tower>.json              what int8 costs
        auto-<size>-<machine>.json           how fast the engines are

Everything is there whole or not at all, whoever else writes at the same time: what is made comes into being
under another name and is moved into place. Nothing is ever read, changed and written back. The folder may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipworks import __version__
from clipworks.checkpoints.onnx import Kind
from clipworks.core.clip import Clip

CACHE = "CLIPWORKS_CACHE"
_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def cache() -> Path:
    """The folder of everything that is kept for later; it may not be there yet."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "clipworks"


def folder(clip: Clip, kind: Kind) -> Path:
    """The folder of one tower in the state in which it is."""
    return cache() / "engines" / f"{kind}-{fingerprint(clip, kind)}"


def fingerprint(clip: Clip, kind: Kind) -> str:
    """24 hexadecimal digits over every byte of a tower's weights, its config and this package's version.

    Computed once for each state of the weights.
    """
    tower = clip.image if kind == "image" else clip.text
    tensors = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    stamp = tuple((name, t.data_ptr(), t._version) for name, t in tensors.items())
    known = _fingerprints.get(tower)
    if known is None or known[0] != stamp:
        config = clip.config.image if kind == "image" else clip.config.text
        digest = hashlib.blake2b(f"{__version__} {type(tower).__name__} {config}".encode(), digest_size=12)
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
        known = _fingerprints[tower] = (stamp, digest.hexdigest())
    return known[1]


def machine() -> dict[str, Any]:
    """What the speed of an engine depends on besides the model."""
    versions = {name: _version(name) for name in ("torch", "onnxruntime", "openvino")}
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compiler": compiler(),
        **versions,
    }


def machine_mark() -> str:
    """12 hexadecimal digits for `machine`."""
    return hashlib.blake2b(json.dumps(machine()).encode(), digest_size=6).hexdigest()


def compiler() -> str | None:
    """The C++ compiler that torch will call, if it is there."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or usual)


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """The folder at `path`; if it is not there, `make` fills an empty one, which then becomes it."""
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        make(scratch)
        try:
            scratch.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster, and its work is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def remember(path: Path, values: dict[str, Any]) -> None:
    """Write a small JSON object; of several writers at once one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=1) + "\n")
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def remembered(path: Path) -> dict[str, Any] | None:
    """What was written there; None if nothing was, or if it cannot be understood."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
