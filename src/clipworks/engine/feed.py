"""The batches of a training, and where in them it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from clipworks.data.source import Skipped
from clipworks.errors import ConfigError


class Feed:
    """Epochs of batches from a loader, or from anything that can be iterated over again and again.

    A loader with `state_dict` and `load_state_dict` is told where to go on; anything else is skipped up to
    there, which gives the same batches if it gives the same ones each time.

    Attributes:
        epoch: the epoch under way, from 0.
        position: batches taken in it.
        length: batches in an epoch; None where nobody knows.
    """

    def __init__(self, data: Any):
        self.data = data
        self.epoch = self.position = 0
        self.length = _length(data)
        self._fresh = True  # whether the loader still stands where the caller left it
        self._restored: Any = None

    @property
    def at_end(self) -> bool:
        """Whether the epoch is known to be over."""
        return self.position == self.length

    def rest(self) -> Iterable[Any]:
        """The batches that are left of this epoch; whoever takes one counts it in `position`."""
        data, state, self._restored = self.data, self._restored, None
        fresh, self._fresh = self._fresh, False
        if state is not None:
            data.load_state_dict(state)
            # A loader that has given its last batch may already stand at the next epoch.
            over = data.epoch != self.epoch if hasattr(data, "epoch") else self.at_end
            return () if over else data
        # Only where the loader stands elsewhere: a stream goes on from where its last epoch ended.
        if hasattr(data, "set_epoch") and (fresh or getattr(data, "epoch", None) != self.epoch):
            data.set_epoch(self.epoch)
        return _skip(data, self.position) if self.position else data

    def next_epoch(self) -> None:
        """Go to the next epoch."""
        self.epoch, self.position = self.epoch + 1, 0

    def state(self) -> Any:
        """The loader's own position, which differs between processes; None where it has none."""
        return self.data.state_dict() if hasattr(self.data, "state_dict") else None

    @property
    def skipped(self) -> Skipped | None:
        """What could not be read so far; None where the data does not say."""
        report = getattr(self.data, "skipped", None)
        return report if isinstance(report, Skipped) else None

    def restore(self, epoch: int, position: int, state: Any) -> None:
        """Go back to where a checkpoint was written."""
        self.epoch, self.position, self._restored = epoch, position, state


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, ConfigError):  # a stream
        return None


def _skip(batches: Iterable[Any], count: int) -> Iterator[Any]:
    iterator = iter(batches)
    for _ in range(count):
        next(iterator, None)
    yield from iterator
