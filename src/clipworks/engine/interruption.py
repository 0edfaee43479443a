"""Being asked to stop, at a moment when a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clipworks.errors import ClipworksError


class Interrupted(ClipworksError):
    """The training was asked to stop, and has written a checkpoint."""


@contextmanager
def polite_end() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C set the event instead of ending the process; a second Ctrl-C ends it.

    Outside the main thread, where signals cannot be handled, the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
