"""Fitted estimators on disk: `learned.safetensors` has the tensors, `estimator.json` everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipworks.checkpoints.files import read_json, read_safetensors
from clipworks.checkpoints.own import write_json, write_safetensors
from clipworks.data.captions import ClassTexts

LEARNED, ABOUT = "learned.safetensors", "estimator.json"
_TEXTS = "class texts"


class NotPlain(TypeError):
    """A value that JSON cannot hold."""


def write(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, tensors of any shape; a folder holds what was written last, or nothing readable."""
    folder.mkdir(parents=True, exist_ok=True)
    # No settings beside tensors that they do not belong to: the description goes first and comes last.
    (folder / ABOUT).unlink(missing_ok=True)
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_safetensors(copies, folder / LEARNED, "clipworks")
    write_json(about, folder / ABOUT)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `write`: what was told, and the tensors, of any shape.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    return read_json(folder / ABOUT), read_safetensors(folder / LEARNED)


def plain(value: Any) -> Any:
    """A value as JSON has it.

    Raises:
        NotPlain: if it has no such form.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, ClassTexts):
        return {_TEXTS: asdict(value)}
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    raise NotPlain(f"{type(value).__name__} is no plain value")


def split_plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values that JSON can hold, and the names of the others."""
    held, others = {}, []
    for name, value in values.items():
        try:
            held[name] = plain(value)
        except NotPlain:
            others.append(name)
    return held, others


def unplain(value: Any) -> Any:
    """The inverse of `plain`; every sequence becomes a tuple."""
    if isinstance(value, dict):
        if set(value) == {_TEXTS}:
            return ClassTexts(**value[_TEXTS])
        return {key: unplain(one) for key, one in value.items()}
    return tuple(unplain(one) for one in value) if isinstance(value, list) else value
