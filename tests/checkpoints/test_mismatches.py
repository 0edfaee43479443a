"""Weights that meet the wrong activation, statistics, size, vocabulary or config: an error each time.

Every case begins with a folder or a file that loads, spoils one thing, and expects one line that names the
file and the key or tensor.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints.conftest import edit, openai_weights, same_weights, small, small_siglip

import clipworks
from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer, train_tokenizer
from clipworks.errors import CheckpointError, ModelNotFound

Spoil = Callable[[Path], Any]


def transformers(folder: Path) -> Path:
    return small().save_pretrained_hf(folder)


def siglip(folder: Path) -> Path:
    return small_siglip().save_pretrained_hf(folder)


def open_clip(folder: Path) -> Path:
    return small().save_open_clip(folder)


def own(folder: Path) -> Path:
    return small().save(folder)


def own_with_tokenizer(folder: Path) -> Path:
    tokenizer = train_tokenizer(["two dogs on a beach", "a photo of a cat"] * 3, 300, context_length=12)
    clip = small(vocabulary=tokenizer.vocab_size)
    clip.tokenizer = tokenizer
    return clip.save(folder)


def transformers_with_tokenizer(folder: Path) -> Path:
    clip = clipworks.load(own_with_tokenizer(folder / "own"))
    clip.save_pretrained_hf(folder)
    shutil.rmtree(folder / "own")
    return folder


def clips_own(folder: Path) -> Path:
    """With CLIP's own vocabulary, in the layout of transformers."""
    blocks = uniform_blocks(1, 8, 1)
    config = Config(
        8, VisionConfig(32, 16, 8, blocks, "quick_gelu"), TextConfig(77, 49408, 8, blocks, "quick_gelu")
    )
    return Clip.from_config(config, ClipTokenizer()).save_pretrained_hf(folder)


def changed(file: str, options: dict[str, Any] | None = None, /, **changes: Any) -> Spoil:
    """Change keys of a JSON file (`__` stands for a dot), and load it with these options."""

    def spoil(folder: Path) -> dict[str, Any]:
        edit(folder / file, {key.replace("__", "."): value for key, value in changes.items()})
        return options or {}

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> Spoil:
    def spoil(folder: Path) -> None:
        weights = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / file)

    return spoil


def told(**options: Any) -> Spoil:
    return lambda folder: options


def other_tokenizer(folder: Path) -> dict[str, Any]:
    """A tokenizer of about as many ids, trained on other texts."""
    other = train_tokenizer(["red bicycles under green trees", "snow over hills"] * 9, 300, context_length=12)
    other.save(folder)
    return FIND


def larger_tokenizer(folder: Path) -> None:
    texts = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}zebra quick brown fox {i}" for i in range(600)]
    train_tokenizer(texts, 900, context_length=12).save(folder)


def swapped_merges(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    lines[100], lines[101] = lines[101], lines[100]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


FIND: dict[str, Any] = {"tokenizer": None}
OPEN = "open_clip_config.json"
PROCESSOR = "preprocessor_config.json"
VISION = "vision_model.embeddings"

CASES: dict[str, tuple[Callable[[Path], Path], Spoil, str]] = {
    # Activation
    "transformers: the caller's activation is another": (
        transformers,
        told(activation="gelu"),
        "activation is gelu in the arguments",
    ),
    "transformers: one tower's activation is another than the caller's": (
        transformers,
        changed("config.json", {"activation": "quick_gelu"}, text_config__hidden_act="gelu"),
        "text_activation is quick_gelu in the arguments, but gelu in",
    ),
    "open_clip: the caller's activation is another": (open_clip, told(activation="gelu"), "activation"),
    "own: the caller's activation is another": (own, told(activation="gelu"), "activation"),
    "own: a relative with another activation": (
        own,
        told(like="ViT-B-32/laion2b_s34b_b79k"),
        "activation is",
    ),
    "transformers: an activation that nobody knows": (
        transformers,
        changed("config.json", vision_config__hidden_act="swish"),
        "hidden_act is 'swish'",
    ),
    "open_clip: an activation with options": (
        open_clip,
        changed(OPEN, model_cfg__text_cfg__act_kwargs={"approximate": "tanh"}),
        "act_kwargs",
    ),
    "transformers: old and new config contradict each other": (
        transformers,
        changed("config.json", text_config_dict={"hidden_act": "gelu"}),
        "hidden_act is quick_gelu in text_config",
    ),
    # Statistics and pictures
    "transformers: the caller's statistics are others": (transformers, told(statistics="half"), "mean is"),
    "open_clip: the caller's statistics are others": (open_clip, told(statistics="half"), "mean is"),
    "own: the caller's statistics are others": (own, told(statistics="half"), "mean is"),
    "transformers: no statistics at all": (
        transformers,
        lambda folder: (folder / PROCESSOR).unlink(),
        "does not say mean and deviation",
    ),
    "open_clip: no statistics at all": (
        open_clip,
        changed(OPEN, preprocess_cfg=...),
        "does not say mean and deviation",
    ),
    "transformers: two channels of statistics": (
        transformers,
        changed(PROCESSOR, image_mean=[0.5, 0.5]),
        "image_mean",
    ),
    "transformers: pixels are not normalized": (
        transformers,
        changed(PROCESSOR, do_normalize=False),
        "do_normalize",
    ),
    "transformers: pixels are scaled otherwise": (
        transformers,
        changed(PROCESSOR, rescale_factor=1 / 127.5),
        "rescale_factor",
    ),
    "transformers: resized to more than is cropped": (
        transformers,
        changed(PROCESSOR, size={"shortest_edge": 40}),
        "crop_size",
    ),
    "transformers: pictures of another size": (
        transformers,
        changed(PROCESSOR, size={"shortest_edge": 64}, crop_size=64),
        "size is 64",
    ),
    "open_clip: an unknown way of resizing": (
        open_clip,
        changed(OPEN, preprocess_cfg__resize_mode="stretch"),
        "stretch",
    ),
    "own: pictures prepared for another size": (
        own,
        lambda folder: (folder / "preprocessing.json").write_text('{"image_size": 64}'),
        "image_size 64",
    ),
    # Image size and geometry
    "transformers: image size": (
        transformers,
        changed("config.json", vision_config__image_size=64),
        "vision_config.image_size is 64",
    ),
    "transformers: patch size": (
        transformers,
        changed("config.json", vision_config__patch_size=16),
        "patch_size",
    ),
    "transformers: heads": (
        transformers,
        changed("config.json", vision_config__num_attention_heads=3),
        "3 heads",
    ),
    "transformers: depth": (
        transformers,
        changed("config.json", vision_config__num_hidden_layers=3),
        "num_hidden_layers is 3",
    ),
    "transformers: width": (
        transformers,
        changed("config.json", text_config__hidden_size=64),
        "text_config.hidden_size is 64",
    ),
    "transformers: MLP": (
        transformers,
        changed("config.json", text_config__intermediate_size=64),
        "intermediate_size is 64",
    ),
    "transformers: projection": (
        transformers,
        changed("config.json", projection_dim=32),
        "projection_dim is 32",
    ),
    "transformers: another kind of model": (
        transformers,
        changed("config.json", model_type="siglip"),
        "siglip",
    ),
    "transformers: a kind that is not read": (
        transformers,
        changed("config.json", model_type="altclip"),
        "altclip",
    ),
    "siglip: read as a CLIP": (
        siglip,
        changed("config.json", model_type="clip"),
        "model_type siglip is False",
    ),
    "siglip: its head left out": (
        siglip,
        changed("config.json", vision_config__vision_use_head=False),
        "head",
    ),
    "open_clip: image size": (
        open_clip,
        changed(OPEN, model_cfg__vision_cfg__image_size=64),
        "image_size is 64",
    ),
    "open_clip: embedding width": (open_clip, changed(OPEN, model_cfg__embed_dim=8), "embed_dim is 8"),
    "open_clip: text depth": (
        open_clip,
        changed(OPEN, model_cfg__text_cfg__layers=5),
        "text_cfg.layers is 5",
    ),
    "open_clip: a bias of the logits": (
        open_clip,
        changed(OPEN, model_cfg__init_logit_bias=-10),
        "init_logit_bias",
    ),
    "open_clip: an option we do not have": (
        open_clip,
        changed(OPEN, model_cfg__vision_cfg__qk_norm=True),
        "qk_norm",
    ),
    "open_clip: an unknown key": (open_clip, changed(OPEN, model_cfg__vision_cfg__mystery=1), "mystery"),
    "own: image size": (own, changed("config.json", image__image_size=64), "positions"),
    "own: an unknown key": (own, changed("config.json", image__mystery=1), "mystery"),
    "own: a number that is text": (own, changed("config.json", image__width="wide"), "wide"),
    # Vocabulary and texts
    "transformers: context length": (
        transformers,
        changed("config.json", text_config__max_position_embeddings=16),
        "max_position_embeddings is 16",
    ),
    "transformers: vocabulary": (
        transformers,
        changed("config.json", text_config__vocab_size=65),
        "vocab_size is 65",
    ),
    "transformers: no tokenizer for a vocabulary that is not CLIP's": (
        transformers,
        lambda folder: FIND,
        "tokenizer=False",
    ),
    "transformers: texts end otherwise": (
        transformers_with_tokenizer,
        changed("config.json", text_config__eos_token_id=7),
        "the config says 7",
    ),
    "transformers: texts do not end": (
        transformers_with_tokenizer,
        changed("tokenizer.json", post_processor=None),
        "how a text ends",
    ),
    "transformers: CLIP's tokenizer with two merges swapped": (
        clips_own,
        swapped_merges,
        "not CLIP's vocabulary",
    ),
    "own: another tokenizer of the same kind": (own_with_tokenizer, other_tokenizer, "not the tokenizer"),
    "own: a larger tokenizer": (own_with_tokenizer, larger_tokenizer, "not the tokenizer"),
    "own: its tokenizer is gone": (
        own_with_tokenizer,
        lambda folder: (folder / "tokenizer_settings.json").unlink(),
        "tokenizer_settings.json",
    ),
    "own: its tokenizer cleans otherwise": (
        own_with_tokenizer,
        changed("tokenizer_settings.json", clean="none"),
        "not the tokenizer",
    ),
    "open_clip: another tokenizer than CLIP's beside": (open_clip, other_tokenizer, "not CLIP's vocabulary"),
    # Tensors
    "a tensor is missing": (
        transformers,
        tensors(lambda w: w.pop("text_projection.weight")),
        "text_projection.weight",
    ),
    "a block is missing in the middle": (
        transformers,
        tensors(lambda w: [w.pop(n) for n in list(w) if "vision_model.encoder.layers.0." in n]),
        "layers.0",
    ),
    "a tensor is too many": (transformers, tensors(lambda w: w.update(extra=torch.zeros(1))), "extra"),
    "a tensor is bent": (
        transformers,
        tensors(lambda w: w.update({"visual_projection.weight": torch.zeros(16, 31)})),
        "visual_projection.weight",
    ),
    "a value is not a number": (
        transformers,
        tensors(lambda w: w["text_model.final_layer_norm.bias"].fill_(float("nan"))),
        "text_model.final_layer_norm.bias",
    ),
    "a value is infinite": (
        own,
        tensors(lambda w: w["text.ln_final.weight"].fill_(float("inf"))),
        "text.ln_final.weight",
    ),
    "places that are no square": (
        transformers,
        tensors(lambda w: w.update({f"{VISION}.position_embedding.weight": torch.zeros(16, 32)})),
        "no square",
    ),
    "own: a tensor is missing": (own, tensors(lambda w: w.pop("image.class_token")), "image.class_token"),
    "own: a tensor is bent": (
        own,
        tensors(lambda w: w.update({"image.class_token": torch.zeros(3)})),
        "image.class_token",
    ),
}


WITH_TOKENIZER = (own_with_tokenizer, transformers_with_tokenizer, clips_own)


@pytest.mark.parametrize(("make", "spoil", "says"), CASES.values(), ids=CASES)
def test_a_mismatch_is_one_clear_error(make: Any, spoil: Spoil, says: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    # The small models have no tokenizer, but those that are about one.
    options: dict[str, Any] = {"tokenizer": None if make in WITH_TOKENIZER else False}
    clipworks.load(folder, **options)
    more = spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        clipworks.load(folder, **(options | (more if isinstance(more, dict) else {})))
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    assert says in message, message


def test_there_are_more_than_thirty_of_them() -> None:
    assert len(CASES) > 30


def test_a_fine_tune_saved_without_its_activation_is_not_read_with_a_guessed_one(bare: Any) -> None:
    """The mistake that has spoiled published results: OpenAI's weights, tuned, saved, read later as GELU."""
    tuned = small("quick_gelu")
    path = bare(tuned)
    for options in ({}, {"statistics": "clip", "heads": (2, 2)}):
        with pytest.raises(CheckpointError, match="the file does not say its activation") as caught:
            clipworks.load(path, tokenizer=False, **options)
        assert 'activation="quick_gelu" or "gelu"' in str(caught.value) and "like=" in str(caught.value)
    clip = clipworks.load(path, activation="quick_gelu", statistics="clip", heads=(2, 2), tokenizer=False)
    assert same_weights(clip, tuned) and clip.config.image == tuned.config.image


def test_a_bare_file_says_neither_its_statistics_nor_its_heads(bare: Any) -> None:
    path = bare()
    with pytest.raises(CheckpointError, match="mean and deviation of its pictures"):
        clipworks.load(path, activation="gelu", heads=(2, 2), tokenizer=False)
    with pytest.raises(CheckpointError, match="into how many heads"):
        clipworks.load(path, activation="gelu", statistics="clip", tokenizer=False)
    with pytest.raises(CheckpointError, match="pass tokenizer="):
        clipworks.load(path, activation="gelu", statistics="clip", heads=(2, 2))
    with pytest.raises(CheckpointError, match="cannot be cut into 3 heads"):
        clipworks.load(path, activation="gelu", statistics="clip", heads=(3, 2), tokenizer=False)


def test_a_relative_must_have_the_same_geometry(bare: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be cut into 12 heads"):
        clipworks.load(bare(), like="ViT-B-32/openai", tokenizer=False)
    with pytest.raises(
        CheckpointError, match=r"width is 512 in like='ViT-B-32/openai', but the weights have 16"
    ):
        clipworks.load(bare(small(width=48)), like="ViT-B-32/openai", tokenizer=False)
    with pytest.raises(ModelNotFound, match="did you mean ViT-B-32/openai"):
        clipworks.load(bare(), like="ViT-B-32/opnai")


def test_a_relative_answers_for_everything_but_sizes(bare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine-tune at another image size, named after the model that it came from."""
    from dataclasses import replace

    from clipworks.checkpoints.known import MODELS

    tuned = small("quick_gelu")
    original = replace(tuned.config, image=replace(tuned.config.image, image_size=64))
    monkeypatch.setitem(MODELS, "small/original", replace(MODELS["ViT-B-32/openai"], config=original))
    clip = clipworks.load(bare(tuned), like="small/original", tokenizer=False)
    assert same_weights(clip, tuned) and clip.config.image.activation == "quick_gelu"
    with pytest.raises(CheckpointError, match="activation is gelu in the arguments, but quick_gelu in like="):
        clipworks.load(bare(tuned), like="small/original", activation="gelu", tokenizer=False)


def test_half_precision_weights_are_read_exactly(tmp_path: Path) -> None:
    clip = small()
    halves = {name: tensor.half() for name, tensor in openai_weights(clip).items()}
    torch.save(halves, tmp_path / "half.pt")
    read = clipworks.load(
        tmp_path / "half.pt", activation="quick_gelu", statistics="clip", heads=(2, 2), tokenizer=False
    )
    assert all(tensor.dtype == torch.float32 for tensor in read.state_dict().values())
    exact = {name: tensor.half().float() for name, tensor in clip.state_dict().items()}
    assert all(torch.equal(read.state_dict()[name], exact[name]) for name in exact)


def test_arguments_that_cannot_be_are_said_to_be_so(bare: Any) -> None:
    path = bare()
    for options, says in (
        ({"activation": "relu"}, "relu"),
        ({"statistics": "imagenet"}, "imagenet"),
        ({"statistics": ((1, 2), (1, 2, 3))}, "statistics"),
        ({"heads": (0, 2)}, "heads"),
    ):
        with pytest.raises(clipworks.ClipworksError, match=re.escape(says)):
            clipworks.load(path, **options)  # type: ignore[arg-type]
