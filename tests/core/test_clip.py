"""Clip as people use it: embeddings, classification, initial weights, copies, and errors for bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipworks.core.clip import Clip
from clipworks.core.config import Config, ResNetConfig, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.initialize import initialize
from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.errors import ConfigError, DataError, PictureError, ShapeError


@pytest.fixture(scope="module")
def clip() -> Clip:
    blocks = uniform_blocks(2, 32, 2)
    config = Config(16, VisionConfig(32, 8, 32, blocks), TextConfig(77, 49408, 32, blocks), name="tiny")
    return Clip.from_config(config, ClipTokenizer(), seed=0)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(40, 33), (32, 32), (90, 50)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


TEXTS = ["a cat", "two dogs on a beach, in the rain", "a"]


def test_embedding_a_folders_pictures_is_the_tower_on_prepared_pixels(
    clip: Clip, pictures: list[Path]
) -> None:
    pixels = torch.stack([clip.preprocessing(path) for path in pictures])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(clip.image(pixels), dim=-1)
    for given_as in (
        pictures,
        iter(pictures),
        [str(path) for path in pictures],
        [Image.open(path) for path in pictures],
        pixels,
    ):
        assert torch.allclose(clip.embed_images(given_as, fast=False), expected, atol=1e-6)
    assert torch.allclose(clip.embed_images(pictures[0]), expected[:1], atol=1e-6)


def test_embeddings_are_unit_vectors_in_fp32(clip: Clip, pictures: list[Path]) -> None:
    for features in (clip.embed_images(pictures), clip.embed_texts(TEXTS)):
        assert features.shape == (3, 16) and features.dtype == torch.float32 and not features.requires_grad
        assert torch.allclose(features.norm(dim=-1), torch.ones(3), atol=1e-6)


def test_embeddings_can_be_used_by_a_head_that_is_trained(clip: Clip, pictures: list[Path]) -> None:
    features = clip.embed_images(pictures)
    assert not features.is_inference()
    head = torch.nn.Linear(16, 2, device="cpu")
    head(features).square().sum().backward()
    assert head.weight.grad is not None
    features.add_(1)  # an inference tensor would refuse


def test_texts_are_embedded_one_by_one_as_together(clip: Clip) -> None:
    together = clip.embed_texts(TEXTS)
    for row, text in zip(together, TEXTS, strict=True):
        assert torch.allclose(clip.embed_texts(text)[0], row, atol=1e-6)
    with torch.no_grad():
        _, plain = clip(torch.zeros(1, 3, 32, 32), clip.tokenizer(TEXTS))
    assert torch.allclose(plain, together, atol=1e-6)


def test_nothing_at_all_embeds_to_nothing(clip: Clip) -> None:
    assert clip.embed_texts([]).shape == (0, 16) and clip.embed_images([]).shape == (0, 16)


def test_embedding_leaves_every_module_in_the_mode_it_was_in(clip: Clip, pictures: list[Path]) -> None:
    twin = copy.deepcopy(clip).train()
    twin.image.blocks[0].eval()
    modes = [module.training for module in twin.modules()]
    twin.embed_images(pictures)
    twin.embed_texts(TEXTS)
    twin.classify(pictures, ["cat", "dog"])
    with pytest.raises(PictureError):
        twin.embed_images("no such picture.jpg")
    assert [module.training for module in twin.modules()] == modes


@given(st.permutations(["a cat", "a dog", "a red house", "snow"]))
def test_probabilities_sum_to_one_and_follow_the_order_of_the_labels(clip: Clip, labels: list[str]) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = clip.classify(pixels, labels)
    assert found.labels == tuple(labels)
    assert torch.allclose(found.probabilities.sum(1), torch.ones(2), atol=1e-6)
    order = [labels.index(label) for label in sorted(labels)]
    sorted_ = clip.classify(pixels, sorted(labels))
    assert torch.allclose(found.probabilities[:, order], sorted_.probabilities, atol=1e-6)
    best = found.top(2)
    assert best[0][0][1] >= best[0][1][1] and best[0][0][0] == labels[int(found.probabilities[0].argmax())]


def test_a_class_is_the_mean_of_its_templates_and_synonyms(clip: Clip) -> None:
    templates = ("a photo of a {}.", "a drawing of a {}.")
    found = clip.class_features([["cat", "kitten"], "dog"], templates)
    texts = [template.replace("{}", name) for name in ("cat", "kitten") for template in templates]
    mean = clip.embed_texts(texts).mean(0)
    assert torch.allclose(found[0], mean / mean.norm(), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2), atol=1e-6)


def test_logits_are_the_scaled_cosines(clip: Clip) -> None:
    image, text = clip.embed_texts(TEXTS), clip.embed_texts(["snow", "rain"])
    with torch.no_grad():
        assert torch.allclose(clip.logits(image, text), (image @ text.T) / 0.07, atol=1e-4)
    sigmoid = Clip.from_config(replace(clip.config, sigmoid=True))
    with torch.no_grad():
        assert torch.allclose(sigmoid.logits(image, text), 10 * (image @ text.T) - 10, atol=1e-4)


def test_bad_input_is_one_clear_error(clip: Clip) -> None:
    for call, error, says in (
        (lambda: clip.classify(torch.zeros(1, 3, 32, 32), []), ConfigError, "at least one label"),
        (lambda: clip.classify(torch.zeros(1, 3, 32, 32), ["cat", " "]), ConfigError, "empty"),
        (
            lambda: clip.classify(torch.zeros(1, 3, 32, 32), ["cat", "dog", "cat"]),
            ConfigError,
            "'cat' is given more than once",
        ),
        (lambda: clip.class_features(["cat"], ["a photo"]), ConfigError, "no {} for the class name"),
        (
            lambda: clip.logits(torch.zeros(1, 16), torch.zeros(1, 8)),
            ShapeError,
            "width 16 and text features of width 8",
        ),
        (lambda: clip.embed_texts(["cat", 3]), DataError, "text 1 is not a string"),
        (lambda: clip.embed_images(torch.zeros(1, 4, 32, 32)), ShapeError, "must be"),
        (lambda: clip.embed_images("nowhere.jpg"), PictureError, "nowhere.jpg"),
        (lambda: clip.embed_images(torch.zeros(1, 3, 32, 32), batch_size=0), ConfigError, "batch_size"),
        (lambda: Clip.from_config(clip.config).embed_texts("a cat"), ConfigError, "no tokenizer"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_copy_has_weights_of_its_own_and_the_same_tokenizer(clip: Clip) -> None:
    twin = copy.deepcopy(clip)
    assert twin.tokenizer is clip.tokenizer and twin.config == clip.config
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    for (name, ours), theirs in zip(clip.named_parameters(), twin.parameters(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr() and not torch.equal(ours, theirs), name
    assert (
        isinstance(twin.image.blocks[0], type(clip.image.blocks[0]))
        and twin.image.mean is not clip.image.mean
    )


def test_the_same_seed_gives_the_same_weights_and_touches_no_global_generator(
    clip: Clip, untouched_rng: None
) -> None:
    first, second, other = (Clip.from_config(clip.config, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(
        torch.equal(first[name], second[name]) and bool(torch.isfinite(first[name]).all()) for name in first
    )
    drawn = [name for name in first if first[name].ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("vision", ["vit", "resnet", "siglip"])
def test_the_initial_weights_have_the_papers_deviations(vision: str, untouched_rng: None) -> None:
    width, depth = 96, 3
    blocks = uniform_blocks(depth, width, 2)
    images: dict[str, Any] = {
        "vit": VisionConfig(32, 8, width, blocks),
        "siglip": VisionConfig(
            32,
            8,
            width,
            blocks,
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            pooling="attention",
            projection=False,
        ),
        "resnet": ResNetConfig(64, (1, 1, 1, 1), 8, 4),
    }
    config = Config(width, images[vision], TextConfig(40, 3000, width, blocks))
    clip = Clip.from_config(config, seed=1)
    expected = {
        "text.embedding.weight": 0.02,
        "text.positions": 0.01,
        "text.projection.weight": width**-0.5,
    }
    for tower in ("text", "image") if vision != "resnet" else ("text",):
        expected |= {
            f"{tower}.blocks.1.attention.qkv.weight": width**-0.5,
            f"{tower}.blocks.1.attention.out.weight": width**-0.5 * (2 * depth) ** -0.5,
            f"{tower}.blocks.1.mlp.fc.weight": (2 * width) ** -0.5,
            f"{tower}.blocks.1.mlp.proj.weight": width**-0.5 * (2 * depth) ** -0.5,
        }
    if vision != "resnet":
        expected["image.positions"] = width**-0.5
    if vision == "vit":
        expected["image.projection.weight"] = width**-0.5
    weights = clip.state_dict()
    for name, std in expected.items():
        count = weights[name].numel()
        assert float(weights[name].std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count)), name
    if vision == "resnet":
        assert float(weights["image.blocks.2.0.bn_3.weight"].abs().max()) == 0
        assert float(weights["image.pool.qkv.weight"].std()) == pytest.approx(
            clip.image.width**-0.5, rel=0.05
        )
    for name, tensor in weights.items():
        if name.endswith("bias") and name != "bias":
            assert float(tensor.abs().max()) == 0, name
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_final.weight", "ln_post.weight", "bn_1.weight")):
            assert bool((tensor == 1).all()), name
    assert float(clip.scale.detach().exp()) == pytest.approx(1 / 0.07)


def test_initializing_again_forgets_what_was_there(clip: Clip) -> None:
    twin = copy.deepcopy(clip)
    with torch.no_grad():
        for parameter in [*twin.image.parameters(), *twin.text.parameters()]:
            parameter.fill_(7)
    initialize(twin, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(a, b) for a, b in zip(clip.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_a_seed_gives_the_same_answer_twice(clip: Clip, pictures: list[Path]) -> None:
    assert torch.equal(clip.embed_images(pictures), clip.embed_images(pictures))
    assert torch.equal(clip.embed_texts(TEXTS), clip.embed_texts(TEXTS))


def test_forward_gives_the_unit_vectors_of_both_towers_with_gradient(clip: Clip) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image, text = clip(pixels, Tokens(torch.tensor([[1, 2, 3]]), torch.tensor([2])))
    assert image.shape == (2, 16) and text.shape == (1, 16) and image.requires_grad and text.requires_grad
    assert torch.allclose(torch.cat([image, text]).norm(dim=-1), torch.ones(3), atol=1e-6)


def test_a_config_goes_through_json_unchanged(clip: Clip, tiny_clip: Callable[..., Clip]) -> None:
    import json

    for config in (
        clip.config,
        tiny_clip(sigmoid=True).config,
        replace(clip.config, image=ResNetConfig(64, (1, 1, 1, 1), 8, 4)),
    ):
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"image\.widht: unknown key; did you mean width"):
        Config.from_dict({**clip.config.to_dict(), "image": {**clip.config.to_dict()["image"], "widht": 3}})
