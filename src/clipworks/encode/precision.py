"""In which precision to encode: asked of the processor and of the model, not guessed from names.

On a processor that multiplies bf16 in hardware, cast weights and inputs are two to three times faster
than fp32; on others bf16 is emulated and slower. And a model may not bear it. So `auto` measures
both: a matrix product once a process, and the agreement of the tower with itself on the first batch.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
import weakref
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.errors import ConfigError

Precision = Literal["fp32", "bf16", "auto"]
SPEEDUP_THAT_PAYS = 1.3
AGREEMENT = 0.999

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
_agreements: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], float]] = weakref.WeakKeyDictionary()
_copies: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], nn.Module]] = weakref.WeakKeyDictionary()


@functools.cache
def bf16_speedup(device: str = "cpu", size: int = 768) -> float:
    """How many times faster a bf16 matrix product is than an fp32 one on this device; measured once."""

    def fastest(dtype: torch.dtype) -> float:
        left = torch.ones(size, size, device=device, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            float((left @ left)[0, 0])
            times.append(time.perf_counter() - start)
        return min(times)

    return fastest(torch.float32) / fastest(torch.bfloat16)


def cast(tower: M, dtype: torch.dtype) -> M:
    """The tower with weights in `dtype`; a copy is kept until a weight of the original changes."""
    stamp = _stamp(tower)
    known = _copies.get(tower)
    if known is None or known[0] != stamp or next(known[1].parameters()).dtype != dtype:
        twin = copy.deepcopy(tower).to(dtype).requires_grad_(False)
        for name, buffer in tower.named_buffers():
            # Pixels are normalized in fp32 whatever the weights are in.
            if name in ("mean", "std"):
                setattr(twin, name, buffer.clone())
        known = _copies[tower] = (stamp, twin)
    return known[1]  # type: ignore[return-value]


def choose(tower: M, probe: object, precision: Precision) -> M:
    """The tower to encode with: itself, or its bf16 twin.

    Args:
        tower: gives (B, D) for the probe.
        probe: a small first batch, used by `auto` to compare both.
        precision: `"bf16"` without asking, `"auto"` if it is faster here and its vectors have a cosine of at
            least 0.999 with the fp32 ones.

    Raises:
        ConfigError: for another precision.
    """
    if precision == "fp32":
        return tower
    if precision not in ("bf16", "auto"):
        raise ConfigError(f"precision must be fp32, bf16 or auto, not {precision!r}")
    device = next(tower.parameters()).device
    if precision == "auto" and bf16_speedup(device.type) < SPEEDUP_THAT_PAYS:
        return tower
    twin = cast(tower, torch.bfloat16)
    if precision == "auto":
        agreement = _agreement(tower, twin, probe)
        if not agreement >= AGREEMENT:
            logger.warning("bf16 agrees with fp32 only to a cosine of %.4f: encoding in fp32", agreement)
            return tower
    return twin


@torch.no_grad()
def _agreement(tower: nn.Module, twin: nn.Module, probe: object) -> float:
    """The least cosine between the vectors of both, measured once for each state of the weights."""
    stamp = _stamp(tower)
    known = _agreements.get(tower)
    if known is None or known[0] != stamp:
        known = _agreements[tower] = (stamp, float(_cosine(tower(probe), twin(probe)).min()))
    return known[1]


def _stamp(tower: nn.Module) -> tuple[int, ...]:
    """Changes whenever a weight is replaced or written to."""
    return tuple(value for p in tower.parameters() for value in (p.data_ptr(), p._version))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
