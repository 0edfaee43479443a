"""MetaCLIP against a naive reference written from the paper: a scan, a count, a product, a law of draws."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ahocorasick")

from clipworks.data.metadata import Metadata
from clipworks.errors import ConfigError, DataError
from clipworks.methods.curate.metaclip import Matcher, Matching, MetaCLIP, p_to_t, t_to_p

# --- the reference ---------------------------------------------------------------------------------------


def naive_text(text: str) -> str:
    spaced = "".join(f" {c} " if c in ",.;:?!`" else " " if c in "\t\n\r" else c for c in text)
    return " " + spaced + " "


def naive_matches(entries: list[str], text: str) -> set[int]:
    spaced = naive_text(text)
    return {i for i, entry in enumerate(entries) if f" {entry} " in spaced}


def naive_probability(matches: set[int], counts: list[int], t: float) -> float:
    dropped = 1.0
    for i in matches:
        dropped *= 1 - min(1.0, t / counts[i])
    return 1 - dropped


ENTRIES = [
    "a", "photo", "of", "dog", "Dog", "New York", "York", "York City", "New York City", "T-shirt", "t-shirt",
    "café", "cafe\u0301", "naïve", "🐕", "🐕 dog", "犬", "小犬", "東京", "St. Louis", "U.S.", "3", "99",
    "photo of", "a photo of a dog", "ß", "İstanbul", "dog dog", "\u00a0", "e", "x-ray", "can't", "of a",
    "rock 'n' roll",
]  # fmt: skip
PIECES = [
    *ENTRIES, "city", "red", "blue", "quick", ",", ".", ";", ":", "?", "!", "`", "-", "\t", "\n", "\r", "  ",
    "", "new york", "NEW", "York,", "dog.", "dog?!", "(dog)", "dog's", "\u3000", "\ud800", "\0", "\u200b",
]  # fmt: skip
ENTRIES.append("zero count")


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    rare = {"🐕", "東京", "İstanbul", "ß"}
    weights = [0.2 if piece in rare else 1.0 for piece in PIECES]
    made = []
    for _ in range(n):
        pieces = rng.choices(PIECES, weights, k=rng.randint(0, 12))
        made.append("".join(piece + rng.choice([" ", " ", " ", "", "  "]) for piece in pieces))
    return made


def records(of: list[str]) -> list[dict[str, Any]]:
    return [{"key": str(i), "caption": text} for i, text in enumerate(of)]


# --- matches, counts, probabilities ----------------------------------------------------------------------


def test_matches_counts_and_probabilities_equal_a_naive_scan_on_twenty_thousand_texts() -> None:
    many = texts(20_000)
    expected = [naive_matches(ENTRIES, text) for text in many]
    matcher = Matcher(Metadata(ENTRIES))
    assert [set(matcher.ids(text)) for text in many] == expected
    counts = [0] * len(ENTRIES)
    for text, matches in zip(many, expected):
        for i in matches if text.strip() else ():
            counts[i] += 1
    t = sorted(counts)[len(counts) // 2]
    curator = MetaCLIP(Metadata(ENTRIES), t=t).fit(records(many))
    assert curator.counts is not None and curator.counts.dtype == np.uint64
    assert curator.counts.tolist() == counts
    assert counts[ENTRIES.index("St. Louis")] == counts[ENTRIES.index("zero count")] == 0 < min(counts[:3])
    for text, matches in zip(many, expected):
        assert curator.probability(text) == pytest.approx(naive_probability(matches, counts, t), abs=1e-12)


@given(
    st.text(alphabet="ab ,.\t東", max_size=12),
    st.lists(st.text("ab ,東", min_size=1, max_size=4), min_size=1),
)
def test_matches_equal_a_naive_scan_whatever_the_entries(text: str, entries: list[str]) -> None:
    entries = list(dict.fromkeys(entries))
    assert set(Matcher(Metadata(entries)).ids(text)) == naive_matches(entries, text)


def test_neighbors_that_share_a_blank_are_both_found_which_a_search_without_overlaps_misses() -> None:
    import re

    entries = ["New York", "York", "City", "York City"]
    text = "in New York City"
    assert [entries[i] for i in Matcher(Metadata(entries)).ids(text)] == entries
    without = re.findall("|".join(f" {entry} " for entry in entries), naive_text(text))
    assert len(without) < len(entries)


def test_case_and_double_blanks_count_and_an_entry_counts_once_a_text() -> None:
    curator = MetaCLIP(Metadata(["York", "New York"]), t=1)
    counted = curator.count(records(["New  York York", "new york", "York", "NYork"]))
    assert counted.sums["matches"].tolist() == [2, 0]
    assert counted.numbers == Counter({"records": 4, "texts": 4, "matches": 2, "matched texts": 2})


def test_an_entry_with_punctuation_matches_only_if_entries_are_spaced_too() -> None:
    entries = Metadata(["St. Louis", "U.S.", "U . S .", ".com", "a\tdog", "a dog"])
    text = "St. Louis, U.S.: a .com a dog"
    assert Matcher(entries).ids(text) == [2, 5]
    mended = Matcher(entries, Matching(space_entries=True))
    assert mended.ids(text) == [0, 1, 3, 4, 5]
    assert mended.ids("St Louis US com") == []


def test_worldwide_entries_have_no_blanks_beside_scripts_that_have_none() -> None:
    matching = Matching("worldwide")
    spaced = {
        entry: matching.entry(entry) for entry in ("犬", "word", "T犬", "ラーメン", "ไทย", "(x", "x)", "한국")
    }
    assert spaced == {
        "犬": "犬", "word": " word ", "T犬": " T犬", "ラーメン": " ラーメン ", "ไทย": "ไทย", "(x": "(x ",
        "x)": " x)", "한국": " 한국 ",
    }  # fmt: skip
    entries, sentence = Metadata(["犬", "ラーメン"]), "小犬とラーメンを食べる"
    assert Matcher(entries).ids(sentence) == []
    assert Matcher(entries, matching).ids(sentence) == [0]
    assert Matcher(entries, Matching("worldwide", kana=True)).ids(sentence) == [0, 1]


# --- t and p ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 1001))
def test_p_leads_back_to_the_largest_count_below_t(counts: list[int], t: int) -> None:
    array = np.array(counts, np.uint64)
    if not sum(counts):
        with pytest.raises(DataError, match="no text"):
            t_to_p(array, t)
        return
    assert t_to_p(array, t) == sum(c for c in counts if c < t) / sum(counts)
    if any(0 < c < t for c in counts):
        assert p_to_t(array, t_to_p(array, t)) == max(c for c in counts if c < t)


def test_p_never_asks_for_nothing_at_all() -> None:
    assert p_to_t(np.array([0, 0, 500, 500], np.uint64), 0.06) >= 1


# --- draws -----------------------------------------------------------------------------------------------


def with_counts(counts: dict[str, int], **options: Any) -> MetaCLIP:
    curator = MetaCLIP(Metadata(counts), **{"t": 20, **options})
    curator.learn({"counts": np.array(list(counts.values()), np.uint64), "thresholds": np.array([20.0])})
    return curator


COUNTS = {"a": 100, "b": 400, "c": 21, "d": 20, "e": 2000, "f": 90}


def test_keep_decisions_follow_the_law_of_independent_draws() -> None:
    """Chi-square over seeds, and the same test refuses the sum of the pi, which is not the law."""
    stats = pytest.importorskip("scipy.stats")
    law = ["a", "b", "a b", "a f", "b e", "a b e f"]
    items, seeds = records(law), 1500
    kept, curator = np.zeros(len(law)), with_counts(COUNTS)
    for curator.seed in range(seeds):
        for record in curator.transform(items):
            kept[int(record["key"])] += 1
    pi = {entry: min(1, 20 / count) for entry, count in COUNTS.items()}
    success = np.array([1 - math.prod(1 - pi[e] for e in text.split()) for text in law])
    total = np.array([min(0.999, sum(pi[e] for e in text.split())) for text in law])

    def chi_square(p: np.ndarray) -> float:
        return float(((kept - seeds * p) ** 2 / (seeds * p * (1 - p))).sum())

    assert success[2] == pytest.approx(0.24)
    assert chi_square(success) < stats.chi2.ppf(0.999, len(law))
    assert chi_square(total) > stats.chi2.ppf(0.999999, len(law))


def test_draws_of_different_texts_records_and_entries_are_independent() -> None:
    stats = pytest.importorskip("scipy.stats")
    curator = with_counts({"a": 40, "b": 40})  # pi = 1/2
    for one, other in (
        ([("k", "a"), ("k", "b")], "entries"),
        ([("k", "a"), ("m", "a")], "keys"),
        ([("k", "a x"), ("k", "a y")], "texts"),
    ):
        kept = [
            {
                r["key"][1:]
                for r in curator.transform({"key": f"{key}{i}", "caption": text} for i in range(2000))
            }
            for key, text in one
        ]
        table = np.zeros((2, 2))
        for i in map(str, range(2000)):
            table[int(i in kept[0]), int(i in kept[1])] += 1
        assert stats.chi2_contingency(table).pvalue > 1e-4, other


def test_rare_entries_keep_every_text_and_no_match_keeps_none() -> None:
    items = records(["c d", "d", "", "  ", "nothing here", "e d"])
    for seed in range(200):
        curator = with_counts(COUNTS, seed=seed)
        assert [record["key"] for record in curator.transform(items)] == ["0", "1", "5"]
        assert curator.tally.dropped == Counter({"no text": 2, "no match": 1})


def test_without_a_cap_all_that_match_stay_and_a_smaller_t_keeps_a_subset() -> None:
    many = records(texts(3000))
    kept = [
        {r["key"] for r in MetaCLIP(Metadata(ENTRIES), t=t).fit(many).transform(many)} for t in (5, 60, 10**9)
    ]
    assert kept[0] < kept[1] < kept[2]
    assert kept[2] == {
        r["key"] for r in many if r["caption"].strip() and naive_matches(ENTRIES, r["caption"])
    }


def test_every_entry_keeps_at_least_its_cap_and_the_caps_bound_the_size() -> None:
    many = records(texts(4000))
    curator = MetaCLIP(Metadata(ENTRIES), t=50).fit(many)
    assert curator.counts is not None
    expected, size = np.zeros(len(ENTRIES)), 0.0
    for record in many:
        success = curator.probability(record["caption"]) if record["caption"].strip() else 0.0
        size += success
        expected[list(naive_matches(ENTRIES, record["caption"]))] += success
    caps = np.minimum(curator.counts, 50)
    assert (expected >= caps - 1e-9).all()
    assert size <= caps.sum()


def test_the_three_text_record_comes_in_by_either_form_as_often_as_it_should() -> None:
    captions = ["a", "b", "a b", "no match", "a"]  # P = 0.2, 0.05, 0.24
    many = [{"key": str(i), "captions": captions} for i in range(6000)]
    for form, expected in (("offline", 0.4224), ("online", 0.49 / 3)):
        kept = list(with_counts({"a": 100, "b": 400}, form=form).transform(many))
        deviation = math.sqrt(expected * (1 - expected) / len(many))
        assert len(kept) / len(many) == pytest.approx(expected, abs=4 * deviation)
        assert len({record["key"] for record in kept}) == len(kept)
        assert all(set(record["captions"]) <= {"a", "b", "a b"} for record in kept)
        assert form == "offline" or all(len(set(record["captions"])) == 1 for record in kept)


def test_online_visits_are_fresh_and_draw_every_matched_text() -> None:
    record = {"key": "x", "captions": ["a", "b", "c", "no match"]}
    curator = with_counts({"a": 40, "b": 40, "c": 40})
    drawn = [curator.sample(record, visit) for visit in range(1500)]
    assert [curator.sample(record, visit) for visit in range(50)] == drawn[:50]
    counts = Counter(found["captions"][0] for found in drawn if found)
    assert sum(counts.values()) == pytest.approx(750, abs=80)
    assert all(counts[text] == pytest.approx(250, abs=60) for text in "abc")


def test_a_record_is_kept_with_the_texts_that_passed_and_nothing_else_changed() -> None:
    curator = with_counts({"head": 10**12, "tail": 1})
    given = {"key": "k", "alt": "head", "caption": "head", "captions": ["tail", "head", "other"], "n": [1]}
    (kept,) = curator.transform([given])
    assert kept == {"key": "k", "captions": ["tail"], "n": [1]}


def test_with_counts_fixed_another_record_changes_no_decision() -> None:
    many = records(texts(500))
    curator = with_counts(COUNTS)
    alone = [bool(list(curator.transform([record]))) for record in many]
    kept = {record["key"] for record in curator.transform(many)}
    assert alone == [record["key"] in kept for record in many]


# --- a size in place of t, and several languages ---------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_keep_finds_the_t_that_keeps_this_share(keep: float) -> None:
    many = records(texts(3000))
    curator = MetaCLIP(Metadata(ENTRIES), keep=keep).fit(many)
    assert curator.thresholds is not None
    t = curator.thresholds[0]

    def mean(t: float) -> float:
        at = MetaCLIP(Metadata(ENTRIES), t=t)
        at.learn({"counts": curator.counts, "thresholds": np.array([float(t)])})  # type: ignore[dict-item]
        told = [r for r in many if r["caption"].strip()]
        return sum(at.probability(r["caption"]) for r in told) / len(told)

    assert abs(mean(t) - keep) <= min(abs(mean(t + 1) - keep), abs(mean(max(1, t - 1)) - keep))


def test_keep_says_when_too_few_texts_match() -> None:
    with pytest.raises(DataError, match=r"keep=0\.9: no t keeps more than 50\.0%"):
        MetaCLIP(Metadata(["a"]), keep=0.9).fit(records(["a", "b"]))


def test_each_language_is_counted_by_itself_and_takes_its_t_from_englishs_tail() -> None:
    english, german = Metadata(["taxi", "dog", "in"]), Metadata(["taxi", "hund", "in"])
    said = (
        [("en", "dog in taxi")] * 30 + [("en", "in")] * 70 + [("de", "hund in taxi")] * 3 + [("de", "in")] * 9
    )
    many = [{"key": str(i), "lang": code, "caption": text} for i, (code, text) in enumerate(said)]
    many.append({"key": "f", "lang": "fr", "caption": "taxi"})
    curator = MetaCLIP({"en": english, "de": german}, t=40, language="lang").fit(many)
    assert curator.counts is not None and curator.thresholds is not None
    assert curator.counts.tolist() == [30, 30, 100, 3, 3, 12]
    p = 60 / 160
    assert curator.thresholds.tolist() == [40, p_to_t(np.array([3, 3, 12]), p)] == [40, 3]
    assert curator.probability("in", "de") == pytest.approx(3 / 12)
    assert curator.probability("in") == pytest.approx(0.4)
    list(curator.transform(many))
    assert curator.tally.dropped["no match"] == 1
    other = MetaCLIP({"en": english, "other": Metadata(["taxi"])}, t=40, language="lang").fit(many)
    assert other.counts is not None and other.counts.tolist() == [30, 30, 100, 4]


# --- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of t, p and keep"),
        ({"t": 5, "p": 0.1}, "exactly one of t, p and keep"),
        ({"t": 0}, "t=0: must be at least 1"),
        ({"p": 1.5}, "p=1.5 is outside"),
        ({"keep": 0.0}, "keep=0.0 is outside"),
        ({"t": 5, "form": "both"}, "form 'both'"),
        ({"t": 5, "language": "lang"}, "several lists need"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetaCLIP(Metadata(["a"]), **options)


def test_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="call fit"):
        list(MetaCLIP(Metadata(["a"]), t=5).transform(records(["a"])))
    with pytest.raises(DataError, match="no key; its fields are caption"):
        MetaCLIP(Metadata(["a"]), t=5).fit([{"caption": "a"}])
    with pytest.raises(DataError, match="no text of the pool matches"):
        MetaCLIP(Metadata(["a"]), p=0.1).fit(records(["b"]))
    with pytest.raises(ConfigError, match="'en'"):
        MetaCLIP({"de": Metadata(["a"])}, t=5, language="lang")
