"""Known: which items a table holds and in which state, in 40 bytes an item.

A build must tell of every file whether it is in the table as it is. The paths of ten million files would
fill the memory; 63 bits of a hash of each do not. Among ten million paths some two share theirs with a
probability of about 5e-6, and even then one of them would have to have the other's size and time of change
to be missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from clipworks.search.table import Table

_MERGE = 65_536  # items remembered one by one before they are sorted in


class State(NamedTuple):
    """By what an item is told to be as it was, each 63 bits.

    Attributes:
        digest: of its content.
        stamp: of the size and time of change of its file.
        detail: of whatever else the index keeps of it; 0 for nothing.
    """

    digest: int
    stamp: int
    detail: int


def mark(*values: object) -> int:
    """63 bits that differ where values do."""
    digest = hashlib.blake2b("\0".join(map(str, values)).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def short(digest: str) -> int:
    """The first 63 bits of a content hash in hexadecimal."""
    return int(digest[:16], 16) >> 1


class Known:
    """The states of a table's items by path; what is remembered or forgotten later counts at once."""

    def __init__(self, table: Table) -> None:
        self._recent: dict[int, State | None] = {}  # None: forgotten
        self._recent_digests: set[int] = set()
        pieces = [np.empty((0, 4), dtype=np.int64)]
        for piece in table.scan(("path", "hash", "size", "mtime_ns", "detail")):
            marks = [
                (mark(path), short(digest), mark(size, time), detail)
                for path, digest, size, time, detail in zip(*piece.values(), strict=True)
            ]
            pieces.append(np.array(marks, dtype=np.int64).reshape(-1, 4))
        self._sort(np.concatenate(pieces))

    def __contains__(self, path: str) -> bool:
        return self.state(path) is not None

    def state(self, path: str) -> State | None:
        """What is known of a path; None if it is not in the table."""
        key = mark(path)
        if key in self._recent:
            return self._recent[key]
        place = _find(self._paths, key)
        return None if place is None else State(*map(int, self._states[place]))

    def has_content(self, digest: str) -> bool:
        """Whether some item of this content is in the table; rarely it only seems so."""
        key = short(digest)
        return key in self._recent_digests or _find(self._digests, key) is not None

    def remember(self, path: str, state: State) -> None:
        """An item is in the table, in this state, from now on."""
        self._recent[mark(path)] = state
        self._recent_digests.add(state.digest)
        if len(self._recent) >= _MERGE:
            self._merge()

    def forget(self, paths: Iterable[str]) -> None:
        """These paths are in the table no more."""
        self._recent.update(dict.fromkeys(map(mark, paths)))

    def _merge(self) -> None:
        kept = ~np.isin(self._paths, np.fromiter(self._recent, dtype=np.int64))
        old = np.column_stack([self._paths[kept], self._states[kept]])
        new = [(key, *state) for key, state in self._recent.items() if state is not None]
        self._sort(np.concatenate([old, np.array(new, dtype=np.int64).reshape(-1, 4)]))
        self._recent.clear()
        self._recent_digests.clear()

    def _sort(self, rows: np.ndarray) -> None:
        """Take rows (n, 4) int64: path, then its state."""
        rows = rows[np.argsort(rows[:, 0])]
        self._paths, self._states = np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1:])
        self._digests = np.sort(rows[:, 1])


def _find(numbers: np.ndarray, number: int) -> int | None:
    """Where a number stands in rising numbers (n,); None if it does not."""
    place = int(np.searchsorted(numbers, number))
    return place if place < len(numbers) and int(numbers[place]) == number else None
