"""Names: known models, repositories of the hub (from a small server here), files, folders, wrong ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tests.checkpoints.conftest import openai_weights, same_weights, small, small_siglip
from tests.checkpoints.hub_server import Hub, serve

import clipworks
from clipworks.checkpoints import hub as ours
from clipworks.checkpoints import known, layouts, own, rules, zoo
from clipworks.checkpoints.configs import open_clip
from clipworks.checkpoints.settings import HALF
from clipworks.core.config import VisionConfig
from clipworks.core.tokenizer import FileTokenizer, train_tokenizer
from clipworks.errors import CheckpointError, ConfigError, ModelNotFound


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, with an empty cache."""
    served = Hub()
    with serve(served) as address:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # What arrives is kept in pieces of this size, far below the size of the small files here.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 8192)
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        yield served


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def files_asked(served: Hub) -> set[str]:
    return {
        line.rpartition("/")[2] for line in served.asked if line.startswith("GET") and "/resolve/" in line
    }


@pytest.fixture
def known_small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A known model that is small."""
    config = replace(small().config, name="ViT-T-8/test")
    entry = replace(
        known.MODELS["ViT-B-32/openai"], name="ViT-T-8/test", repository="timm/tiny", config=config
    )
    monkeypatch.setitem(known.MODELS, "ViT-T-8/test", entry)
    return "ViT-T-8/test"


def test_a_known_name_brings_all_settings_and_downloads_the_weights_only(
    hub: Hub, known_small: str, tmp_path: Path
) -> None:
    hub.add("timm/tiny", small().save_open_clip(tmp_path / "tiny"))
    clip = clipworks.load(known_small, tokenizer=False)
    assert same_weights(clip, small()) and clip.config == replace(small().config, name=known_small)
    assert files_asked(hub) == {"open_clip_model.safetensors"}
    hub.asked.clear()
    assert same_weights(clipworks.load(known_small, tokenizer=False), clip)
    assert files_asked(hub) == set()  # from the cache


def test_the_older_file_is_taken_where_there_is_no_newer_one(
    hub: Hub, known_small: str, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    torch.save(openai_weights(small()), tmp_path / "tiny" / "open_clip_pytorch_model.bin")
    hub.add("timm/tiny", tmp_path / "tiny")
    assert same_weights(clipworks.load(known_small, tokenizer=False), small())


def test_a_known_name_whose_file_has_another_geometry_is_an_error(
    hub: Hub, known_small: str, tmp_path: Path
) -> None:
    hub.add("timm/tiny", small(width=48).save_open_clip(tmp_path / "tiny"))
    with pytest.raises(CheckpointError, match=r"image\.width is 32 in the table of known models"):
        clipworks.load(known_small, tokenizer=False)


@pytest.mark.parametrize("layout", ["transformers", "open_clip", "own", "shards"])
def test_a_repository_is_read_in_every_layout(
    layout: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    if layout == "shards":
        transformers = pytest.importorskip("transformers")
        small().save_pretrained_hf(tmp_path / "whole")
        model = transformers.CLIPModel.from_pretrained(tmp_path / "whole")
        model.save_pretrained(folder, max_shard_size="40KB")
        shutil.copy(tmp_path / "whole" / "preprocessor_config.json", folder)
    else:
        clip = small()
        {"transformers": clip.save_pretrained_hf, "open_clip": clip.save_open_clip, "own": clip.save}[layout](
            folder
        )
    (folder / "README.md").write_text("not needed")
    (folder / "flax_model.msgpack").write_bytes(b"not needed")
    (folder / "modeling.py").write_text("raise SystemExit")
    hub.add("someone/clip", folder)
    assert same_weights(clipworks.load("someone/clip", tokenizer=False), small())
    assert not files_asked(hub) & {"README.md", "flax_model.msgpack", "modeling.py"}
    offline(monkeypatch)
    assert same_weights(clipworks.load("hf-hub:someone/clip", tokenizer=False), small())


def test_a_siglip_repository_brings_its_tokenizer(hub: Hub, tmp_path: Path) -> None:
    made = train_tokenizer(["two dogs on a beach", "a photo of a cat"] * 3, 300, context_length=12)
    made.save(tmp_path / "made")
    source = tmp_path / "made" / "tokenizer.json"
    tokenizer = FileTokenizer(source, context_length=12, end=made.end, pad=0, pad_full=True, clean="siglip")
    clip = small_siglip(vocabulary=tokenizer.vocab_size)
    clip.tokenizer = tokenizer
    hub.add("google/tiny", clip.save_pretrained_hf(tmp_path / "tiny"))
    read = clipworks.load("google/tiny")
    texts = ["Two dogs!", "a cat, a beach"]
    assert torch.equal(read.tokenizer(texts).ids, tokenizer(texts).ids)
    assert torch.equal(read.embed_texts(texts), clip.embed_texts(texts))


def test_a_known_siglip_brings_its_tokenizer_too(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train_tokenizer(["two dogs on a beach", "a photo of a cat"] * 3, 300, context_length=12)
    made.save(tmp_path / "made")
    source = tmp_path / "made" / "tokenizer.json"
    tokenizer = FileTokenizer(source, context_length=12, end=made.end, pad=0, pad_full=True, clean="siglip")
    clip = small_siglip(vocabulary=tokenizer.vocab_size)
    clip.tokenizer = tokenizer
    # What transformers needs of the tokenizer, and the weights in open_clip's names.
    folder = clip.save_pretrained_hf(tmp_path / "tiny")
    weights = rules.write(layouts.rules("siglip", clip.config), clip.state_dict())
    save_file(weights, folder / "open_clip_model.safetensors")
    hub.add("timm/tiny", folder)
    entry = replace(
        known.MODELS["ViT-B-16-SigLIP/webli"], name="tiny/webli", repository="timm/tiny", config=clip.config
    )
    monkeypatch.setitem(known.MODELS, "tiny/webli", entry)
    read = clipworks.load("tiny/webli")
    texts = ["Two dogs!", "a cat, a beach"]
    assert torch.equal(read.embed_texts(texts), clip.embed_texts(texts))
    assert files_asked(hub) == {"open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, tmp_path / file)
    save_file(weights, tmp_path / "tuned.safetensors")
    assert torch.equal(
        clipworks.load(tmp_path / "tuned.safetensors", like="tiny/webli").embed_texts(texts),
        read.embed_texts(texts),
    )


def test_a_revision_of_what_is_here_already_is_an_error(tmp_path: Path) -> None:
    for name in (small().save(tmp_path / "model"), "seedling"):
        with pytest.raises(ConfigError, match="revision='v1' is for repositories"):
            clipworks.load(name, revision="v1")


def test_a_revision_is_pinned(hub: Hub, tmp_path: Path) -> None:
    hub.add("someone/clip", small(seed=0).save_open_clip(tmp_path / "new"))
    hub.add("someone/clip", small(seed=5).save_open_clip(tmp_path / "old"), revision="v1")
    assert same_weights(clipworks.load("someone/clip", tokenizer=False), small(seed=0))
    assert same_weights(clipworks.load("someone/clip", revision="v1", tokenizer=False), small(seed=5))
    with pytest.raises(ModelNotFound, match="has no revision 'v2'"):
        clipworks.load("someone/clip", revision="v2", tokenizer=False)


def test_a_download_that_breaks_off_is_resumed(hub: Hub, known_small: str, tmp_path: Path) -> None:
    hub.add("timm/tiny", small().save_open_clip(tmp_path / "tiny"))
    hub.break_after = 40_000
    try:
        clip = clipworks.load(known_small, tokenizer=False)
    except CheckpointError:
        clip = clipworks.load(known_small, tokenizer=False)
    assert same_weights(clip, small())
    assert hub.ranges and hub.ranges[0] != "bytes=0-"


def test_offline_a_model_that_is_not_in_the_cache_is_said_to_be_so(
    hub: Hub, known_small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    for name in (known_small, "someone/clip"):
        with pytest.raises(CheckpointError, match=r"not in the cache \(HF_HUB_OFFLINE is set\)") as caught:
            clipworks.load(name)
        assert "\n" not in str(caught.value)


def test_a_repository_that_is_not_there_or_holds_no_clip(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.add("someone/empty", tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no weights in a layout"):
        clipworks.load("someone/empty")
    with pytest.raises(ModelNotFound, match="no model 'nobody/nothing'"):
        clipworks.load("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ViT-B-32/opnai", "did you mean ViT-B-32/openai"),
        ("vit-b-32/openai", "did you mean ViT-B-32/openai"),
        ("ViT-B-32", "did you mean ViT-B-32"),
        ("sedling", "did you mean seedling"),
        ("./run/clip", "no such file or folder"),
        ("/nowhere/model.pt", "no such file or folder"),
        ("epoch_5.pt", "no such file or folder"),
        ("a model", "no model 'a model'"),
        ("", "no model ''"),
    ],
)
def test_an_unknown_name_says_the_nearest(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours, "listing", lambda *_: (_ for _ in ()).throw(ours._unknown(name)))
    with pytest.raises(ModelNotFound) as caught:
        clipworks.load(name)
    assert says in str(caught.value)


def test_names_with_the_activation_in_them_are_the_same_models() -> None:
    assert known.ALIASES["ViT-B-32-quickgelu/openai"] == "ViT-B-32/openai"
    assert all(name in known.MODELS for name in known.ALIASES.values())
    assert not known.ALIASES.keys() & known.MODELS.keys()


def test_the_table_has_what_it_promises() -> None:
    names = set(known.MODELS)
    openai = {name for name in names if name.endswith("/openai")}
    assert len(openai) == 9 and all(known.MODELS[name].sha256 for name in openai)
    assert all(known.MODELS[name].config.text.activation == "quick_gelu" for name in openai)
    for wanted in ("laion2b", "datacomp", "metaclip", "dfn"):
        assert any(wanted in name for name in names)
    assert known.MODELS["ViT-L-14/laion2b_s32b_b82k"].config.image.mean == HALF
    assert known.MODELS["ViT-B-16-SigLIP/webli"].config.text.context_length == 64


@pytest.mark.parametrize("name", sorted(known.ARCHITECTURES))
def test_parameters_are_counted_without_building_the_model(name: str) -> None:
    config = known.ARCHITECTURES[name]
    assert known.parameters(config) == sum(p.numel() for p in own.skeleton(config).parameters())


def test_models_are_listed_with_sizes() -> None:
    listed = {model.name: model for model in zoo.models()}
    assert next(iter(listed)) == "seedling" and set(listed) == {"seedling", *known.MODELS}
    model = listed["ViT-B-32/openai"]
    assert model.parameters == 151_277_313 and model.megabytes == 605 and model.image_size == 224
    assert model.source == "hub: timm/vit_base_patch32_clip_224.openai"


def test_an_archive_that_openai_published_is_known_by_its_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    from tests.checkpoints.test_safety import save_scripted

    path = save_scripted(tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match="does not say its activation"):
        clipworks.load(path, tokenizer=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = replace(known.MODELS["ViT-B-32/openai"], config=small().config, sha256=digest)
    monkeypatch.setitem(known.MODELS, "ViT-B-32/openai", entry)
    clip = clipworks.load(path, tokenizer=False)
    assert same_weights(clip, small()) and clip.config.name == "ViT-B-32/openai"


def test_a_file_with_its_config_beside_it_is_its_folder(tmp_path: Path) -> None:
    folder = small().save_open_clip(tmp_path / "model")
    assert same_weights(clipworks.load(folder / "open_clip_model.safetensors", tokenizer=False), small())
    folder = small().save(tmp_path / "own")
    assert same_weights(clipworks.load(str(folder / "model.safetensors")), small())


def test_a_folder_without_config_needs_exactly_one_file(tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "activation": "quick_gelu",
        "statistics": "clip",
        "heads": (2, 2),
        "tokenizer": False,
    }
    with pytest.raises(CheckpointError, match="no weights"):
        clipworks.load(tmp_path, **told)
    torch.save(openai_weights(small()), tmp_path / "a.pt")
    assert same_weights(clipworks.load(tmp_path, **told), small())
    torch.save(openai_weights(small()), tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"2 files of weights \(a\.pt, b\.pt\)"):
        clipworks.load(tmp_path, **told)


def test_the_table_says_what_open_clips_own_configs_say(tmp_path: Path) -> None:
    """What open_clip writes for a known architecture is read as the table has it; needs no network."""
    for name in ("ViT-B-32", "ViT-H-14", "ViT-bigG-14", "RN50x64"):
        config = known.ARCHITECTURES[name]
        from clipworks.checkpoints.export import _open_clip_model, _open_clip_pictures
        from clipworks.checkpoints.own import write_json
        from clipworks.checkpoints.settings import from_config

        values = {
            "model_cfg": _open_clip_model(config, None, tmp_path),
            "preprocess_cfg": _open_clip_pictures(config),
        }
        write_json(values, tmp_path / "open_clip_config.json")
        read, table = open_clip(tmp_path / "open_clip_config.json"), from_config(config, "")
        assert (read.settings.image_heads, read.settings.text_heads) == (
            table.settings.image_heads,
            table.settings.text_heads,
        )
        for fact in read.claims.keys() & table.claims.keys():
            assert read.claims[fact][1] == table.claims[fact][1], (name, fact)
        assert (
            not isinstance(config.image, VisionConfig)
            or read.claims["image.mlp"][1] == config.image.blocks[0].mlp_width
        )
