"""Dynamic batching: inputs of many requests go through a tower together, on one thread.

Inputs wait in one line a kind (texts, pictures). While the model works, the next batch collects itself; when
it is idle, an input waits at most `wait` seconds for company. The line whose first input is oldest goes next,
so no kind starves the other. What is answered does not depend on who shares a batch: towers treat rows one by
one, and when a batch fails, its inputs are computed again alone, so that only the guilty one fails.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Run = Callable[[Sequence[Any]], Sequence[Any]]
"""Inputs of one kind to as many results, in their order."""


class Busy(Exception):
    """The line is full; come again later."""


class Closed(Exception):
    """Nothing is accepted any more."""


@dataclass(eq=False)
class _Job:
    """The inputs of one request: `left` of its `results` are not there yet."""

    future: Future[list[Any]]
    results: list[Any]
    left: int


@dataclass(eq=False)
class _Line:
    run: Run
    waiting: deque[tuple[float, _Job, int, Any]] = field(default_factory=deque)


class Batcher:
    """Collects inputs into batches and runs them, one batch at a time.

    Args:
        runs: what computes a batch, by kind.
        largest: inputs of a batch, at most.
        wait: seconds that an input waits for company while nothing runs.
        capacity: inputs held at once, from `reserve` on.
        observe: told the kind, the size and the seconds of every batch.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        *,
        largest: int = 32,
        wait: float = 0.002,
        capacity: int = 2048,
        observe: Callable[[str, int, float], None] = lambda kind, size, seconds: None,
    ) -> None:
        self.largest, self.wait, self.capacity = largest, wait, capacity
        self._observe = observe
        self._lines = {kind: _Line(run) for kind, run in runs.items()}
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._held = 0
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="clipworks-model", daemon=True)
        self._worker.start()

    @property
    def held(self) -> int:
        """Inputs that are reserved, waiting or being computed."""
        return self._held

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Room for so many inputs, to be taken before they are even read.

        Raises:
            Busy: if there is none.
            Closed: after `close`.
        """
        with self._changed:
            if self._closed:
                raise Closed
            if self._held + count > self.capacity:
                raise Busy
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count

    def submit(self, kind: str, inputs: Sequence[Any]) -> Future[list[Any]]:
        """The results of inputs, in their order, once they are there.

        Raises:
            Closed: after `close`.
        """
        future: Future[list[Any]] = _promise()
        if not inputs:
            future.set_result([])
            return future
        job, now = _Job(future, [None] * len(inputs), len(inputs)), time.monotonic()
        with self._changed:
            if self._closed:
                raise Closed
            self._lines[kind].waiting.extend((now, job, place, one) for place, one in enumerate(inputs))
            self._changed.notify()
        return future

    def call(self, function: Callable[[], T]) -> Future[T]:
        """The result of a function that uses the model, run between two batches.

        Raises:
            Closed: after `close`.
        """
        future: Future[T] = _promise()
        with self._changed:
            if self._closed:
                raise Closed
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Accept nothing more, finish everything that was accepted, end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    # --- the thread ---

    def _work(self) -> None:
        while True:
            with self._changed:
                kind, wait = self._next()
                while kind is None and not self._calls:
                    if self._closed and wait is None:
                        return
                    self._changed.wait(wait)
                    kind, wait = self._next()
                call = self._calls.popleft() if self._calls else None
                batch = self._take(kind) if call is None and kind is not None else []
            if call is not None:
                _settle(call[1], call[0])
            elif batch and kind is not None:
                start = time.monotonic()
                self._run(kind, batch)
                self._observe(kind, len(batch), time.monotonic() - start)

    def _next(self) -> tuple[str | None, float | None]:
        """The kind whose turn it is, or None and how long to wait for one; None for nothing to wait for."""
        heads = sorted((line.waiting[0][0], kind) for kind, line in self._lines.items() if line.waiting)
        if not heads:
            return None, None
        rest = heads[0][0] + self.wait - time.monotonic()
        if rest <= 0 or self._closed:
            return heads[0][1], None
        full = (kind for _, kind in heads if len(self._lines[kind].waiting) >= self.largest)
        kind = next(full, None)
        return kind, None if kind else rest

    def _take(self, kind: str) -> list[tuple[_Job, int, Any]]:
        waiting, batch = self._lines[kind].waiting, list[tuple[_Job, int, Any]]()
        while waiting and len(batch) < self.largest:
            batch.append(waiting.popleft()[1:])
        return batch

    def _run(self, kind: str, batch: Sequence[tuple[_Job, int, Any]]) -> None:
        try:
            results = self._lines[kind].run([one for _, _, one in batch])
        except Exception as error:  # noqa: BLE001  whatever it was, it is answered to whom it concerns
            if len(batch) > 1:
                for one in batch:
                    self._run(kind, [one])
            elif not batch[0][0].future.done():
                batch[0][0].future.set_exception(error)
            return
        for (job, place, _), result in zip(batch, results, strict=True):
            job.results[place] = result
            job.left -= 1
            if job.left == 0 and not job.future.done():
                job.future.set_result(job.results)


def _promise() -> Future[Any]:
    """A future that nobody can cancel: what was accepted is computed."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001
        future.set_exception(error)
