"""`fit`, `predict` and `bench adapt`: from folders of pictures to classes, with one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipworks import load
from clipworks.cli import app
from clipworks.methods.adapt.base import Adapter, print_of

COLORS = {"blue_thing": 2, "green_thing": 1, "red_thing": 0}


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of each of three colors."""
    folder = tmp_path_factory.mktemp("data") / "shots"
    generator = np.random.default_rng(0)
    for name, channel in COLORS.items():
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_what_is_fitted_predicts(shots: Path, tmp_path: Path) -> None:
    done = run("fit", "nearest-mean", "--data", shots, "--shots", 4, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["pictures"], result["test_pictures"], result["accuracy"]) == (12, 6, 1.0)
    photo = shots / "green_thing" / "5.png"
    done = run("predict", tmp_path / "run", photo, "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert found["photo"] == str(photo)
    assert found["classes"][0]["name"] == "green thing"
    assert sum(one["probability"] for one in found["classes"]) == pytest.approx(1)
    done = run("predict", tmp_path / "run", shots / "red_thing", "--top", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("red thing") == 6


def test_settings_and_templates_reach_the_method(shots: Path, tmp_path: Path) -> None:
    words = ["fit", "linear-probe", "--data", shots, "--out", tmp_path / "run", "--store", tmp_path / "store"]
    done = run(*words, "--set", "C=0.5", "iterations=7", "--template", "a {}", "the {}", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accuracy"] is None  # every picture was learned from
    about = json.loads((tmp_path / "run" / "estimator.json").read_text())
    assert (about["settings"]["C"], about["settings"]["iterations"]) == (0.5, 7)
    assert about["values"]["texts_"]["class texts"]["templates"] == ["a {}", "the {}"]


def test_methods_are_compared(shots: Path, tmp_path: Path) -> None:
    words = ["bench", "adapt", "--methods", "zero-shot", "nearest-mean", "--data", shots, "--seeds", 2]
    words += ["--shots", 1, 2, "--out", tmp_path]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "nearest-mean" in done.stdout
    done = run(*words, "--json")
    rows = json.loads(done.stdout)
    assert [(row["method"], row["shots"]) for row in rows] == [
        ("zero-shot", 0), ("nearest-mean", 1), ("nearest-mean", 2)
    ]  # fmt: skip
    for suffix in ("json", "csv", "png"):
        assert (tmp_path / f"comparison.{suffix}").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "nearest-men", "--data", "{shots}"], "nearest-mean"),
        (["fit", "nearest-mean", "--data", "{tmp}/nowhere"], "no such folder"),
        (["fit", "nearest-mean", "--data", "{tmp}"], "empty"),
        (["fit", "nearest-mean", "--data", "{shots}", "--shots", "7"], "fewer than the 7 shots"),
        (["fit", "nearest-mean", "--data", "{shots}", "--set", "sed=3"], "seed"),
        (["fit", "nearest-mean", "--data", "{shots}", "--set", "seed"], "NAME=VALUE"),
        (["predict", "{tmp}", "photo.jpg"], "no run"),
        (["bench", "adapt", "--methods", "nearest-men", "--data", "{shots}"], "nearest-mean"),
        (["bench", "adapt", "--methods", "zero-shot", "--data", "{shots}", "--set", "seed=1"], "METHOD.NAME"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, shots: Path, tmp_path: Path) -> None:
    done = run(*(word.format(shots=shots, tmp=tmp_path) for word in words))
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_can_teach(shots: Path, tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    done = run("fit", "coop", "--data", shots, "--out", teacher, "--set", "epochs=1")
    assert done.exit_code == 0, done.output
    taught = ["--set", f"teacher={teacher}", "epochs=1", "views=1"]
    done = run("fit", "promptkd", "--data", shots, "--out", student, *taught)
    assert done.exit_code == 0, done.output
    about = json.loads((student / "estimator.json").read_text())
    expected = Adapter.load(teacher, load("seedling"))
    assert about["values"]["teacher_print_"] == print_of(expected)
    done = run("fit", "promptkd", "--data", shots, "--out", student, "--set", "teacher=nowhere")
    assert (done.exit_code, "Traceback" in done.output) == (2, False)
