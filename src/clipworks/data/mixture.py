"""Batches composed of several sources in fixed numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clipworks.data.randomness import fold
from clipworks.data.samplers import Sampler, Shuffled
from clipworks.data.source import Source
from clipworks.errors import ConfigError, DataError


@dataclass(frozen=True)
class Part:
    """What one source gives to each batch of a mixture.

    Attributes:
        source: the examples.
        per_batch: how many of them are in each batch, over all processes.
        sampler: how they are drawn.
    """

    source: Source
    per_batch: int
    sampler: Sampler = field(default_factory=Shuffled)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: a place in the source of a part, and how many passes that part has made."""

    part: int
    index: int
    view: int


class Mixture:
    """Batches composed of a fixed number of examples from each of several sources.

    An epoch is one pass over the first part. The others go round at their own pace, each pass in a new
    order, across epochs; no batch straddles two passes, so no example is twice in a batch.

    Args:
        parts: `Part`s, or tuples (source, per_batch) or (source, per_batch, sampler).

    Raises:
        ConfigError: if there is no part or a number is not positive.
        DataError: if a source has too few examples for one batch.
    """

    def __init__(self, parts: list[Part | tuple[Source, int] | tuple[Source, int, Sampler]]) -> None:
        self.parts = [part if isinstance(part, Part) else Part(*part) for part in parts]
        if not self.parts:
            raise ConfigError("a mixture needs at least one part")
        self._steps = []
        for number, part in enumerate(self.parts):
            if part.per_batch < 1:
                raise ConfigError(
                    f"part {number} gives {part.per_batch} examples to a batch; give a positive number"
                )
            steps = part.sampler.steps(part.source, part.per_batch)
            if steps < 1:
                raise DataError(
                    f"part {number} has {len(part.source)} examples, too few for {part.per_batch} in a batch"
                )
            self._steps.append(steps)
        self._tables: dict[int, tuple[tuple[int, int], NDArray[np.int64]]] = {}

    @property
    def batch_size(self) -> int:
        """Examples in a batch, over all processes."""
        return sum(part.per_batch for part in self.parts)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self._steps[0]

    def batch(self, seed: int, epoch: int, step: int) -> list[Row]:
        """The examples of one batch, part after part."""
        chosen: list[Row] = []
        for number, part in enumerate(self.parts):
            done, row = divmod(epoch * self.steps + step, self._steps[number])
            key = (seed, done)
            held = self._tables.get(number)
            if held is None or held[0] != key:
                own_seed = fold(seed, number) if number else seed
                held = key, part.sampler.table(part.source, part.per_batch, own_seed, done)
                self._tables[number] = held
            chosen += [Row(number, index, done) for index in held[1][row].tolist() if index >= 0]
        return chosen
