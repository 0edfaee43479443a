"""`clipworks index`: the records it prints, the sheet it draws, and how it says no."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("lancedb")

from clipworks.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Callable[..., Any]) -> str:
    from clipworks.core.tokenizer import ClipTokenizer

    return str(tiny_clip(tokenizer=ClipTokenizer()).save(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("pictures").mkdir()
    for i in range(4):
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((40 + 10 * i, 30)).save(f"pictures/{i}.png")
    Path("pictures/text.jpg").write_text("no picture")
    return tmp_path / "pictures"


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["index", *args])


def answer(*args: str) -> dict[str, Any]:
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_build_says_what_it_did_and_the_next_one_that_nothing_was_to_do(pictures: Path, model: str) -> None:
    said = answer("build", "pictures", "--model", model)
    assert {key: said[key] for key in ("items", "embedded", "reused", "unchanged", "removed")} == {
        "items": 4, "embedded": 4, "reused": 0, "unchanged": 0, "removed": 0,
    }  # fmt: skip
    assert said["model"] == model
    assert [set(one) for one in said["skipped"]] == [{"path", "reason"}]
    again = answer("build", "pictures")
    assert (again["embedded"], again["unchanged"]) == (0, 4)
    line = run("build", "pictures")
    assert line.stdout.startswith("clipworks-index: 4 items; 0 embedded, 0 reused, 4 unchanged, 0 removed")
    assert line.stderr.startswith("skipped 1 of 5: ")


def test_a_query_by_words_or_by_picture_prints_ranked_hits(pictures: Path, model: str) -> None:
    run("build", "pictures", "--model", model)
    said = answer("query", "a cat", "--k", "3")
    assert said["query"] == "a cat"
    assert len(said["hits"]) == 3
    assert [set(hit) for hit in said["hits"]] == [
        {"path", "score", "width", "height", "caption", "digest", "kind", "fields"}
    ] * 3
    scores = [hit["score"] for hit in said["hits"]]
    assert scores == sorted(scores, reverse=True)
    first = answer("query", "--image", "pictures/2.png")["hits"][0]
    assert first["path"] == str(pictures / "2.png")
    assert first["width"] == 60
    assert [hit["width"] for hit in answer("query", "a cat", "--where", "width = 50")["hits"]] == [50]
    table = run("query", "a cat")
    assert table.exit_code == 0
    assert "0.png" in table.stdout.replace("\n", "")


def test_the_sheet_holds_the_hits(pictures: Path, model: str) -> None:
    run("build", "pictures", "--model", model)
    assert answer("query", "a cat", "--sheet", "new/hits.png")["sheet"] == "new/hits.png"
    with Image.open("new/hits.png") as sheet:
        assert sheet.width >= 4 * 180


def test_info_says_what_the_index_holds(pictures: Path, model: str) -> None:
    run("build", "pictures", "--model", model)
    said = answer("info")
    assert set(said) == {
        "path", "pictures", "texts", "model", "fingerprint", "width", "fields", "bytes", "neighbors",
    }  # fmt: skip
    assert (said["pictures"], said["model"], said["width"]) == (4, model, 16)
    assert said["bytes"] > 0
    assert "vector width" in run("info").stdout


def test_a_model_given_by_a_path_is_found_from_another_folder(
    pictures: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model).parent)
    run("build", str(pictures), "--model", "tiny", "--index", str(pictures.parent / "i"))
    monkeypatch.chdir(pictures)
    assert len(answer("query", "a cat", "--index", "../i")["hits"]) == 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["build", "none"], "none: no such folder or file"),
        (["build", "empty"], "empty: no pictures there"),
        (["build", "pictures", "--model", "other"], "their vectors cannot be compared"),
        (["build", "pictures", "--model", "seedlin"], "'seedlin'"),
        (["build", "pictures", "--index", "pictures"], "something is there already"),
        (["build"], "PLACE"),
        (["query", "a cat", "--index", "none"], "none: no index there"),
        (["query"], "give words to look for, --image FILE, or both"),
        (["query", "a cat", "--queries", "q.txt"], "or --queries FILE alone"),
        (["query", "--queries", "q.txt"], "q.txt: cannot be read"),
        (["query", "--queries", "q.txt", "--inverted"], "--inverted and --sheet are for one query"),
        (["query", '"a cat" - a dog'], "cannot be read from '- a dog' on"),
        (["query", "a cat", "--kind", "sound"], "--kind must be image, text or both, not 'sound'"),
        (["query", "a cat", "--inverted"], "inversion is for pictures that look for pictures"),
        (["duplicates", "--threshold", "2"], "the threshold is a cosine"),
        (["export", "x.parquet", "--where", "weight > 3"], "weight"),
        (["export", "pictures"], "pictures: cannot be written"),
        (["query", " "], "the query is empty"),
        (["query", "--image", "none.png"], "none.png: no such"),
        (["query", "--image", "pictures/text.jpg"], "text.jpg: not a picture"),
        (["query", "a cat", "--where", "weight > 3"], "weight"),
        (["query", "a cat", "--where", "width > 999", "--sheet", "x.png"], "x.png: not written"),
        (["query", "a cat", "--sheet", "hits.xyz"], "hits.xyz: cannot be written"),
        (["query", "a cat", "--k", "0"], "--k"),
        (["info", "--index", "pictures"], "no index there"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_code_2(
    pictures: Path, model: str, tiny_clip: Callable[..., Any], args: list[str], said: str
) -> None:
    from clipworks.core.tokenizer import ClipTokenizer

    Path("empty").mkdir()
    run("build", "pictures", "--model", model)
    tiny_clip(seed=1, tokenizer=ClipTokenizer()).save("other")
    done = run(*args, *(["--model", model] if args[0] == "build" and "--model" not in args else []))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_build_of_what_is_not_there_makes_no_index(pictures: Path, model: str) -> None:
    Path("empty").mkdir()
    for folder in ("none", "empty", "*.webp"):
        assert run("build", folder, "--model", model).exit_code == 2
        assert not Path("clipworks-index").exists()


def test_tables_texts_and_many_queries(pictures: Path, model: str) -> None:
    table = pictures / "captions.csv"
    table.write_text("file_name,caption,year\n0.png,a red thing,2001\n1.png,a blue thing,2002\n")
    assert answer("build", str(table), "--texts", "--model", model)["embedded"] == 4
    (hit,) = answer("query", "a cat", "--where", "year = 2002")["hits"]
    assert (hit["path"], hit["fields"]) == (str(pictures / "1.png"), {"year": 2002})
    found = answer("query", "a blue thing", "--kind", "text", "--k", "1")["hits"][0]
    assert (found["kind"], found["caption"]) == ("text", "a blue thing")
    assert "a blue thing" in run("query", "a blue thing", "--kind", "both").stdout
    Path("queries.txt").write_text('a cat\n\n"a dog" - "a cat"\n')
    lines = [
        json.loads(line) for line in run("query", "--queries", "queries.txt", "--k", "2").stdout.splitlines()
    ]
    assert [line["query"] for line in lines] == ["a cat", '"a dog" - "a cat"']
    assert [len(line["hits"]) for line in lines] == [2, 2]
    alone = answer("query", "a cat", "--k", "2")["hits"]
    assert [hit["path"] for hit in lines[0]["hits"]] == [hit["path"] for hit in alone]


def test_a_query_may_be_words_and_a_picture_and_inverted(
    pictures: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clipworks.methods.retrieve.cross_the_gap as method

    monkeypatch.setitem(method.STEPS, "image_to_text", 2)
    run("build", "pictures", "--model", model)
    alone = answer("query", "--image", "pictures/2.png")["hits"]
    both = answer("query", "a cat", "--image", "pictures/2.png")["hits"]
    inverted = answer("query", "--image", "pictures/2.png", "--inverted")["hits"]
    assert alone[0]["score"] == pytest.approx(1, abs=1e-5)
    assert 0.1 < both[0]["score"] < 0.999
    assert inverted[0]["score"] < 0.9
    assert len(inverted) == 4


def test_duplicates_are_listed_and_rows_exported(pictures: Path, model: str) -> None:
    shutil.copyfile(pictures / "2.png", pictures / "copy.png")
    run("build", "pictures", "--model", model)
    groups = answer("duplicates", "--threshold", "0.99999")["groups"]
    assert groups == [[str(pictures / "2.png"), str(pictures / "copy.png")]]
    assert "1 groups of 2 pictures" in run("duplicates", "--threshold", "0.99999").stderr
    assert answer("export", "new/all.parquet")["rows"] == 5
    assert Path("new/all.parquet").stat().st_size > 0
    assert (
        run("export", "some.parquet", "--where", "width > 60", "--no-vectors").stdout
        == "some.parquet: 1 rows\n"
    )


def test_pictures_may_be_held_in_memory(pictures: Path, model: str) -> None:
    pytest.importorskip("usearch")
    run("build", "pictures", "--model", model)
    plain, held = answer("query", "a cat"), answer("query", "a cat", "--memory")
    assert [hit["path"] for hit in held["hits"]] == [hit["path"] for hit in plain["hits"]]
