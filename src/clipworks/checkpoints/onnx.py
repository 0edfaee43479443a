"""Both towers as ONNX files, checked with onnxruntime before anything is said to be done.

    image.onnx   pixels (B, 3, n, n) float32 in [0, 1] -> features (B, D), unit length
    text.onnx    ids (B, L) int64, ends (B,) int64     -> features (B, D), unit length
    clip.json    scale, bias, sizes, and how pictures are prepared

B is free. Mean and deviation are inside `image.onnx`; L is the context length.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipworks.checkpoints.own import write_json
from clipworks.core.clip import Clip, unit
from clipworks.errors import CheckpointError, require

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
    config = clip.config
    side, length = config.image.image_size, config.text.context_length
    rows = (1, batch)
    pixels = [torch.rand(n, 3, side, side, generator=generator) for n in rows]
    ids = [torch.randint(config.text.vocab_size, (n, length), generator=generator) for n in rows]
    ends = [torch.randint(length, (n,), generator=generator) for n in rows]
    try:
        image = _export(_Image(clip), {"pixels": pixels[1]}, folder / "image.onnx")
        text = _export(_Text(clip), {"ids": ids[1], "ends": ends[1]}, folder / "text.onnx")
        differences = (
            _compare(_Image(clip), image, [{"pixels": one} for one in pixels]),
            _compare(
                _Text(clip), text, [{"ids": one, "ends": end} for one, end in zip(ids, ends, strict=True)]
            ),
        )
    finally:
        clip.to(device).train(was_training)
    bias = None if clip.bias is None else float(clip.bias.detach())
    write_json(
        {
            "name": config.name,
            "logits": "exp(scale) * image_features @ text_features.T + (bias or 0)",
            "scale": float(clip.scale.detach()),
            "bias": bias,
            "image_size": side,
            "context_length": length,
            "preprocessing": asdict(clip.preprocessing),
        },
        folder / "clip.json",
    )
    return Exported(image, text, *differences)


def _export(module: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> Path:
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=["features"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            external_data=_large(module),
            dynamo=True,
            verbose=False,
        )
    return path


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
