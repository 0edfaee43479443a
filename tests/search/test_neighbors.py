"""Neighbors of all kinds: exact where it is said, and as good as reported where an index answers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lancedb")

import clipworks.search.duplicates as duplicates
import clipworks.search.neighbors as neighbors
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import ConfigError, DataError
from clipworks.search import Index
from clipworks.search.table import Table

WIDTH = 16


@pytest.fixture(scope="module", autouse=True)
def few_questions() -> Any:
    """Fewer questions than a real index is measured with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "_SAMPLE", 40)
        yield


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


def vectors(count: int, seed: int = 0, clusters: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((clusters, WIDTH))
    found = centers[rng.integers(0, clusters, count)] + 0.5 * rng.standard_normal((count, WIDTH))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def fill(table: Table, given: np.ndarray, first: int = 0, kind: str = "image") -> None:
    rows = [
        {
            "path": f"/p/{first + i:06d}.png",
            "kind": kind,
            "hash": f"{(2654435761 * (first + i)) % 2**32:08x}" + "0" * 56,
            "mtime_ns": 0,
            "size": first + i,
            "width": 10,
            "height": 10,
            "caption": f"number {first + i}",
            "model": "tiny",
            "revision": "",
            "detail": 0,
        }
        for i in range(len(given))
    ]
    table.append(rows, given)


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    return vectors(2500)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, clip: Any, stored: np.ndarray) -> Index:
    made = Index.create(tmp_path_factory.mktemp("index") / "plain", clip)
    fill(made._table, stored)
    return made


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, clip: Any, stored: np.ndarray) -> Index:
    made = Index.create(tmp_path_factory.mktemp("index") / "indexed", clip)
    fill(made._table, stored)
    made.index_neighbors()
    return made


def numbers(hits: Any) -> list[int]:
    return [int(hit.path[3:9]) for hit in hits]


def brute(stored: np.ndarray, question: np.ndarray, k: int) -> list[int]:
    return [int(i) for i in np.argsort(-(stored @ question), kind="stable")[:k]]


# ----------------------------------------------------------------------------------------------- exact


def test_one_pass_gives_each_question_what_brute_force_gives(
    index: Index, stored: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "_BLOCK", 300)
    questions = vectors(7, seed=1)
    for hits, question in zip(index.search_many(3 * questions, k=12), questions, strict=True):
        assert numbers(hits) == brute(stored, question, 12)
        assert [hit.score for hit in hits] == pytest.approx(
            np.sort(stored @ question)[::-1][:12].tolist(), abs=1e-5
        )
        assert [hit.caption for hit in hits] == [f"number {i}" for i in numbers(hits)]
    even = index.search_many(questions, k=5, where="size < 100")
    for hits, question in zip(even, questions, strict=True):
        assert numbers(hits) == brute(stored[:100], question, 5)
    assert [len(hits) for hits in index.search_many(questions, k=5000)] == [2500] * 7


def test_many_texts_are_answered_as_each_alone(index: Index) -> None:
    texts = ["a cat", '"a dog" - "a cat"', "a cat", 'the "sea"', '0.3*"sea" + "sun"']
    for text, hits in zip(texts, index.query_many(texts, k=6), strict=True):
        assert numbers(hits) == numbers(index.query(text, k=6))
    assert index.query_many([]) == []


def test_thousands_of_hits_come_with_all_that_is_known(index: Index, stored: np.ndarray) -> None:
    question = vectors(1, seed=2)[0]
    hits = index.search(question, k=2000)
    assert numbers(hits) == brute(stored, question, 2000)


# --------------------------------------------------------------------------------------- with an index


def test_an_index_reports_the_recall_that_it_has(indexed: Index, stored: np.ndarray) -> None:
    settings = indexed.settings
    assert settings is not None
    assert settings.recall == min(settings.recall_rows, settings.recall_texts)
    assert 60 < settings.sample < 140
    assert settings.recall >= neighbors.WANTED
    # The same questions, asked as a user asks them: a row's own place is not counted.
    same = []
    for row in neighbors.sample(indexed._table):
        (itself, *right) = brute(stored, row, 11)
        found = set(numbers(indexed.search(row, k=11))) - {itself}
        same.append(len(found & set(right)) / 10)
    assert np.mean(same) == pytest.approx(settings.recall_rows, abs=1e-6)
    shares = [
        len(set(numbers(indexed.search(question))) & set(brute(stored, question, 10))) / 10
        for question in vectors(60, seed=3)
    ]
    assert np.mean(shares) > settings.recall - 0.05


def test_a_coarse_setting_is_measured_as_coarse(
    indexed: Index, stored: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell and no second look must show in the figure, or the figure means nothing."""
    monkeypatch.setattr(neighbors, "_PROBES", (1,))
    monkeypatch.setattr(neighbors, "_REFINE", (1,))
    monkeypatch.setattr(neighbors, "WANTED", 0.0)
    found = neighbors._tune(indexed._table, 50, stored[:80], None)
    assert found["probes"] == 1
    assert 0.05 < found["recall"] < 0.9


def test_hits_of_an_index_have_true_scores_and_conditions_still_find_enough(
    indexed: Index, stored: np.ndarray
) -> None:
    question = vectors(1, seed=4)[0]
    for hit in indexed.search(question, k=8):
        assert hit.score == pytest.approx(float(stored[int(hit.path[3:9])] @ question), abs=1e-5)
    assert len(indexed.search(question, k=20, where="size < 25")) == 20
    assert len(indexed.search(question, k=2000)) == 2000


def test_many_questions_at_once_are_answered_as_one_by_one(
    indexed: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "_TOGETHER", 4)
    questions = vectors(9, seed=9)
    for where in (None, "size < 300"):
        together = indexed.search_many(questions, k=6, where=where)
        assert together == [indexed.search(question, k=6, where=where) for question in questions]


def test_hits_from_the_copy_are_those_that_lance_gives_itself(
    indexed: Index, stored: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = vectors(12, seed=11)
    asked = [(k, where) for k in (1, 7, 300) for where in (None, "size < 900")]
    assert indexed._table.mapped is not None
    copied = [indexed.search_many(questions, k=k, where=where) for k, where in asked]
    monkeypatch.setattr(Table, "mapped", property(lambda table: None))
    for quick, (k, where) in zip(copied, asked, strict=True):
        for mine, theirs in zip(quick, indexed.search_many(questions, k=k, where=where), strict=True):
            assert len(mine) == len(theirs) == k
            scores = [hit.score for hit in mine]
            assert scores == pytest.approx([hit.score for hit in theirs], abs=1e-5)
            # Scores closer than that may change places.
            assert {hit.path: hit.caption for hit in mine} == {hit.path: hit.caption for hit in theirs}


def test_a_copy_that_is_not_of_these_rows_is_passed_over_and_renewed(tmp_path: Path, clip: Any) -> None:
    index = Index.create(tmp_path / "index", clip)
    fill(index._table, vectors(400))
    index.index_neighbors()
    table, question = index._table, vectors(400)[7]

    def copies() -> list[str]:
        return [path.name for path in (tmp_path / "index").glob("rows*")]

    assert table.mapped is not None
    assert copies() == [f"rows-{table.version}.arrow"]
    index.remove(["/p/000007.png"])
    assert table.mapped is None
    assert 7 not in numbers(index.search(question, k=50))
    # What a build leaves that was killed while it wrote the copy, and a copy of other rows under this name.
    (tmp_path / "index" / "rows.writing").write_bytes(b"half of it")
    shutil.copyfile(tmp_path / "index" / copies()[-1], tmp_path / "index" / f"rows-{table.version}.arrow")
    assert Index.open(index.location, clip)._table.mapped is None
    index.add_texts(["a text that was not there"])
    assert table.mapped is not None
    assert copies() == [f"rows-{table.version}.arrow"]
    assert 7 not in numbers(index.search(question, k=50))
    damaged = tmp_path / "index" / copies()[0]
    damaged.unlink()  # another file of this name, for the old one is still mapped here
    damaged.write_bytes(b"ARROW1 and no more")
    opened = Index.open(index.location, clip)
    assert opened._table.mapped is None
    assert numbers(opened.search(question, k=20)) == numbers(index.search(question, k=20))


def test_a_reader_keeps_its_rows_while_another_process_changes_them(tmp_path: Path, clip: Any) -> None:
    writer = Index.create(tmp_path / "index", clip)
    fill(writer._table, vectors(400))
    writer.index_neighbors()
    reader = Index.open(writer.location, clip)
    question = vectors(400)[7]
    assert numbers(reader.search(question, k=1)) == [7]
    writer.remove(["/p/000007.png"])
    writer.add_texts(["new"])
    assert numbers(reader.search(question, k=1)) == [7]
    reader.refresh()
    assert numbers(reader.search(question, k=1)) != [7]


def test_a_question_may_be_asked_where_an_event_loop_runs(indexed: Index, stored: np.ndarray) -> None:
    async def ask() -> Any:
        return indexed.search(stored[3], k=1)

    assert numbers(asyncio.run(ask())) == [3]


def test_rows_that_come_or_go_later_are_found_or_not(tmp_path: Path, clip: Any) -> None:
    index = Index.create(tmp_path / "index", clip)
    fill(index._table, vectors(400))
    index.index_neighbors()
    late = vectors(3, seed=50)
    fill(index._table, late, first=400)
    assert numbers(index.search(late[1], k=1)) == [401]
    index.remove(["/p/000401.png"])
    assert numbers(index.search(late[1], k=1)) != [401]
    index._table.compact()
    opened = Index.open(index.location, clip)
    assert opened.settings == index.settings
    assert numbers(opened.search(late[2], k=1)) == [402]


def test_an_index_is_made_when_it_pays_and_again_when_the_table_has_grown(
    tmp_path: Path, clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "ENOUGH", 300)
    index = Index.create(tmp_path / "index", clip)
    fill(index._table, vectors(290))
    index.add_texts(["a"])
    assert index.settings is None
    fill(index._table, vectors(60, seed=1), first=290)
    index.add_texts(["b"])
    assert index.settings is not None
    assert index.settings.rows == 352
    index.add_texts(["c"])
    assert index.settings.rows == 352
    assert sorted(hit.caption for hit in index.query("a", kind="text")) == ["a", "b", "c"]
    assert {hit.kind for hit in index.query("a", k=50)} == {"image"}
    fill(index._table, vectors(180, seed=2), first=350)
    index.add_texts(["d"])
    assert index.settings.rows == 534
    assert Index.open(index.location, clip).info()["neighbors"]["rows"] == 534


def test_too_few_items_need_no_index(tmp_path: Path, clip: Any) -> None:
    index = Index.create(tmp_path / "index", clip)
    with pytest.raises(DataError, match="0 items need no index"):
        index.index_neighbors()


# ------------------------------------------------------------------------------------------- in memory


def test_what_is_held_answers_as_brute_force_and_reports_its_recall(index: Index, stored: np.ndarray) -> None:
    pytest.importorskip("usearch")
    held = index.hold()
    assert len(held) == 2500
    assert held.recall >= neighbors.WANTED
    assert held.bytes > 2500 * WIDTH * 2
    shares = []
    for question in vectors(40, seed=5):
        hits = index.search(5 * question)
        shares.append(len(set(numbers(hits)) & set(brute(stored, question, 10))) / 10)
        for hit in hits:
            assert hit.score == pytest.approx(float(stored[int(hit.path[3:9])] @ question), abs=2e-3)
            assert hit.caption == f"number {int(hit.path[3:9])}"
    assert np.mean(shares) > held.recall - 0.05
    assert len(index.search(vectors(1, seed=6)[0], k=2400)) == 2400
    assert len(index.search(vectors(1, seed=6)[0], k=20, where="size < 25")) == 20
    index._held = None


def test_what_is_held_follows_the_table_and_is_kept_for_the_next_time(tmp_path: Path, clip: Any) -> None:
    pytest.importorskip("usearch")
    index = Index.create(tmp_path / "index", clip)
    assert index.hold().search(vectors(1)[0], 3) == []
    fill(index._table, vectors(300))
    fill(index._table, vectors(20, seed=7), first=300, kind="text")
    index.refresh()
    late = vectors(3, seed=8)
    fill(index._table, late, first=320)
    index.remove(["/p/000005.png"])
    assert numbers(index.search(late[0], k=1)) != [320]
    index.refresh()
    assert numbers(index.search(late[0], k=1)) == [320]
    assert numbers(index.search(vectors(300)[5], k=1)) != [5]
    opened = Index.open(index.location, clip)
    adds: list[int] = []
    held = opened.hold()
    held._graph.add = lambda keys, *_: adds.append(len(keys))
    assert len(held) == 302
    held._load()
    assert adds == []
    assert {hit.kind for hit in opened.search(late[0], k=100)} == {"image"}
    assert len(opened.search(late[0], k=100, kind="text")) == 20


# ------------------------------------------------------------------------------------- near duplicates


@pytest.mark.parametrize("held", [False, True])
def test_near_duplicates_are_the_groups_that_all_pairs_give(
    tmp_path: Path, clip: Any, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", 50)
    rng = np.random.default_rng(0)
    given = vectors(200, clusters=200)
    # A chain: neighbors are near, the ends are not.
    for i, step in enumerate((0.0, 0.18, 0.36)):
        given[i] = np.cos(step) * np.eye(WIDTH)[0] + np.sin(step) * np.eye(WIDTH)[1]
    for copy, of in ((50, 120), (51, 120), (199, 7)):
        given[copy] = given[of] + 1e-3 * rng.standard_normal(WIDTH)
        given[copy] /= np.linalg.norm(given[copy])
    index = Index.create(tmp_path / "index", clip)
    fill(index._table, given)
    if held:
        pytest.importorskip("usearch")
        index.hold()
    cosines = given @ given.T
    parent = list(range(200))
    for i, j in zip(*np.nonzero(cosines >= 0.98), strict=True):
        a, b = sorted((parent[i], parent[j]))
        parent = [a if root == b else root for root in parent]
    groups: dict[int, list[str]] = {}
    for i, root in enumerate(parent):
        groups.setdefault(root, []).append(f"/p/{i:06d}.png")
    expected = sorted((g for g in groups.values() if len(g) > 1), key=lambda g: (-len(g), g))
    assert index.near_duplicates(0.98) == expected
    assert ["/p/000000.png", "/p/000001.png", "/p/000002.png"] in expected
    assert float(given[0] @ given[2]) < 0.98


def test_a_threshold_that_is_no_cosine_is_refused(index: Index) -> None:
    for threshold in (0, 1.5, -1, float("nan")):
        with pytest.raises(ConfigError, match="the threshold is a cosine"):
            index.near_duplicates(threshold)


# ----------------------------------------------------------------------------------- export, elsewhere


def test_an_export_holds_every_row_once_and_says_whose_vectors_they_are(
    index: Index, stored: np.ndarray, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert index.export(tmp_path / "new" / "all.parquet") == 2500
    table = parquet.read_table(tmp_path / "new" / "all.parquet")
    order = np.argsort(table.column("path").to_pylist())
    found = np.array(table.column("vector").to_pylist(), dtype=np.float32)[order]
    assert np.array_equal(found, stored)
    assert json.loads(table.schema.metadata[b"clipworks"])["width"] == WIDTH
    assert index.export(tmp_path / "some.parquet", "size < 7", vectors=False) == 7
    assert "vector" not in parquet.read_schema(tmp_path / "some.parquet").names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "some.parquet"]
    with pytest.raises(ConfigError, match="cannot be applied"):
        index.export(tmp_path / "x.parquet", "weight > 3")
    assert not (tmp_path / "x.parquet").exists()


def test_an_index_may_lie_at_a_uri(tmp_path: Path, clip: Any) -> None:
    location = (tmp_path / "there").as_uri()
    index = Index.create(location, clip)
    index.add_texts(["a", "b"])
    assert Index.exists(location)
    assert [hit.caption for hit in Index.open(location, clip).query("b", k=1, kind="text")] == ["b"]
    with pytest.raises(DataError, match="something is there already"):
        Index.create(location, clip)
    elsewhere = Index.create("memory://index", clip)
    elsewhere.add_texts(["a", "b", "c"])
    assert len(elsewhere) == 3
    assert elsewhere.info()["bytes"] is None
    assert [hit.caption for hit in elsewhere.query("c", k=1, kind="text")] == ["c"]
    with pytest.raises(DataError, match="cannot be reached"):
        Index.open("nowhere://bucket/index")
