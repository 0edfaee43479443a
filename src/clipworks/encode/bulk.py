"""Many pictures and many texts to unit vectors.

Pictures are read by threads while the tower works; texts are packed (see `packed`). Results are unit
vectors in fp32, computed without gradient but not in inference mode, so that a trained head can use
them. What computes them is the tower itself, or another engine (see `engines`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clipworks.core.images import prepare_stream
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower
from clipworks.encode.packed import text_features
from clipworks.encode.precision import Precision, choose
from clipworks.errors import ConfigError, DataError, ShapeError

if TYPE_CHECKING:
    from clipworks.checkpoints.onnx import Kind
    from clipworks.core.clip import Clip
    from clipworks.encode.engines import Engine, Name


@dataclass(frozen=True)
class Encoded:
    """Pictures as vectors.

    Attributes:
        features: (k, D) fp32, unit length, of the pictures that could be read.
        kept: their places in what was given, k numbers in rising order.
        errors: place and reason of each picture that could not be read.
        engine: what computed them; never `auto`.
    """

    features: Tensor
    kept: list[int]
    errors: list[tuple[int, str]]
    engine: str = "torch"

    def report(self) -> str:
        """One line a person can read; empty if nothing was skipped."""
        if not self.errors:
            return ""
        total = len(self.kept) + len(self.errors)
        return f"skipped {len(self.errors)} of {total}: {self.errors[0][1]}"


@torch.no_grad()
def encode_images(
    clip: Clip,
    images: Any,
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    engine: Name = "torch",
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    fast: bool = True,
    progress: bool = False,
) -> Encoded:
    """Pictures to unit vectors.

    Args:
        clip: its tower, preprocessing and device are used; left in the mode (training or not) it was in.
        images: one picture or an iterable of them (paths, PIL pictures, bytes, arrays (H, W, 3), tensors
            (3, H, W)), or pixels (B, 3, H, W), bytes or floats in [0, 1], which are taken as they are.
        batch_size: pictures that go through the tower at once.
        precision: `fp32`, `bf16`, or `auto` (see `precision`).
        engine: `torch`, or another one of `engines.NAMES`; those compute in fp32 on the CPU.
        workers: threads that read pictures; None for as many as there are cores.
        on_error: `raise` at the first picture that cannot be read, or `skip` and report it.
        fast: let JPEG files be decoded at a smaller scale where they are much larger than needed.
        progress: show a bar.

    Raises:
        PictureError: for a picture that cannot be read, with `on_error="raise"`.
        ConfigError: for a batch size below one, or an engine that cannot be used.
        MissingExtra: for an engine that is not installed.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    other = _engine(clip, "image", engine, precision, batch_size)
    features: list[Tensor] = []
    kept: list[int] = []
    errors: list[tuple[int, str]] = []
    tower = None
    with evaluating(clip):
        for pixels, places, failed in _picture_batches(
            clip, images, batch_size, workers, on_error, fast, progress
        ):
            errors += failed
            if not len(pixels):
                continue
            kept += places
            if other is not None:
                features.append(other.images(pixels))
                continue
            pixels = pixels.to(clip.device, non_blocking=True)
            tower = tower or choose(clip.image, pixels[:8], precision)
            features.append(_unit(tower(pixels)))
    empty = torch.empty(0, clip.width, device=clip.device)
    name = "torch" if other is None else other.name
    return Encoded(torch.cat(features) if features else empty, kept, errors, name)


@torch.no_grad()
def encode_texts(
    clip: Clip,
    texts: str | Iterable[str] | Tokens,
    *,
    positions: int = 4096,
    precision: Precision = "fp32",
    engine: Name = "torch",
) -> Tensor:
    """Strings to unit vectors (n, D) fp32, in the order given.

    Args:
        clip: its tower, tokenizer and device are used.
        texts: one string, an iterable of strings, or tokens (n, L).
        positions: about how many token positions go through the tower at once; memory grows with it.
        precision: `fp32`, `bf16`, or `auto` (see `precision`).
        engine: `torch`, or another one of `engines.NAMES`; those compute in fp32 on the CPU.

    Raises:
        DataError: for something that is not a string, naming its place.
        ConfigError: for an engine that cannot be used.
        MissingExtra: for an engine that is not installed.
    """
    tokens = texts if isinstance(texts, Tokens) else tokenize(clip, texts)
    if not len(tokens):
        return torch.empty(0, clip.width, device=clip.device)
    other = _engine(clip, "text", engine, precision, len(tokens), tokens)
    if other is not None:
        return other.texts(tokens, positions)
    with evaluating(clip):
        tower = choose(clip.text, tokens[:8].to(clip.device), precision)
        if isinstance(tower, TextTower):
            return _unit(text_features(tower, tokens, positions))
        step = max(1, positions // tokens.ids.shape[1])
        parts = (tokens[start : start + step].to(clip.device) for start in range(0, len(tokens), step))
        return _unit(torch.cat([tower(part) for part in parts]))


def tokenize(clip: Clip, texts: str | Iterable[str]) -> Tokens:
    """Strings to tokens (n, L) with this Clip's tokenizer.

    Raises:
        DataError: for something that is not a string, naming its place.
        ConfigError: if the Clip has no tokenizer.
    """
    if clip.tokenizer is None:
        raise ConfigError("this Clip has no tokenizer: give it one, or pass Tokens instead of strings")
    listed = [texts] if isinstance(texts, str) else list(texts)
    for place, text in enumerate(listed):
        if not isinstance(text, str):
            raise DataError(f"text {place} is not a string but {type(text).__name__}: {text!r}")
    return clip.tokenizer(listed)


class evaluating:
    """A context in which a Clip or tower is in evaluation mode; afterwards every module is as it was."""

    def __init__(self, model: torch.nn.Module):
        self.modules = [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        for module in self.modules:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            module.training = True


def _engine(
    clip: Clip, kind: Kind, name: Name, precision: Precision, rows: int, tokens: Tokens | None = None
) -> Engine | None:
    """What computes in the tower's place; None for the tower itself."""
    if name == "torch":
        return None
    from clipworks.encode import engines

    engines.check(name, precision)
    found = engines.ready(clip, kind, name, rows=rows, tokens=tokens)
    return None if found.run is None else found


def _picture_batches(
    clip: Clip,
    images: Any,
    batch_size: int,
    workers: int | None,
    on_error: Literal["raise", "skip"],
    fast: bool,
    progress: bool,
) -> Iterator[tuple[Tensor, list[int], list[tuple[int, str]]]]:
    if isinstance(images, Tensor) and images.ndim == 4:
        if images.shape[1] != 3:
            raise ShapeError(f"pixels must be (B, 3, H, W), not {tuple(images.shape)}")
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            yield part, list(range(start, start + len(part))), []
        return
    sources = [images] if _is_one(images) else images
    batches = prepare_stream(
        sources, clip.preprocessing, batch_size=batch_size, workers=workers, on_error=on_error, fast=fast
    )
    for batch in _bar(batches, sources, progress):
        yield batch.pixels, batch.kept, batch.errors


def _bar(batches: Iterable[Any], sources: Any, shown: bool) -> Iterator[Any]:
    if not shown:
        yield from batches
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = len(sources) if hasattr(sources, "__len__") else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("encoding pictures", total=total)
        for batch in batches:
            yield batch
            bar.advance(task, len(batch.kept) + len(batch.errors))


def _is_one(images: Any) -> bool:
    if isinstance(images, (str, bytes, Path)) or hasattr(images, "read") or hasattr(images, "convert"):
        return True
    return hasattr(images, "ndim") and images.ndim <= 3


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
