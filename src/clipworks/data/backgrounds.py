"""What shows through the transparent parts of a picture, chosen when the batch is made.

Composition is linear: a picture over black (P) and over white differ by exactly its transparency (T),
and over any color it is P + T · color. Keeping P and T therefore lets one decoded picture stand before
a new background in every epoch, after resizing, and for every preprocessing that is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clipworks.data.randomness import key_numbers, mix, uniform

_SALT = 0xBAC6


class Background(Protocol):
    """Colors behind pictures; a pure function of the keys and the epoch."""

    def colors(self, keys: list[str], epoch: int) -> NDArray[np.float32]:
        """One color a picture, (n, 3) float32 in [0, 1], red green blue."""
        ...


@dataclass(frozen=True)
class Plain:
    """The same color behind every picture; white unless told otherwise, as evaluation wants it."""

    color: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def colors(self, keys: list[str], epoch: int) -> NDArray[np.float32]:
        """One color a picture, (n, 3) float32 in [0, 1]."""
        return np.tile(np.asarray(self.color, dtype=np.float32), (len(keys), 1))


@dataclass(frozen=True)
class Varied:
    """A new plain color for every (key, epoch): white with probability `white`, else uniform in the cube."""

    seed: int = 0
    white: float = 0.3

    def colors(self, keys: list[str], epoch: int) -> NDArray[np.float32]:
        """One color a picture, (n, 3) float32 in [0, 1]."""
        numbers = key_numbers(keys)
        channels = [uniform(mix(numbers, _SALT, self.seed, epoch, channel)) for channel in range(4)]
        colors = np.stack(channels[:3], axis=1)
        colors[channels[3] < self.white] = 1.0
        return colors.astype(np.float32)


def compose(
    over_black: NDArray[np.uint8], transparency: NDArray[np.uint8], colors: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Put pictures before plain colors.

    Args:
        over_black: pictures composed over black, (n, 3, h, w) uint8.
        transparency: how much of the background shows, (n, 1, h, w) uint8; 255 is all of it.
        colors: (n, 3) float32 in [0, 1].

    Returns:
        (n, 3, h, w) uint8.
    """
    behind = transparency.astype(np.float32) * colors[:, :, None, None]
    return np.minimum(over_black + np.rint(behind), 255).astype(np.uint8)
