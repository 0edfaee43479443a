"""Build: bringing the table up to date with items, with as little work as can be.

What has not changed since is not read; what is read is told by the sha256 of its content, so that a copy, a
renamed or a merely touched file is not encoded again. Work is committed every `COMMIT` items: a build that is
killed loses at most those, and the next one goes on.

What a build keeps in memory is some 40 bytes for each row of the table, and one commit's vectors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from clipworks.encode.bulk import Encoded
from clipworks.errors import DataError, PictureError
from clipworks.search.files import Content, Facts, Kind, is_gone
from clipworks.search.items import Inputs, Item, owner
from clipworks.search.known import Known, State, mark, short
from clipworks.search.table import FIELDS, Table, among, quoted

COMMIT = 256
_COMMITS_BEFORE_COMPACTION = 256

Encode = Callable[[Kind, list[Content]], Encoded]
Look = list[Facts] | PictureError | DataError | None


@dataclass
class Report:
    """What a build did, in items.

    Attributes:
        embedded: went through the model, because they were new or had changed.
        reused: new or touched items whose content the index already had.
        unchanged: were in the index as they are.
        removed: left the index, because what they came from is gone or can no longer be read.
        skipped: (path, reason) of each item that could not be read.
        emptied: how many values of each field were left out, because they are not of the column's type.
        seconds: how long it took.
    """

    embedded: int = 0
    reused: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    emptied: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def seen(self) -> int:
        """How many items were looked at."""
        return self.embedded + self.reused + self.unchanged + len(self.skipped)

    def add(self, other: Report) -> None:
        """Count another build in."""
        self.embedded += other.embedded
        self.reused += other.reused
        self.unchanged += other.unchanged
        self.removed += other.removed
        self.skipped += other.skipped
        for name, count in other.emptied.items():
            self.emptied[name] = self.emptied.get(name, 0) + count
        self.seconds += other.seconds


class Build:
    """One build of a table, which no other process may build meanwhile.

    Args:
        table: what is brought up to date.
        encode: pictures or texts to vectors, skipping those that cannot be read.
        verify: read every file, also those whose size and time of change are as they were.
    """

    def __init__(self, table: Table, encode: Encode, *, verify: bool = False) -> None:
        self.report = Report()
        self._table, self._encode, self._verify = table, encode, verify
        self._known = Known(table)
        self._seen: set[int] = set()

    def update(self, inputs: Inputs, progress: Callable[[int, int | None], None] | None = None) -> None:
        """Take items in; `progress` is told after each commit how many are done, of how many if that is
        known.

        What came from the same shards and tables and is not among these items leaves the index, unless the
        shard could not be read to its end.
        """
        watched = bool(inputs.files)
        done = 0
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as readers:
            for commit, chunk in enumerate(_chunks(inputs.items, COMMIT), 1):
                chunk = self._unique(chunk) if watched else chunk
                self._commit(chunk, list(readers.map(self._look, chunk)))
                if commit % _COMMITS_BEFORE_COMPACTION == 0:
                    self._table.compact()
                done += len(chunk)
                if progress is not None:
                    progress(done, inputs.total)
        damaged = inputs.damaged()
        self.report.skipped += [(file, reason) for file, reason in damaged.items()]
        for file in inputs.files:
            if file not in damaged or is_gone(file):
                self._drop(file)

    def forget(self, below: str) -> None:
        """Remove the rows of files below a folder (its path ends in a slash) that are gone."""
        prefix = quoted(below)
        where = f"starts_with(path, {prefix}) OR starts_with(file, {prefix})"
        gone: dict[str, bool] = {}  # of shards and tables, which hold many items
        paths = []
        for path, file in self._pairs(where):
            if file is None:
                missing = is_gone(path)
            else:
                missing = gone[file] if file in gone else gone.setdefault(file, is_gone(file))
            if missing:
                paths.append(path)
        self._remove(paths)

    def finish(self) -> bool:
        """Leave the table in few pieces; whether this build changed it."""
        changed = bool(self.report.embedded or self.report.reused or self.report.removed)
        if changed:
            self._table.compact()
        return changed

    def _unique(self, chunk: list[Item]) -> list[Item]:
        """Without the items that were there before, which are reported."""
        kept = []
        for item in chunk:
            key = mark(item.path)
            if key in self._seen:
                self.report.skipped.append((item.path, f"{item.path}: named twice; the first one counts"))
            else:
                self._seen.add(key)
                kept.append(item)
        return kept

    def _look(self, item: Item) -> Look:
        """What comes from an item; None if the table has it as it is."""
        state = self._known.state(item.path)
        try:
            if state is not None and not self._verify and item.unchanged(state):
                return None
            facts = item.read()
        except (PictureError, DataError) as error:
            return error
        return None if state == _state(facts[0]) else facts

    def _commit(self, items: Sequence[Item], looks: Sequence[Look]) -> None:
        changed = [facts for look in looks if isinstance(look, list) for facts in look]
        failed = {
            item.path: str(look)
            for item, look in zip(items, looks, strict=True)
            if isinstance(look, (PictureError, DataError))
        }
        self.report.unchanged += sum(look is None for look in looks)

        # Each content once: the first item that has it stands for all.
        first = {facts.digest: facts for facts in reversed(changed)}
        vectors = self._table.vectors([digest for digest in first if self._known.has_content(digest)])
        fresh = [facts for digest, facts in first.items() if digest not in vectors]
        unreadable: dict[str, str] = {}
        for kind in ("image", "text"):
            chosen = [facts for facts in fresh if facts.kind == kind]
            if not chosen:
                continue
            encoded = self._encode(kind, [facts.content for facts in chosen])  # type: ignore[arg-type]
            features = encoded.features.float().cpu().numpy()
            vectors |= {chosen[i].digest: vector for i, vector in zip(encoded.kept, features, strict=True)}
            unreadable |= {chosen[i].digest: reason for i, reason in encoded.errors}

        for facts in changed:
            if facts.digest in unreadable:
                # The reason names the file that stood for this content, or no file at all.
                stood, reason = first[facts.digest].path, unreadable[facts.digest]
                renamed = reason.replace(stood, facts.path, 1)
                failed[facts.path] = renamed if stood in reason else f"{facts.path}: {reason}"
        rows = [facts for facts in changed if facts.digest not in unreadable]
        self._write(rows, vectors)
        names = {facts.path for facts in fresh}
        embedded = sum(facts.path in names for facts in rows)
        self.report.embedded += embedded
        self.report.reused += len(rows) - embedded

        # A row of a file that can no longer be read is no longer true; a file out of reach keeps its row.
        files = {item.path: item.lies_in for item in items}
        lost = [p for p in failed if p in self._known and (is_gone(files[p]) or os.access(files[p], os.R_OK))]
        self._remove([*lost, *self._texts_of(lost)])
        self.report.skipped += failed.items()

    def _write(self, rows: Sequence[Facts], vectors: dict[str, np.ndarray]) -> None:
        if not rows:
            return
        known = [facts for facts in rows if facts.path in self._known]
        columns = [self._columns(facts) for facts in rows]
        self._table.widen(columns)
        for row in columns:
            self._fit(row)
        # Only where a path is there already must it be looked for among all the others.
        write = self._table.upsert if known else self._table.append
        write(columns, np.stack([vectors[facts.digest] for facts in rows]))
        # A picture that had more captions than it has now leaves some behind.
        changed = [facts.path for facts in known if facts.file is not None and facts.kind == "image"]
        written = {facts.path for facts in rows}
        self._remove([path for path in self._texts_of(changed) if path not in written])
        for facts in rows:
            self._known.remember(facts.path, _state(facts))

    def _texts_of(self, pictures: Sequence[str]) -> list[str]:
        """The names of the texts that came with pictures."""
        if not pictures or not self._table.has_texts:
            return []
        owners = set(pictures)
        where = " OR ".join(f"starts_with(path, {quoted(f'{path}#')})" for path in pictures)
        return [path for path, _ in self._pairs(where) if path not in owners and owner(path) in owners]

    def _drop(self, file: str) -> None:
        """Remove what came from a shard or table and is not there any more."""
        where = among("file", [file])
        self._remove([path for path, _ in self._pairs(where) if mark(owner(path)) not in self._seen])

    def _pairs(self, where: str) -> Iterator[tuple[str, str | None]]:
        for piece in self._table.scan(("path", "file"), where):
            yield from zip(piece["path"], piece["file"], strict=True)

    def _remove(self, paths: Sequence[str]) -> None:
        self._table.delete(paths)
        self._known.forget(paths)
        self.report.removed += len(paths)

    def _columns(self, facts: Facts) -> dict[str, Any]:
        about = self._table.about
        return {name: value for name, value in facts.fields.items() if name not in FIELDS} | {
            "path": facts.path,
            "kind": facts.kind,
            "file": facts.file,
            "hash": facts.digest,
            "mtime_ns": facts.mtime_ns,
            "size": facts.size,
            "width": facts.width,
            "height": facts.height,
            "caption": facts.caption,
            "model": about["model"],
            "revision": about["fingerprint"][:16],
            "detail": facts.detail,
        }

    def _fit(self, row: dict[str, Any]) -> None:
        """Make a row's fields what their columns hold; what cannot be is left empty and counted."""
        for name, kind in self._table.fields.items():
            value = row.get(name)
            if value is None or isinstance(value, {"bool": bool, "double": float}.get(kind, str)):
                continue
            if kind == "string":
                row[name] = f"{value:.17g}" if isinstance(value, float) else str(value).lower()
            else:
                row[name] = None
                self.report.emptied[name] = self.report.emptied.get(name, 0) + 1


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _state(facts: Facts) -> State:
    return State(short(facts.digest), mark(facts.size, facts.mtime_ns), facts.detail)
