"""Rewrites joined to the captions and pictures that they belong to, ready for training to draw from.

Fan et al., Improving CLIP Training with Language Rewrites, NeurIPS 2023; `rewrite` makes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipworks.data.source import Example, Source
from clipworks.errors import DataError


@dataclass(frozen=True)
class Lines:
    """Rewrites that were joined to captions by the number of their line.

    Attributes:
        rewrites: by key.
        overlap: for each file, the mean share of a caption's words that come back in its rewrite.
        neighbors: the same with the rewrite one line further down. Where this is not clearly smaller, the
            file does not belong to these captions, or is shifted.
    """

    rewrites: dict[str, list[str]]
    overlap: dict[str, float]
    neighbors: dict[str, float]


def read_lines(captions: Mapping[str, str], paths: Sequence[str | Path]) -> Lines:
    """Rewrites of the form in which the authors gave theirs out: one text file a pool, one line a caption.

    Lines end at line feeds alone; other signs that break lines are part of the text.

    Args:
        captions: by key, in the order of the lines.
        paths: one file a pool.

    Raises:
        DataError: if a file has not exactly one line a caption.
    """
    keys, originals = list(captions), list(captions.values())
    columns: list[list[str]] = []
    close: dict[str, float] = {}
    beside: dict[str, float] = {}
    for path in map(Path, paths):
        try:
            lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        if len(lines) != len(originals):
            raise DataError(
                f"{path}: {len(lines)} lines for {len(originals)} captions; each caption needs its line"
            )
        columns.append([line.strip() for line in lines])
        close[str(path)] = float(np.mean([overlap(a, b) for a, b in zip(originals, lines, strict=True)]))
        shifted = zip(originals, lines[1:] + lines[:1], strict=True)
        beside[str(path)] = float(np.mean([overlap(a, b) for a, b in shifted]))
    return Lines(dict(zip(keys, map(list, zip(*columns)), strict=True)), close, beside)


def overlap(caption: str, text: str) -> float:
    """Share, in [0, 1], of the caption's different words that are in the text too."""
    own, other = (set(re.findall(r"\w+", each.casefold())) for each in (caption, text))
    return len(own & other) / len(own) if own else 0.0


def is_stump(text: str) -> bool:
    """Whether a text has fewer than two pieces when it is split at single blanks."""
    return len(text.split(" ")) < 2


def choices(caption: str, rewrites: Sequence[str]) -> list[str]:
    """The M + 1 texts of a picture, of which training draws evenly: the caption, then its rewrites.

    In the place of a stump the caption stands again, so it is drawn with (1 + stumps) / (M + 1).
    """
    return [caption, *(caption if is_stump(text) else text for text in rewrites)]


class Rewritten:
    """A source whose examples have, besides their own texts, the list of a caption and its rewrites.

    Args:
        source: examples with a caption each.
        rewrites: by key; None takes those that an example has under the name given.
        caption: the source of texts that was rewritten.
        name: the source of texts under which all M + 1 of them will stand.

    Examples without rewrites, or without exactly one caption, raise a `DataError` when they are read, which
    a loader counts.
    """

    def __init__(
        self,
        source: Source,
        rewrites: Mapping[str, Sequence[str]] | None = None,
        *,
        caption: str = "alt",
        name: str = "rewrite",
    ) -> None:
        self.source, self.rewrites = source, rewrites
        self.caption, self.name = caption, name

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Those of the source, (n,) int64."""
        return self.source.labels

    def __getitem__(self, index: int, /) -> Example:
        example = self.source[index]
        caption = example.texts.get(self.caption)
        if not isinstance(caption, str):
            raise DataError(f"{example.key}: has not exactly one text of source {self.caption!r}")
        of = example.texts.get(self.name) if self.rewrites is None else self.rewrites.get(example.key)
        if of is None:
            raise DataError(f"{example.key}: has no rewrites")
        texts = choices(caption, [of] if isinstance(of, str) else of)
        return replace(example, texts={**example.texts, self.name: texts})
