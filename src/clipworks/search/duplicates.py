"""Near duplicates: items whose vectors have a cosine above a threshold, in groups.

Two items belong to one group if a chain of such pairs joins them; copies of a file are found as well. Every
row is compared with every other, a block with a block, so that memory stays bounded and nothing is missed,
and the time grows with the square of the rows. Of a million, the nearest few in a held graph are compared
instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from clipworks.errors import ConfigError
from clipworks.search.held import Held
from clipworks.search.neighbors import matrix
from clipworks.search.table import Table

_BLOCK = 8192
_NEAREST = 24


def near_duplicates(
    table: Table,
    threshold: float,
    where: str | None = None,
    held: Held | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> list[list[str]]:
    """Paths of each group of two or more, the largest group first; paths in the order of the alphabet.

    Args:
        table: what is compared.
        threshold: the least cosine, in (0, 1].
        where: a condition on the columns; only rows that meet it are compared.
        held: the same pictures in memory; each is then compared with the few nearest in the graph, texts are
            left out, and `where` only says which pictures look for others.
        progress: is told how many rows are done, of how many.

    Raises:
        ConfigError: for another threshold, or a condition that cannot be applied.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"the threshold is a cosine above 0 and at most 1, not {threshold}")
    groups = _Groups()
    done, total = 0, len(table)
    for block in table.batches(("path", "vector"), where, _BLOCK):
        paths, vectors = block.column("path").to_pylist(), matrix(block)
        pairs = _compare(table, vectors, threshold, where) if held is None else held.near(vectors, _NEAREST)
        for row, other, cosine in pairs:
            if cosine >= threshold - 1e-6:
                groups.join(paths[row], other)
        done += len(paths)
        progress(done, total)
    return groups.listed()


def _compare(
    table: Table, vectors: np.ndarray, threshold: float, where: str | None
) -> Iterator[tuple[int, str, float]]:
    for block in table.batches(("path", "vector"), where, _BLOCK):
        paths = block.column("path").to_pylist()
        cosines = vectors @ matrix(block).T
        for row, column in zip(*np.nonzero(cosines >= threshold - 1e-6), strict=True):
            yield int(row), paths[column], float(cosines[row, column])


class _Groups:
    """Sets of paths that grow together; a path that was joined with none but itself is in no group."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def join(self, one: str, other: str) -> None:
        if one != other:
            low, high = sorted((self._root(one), self._root(other)))
            self._parents[high] = low

    def listed(self) -> list[list[str]]:
        groups: dict[str, list[str]] = {}
        for path in sorted(self._parents):
            groups.setdefault(self._root(path), []).append(path)
        return sorted(groups.values(), key=lambda group: (-len(group), group))

    def _root(self, path: str) -> str:
        self._parents.setdefault(path, path)
        while (above := self._parents[path]) != path:
            self._parents[path] = self._parents[above]
            path = above
        return path
