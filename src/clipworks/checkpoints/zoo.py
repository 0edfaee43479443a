"""Names to files to a Clip."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from clipworks.checkpoints import own
from clipworks.core.clip import Clip
from clipworks.errors import ModelNotFound


def load(name: str | Path) -> Clip:
    """A Clip by name: `seedling`, or a folder of ours.

    Raises:
        ModelNotFound: if nothing answers to the name.
        CheckpointError: if its files cannot be read.
    """
    if str(name) == "seedling":
        with resources.as_file(resources.files("clipworks.checkpoints") / "seedling") as folder:
            return own.load(folder)
    if Path(name).is_dir():
        return own.load(name)
    raise ModelNotFound(f"no model {str(name)!r}")
