"""Against transformers: tiny random models read with the same answers, and written back so that it agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoints.conftest import edit, lively, same_weights, small, small_siglip
from torch import Tensor

import clipworks
from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer, FileTokenizer, Tokens, train_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-5
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 12,
    "eos_token_id": 63,
    "bos_token_id": 62,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "size": {"shortest_edge": 32},
    "crop_size": 32,
}
CLIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "one activation a tower": {"text": {"hidden_act": "gelu_new"}, "vision": {"hidden_act": "quick_gelu"}},
    "the end is the largest id": {"text": {"eos_token_id": 2}},
    "odd geometry": {
        "text": {
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "hidden_size": 24,
            "num_attention_heads": 3,
        },
        "vision": {
            "num_hidden_layers": 1,
            "intermediate_size": 100,
            "hidden_size": 40,
            "num_attention_heads": 5,
            "patch_size": 16,
        },
        "projection_dim": 7,
    },
    "eps": {"text": {"layer_norm_eps": 1e-3}, "vision": {"layer_norm_eps": 1e-2}},
}
SIGLIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "odd geometry": {
        "text": {"num_hidden_layers": 1, "intermediate_size": 40},
        "vision": {"num_hidden_layers": 3, "intermediate_size": 100, "num_attention_heads": 4},
    },
}


def theirs(kind: str, changes: dict[str, Any]) -> Any:
    """A model of transformers in which every weight shows in the answer."""
    config_class, model_class = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }[kind]
    options = {
        "text_config": TEXT | changes.get("text", {}),
        "vision_config": VISION | changes.get("vision", {}),
    }
    if kind == "clip":
        options["projection_dim"] = changes.get("projection_dim", 16)
    model = model_class(config_class(**options)).eval()
    lively(model, seed=len(str(changes)))
    return model


def write(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return clip_processor(folder)


def clip_processor(folder: Path) -> Path:
    (folder / "preprocessor_config.json").write_text("{}")
    edit(folder / "preprocessor_config.json", PROCESSOR)
    return folder


def inputs(kind: str, seed: int = 0) -> tuple[Tensor, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 3, 32, 32, generator=generator)
    ids = torch.randint(3, 62, (5, 12), generator=generator)
    ends = torch.tensor([11, 3, 7, 1, 5])
    if kind == "siglip":
        return pixels, Tokens(ids, torch.full((5,), 11))
    ids[torch.arange(5), ends] = 63
    return pixels, Tokens(ids, ends)


@torch.no_grad()
def difference(clip: Clip, model: Any, kind: str) -> float:
    """The largest difference between unit vectors and logits of the two."""
    pixels, tokens = inputs(kind)
    answer = model(input_ids=tokens.ids, pixel_values=(pixels - clip.image.mean) / clip.image.std)
    image, text = clip(pixels, tokens)
    logits = (clip.logits(image, text) - answer.logits_per_image).abs().max() / clip.scale.exp()
    return float(
        max((image - answer.image_embeds).abs().max(), (text - answer.text_embeds).abs().max(), logits)
    )


@pytest.mark.parametrize("changes", CLIPS.values(), ids=CLIPS)
def test_a_clip_of_transformers_answers_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    model = theirs("clip", changes)
    clip = clipworks.load(write(model, tmp_path), tokenizer=False)
    assert difference(clip, model, "clip") < TOLERANCE
    assert clip.config.image.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize("changes", SIGLIPS.values(), ids=SIGLIPS)
def test_a_siglip_of_transformers_answers_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    model = theirs("siglip", changes)
    clip = clipworks.load(write(model, tmp_path), tokenizer=False)
    assert difference(clip, model, "siglip") < TOLERANCE
    assert clip.bias is not None


@pytest.mark.parametrize("how", ["one file", "shards", "pickle", "pickled shards"])
def test_every_way_of_keeping_weights_reads_the_same(how: str, tmp_path: Path) -> None:
    model = theirs("clip", {})
    if how == "shards":
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    elif how == "one file":
        model.save_pretrained(tmp_path)
    else:
        model.config.save_pretrained(tmp_path)
        weights = model.state_dict()
        halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
        if how == "pickle":
            torch.save(weights, tmp_path / "pytorch_model.bin")
        else:
            places = {}
            for number, half in enumerate(halves):
                torch.save(half, tmp_path / f"part-{number}.bin")
                places |= dict.fromkeys(half, f"part-{number}.bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
            # Names hold dots, so the map is put in whole.
            edit(tmp_path / "pytorch_model.bin.index.json", {"weight_map": places})
    clip = clipworks.load(clip_processor(tmp_path), tokenizer=False)
    assert difference(clip, model, "clip") < TOLERANCE


@pytest.mark.parametrize("name", ["quick_gelu", "gelu", "gelu_tanh"])
def test_what_is_written_for_transformers_answers_the_same_there(name: str, tmp_path: Path) -> None:
    clip = small(name)
    clip.save_pretrained_hf(tmp_path)
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert difference(clip, model, "clip") < TOLERANCE
    assert same_weights(clipworks.load(tmp_path, tokenizer=False), clip)


def test_a_siglip_written_for_transformers_answers_the_same_there(tmp_path: Path) -> None:
    clip = small_siglip()
    clip.save_pretrained_hf(tmp_path)
    model = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    assert difference(clip, model, "siglip") < TOLERANCE
    assert same_weights(clipworks.load(tmp_path, tokenizer=False), clip)


def test_weights_go_round_through_every_tool_bit_for_bit(tmp_path: Path) -> None:
    clip = small("gelu")
    first = clip.save_open_clip(tmp_path / "open_clip")
    second = clipworks.load(first, tokenizer=False).save_pretrained_hf(tmp_path / "transformers")
    transformers.CLIPModel.from_pretrained(second).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_bytes(
        (second / "preprocessor_config.json").read_bytes()
    )
    third = clipworks.load(tmp_path / "theirs", tokenizer=False).save(tmp_path / "own")
    back = clipworks.load(third, tokenizer=False)
    assert same_weights(back, clip)
    assert (back.config.image, back.config.text) == (clip.config.image, clip.config.text)


WORDS = ["a photo of a cat.", "Two dogs,  on a BEACH!", "naïve café — 東京 2024", "don't stop", ""]


def test_clips_tokenizer_written_for_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    blocks = uniform_blocks(1, 8, 1)
    text = TextConfig(77, 49408, 8, blocks, "quick_gelu")
    clip = Clip.from_config(Config(8, VisionConfig(32, 16, 8, blocks, "quick_gelu"), text), ClipTokenizer())
    clip.save_pretrained_hf(tmp_path)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    ours = clip.tokenizer(WORDS)
    for row, words in enumerate(WORDS):
        assert tokenizer(words)["input_ids"] == ours.ids[row, : ours.ends[row] + 1].tolist()
    assert isinstance(clipworks.load(tmp_path).tokenizer, ClipTokenizer)


def test_pictures_are_prepared_there_as_here(tmp_path: Path) -> None:
    small().save_pretrained_hf(tmp_path)
    pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = clipworks.load(tmp_path, tokenizer=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8))
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    ours = (clip.preprocessing(picture).float() / 255 - clip.image.mean) / clip.image.std
    # Their longer side may be rounded where the reference truncates, hence a tolerance and not equality.
    assert float((ours - theirs).abs().median()) < 0.02


@pytest.mark.parametrize("clean", ["clip", "lower", "none", "siglip"])
def test_a_tokenizer_of_its_own_gives_the_same_ids_in_transformers(clean: str, tmp_path: Path) -> None:
    made = train_tokenizer(
        ["two dogs on a beach", "a photo of a cat", "don't stop 2024"] * 3, 300, context_length=12
    )
    made.save(tmp_path / "made")
    tokenizer = FileTokenizer(
        tmp_path / "made" / "tokenizer.json", context_length=12, start=made.start, end=made.end, clean=clean
    )
    clip = small(vocabulary=tokenizer.vocab_size)
    clip.tokenizer = tokenizer
    folder = clip.save_pretrained_hf(tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["two dogs", "A Photo of  a cat, again", "don't"]
    for text in texts:
        tokens = tokenizer(text)
        assert loaded(text, truncation=True)["input_ids"] == tokens.ids[0].tolist()
    back = clipworks.load(folder)
    assert torch.equal(back.tokenizer(texts).ids, tokenizer(texts).ids)
    assert same_weights(back, clip)


def test_statistics_come_from_the_newer_kind_of_processor_too(tmp_path: Path) -> None:
    theirs("clip", {}).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    edit(tmp_path / "processor_config.json", {"image_processor": PROCESSOR})
    assert clipworks.load(tmp_path, tokenizer=False).config.image.std == (0.2, 0.3, 0.4)


def test_defaults_of_the_format_hold_where_a_config_leaves_keys_out(tmp_path: Path) -> None:
    model = theirs("clip", {"text": {"layer_norm_eps": 1e-5}})
    write(model, tmp_path)
    edit(
        tmp_path / "config.json",
        {"text_config.hidden_act": ..., "vision_config.hidden_act": ..., "vision_config.layer_norm_eps": ...},
    )
    clip = clipworks.load(tmp_path, tokenizer=False)
    assert difference(clip, model, "clip") < TOLERANCE and clip.config.image.activation == "quick_gelu"
