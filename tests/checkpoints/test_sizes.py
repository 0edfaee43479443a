"""Other image sizes and longer texts: tables are interpolated, everything else stays, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.checkpoints.conftest import lively, same_weights, small, small_siglip

import clipworks
from clipworks.checkpoints.sizes import resized, stretch_positions
from clipworks.core.clip import Clip
from clipworks.core.config import ResNetConfig
from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.errors import ConfigError


def test_the_same_sizes_are_the_same_model() -> None:
    clip = small()
    twin = resized(clip, image_size=32, context_length=12)
    assert same_weights(twin, clip) and twin.config == clip.config
    assert twin.image.positions.data_ptr() != clip.image.positions.data_ptr()


@pytest.mark.parametrize("make", [small, small_siglip])
def test_another_image_size_answers_as_the_tower_does_on_such_pictures(make: object) -> None:
    clip = make()  # type: ignore[operator]
    twin = resized(clip, image_size=48)
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(twin.image(pixels), clip.image(pixels), atol=1e-6)
    assert twin.config.image.image_size == 48 and twin.preprocessing.image_size == 48
    assert twin.image.positions.shape[0] == 36 + clip.config.image.class_token


def test_a_resnet_too() -> None:
    config = replace(small().config, image=ResNetConfig(64, (1, 1, 1, 1), 4, 2))
    clip = lively(Clip.from_config(config), 0)
    pixels = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(resized(clip, image_size=96).image(pixels), clip.image(pixels), atol=1e-6)


def test_a_shorter_causal_context_changes_no_text_that_fits() -> None:
    clip = small()
    twin = resized(clip, context_length=6)
    tokens = Tokens(torch.tensor([[1, 2, 3, 63], [4, 5, 63, 0]]), torch.tensor([3, 2]))
    with torch.no_grad():
        assert torch.equal(twin.text(tokens), clip.text(tokens))
    assert twin.text.positions.shape[0] == 6


def test_a_longer_context_is_interpolated_linearly_between_the_same_ends() -> None:
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    longer = stretch_positions(table, 12)
    # An independent form: pixel centers of the longer row, between the nearest of the shorter one.
    places = np.clip((np.arange(12) + 0.5) * 5 / 12 - 0.5, 0, 4)
    expected = np.stack([np.interp(places, np.arange(5), column) for column in table.numpy().T], axis=1)
    assert np.allclose(longer.numpy(), expected, atol=1e-6)
    assert torch.equal(stretch_positions(table, 5), table)


def test_the_tokenizer_follows_the_context() -> None:
    clip = small(vocabulary=49408)
    clip.tokenizer = ClipTokenizer(12)
    twin = resized(clip, context_length=20)
    assert twin.tokenizer.context_length == 20 and clip.tokenizer.context_length == 12
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert twin.tokenizer(text).ids.shape[1] == 15 and twin.embed_texts(text).shape == (1, 16)


def test_loading_with_a_size_interpolates_and_lets_the_configs_size_differ(tmp_path: Path) -> None:
    folder = small().save_open_clip(tmp_path / "model")
    clip = clipworks.load(folder, tokenizer=False, image_size=64, context_length=24)
    assert same_weights(clip, resized(small(), image_size=64, context_length=24))
    assert same_weights(
        clipworks.load(small().save(tmp_path / "own"), image_size=64), resized(small(), image_size=64)
    )


def test_sizes_that_cannot_be_are_errors() -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        resized(small(), image_size=33)
    with pytest.raises(ConfigError, match="at least 2"):
        resized(small(), context_length=1)


def test_mode_and_precision_of_what_is_resized_stay() -> None:
    clip = small().train()
    assert resized(clip, image_size=64).training
