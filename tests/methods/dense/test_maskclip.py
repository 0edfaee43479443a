"""MaskCLIP is what its formulas say, on vision transformers and ResNets, in windows and whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import Clip
from clipworks.core.config import ResNetConfig
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.core.towers import resize_positions
from clipworks.errors import ConfigError
from clipworks.methods.dense.maskclip import MaskCLIP, denoised, smoothed
from clipworks.parts.dense import probabilities

NAMES, SENTENCES = ("sky", "road", "red car"), ("a {}.", "the {} there")


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer()).eval()
    return made


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int, width: int) -> Tensor:
    return torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_scores_are_the_softmax_of_a_hundred_cosines_in_fp32() -> None:
    features, vectors = 3 * drawn(0, 2, 5, 2, 3), F.normalize(drawn(1, 4, 5), dim=1)
    found = probabilities(features, vectors)
    for place in ((0, 0, 0), (1, 1, 2)):
        one = features[place[0], :, place[1], place[2]].double()
        expected = (100 * vectors.double() @ one / one.norm()).softmax(dim=0)
        assert torch.allclose(found[place[0], :, place[1], place[2]].double(), expected, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(probabilities(features, vectors), found)


def test_a_picture_of_one_window_has_the_scores_of_its_features(clip: Clip) -> None:
    shown = picture(32, 32)
    method = MaskCLIP(clip, templates=SENTENCES, size="full", window=32)
    asked = method.ask(NAMES)
    with torch.no_grad():
        expected = probabilities(method.places(shown[None]), asked.vectors)[0]
    assert torch.allclose(method.segment(shown, asked).coarse, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(65, 97), (32, 32), (1, 40)])
def test_any_size_of_picture_has_a_label_for_every_pixel(clip: Clip, size: tuple[int, int]) -> None:
    for settings in ({"size": "full"}, {"key_smoothing": 1.0}, {"denoise": 0.5}, {"residual": False}):
        found = MaskCLIP(clip, templates=SENTENCES, **settings).segment(picture(*size), NAMES)
        assert found.map.shape == size
        assert 0 <= int(found.map.min()) <= int(found.map.max()) < 3


def test_a_place_without_residual_and_attention_knows_no_later_mlp(clip: Clip) -> None:
    """The last MLP reaches the features only with the residual path, and attention reaches neither."""
    shown = picture(32, 32)[None]
    block: Any = clip.image.blocks[-1]
    third = len(block.attention.qkv.bias) // 3
    with torch.no_grad():
        before = {kept: MaskCLIP(clip, residual=kept).places(shown) for kept in (True, False)}
        kept_mlp, kept_qkv = block.mlp.proj.bias.clone(), block.attention.qkv.bias.clone()
        try:
            block.attention.qkv.bias[: 2 * third] += 1  # queries and keys
            for kept, expected in before.items():
                assert torch.equal(MaskCLIP(clip, residual=kept).places(shown), expected)
            block.mlp.proj.bias += drawn(2, len(kept_mlp))
            assert torch.equal(MaskCLIP(clip, residual=False).places(shown), before[False])
            assert not torch.allclose(MaskCLIP(clip).places(shown), before[True], atol=1e-3)
        finally:
            block.mlp.proj.bias.copy_(kept_mlp)
            block.attention.qkv.bias.copy_(kept_qkv)


def test_keys_are_smoothed_with_cosines_and_not_along_tokens() -> None:
    likely, keys = drawn(0, 1, 3, 2, 3).softmax(dim=1), drawn(1, 1, 6, 5)
    flat, found = likely.flatten(2)[0].T, smoothed(likely, keys, 2.0).flatten(2)[0].T

    def naive(directions: Tensor) -> Tensor:
        rows = []
        for p in range(6):
            row = sum((directions[p] @ directions[q]) * flat[q] for q in range(6)).clamp(min=0)
            rows.append(row / row.sum() if row.sum() > 0 else flat[p])
        return torch.stack(rows)

    assert torch.allclose(found, naive(keys[0] / keys[0].norm(dim=1, keepdim=True)), atol=1e-5)
    along_tokens = naive(keys[0] / keys[0].norm(dim=0, keepdim=True))
    assert not torch.allclose(found, along_tokens, atol=1e-2)


def test_sure_places_are_not_smoothed_and_what_cancels_stays() -> None:
    likely = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).T[None, :, None]
    keys = drawn(3, 1, 2, 4)
    assert torch.equal(smoothed(likely, keys, 0.8)[..., 0], likely[..., 0])
    opposed = torch.tensor([[[1.0], [-1.0]]])
    assert torch.allclose(smoothed(likely[..., 1:].expand_as(likely), opposed, 1.0), torch.tensor(0.5))


def test_denoising_is_the_softmax_over_the_classes_that_remain() -> None:
    logits = 3 * drawn(4, 1, 4, 2, 2)
    likely = logits.softmax(dim=1)
    best = likely.amax((2, 3))[0]
    bound = float(best.sort().values[2])
    expected = logits.masked_fill((best < bound)[None, :, None, None], -torch.inf).softmax(dim=1)
    assert torch.allclose(denoised(likely, bound), expected, atol=1e-6)


def test_keys_are_those_of_places_in_the_last_block(clip: Clip) -> None:
    shown, tower = picture(32, 40)[None], clip.image
    block: Any = tower.blocks[-1]  # type: ignore[index]
    with torch.no_grad():
        _, keys = MaskCLIP(clip)._places(shown)
        content = tower.read(shown)  # type: ignore[operator]
        table = resize_positions(tower.positions, (4, 5), 1, antialias=False)  # type: ignore[arg-type]
        x = tower.run(tower.place(content, positions=table), stop=-1)  # type: ignore[operator]
        width = x.shape[2]
        weight, bias = (one[width : 2 * width] for one in block.attention.qkv.parameters())
    assert keys is not None
    assert torch.allclose(keys, F.linear(block.ln_1(x), weight, bias)[:, 1:], atol=1e-5)


def test_a_resnets_places_are_values_projected_by_convolutions(tiny_clip: Callable[..., Any]) -> None:
    plain = tiny_clip(tokenizer=ClipTokenizer())
    config = type(plain.config)(
        **{
            **{name: getattr(plain.config, name) for name in plain.config.__dataclass_fields__},
            "image": ResNetConfig(image_size=64, width=8, layers=(1, 1, 1, 1), heads=4),
        }
    )
    clip = Clip.from_config(config, ClipTokenizer(), seed=0).eval()
    shown = picture(64, 96)[None]
    tower: Any = clip.image
    with torch.no_grad():
        maps = tower.run(tower.place(tower.read(shown)))
        values = tower.pool.qkv.weight.chunk(3)[2], tower.pool.qkv.bias.chunk(3)[2]
        v = F.conv2d(maps, values[0][:, :, None, None], values[1])
        expected = F.conv2d(v, tower.pool.out.weight[:, :, None, None], tower.pool.out.bias)
        found = MaskCLIP(clip).places(shown)
    assert found.shape[2:] == (2, 3)
    assert torch.allclose(found, expected, atol=1e-5)
    for settings in ({"residual": False}, {"key_smoothing": 1.0}):
        with pytest.raises(ConfigError, match="ResNet"):
            MaskCLIP(clip, templates=SENTENCES, **settings).segment(shown[0], NAMES)
