"""Random choices as pure functions of what they are for: (seed, epoch, key, …) -> number.

An epoch's order, a caption and a crop must be the same whether they are asked for by the first worker
or the last, now or after a restart. A generator that is passed around cannot give that; a hash can.
The mixing function is the finalizer of SplitMix64, so results depend on no library's version.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


class Randomness(Protocol):
    """What a drawing function asks for; `numpy.random.Generator` and `Draws` both have it."""

    def integers(self, high: int, /) -> int:
        """A whole number, uniform in [0, high)."""
        ...

    def random(self) -> float:
        """A real number, uniform in [0, 1)."""
        ...


def key_number(key: str) -> int:
    """The 64 bits that stand for a key, the same in every process and on every machine."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def key_numbers(keys: Iterable[str]) -> NDArray[np.uint64]:
    """`key_number` of many keys, (n,) uint64."""
    return np.array([key_number(key) for key in keys], dtype=np.uint64)


def _finalize(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def fold(*parts: int) -> int:
    """One 64-bit number from several whole numbers; their order matters."""
    state = 0
    for part in parts:
        state = _finalize((state + _GOLDEN + (part & _MASK)) & _MASK)
    return state


def mix(values: NDArray[np.uint64], *salts: int) -> NDArray[np.uint64]:
    """`fold(value, *salts)` of every value, (n,) uint64 -> (n,) uint64."""
    state = np.zeros_like(values, dtype=np.uint64)
    for word in (values, *(np.full(1, salt & _MASK, dtype=np.uint64) for salt in salts)):
        state = state + np.uint64(_GOLDEN) + word  # wraps around, as meant
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(values: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Mixed 64-bit numbers as reals in [0, 1)."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *salts: int) -> NDArray[np.int64]:
    """A shuffle of range(count) that depends on the salts alone, (count,) int64."""
    return np.argsort(mix(np.arange(count, dtype=np.uint64), *salts), kind="stable").astype(np.int64)


class Draws:
    """A stream of draws that begins at the given whole numbers; see `Randomness`.

    Making one costs a microsecond, which is why there is one for each example and epoch.
    """

    __slots__ = ("_state",)

    def __init__(self, *start: int) -> None:
        self._state = fold(*start)

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        return _finalize(self._state)

    def integers(self, high: int, /) -> int:
        """A whole number, uniform in [0, high) up to a bias of high / 2^64."""
        return (self._next() * high) >> 64

    def random(self) -> float:
        """A real number, uniform in [0, 1)."""
        return (self._next() >> 11) * 2.0**-53
