"""`clipworks finetune`: from a table to a model, and how it says no."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import clipworks
from clipworks.cli import app
from clipworks.core.tokenizer import ClipTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Callable[..., Any]) -> str:
    tokenizer = ClipTokenizer(context_length=16)
    clip = tiny_clip(image={"image_size": 16}, text={"context_length": 16}, tokenizer=tokenizer)
    return str(clip.save(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["picture\tshort\tlong"]
    for number in range(20):
        pixels = np.full((16, 16, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{number}.png")
        lines.append(f"{number}.png\tcolor {number}\ta picture of the color {number}")
    Path("my.tsv").write_text("\n".join([*lines, "gone.png\tx\ty"]))
    for name in ("cat", "dog"):
        Path("probe", name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(f"probe/{name}/0.png")
    return tmp_path / "my.tsv"


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["finetune", *args])


def test_a_table_becomes_a_model_a_page_and_json(table: Path, model: str) -> None:
    columns = ("--image", "picture", "--caption", "short", "long")
    quick = ("--epochs", "1", "--precision", "fp32", "--probe", "probe", "--out", "mine")
    done = run("--init", model, "--data", str(table), *columns, *quick, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert set(said) == {"clip", "report", "share", "epochs", "table"}
    assert list(said["table"]) == ["start", "best epoch", "tuned"] and said["epochs"] == 1
    assert "probe accuracy" in said["table"]["tuned"]
    assert "20 pictures with captions, skipped 1: 1 missing picture (gone.png)" in done.stderr
    assert Path(said["report"]).is_file() and clipworks.load(said["clip"]).tokenizer is not None
    again = run("--init", model, "--data", str(table), *columns, *quick)
    assert again.exit_code == 0, again.output
    assert "tuned" in again.stdout and "1 epochs; the result is" in again.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--data", "gone.csv"), "no such table, folder or shard"),
        (("--data", "my.tsv", "--caption", "shrot", "--image", "picture"), "did you mean short"),
        (("--data", "my.tsv", "--image", "picture"), "name one as the captions"),
        (("--data", "my.tsv", "--resume", "maybe"), "--resume must be auto, yes or no"),
        (("--data", "my.tsv", "--probe-classes", "x.json"), "names the classes of --probe"),
        (("--data", "my.tsv", "--precision", "fp8"), "fp8"),
    ],
)
def test_bad_input_is_one_line(table: Path, model: str, args: tuple[str, ...], says: str) -> None:
    done = run("--init", model, *args)
    assert done.exit_code == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1
