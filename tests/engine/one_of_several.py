"""One process of a distributed training; run by `test_distributed.py` with the environment of torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tests.engine.conftest import Batches

from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.data.batch import Batch
from clipworks.engine import Recipe, Saving, fit
from clipworks.methods.pretrain.clip import ClipObjective


class Share(Batches):
    """This process's rows of every batch."""

    def __iter__(self) -> Iterator[Batch]:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        for batch in super().__iter__():
            rows = len(batch) // world
            yield batch.slice(rank * rows, (rank + 1) * rows)


def model() -> Clip:
    """The smallest Clip for `Batches`."""
    blocks = uniform_blocks(depth=2, width=32, heads=2)
    return Clip.from_config(
        Config(width=16, image=VisionConfig(16, 8, 32, blocks), text=TextConfig(8, 64, 32, blocks))
    )


def run(folder: Path, steps: int, accumulate: int) -> None:
    """Train, or go on training, in the folder."""
    recipe = Recipe(
        steps=steps, warmup=2, lr=1e-3, eps=1e-3, precision="fp32", accumulate=accumulate, ema=0.9
    )
    fit(model(), ClipObjective(), Share(), recipe, folder=folder, saving=Saving(steps=2), show="nothing")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
