"""From sources to batches: drawn, decoded, captioned and tokenized ahead of the training step.

A `Loader` is a position (epoch, step) in an endless, fully determined sequence of batches. Iterating
runs from the position to the end of its epoch; `state_dict` is the position; loading it gives the
identical rest. The batch of a step does not depend on the number of processes: each takes its rows.

Pictures are decoded by threads: Pillow releases the interpreter lock while it decodes, so two of them are
as fast as two processes, and nothing has to be sent from one to another. One more thread makes whole
batches ahead of the training step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from clipworks.core.images import Preprocessing
from clipworks.data.ahead import made_ahead
from clipworks.data.batch import Batch
from clipworks.data.mixture import Mixture, Part, Row
from clipworks.data.pictures import Decoded, PictureCache, decode, stack
from clipworks.data.randomness import Draws
from clipworks.data.samplers import Sampler, Sequential, Shuffled
from clipworks.data.sentences import TextChoice, Tokenizer
from clipworks.data.source import Example, Skipped, Source
from clipworks.data.streams import Position, Stream
from clipworks.errors import ClipworksError, ConfigError, DataError, PictureError

_REPLACE = 0x4EB1
_REPLACEMENTS = 32  # how many other examples are tried in place of one that cannot be read


@dataclass(frozen=True)
class Reading:
    """How pictures are read.

    Attributes:
        workers: threads that decode; 0 does everything in the calling thread, when it is asked for.
        ahead: how many batches are made ahead.
        cache: "memory" keeps every decoded picture, (3, n, n) bytes at the preprocessing's size.
        broken: what happens to a row whose picture cannot be read. "replace" takes another example, of
            the same class where there are labels; "drop" makes the batch smaller; "raise" stops. None is
            "drop" for a `Sequential` sampler and "replace" for all others. In every case it is counted.
    """

    workers: int = 2
    ahead: int = 4
    cache: Literal["memory"] | None = None
    broken: Literal["replace", "drop", "raise"] | None = None


@dataclass(frozen=True)
class Process:
    """Which of several training processes this is; each gets every `count`-th row of a batch."""

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ConfigError(f"rank {self.rank} is not one of {self.count} processes")


class Loader:
    """Batches from a source, a mixture of sources or a stream.

    Args:
        source: a `Source`, a `Mixture`, or a `Stream`.
        preprocessing: from a picture to bytes (3, n, n); None leaves pictures out.
        tokenizer: from a list of strings to `Tokens`; None leaves texts out.
        batch_size: examples in a batch over all processes; a mixture brings its own.
        sampler: the order of a single source.
        texts: source names of which one sentence each is drawn, or a `TextChoice`.
        seed: other seed, other order and other captions.
        process: which rows are this process's.
        reading: threads, cache and what to do with broken pictures.
        transform: applied to each batch where it is made, for instance `RandomView(48).of`.

    Attributes:
        epoch: the epoch of the next batch.
        step: the step of the next batch within its epoch.
        wait_seconds: how long the caller has waited for batches so far.
        skipped: what could not be read.

    Raises:
        ConfigError: if the options do not fit together.
        DataError: if the source cannot fill a batch.
    """

    def __init__(
        self,
        source: Source | Mixture | Stream,
        preprocessing: Preprocessing | None,
        tokenizer: Tokenizer | None = None,
        batch_size: int | None = None,
        *,
        sampler: Sampler | None = None,
        texts: Sequence[str] | TextChoice = ("alt",),
        seed: int = 0,
        process: Process = Process(),
        reading: Reading = Reading(),
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._plan, self.batch_size = _plan(source, batch_size, sampler)
        if self.batch_size % process.count:
            raise ConfigError(
                f"a batch of {self.batch_size} cannot be shared evenly by {process.count} processes"
            )
        if isinstance(self._plan, Stream):
            if process.count > 1 and self._plan.examples is None:
                raise ConfigError(
                    "a stream read by several processes needs `examples`, so that all make equal steps"
                )
            if reading.cache is not None:
                raise ConfigError("a stream is not cached; use a source with random access")
        self.preprocessing, self.tokenizer, self.transform = preprocessing, tokenizer, transform
        if isinstance(texts, str):
            texts = (texts,)
        self.texts = texts if isinstance(texts, TextChoice) else TextChoice(dict.fromkeys(texts, 1))
        self.seed, self.process, self.reading = seed, process, reading
        sequential = isinstance(self._plan, Mixture) and isinstance(self._plan.parts[0].sampler, Sequential)
        self._broken = reading.broken or ("drop" if sequential else "replace")
        self._caches: dict[int, PictureCache] = {}
        if reading.cache == "memory" and preprocessing is not None and isinstance(self._plan, Mixture):
            for number, part in enumerate(self._plan.parts):
                self._caches[number] = PictureCache(len(part.source), preprocessing.image_size)
        self._unreadable = Skipped()
        self.epoch = self.step = 0
        self.wait_seconds = 0.0
        self._position: Position | None = None

    def __len__(self) -> int:
        """Batches in an epoch.

        Raises:
            ConfigError: for a stream whose length nobody gave.
        """
        if isinstance(self._plan, Mixture):
            return self._plan.steps
        if self._plan.examples is None:
            raise ConfigError("a stream has no length unless `examples` says how long an epoch is")
        return self._plan.examples // self.batch_size

    @property
    def skipped(self) -> Skipped:
        """What could not be read so far, by reason: pictures here, files and records in the sources."""
        report = Skipped().update(self._unreadable)
        sources = (
            [part.source for part in self._plan.parts] if isinstance(self._plan, Mixture) else [self._plan]
        )
        for source in sources:
            for inner in _within(source):
                found = getattr(inner, "skipped", None)
                if isinstance(found, Skipped):
                    report.update(found)
        return report

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.step = epoch, 0
        self._position = None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was given out, as plain values."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        if isinstance(self._plan, Stream):
            state["processes"] = self.process.count
            state["position"] = None if self._position is None else list(self._position)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position.

        A position in a stream is that of one of several readers. With another number of them, reading goes on
        with the next turn of the stream; what was left of the turn under way is not read.

        Raises:
            ConfigError: if it is the position of a loader with another seed or batch size, which would
                not continue the same sequence.
        """
        mine = self.state_dict()
        for name in ("seed", "batch_size"):
            if name in mine and state.get(name) != mine[name]:
                raise ConfigError(
                    f"the state is of a loader with {name} {state.get(name)}, this one has {mine[name]}; "
                    "it would not continue the same batches"
                )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        position = state.get("position")
        self._position = None if position is None else Position(*position)
        if self._position is not None and state["processes"] != self.process.count:
            self._position = Position(self._position.turn + 1, 0, 0, 0, 0)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch; afterwards the position is the beginning of the next one."""
        epoch = self.epoch
        made = (
            made_ahead(self._make_in_threads, self.reading.ahead)
            if self.reading.workers
            else self._make(None)
        )
        with closing(made):  # type: ignore[type-var]
            while True:
                began = time.perf_counter()
                item = next(made, None)
                self.wait_seconds += time.perf_counter() - began
                if item is None:
                    break
                batch, self._position = item
                self.step += 1
                if isinstance(self._plan, Mixture) and self.step == self._plan.steps:
                    self.epoch, self.step = epoch + 1, 0
                yield batch
        if self.epoch == epoch:  # the end of a stream shows only when it is reached
            self.epoch, self.step = epoch + 1, 0
            if isinstance(self._plan, Stream) and self._plan.examples is None:
                self._position = None

    def batch(self, epoch: int, step: int) -> Batch:
        """Any batch of the sequence, without moving.

        Raises:
            ConfigError: for a stream, which has no random access.
        """
        if not isinstance(self._plan, Mixture):
            raise ConfigError("a stream has no random access to its batches")
        return self._assemble(self._plan, epoch, step, None)

    def _make_in_threads(self) -> Iterator[tuple[Batch, Position | None]]:
        with ThreadPoolExecutor(self.reading.workers, thread_name_prefix="clipworks-decode") as pool:
            yield from self._make(pool)

    def _make(self, pool: ThreadPoolExecutor | None) -> Iterator[tuple[Batch, Position | None]]:
        if isinstance(self._plan, Stream):
            yield from self._from_stream(self._plan, pool)
            return
        epoch = self.epoch
        for step in range(self.step, self._plan.steps):
            yield self._assemble(self._plan, epoch, step, pool), None

    def _assemble(self, plan: Mixture, epoch: int, step: int, pool: ThreadPoolExecutor | None) -> Batch:
        rows = plan.batch(self.seed, epoch, step)
        taken = {(row.part, row.index) for row in rows}
        rows = rows[self.process.rank :: self.process.count]
        loaded = self._load_all(plan, rows, pool)
        kept: list[Row] = []
        examples: list[Decoded] = []
        for place, (row, one) in enumerate(zip(rows, loaded)):
            if isinstance(one, ClipworksError) and self._broken == "replace":
                draws = Draws(_REPLACE, self.seed, epoch, step, self.process.rank, place)
                row, one = self._replacement(plan, row, taken, draws, one)
            if not isinstance(one, ClipworksError):
                kept.append(row)
                examples.append(one)
        return self._finish(kept, examples)

    def _load_all(
        self, plan: Mixture, rows: list[Row], pool: ThreadPoolExecutor | None
    ) -> list[Decoded | ClipworksError]:
        loaded: list[Decoded | ClipworksError | Future[Decoded | ClipworksError]] = []
        for row in rows:
            cache = self._caches.get(row.part)
            found = None if cache is None else cache.get(row.index)
            if found is not None:
                loaded.append(found)
            elif pool is None:
                loaded.append(self._load(plan, row.part, row.index))
            else:
                loaded.append(pool.submit(self._load, plan, row.part, row.index))
        return [one.result() if isinstance(one, Future) else one for one in loaded]

    def _load(self, plan: Mixture, part: int, index: int) -> Decoded | ClipworksError:
        try:
            example = plan.parts[part].source[index]
        except (PictureError, DataError) as error:
            place = f"part {part}, example {index}" if len(plan.parts) > 1 else f"example {index}"
            return self._failed("unreadable example", place, error)
        decoded = self._decode(example)
        cache = self._caches.get(part)
        if cache is not None and isinstance(decoded, Decoded):
            cache.put(index, decoded)
        return decoded

    def _decode(self, example: Example) -> Decoded | ClipworksError:
        try:
            return decode(example, self.preprocessing)
        except (PictureError, DataError) as error:
            return self._failed("unreadable picture", example.key, error)

    def _failed(self, reason: str, place: str, error: ClipworksError) -> ClipworksError:
        self._unreadable.add(reason, place, str(error))
        if self._broken == "raise":
            raise error
        return error

    def _replacement(
        self, plan: Mixture, row: Row, taken: set[tuple[int, int]], draws: Draws, error: ClipworksError
    ) -> tuple[Row, Decoded]:
        """Another example of the same class, or, where there is none, of a class that the batch lacks."""
        source = plan.parts[row.part].source
        everything = np.arange(len(source))
        candidates = [everything]
        if source.labels is not None:
            present = source.labels[[index for part, index in taken if part == row.part]]
            candidates = [
                np.flatnonzero(source.labels == source.labels[row.index]),
                np.flatnonzero(~np.isin(source.labels, present)),
                everything,
            ]
        for indices in candidates:
            for _ in range(_REPLACEMENTS if len(indices) else 0):
                other = replace(row, index=int(indices[draws.integers(len(indices))]))
                if (other.part, other.index) in taken:
                    continue
                decoded = self._load_all(plan, [other], None)[0]
                if isinstance(decoded, Decoded):
                    taken.add((other.part, other.index))
                    return other, decoded
        raise DataError(f"nothing readable was found in place of a broken example: {error}") from error

    def _from_stream(
        self, stream: Stream, pool: ThreadPoolExecutor | None
    ) -> Iterator[tuple[Batch, Position | None]]:
        size = self.batch_size // self.process.count
        steps = None if stream.examples is None else stream.examples // self.batch_size
        position = self._position or Position(0 if steps is not None else self.epoch, 0, 0, 0, 0)
        done = self.step
        examples = stream.read(
            self.seed, position, self.process.rank, self.process.count, endless=steps is not None
        )
        waiting: list[tuple[Example, Position]] = []
        loaded: list[tuple[Decoded, Position]] = []
        while steps is None or done < steps:
            ended = False
            while len(waiting) + len(loaded) < size and not ended:
                item = next(examples, None)
                ended = item is None
                if item is not None:
                    waiting.append(item)
            decode = map if pool is None else pool.map
            for (_, after), one in zip(waiting, decode(self._decode, [example for example, _ in waiting])):
                position = after
                if isinstance(one, Decoded):
                    loaded.append((one, after))
            waiting.clear()
            if len(loaded) == size or (ended and loaded):
                rows = [Row(0, 0, after.turn) for _, after in loaded]
                yield self._finish(rows, [one for one, _ in loaded]), position
                done += 1
                loaded.clear()
            if ended:
                return

    def _finish(self, rows: list[Row], decoded: list[Decoded]) -> Batch:
        examples = [one.example for one in decoded]
        views = [row.view for row in rows]
        images, texts = None, {}
        if self.preprocessing is not None:
            images = torch.from_numpy(stack(decoded, views, self.preprocessing.image_size))
        if self.tokenizer is not None:
            texts = self.texts.tokens(examples, views, self.seed, self.tokenizer)
        labels = [-1 if example.label is None else example.label for example in examples]
        boxes = [example.extra.get("boxes") for example in examples]
        batch = Batch(
            images=images,
            texts=texts,
            features={
                "label": torch.tensor(labels, dtype=torch.int64),
                "part": torch.tensor([row.part for row in rows], dtype=torch.int64),
                "view": torch.tensor(views, dtype=torch.int64),
            },
            boxes=boxes if any(box is not None for box in boxes) else None,
            keys=[example.key for example in examples],
        )
        return batch if self.transform is None else self.transform(batch)


def _plan(
    source: Source | Mixture | Stream, batch_size: int | None, sampler: Sampler | None
) -> tuple[Mixture | Stream, int]:
    if isinstance(source, Mixture):
        if sampler is not None or batch_size not in (None, source.batch_size):
            raise ConfigError("a mixture has its own samplers and batch size; do not give others")
        return source, source.batch_size
    if batch_size is None or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive number, not {batch_size}")
    if isinstance(source, Stream):
        if sampler is not None:
            raise ConfigError("a stream has its own order; do not give a sampler")
        return source, batch_size
    return Mixture([Part(source, batch_size, sampler or Shuffled())]), batch_size


def _within(source: Any) -> Iterator[Any]:
    """A source and the sources that it wraps."""
    yield source
    if isinstance(source, Stream):
        yield source.pieces
    for inner in (getattr(source, "source", None), *getattr(source, "sources", ())):
        if inner is not None:
            yield from _within(inner)
