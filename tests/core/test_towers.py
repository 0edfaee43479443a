"""Properties of the open towers: positions, pooling, pixels, padding. What hooks do is in test_hooks.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.config import CLIP_MEAN, CLIP_STD, StemStage, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower, Tower, VisionTower, resize_positions
from clipworks.errors import ConfigError, ShapeError

BLOCKS = uniform_blocks(2, 32, 2)
SIGLIP: dict[str, Any] = {
    "class_token": False, "pre_norm": False, "patch_bias": True, "pooling": "attention", "projection": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "class": {},
    "mean": {"pooling": "mean"},
    "mean without class token": {"pooling": "mean", "class_token": False},
    "siglip": SIGLIP,
    "stem": {"stem": (StemStage(4), StemStage(8, 1), StemStage(8))},
}


def filled(tower: Tower, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return tower.eval()


def vision(**options: Any) -> VisionTower:
    config = VisionConfig(32, 8, 32, BLOCKS, **options)
    return filled(VisionTower(config, 32 if not config.projection else 16))


def text(**options: Any) -> TextTower:
    return filled(TextTower(TextConfig(12, 40, 32, BLOCKS, **options), 16))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_four_steps_are_the_tower(options: dict[str, Any]) -> None:
    tower = vision(**options)
    pixels = draw(2, 3, 32, 32)
    with torch.no_grad():
        steps = tower.project(tower.run(tower.place(tower.read(pixels))))
        assert torch.allclose(tower(pixels), steps, atol=1e-6)


@given(st.integers(1, 6), st.integers(0, 1), st.integers(1, 5))
def test_positions_of_the_tables_own_grid_are_the_table_itself(side: int, leading: int, width: int) -> None:
    table = draw(leading + side * side, width)
    assert resize_positions(table, (side, side), leading) is table


@given(st.integers(1, 6), st.integers(0, 1), st.integers(1, 9), st.integers(1, 9))
def test_positions_of_any_grid_keep_the_class_row_and_what_is_constant(
    side: int, leading: int, h: int, w: int
) -> None:
    table = torch.cat([draw(leading, 3), torch.full((side * side, 3), 0.7)])
    found = resize_positions(table, (h, w), leading)
    assert found.shape == (leading + h * w, 3)
    assert torch.equal(found[:leading], table[:leading])
    assert torch.allclose(found[leading:], torch.full((h * w, 3), 0.7), atol=1e-5)


@given(st.integers(2, 5), st.integers(2, 7), st.integers(2, 7))
def test_positions_are_resized_as_pictures_are(side: int, h: int, w: int) -> None:
    """Each feature on its own, as an image, through Pillow's bicubic filter, which antialiases too."""
    import numpy as np
    from PIL import Image

    table = draw(1 + side * side, 2)
    found = resize_positions(table, (h, w), 1)[1:].reshape(h, w, 2)
    for feature in range(2):
        picture = Image.fromarray(table[1:, feature].reshape(side, side).numpy())
        expected = np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC))
        assert np.allclose(found[..., feature].numpy(), expected, atol=1e-5)


def test_positions_that_are_no_square_are_an_error() -> None:
    with pytest.raises(ConfigError, match="not a square"):
        resize_positions(draw(7, 3), (2, 2), 1)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("size", [(32, 32), (64, 16), (8, 48)])
def test_pictures_of_any_grid_are_read(options: dict[str, Any], size: tuple[int, int]) -> None:
    tower = vision(**options)
    with torch.no_grad():
        tokens = tower.run(tower.place(tower.read(draw(2, 3, *size))))
        assert tokens.shape == (2, size[0] * size[1] // 64 + tower.config.class_token, 32)
        assert tower.project(tokens).shape == (2, tower.out_width)
        assert tower.project(tokens, at="all").shape == (2, tokens.shape[1], tower.out_width)


def test_a_picture_larger_than_the_tables_keeps_its_class_token_in_front() -> None:
    tower = vision(pre_norm=False)
    content = tower.read(draw(1, 3, 64, 64))
    with torch.no_grad():
        first = tower.place(content)[0, 0]
        assert torch.equal(first, tower.class_token + tower.positions[0])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_project_reads_at_an_index_what_it_reads_everywhere(options: dict[str, Any]) -> None:
    tower = vision(**options)
    with torch.no_grad():
        tokens = tower.run(tower.place(tower.read(draw(3, 3, 32, 32))))
        at = torch.tensor([0, 5, 15])
        everywhere = tower.project(tokens, at="all")
        assert torch.allclose(tower.project(tokens, at=at), everywhere[torch.arange(3), at], atol=1e-6)


def test_pooling_is_what_its_name_says() -> None:
    with torch.no_grad():
        tower = vision()
        tokens = tower.run(tower.place(tower.read(draw(2, 3, 32, 32))))
        assert torch.allclose(tower.project(tokens), tower.project(tokens, at="all")[:, 0], atol=1e-6)
        tower = vision(pooling="mean")
        tokens = tower.run(tower.place(tower.read(draw(2, 3, 32, 32))))
        assert torch.allclose(tower.project(tokens), tower.project(tokens, at="all").mean(1), atol=1e-5)


def test_siglips_pool_equals_a_naive_attention_of_the_probe() -> None:
    tower = vision(**SIGLIP)
    pool = tower.pool
    tokens = draw(2, 5, 32)
    q_w, k_w, v_w = pool.attention.qkv.weight.chunk(3)
    q_b, k_b, v_b = pool.attention.qkv.bias.chunk(3)
    heads = []
    with torch.no_grad():
        for part in (slice(0, 16), slice(16, 32)):
            q = (pool.probe @ q_w.T + q_b)[part]
            k, v = (tokens @ k_w.T + k_b)[..., part], (tokens @ v_w.T + v_b)[..., part]
            weights = ((k @ q) / math.sqrt(16)).softmax(-1)
            heads.append((weights[..., None] * v).sum(1))
        x = pool.attention.out(torch.cat(heads, -1))
        normed = F.layer_norm(x, (32,), pool.ln.weight, pool.ln.bias, pool.ln.eps)
        assert torch.allclose(pool(tokens), x + pool.mlp(normed), atol=1e-5)


def test_siglips_pool_of_each_token_is_the_pool_of_that_token_alone() -> None:
    pool = vision(**SIGLIP).pool
    tokens = draw(2, 5, 32)
    with torch.no_grad():
        each = pool.each(tokens)
        for place in range(5):
            assert torch.allclose(pool(tokens[:, place : place + 1]), each[:, place], atol=1e-6)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_bytes_are_floats_of_255ths(options: dict[str, Any]) -> None:
    tower = vision(**options)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(tower(pixels), tower(pixels.float() / 255))


def test_mean_and_deviation_are_applied_in_read() -> None:
    plain, clips = vision(mean=(0.0,) * 3, std=(1.0,) * 3), vision()
    pixels = draw(1, 3, 32, 32)
    normal = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(clips.read(pixels), plain.read(normal), atol=1e-5)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_gradient_reaches_every_pixel(options: dict[str, Any]) -> None:
    tower = vision(**options)
    pixels = draw(1, 3, 32, 32).requires_grad_()
    tower(pixels).square().sum().backward()
    assert pixels.grad is not None and float((pixels.grad != 0).float().mean()) > 0.99


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (draw(3, 32, 32), r"must be \(B, 3, H, W\)"),
        (draw(1, 1, 32, 32), r"must be \(B, 3, H, W\)"),
        (draw(1, 3, 33, 32), "33x32 cannot be cut into patches of 8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "uint8, not torch.int64"),
    ],
)
def test_pixels_that_cannot_be_read_are_errors(pixels: Tensor, says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        vision()(pixels)


def test_extra_tokens_come_last_and_get_no_position() -> None:
    tower = vision(pre_norm=False)
    extra = draw(2, 32)
    with torch.no_grad():
        tokens = tower.place(tower.read(draw(3, 3, 32, 32)), extra=extra)
    assert tokens.shape == (3, 19, 32) and torch.equal(tokens[1, -2:], extra)


@given(st.lists(st.integers(2, 11), min_size=1, max_size=4), st.integers(0, 4))
def test_padding_appended_to_a_causal_text_changes_nothing(ends: list[int], more: int) -> None:
    tower = text().double()
    generator = torch.Generator().manual_seed(sum(ends))
    longest = max(ends) + 1
    ids = torch.randint(40, (len(ends), longest), generator=generator)
    padded = F.pad(ids, (0, min(more, 12 - longest)), value=7)
    with torch.no_grad():
        found = tower(Tokens(ids, torch.tensor(ends)))
        assert torch.allclose(tower(Tokens(padded, torch.tensor(ends))), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["causal", "padding"])
def test_what_stands_behind_a_texts_end_does_not_matter(mask: str) -> None:
    tower = text(mask=mask).double()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    other = torch.tensor([[1, 2, 3, 9, 8, 7]])
    changed = torch.tensor([[1, 9, 3, 4, 5, 6]])
    end = torch.tensor([2])
    with torch.no_grad():
        found = tower(Tokens(ids, end))
        assert torch.allclose(tower(Tokens(other, end)), found, atol=1e-12)
        assert float((tower(Tokens(changed, end)) - found).abs().max()) > 1e-3


def test_a_text_tower_that_sees_padding_sees_it() -> None:
    tower = text(mask="none", projection="biased")
    with torch.no_grad():
        first = tower(Tokens(torch.tensor([[1, 2, 3, 0]]), torch.tensor([3])))
        second = tower(Tokens(torch.tensor([[1, 2, 3, 0, 0]]), torch.tensor([4])))
    assert float((first - second).abs().max()) > 1e-4


def test_positions_may_be_given() -> None:
    tower = text()
    content = draw(2, 4, 32)
    with torch.no_grad():
        plain = tower.place(content)
        assert torch.equal(tower.place(content, positions=torch.arange(4)), plain)
        shifted = tower.place(content, positions=torch.arange(2, 6))
        assert torch.equal(shifted, content + tower.positions[2:6])
        each = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
        assert torch.equal(tower.place(content, positions=each)[1], content[1] + tower.positions[:4].flip(0))


def test_texts_longer_than_the_table_are_an_error() -> None:
    with pytest.raises(ShapeError, match="13 tokens do not fit a context of 12"):
        text()(Tokens(torch.ones(1, 13, dtype=torch.int64), torch.tensor([12])))


def test_a_text_is_read_at_its_end() -> None:
    tower = text()
    tokens = Tokens(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([1, 3]))
    with torch.no_grad():
        inside = tower.run(tower.place(tower.read(tokens)))
        everywhere = tower.project(inside, at="all")
        assert torch.allclose(tower(tokens), everywhere[torch.arange(2), tokens.ends], atol=1e-6)
        assert torch.allclose(tower.project(inside), everywhere[:, -1], atol=1e-6)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        tower = vision()
        tower.checkpointing = checkpointing
        tower(draw(1, 3, 32, 32)).square().sum().backward()
        grads.append([parameter.grad for parameter in tower.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert (plain is None) == (recomputed is None) and (
            plain is None or torch.allclose(plain, recomputed, atol=1e-5)
        )
