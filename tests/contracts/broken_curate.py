"""Curators that each break one promise of the family `curate`, and one that keeps them all.

They are what shows that the checks of the contract can fail.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipworks.data.randomness import key_numbers, mix, uniform
from clipworks.data.record_files import Record
from clipworks.methods.curate.base import Curator, Tally, texts_in


class Sound(Curator):
    """Keeps every promise: of texts longer than the pool's mean, a random half."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.mean: float | None = None

    @property
    def passes(self) -> tuple[str, ...]:
        return ("lengths",)

    def measure(self, records: Iterable[Record], stage: str) -> Tally:
        tally = Tally()
        total = tally.sum_of("characters and texts", 2)
        for record in records:
            tally.numbers["records"] += 1
            for text in texts_in(record) or ():
                total += np.array([len(text), 1], np.uint64)
        return tally

    def settle(self, stage: str, tally: Tally) -> None:
        characters, texts = tally.sum_of("characters and texts", 2)
        self.mean = float(characters) / float(texts)

    def learned(self) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": np.array([self.mean])}

    def learn(self, arrays: Mapping[str, Any]) -> None:
        self.mean = float(arrays["mean"][0])

    def draws(self, records: Sequence[Record]) -> Any:
        return uniform(mix(key_numbers(str(record["key"]) for record in records), self.seed))

    def judge(self, records: Sequence[Record], tally: Tally) -> list[Record | str]:
        verdicts: list[Record | str] = []
        for record, draw in zip(records, self.draws(records)):
            longest = max(map(len, texts_in(record) or ()), default=0)
            verdicts.append("short" if longest < (self.mean or 0) else record if draw < 0.5 else "drawn out")
        return verdicts


class LosesCount(Sound):
    def transform(self, records: Iterable[Record]) -> Iterator[Record]:
        kept = list(super().transform(records))
        self.tally.dropped.clear()
        yield from kept


class KeepsTwice(Sound):
    def transform(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in super().transform(records):
            yield from (record, record)


class ComparesWithNeighbors(Sound):
    """Drops what is shorter than the record before it."""

    def judge(self, records: Sequence[Record], tally: Tally) -> list[Record | str]:
        lengths = [max(map(len, texts_in(record) or ()), default=0) for record in records]
        return ["short" if b < a else record for record, a, b in zip(records, [0, *lengths], lengths)]


class LastPartWins(Sound):
    """Its tallies do not add up."""

    def measure(self, records: Iterable[Record], stage: str) -> Tally:
        tally = super().measure(records, stage)
        size = len(tally.sums["characters and texts"])
        tally.sums["characters and texts"] = tally.sums["characters and texts"] // np.full(size, 7, np.uint64)
        return tally


class PythonsGenerator(Sound):
    def draws(self, records: Sequence[Record]) -> Any:
        return [random.random() for _ in records]


class ChangesWhatItIsGiven(Sound):
    def judge(self, records: Sequence[Record], tally: Tally) -> list[Record | str]:
        verdicts = super().judge(records, tally)
        for record in records:
            record["judged"] = True
        return verdicts


class CannotBeSent(Sound):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.hidden = lambda: None


class ForgetsWhenSaved(Sound):
    def learned(self) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": np.zeros(1)}


class NamelessParameters(Sound):
    def identity(self, stage: str = "") -> dict[str, Any]:
        return {"seed": object()}


class ReadsMoreThanItSays(Sound):
    @property
    def reads(self) -> tuple[str, ...]:
        return ()
