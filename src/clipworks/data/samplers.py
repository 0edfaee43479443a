"""In which order examples are met, and which of them share a batch.

A sampler lays out one pass over a source as a table (steps, size) of indices, a pure function of
(seed, pass). Any step of any epoch can therefore be found again without walking there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clipworks.data.randomness import mix, permutation, uniform
from clipworks.data.source import Source
from clipworks.errors import DataError

_ORDER, _BATCHES, _CLASSES, _SPARED = 0x0DE5, 0xBA7C, 0xC1A5, 0x5FA4


class Sampler(Protocol):
    """Lays out one pass over a source."""

    def steps(self, source: Source, size: int) -> int:
        """How many batches of `size` a pass has; the same in every pass."""
        ...

    def table(self, source: Source, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """The indices of each batch, (steps, size) int64; -1 fills the rest of a last, shorter batch."""
        ...


@dataclass(frozen=True)
class Sequential:
    """The source's own order, the last batch shorter: for evaluation."""

    def steps(self, source: Source, size: int) -> int:
        """Batches in a pass, the shorter one included."""
        return -(-len(source) // size)

    def table(self, source: Source, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """(steps, size) int64 in order, -1 after the end."""
        return _rows(np.arange(len(source), dtype=np.int64), self.steps(source, size), size)


@dataclass(frozen=True)
class Shuffled:
    """A new order in every pass; what is left over after the last full batch waits for the next pass.

    With `drop_last=False` the rest comes as a shorter batch, so that every example is met in every pass.
    """

    drop_last: bool = True

    def steps(self, source: Source, size: int) -> int:
        """Batches in a pass."""
        return len(source) // size if self.drop_last else -(-len(source) // size)

    def table(self, source: Source, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """(steps, size) int64; no index twice."""
        return _rows(permutation(len(source), _ORDER, seed, epoch), self.steps(source, size), size)


@dataclass(frozen=True)
class UniqueLabels:
    """Batches in which no class occurs twice, so that no caption is a false negative of another.

    A pass has as many batches as can be filled at all, and leaves out as few pictures as that allows.
    If class c has n_c pictures, T batches of b can be filled exactly when the sum of min(n_c, T) is at
    least b·T. The largest such T is taken; the pictures, sorted by class, are then dealt to the T
    batches in turn: a class with at most T pictures never meets the same batch twice.
    """

    def steps(self, source: Source, size: int) -> int:
        """The largest number of batches of `size` different classes.

        Raises:
            DataError: if the source has no labels, or fewer classes than a batch has rows.
        """
        counts = np.bincount(_labels(source))
        counts = counts[counts > 0]
        if len(counts) < size:
            raise DataError(
                f"a batch of {size} without repeated classes needs as many; there are {len(counts)} classes"
            )
        low, high = 1, int(counts.sum()) // size  # feasible at `low`; feasibility is monotone
        while low < high:
            middle = (low + high + 1) // 2
            if np.minimum(counts, middle).sum() >= size * middle:
                low = middle
            else:
                high = middle - 1
        return low

    def table(self, source: Source, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """(steps, size) int64; no index twice, no class twice in a row."""
        steps = self.steps(source, size)
        labels = _labels(source)
        # Pictures in random order within each class, classes in random order.
        order = permutation(len(labels), _ORDER, seed, epoch)
        rank = mix(labels.astype(np.uint64), _CLASSES, seed, epoch)
        order = order[np.argsort(rank[order], kind="stable")]
        sorted_labels = labels[order]
        starts = np.flatnonzero(np.r_[True, sorted_labels[1:] != sorted_labels[:-1]])
        place = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        order = order[place < steps]
        surplus = len(order) - steps * size  # less than one batch
        if surplus:
            spared = np.argsort(mix(order.astype(np.uint64), _SPARED, seed, epoch), kind="stable")[:surplus]
            order = np.delete(order, spared)
        table = order.reshape(size, steps).T
        return np.ascontiguousarray(table[permutation(steps, _BATCHES, seed, epoch)])


@dataclass(frozen=True)
class ByLabel:
    """Balanced draws with repetition: every class equally likely, then a picture of it.

    For sources whose classes differ much in size. A pass is as long as `Shuffled` would make it, but
    pictures of small classes come several times and some of large classes not at all.
    """

    def steps(self, source: Source, size: int) -> int:
        """Batches in a pass."""
        return len(source) // size

    def table(self, source: Source, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """(steps, size) int64, indices may repeat."""
        labels = _labels(source)
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        starts, present = np.cumsum(counts) - counts, np.flatnonzero(counts)
        draws = np.arange(self.steps(source, size) * size, dtype=np.uint64)
        classes = present[(uniform(mix(draws, _CLASSES, seed, epoch)) * len(present)).astype(np.int64)]
        within = (uniform(mix(draws, _ORDER, seed, epoch)) * counts[classes]).astype(np.int64)
        return order[starts[classes] + within].reshape(-1, size).astype(np.int64)


def _labels(source: Source) -> NDArray[np.int64]:
    labels = source.labels
    if labels is None:
        raise DataError("this sampler needs a source in which every example has a label")
    return labels


def _rows(order: NDArray[np.int64], steps: int, size: int) -> NDArray[np.int64]:
    rows = np.full(steps * size, -1, dtype=np.int64)
    rows[: len(order)] = order[: steps * size]
    return rows.reshape(steps, size)
