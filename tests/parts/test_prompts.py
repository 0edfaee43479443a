"""Prompts stand where they should, in the blocks where they should, with the gradients of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.core.config import ResNetConfig, uniform_blocks
from clipworks.core.hooks import BlockCall, compose
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import ConfigError, DataError
from clipworks.parts.prompts import (
    DeepPrompts,
    context_bank,
    context_texts,
    context_words,
    depth_in,
    prompted_images,
    random_prompts,
    vision_tower,
)

BLOCKS, WIDTH, LENGTH = 3, 32, 2
NAMES = ["cat", "Siberian husky", "hot air balloon"]


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    three = {"blocks": uniform_blocks(depth=BLOCKS, width=WIDTH, heads=2)}
    made: Clip = tiny_clip(tokenizer=ClipTokenizer(), image=three, text=three)
    return made.double().requires_grad_(False)


def pixels(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn(depth: int, length: int = LENGTH, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(depth)
    ]


def gradients(features: Tensor, learned: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(5), dtype=features.dtype)
    return torch.autograd.grad((features * weights).sum(), learned)


def naive_image(tower: Any, picture: Tensor, prompts: list[Tensor]) -> Tensor:
    """One picture (3, H, W), token lists joined by hand before every block, to (D,)."""
    patches = tower.read(picture[None])[0].reshape(-1, WIDTH)
    kept = torch.cat([tower.class_token[None], patches]) + tower.positions
    own = len(kept)
    x = tower.ln_pre(torch.cat([kept, prompts[0]]))
    for number, block in enumerate(tower.blocks):
        if 0 < number < len(prompts):
            x = torch.cat([x[:own], prompts[number]])
        x = block(x[None])[0]
    return tower.projection(tower.ln_post(x[0]))


def naive_text(tower: Any, ids: list[int], prompts: list[Tensor]) -> Tensor:
    """One text, [start] P [the rest], to (D,); places 1 … b of the ids are thrown away."""
    length = len(prompts[0])
    words = tower.embedding.weight[ids]
    x = torch.cat([words[:1], prompts[0], words[1 + length :]]) + tower.positions[: len(ids)]
    for number, block in enumerate(tower.blocks):
        if 0 < number < len(prompts):
            x = torch.cat([x[:1], prompts[number], x[1 + length :]])
        x = block(x[None], mask="causal")[0]
    return tower.projection(tower.ln_final(x[-1]))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_pictures_and_gradients_are_those_of_the_plain_loop(clip: Clip, depth: int) -> None:
    prompts = drawn(depth)
    found = prompted_images(vision_tower(clip), pixels(), prompts)
    expected = torch.stack([naive_image(clip.image, picture, prompts) for picture in pixels()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(found, prompts), gradients(expected, prompts), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_texts_and_gradients_are_those_of_the_plain_loop(clip: Clip, depth: int) -> None:
    prompts, context = drawn(depth), "a photo of a"
    found = context_bank(clip, NAMES, LENGTH, context)(prompts[0], prompts[1:])
    assert clip.tokenizer is not None
    rows = [clip.tokenizer(f"{context} {name}.").ids[0].tolist() for name in NAMES]
    expected = torch.stack([naive_text(clip.text, row, prompts) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(found, prompts), gradients(expected, prompts), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_became_of_a_prompt_is_thrown_away_until_the_last_of_them(clip: Clip, depth: int) -> None:
    tower, prompts = vision_tower(clip), drawn(depth)
    own = 1 + 16
    seen: dict[int, Tensor] = {}

    def spy(i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        assert tokens.shape[1] == own + LENGTH
        seen[i] = tokens
        return block(tokens)

    placed = tower.place(tower.read(pixels()), extra=prompts[0])
    hook = compose(spy, DeepPrompts(prompts, slice(-LENGTH, None)))
    out = tower.project(tower.run(placed, around=hook)[:, :-LENGTH])
    for i, gradient in zip(seen, gradients(out, list(seen.values())), strict=True):
        if i:  # before block 0 they are the prompts themselves
            assert gradient[:, :own].abs().max() > 0
            assert bool((gradient[:, own:] == 0).all()) == (i < depth)


def test_the_pictures_own_tokens_enter_as_they_are(clip: Clip) -> None:
    tower, entered = vision_tower(clip), []

    def spy(i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        entered.append(tokens)
        return block(tokens)

    tower.run(tower.place(tower.read(pixels())), around=spy)
    tower.run(tower.place(tower.read(pixels()), extra=drawn(1)[0]), around=spy)
    assert torch.equal(entered[0], entered[BLOCKS][:, :-LENGTH])


def test_without_prompts_the_tower_is_itself_bit_for_bit(clip: Clip) -> None:
    assert torch.equal(prompted_images(vision_tower(clip), pixels(), []), clip.image(pixels()))


def test_prompts_may_differ_from_picture_to_picture(clip: Clip) -> None:
    tower = vision_tower(clip)
    one, other = ([torch.stack([p, -p, 2 * p]) for p in drawn(2)], [2 * p for p in drawn(2)])
    found = prompted_images(tower, pixels(), one)
    torch.testing.assert_close(found[2:], prompted_images(tower, pixels()[2:], other))


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_an_untrained_context_is_the_zero_shot_sentence(clip: Clip, length: int) -> None:
    words = context_words(clip, "a photo of a", length)
    found = context_bank(clip, NAMES, length, "a photo of a")(words)
    assert clip.tokenizer is not None
    expected = clip.text(clip.tokenizer([f"a photo of a {name}." for name in NAMES]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_words_behind_the_prompts_stay_and_without_a_context_there_are_none(clip: Clip) -> None:
    assert clip.tokenizer is not None
    start, end = clip.tokenizer.start, clip.tokenizer.end
    slots = [clip.text.embedding.num_embeddings + j for j in range(2)]  # type: ignore[union-attr,operator]
    name = clip.tokenizer.encode("cat.")
    kept = clip.tokenizer.encode("of a")
    assert context_texts(clip, ["cat"], 2, "a photo of a").ids[0].tolist() == [
        start,
        *slots,
        *kept,
        *name,
        end,
    ]
    assert context_texts(clip, ["cat"], 2, None).ids[0].tolist() == [start, *slots, *name, end]


def test_an_underscore_in_a_name_is_a_blank(clip: Clip) -> None:
    words = context_words(clip, "a photo", 2)
    one, other = (context_bank(clip, [name], 2, "a photo of a")(words) for name in ("dog_sled", "dog sled"))
    assert torch.equal(one, other)


def test_random_prompts_have_their_deviation() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = random_prompts(9, 8, 512, first=torch.ones(8, 512))
    assert torch.equal(prompts[0], torch.ones(8, 512))
    deep = torch.stack(list(prompts)[1:])
    assert abs(float(deep.detach().std()) - 0.02) < 2e-4
    assert abs(float(deep.detach().mean())) < 5e-4


def test_what_cannot_work_is_one_clear_error(clip: Clip, tiny_clip: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="4 learned words cannot start from 'photo of a'"):
        context_words(clip, "photo of a", 4)
    with pytest.raises(ConfigError, match="4 learned words cannot start from 'photo of a'"):
        context_texts(clip, NAMES, 4, "photo of a")
    with pytest.raises(DataError, match="tokens"):
        context_texts(clip, ["very " * 80], 2, "a photo of a")
    with pytest.raises(ConfigError, match="tokenizer"):
        context_texts(tiny_clip(), NAMES, 2, "a photo of a")
    with pytest.raises(ConfigError, match="at least 1"):
        depth_in(clip.text, 0, 2)
    assert depth_in(clip.text, 9, 2) == BLOCKS


def test_a_resnet_has_no_tokens_to_put_prompts_among(clip: Clip) -> None:
    image = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=2)
    resnet = Clip.from_config(replace(clip.config, image=image, name="small-resnet"))
    with pytest.raises(ConfigError, match="'small-resnet' is a ModifiedResNet"):
        vision_tower(resnet)
