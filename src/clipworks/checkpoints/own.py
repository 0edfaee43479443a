"""Our own folder: `model.safetensors`, `config.json`, and the tokenizer's files.

    model.safetensors    weights under our own names, metadata {"format": "clipworks"}
    config.json          the Config, one to one
    tokenizer.json       only for a tokenizer of its own; CLIP's vocabulary ships with the package

The config carries the tokenizer's fingerprint, so that weights and tokenizer of two models do not meet
unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.core.config import Config
from clipworks.core.tokenizer import ClipTokenizer, FileTokenizer, Tokenizer
from clipworks.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from os import PathLike

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


def save(clip: Clip, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a Clip to a folder; `dtype` halves the weights on disk (batch statistics stay fp32)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.to(dtype if dtype and _castable(name, tensor) else tensor.dtype).contiguous()
        for name, tensor in clip.state_dict().items()
    }
    partial = folder / f".{WEIGHTS}.partial"
    save_file(weights, partial, metadata={"format": "clipworks"})
    partial.replace(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(clip.config.to_dict(), indent=1) + "\n", encoding="utf-8")
    if isinstance(clip.tokenizer, FileTokenizer):
        clip.tokenizer.save(folder)
    return folder


def load(folder: str | PathLike[str]) -> Clip:
    """Read a folder that `save` wrote.

    Raises:
        CheckpointError: naming the file and the tensor or key at fault.
    """
    folder = Path(folder)
    try:
        config = Config.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    clip = Clip.from_config(config, read_tokenizer(config, folder), seed=None)
    fill(clip, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return clip.eval()


def read_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """The tokenizer that a config names.

    Raises:
        CheckpointError: if its file is missing, or is not the one the weights were trained with.
    """
    settings = config.tokenizer
    length = config.text.context_length
    if settings.kind == "clip":
        return ClipTokenizer(context_length=length)
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the config says that these weights have a tokenizer of their own")
    tokenizer = FileTokenizer.load(folder)
    if settings.fingerprint and tokenizer.fingerprint() != settings.fingerprint:
        raise CheckpointError(f"{path}: not the tokenizer that these weights were trained with")
    return tokenizer


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or not of this format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def fill(clip: Clip, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a Clip, in place; names and shapes must be exactly its own.

    Raises:
        CheckpointError: for the first tensor that is missing, left over, of another shape or not finite.
    """
    own = clip.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        what = [f"{len(missing)} missing, first {missing[0]}"] if missing else []
        what += [f"{len(extra)} too many, first {extra[0]}"] if extra else []
        raise CheckpointError(f"{source}: the weights do not fit the config: {'; '.join(what)}")
    with torch.no_grad():
        for name, target in own.items():
            tensor = weights[name]
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {tuple(tensor.shape)}, the config asks for {tuple(target.shape)}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{source}: {name} holds values that are not finite")
            target.copy_(tensor)


def _castable(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and "running_" not in name and tensor.ndim > 0
