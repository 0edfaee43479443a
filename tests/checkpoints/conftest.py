"""What the tests of checkpoints share: tiny models in the files of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipworks.checkpoints import layouts, rules
from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def small(activation: str = "quick_gelu", vocabulary: int = 64, width: int = 32, seed: int = 0) -> Clip:
    """The smallest CLIP in OpenAI's geometry: 32-pixel pictures, 2 blocks, texts of 12 tokens."""
    blocks = uniform_blocks(2, width, 2)
    image = VisionConfig(32, 8, width, blocks, activation)  # type: ignore[arg-type]
    text = TextConfig(12, vocabulary, width, blocks, activation)  # type: ignore[arg-type]
    return lively(Clip.from_config(Config(16, image, text), seed=seed), seed)


def small_siglip(width: int = 32, vocabulary: int = 64) -> Clip:
    blocks = uniform_blocks(2, width, 2)
    image = VisionConfig(
        32, 8, width, blocks, "gelu_tanh", 1e-6, class_token=False, pre_norm=False, patch_bias=True,
        pooling="attention", projection=False, mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    text = TextConfig(12, vocabulary, width, blocks, "gelu_tanh", 1e-6, mask="none", projection="biased")
    return lively(Clip.from_config(Config(width, image, text, sigmoid=True)), 1)


def lively(clip: Clip, seed: int) -> Clip:
    """Fill a Clip with weights of which each shows in the answer: biases and gains are not at rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in clip.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim:
                noise = torch.randn(tensor.shape, generator=generator)
                if name.endswith("running_var"):
                    tensor.copy_(0.5 + noise.abs())
                else:
                    rest = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
                    tensor.copy_(rest + noise * (0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5))
    return clip


def openai_weights(clip: Clip) -> dict[str, Tensor]:
    """Its weights under OpenAI's names."""
    return rules.write(layouts.rules("openai", clip.config), clip.state_dict())


def write_open_clip(folder: Path, clip: Clip, **model: Any) -> Path:
    """A folder as open_clip writes it; `model` changes keys of `model_cfg`, dotted for those inside."""
    clip.save_open_clip(folder)
    edit(folder / "open_clip_config.json", {f"model_cfg.{key}": value for key, value in model.items()})
    return folder


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Change values of a JSON file by dotted key; `...` removes one."""
    values = json.loads(path.read_text())
    for dotted, value in changes.items():
        *way, last = dotted.split(".")
        inside = values
        for key in way:
            inside = inside.setdefault(key, {})
        if value is ...:
            inside.pop(last, None)
        else:
            inside[last] = value
    path.write_text(json.dumps(values))


def same_weights(one: Clip, other: Clip) -> bool:
    """Whether two Clips have the same weights, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of weights in OpenAI's names, without any config."""

    def write(clip: Clip | None = None, name: str = "weights.pt", **changes: Any) -> Path:
        weights = openai_weights(clip or small())
        path = tmp_path / name
        for key, value in changes.items():
            weights[key.replace("__", ".")] = value
        torch.save(weights, path)
        return path

    return write
