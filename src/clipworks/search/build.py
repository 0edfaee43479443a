"""Build: bringing the table up to date with files, with as little work as can be.

A file whose size and time of change are known is not read; one that is read is told by the sha256 of its
bytes, so that a copy, a renamed or a merely touched file is not encoded again. Work is committed every
`COMMIT` pictures: a build that is killed loses at most those, and the next one goes on.

What a build keeps in memory is a few hundred bytes for each row of the table, and one commit's vectors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from clipworks.encode.bulk import Encoded
from clipworks.errors import PictureError
from clipworks.search.files import Facts, is_gone, read_facts, stamp
from clipworks.search.table import Table

COMMIT = 256
_COMMITS_BEFORE_COMPACTION = 256


@dataclass
class Report:
    """What a build did, in pictures.

    Attributes:
        embedded: went through the model, because they were new or had changed.
        reused: new or touched files whose content the index already had.
        unchanged: were in the index as they are.
        removed: left the index, because their file is gone or can no longer be read.
        skipped: (path, reason) of each file that could not be read.
        seconds: how long it took.
    """

    embedded: int = 0
    reused: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seen(self) -> int:
        """How many files were looked at."""
        return self.embedded + self.reused + self.unchanged + len(self.skipped)

    def add(self, other: Report) -> None:
        """Count another build in."""
        self.embedded += other.embedded
        self.reused += other.reused
        self.unchanged += other.unchanged
        self.removed += other.removed
        self.skipped += other.skipped
        self.seconds += other.seconds


class _Row(NamedTuple):
    """By what a row tells that its file is as it was."""

    size: int
    mtime_ns: int
    digest: str


class Build:
    """One build of a table, which no other process may build meanwhile.

    Args:
        table: what is brought up to date.
        model: the model's name, which rows carry.
        encode: paths of pictures to vectors, skipping those that cannot be read.
        verify: read every file, also those whose size and time of change are as they were.
    """

    def __init__(
        self, table: Table, model: str, encode: Callable[[list[str]], Encoded], *, verify: bool = False
    ) -> None:
        self.report = Report()
        self._table, self._model, self._encode, self._verify = table, model, encode, verify
        self._rows: dict[str, _Row] = {}
        # Every digest the table has, or had: new content costs no look into it.
        self._digests: set[str] = set()
        for piece in table.scan(("path", "size", "mtime_ns", "hash")):
            for path, *row in zip(*piece.values(), strict=True):
                self._remember(path, _Row(*row))

    def update(self, paths: Sequence[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Take files in, each of `paths` once; `progress` is told after each commit what is done of all."""
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as readers:
            for commit, first in enumerate(range(0, len(paths), COMMIT), 1):
                chunk = paths[first : first + COMMIT]
                self._commit(chunk, list(readers.map(self._look, chunk)))
                if commit % _COMMITS_BEFORE_COMPACTION == 0:
                    self._table.compact()
                if progress is not None:
                    progress(first + len(chunk), len(paths))

    def forget(self, below: str) -> None:
        """Remove the rows of files below a folder (its path ends in a slash) that are gone."""
        self._remove([path for path in self._rows if path.startswith(below) and is_gone(path)])

    def finish(self) -> None:
        """Leave the table in few pieces."""
        if self.report.embedded or self.report.reused or self.report.removed:
            self._table.compact()

    def _look(self, path: str) -> Facts | PictureError | None:
        """What there is to know of a file; None if the table has it as it is."""
        row = self._rows.get(path)
        try:
            if row is not None and not self._verify and stamp(path) == (row.size, row.mtime_ns):
                return None
            facts = read_facts(path)
        except PictureError as error:
            return error
        return None if row == _row(facts) else facts

    def _commit(self, paths: Sequence[str], looks: Sequence[Facts | PictureError | None]) -> None:
        changed = [look for look in looks if isinstance(look, Facts)]
        failed = {
            p: str(look) for p, look in zip(paths, looks, strict=True) if isinstance(look, PictureError)
        }
        self.report.unchanged += sum(look is None for look in looks)

        # Each content once: the first file that has it stands for all.
        first = {facts.digest: facts.path for facts in reversed(changed)}
        vectors = self._table.vectors([digest for digest in first if digest in self._digests])
        fresh = {path: digest for digest, path in first.items() if digest not in vectors}
        unreadable: dict[str, str] = {}
        if fresh:
            digests = list(fresh.values())
            encoded = self._encode(list(fresh))
            features = encoded.features.float().cpu().numpy()
            vectors |= {digests[i]: vector for i, vector in zip(encoded.kept, features, strict=True)}
            unreadable = {digests[i]: reason for i, reason in encoded.errors}

        for facts in changed:
            if facts.digest in unreadable:
                # The reason names the file that stood for this content.
                failed[facts.path] = unreadable[facts.digest].replace(first[facts.digest], facts.path, 1)
        rows = [facts for facts in changed if facts.digest not in unreadable]
        self._write(rows, vectors)
        embedded = sum(facts.path in fresh for facts in rows)
        self.report.embedded += embedded
        self.report.reused += len(rows) - embedded

        # A row of a file that can no longer be read is no longer true; a file out of reach keeps its row.
        self._remove([p for p in failed if p in self._rows and (is_gone(p) or os.access(p, os.R_OK))])
        self.report.skipped += failed.items()

    def _write(self, rows: Sequence[Facts], vectors: dict[str, np.ndarray]) -> None:
        if not rows:
            return
        # Only where a path is there already must it be looked for among all the others.
        write = self._table.upsert if any(facts.path in self._rows for facts in rows) else self._table.append
        write([self._columns(facts) for facts in rows], np.stack([vectors[facts.digest] for facts in rows]))
        for facts in rows:
            self._remember(facts.path, _row(facts))

    def _remove(self, paths: Sequence[str]) -> None:
        self._table.delete(paths)
        for path in paths:
            del self._rows[path]
        self.report.removed += len(paths)

    def _remember(self, path: str, row: _Row) -> None:
        self._rows[path] = row
        self._digests.add(row.digest)

    def _columns(self, facts: Facts) -> dict[str, Any]:
        return {
            "path": facts.path,
            "hash": facts.digest,
            "mtime_ns": facts.mtime_ns,
            "size": facts.size,
            "width": facts.width,
            "height": facts.height,
            "caption": facts.caption,
            "model": self._model,
        }


def _row(facts: Facts) -> _Row:
    return _Row(facts.size, facts.mtime_ns, facts.digest)
