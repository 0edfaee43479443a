"""Our own folder: `model.safetensors`, `config.json`, and the tokenizer's files.

    model.safetensors        weights under our own names, metadata {"format": "clipworks"}
    config.json              the Config, one to one
    tokenizer_settings.json  the tokenizer's kind and settings, if the model has a tokenizer
    tokenizer.json           only for a tokenizer of its own; CLIP's vocabulary ships with the package
    preprocessing.json       only if pictures are prepared in a way that the Config does not describe

The config carries the tokenizer's fingerprint, so that weights and tokenizer of two models do not meet
unnoticed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipworks.checkpoints.files import read_json, read_safetensors
from clipworks.core.clip import Clip
from clipworks.core.config import Config, TokenizerConfig
from clipworks.core.images import Preprocessing
from clipworks.core.tokenizer import SETTINGS, ClipTokenizer, FileTokenizer, Tokenizer
from clipworks.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from os import PathLike

WEIGHTS, CONFIG, PREPROCESSING = "model.safetensors", "config.json", "preprocessing.json"


def save(clip: Clip, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a Clip to a folder; `dtype` halves the weights on disk (batch statistics stay fp32).

    Raises:
        CheckpointError: if the weights are not those that the config describes (a variant with computed
            weights, a tower of another library), or the tokenizer does not belong to them.
    """
    config = describe(clip)
    shapes, own = skeleton(config).state_dict(), clip.state_dict()
    odd = sorted(name for name in shapes.keys() | own.keys() if name not in own or name not in shapes)
    odd = odd or sorted(name for name in own if own[name].shape != shapes[name].shape)
    if odd:
        raise CheckpointError(
            f"{folder}: {odd[0]} is not as the config describes it, so what is saved could not be loaded"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        # A copy, since parts of one storage cannot be written under two names.
        name: tensor.detach()
        .to(dtype if dtype and _castable(name, tensor) else tensor.dtype, copy=True)
        .contiguous()
        for name, tensor in own.items()
    }
    write_safetensors(weights, folder / WEIGHTS, "clipworks")
    write_json(config.to_dict(), folder / CONFIG)
    if clip.tokenizer is not None:
        clip.tokenizer.save(folder)
    if clip.preprocessing != _preprocessing(config):
        write_json(clip.preprocessing.to_dict(), folder / PREPROCESSING)
    return folder


def load(folder: str | PathLike[str]) -> Clip:
    """Read a folder that `save` wrote.

    Raises:
        CheckpointError: naming the file and the tensor or key at fault.
    """
    folder = Path(folder)
    try:
        config = Config.from_dict(read_json(folder / CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    preprocessing = None
    if (folder / PREPROCESSING).is_file():
        try:
            preprocessing = Preprocessing.from_dict(read_json(folder / PREPROCESSING))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{folder / PREPROCESSING}: {error}") from error
        _check_preprocessing(config, preprocessing, str(folder / PREPROCESSING))
    weights = read_safetensors(folder / WEIGHTS)
    return build(config, weights, str(folder / WEIGHTS), read_tokenizer(config, folder), preprocessing)


def read_tokenizer(config: Config, folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or None if the model has none.

    Raises:
        CheckpointError: if its file is missing, or is not the one the weights were trained with.
    """
    path, settings = folder / SETTINGS, config.tokenizer
    if not path.is_file():
        if settings.kind == "clip":
            fits = config.text.vocab_size == ClipTokenizer.vocab_size and config.text.context_length >= 2
            return ClipTokenizer(config.text.context_length) if fits else None
        raise CheckpointError(
            f"{path}: missing; the config says that these weights have a tokenizer of their own"
        )
    tokenizer = Tokenizer.load(folder)
    found = tokenizer_config(tokenizer)
    if settings.kind != found.kind or settings.fingerprint not in (None, found.fingerprint):
        raise CheckpointError(f"{path}: not the tokenizer that these weights were trained with")
    check_tokenizer(config, tokenizer, str(path))
    return tokenizer


def describe(clip: Clip) -> Config:
    """A Clip's config with the tokenizer and the preprocessing that it has now.

    Raises:
        CheckpointError: if they do not belong to its weights.
    """
    config = clip.config
    if clip.tokenizer is not None:
        settings = tokenizer_config(clip.tokenizer)
        if config.tokenizer.fingerprint not in (None, settings.fingerprint):
            raise CheckpointError(
                "the tokenizer is not the one that the config names: its fingerprint differs"
            )
        check_tokenizer(config, clip.tokenizer, "the Clip")
        config = dataclasses.replace(config, tokenizer=settings)
    _check_preprocessing(config, clip.preprocessing, "the Clip")
    return config


def tokenizer_config(tokenizer: Tokenizer) -> TokenizerConfig:
    """What a config says of a tokenizer."""
    if not isinstance(tokenizer, FileTokenizer):
        return TokenizerConfig()
    return TokenizerConfig(
        kind="file",
        start=tokenizer.start,
        end=tokenizer.end,
        pad=tokenizer.pad,
        pad_full=tokenizer.pad_full,
        clean=tokenizer.clean,
        fingerprint=tokenizer.fingerprint(),
    )


def check_tokenizer(config: Config, tokenizer: Tokenizer, source: str) -> None:
    """A tokenizer must belong to the text tower.

    Raises:
        CheckpointError: if it has more ids than the tower has vectors (or so many fewer that they are not
            padding), texts longer than its positions, or texts cut where the tower was trained on padding.
    """
    text, ids = config.text, tokenizer.vocab_size
    spare = text.vocab_size - ids
    # Tables are often filled up to a multiple of 64 or 128; a larger gap is another vocabulary.
    if spare < 0 or spare >= 128:
        raise CheckpointError(
            f"{source}: a tokenizer of {ids} ids does not belong to a text tower with vectors for "
            f"{text.vocab_size}"
        )
    if tokenizer.context_length > text.context_length:
        raise CheckpointError(
            f"{source}: texts of {tokenizer.context_length} tokens do not fit {text.context_length} positions"
        )
    if text.mask == "none" and not (tokenizer.pad_full and tokenizer.context_length == text.context_length):
        raise CheckpointError(
            f"{source}: this text tower sees its padding, so texts must be filled up to "
            f"{text.context_length} tokens, which this tokenizer does not do"
        )


def skeleton(
    config: Config, tokenizer: Tokenizer | None = None, preprocessing: Preprocessing | None = None
) -> Clip:
    """A Clip whose weights are still to be filled in: memory is reserved, nothing is computed."""
    clip = Clip.from_config(config, tokenizer, seed=None)
    if preprocessing is not None:
        clip.preprocessing = preprocessing
    return clip


def build(
    config: Config,
    weights: Mapping[str, Tensor],
    source: str,
    tokenizer: Tokenizer | None = None,
    preprocessing: Preprocessing | None = None,
) -> Clip:
    """A Clip of these weights of any shape, which are copied; names and shapes must be exactly its own.

    Raises:
        CheckpointError: for the first tensor that is missing, left over, of another shape or not finite.
    """
    clip = skeleton(config, tokenizer, preprocessing)
    own = clip.state_dict()
    check(own, weights, source)
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(weights[name])
    return clip.eval()


def check(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Weights, of any shape, must have the names and shapes of `own`, and be finite.

    Raises:
        CheckpointError: naming the first that is missing, left over, of another shape or not finite.
    """
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        what = [f"{len(missing)} missing, the first is {missing[0]}"] if missing else []
        what += [f"{len(extra)} too many, the first is {extra[0]}"] if extra else []
        raise CheckpointError(f"{source}: the weights do not fit the config: {'; '.join(what)}")
    for name, target in own.items():
        tensor = weights[name]
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the config asks for {tuple(target.shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds values that are not finite")


def write_safetensors(weights: Mapping[str, Tensor], path: Path, format: str) -> None:
    """Write tensors of any shape so that the file is there whole or not at all."""
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    save_file(dict(weights), partial, metadata={"format": format})
    partial.replace(path)


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object so that the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _preprocessing(config: Config) -> Preprocessing:
    settings = config.preprocessing
    return Preprocessing(config.image.image_size, settings.resize, settings.interpolation)


def _check_preprocessing(config: Config, preprocessing: Preprocessing, source: str) -> None:
    asked = _preprocessing(config)
    for name in ("image_size", "resize", "interpolation"):
        if getattr(asked, name) != getattr(preprocessing, name):
            raise CheckpointError(
                f"{source}: pictures are prepared with {name} {getattr(preprocessing, name)}, "
                f"the config says {getattr(asked, name)}"
            )


def _castable(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and "running_" not in name and tensor.ndim > 0
