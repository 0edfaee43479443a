"""MetaCLIP's released files: training checkpoints with wrapped names, whose activation is nowhere in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.checkpoints.conftest import openai_weights, same_weights, small

import clipworks
from clipworks.checkpoints.known import MODELS
from clipworks.errors import CheckpointError

pytestmark = pytest.mark.checkpoint("metaclip")
NAMES = [
    *(f"ViT-{size}/metaclip_400m" for size in ("B-32", "B-16", "L-14")),
    *(f"ViT-{size}/metaclip_fullcc" for size in ("B-32", "B-16", "L-14", "H-14", "bigG-14")),
]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_a_released_training_checkpoint_gives_its_weights(prefix: str, tmp_path: Path) -> None:
    clip = small("quick_gelu")
    released = {
        "step": 390_625,
        "state_dict": {prefix + name: tensor for name, tensor in openai_weights(clip).items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.0}]},
        "scaler": {"scale": 1024.0},
        "positions": {"shard": 5},
    }
    torch.save(released, tmp_path / "b32_400m.pt")
    found = clipworks.load(
        tmp_path / "b32_400m.pt", activation="quick_gelu", statistics="clip", heads=(2, 2), tokenizer=False
    )
    assert same_weights(found, clip)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found.image(pixels), clip.eval().image(pixels))
        other = clipworks.load(
            tmp_path / "b32_400m.pt", activation="gelu", statistics="clip", heads=(2, 2), tokenizer=False
        )
        assert not torch.allclose(other.image(pixels), clip.image(pixels), atol=1e-3)
    with pytest.raises(CheckpointError, match="activation"):
        clipworks.load(tmp_path / "b32_400m.pt", tokenizer=False)


def test_every_name_brings_its_activation() -> None:
    for name in NAMES:
        assert MODELS[name].config.image.activation == MODELS[name].config.text.activation == "quick_gelu", (
            name
        )
    altogether = MODELS["ViT-H-14/metaclip_altogether"].config
    assert altogether.image.activation == altogether.text.activation == "gelu"
