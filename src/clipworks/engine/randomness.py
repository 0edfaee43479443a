"""The state of every global random generator, owned for the length of a training.

Dropout and its like draw from torch's global generators; a training sets them from its seed, keeps them in
its checkpoints and gives the caller's own state back when it ends.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of torch (CPU and accelerators), numpy and Python, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed all generators, and give the caller's state back at the end."""
    before = random_state()
    try:
        seed_all(seed)
        yield
    finally:
        restore_random_state(before)


def seed_all(seed: int) -> None:
    """Seed all generators."""
    # The one place that may: what models draw from the global generators is the training's.
    torch.manual_seed(seed)  # noqa: TID251
    np.random.seed(seed % 2**32)  # noqa: TID251, NPY002
    random.seed(seed)  # noqa: TID251


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace: an evaluation must not change the training."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)


class Replay:
    """The state of torch's generators at one moment, to compute the same thing twice."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        """Go back to that moment."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
