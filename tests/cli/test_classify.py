"""`clipworks classify`: spellings, results, and one clear line for every kind of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipworks.cli import app
from clipworks.cli.classify import read_labels
from clipworks.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Callable[..., Any]) -> str:
    from clipworks.core.tokenizer import ClipTokenizer

    return str(tiny_clip(tokenizer=ClipTokenizer()).save(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("more/deep").mkdir(parents=True)
    for name in ("photo.jpg", "more/b.png", "more/deep/c.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(name)
    Path("text.jpg").write_text("no picture")
    Path("cut.png").write_bytes(Path("more/b.png").read_bytes()[:200])
    return tmp_path


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["classify", *args])


def answer(*args: str) -> dict[str, Any]:
    done = run("--json", *args)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_json_holds_each_picture_with_the_probabilities_that_the_library_gives(
    photos: Path, model: str
) -> None:
    import clipworks

    labels = ["a cat", "a dog", "an owl"]
    said = answer("photo.jpg", "more", "--labels", *labels, "--model", model)
    assert set(said) == {"model", "pictures", "skipped"}
    assert said["skipped"] == []
    assert [picture["path"] for picture in said["pictures"]] == ["photo.jpg", "more/b.png", "more/deep/c.png"]
    expected = clipworks.load(model).classify(
        ["photo.jpg", "more/b.png", "more/deep/c.png"], labels, ["a photo of {}."]
    )
    for picture, row in zip(said["pictures"], expected.probabilities.tolist(), strict=True):
        given = {one["label"]: one["probability"] for one in picture["predictions"]}
        assert given == pytest.approx(dict(zip(labels, row, strict=True)), abs=1e-6)
        assert sum(given.values()) == pytest.approx(1)
        values = [one["probability"] for one in picture["predictions"]]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "spelling",
    [
        ["photo.jpg", "--labels", "a cat", "a dog"],
        ["--labels", "a cat", "a dog", "--", "photo.jpg"],
        ["photo.jpg", "--labels", "a cat", "--labels", "a dog"],
        ["photo.jpg", "--labels", "a cat, a dog"],
        ["photo.jpg", "--labels=a cat", "a dog", "--top", "5"],
        ["photo.jpg", "--labels-file", "labels.txt"],
        ["photo.jpg", "--labels", "a cat", "--labels-file", "dog.txt"],
    ],
)
def test_all_spellings_of_labels_mean_the_same(photos: Path, model: str, spelling: list[str]) -> None:
    Path("labels.txt").write_text("a cat\n\n a dog \r\n", encoding="utf-8-sig")
    Path("dog.txt").write_text("a dog")
    said = answer("--model", model, *spelling)["pictures"]
    assert [picture["path"] for picture in said] == ["photo.jpg"]
    assert {one["label"] for one in said[0]["predictions"]} == {"a cat", "a dog"}
    assert said == answer("photo.jpg", "--labels", "a cat", "a dog", "--model", model)["pictures"]


def test_a_bare_name_gets_the_article_that_it_lacks(photos: Path, model: str) -> None:
    with_article = answer("photo.jpg", "--labels", "a cat", "an owl", "--model", model)
    without = answer("photo.jpg", "--labels", "cat", "owl", "--model", model)
    for one, other in zip(
        *(said["pictures"][0]["predictions"] for said in (with_article, without)), strict=True
    ):
        assert one["label"].split()[-1] == other["label"]
        assert one["probability"] == other["probability"]


def test_templates_are_averaged_and_a_dash_of_top_limits_the_list(photos: Path, model: str) -> None:
    import clipworks

    templates = ["a {}.", "the {} there"]
    said = answer(
        "photo.jpg", "--labels", "cat", "dog", "--template", *templates, "--top", "1", "--model", model
    )
    (best,) = clipworks.load(model).classify("photo.jpg", ["cat", "dog"], templates).top(1)
    (given,) = said["pictures"][0]["predictions"]
    assert (given["label"], given["probability"]) == (best[0][0], pytest.approx(best[0][1], abs=1e-6))


def test_patterns_and_folders_name_each_picture_once(photos: Path, model: str) -> None:
    said = answer("more/*.png", "more", "more/b.png", "--labels", "a", "b", "--model", model)
    assert [picture["path"] for picture in said["pictures"]] == ["more/b.png", "more/deep/c.png"]


def test_bad_pictures_among_good_ones_are_reported_and_left_out(photos: Path, model: str) -> None:
    args = ["text.jpg", "photo.jpg", "cut.png", "none.jpg", "--labels", "a cat", "a dog", "--model", model]
    done = run(*args)
    assert done.exit_code == 0
    assert "skipped 3 of 4: " in done.stderr
    assert all(name in done.stderr for name in ("text.jpg", "cut.png", "none.jpg"))
    said = answer(*args)
    assert [picture["path"] for picture in said["pictures"]] == ["photo.jpg"]
    assert {one["path"] for one in said["skipped"]} == {"text.jpg", "cut.png", "none.jpg"}
    assert all(one["path"] in one["reason"] for one in said["skipped"])


def test_the_table_shows_picture_label_and_probability(photos: Path, model: str) -> None:
    done = run("photo.jpg", "--labels", "a cat", "an [red]owl", "--model", model)
    assert done.exit_code == 0
    assert all(word in done.stdout for word in ("photo.jpg", "a cat", "an [red]owl", "%"))


def test_a_single_label_is_answered_with_a_note(photos: Path, model: str) -> None:
    done = run("photo.jpg", "--labels", "a cat", "--model", model, "--json")
    assert done.exit_code == 0
    assert "single label" in done.stderr
    assert json.loads(done.stdout)["pictures"][0]["predictions"] == [{"label": "a cat", "probability": 1.0}]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["none.jpg", "--labels", "a", "b"], "none.jpg: no such folder or file"),
        (["text.jpg", "--labels", "a", "b"], "text.jpg: not a picture"),
        (["cut.png", "text.jpg", "--labels", "a", "b"], "none of 2 pictures could be read"),
        (["empty", "--labels", "a", "b"], "empty: no pictures there"),
        (["*.webp", "--labels", "a", "b"], "*.webp: no pictures there"),
        (["photo.jpg"], "no labels given"),
        (["photo.jpg", "--labels", "a", " "], "a label is empty"),
        (["photo.jpg", "--labels", "a cat", "A cat"], "the label 'A cat' is given more than once"),
        (["photo.jpg", "--labels-file", "none.txt"], "none.txt: the labels cannot be read"),
        (["photo.jpg", "--labels-file", "photo.jpg"], "photo.jpg: not a text file in UTF-8"),
        (["--labels", "a cat", "photo.jpg"], "'photo.jpg' was read as a label"),
        (["photo.jpg", "--labels", "a", "b", "--template", "a photo"], "the template 'a photo' has no {}"),
        (["photo.jpg", "--labels", "a", "b", "--precision", "int8"], "--precision must be"),
        (["photo.jpg", "--labels", "a", "b", "--device", "abacus"], "--device 'abacus'"),
        (["photo.jpg", "--labels", "a", "b", "--model", "seedlin"], "'seedlin'"),
        (["photo.jpg", "--labels", "a", "b", "--model", "broken"], "broken"),
        (["photo.jpg", "--labels", "a", "b", "--model", "empty"], "empty"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_code_2(
    photos: Path, model: str, args: list[str], said: str
) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    for file in Path(model).iterdir():
        Path("broken", file.name).write_bytes(file.read_bytes()[:1000])
    done = run(*args, *([] if "--model" in args else ["--model", model]))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_labels_with_commas_are_split_only_where_they_stand_alone() -> None:
    assert read_labels(["cat, dog ,fox"]) == ["cat", "dog", "fox"]
    assert read_labels(["a red, round ball", "a cube"]) == ["a red, round ball", "a cube"]


def test_labels_of_an_empty_file_are_no_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="no labels given"):
        read_labels([], tmp_path / "labels.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_labels([], tmp_path)
