"""Both towers as ONNX files, checked with onnxruntime before anything is said to be done.

    image.onnx   pixels (B, 3, n, n) float32 in [0, 1] -> features (B, D), unit length
    text.onnx    ids (B, L) int64, ends (B,) int64     -> features (B, D), unit length
    clip.json    scale, bias, sizes, and how pictures are prepared

B is free, and L up to the context length. Mean and deviation are inside `image.onnx`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipworks.checkpoints.own import write_json
from clipworks.core.clip import Clip, unit
from clipworks.errors import CheckpointError, require

Kind = Literal["image", "text"]
TOLERANCE = 1e-4
OPSET = 18


@dataclass(frozen=True)
class Exported:
    """What was written, and the largest difference from torch that onnxruntime showed on each tower."""

    image: Path
    text: Path
    image_difference: float
    text_difference: float


class _Image(nn.Module):
    def __init__(self, clip: Clip):
        super().__init__()
        self.tower = clip.image

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, n, n) in [0, 1] to unit vectors (B, D)."""
        return unit(self.tower(pixels))


class _Text(nn.Module):
    def __init__(self, clip: Clip):
        super().__init__()
        self.tower: Any = clip.text

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Ids (B, L) and ends (B,) to unit vectors (B, D)."""
        tower = self.tower
        mask = tower.padding_mask(ends) if tower.config.mask == "padding" else None
        tokens = tower.run(tower.place(tower.embedding(ids)), mask=mask)
        # Picked by gathering: an index of as many rows as the batch would fix its size in the file.
        last = tokens.gather(1, ends[:, None, None].expand(-1, 1, tokens.shape[2]))
        return unit(tower.project(last))


def as_function(clip: Clip, kind: Kind) -> nn.Module:
    """One tower as a module that takes what its file takes, in that order, and gives unit vectors (B, D)."""
    return _Image(clip) if kind == "image" else _Text(clip)


def examples(clip: Clip, kind: Kind, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs of a tower by their names in its file, (rows, …) each, on the CPU."""
    if kind == "image":
        side = clip.config.image.image_size
        return {"pixels": torch.rand(rows, 3, side, side, generator=generator)}
    length = clip.config.text.context_length
    ids = torch.randint(clip.config.text.vocab_size, (rows, length), generator=generator)
    return {"ids": ids, "ends": torch.randint(length, (rows,), generator=generator)}


def free_sizes(clip: Clip, kind: Kind) -> tuple[dict[int, Any], ...]:
    """Of each input the sizes that its file leaves free, as `torch.export` takes them."""
    batch = torch.export.Dim("batch", min=1)
    if kind == "image":
        return ({0: batch},)
    return {0: batch, 1: torch.export.Dim("length", min=1, max=clip.config.text.context_length)}, {0: batch}


@torch.no_grad()
def export(clip: Clip, folder: Path, *, batch: int = 3) -> Exported:
    """Write both towers and compare them with torch on random inputs of one and of `batch` examples.

    Raises:
        MissingExtra: without onnx, onnxruntime or onnxscript.
        CheckpointError: if onnxruntime's answers differ by more than 1e-4.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="export", purpose="ONNX export")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    was_training, device = clip.training, clip.device
    clip = clip.eval().cpu()
    paths: dict[Kind, Path] = {"image": folder / "image.onnx", "text": folder / "text.onnx"}
    differences = []
    try:
        for kind, path in paths.items():
            write_tower(clip, kind, path)
            batches = [examples(clip, kind, rows, generator) for rows in (1, batch)]
            differences.append(_compare(as_function(clip, kind), path, batches))
    finally:
        clip.to(device).train(was_training)
    config = clip.config
    bias = None if clip.bias is None else float(clip.bias.detach())
    write_json(
        {
            "name": config.name,
            "logits": "exp(scale) * image_features @ text_features.T + (bias or 0)",
            "scale": float(clip.scale.detach()),
            "bias": bias,
            "image_size": config.image.image_size,
            "context_length": config.text.context_length,
            "preprocessing": asdict(clip.preprocessing),
        },
        folder / "clip.json",
    )
    return Exported(paths["image"], paths["text"], *differences)


def write_tower(clip: Clip, kind: Kind, path: Path) -> None:
    """Write one tower of a Clip on the CPU, in evaluation mode; nothing is compared.

    Raises:
        MissingExtra: without onnx or onnxscript.
    """
    for name in ("onnx", "onnxscript"):
        require(name, extra="export", purpose="ONNX export")
    inputs = examples(clip, kind, 3, torch.Generator().manual_seed(0))
    module = as_function(clip, kind)
    with _quiet():
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=["features"],
            dynamic_shapes=free_sizes(clip, kind),
            opset_version=OPSET,
            external_data=_large(module),
            dynamo=True,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let the exporter keep its remarks (on versions of operators, on absent libraries) to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    inner = logging.getLogger("torch.onnx._internal.exporter._registration")
    inner_level, inner.disabled = inner.disabled, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        inner.disabled = inner_level


def _large(module: nn.Module) -> bool:
    """Whether the weights exceed what one file of this format can hold (2 GiB)."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) > 1.9 * 2**30


@torch.no_grad()
def _compare(module: nn.Module, path: Path, batches: list[dict[str, Tensor]]) -> float:
    """The largest difference between torch and onnxruntime.

    Raises:
        CheckpointError: if it is above the tolerance.
    """
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in batches:
        (found,) = session.run(["features"], {name: tensor.numpy() for name, tensor in batch.items()})
        worst = max(worst, float((torch.from_numpy(found) - module(*batch.values())).abs().max()))
    if not worst <= TOLERANCE or math.isnan(worst):
        raise CheckpointError(
            f"{path}: onnxruntime's answers differ from torch's by {worst:.1e}, more than {TOLERANCE:.0e}"
        )
    return worst
