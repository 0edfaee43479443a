"""Lists of entries out of dumps: what is counted, ranked, cut and refused."""

from __future__ import annotations

import bz2
import gzip
import json
import math
from pathlib import Path

import pytest

from clipworks.data.dumps import articles, count_words, page_views, pmi, wordnet_names
from clipworks.data.metadata import ENGLISH, WORLDWIDE, Limits, Metadata
from clipworks.errors import ConfigError, DataError


def test_words_are_counted_and_bigrams_stop_at_punctuation() -> None:
    words, bigrams = count_words(["New York, New York: don't stop!\nYork (new)", "Ski-lift café"])
    assert words == {"new": 3, "york": 3, "don't": 1, "stop": 1, "ski-lift": 1, "café": 1}
    assert bigrams == {("new", "york"): 2, ("don't", "stop"): 1, ("ski-lift", "café"): 1}
    assert count_words(["New York"], lower=False)[0] == {"New": 1, "York": 1}


def test_a_segmenter_finds_the_words_of_a_text_without_blanks() -> None:
    words, bigrams = count_words(["東京都。大阪"], lower=False, segment=list)
    assert words == dict.fromkeys("東京都大阪", 1)
    assert pmi(words, bigrams, glue="").keys() == {"東京", "京都", "大阪"}


def test_pmi_is_its_formula_and_has_the_ceiling_of_a_pair_that_only_occurs_together() -> None:
    words, bigrams = count_words(["hong kong"] * 3 + ["the dog"] * 4 + ["the cat"] * 2)
    scores = pmi(words, bigrams)
    assert scores["hong kong"] == pytest.approx(math.log2(18 / 3)) == max(scores.values())
    assert scores["the dog"] == pytest.approx(math.log2(4 * 18 / (6 * 4)))


def test_texts_come_out_of_plain_packed_and_json_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain\n{not json\n")
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(b'{"title": "x", "text": "in json"}\n'))
    assert list(articles([tmp_path / "a.txt", tmp_path / "b.jsonl.bz2"])) == ["plain", "{not json", "in json"]
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"whole\n" * 5000)[:-20])
    with pytest.raises(DataError, match=r"c\.gz: cannot be read"):
        list(articles(tmp_path / "c.gz"))


def test_page_views_count_articles_of_one_project_in_busy_hours(tmp_path: Path) -> None:
    hours = [
        "en New_York 50 0\nen New_York x 0\nen.m New_York 900 0\nen Talk:X 99 0\nen Rare 49 0\n",
        "en New_York 60 0\n",
    ]
    for number, text in enumerate(hours):
        (tmp_path / f"h{number}.gz").write_bytes(gzip.compress(text.encode()))
    assert page_views(sorted(tmp_path.glob("*.gz"))) == {"New York": 110}


def test_wordnet_names_are_first_words_cut_at_the_dot(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(
        "  1 This is a license  \n"
        "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is\n"
        "00002000 03 n 02 Hot_dog 0 frank 0 000 | food\n"
        "00003000 03 n 01 St._Louis 0 000 | city\n"
    )
    (tmp_path / "data.adj").write_text("00004000 00 a 01 galore(ip) 0 000 | in plenty\n")
    assert wordnet_names(tmp_path) == ["entity", "hot dog", "st", "galore"]
    with pytest.raises(DataError, match=r"no data\.noun"):
        wordnet_names(tmp_path / "elsewhere")


def test_the_list_is_a_union_in_order_with_the_papers_thresholds() -> None:
    made = Metadata.build(
        words={"common": 500, "enough": 100, "rare": 99, ",": 900, "7": 400},
        bigrams={"hong kong": 30.5, "the dog": 5.0},
        titles={"New York": 70, "common": 80, "Seldom": 69},
        wordnet=["entity", "", "common"],
    )
    numbers = [str(i) for i in range(100)]
    assert list(made.entries) == [*numbers, "entity", "common", "enough", "hong kong", "New York"]


def test_the_worldwide_caps_cut_shares_numbers_length_and_punctuation() -> None:
    words = {f"w{i:03d}": 1000 - i for i in range(100)} | {"。。": 5000}
    made = Metadata.build(
        words, {"x y": 31.0, "z" * 300: 40.0}, {f"T{i}": 10 - i for i in range(10)}, (), WORLDWIDE
    )
    entries = list(made.entries[100:])
    assert entries == [*(f"w{i:03d}" for i in range(9)), "x y", *(f"T{i}" for i in range(7))]
    few = Metadata.build({}, {"a b": 1.0, "c d": 3.0, "e f": 2.0}, {}, (), Limits(bigrams=2))
    assert few.entries[100:] == ("c d", "e f")
    assert ENGLISH.pmi == 30


def test_a_list_survives_the_way_through_a_file(tmp_path: Path) -> None:
    metadata = Metadata(["New York", "犬", "a\tb"])
    metadata.save(tmp_path / "list.json")
    assert json.loads((tmp_path / "list.json").read_text()) == list(metadata.entries)
    assert Metadata.load(tmp_path / "list.json").identity == metadata.identity
    (tmp_path / "list.txt").write_text("New York\n犬\n\n")
    assert Metadata.load(tmp_path / "list.txt").entries == ("New York", "犬")


@pytest.mark.parametrize("entries", [[], ["a", ""], ["a", "b", "a"], ["a", 7]])
def test_what_is_no_list_of_entries_is_refused(entries: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metadata"):
        Metadata(entries)
    (tmp_path / "list.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"list\.json"):
        Metadata.load(tmp_path / "list.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, content in (("broken.json", "{"), ("object.json", "{}")):
        (tmp_path / name).write_text(content)
    for name in ("broken.json", "object.json", "missing.txt"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read as metadata"):
            Metadata.load(tmp_path / name)
