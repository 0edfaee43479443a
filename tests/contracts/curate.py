"""The contract of the family `curate`, as `methods/curate/base.py` states it, on every method it has.

A check is a function of a curator's maker. Each runs on every method of the register, and on curators that
break one promise (`broken_curate.py`), where it must fail.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.contracts import broken_curate as broken

from clipworks.data.metadata import Metadata
from clipworks.data.record_files import Record
from clipworks.methods.curate.base import Curator, Tally
from clipworks.methods.curate.metaclip import Matching, MetaCLIP
from clipworks.papers import register

Make = Callable[[], Curator]
WORDS = (
    "a", "photo", "of", "red", "blue", "green", "cat", "dog", "house", "old", "New",
    "York", "City", "sun", "犬", "小犬", "café", "naïve", ".", ",", "!",
)  # fmt: skip


def language_of(text: str) -> str:
    return "ja" if "犬" in text else "en"


ENTRIES = Metadata(["photo", "cat", "dog", "house", "New York", "York", "café", "never there"])
LISTS = {"en": ENTRIES, "ja": Metadata(["犬", "小犬"])}

# Every method of the family, in the forms worth checking.
FORMS: dict[str, dict[str, Make]] = {
    "metaclip": {
        "t": lambda: MetaCLIP(ENTRIES, t=20),
        "p": lambda: MetaCLIP(ENTRIES, p=0.3, seed=5),
        "keep": lambda: MetaCLIP(ENTRIES, keep=0.3),
        "online": lambda: MetaCLIP(ENTRIES, t=20, form="online"),
        "worldwide": lambda: MetaCLIP(
            LISTS, t=30, matching=Matching("worldwide"), language=language_of, form="online"
        ),
    }
}


def methods() -> Iterator[Any]:
    """Every method of the family that is there, in each of its forms, marked with its paper."""
    for paper in register():
        if paper.family == "curate" and paper.status != "planned":
            for form, make in FORMS[paper.slug].items():
                yield pytest.param(make, id=f"{paper.slug}-{form}", marks=pytest.mark.contract(paper.slug))


def pool(n: int = 400) -> list[Record]:
    """Records with one, several, no and unusable texts, and other fields."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 9)))

    records: list[Record] = []
    for i in range(n):
        record: Record = {"key": f"r{i}", "url": f"http://example.org/{i}", "size": [i, 2 * i]}
        if i % 5 == 1:
            record["captions"] = [text() for _ in range(rng.randint(0, 4))]
        elif i % 50 == 7:
            record["caption"] = 17
        elif i % 50 != 8:
            record["caption"] = text()
        if i % 4 == 0:
            record["synthetic"] = text()
        records.append(record)
    return records


def keys(records: Any) -> list[str]:
    return [record["key"] for record in records]


# --- the checks ------------------------------------------------------------------------------------------


def accounts_for_every_record(make: Make) -> None:
    """What was read is kept or dropped for a reason."""
    curator = make().fit(pool())
    kept = list(curator.transform(iter(pool())))
    tally = curator.tally
    assert tally.numbers["records"] == len(pool())
    assert tally.numbers["kept"] == len(kept) > 0
    assert sum(tally.dropped.values()) == len(pool()) - len(kept) > 0


def keeps_order_and_nothing_twice(make: Make) -> None:
    """What is kept is a subsequence of what came in."""
    kept = keys(make().fit(pool()).transform(pool()))
    assert len(set(kept)) == len(kept)
    assert kept == [key for key in keys(pool()) if key in set(kept)]


def division_and_order_do_not_matter(make: Make) -> None:
    """Parts in any order give, put in order, what the whole gives."""
    whole = list(make().fit(pool()).transform(pool()))
    mixed = pool()
    random.Random(1).shuffle(mixed)
    curator = make().fit(mixed)
    parts = [list(curator.transform(mixed[start : start + 37])) for start in range(0, len(mixed), 37)]
    found = {record["key"]: record for part in parts for record in part}
    assert [found.get(key) for key in keys(whole)] == whole
    assert len(found) == len(whole)


def tallies_add_up(make: Make) -> None:
    """A pass over parts, added in any order, teaches the same as a pass over the whole."""
    whole = make().fit(pool())
    split = make()
    for stage in split.passes:
        parts = [split.measure(pool()[start : start + 53], stage) for start in range(0, len(pool()), 53)]
        total = Tally()
        for part in reversed(parts):
            total.add(part)
        split.settle(stage, total)
        assert total.numbers["records"] == len(pool())
    same_learned(whole, split)


def repeats_itself(make: Make) -> None:
    """No generator but its own seed: the same twice, and the global ones are left alone."""
    curator = make().fit(pool())
    before = repr(random.getstate()), repr(np.random.get_state())  # noqa: NPY002
    one = list(curator.transform(pool()))
    assert before == (repr(random.getstate()), repr(np.random.get_state()))  # noqa: NPY002
    assert one == list(make().fit(pool()).transform(pool()))


def leaves_its_input_alone(make: Make) -> None:
    given = pool()
    before = copy.deepcopy(given)
    list(make().fit(given).transform(given))
    assert given == before


def can_be_sent(make: Make) -> None:
    """Pickled before and between the passes and after them, it goes on as it would have."""
    expected = list(make().fit(pool()).transform(pool()))
    try:
        curator = pickle.loads(pickle.dumps(make()))
        for stage in curator.passes:
            sent = pickle.loads(pickle.dumps(curator))
            curator.settle(stage, sent.measure(pool(), stage))
        curator = pickle.loads(pickle.dumps(curator))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(str(error)) from error
    assert list(curator.transform(pool())) == expected


def can_be_saved(make: Make) -> None:
    """Loaded by another one with the same parameters, it decides the same."""
    curator = make().fit(pool())
    with tempfile.TemporaryDirectory() as folder:
        curator.save(folder)
        other = make().load(folder)
    same_learned(curator, other)
    assert list(curator.transform(pool())) == list(other.transform(pool()))


def names_its_parameters(make: Make) -> None:
    """Its identity is JSON, the same for the same parameters, and `set_params` gives them back."""
    curator = make()
    try:
        said = [json.dumps(curator.identity(stage)) for stage in (*curator.passes, "transform")]
    except TypeError as error:
        raise AssertionError(str(error)) from error
    assert said == [json.dumps(make().identity(stage)) for stage in (*curator.passes, "transform")]
    assert json.dumps(curator.set_params().identity()) == said[-1]


def reads_only_what_it_says(make: Make) -> None:
    """A pass sees the same if only the fields of `reads` are there."""
    curator = make()
    if curator.reads is None:
        return
    wanted = {*curator.reads, "key"}
    narrow = [{name: value for name, value in record.items() if name in wanted} for record in pool()]
    same_learned(make().fit(pool()), make().fit(narrow))


def same_learned(one: Curator, other: Curator) -> None:
    ours, theirs = one.learned(), other.learned()
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert np.array_equal(array, theirs[name]), name


CHECKS = (
    accounts_for_every_record,
    keeps_order_and_nothing_twice,
    division_and_order_do_not_matter,
    tallies_add_up,
    repeats_itself,
    leaves_its_input_alone,
    can_be_sent,
    can_be_saved,
    names_its_parameters,
    reads_only_what_it_says,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", list(methods()))
def test_a_method_keeps_its_familys_contract(make: Make, check: Any) -> None:
    pytest.importorskip("ahocorasick")
    check(make)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sound_curator_passes(check: Any) -> None:
    check(broken.Sound)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (broken.LosesCount, accounts_for_every_record),
        (broken.KeepsTwice, keeps_order_and_nothing_twice),
        (broken.ComparesWithNeighbors, division_and_order_do_not_matter),
        (broken.LastPartWins, tallies_add_up),
        (broken.PythonsGenerator, repeats_itself),
        (broken.ChangesWhatItIsGiven, leaves_its_input_alone),
        (broken.CannotBeSent, can_be_sent),
        (broken.ForgetsWhenSaved, can_be_saved),
        (broken.NamelessParameters, names_its_parameters),
        (broken.ReadsMoreThanItSays, reads_only_what_it_says),
    ],
)
def test_a_check_fails_on_what_breaks_its_promise(make: Make, check: Any) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check(make)


def test_every_check_has_been_seen_to_fail() -> None:
    marks = test_a_check_fails_on_what_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    seen = {check for mark in marks if mark.name == "parametrize" for _, check in mark.args[1]}
    assert seen == set(CHECKS)
