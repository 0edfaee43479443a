"""Tensors out of files, without ever running what a file brings along.

    *.safetensors            read as what it is: numbers with names
    *.index.json             several files of one kind; they must stand in the same folder
    *.pt, *.pth, *.bin       `torch.load(weights_only=True)`: tensors and plain containers, nothing else
    TorchScript archives     read as tensors, never executed (see `archive`)

Whatever is wrong with a file (missing, truncated, of another kind, wanting to run code) is one
`CheckpointError` that names it.
"""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.checkpoints import archive
from clipworks.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Where training scripts keep the model in what they save.
NESTS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Contents:
    """Tensors of any shape by name, and the activation that a TorchScript archive names, if it does."""

    weights: dict[str, Tensor]
    activation: str | None = None


def read(path: Path) -> Contents:
    """All tensors of a file of weights, or of all files that an index names.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return Contents(_read_shards(path))
    if path.suffix == ".safetensors":
        return Contents(read_safetensors(path))
    if archive.is_torchscript(path):
        weights, activation = archive.read(path)
        return Contents(weights, activation)
    return Contents(_state_dict(_read_pickled(path), path))


def read_object(path: Path) -> Any:
    """Whatever a pickled file holds: tensors and plain containers, for files that are no state dict.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _read_pickled(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors, of any shape, of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or not of this format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: if the file is missing or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({_line(error)})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def shard_names(index: Path) -> list[str]:
    """The files that an index names, each a bare name of a file of weights.

    Raises:
        CheckpointError: if it names others.
    """
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(one, str) for one in places.values()):
        raise CheckpointError(f"{index}: has no weight_map from names to files")
    for name in places.values():
        if Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise CheckpointError(f"{index}: {name!r} is not the name of a weights file in the same folder")
    return places


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _weight_map(index)
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        for key, tensor in read(index.parent / name).weights.items():
            if places.get(key) != name:
                raise CheckpointError(
                    f"{index.parent / name}: {key} is in this file, but {index.name} does not say so"
                )
            weights[key] = tensor
    missing = sorted(places.keys() - weights.keys())
    if missing:
        raise CheckpointError(
            f"{index.parent / places[missing[0]]}: {missing[0]} is missing, though {index.name} names it"
        )
    return weights


def _read_pickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # about a newer pickle protocol; what fails, fails below
            # Mapped files need not fit into memory twice; only the older format cannot be mapped.
            # Training scripts save their options beside the weights; a Namespace only holds values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged, and is not unpickled for that reason "
            f"({_line(error)}); a file of one's own can be saved again as torch.save(model.state_dict(), …)"
        ) from error
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        raise CheckpointError(f"{path}: not a readable file of weights ({_line(error)})") from error


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The weights in what a file held: a dict of tensors, or one that a training script wrapped.

    Raises:
        CheckpointError: if there are none, or something among them is no tensor.
    """
    if isinstance(loaded, Mapping):
        # Some scripts put the run's result in front: "91.17_model_state_dict".
        named = [name for name in loaded if isinstance(name, str) and name.endswith("_model_state_dict")]
        for nest in (*NESTS, *named[:1]):
            inner = loaded.get(nest)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                loaded = inner
                break
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: holds no weights by name (found {type(loaded).__name__})")
    odd = [
        name for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if odd:
        raise CheckpointError(f"{path}: {odd[0]} is {type(loaded[odd[0]]).__name__}, not a tensor")
    return dict(loaded)


def _line(error: BaseException) -> str:
    """The first sentence of an error, as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}…"
