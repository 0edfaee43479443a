"""A bar on stderr for the parts that take long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def with_bar(things: Iterable[T], total: int, words: str, shown: bool | None = None) -> Iterator[T]:
    """The things, with a bar that counts them, or the rows of those that are tensors.

    Args:
        things: what is gone through.
        total: how many things or rows there are.
        words: what is being done.
        shown: None shows the bar on a terminal alone.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield from things
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=total)
        for thing in things:
            yield thing
            bar.advance(task, len(thing) if isinstance(thing, Tensor) else 1)
