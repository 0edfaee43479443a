"""How fast a training runs, how much of the time it waits for data, and how much it computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


class Meter:
    """Samples and operations a second, and the share of waiting, over the last `window` steps."""

    def __init__(self, window: int = 50):
        self.steps: deque[tuple[float, float, int, int]] = deque(maxlen=window)
        self.waited = 0.0
        self.mark = time.perf_counter()

    def waiting_for(self, batches: Iterable[T]) -> Generator[T, None, None]:
        """Hand the batches on, counting the time until each is there."""
        iterator = iter(batches)
        try:
            while True:
                start = time.perf_counter()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self.waited += time.perf_counter() - start
                yield batch
        finally:  # a loader's threads end with its iterator
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def step(self, samples: int, flops: int = 0) -> None:
        """A step is over; it was on so many samples and needed so many operations."""
        now = time.perf_counter()
        self.steps.append((now - self.mark, self.waited, samples, flops))
        self.mark, self.waited = now, 0.0

    def pause(self) -> None:
        """What happened since the last step (a checkpoint, an evaluation) is not counted."""
        self.mark, self.waited = time.perf_counter(), 0.0

    @property
    def rate(self) -> float:
        """Samples a second; 0 before the first step."""
        return self._sum(2) / self._sum(0) if self.steps else 0.0

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self._sum(1) / self._sum(0) if self.steps else 0.0

    @property
    def flops_rate(self) -> float:
        """Operations a second; 0 before the first step."""
        return self._sum(3) / self._sum(0) if self.steps else 0.0

    def _sum(self, column: int) -> float:
        return sum(step[column] for step in self.steps)
