"""A plan: strict, honest about what it holds out, and resumable as a whole."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.data.source import Example, Examples
from clipworks.engine.callbacks import Callback
from clipworks.errors import ConfigError
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.plan import (
    fresh_clip,
    objective_named,
    objective_of,
    open_loader,
    open_tokenizer,
    read_plan,
    train,
)
from clipworks.methods.pretrain.sources import open_sources, without_words

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
    (source,) = open_sources(plan.data, shop)
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

    class After(Callback):
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


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Twelve pictures in one shard, each with a raw text, a synthetic, a long and a short one."""
    from clipworks.data.shards import write_shards

    rng = np.random.default_rng(0)
    examples = [
        Example(
            f"{i:03}",
            image=rng.integers(0, 256, (16, 16, 3), np.uint8),
            texts={
                "alt": f"ox {i}",
                "synthetic": f"drawn ox {i}",
                "long": f"this is the long story of ox {i}, who went on and on and on until the evening came",
                "short": f"story {i}",
            },
        )
        for i in range(12)
    ]
    write_shards(examples, tmp_path / "data" / "told")
    return tmp_path / "data"


def short(**changes: Any) -> dict[str, Any]:
    recipe = {"steps": 4, "warmup": 1, "precision": "fp32"}
    data = [{"kind": "pairs", "path": "told", "per_batch": 6}]
    return {"evaluation": None, "data": data, "recipe": recipe, **changes}


@pytest.mark.parametrize("name", ["clip", "cloob", "m2mix", "alip", "longclip"])
def test_a_plan_reads_the_texts_of_its_objective(told: Path, tmp_path: Path, name: str) -> None:
    options = {"components": 2} if name == "longclip" else {}
    plan = read_plan(write(tmp_path, **short(objective={"name": name, **options})))
    objective = objective_of(plan)
    sources = open_sources(plan.data, told, objective.texts)
    tokenizer = open_tokenizer(plan.tokenizer, sources, 16, wanted=objective.texts)
    clip = objective.prepare(fresh_clip(plan, tokenizer))
    batch = next(iter(open_loader(plan, sources, clip, objective.texts)))
    assert set(batch.texts) == set(objective.texts)
    if name == "longclip":
        assert batch.texts["long"].ids.shape[1] > 16
    assert train(plan, told, tmp_path / "run", show="nothing").step == 4


def test_rewrites_of_a_file_are_drawn_beside_the_caption(told: Path, tmp_path: Path) -> None:
    lines = [{"key": f"{i:03}", "pool": "chat", "seed": 0, "text": f"somebody met ox {i}"} for i in range(12)]
    (told / "rewrites.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{}, *lines[1:]]))
    data = [{"kind": "pairs", "path": "told", "per_batch": 6, "rewrites": "rewrites.jsonl"}]
    plan = read_plan(write(tmp_path, **short(objective="laclip", data=data)))
    (source,) = open_sources(plan.data, told, objective_of(plan).texts)
    assert source[3].texts["rewrite"] == ["ox 3", "somebody met ox 3"]
    # Picture 0 has no rewrites: another stands in for it.
    assert train(plan, told, tmp_path / "run", show="nothing").step == 4


def test_a_world_says_itself_in_other_words(tmp_path: Path) -> None:
    plan = read_plan(
        write(tmp_path, **short(objective="laclip", data=[{"kind": "world", "per_batch": 4, "examples": 8}]))
    )
    (source,) = open_sources(plan.data, tmp_path, objective_of(plan).texts)
    caption, other = list(source[0].texts["rewrite"])
    assert caption == source[0].texts["alt"] != other


def test_a_stream_trains_and_goes_on_where_it_was(told: Path, tmp_path: Path) -> None:
    from clipworks.engine.checkpoints import Saving

    data = [{"kind": "stream", "path": "told", "per_batch": 4, "examples": 12}]
    plan = read_plan(write(tmp_path, **short(data=data, tokenizer={"kind": "clip"})))
    whole = train(plan, told, tmp_path / "whole", show="nothing")

    class Stop(Exception):
        pass

    class After(Callback):
        def on_step(self, state: Any) -> None:
            if state.step == 2:
                raise Stop

    with pytest.raises(Stop):
        train(plan, told, tmp_path / "cut", show="nothing", callbacks=[After()], saving=Saving(steps=1))
    again = train(plan, told, tmp_path / "cut", show="nothing")
    for name, weight in whole.clip.state_dict().items():
        assert torch.equal(weight, again.clip.state_dict()[name]), name


def test_a_stream_is_neither_mixed_nor_asked_for_labels_or_words(told: Path, tmp_path: Path) -> None:
    stream = {"kind": "stream", "path": "told", "per_batch": 4}
    clip = {"kind": "clip"}
    mixed = [stream, {"kind": "pairs", "path": "told"}]
    with pytest.raises(ConfigError, match="cannot be mixed"):
        train(read_plan(write(tmp_path, **short(data=mixed, tokenizer=clip))), told, tmp_path / "run")
    with pytest.raises(ConfigError, match="no tokenizer is trained on a stream"):
        train(read_plan(write(tmp_path, **short(data=[stream]))), told, tmp_path / "run")
    labeled = [{**stream, "unique_labels": True}]
    with pytest.raises(ConfigError, match="no labels"):
        train(read_plan(write(tmp_path, **short(data=labeled, tokenizer=clip))), told, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_of_an_objective_are_its_own(told: Path, tmp_path: Path) -> None:
    def asked(**objective: Any) -> Any:
        return objective_of(read_plan(write(tmp_path, **short(objective=objective))))

    assert asked(name="alip", gamma_pair=0.5).gamma_pair == 0.5
    with pytest.raises(ConfigError, match="did you mean gamma_pair"):
        asked(name="alip", gama_pair=0.5)
    with pytest.raises(ConfigError, match="has one beside its options"):
        asked(gamma_pair=0.5)


def test_a_teacher_is_named_and_must_read_the_same_token_ids(told: Path, tmp_path: Path) -> None:
    objective = {"name": "tinyclip", "teacher": "seedling"}
    plan = read_plan(write(tmp_path, **short(objective=objective, recipe={"steps": 2, "precision": "fp32"})))
    assert train(plan, told, tmp_path / "run", init="seedling", show="nothing").step == 2
    with pytest.raises(ConfigError, match="token"):
        train(plan, told, tmp_path / "other", show="nothing")
