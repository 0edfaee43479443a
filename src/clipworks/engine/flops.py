"""How much arithmetic a model needs, and how much the device can do: together, the utilization of a training.

Counted are products of matrices and convolutions, 2 operations for each multiplication and addition, of what
the towers' vectors need and nothing else: a text has its own length and no padding, and in the last block of
a tower that reads its class token, only that token is a query. A backward pass needs twice a forward pass
(Chowdhery et al., PaLM, 2022, appendix B, who call the quotient model FLOPs utilization); what activation
checkpointing or caching of features compute again is not counted.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from clipworks.core.config import BlockConfig, Config, ResNetConfig, TextConfig, VisionConfig
from clipworks.core.towers import Tower

Count = TypeVar("Count", int, "np.ndarray[Any, Any]")

PRODUCT = {"cpu": 1024}  # side of the square matrices by which a device is measured; elsewhere 8192
SECONDS = 0.1


class Utilization:
    """What share of the arithmetic that the devices could do a training needs.

    Args:
        clip: the model that is trained.
        precision: `fp32` or `bf16`, in which its products are computed.
        device: of this process.
        processes: how many there are, each with a device like this one.

    Attributes:
        peak: operations a second of all devices; NaN where nothing can be counted, because the model's towers
            are not those of a `Config`.
    """

    def __init__(self, clip: nn.Module, precision: str, device: torch.device, processes: int = 1):
        self.config = getattr(clip, "config", None)
        self.processes = processes
        self.peak = math.nan
        towers = [getattr(clip, name, None) for name in ("image", "text")]
        if isinstance(self.config, Config) and all(isinstance(tower, Tower) for tower in towers):
            self.trained = tuple(any(p.requires_grad for p in tower.parameters()) for tower in towers)  # type: ignore[union-attr]
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            self.peak = processes * peak_flops(str(device), dtype)

    def needed(self, batch: Any, side: int | None) -> int:
        """Operations of a step on this process's batch, times the processes: pictures and texts once each.

        Args:
            batch: a `Batch` in main memory.
            side: of the pictures once they are resized; None leaves them as they are.
        """
        if math.isnan(self.peak):
            return 0
        images = 0 if batch.images is None else len(batch.images)
        side = side or (batch.images.shape[-1] if images else None)
        lengths = [tokens.ends.cpu().numpy() + 1 for tokens in batch.texts.values()]
        every = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        return self.processes * step_flops(self.config, images, side, every, self.trained)  # type: ignore[arg-type]


def step_flops(
    config: Config, images: int, side: int | None, lengths: np.ndarray, trained: tuple[bool, bool]
) -> int:
    """Operations of one training step.

    Args:
        config: of the model.
        images: number of pictures.
        side: their side in pixels; None for the tower's own.
        lengths: tokens of each text, (n,) int64.
        trained: whether the image tower and the text tower are trained; a frozen one has no backward pass.
    """
    image = images * image_flops(config.image, config.width, side)
    text = int(text_flops(config.text, config.width, lengths.astype(np.int64)).sum())
    return (3 if trained[0] else 1) * image + (3 if trained[1] else 1) * text


def image_flops(config: VisionConfig | ResNetConfig, out_width: int, side: int | None = None) -> int:
    """Operations of an image tower on one picture, of `side` pixels if not of the tower's own size."""
    side = side or config.image_size
    if isinstance(config, ResNetConfig):
        return _resnet_flops(config, out_width, side)
    width, grid = config.width, side // config.patch_size
    tokens = grid * grid + config.class_token
    if config.stem:
        total = _stem_flops(config, side)
    else:
        total = 2 * 3 * config.patch_size**2 * width * grid * grid
    for number, block in enumerate(config.blocks, start=1):
        last = number == len(config.blocks) and config.pooling == "class"
        total += _block_flops(width, block, tokens, 1 if last else tokens)
    if config.pooling == "attention":
        total += _block_flops(width, config.blocks[-1], tokens, 1)
    return total + (2 * width * out_width if config.projection else 0)


def text_flops(config: TextConfig, out_width: int, length: Count) -> Count:
    """Operations of a text tower on a text of `length` tokens; also for many at once, (n,) int64 to (n,)."""
    blocks = [_block_flops(config.width, block, length, length) for block in config.blocks]
    return sum(blocks) + 0 * length + (2 * config.width * out_width if config.projection != "none" else 0)


def _block_flops(width: int, block: BlockConfig, tokens: Count, queries: Count) -> Count:
    inner = block.heads * block.head_width
    projections = width * inner * (2 * queries + 2 * tokens)  # queries, keys, values, output
    return 2 * (projections + 2 * queries * tokens * inner + 2 * queries * width * block.mlp_width)


def _stem_flops(config: VisionConfig, side: int) -> int:
    total, channels = 0, 3
    for stage in config.stem:
        side //= 2
        total += 2 * 9 * side * side * (channels * stage.width + 2 * stage.depth * stage.width**2)
        channels = stage.width
    return total + 2 * side * side * channels * config.width


def _resnet_flops(config: ResNetConfig, out_width: int, side: int) -> int:
    width, side = config.width, side // 2
    total = 2 * 9 * side * side * (3 * width // 2 + (width // 2) ** 2 + width // 2 * width)
    side //= 2
    channels = width
    for stage, depth in enumerate(config.layers):
        narrow = width * 2**stage
        for number in range(depth):
            area = side * side
            if stage and not number:
                side //= 2
            total += 2 * area * (channels * narrow + 9 * narrow**2) + 2 * side * side * narrow * 4 * narrow
            if not number:  # the shortcut
                total += 2 * side * side * channels * 4 * narrow
            channels = 4 * narrow
    tokens = side * side + 1
    return total + 2 * channels * (channels * (1 + 2 * tokens) + 2 * tokens + out_width)


@functools.cache
def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a bare matrix product on this device, the fastest of a tenth of a second.

    Measured once a process, with the threads it has; what the device could do by its data sheet may be more.
    """
    size = PRODUCT.get(torch.device(device).type, 8192)
    left = torch.ones(size, size, device=device, dtype=dtype)
    best, begun = float("inf"), time.perf_counter()
    with torch.no_grad():
        float((left @ left)[0, 0])  # not the first: it sets the library up
        while best == float("inf") or time.perf_counter() - begun < SECONDS:
            start = time.perf_counter()
            float((left @ left)[0, 0])
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
