"""The contract of the family `curate`: what decides which records of a pool a training gets.

A curator is a stream transformer over records, dicts of fields with a `key`:

- `fit(records)`: everything it must know of the whole pool. A pass over the pool is a map and a reduce:
  `measure(records, stage) -> Tally` looks at any part of it, tallies add up (`Tally.add`, in any order),
  `settle(stage, tally)` takes in the sum. `passes` names them in their order; a curator that decides every
  record by itself has none.
- `transform(records) -> records`: those that are kept, in their order, perhaps with fewer texts, never a
  record twice. It is written as `judge(records, tally)`, which answers for each record either with what is
  kept of it or with the reason why it is dropped; so `tally` always accounts for every record that was read.
- `report(measured, transformed)`: the curator's own part of the data card.

Every curator of the family gives the same records whatever the order and the division of the pool, draws
nothing but from its `seed` and the record, changes no record that it was given, and can be pickled, saved
and loaded between the passes; so the runner may cut a pool into shards, spread them over processes and
machines, and go on after a crash. What it learned is in `learned()`; `identity(stage)` says on which of its
parameters the outcome of a pass depends.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipworks.data.record_files import Record, replacing
from clipworks.data.records import CAPTION_FIELDS, SOURCES
from clipworks.data.source import Skipped
from clipworks.errors import ConfigError, DataError
from clipworks.parts.card import Section

TRANSFORM = "transform"
_FIRST = 5
C = TypeVar("C", bound="Curator")


class Tally:
    """What was counted on a part of a pool; tallies of the parts add up to that of the whole.

    Attributes:
        numbers: whole numbers by name; `records` were read, `kept` of them.
        dropped: records by the reason why they were not kept.
        unreadable: places by what is wrong with them; `places` has the first ones.
        sums: arrays that add up, by name.
        lists: arrays (n, ...) that are put one after the other, by name.
    """

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.unreadable: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self.sums: dict[str, NDArray[Any]] = {}
        self.lists: dict[str, list[NDArray[Any]]] = {}

    def sum_of(self, name: str, size: int) -> NDArray[np.uint64]:
        """The array (size,) uint64 of that name, zeros at first; to be counted into."""
        return self.sums.setdefault(name, np.zeros(size, np.uint64))

    def list_of(self, name: str, dtype: Any) -> NDArray[Any]:
        """What was collected under that name, as one array."""
        return np.concatenate([np.empty(0, dtype), *self.lists.get(name, [])])

    def skip(self, skipped: Skipped) -> None:
        """Take over what a reader could not read."""
        self.unreadable.update(skipped.counts)
        self._add_places(skipped.first)

    def add(self, other: Tally) -> Tally:
        """Take over the counts of another part; returns self."""
        self.numbers.update(other.numbers)
        self.dropped.update(other.dropped)
        self.unreadable.update(other.unreadable)
        self._add_places(other.places)
        for name, array in other.sums.items():
            self.sums[name] = self.sums[name] + array if name in self.sums else array.copy()
        for name, arrays in other.lists.items():
            self.lists.setdefault(name, []).extend(arrays)
        return self

    def _add_places(self, places: Mapping[str, list[str]]) -> None:
        for reason, lines in places.items():
            first = self.places.setdefault(reason, [])
            first += lines[: max(0, _FIRST - len(first))]

    def summary(self) -> dict[str, Any]:
        """Numbers and reasons, ready for JSON."""
        return {
            **dict(sorted(self.numbers.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "unreadable": dict(sorted(self.unreadable.items())),
            "places": dict(sorted(self.places.items())),
        }

    def save(self, path: Path) -> None:
        """Write a file `.npz`, complete or not there at all; arrays of mostly zeros are stored sparse."""
        arrays: dict[str, NDArray[Any]] = {}
        counts = {name: getattr(self, name) for name in ("numbers", "dropped", "unreadable", "places")}
        arrays["counts"] = np.frombuffer(json.dumps(counts).encode(), np.uint8)
        for name, array in self.sums.items():
            where = np.flatnonzero(array)
            if 3 * len(where) < len(array):
                arrays |= {
                    f"sparse/{name}": array[where],
                    f"where/{name}": where,
                    f"size/{name}": np.array(len(array)),
                }
            else:
                arrays[f"sum/{name}"] = array
        arrays |= {f"list/{name}": np.concatenate(parts) for name, parts in self.lists.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Tally:
        """Read what `save` wrote."""
        tally = cls()
        with np.load(path, allow_pickle=False) as stored:
            counts = json.loads(stored["counts"].tobytes())
            for name in ("numbers", "dropped", "unreadable"):
                getattr(tally, name).update(counts[name])
            tally.places = counts["places"]
            for entry in stored.files:
                kind, _, name = entry.partition("/")
                if kind == "sum":
                    tally.sums[name] = stored[entry]
                elif kind == "sparse":
                    values = stored[entry]
                    full = np.zeros(int(stored[f"size/{name}"]), values.dtype)
                    full[stored[f"where/{name}"]] = values
                    tally.sums[name] = full
                elif kind == "list":
                    tally.lists[name] = [stored[entry]]
        return tally


class Curator:
    """Decides which records of a pool are kept; the module's docstring is the contract.

    Attributes:
        tally: what the last `transform` counted; complete when all its records have been taken.
    """

    chunk: ClassVar[int] = 1024
    tally: Tally

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes over the pool that come before `transform`."""
        return ()

    @property
    def reads(self) -> tuple[str, ...] | None:
        """The fields that the passes look at; None is all of them."""
        return None

    def measure(self, records: Iterable[Record], stage: str) -> Tally:
        """What a pass sees in a part of the pool.

        Raises:
            ConfigError: if the curator has no such pass.
        """
        raise ConfigError(f"{type(self).__name__} has no pass {stage!r}")

    def settle(self, stage: str, tally: Tally) -> None:
        """Take in what a pass saw in the whole pool."""

    def judge(self, records: Sequence[Record], tally: Tally) -> list[Record | str]:
        """For each record what is kept of it, or the reason why it is dropped; counts further in `tally`."""
        raise NotImplementedError

    def fit(self: C, records: Iterable[Record]) -> C:
        """Learn from a pool at once; an iterator is held in memory if there are several passes."""
        if len(self.passes) > 1 and isinstance(records, Iterator):
            records = list(records)
        for stage in self.passes:
            self.settle(stage, self.measure(records, stage))
        return self

    def transform(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records that are kept, as they come; `tally` counts them.

        Raises:
            DataError: if a record has no key.
        """
        tally = self.tally = Tally()
        for chunk in chunks(records, self.chunk):
            verdicts = self.judge(chunk, tally)
            tally.numbers["records"] += len(chunk)
            for verdict in verdicts:
                if isinstance(verdict, str):
                    tally.dropped[verdict] += 1
                else:
                    tally.numbers["kept"] += 1
                    yield verdict

    def report(self, measured: Mapping[str, Tally], transformed: Tally) -> list[Section]:
        """Tables and plots of the data card, from the tallies of the passes and of `transform`."""
        return []

    def learned(self) -> dict[str, NDArray[Any]]:
        """What was learned in the passes, as arrays; empty before them."""
        return {}

    def learn(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `learned` gave."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {name: getattr(self, name) for name in _parameters(type(self))}

    def set_params(self: C, **changes: Any) -> C:
        """Construct it again with other arguments; what was learned is forgotten.

        Raises:
            ConfigError: for an argument that there is not.
        """
        unknown = changes.keys() - set(_parameters(type(self)))
        if unknown:
            raise ConfigError(f"{type(self).__name__} has no parameter {min(unknown)!r}")
        arguments = self.get_params() | changes
        self.__dict__.clear()
        self.__init__(**arguments)  # type: ignore[misc]
        return self

    def identity(self, stage: str = TRANSFORM) -> dict[str, Any]:
        """The parameters on which the outcome of a pass depends, ready for JSON."""
        return {name: plain(value) for name, value in self.get_params().items()}

    def save(self, folder: str | Path) -> None:
        """Write what was learned, and the parameters that it was learned with, into a folder."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        note = {"curator": type(self).__name__, "identity": json.dumps(self.identity(), sort_keys=True)}
        with replacing(folder / "learned.safetensors") as temporary:
            save_file(self.learned(), temporary, metadata=note)

    def load(self: C, folder: str | Path) -> C:
        """Take over what `save` wrote; returns self.

        Raises:
            DataError: if there is nothing, or it was learned with other parameters.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / "learned.safetensors"
        try:
            with safe_open(path, "numpy") as stored:
                note = stored.metadata() or {}
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: nothing that a curator learned ({error})") from error
        if note.get("identity") != json.dumps(self.identity(), sort_keys=True):
            raise DataError(f"{path}: was learned with other parameters: {note.get('identity')}")
        self.learn(arrays)
        return self


def chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Records in lists of up to `size`.

    Raises:
        DataError: if one has no key.
    """
    chunk: list[Record] = []
    for record in records:
        if record.get("key") is None:
            raise DataError(f"a record has no key; its fields are {', '.join(record) or 'none'}")
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def texts_in(record: Record, fields: Sequence[str] | None = None) -> list[str] | None:
    """The texts of a record, equal ones once, in the order of its fields; None if a field holds no text.

    Args:
        record: a text is a string or a list of strings; one of white space alone does not count.
        fields: those with texts; None takes all of `SOURCES` and `CAPTION_FIELDS` that it has.
    """
    found: dict[str, None] = {}
    for field in TEXT_FIELDS if fields is None else fields:
        value = record.get(field)
        if value is None:
            continue
        for text in (
            [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [None]
        ):
            if not isinstance(text, str):
                return None
            if text and not text.isspace():
                found[text] = None
    return list(found)


def with_texts(record: Record, kept: Iterable[str], fields: Sequence[str] | None = None) -> Record:
    """The same record with only some of its texts; a field without any is gone."""
    kept = set(kept)
    changed = dict(record)
    for field in TEXT_FIELDS if fields is None else fields:
        value = record.get(field)
        if isinstance(value, str) and value not in kept:
            del changed[field]
        elif isinstance(value, (list, tuple)):
            changed[field] = [text for text in value if text in kept]
            if not changed[field]:
                del changed[field]
    return changed


TEXT_FIELDS = (*SOURCES, *CAPTION_FIELDS)


def plain(value: Any) -> Any:
    """A parameter as JSON has it; an object that knows its own says it as `identity`."""
    if hasattr(value, "identity"):
        return value.identity() if callable(value.identity) else value.identity
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def _parameters(curator: type) -> list[str]:
    names = list(inspect.signature(curator).parameters)
    return [name for name in names if name != "self"]
