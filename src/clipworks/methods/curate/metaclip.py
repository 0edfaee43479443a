"""MetaCLIP: Demystifying CLIP Data. Xu et al., ICLR 2024; and its form for many languages (NeurIPS 2025).

A list of words and phrases, the metadata, says what to look for. Every caption is matched against it as
plain text, and what matches often is thinned. No model judges a pair.

Matching. The text becomes " text ", each of , . ; : ? ! ` gets a blank on both sides, tab and line ends
become blanks; an entry becomes " entry ". It matches if it is a substring. Case counts, blanks are not
collapsed, an entry counts once a text. Neighboring entries share a blank, so all overlapping occurrences
have to be found, which an Aho-Corasick automaton does in one pass over the text.

Counting. c_e is the number of texts in the pool that match entry e.

Balancing. pi_e = min(1, t / c_e); a text with the matches M is kept with

    P = 1 - prod_{e in M} (1 - pi_e),

one success among independent draws; a text without a match is dropped. *Offline*, each entry of each text
has one draw, and a record is written once, with those of its texts that passed. *Online*, at each visit one
of the record's matched texts is drawn and kept with P, or the record is skipped.

    p = sum_{c_e < t} c_e / sum_e c_e,

the tail's share of matches, carries t over to another pool or language.

Deviations. Draws are a hash of (seed, key, text, entry) in place of a generator's numbers: so a rerun,
another order of shards or more workers give the same set, and a smaller t a subset of it. Matches are found
a second time when texts are drawn, rather than stored: the automaton is faster than a disk. An entry with
punctuation inside ("St. Louis") never matches a text, in which punctuation is spaced, as with the authors;
`Matching(space_entries=True)` mends it. If p asks for t = 0, which would drop everything, t is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import regex
from numpy.typing import NDArray

from clipworks.data.metadata import Metadata
from clipworks.data.randomness import key_numbers, mix, uniform
from clipworks.data.record_files import Record
from clipworks.errors import ConfigError, DataError, require
from clipworks.methods.curate.base import TEXT_FIELDS, TRANSFORM, Curator, Tally, chunks, texts_in, with_texts
from clipworks.parts.card import Plot, Section, Table, cumulative, ranked

_SPACED = ",.;:?!`"
_BLANK = "\t\n\r"
_SAMPLE = 1 << 17  # texts on which `keep` is bisected: its error is below 0.0014
_SAMPLING, _WHICH = 0x5A3B1E, 0x31C4
_HEADS = 50


@dataclass(frozen=True)
class Matching:
    """How entries are spaced; texts are spaced as the module's docstring says.

    Attributes:
        spacing: `english`: a blank on both sides. `worldwide`: none on a side whose outer character is
            punctuation or of a script that is written without blanks.
        kana: count Japanese kana as such a script too; the authors do not.
        space_entries: space the punctuation inside an entry as in a text, so that it can match.
    """

    spacing: Literal["english", "worldwide"] = "english"
    kana: bool = False
    space_entries: bool = False

    def __post_init__(self) -> None:
        if self.spacing not in ("english", "worldwide"):
            raise ConfigError(f"spacing {self.spacing!r} is neither english nor worldwide")

    def identity(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def text(self, text: str) -> str:
        """A text as it is searched."""
        for mark in _SPACED:
            if mark in text:
                text = text.replace(mark, f" {mark} ")
        for mark in _BLANK:
            text = text.replace(mark, " ")
        return f" {text} "

    def entry(self, entry: str) -> str:
        """An entry as it is searched for."""
        if self.space_entries:
            # A mark at the end of an entry stands at the end of a text too: one blank, not two.
            entry = self.text(entry)[1:-1]
            entry = entry.removeprefix(" ").removesuffix(" ") or entry
        if self.spacing == "english":
            return f" {entry} "
        kana = "\u3040-\u30ff" if self.kana else ""
        scripts = r"\p{Han}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\p{Tibetan}\p{P}"
        unspaced = regex.compile(f"[{scripts}{kana}]")
        first, last = (unspaced.match(side) is not None for side in (entry[0], entry[-1]))
        return f"{'' if first else ' '}{entry}{'' if last else ' '}"


class Matcher:
    """Finds the entries that are in a text.

    Raises:
        MissingExtra: without pyahocorasick.
    """

    def __init__(self, metadata: Metadata, matching: Matching = Matching()) -> None:
        library = require("ahocorasick", extra="curate", purpose="matching texts with metadata")
        self.metadata, self.matching = metadata, matching
        automaton = library.Automaton(library.STORE_INTS)
        self._twins: dict[int, list[int]] = {}  # entries that differ only in their spacing
        for number, entry in enumerate(metadata.entries):
            spaced = matching.entry(entry)
            first = automaton.get(spaced, None)
            if first is None:
                automaton.add_word(spaced, number)
            else:
                self._twins.setdefault(first, [first]).append(number)
        automaton.make_automaton()
        self._iterate = automaton.iter

    def ids(self, text: str) -> list[int]:
        """The ids of the entries in a text, rising."""
        found = {number for _, number in self._iterate(self.matching.text(text))}
        if self._twins:
            found |= {twin for number in found & self._twins.keys() for twin in self._twins[number]}
        return sorted(found)


def t_to_p(counts: NDArray[Any], t: float) -> float:
    """The tail's share of all matches, of counts (n,), in [0, 1].

    Raises:
        DataError: if nothing matched.
    """
    total = int(counts.sum())
    if not total:
        raise DataError("no text of the pool matches an entry of the metadata")
    return int(counts[counts < t].sum()) / total


def p_to_t(counts: NDArray[Any], p: float) -> int:
    """The count at which the tail's share comes nearest to p, at least 1; counts (n,).

    Raises:
        DataError: if nothing matched.
    """
    rising = np.sort(counts).astype(np.float64)
    shares = np.cumsum(rising)
    if not len(shares) or not shares[-1]:
        raise DataError("no text of the pool matches an entry of the metadata")
    return max(1, int(rising[np.argmin(np.abs(shares - p * shares[-1]))]))


class MetaCLIP(Curator):
    """Balances a pool over the entries of the metadata.

    Args:
        metadata: the list; or one for each language code, of which `other` is for languages without.
        t: of an entry with more matches than this, about so many texts are kept.
        p: t is where the tail has this share of all matches; 0.056 in the paper's English pool.
        keep: t is where this share of the pool's texts is expected to be kept.
        form: `offline` or `online`; of the latter `transform` writes the first visit.
        seed: other seed, other draws.
        matching: how entries are spaced.
        texts: fields with texts; None takes the usual ones.
        language: with several lists, what tells a text's code: a field of the record, or a function of the
            text that can be pickled. t and keep then make the t of the list `en`, whose p the others take.

    Attributes:
        counts: texts that match each entry, (n,) uint64, all lists in a row.
        thresholds: t of each list, (lists,) float64.

    Raises:
        ConfigError: if not exactly one of t, p and keep is given, one is out of its range, or lists and
            `language` do not fit together.
    """

    def __init__(
        self,
        metadata: Metadata | Mapping[str, Metadata],
        *,
        t: float | None = None,
        p: float | None = None,
        keep: float | None = None,
        form: Literal["offline", "online"] = "offline",
        seed: int = 0,
        matching: Matching = Matching(),
        texts: Sequence[str] | None = None,
        language: str | Callable[[str], str] | None = None,
    ) -> None:
        if [t, p, keep].count(None) != 2:
            raise ConfigError(f"exactly one of t, p and keep is needed, not t={t}, p={p}, keep={keep}")
        if t is not None and not t >= 1:
            raise ConfigError(f"t={t}: must be at least 1, or nothing is kept")
        for name, share in (("p", p), ("keep", keep)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name}={share} is outside 0..1")
        if form not in ("offline", "online"):
            raise ConfigError(f"form {form!r} is neither offline nor online")
        several = isinstance(metadata, Mapping)
        if several != (language is not None):
            raise ConfigError("several lists need `language`, which tells them apart; one list takes none")
        self.metadata, self.t, self.p, self.keep, self.form, self.seed = metadata, t, p, keep, form, seed
        self.matching, self.texts, self.language = matching, texts, language
        self._lists = dict(metadata) if isinstance(metadata, Mapping) else {"": metadata}
        self._pivot = "en" if several else ""
        if self._pivot not in self._lists:
            raise ConfigError(
                f"one of the lists must be 'en', which t is for; there are {', '.join(self._lists)}"
            )
        self._starts = np.cumsum([0, *map(len, self._lists.values())])
        self._matchers: dict[str, Matcher] = {}
        self._sampled = 1.0
        self.counts: NDArray[np.uint64] | None = None
        self.thresholds: NDArray[np.float64] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_matchers": {}}  # a process builds its own faster than it is sent one

    # ------------------------------------------------------------------------------------ counting

    @property
    def passes(self) -> tuple[str, ...]:
        """Counting; with `keep` also a look at some texts, on which t is bisected."""
        return ("count",) if self.keep is None else ("count", "sample")

    @property
    def reads(self) -> tuple[str, ...]:
        """Texts and, where it is a field, their language."""
        fields = TEXT_FIELDS if self.texts is None else tuple(self.texts)
        return (*fields, self.language) if isinstance(self.language, str) else fields

    def identity(self, stage: str = TRANSFORM) -> dict[str, Any]:
        """All parameters; counts do not depend on those of the draws."""
        everything = super().identity(stage)
        if stage == TRANSFORM:
            return everything
        return {name: everything[name] for name in ("metadata", "matching", "texts", "language")}

    def count(self, records: Iterable[Record]) -> Tally:
        """How many texts of a part of the pool match each entry: its sum `matches`, (n,) uint64."""
        return self.measure(records, "count")

    def measure(self, records: Iterable[Record], stage: str) -> Tally:
        """`count`: c_e in a part of the pool. `sample`: the matches of a random part of its texts."""
        if stage not in self.passes:
            return super().measure(records, stage)
        tally = Tally()
        for chunk in chunks(records, self.chunk):
            found: list[list[int]] = []
            for record in chunk:
                texts = texts_in(record, self.texts) or []
                tally.numbers["texts"] += len(texts)
                if stage == "sample" and self._sampled < 1:
                    draws = uniform(mix(_text_keys([record["key"]] * len(texts), texts), _SAMPLING))
                    texts = [text for text, draw in zip(texts, draws) if draw < self._sampled]
                found += [self._ids(record, text) for text in texts]
            tally.numbers["records"] += len(chunk)
            ids, lengths = _flat(found)
            if stage == "count":
                np.add.at(tally.sum_of("matches", int(self._starts[-1])), ids, np.uint64(1))
                tally.numbers["matches"] += len(ids)
                tally.numbers["matched texts"] += int((lengths > 0).sum())
            else:
                tally.lists.setdefault("ids", []).append(ids)
                tally.lists.setdefault("lengths", []).append(lengths)
        return tally

    def settle(self, stage: str, tally: Tally) -> None:
        """From counts to t; with `keep`, from the sample to t."""
        if stage == "count":
            self.counts = tally.sum_of("matches", int(self._starts[-1]))
            self._sampled = min(1.0, _SAMPLE / max(1, tally.numbers["texts"]))
            if self.t is not None:
                self._set(self._all_thresholds(self.t))
            elif self.p is not None:
                self._set(self._all_thresholds(p_to_t(self._counts_of(self._pivot), self.p)))
        elif stage == "sample":
            self._set(self._bisect(tally.list_of("ids", np.int32), tally.list_of("lengths", np.int32)))

    def _bisect(self, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.float64]:
        """The whole t at which the mean P of sampled texts, which grows with t, comes nearest to `keep`."""

        def kept(t: int) -> float:
            return float(_success(self._pi_of(self._all_thresholds(t)), ids, lengths).mean())

        keep, low, high = self.keep or 0.0, 0, max(1, int(self._counts_of(self._pivot).max()))
        if not len(lengths) or kept(high) < keep:
            share = kept(high) if len(lengths) else 0.0
            raise DataError(
                f"keep={keep}: no t keeps more than {share:.1%} of the texts; the others do not match"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if kept(middle) < keep else (low, middle)
        return self._all_thresholds(low if low and keep - kept(low) < kept(high) - keep else high)

    def _all_thresholds(self, t: float) -> NDArray[np.float64]:
        """t of every list: the pivot's is given, the others take theirs from its p."""
        p = t_to_p(self._counts_of(self._pivot), t) if len(self._lists) > 1 else 0.0
        found = []
        for code in self._lists:
            counts = self._counts_of(code)
            found.append(float(t if code == self._pivot or not counts.any() else p_to_t(counts, p)))
        return np.array(found)

    def _counts_of(self, code: str) -> NDArray[np.uint64]:
        if self.counts is None:
            raise ConfigError("MetaCLIP has not counted yet; call fit(records) first")
        place = list(self._lists).index(code)
        return self.counts[self._starts[place] : self._starts[place + 1]]

    def learned(self) -> dict[str, NDArray[Any]]:
        """`counts` and `thresholds`, once they are there."""
        both = {"counts": self.counts, "thresholds": self.thresholds}
        return {name: array for name, array in both.items() if array is not None}

    def learn(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `learned` gave."""
        self.counts = arrays.get("counts")
        if "thresholds" in arrays:
            self._set(arrays["thresholds"])

    # ----------------------------------------------------------------------------------- balancing

    def probability(self, text: str, language: str = "") -> float:
        """P, the probability that a text is kept; `language` names its list where there are several."""
        ids, lengths = _flat([self._ids_in(text, language or self._pivot)])
        return float(_success(self._pi, ids, lengths)[0])

    def judge(self, records: Sequence[Record], tally: Tally) -> list[Record | str]:
        """Keep a record with those of its texts that were drawn, or say why it is dropped."""
        return self._judge(records, tally, self.form == "online", 0)

    def sample(self, record: Record, visit: int) -> Record | None:
        """The online form: the record with one of its texts, or None where this visit skips it."""
        verdict = self._judge([record], Tally(), True, visit)[0]
        return None if isinstance(verdict, str) else verdict

    def _judge(self, records: Sequence[Record], tally: Tally, online: bool, visit: int) -> list[Record | str]:
        texts = [texts_in(record, self.texts) for record in records]
        # A row is a text that matches: the place of its record, the text, its entries.
        rows = [
            (place, text, entries)
            for place, (record, found) in enumerate(zip(records, texts))
            for text in found or ()
            if (entries := self._ids(record, text))
        ]
        ids, lengths = _flat([row[2] for row in rows])
        places = np.array([place for place, _, _ in rows], np.int64)
        keys = _text_keys([records[place]["key"] for place in places], [text for _, text, _ in rows])
        if online:
            # Of each record the text with the smallest number, which is a uniform choice, passes with P.
            order = np.lexsort((mix(keys, self.seed, visit, _WHICH), places))
            first = order[np.unique(places[order], return_index=True)[1]]
            passed = np.zeros(len(rows), np.bool_)
            passed[first] = True
            passed &= uniform(mix(keys, self.seed, visit)) < _success(self._pi, ids, lengths)
        else:
            # One draw for each entry of each text; the text passes with its first success.
            draws = uniform(mix(np.repeat(keys, lengths) + self._entry_keys[ids], self.seed))
            owners = np.repeat(np.arange(len(rows)), lengths)
            passed = np.bincount(owners[draws < self._pi[ids]], minlength=len(rows)) > 0

        counted = tally.sum_of("kept matches", int(self._starts[-1]))
        np.add.at(counted, ids[np.repeat(passed, lengths)], np.uint64(1))
        tally.numbers["texts"] += sum(len(found or ()) for found in texts)
        tally.numbers["matched texts"] += len(rows)
        tally.numbers["kept texts"] += int(passed.sum())
        kept: dict[int, list[str]] = {}
        for (place, text, _), success in zip(rows, passed):
            kept.setdefault(place, []).extend([text] if success else [])
        verdicts: list[Record | str] = []
        for place, record in enumerate(records):
            if kept.get(place):
                verdicts.append(with_texts(record, kept[place], self.texts))
            elif texts[place] is None:
                verdicts.append("text of a wrong type")
            else:
                verdicts.append("drawn out" if place in kept else "no match" if texts[place] else "no text")
        return verdicts

    def _set(self, thresholds: NDArray[np.float64]) -> None:
        self.thresholds = thresholds
        self.__dict__.pop("_pi", None)

    @cached_property
    def _pi(self) -> NDArray[np.float64]:
        if self.thresholds is None:
            raise ConfigError("MetaCLIP has not counted yet; call fit(records) first")
        return self._pi_of(self.thresholds)

    def _pi_of(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """pi_e = min(1, t / c_e) of every entry, (n,) float64."""
        counts = np.maximum(1.0, np.concatenate([self._counts_of(code) for code in self._lists]))
        return np.minimum(1.0, np.repeat(thresholds, np.diff(self._starts)) / counts)

    @cached_property
    def _entry_keys(self) -> NDArray[np.uint64]:
        return key_numbers(chain.from_iterable(one.entries for one in self._lists.values()))

    def _ids(self, record: Record, text: str) -> list[int]:
        if self.language is None:
            return self._ids_in(text, "")
        code = record.get(self.language) if isinstance(self.language, str) else self.language(text)
        return self._ids_in(text, code if code in self._lists else "other")

    def _ids_in(self, text: str, code: str) -> list[int]:
        """Ids over all lists of the entries of one list that a text matches."""
        matcher = self._matchers.get(code)
        if matcher is None:
            if code not in self._lists:
                return []
            matcher = self._matchers[code] = Matcher(self._lists[code], self.matching)
        start = int(self._starts[list(self._lists).index(code)]) if code else 0
        ids = matcher.ids(text)
        return [start + number for number in ids] if start else ids

    # ----------------------------------------------------------------------------------- data card

    def report(self, measured: Mapping[str, Tally], transformed: Tally) -> list[Section]:
        """What was matched and kept, how the entries' counts changed, and the fifty largest heads."""
        if self.thresholds is None:
            return []
        counted, kept = measured["count"].numbers, transformed.numbers
        after = transformed.sum_of("kept matches", int(self._starts[-1]))
        texts = [
            ("texts", counted["texts"]),
            ("of them matched", counted["matched texts"]),
            ("of them kept", kept["kept texts"]),
            ("matches", counted["matches"]),
            ("matches of kept texts", int(after.sum())),
        ]
        lists, curves, shares = [], [], []
        for place, (code, threshold) in enumerate(zip(self._lists, self.thresholds)):
            before = self._counts_of(code)
            of_list = after[self._starts[place] : self._starts[place + 1]]
            p = t_to_p(before, threshold) if before.any() else 0.0
            lists.append((code or "all", len(before), int((before == 0).sum()), float(threshold), p))
            for name, counts in (("before", before), ("after", of_list)):
                label = f"{code} {name}".strip()
                curves.append(ranked(label, counts))
                shares.append(cumulative(label, counts))
        entries = list(chain.from_iterable(one.entries for one in self._lists.values()))
        every = np.concatenate([self._counts_of(code) for code in self._lists])
        largest = np.argsort(-every.astype(np.int64), kind="stable")[:_HEADS]
        heads = [(entries[i], int(every[i]), int(after[i])) for i in largest if every[i]]
        level = float(self.thresholds[0]) if len(self.thresholds) == 1 else None
        return [
            Table("Texts", ("what", ">number"), texts),
            Table(
                "Metadata",
                ("list", ">entries", ">never matched", ">t", ">p"),
                lists,
                "t is a soft cap: a text of a frequent entry also stays for a rare entry's sake.",
            ),
            Plot("Texts of each entry", "entry, by its rank", "texts", curves, "xy", level),
            Plot(
                "Share of the rarest entries in all matches",
                "entries, the rarest first, as a share of the list",
                "share of matches",
                shares,
            ),
            Table("Largest entries", ("entry", ">texts before", ">texts after"), heads),
        ]


def _text_keys(keys: Iterable[Any], texts: Iterable[str]) -> NDArray[np.uint64]:
    """What the draws of a text begin from: its record and itself, whatever texts the record has besides."""
    return key_numbers(f"{key}\0{text}" for key, text in zip(keys, texts))


def _flat(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lists of ids as one array, and the length of each."""
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def _success(
    pi: NDArray[np.float64], ids: NDArray[np.int32], lengths: NDArray[np.int32]
) -> NDArray[np.float64]:
    """P = 1 - prod(1 - pi_e) over the entries of each text, (texts,) float64; 0 without entries."""
    with np.errstate(divide="ignore"):  # pi = 1 gives log 0, and so P = 1
        failures = np.log1p(-pi[ids])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    return -np.expm1(np.bincount(owners, failures, minlength=len(lengths)))
