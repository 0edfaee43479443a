"""`clipworks demo`: what is fixed in it stays fixed, and it does the main job from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("lancedb")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from clipworks.cli import app, demo
from clipworks.errors import ConfigError, MissingExtra


def test_every_photograph_is_a_picture_in_an_installed_package() -> None:
    for path in demo.PHOTOGRAPHS.values():
        with Image.open(demo.installed(path)) as picture:
            assert min(picture.size) >= 180


def test_each_of_five_photographs_has_ten_different_labels_with_the_right_one_first() -> None:
    assert set(demo.LABELS) == {"cat.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle.png"}
    for name, labels in demo.LABELS.items():
        assert len(set(labels)) == len(labels) == 10
        assert Path(name).stem in labels[0]
    assert set(demo.QUERIES.values()) <= set(demo.PHOTOGRAPHS)
    assert len(set(demo.QUERIES.values())) == len(demo.QUERIES)


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(MissingExtra, match=r"clipworks\[demo\]"):
        demo.installed("no_such_package/data/x.png")
    with pytest.raises(ConfigError, match="comes without it"):
        demo.installed("skimage/data/no_such_picture.png")


def test_it_classifies_searches_and_writes_the_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_clip: Callable[..., Any]
) -> None:
    from clipworks.core.tokenizer import ClipTokenizer

    monkeypatch.setattr(demo, "SCENES", 8)
    model = str(tiny_clip(tokenizer=ClipTokenizer()).save(tmp_path / "tiny"))
    args = ["demo", "--out", str(tmp_path / "out"), "--model", model]
    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["pictures"] == said["embedded"] == len(demo.PHOTOGRAPHS) + 8
    assert [one["expected"] for one in said["photographs"]] == [labels[0] for labels in demo.LABELS.values()]
    for one in said["photographs"]:
        assert set(one) == {"photograph", "expected", "top1", "correct", "predictions"}
        assert {label["label"] for label in one["predictions"]} == set(demo.LABELS[one["photograph"]])
        assert sum(label["probability"] for label in one["predictions"]) == pytest.approx(1)
        assert one["top1"] == one["predictions"][0]["label"]
        assert one["correct"] == (one["top1"] == one["expected"])
    assert said["correct"] == sum(one["correct"] for one in said["photographs"])
    for one in said["search"]:
        assert 1 <= one["rank"] <= said["pictures"]
        shown = [Path(hit["path"]).name for hit in one["hits"]]
        assert (one["expected"] in shown) == (one["rank"] <= len(shown))
        if one["rank"] <= len(shown):
            assert shown[one["rank"] - 1] == one["expected"]
    with Image.open(said["sheet"]) as sheet:
        assert sheet.height > 7 * 150

    again = CliRunner().invoke(app, args)
    assert again.exit_code == 0, again.output
    assert f"contact sheet of the hits: {tmp_path / 'out' / 'hits.png'}" in again.stdout
    assert f"{said['correct']} of 5 right" in again.stdout
