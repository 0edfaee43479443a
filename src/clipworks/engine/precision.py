"""In which precision products are computed.

`bf16` keeps weights, optimizer, normalizations and losses in fp32 and computes the products of the towers
in bf16, by autocast. Casting all weights by hand once a step was measured within 3 % of it on a processor
with AVX-512 BF16 (ViT of width 192, 6 blocks, batch 256: 2.45 s against 2.40 s, fp32 4.7 s), but it turns
the residual stream into bf16 too and asks every module to cope with that.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from clipworks.engine.recipe import Precision

WORTHWHILE = 1.3  # speed of bf16 products over fp32 ones below which bf16 does not pay


def resolve(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Turn `auto` into `fp32` or `bf16` by measuring one product on the device."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32, bf16 = _seconds(torch.float32, device), _seconds(torch.bfloat16, device)
    return "bf16" if fp32 > WORTHWHILE * bf16 else "fp32"


def computing(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the towers run."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _seconds(dtype: torch.dtype, device: torch.device, size: int = 768) -> float:
    """The fastest of five products (size, size)."""
    factor = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):  # the first one warms up, and is never the fastest
        start = time.perf_counter()
        (factor @ factor)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return best
