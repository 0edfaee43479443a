"""Layer decay: every parameter once, at the rate of its level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clipworks.errors import ConfigError
from clipworks.parts.layer_decay import layer_groups


def rates(module: nn.Module, decay: float = 0.5) -> dict[str, tuple[float, float]]:
    groups = layer_groups(module, decay=decay, weight_decay=0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)), "a parameter is in two groups"
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in module.named_parameters() if id(p) in found}


def test_rates_fall_from_head_to_input_in_both_towers(tiny_clip: Callable[..., Any]) -> None:
    clip = tiny_clip()
    found = rates(clip)
    assert found.keys() == dict(clip.named_parameters()).keys()
    expected = {
        "scale": 1.0,
        "image.projection.weight": 1.0,
        "image.ln_post.weight": 1.0,
        "image.blocks.1.attention.qkv.weight": 0.5,
        "image.blocks.0.mlp.": 0.25,
        "image.patches.weight": 0.125,
        "image.positions": 0.125,
        "image.class_token": 0.125,
        "image.ln_pre.bias": 0.125,
        "text.ln_final.bias": 1.0,
        "text.blocks.1.ln_1.weight": 0.5,
        "text.embedding.weight": 0.125,
    }
    for start, rate in expected.items():
        matching = [value for name, (value, _) in found.items() if name.startswith(start)]
        assert matching and set(matching) == {rate}, start


def test_weight_decay_is_for_matrices_and_a_decay_of_one_leaves_one_rate(
    tiny_clip: Callable[..., Any],
) -> None:
    found = rates(tiny_clip(), decay=1.0)
    assert {rate for rate, _ in found.values()} == {1.0}
    assert found["image.blocks.0.attention.qkv.weight"][1] == 0.1
    assert found["image.blocks.0.ln_1.weight"][1] == found["image.positions"][1] == found["scale"][1] == 0


def test_towers_of_other_libraries_are_known_by_their_blocks() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Linear(2, 2)
            self.encoder = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
            self.visual_projection = nn.Linear(2, 2)

    found = rates(nn.ModuleDict({"image": Foreign()}))
    assert [found[f"image.encoder.layers.{n}.weight"][0] for n in range(3)] == [0.125, 0.25, 0.5]
    assert found["image.embeddings.weight"][0] == 0.0625 and found["image.visual_projection.weight"][0] == 1


def test_frozen_parameters_are_left_out_and_shared_ones_take_the_lower_rate() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.projection = self.blocks[0]

    module = nn.ModuleDict({"image": Shared()})
    assert rates(module)["image.blocks.0.weight"][0] == 0.25
    module["image"].blocks[1].requires_grad_(False)
    assert "image.blocks.1.weight" not in rates(module)
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter"):
        layer_groups(module, decay=0.5, weight_decay=0.0)
    with pytest.raises(ConfigError, match=r"\(0, 1\], not 1\.5"):
        layer_groups(nn.Linear(2, 2), decay=1.5, weight_decay=0.0)


def test_a_residual_network_is_counted_in_stages(tiny_clip: Callable[..., Any]) -> None:
    from clipworks.core.config import ResNetConfig
    from clipworks.core.resnet import ModifiedResNet

    config = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4)
    tower = ModifiedResNet(config, 16)
    found = rates(nn.ModuleDict({"image": tower}))
    assert found["image.blocks.3.0.conv_1.weight"][0] == 0.5
    assert found["image.stem.conv_1.weight"][0] == 0.5**5 and found["image.pool.out.weight"][0] == 1
    assert torch.is_tensor(tower.positions)
