"""A plan: strict, honest about what it holds out, and resumable as a whole."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipworks.data.source import Example, Examples
from clipworks.errors import ConfigError
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.plan import (
    objective_named,
    open_sources,
    read_plan,
    train,
    without_words,
)

yaml = pytest.importorskip("yaml")
pyarrow = pytest.importorskip("pyarrow")

NAMES = ["ox", "red cup", "tub", "blue door"]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A data folder of twelve tiny pictures of four classes."""
    from pyarrow import parquet

    folder = tmp_path / "data" / "small"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        rows = []
        for i in range(12):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (60 * (i % 4), 20 * i, 90)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % 4})
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-000.parquet")
    names = [{"index": i, "name": name, "names": [name]} for i, name in enumerate(NAMES)]
    (folder / "classes.json").write_text(json.dumps(names))
    return tmp_path / "data"


def values(**changes: Any) -> dict[str, Any]:
    block = {"heads": 2, "head_width": 8, "mlp_width": 32}
    return {
        "model": {
            "width": 16,
            "image": {"image_size": 16, "patch_size": 8, "width": 16, "blocks": [block]},
            "text": {"context_length": 16, "vocab_size": 1, "width": 16, "blocks": [block]},
        },
        "tokenizer": {"kind": "train", "vocab_size": 400},
        "data": [
            {"kind": "labeled", "path": "small", "per_batch": 3, "unique_labels": True, "hold_out": "2"}
        ],
        "evaluation": {"kind": "labeled", "path": "small", "split": "val"},
        "recipe": {"steps": 4, "warmup": 1, "precision": "fp32"},
        **changes,
    }


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values(**changes)))
    return path


def test_unknown_key_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean tokenizer"):
        read_plan(write(tmp_path, tokeniser={"kind": "clip"}))
    with pytest.raises(ConfigError, match="warmup"):
        read_plan(write(tmp_path, recipe={"steps": 4, "warmupp": 1}))
    with pytest.raises(ConfigError, match=r"data\[0\]\.kind"):
        read_plan(write(tmp_path, data=[{"kind": "labelled"}]))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected keys and values"):
        read_plan(tmp_path / "list.yaml")


def test_overrides_replace_entries_of_the_recipe(tmp_path: Path) -> None:
    assert read_plan(write(tmp_path), {"lr": 0.5}).recipe.lr == 0.5


def test_objectives_go_by_their_slugs() -> None:
    assert isinstance(objective_named("clip"), ClipObjective)
    with pytest.raises(ConfigError, match="did you mean clip"):
        objective_named("klip")


def test_held_out_class_shows_neither_pictures_nor_words(shop: Path, tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path))
    (source,) = open_sources(plan, shop)
    texts = {str(text) for i in range(len(source)) for text in source[i].texts["alt"]}
    assert len(source) == 9
    assert not any("tub" in text for text in texts) and any("ox" in text for text in texts)


@pytest.mark.parametrize(
    ("text", "left"),
    [("a tub of ice", False), ("two Tubs", False), ("a tuba", True), ("two boxes", True), ("oxes", False)],
)
def test_words_are_held_out_whole_in_singular_and_plural(text: str, left: bool) -> None:
    source = Examples([Example("a", texts={"alt": ["fine", text]})])
    assert len(without_words(source, ["tub", "ox"])) == int(left)


def test_words_beside_the_texts_count_too() -> None:
    source = Examples([Example("a", texts={"de": "Badewanne"}, extra={"words": ["tub"]})])
    assert len(without_words(source, ["tub"])) == 0


def test_interrupted_plan_ends_with_the_weights_of_the_undisturbed_one(shop: Path, tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path))
    whole = train(plan, shop, tmp_path / "whole", show="nothing")
    assert set(whole.metrics) >= {"top1", "top5"}

    class Stop(Exception):
        pass

    class After:
        def on_step(self, state: Any) -> None:
            if state.step == 2:
                raise Stop

    from clipworks.engine.checkpoints import Saving

    with pytest.raises(Stop):
        train(plan, shop, tmp_path / "cut", show="nothing", callbacks=[After()], saving=Saving(steps=1))
    again = train(plan, shop, tmp_path / "cut", show="nothing", saving=Saving(steps=1))
    for name, weight in whole.clip.state_dict().items():
        assert torch.equal(weight, again.clip.state_dict()[name]), name


def test_trained_folder_loads_with_its_own_tokenizer(shop: Path, tmp_path: Path) -> None:
    from clipworks import load

    result = train(read_plan(write(tmp_path)), shop, tmp_path / "run", show="nothing")
    clip = load(result.folder / "clip")
    assert torch.equal(clip.embed_texts(["red cup"]), result.clip.embed_texts(["red cup"]))
    assert (result.folder / "skipped.txt").read_text().strip() == "nothing skipped"
