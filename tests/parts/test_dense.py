"""Paths through a tower change what they say they change, and leave the rest as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.core.config import ResNetConfig
from clipworks.core.hooks import Tap, compose
from clipworks.core.resnet import ModifiedResNet
from clipworks.errors import ConfigError
from clipworks.parts.dense import (
    KeepNormed,
    LastValues,
    all_vectors,
    as_map,
    cell_of,
    dense_tower,
)

LAST = 1


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip().eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tokens_of(clip: Clip, pixels: Tensor, around: Any = None) -> Tensor:
    tower: Any = clip.image
    return tower.run(tower.place(tower.read(pixels)), around=around)


def test_without_a_hook_the_picture_has_the_towers_own_vector(clip: Any, tiny_clip: Any) -> None:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, places = all_vectors(clip.image, pixels)
        assert whole is not None
        assert torch.allclose(whole, clip.image(pixels), atol=1e-5)
        assert places.shape == (3, 16, 4, 4)
        averaging = tiny_clip(image={"class_token": False, "pooling": "mean"}).eval()
        nothing, places = all_vectors(averaging.image, pixels)
        assert nothing is None
        assert places.shape == (3, 16, 4, 4)


def test_places_are_rows_and_columns_of_the_picture(clip: Any) -> None:
    """A change in one patch's pixels moves, before attention mixes them, that place alone."""
    pixels = torch.zeros(1, 3, 24, 40)
    changed = pixels.clone()
    changed[:, :, 8:16, 32:40] = 1
    tower = clip.image

    def alone(i: int, block: Any, tokens: Tensor) -> Tensor:
        return block(tokens, attend=lambda attention, x, mask: torch.zeros_like(x))

    with torch.no_grad():
        moved = all_vectors(tower, changed, around=alone)[1] - all_vectors(tower, pixels, around=alone)[1]
    assert moved.abs().amax(dim=(0, 1)).nonzero().tolist() == [[1, 4]]


def test_the_last_values_are_the_block_with_an_identity_in_place_of_attention(
    clip: Any, pixels: Tensor
) -> None:
    tap = Tap(LAST - 1)
    tokens_of(clip, pixels, tap)
    x, block = tap[LAST - 1], clip.image.blocks[LAST]
    with torch.no_grad():
        v = nn.functional.linear(
            block.ln_1(x), block.attention.qkv.weight.chunk(3)[2], block.attention.qkv.bias.chunk(3)[2]
        )
        bare = block.attention.out(v)
        u = x + bare
        u = u + block.mlp(block.ln_2(u))
        assert torch.allclose(tokens_of(clip, pixels, LastValues(LAST)), u, atol=1e-5)
        assert torch.allclose(tokens_of(clip, pixels, LastValues(LAST, residual=False)), bare, atol=1e-5)


def test_the_last_values_of_a_place_see_that_place_alone(clip: Any, pixels: Tensor) -> None:
    """Tokens that enter the block differ at one place: those that leave it do too."""
    x = tokens_of(clip, pixels, Tap(LAST - 1))
    moved = x.clone()
    moved[:, 7] += 1
    for residual in (True, False):
        with torch.no_grad():
            one, other = (
                clip.image.run(tokens, start=LAST, around=LastValues(LAST, residual)) for tokens in (x, moved)
            )
        assert (one - other).abs().amax(dim=(0, 2)).nonzero().flatten().tolist() == [7]


def test_the_last_values_leave_earlier_blocks_as_they_are(clip: Any, pixels: Tensor) -> None:
    plain, listened = Tap(), Tap()
    tokens_of(clip, pixels, plain)
    tokens_of(clip, pixels, compose(listened, LastValues(LAST)))
    assert torch.equal(plain[LAST - 1], listened[LAST - 1])
    assert not torch.equal(plain[LAST], listened[LAST])


@pytest.mark.parametrize("i", [0, 1])
def test_listening_to_normed_tokens_leaves_the_tower_as_it_is(clip: Any, pixels: Tensor, i: int) -> None:
    listening, tap = KeepNormed(i), Tap()
    heard = tokens_of(clip, pixels, compose(tap, listening))
    assert torch.equal(heard, tokens_of(clip, pixels))
    block, tower = clip.image.blocks[i], clip.image
    with torch.no_grad():
        x = tap[i - 1] if i else tower.place(tower.read(pixels))
        expected = block.ln_2(x + block.attention(block.ln_1(x)))
    assert torch.allclose(listening.tokens, expected, atol=1e-5)


def test_a_grid_that_is_the_towers_own_needs_no_interpolation(clip: Any) -> None:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = [
            all_vectors(clip.image, pixels, interpolation=kind, antialias=antialias)[1]
            for kind in ("bicubic", "bilinear")
            for antialias in (False, True)
        ]
    assert all(torch.equal(one, found[0]) for one in found)
    larger = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        bicubic, bilinear = (
            all_vectors(clip.image, larger, interpolation=kind)[1] for kind in ("bicubic", "bilinear")
        )
    assert not torch.allclose(bicubic, bilinear, atol=1e-4)


def test_tokens_fill_a_map_row_by_row() -> None:
    tokens = torch.arange(2 * 6 * 4.0).reshape(2, 6, 4)
    found = as_map(tokens, (2, 3))
    for b in range(2):
        for row in range(2):
            for column in range(3):
                assert torch.equal(found[b, :, row, column], tokens[b, 3 * row + column])


def test_a_resnets_places_are_its_attention_pools_values_projected() -> None:
    tower = ModifiedResNet(ResNetConfig(64, (1, 1, 1, 1), 4, 2), 16).eval()
    pixels = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, places = all_vectors(tower, pixels)
        maps = tower.run(tower.place(tower.read(pixels)))
        value, out = (
            (layer.weight[-layer.in_features :, :, None, None], layer.bias[-layer.in_features :])
            for layer in (tower.pool.qkv, tower.pool.out)
        )
        expected = nn.functional.conv2d(nn.functional.conv2d(maps, *value), *out)
    assert whole is None
    assert torch.allclose(places, expected, atol=1e-5)
    assert cell_of(tower) == 32
    with pytest.raises(ConfigError, match="a ResNet has no tokens"):
        all_vectors(tower, pixels, around=LastValues(0))


def test_another_librarys_tower_has_no_places(clip: Any) -> None:
    assert dense_tower(clip) is clip.image
    assert cell_of(clip.image) == 8

    class Foreign:
        image = nn.Identity()

    with pytest.raises(ConfigError, match="not a Identity"):
        dense_tower(Foreign())  # type: ignore[arg-type]
