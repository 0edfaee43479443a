"""The batcher: full batches under load, little waiting without, nothing lost, failures kept apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipworks.serve.batching import Batcher, Busy, Closed


class Counted:
    """Squares numbers, remembers sizes of batches, and can be held up."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()

    def __call__(self, numbers: Sequence[Any]) -> list[int]:
        self.entered.set()
        assert self.go.wait(20)
        self.sizes.append(len(numbers))
        return [number * number for number in numbers]


def test_what_comes_while_a_batch_runs_is_the_next_batch_and_none_is_larger_than_allowed() -> None:
    run = Counted()
    run.go.clear()
    batcher = Batcher({"n": run}, largest=4, wait=0)
    first = batcher.submit("n", [1])
    assert run.entered.wait(5)
    rest = [batcher.submit("n", [number]) for number in range(10)]
    run.go.set()
    assert first.result(5) == [1]
    assert [one.result(5) for one in rest] == [[number**2] for number in range(10)]
    assert run.sizes == [1, 4, 4, 2]
    batcher.close()


def test_an_idle_model_waits_for_company_but_not_longer_than_it_may() -> None:
    run = Counted()
    batcher = Batcher({"n": run}, largest=100, wait=0.15)
    start = time.monotonic()
    both = [batcher.submit("n", [2]), batcher.submit("n", [3])]
    assert [one.result(5) for one in both] == [[4], [9]]
    assert run.sizes == [2]
    assert 0.1 < time.monotonic() - start < 2
    batcher.close()


def test_a_full_batch_does_not_wait() -> None:
    run = Counted()
    batcher = Batcher({"n": run}, largest=3, wait=30)
    assert batcher.submit("n", [1, 2, 3]).result(5) == [1, 4, 9]
    batcher.close()


def test_no_kind_starves_another() -> None:
    order: list[str] = []
    gate = threading.Event()

    def make(name: str) -> Any:
        def run(numbers: Sequence[int]) -> Sequence[int]:
            assert gate.wait(5)
            order.append(name)
            return numbers

        return run

    batcher = Batcher({"a": make("a"), "b": make("b")}, largest=2, wait=0)
    futures = [batcher.submit("a", [0])]
    time.sleep(0.05)
    futures += [batcher.submit("a", [1]), batcher.submit("b", [2]), batcher.submit("a", [3] * 8)]
    gate.set()
    for future in futures:
        future.result(5)
    assert order[:3] == ["a", "a", "b"]
    batcher.close()


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.integers(-9, 9), max_size=7), max_size=12),
    st.integers(1, 5),
    st.sets(st.integers(-9, 9)),
)
def test_every_request_gets_its_own_results_and_only_the_guilty_one_fails(
    requests: list[list[int]], largest: int, poison: set[int]
) -> None:
    def run(numbers: Sequence[int]) -> list[int]:
        if poison & set(numbers):
            raise ValueError("poison")
        return [number + 100 for number in numbers]

    batcher = Batcher({"n": run}, largest=largest, wait=0)
    futures = [batcher.submit("n", numbers) for numbers in requests]
    for numbers, future in zip(requests, futures, strict=True):
        if poison & set(numbers):
            with pytest.raises(ValueError, match="poison"):
                future.result(5)
        else:
            assert future.result(5) == [number + 100 for number in numbers]
    batcher.close()


def test_a_batch_that_only_fails_together_is_computed_one_by_one() -> None:
    def run(numbers: Sequence[int]) -> Sequence[int]:
        if len(numbers) > 1:
            raise MemoryError
        return numbers

    batcher = Batcher({"n": run}, largest=8, wait=0.05)
    futures = [batcher.submit("n", [number]) for number in range(5)]
    assert [future.result(5) for future in futures] == [[number] for number in range(5)]
    batcher.close()


def test_room_is_given_until_there_is_none_and_comes_back() -> None:
    batcher = Batcher({"n": Counted()}, capacity=3)
    with batcher.reserve(2):
        with pytest.raises(Busy), batcher.reserve(2):
            pass
        with batcher.reserve(1):
            assert batcher.held == 3
    with batcher.reserve(3):
        pass
    assert batcher.held == 0
    batcher.close()


def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    run = Counted()
    run.go.clear()
    batcher = Batcher({"n": run}, largest=2, wait=30)
    futures = [batcher.submit("n", [number]) for number in range(7)]
    called = batcher.call(lambda: "called")
    ending = threading.Thread(target=batcher.close)
    ending.start()
    run.go.set()
    ending.join(10)
    assert not ending.is_alive()
    assert [future.result(0) for future in futures] == [[number**2] for number in range(7)]
    assert called.result(0) == "called"
    with pytest.raises(Closed):
        batcher.submit("n", [1])
    with pytest.raises(Closed), batcher.reserve(1):
        pass


def test_a_call_runs_between_batches_on_the_same_thread_and_its_failure_is_its_own() -> None:
    names: list[str] = []

    def run(numbers: Sequence[int]) -> Sequence[int]:
        names.append(threading.current_thread().name)
        return numbers

    batcher = Batcher({"n": run}, wait=0)
    batcher.submit("n", [1]).result(5)
    assert batcher.call(lambda: threading.current_thread().name).result(5) == names[0]
    with pytest.raises(ZeroDivisionError):
        batcher.call(lambda: 1 / 0).result(5)
    assert batcher.submit("n", [5]).result(5) == [5]
    batcher.close()
