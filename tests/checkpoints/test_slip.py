"""Files of SLIP's training code: read as their names say, without the head that only training needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.checkpoints import layouts, rules
from clipworks.checkpoints.geometry import SLIP_HEADS
from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.errors import CheckpointError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model(width: int = 384, heads: int = 12) -> Clip:
    """A small model of the authors' kind, of which every weight shows."""
    image = VisionConfig(
        image_size=32,
        patch_size=16,
        width=width,
        blocks=uniform_blocks(2, width, heads=heads),
        activation="gelu",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
        mean=MEAN,
        std=STD,
    )
    text = TextConfig(12, 64, 32, uniform_blocks(2, 32, heads=8), activation="quick_gelu")
    clip = Clip.from_config(Config(image=image, text=text, width=16), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in clip.named_parameters():
            if tensor.ndim:
                rest = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
                spread = 0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
                tensor.copy_(rest + spread * torch.randn(tensor.shape, generator=generator))
    return clip


def released(clip: Clip) -> dict[str, Tensor]:
    weights = rules.write(layouts.rules("slip", clip.config), clip.state_dict())
    head = {
        "image_mlp.layer1.weight": torch.ones(8, clip.config.image.width),
        "image_mlp.bn1.running_mean": torch.zeros(8),
        "image_mlp.bn1.num_batches_tracked": torch.tensor(7),
        "image_mlp.layer3.bias": torch.zeros(4),
    }
    return {f"module.{name}": tensor.clone() for name, tensor in (weights | head).items()}


def save(path: Path, weights: dict[str, Tensor], **more: Any) -> Path:
    """As the training code saves: with its options, and what it needs to go on."""
    options = argparse.Namespace(model="SLIP_VITS16", lr=3e-3, betas=(0.9, 0.98), distributed=True)
    torch.save(
        {"epoch": 99, "state_dict": weights, "optimizer": {"state": {}}, "args": options, **more}, path
    )
    return path


def naive_image(weights: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """The image tower written out from the names of the file."""
    w = {name.removeprefix("module.visual."): tensor for name, tensor in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def line(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = torch.cat([w["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    for i in range(2):
        name = f"blocks.{i}"
        b, n, width = x.shape
        q, k, v = (
            line(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            .view(b, n, 3, heads, width // heads)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + line(mixed.transpose(1, 2).reshape(b, n, width), f"{name}.attn.proj")
        x = x + line(F.gelu(line(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 0] @ weights["module.image_projection"]


def test_released_file_is_read_as_its_names_say(tmp_path: Path) -> None:
    original = model()
    weights = released(original)
    loaded = load(save(tmp_path / "slip_small_100ep.pt", weights), tokenizer=False)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    expected = naive_image(weights, (pixels - mean) / std, heads=12)
    torch.testing.assert_close(loaded.image(pixels), expected, rtol=0, atol=1e-4)
    ids = torch.randint(1, 63, (4, 12), generator=torch.Generator().manual_seed(6))
    tokens = Tokens(ids, torch.tensor([11, 5, 7, 11]))
    torch.testing.assert_close(loaded.text(tokens), original.text(tokens), rtol=0, atol=1e-6)
    assert loaded.config.preprocessing.interpolation == "bilinear"
    assert (loaded.config.image.activation, loaded.config.text.activation) == ("gelu", "quick_gelu")


def test_how_many_heads_a_width_has_is_the_training_codes_or_the_callers(tmp_path: Path) -> None:
    assert SLIP_HEADS == {384: 12, 768: 12, 1024: 16}
    file = save(tmp_path / "odd.pt", released(model(width=64, heads=4)))
    with pytest.raises(CheckpointError, match="into how many heads"):
        load(file, tokenizer=False)
    loaded = load(file, heads=(4, 8), tokenizer=False)
    assert {block.heads for block in loaded.config.image.blocks} == {4}


def test_a_stranger_or_a_gap_among_the_weights_is_refused(tmp_path: Path) -> None:
    weights = released(model())
    more = weights | {"module.visual.head.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"visual\.head"):
        load(save(tmp_path / "more.pt", more), tokenizer=False)
    less = {name: tensor for name, tensor in weights.items() if not name.endswith("blocks.1.norm2.bias")}
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.1\.norm2\.bias"):
        load(save(tmp_path / "less.pt", less), tokenizer=False)


class Strange:
    """What a pickle may bring along, and what reading weights must not make."""


def test_a_file_that_wants_more_than_options_beside_tensors_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "strange.pt", released(model()), scaler=Strange())
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load(file, tokenizer=False)
