"""Checkpoints of Dassl, the toolkit in which the prompt-learning papers were trained.

`model.pth.tar-<epoch>` holds under `state_dict` the learned weights, often beside the whole frozen CLIP in
half precision and embeddings of the training classes' texts, and beside these the state of the training as
objects. Nothing but tensors is made of it, save the few harmless classes named below.
"""

from __future__ import annotations

from collections import defaultdict
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from clipworks.checkpoints import files, layouts, rules
from clipworks.core.clip import Clip
from clipworks.errors import CheckpointError

# What a saved schedule brings along: it holds the optimizer, as an object.
HARMLESS = (torch.optim.lr_scheduler.CosineAnnealingLR, torch.optim.SGD, defaultdict, dict)
TOWERS = {"image_encoder.": "visual.", "text_encoder.": ""}


class DasslFile:
    """The weights of a checkpoint, taken out one by one; what is left must be those of the frozen Clip.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is missing, damaged, or holds more than tensors.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        with torch.serialization.safe_globals(list(HARMLESS)):
            weights = files.read(self.path).weights
        self.weights = {name.removeprefix("module."): weight for name, weight in weights.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A weight of any shape in fp32; a size that is None may be any.

        Raises:
            CheckpointError: if it is not there, has another shape, or holds values that are not finite.
        """
        if name not in self.weights:
            raise CheckpointError(f"{self.path}: {name} is missing")
        weight = self.weights.pop(name).float()
        fits = len(shape) == weight.ndim and all(
            want in (None, size) for want, size in zip(shape, weight.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(f"{self.path}: {name} has shape {tuple(weight.shape)}, not ({wanted})")
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{self.path}: {name} holds values that are not finite")
        return weight

    def count(self, pattern: str, start: int = 0) -> int:
        """How many there are of the names `pattern` gives with `{}` = start, start + 1, …, without a gap."""
        number = start
        while pattern.format(number) in self.weights:
            number += 1
        return number - start

    def drop(self, *names: str) -> None:
        """Leave out what is of no use, if it is there."""
        for name in names:
            self.weights.pop(name, None)

    def finish(self, clip: Clip) -> None:
        """Check what is left: weights of a frozen Clip, equal to this one's as far as half precision tells.

        Raises:
            CheckpointError: for weights of another Clip, and for names that belong to none.
        """
        theirs = {}
        for name in self.weights:
            tower = next((tower for tower in TOWERS if name.startswith(tower)), None)
            theirs[name if tower is None else TOWERS[tower] + name.removeprefix(tower)] = name
        if not theirs:
            return
        ours = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
        for openai, name in theirs.items():
            if openai not in ours:
                raise CheckpointError(f"{self.path}: {name} belongs neither to the method nor to a Clip")
            one, other = ours[openai].cpu().half(), self.weights[name].half()
            if one.shape != other.shape or not torch.allclose(one, other, rtol=2e-3, atol=1e-5):
                raise CheckpointError(
                    f"{self.path}: was trained on another Clip than {clip.config.name!r}: its {name} differs"
                )
