"""Gates and what is cut by them: nothing closed is read, and the smaller tower is the gated one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.core.config import Config, ResNetConfig, StemStage, TextConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.encode.packed import text_vectors
from clipworks.errors import ConfigError
from clipworks.parts.pruning import TOWERS, GatedNorm, Gates, cut, gated

STEM = (StemStage(8), StemStage(12), StemStage(24))


@pytest.fixture(params=["patches", "stem"])
def clip(request: pytest.FixtureRequest, tiny_clip: Callable[..., Any]) -> Any:
    """Three heads of 16 in a residual width of 48; every bias and gain away from where it starts."""
    sizes = {"width": 48, "blocks": uniform_blocks(2, 48, heads=3)}
    image = sizes | {"image_size": 16, "stem": STEM if request.param == "stem" else (), "patch_bias": True}
    clip = tiny_clip(0, image=image, text=sizes | {"vocab_size": 64, "context_length": 12})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return clip


def some_gates(clip: Any, seed: int = 0) -> dict[str, Gates]:
    """Some closed, some between; no head of the first block is open."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        values = 0.2 + 0.8 * torch.rand(n, generator=generator)
        return values.masked_fill(torch.rand(n, generator=generator) < 0.4, 0.0)

    found = {}
    for label in TOWERS:
        tower = getattr(clip.config, label)
        heads = (torch.zeros(tower.blocks[0].heads), torch.tensor([0.0, 0.7, 1.0]))
        found[label] = Gates(draw(tower.width), heads, tuple(draw(b.mlp_width) for b in tower.blocks))
    return found


def inputs() -> tuple[Tensor, Tokens]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 62, (3, 7), generator=generator)
    return torch.rand(2, 3, 16, 16, generator=generator), Tokens(ids, torch.tensor([6, 3, 4]))


def answers(clip: Any) -> tuple[Tensor, Tensor]:
    pixels, tokens = inputs()
    with torch.no_grad():
        return clip.image(pixels), clip.text(tokens)


def test_what_is_cut_computes_what_the_gates_left(clip: Any) -> None:
    gates = some_gates(clip)
    small = cut(clip, gates)
    assert small.config.image.blocks[0].heads == 0 and small.config.image.blocks[1].heads == 2
    assert small.config.text.width == int((gates["text"].hidden > 0).sum()) < 48
    for one, other in zip(answers(small), answers(gated(clip, gates)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    scaled = copy.deepcopy(small)  # a projection is not multiplied by the gates
    with torch.no_grad():
        scaled.text.projection.weight *= gates["text"].hidden[gates["text"].hidden > 0]
    assert not torch.allclose(answers(scaled)[1], answers(small)[1], atol=1e-3)


def test_a_model_with_a_block_without_heads_trains(clip: Any) -> None:
    small = cut(clip, some_gates(clip))
    pixels, tokens = inputs()
    (small.image(pixels).square().sum() + small.text(tokens).square().sum()).backward()
    for block in (small.image.blocks[0], small.text.blocks[0]):
        assert block.attention.out.bias.grad.abs().sum() > 0 and block.mlp.fc.weight.grad.isfinite().all()


def test_open_gates_change_nothing_and_cut_nothing(clip: Any) -> None:
    gates = {
        label: Gates(
            torch.ones(48), (torch.ones(3),) * 2, (torch.ones(192),) * 2
        )
        for label in TOWERS
    }  # fmt: skip
    for one, other in zip(answers(gated(clip, gates)), answers(clip), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    small = cut(clip, gates)
    assert small.config == clip.config
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in clip.state_dict().items())


def test_nothing_that_is_closed_is_read(clip: Any) -> None:
    gates = some_gates(clip)
    before = answers(gated(clip, gates))
    noisy = copy.deepcopy(clip)
    with torch.no_grad():
        for label in TOWERS:
            tower, one = getattr(noisy, label), gates[label]
            closed = one.hidden == 0
            tower.positions[:, closed] += 5
            tower.projection.weight[:, closed] += 5
            for block, heads, units in zip(tower.blocks, one.heads, one.units, strict=True):
                block.ln_1.weight[closed] += 5
                block.attention.out.bias[closed] += 5
                block.attention.qkv.weight[:, closed] += 5
                shut = heads.repeat_interleave(16) == 0
                block.attention.qkv.weight[shut.repeat(3)] += 5
                block.attention.out.weight[:, shut] += 5
                block.mlp.fc.weight[units == 0] += 5
                block.mlp.proj.weight[:, units == 0] += 5
    for one, other in zip(answers(gated(noisy, gates)), before, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gated_norm_is_the_norm_of_what_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(10)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    kept = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 1]).bool()
    x = torch.randn(4, 10, generator=generator)
    found = GatedNorm(norm, kept.float())(x)
    expected = nn.functional.layer_norm(x[:, kept], (7,), norm.weight[kept], norm.bias[kept])
    torch.testing.assert_close(found[:, kept], expected)
    assert not found[:, ~kept].any()


def test_gradients_reach_gates_and_weights_and_packed_texts_are_the_same(clip: Any) -> None:
    gates = some_gates(clip)
    hidden = gates["text"].hidden.requires_grad_()
    tower = gated(clip, gates).text
    _, tokens = inputs()
    packed = text_vectors(tower, tokens)
    torch.testing.assert_close(packed, tower(tokens), atol=1e-5, rtol=1e-5)
    packed.square().sum().backward()
    assert hidden.grad.abs().sum() > 0 and clip.text.embedding.weight.grad.abs().sum() > 0


def test_towers_without_such_channels_are_named(tiny_clip: Callable[..., Any]) -> None:
    text = TextConfig(12, 64, 32, uniform_blocks(1, 32, 2))
    resnet = Clip.from_config(Config(16, ResNetConfig(32, (1, 1, 1, 1), 8, 4), text))
    with pytest.raises(ConfigError, match="image tower is no transformer"):
        gated(resnet, {})
    pooled = tiny_clip(0, image={"pooling": "attention", "class_token": False})
    with pytest.raises(ConfigError, match="image tower has an attention pool"):
        gated(pooled, {})
