"""Metadata: the list of words and phrases that a pool is searched for, and what becomes part of it.

`clipworks.data.dumps` counts words, bigrams and titles in local dumps; `Metadata.build` makes the list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import regex

from clipworks.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Which candidates become metadata.

    Attributes:
        word_count, pmi, title_views: the least that a word, a bigram, a title must have.
        words, bigrams, titles: at most so many of each, the highest ones; None is all.
        word_share, title_share: at most this share of the candidates, the highest ones.
        longest: characters of an entry at most; None is any.
        unwanted: an entry that this pattern fits as a whole is dropped.
    """

    word_count: int = 1
    pmi: float | None = None
    title_views: int = 1
    words: int | None = None
    bigrams: int | None = None
    titles: int | None = None
    word_share: float = 1.0
    title_share: float = 1.0
    longest: int | None = None
    unwanted: str = r"[!-/:-@\[-`{-~]?"


ENGLISH = Limits(word_count=100, pmi=30.0, title_views=70)
"""The paper's thresholds, for the whole English Wikipedia. A pair that only occurs together reaches at most
log2(N / c): on less than 10^9 running words no bigram has a PMI of 30; then give `bigrams` a number instead.
"""

WORLDWIDE = Limits(
    pmi=30.0,
    words=251_465,
    bigrams=100_646,
    titles=61_235,
    word_share=0.10,
    title_share=0.76,
    longest=256,
    unwanted=r"\p{P}*",
)
"""The caps of the form for many languages, for each language's Wikipedia."""


class Metadata:
    """The list of entries; an entry's place in it is its id.

    Raises:
        ConfigError: if there is no entry, or one is empty, no text, or there twice.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(entries)
        if not self.entries:
            raise ConfigError("metadata without entries match nothing")
        wrong = next((entry for entry in self.entries if not isinstance(entry, str) or not entry), None)
        if wrong is not None or len(set(self.entries)) < len(self.entries):
            seen: set[Any] = set()
            twice = next((e for e in self.entries if e in seen or seen.add(e)), wrong)  # type: ignore[func-returns-value]
            raise ConfigError(f"metadata have an entry {twice!r} that is empty, no text, or there twice")

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def identity(self) -> str:
        """How many entries, and a hash of them all in their order."""
        digest = hashlib.sha256("\0".join(self.entries).encode("utf-8", "surrogatepass")).hexdigest()
        return f"{len(self)} entries, {digest[:16]}"

    @classmethod
    def build(
        cls,
        words: Mapping[str, int],
        bigrams: Mapping[str, float],
        titles: Mapping[str, int],
        wordnet: Iterable[str] = (),
        limits: Limits = ENGLISH,
    ) -> Metadata:
        """The union of "0" to "99", WordNet's names, words, bigrams and titles, in that order.

        Args:
            words: counts in Wikipedia's text.
            bigrams: PMI in it; see `clipworks.data.dumps`.
            titles: page views.
            wordnet: names of synsets.
            limits: what is taken of them.
        """
        parts = (
            map(str, range(100)),
            wordnet,
            _highest(words, limits.word_count, limits.words, limits.word_share),
            _highest(bigrams, limits.pmi, limits.bigrams),
            _highest(titles, limits.title_views, limits.titles, limits.title_share),
        )
        unwanted = regex.compile(limits.unwanted)
        longest = limits.longest or float("inf")
        entries = dict.fromkeys(chain.from_iterable(parts))
        return cls(entry for entry in entries if len(entry) <= longest and not unwanted.fullmatch(entry))

    @classmethod
    def load(cls, path: str | Path) -> Metadata:
        """A JSON list of strings, or any other text file with an entry a line.

        Raises:
            ConfigError: if the file is neither, or its entries are not metadata.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            entries = json.loads(text) if path.suffix == ".json" else [e for e in text.split("\n") if e]
            if not isinstance(entries, list):
                raise ValueError(f"a {type(entries).__name__} and not a list")
            return cls(entries)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"{path}: cannot be read as metadata: {reason}") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON list."""
        Path(path).write_text(json.dumps(self.entries, ensure_ascii=False, indent=0), encoding="utf-8")


def _highest(
    scores: Mapping[str, float], least: float | None, most: int | None, share: float = 1.0
) -> list[str]:
    """Candidates of at least that score, the highest first, equal ones in alphabetical order."""
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    ranked = ranked[: min(int(share * len(ranked)), len(ranked) if most is None else most)]
    return [name for name, score in ranked if least is None or score >= least]
