"""`clipworks segment`: shares and overlays that the library gives, and one clear line for bad input."""

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

LABELS = ["road", "car", "sky"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Callable[..., Any]) -> str:
    from clipworks.core.tokenizer import ClipTokenizer

    return str(tiny_clip(tokenizer=ClipTokenizer()).save(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("more/deep").mkdir(parents=True)
    for name in ("street.jpg", "more/street.png", "more/deep/c.png"):
        Image.fromarray(rng.integers(0, 256, (40, 57, 3), dtype=np.uint8)).save(name)
    Path("text.jpg").write_text("no picture")
    return tmp_path


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["segment", *map(str, args)])


def test_shares_and_overlay_are_those_of_the_library(photos: Path, model: str) -> None:
    import clipworks
    from clipworks.methods.dense.maskclip import MaskCLIP

    done = run("street.jpg", "--labels", *LABELS, "--out", "over.png", "--model", model, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    found = MaskCLIP(clipworks.load(model)).segment("street.jpg", LABELS)
    (one,) = said["pictures"]
    assert (one["path"], one["height"], one["width"], one["overlay"]) == ("street.jpg", 40, 57, "over.png")
    assert one["shares"] == pytest.approx(found.shares())
    with Image.open("over.png") as overlay:
        assert np.array_equal(np.asarray(overlay), np.asarray(found.overlay("street.jpg")))


def test_folders_are_walked_and_what_cannot_be_read_is_reported(photos: Path, model: str) -> None:
    args = ["street.jpg", "more", "text.jpg", "--labels", *LABELS, "--out", "overlays", "--model", model]
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    written = [one["overlay"] for one in said["pictures"]]
    # Two pictures of one name do not overwrite each other.
    assert written == ["overlays/street.png", "overlays/street-2.png", "overlays/c.png"] or sorted(
        written
    ) == ["overlays/c.png", "overlays/street-2.png", "overlays/street.png"]
    assert all(Path(path).is_file() for path in written)
    assert [one["path"] for one in said["skipped"]] == ["text.jpg"]
    shown = run(*args)
    assert "skipped 1 of 4: text.jpg" in shown.stderr
    assert "road" in shown.stdout


def test_unknown_pixels_background_and_size_reach_the_method(photos: Path, model: str) -> None:
    args = ["street.jpg", "--labels", *LABELS, "--model", model, "--json"]
    done = run(*args, "--unknown-below", 1.0, "--background", "sky", "--size", "full")
    (one,) = json.loads(done.stdout)["pictures"]
    assert sum(one["shares"].values()) == pytest.approx(1)
    assert one["shares"]["unknown"] > 0
    other = json.loads(run(*args, "--size", 24).stdout)["pictures"][0]
    assert other["shares"] != json.loads(run(*args).stdout)["pictures"][0]["shares"]


def test_a_saved_method_is_found_by_its_folder(photos: Path, model: str) -> None:
    import clipworks
    from clipworks.methods.dense.maskclip import MaskCLIP

    saved = MaskCLIP(clipworks.load(model), residual=False, templates=("the {}",))
    saved.save("saved")
    done = run("street.jpg", "--labels", *LABELS, "--method", "saved", "--model", model, "--json")
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)["pictures"]
    assert one["shares"] == pytest.approx(saved.segment("street.jpg", LABELS).shares())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["street.jpg"], "no labels given"),
        (["street.jpg", "--labels", "car", "car"], "'car' is given more than once"),
        (["street.jpg", "--labels", "car", "sky", "--background", "wall"], "'wall' is none of the labels"),
        (["street.jpg", "--labels", "car", "sky", "--size", "half"], "a number of pixels or full"),
        (["street.jpg", "--labels", "car", "sky", "--size", "0"], "a number of pixels or full"),
        (["street.jpg", "--labels", "car", "sky", "--unknown-below", "1.5"], "unknown-below"),
        (["street.jpg", "--labels", "car", "sky", "--method", "maskclop"], "maskclip"),
        (["street.jpg", "--labels", "car", "sky", "--method", "more"], "more"),
        (["street.jpg", "--labels", "car", "sky", "--method", "clip-dinoiser"], "has to learn first"),
        (["more", "--labels", "car", "sky", "--out", "over.png"], "several pictures need a folder"),
        (["text.jpg", "--labels", "car", "sky"], "text.jpg: not a picture"),
        (["none.jpg", "--labels", "car", "sky"], "none.jpg: no such folder or file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(photos: Path, model: str, args: list[str], said: str) -> None:
    done = run(*args, "--model", model)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
