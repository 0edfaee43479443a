"""An iterator that runs ahead of whoever consumes it, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1


class _End:
    """Marks the end of the items, with the error that ended them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def made_ahead(make: Callable[[], Iterator[T]], count: int) -> Iterator[T]:
    """The items of `make()`, of which up to `count` are made before they are asked for.

    An error is raised where the item it prevented would have come. Closing the iterator ends the thread
    after the item it is working on.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=max(1, count))
    stopped = threading.Event()

    def offer(item: T | _End) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in make():
                if not offer(item):
                    return
            offer(_End())
        except BaseException as error:  # noqa: BLE001  raised again in the consumer's thread
            offer(_End(error))

    thread = threading.Thread(target=produce, name="clipworks-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join()
