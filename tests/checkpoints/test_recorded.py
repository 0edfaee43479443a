"""Against open_clip: what it answered on small random models (see benchmarks/record_checkpoints.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import clipworks
from clipworks.core.clip import Clip
from clipworks.core.tokenizer import Tokens
from clipworks.errors import CheckpointError

RECORDS = sorted((Path(__file__).parent / "recorded").glob("open_clip-*.safetensors"))
TOLERANCE = 1e-5


class Record:
    """One case, laid out as the folder that open_clip would have written."""

    def __init__(self, path: Path, folder: Path):
        with safe_open(path, "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.tensors = load_file(path)
        self.folder = folder
        self.weights = {
            name.removeprefix("weights/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("weights/")
        }
        save_file(self.weights, folder / "open_clip_model.safetensors")
        self.write_config()

    def write_config(self) -> None:
        (self.folder / "open_clip_config.json").write_text(json.dumps(self.config))

    def tokens(self) -> Tokens:
        ids = self.tensors["ids"].long()
        last = self.config["model_cfg"]["text_cfg"].get("pool_type") == "last"
        return Tokens(ids, torch.full((len(ids),), 11) if last else ids.argmax(1))

    @torch.no_grad()
    def differences(self, clip: Clip) -> dict[str, float]:
        image, text = clip(self.tensors["pixels"], self.tokens())
        found: dict[str, Tensor] = {"image": image, "text": text, "logits": clip.logits(image, text)}
        return {name: float((value - self.tensors[name]).abs().max()) for name, value in found.items()}


@pytest.fixture(params=RECORDS, ids=lambda path: path.stem.removeprefix("open_clip-"))
def record(request: pytest.FixtureRequest, tmp_path: Path) -> Record:
    return Record(request.param, tmp_path)


def test_there_are_records() -> None:
    assert len(RECORDS) == 7
    assert all(path.stat().st_size < 400_000 for path in RECORDS)


@pytest.mark.checkpoint("clip")
def test_towers_and_logits_equal_open_clip(record: Record) -> None:
    found = record.differences(clipworks.load(record.folder, tokenizer=False))
    assert found["image"] < TOLERANCE and found["text"] < TOLERANCE and found["logits"] < 20 * TOLERANCE, (
        found
    )


def test_the_record_tells_activations_apart(record: Record) -> None:
    """The comparison above would notice the wrong activation: it can fail."""
    clip = clipworks.load(record.folder, tokenizer=False)
    other = "gelu" if clip.config.text.activation == "quick_gelu" else "quick_gelu"
    text = replace(clip.config.text, activation=other)
    twin = Clip.from_config(replace(clip.config, text=text), seed=None)
    twin.load_state_dict(clip.state_dict())
    assert record.differences(twin)["text"] > 20 * TOLERANCE


def test_weights_come_back_bit_for_bit_in_open_clips_names(record: Record, tmp_path: Path) -> None:
    clip = clipworks.load(record.folder, tokenizer=False)
    from clipworks.checkpoints import layouts, rules

    layout = layouts.recognize(record.weights, "record")
    written = rules.write(layouts.rules(layout, clip.config), clip.state_dict())
    assert written.keys() == record.weights.keys()
    assert all(
        torch.equal(written[name], tensor.to(written[name].dtype)) for name, tensor in record.weights.items()
    )


def test_a_training_checkpoint_with_prefixes_is_read_the_same(record: Record, tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in record.weights.items()}
    (record.folder / "open_clip_model.safetensors").unlink()
    path = record.folder / "open_clip_pytorch_model.bin"
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}}}, path)
    found = record.differences(clipworks.load(record.folder, tokenizer=False))
    assert max(found["image"], found["text"]) < TOLERANCE


def test_a_config_that_names_the_other_activation_is_believed_but_not_against_the_caller(
    record: Record,
) -> None:
    if record.config["model_cfg"]["vision_cfg"].get("timm_model_name"):
        pytest.skip("timm's towers have their activation by name")
    quick = record.config["model_cfg"].get("quick_gelu", False)
    with pytest.raises(CheckpointError, match="activation is"):
        clipworks.load(record.folder, activation="gelu" if quick else "quick_gelu", tokenizer=False)
