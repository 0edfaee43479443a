"""FLOPs from the config against what torch counts while the towers run."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipworks.core.clip import Clip
from clipworks.core.config import (
    BlockConfig,
    Config,
    ResNetConfig,
    StemStage,
    TextConfig,
    VisionConfig,
    uniform_blocks,
)
from clipworks.core.tokenizer import Tokens
from clipworks.engine.flops import image_flops, peak_flops, step_flops, text_flops
from clipworks.engine.meter import Meter

UNEQUAL = (BlockConfig(2, 16, 64), BlockConfig(3, 8, 100), BlockConfig(1, 32, 32))
VIT = VisionConfig(32, 8, 32, UNEQUAL)
TEXT = TextConfig(20, 64, 24, UNEQUAL)


def counted(call: Any) -> int:
    # With gradients: torch does not count inside the fused attention kernel of a CPU.
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def model(image: Any = VIT, text: TextConfig = TEXT) -> Clip:
    return Clip.from_config(Config(width=16, image=image, text=text))


@pytest.mark.parametrize(
    "image",
    [
        VIT,
        replace(VIT, class_token=False, pooling="mean"),
        replace(VIT, class_token=False, pooling="attention"),
        replace(VIT, stem=(StemStage(8, 1), StemStage(12, 0), StemStage(16, 2))),
        ResNetConfig(64, (2, 1, 1, 2), 8, 4),
    ],
    ids=["class", "mean", "attention", "stem", "resnet"],
)
@pytest.mark.parametrize("larger", [0, 32])
def test_a_picture_needs_what_torch_counts(image: Any, larger: int) -> None:
    clip = model(image).eval()
    side = image.image_size + larger
    assert image_flops(image, 16, side) == counted(lambda: clip.image(torch.rand(1, 3, side, side)))


def test_without_a_projection_none_is_counted() -> None:
    image = replace(VIT, width=16, projection=False, pooling="mean")
    text = replace(TEXT, width=16, projection="none")
    clip = Clip.from_config(Config(width=16, image=image, text=text))
    assert image_flops(image, 16) == counted(lambda: clip.image(torch.rand(1, 3, 32, 32)))
    tokens = Tokens(torch.ones(1, 9, dtype=torch.int64), torch.tensor([8]))
    assert text_flops(text, 16, 9) == counted(lambda: clip.text(tokens))


@pytest.mark.parametrize("length", [1, 7, 20])
def test_a_text_needs_what_torch_counts(length: int) -> None:
    tokens = Tokens(torch.ones(1, length, dtype=torch.int64), torch.tensor([length - 1]))
    assert text_flops(TEXT, 16, length) == counted(lambda: model().text(tokens))


def test_a_step_is_three_forward_passes_of_what_is_trained() -> None:
    config = Config(width=16, image=VIT, text=TEXT)
    lengths = np.array([3, 20, 7])
    image, texts = image_flops(VIT, 16), [text_flops(TEXT, 16, int(length)) for length in lengths]
    assert step_flops(config, 5, None, lengths, (True, True)) == 3 * (5 * image + sum(texts))
    assert step_flops(config, 5, None, lengths, (False, True)) == 5 * image + 3 * sum(texts)
    assert step_flops(config, 5, 64, lengths[:0], (True, False)) == 15 * image_flops(VIT, 16, 64)


def test_three_forward_passes_are_what_torch_counts_of_a_step_save_for_the_pixels() -> None:
    """Nobody asks for the gradient of pixels: the first convolution's backward pass is half as long."""
    image = replace(VIT, class_token=False, pooling="mean")
    clip = model(image)
    with FlopCounterMode(display=False) as counter:
        clip.image(torch.rand(1, 3, 32, 32)).sum().backward()
    patches = 2 * 3 * 8 * 8 * 32 * 16
    assert counter.get_total_flops() == 3 * image_flops(image, 16) - patches


def test_a_long_sequence_of_vit_b_32_needs_its_known_amount() -> None:
    """ViT-B/32 is published as 4.4 billion multiplications with additions a picture, last block included."""
    vit = VisionConfig(224, 32, 768, uniform_blocks(12, 768), class_token=False, pooling="mean")
    assert image_flops(vit, 512) / 2 == pytest.approx(4.4e9, rel=0.03)


def test_the_peak_is_that_of_a_product_and_is_measured_once() -> None:
    first = peak_flops("cpu", torch.float32)
    start = time.perf_counter()
    assert peak_flops("cpu", torch.float32) == first
    assert time.perf_counter() - start < 1e-3
    left = torch.rand(512, 512)
    start = time.perf_counter()
    for _ in range(4):
        left @ left
    rate = 4 * 2 * 512**3 / (time.perf_counter() - start)
    assert 0.1 * rate < first < 20 * rate


def test_the_meter_divides_operations_by_time() -> None:
    meter = Meter(window=3)
    meter.mark = time.perf_counter() - 100
    meter.step(1, flops=10**15)  # leaves the window
    for _ in range(3):
        meter.mark = time.perf_counter() - 2
        meter.step(8, flops=6 * 10**9)
    assert meter.rate == pytest.approx(4, rel=0.01) and meter.flops_rate == pytest.approx(3e9, rel=0.01)
