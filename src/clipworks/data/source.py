"""What an example is before it becomes part of a batch, and what a collection of examples must offer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from clipworks.errors import DataError

if TYPE_CHECKING:
    from clipworks.data.backgrounds import Background

TextChoices = str | Sequence[str]
"""A text, or several of which one is drawn; a sequence with a method `draw` weighs them itself."""


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with what is known about it.

    `image` is whatever `clipworks.core.images.Preprocessing` takes: encoded bytes, a path, an array, a
    Pillow picture; None for an example without picture. `texts` maps a source (`alt`, `synthetic`,
    `short`, `region`, `rewrite`, or a language code) to a text or to several. `label` is an index into
    the names of the source's classes. `background`, where given, fills the transparent parts.
    """

    key: str
    image: Any = None
    texts: Mapping[str, TextChoices] = field(default_factory=dict)
    label: int | None = None
    background: Background | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """Examples that can be asked for in any order.

    Random access is what exact resuming and batches without repeated classes need; what can only be
    read from front to back is a `clipworks.data.streams.Stream`. `__getitem__` must be safe to call from
    several threads and raises `DataError` or `PictureError` for an example that cannot be read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The label of every example, (n,) int64, without reading a picture; None where there are none."""
        ...


class Skipped:
    """What could not be used, counted by reason, with the first places where it happened.

    Counts are of distinct places: a damaged picture that is met again in the next epoch counts once.
    """

    def __init__(self, examples: int = 5) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}
        self._examples = examples
        self._seen: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def add(self, reason: str, place: str, detail: str = "") -> None:
        """Count one place, once for each reason."""
        with self._lock:
            if (reason, place) in self._seen:
                return
            self._seen.add((reason, place))
            self.counts[reason] = self.counts.get(reason, 0) + 1
            first = self.first.setdefault(reason, [])
            if len(first) < self._examples:
                first.append(f"{place}: {detail}" if detail else place)

    def update(self, other: Skipped) -> Skipped:
        """Take over what another report has counted; returns self."""
        with other._lock:
            seen, first = sorted(other._seen), {reason: list(lines) for reason, lines in other.first.items()}
        for reason, place in seen:
            line = next((line for line in first[reason] if line.startswith(f"{place}: ")), "")
            self.add(reason, place, line[len(place) + 2 :])
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """How many places were skipped, over all reasons."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        if not self.counts:
            return "nothing skipped"
        reasons = (f"{count} {reason} ({self.first[reason][0]})" for reason, count in self.counts.items())
        return f"skipped {self.total}: " + "; ".join(reasons)

    def __repr__(self) -> str:
        return f"Skipped({self.counts})"


def label_array(labels: Iterable[int | None]) -> NDArray[np.int64] | None:
    """Labels as an array (n,) int64, or None when any is missing."""
    known = list(labels)
    return None if None in known else np.array(known, dtype=np.int64)


class Examples:
    """A list of examples in memory as a source."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = list(examples)
        self.labels = label_array(example.label for example in self._examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Example:
        return self._examples[index]


class Selected:
    """Some examples of a source, in the order of `indices` (n,); labels may be given anew.

    Raises:
        DataError: if an index is outside of the source, or there is not one label for each index.
    """

    def __init__(self, source: Source, indices: Iterable[int], labels: Iterable[int] | None = None) -> None:
        self.source = source
        self.indices = np.fromiter(indices, dtype=np.int64)
        outside = (self.indices < 0) | (self.indices >= len(source))
        if outside.any():
            raise DataError(f"index {self.indices[outside][0]} is outside of {len(source)} examples")
        self._relabeled = labels is not None
        if labels is not None:
            self.labels: NDArray[np.int64] | None = np.fromiter(labels, dtype=np.int64)
            if len(self.labels) != len(self.indices):
                raise DataError(f"{len(self.labels)} labels were given for {len(self.indices)} examples")
        else:
            every = source.labels
            self.labels = None if every is None else every[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example:
        example = self.source[int(self.indices[index])]
        if self._relabeled and self.labels is not None:
            return replace(example, label=int(self.labels[index]))
        return example


class ClassCaptioned:
    """A labeled source whose examples get their class's captions as one more text.

    Args:
        source: examples with labels.
        captions: one entry a class, in the order of the labels: a text, several, or `CaptionGrid`s.
        name: the source of texts that they become.

    Raises:
        DataError: if the source has no labels or a label has no captions.
    """

    def __init__(self, source: Source, captions: Sequence[TextChoices], *, name: str = "alt") -> None:
        labels = source.labels
        if labels is None:
            raise DataError("captions by class need a source in which every example has a label")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(captions):
            raise DataError(
                f"labels are {labels.min()} to {labels.max()}, captions are there for {len(captions)} classes"
            )
        self.source = source
        self.captions = list(captions)
        self.labels: NDArray[np.int64] | None = labels
        self._name = name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        example = self.source[index]
        if example.label is None:
            raise DataError(f"{example.key}: has no label and so no captions of a class")
        return replace(example, texts={**example.texts, self._name: self.captions[example.label]})


class Joined:
    """Several sources as one, one after the other; their labels must mean the same classes."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        labels = [source.labels for source in self.sources]
        known = [one for one in labels if one is not None]
        self.labels: NDArray[np.int64] | None = None
        if known and len(known) == len(labels):
            self.labels = np.concatenate(known)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[which][index - int(self._starts[which])]


def iterate(source: Source) -> Iterator[Example]:
    """All examples of a source in their order."""
    for index in range(len(source)):
        yield source[index]
