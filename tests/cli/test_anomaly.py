"""`clipworks anomaly`: what was fitted scores files and folders, with one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipworks.cli import app
from clipworks.core.pictures import read_picture


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for number in range(6):
        pixels = rng.integers(60, 120, (40, 50, 3), dtype=np.uint8)
        mask = np.zeros((40, 50), np.uint8)
        if number % 2:
            mask[10:25, 10:30] = 255
            pixels[mask > 0] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["anomaly", *map(str, words)])


def test_a_fit_scores_a_folder_and_draws_maps(tiles: Path, tmp_path: Path) -> None:
    done = run("fit", tiles, "--out", tmp_path / "run", "--epochs", 1, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["pictures"], said["faulty"]) == (6, 3)
    done = run("score", tmp_path / "run", tiles / "images", "--out", tmp_path / "maps", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["threshold"] == said["threshold"]
    assert len(found["pictures"]) == 6
    for row in found["pictures"]:
        assert 0 <= row["score"] <= 1
        assert row["faulty"] == (row["score"] > found["image_threshold"])
        assert read_picture(row["overlay"]).height == 40
    other = run(
        "score", tmp_path / "run", tiles / "images" / "0.png", "--faultless", tiles / "images", "--json"
    )
    assert json.loads(other.stdout)["threshold"] != found["threshold"]


def test_bad_input_is_one_line(tiles: Path, tmp_path: Path) -> None:
    for words, said in (
        (("fit", tmp_path), "neither shards"),
        (("score", tmp_path, tiles / "images"), "no run"),
    ):
        done = run(*words)
        assert done.exit_code == 2
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
