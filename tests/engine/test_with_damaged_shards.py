"""Damaged data costs its own examples: the training goes on, and what was left out is counted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.core.images import Preprocessing
from clipworks.core.tokenizer import Tokens
from clipworks.data.loader import Loader, Reading
from clipworks.data.shards import ShardPieces, TarShards, write_shards
from clipworks.data.source import Example
from clipworks.data.streams import Stream
from clipworks.engine import Callback, Recipe, Saving, State, fit

SHARDS, SIZE = 5, 40
CORRUPT = {4, 33, 45, 71, 77, 102, 118, 119}  # 5 in 100 of the four shards that are there
LOST = 7  # examples that stood behind the end of the truncated shard


class Words:
    """A tokenizer of texts that are numbers."""

    def __call__(self, texts: list[str]) -> Tokens:
        ids = torch.tensor([[1 + int(text) % 60, 63] for text in texts])
        return Tokens(ids, torch.ones(len(texts), dtype=torch.int64))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: Any) -> str:
    """Five shards: one is missing, one truncated, and 5 % of the pictures are no pictures."""
    folder: Path = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    examples = []
    for number in range(SHARDS * SIZE):
        content = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(content, "PNG")
        image = b"\x89PNG, and then nothing of the kind" if number in CORRUPT else content.getvalue()
        examples.append(Example(f"e{number:03d}", image, {"alt": str(number)}))
    paths = write_shards(examples, folder, SIZE)
    paths[3].unlink()
    with tarfile.open(paths[4]) as tar:
        cut = next(m for m in tar.getmembers() if m.name == f"e{SHARDS * SIZE - LOST:03d}.png")
    paths[4].write_bytes(paths[4].read_bytes()[: cut.offset_data + 1])
    return f"{folder}/shard-{{000000..{SHARDS - 1:06d}}}.tar"


def loader(kind: str, shards: str) -> Loader:
    source = TarShards(shards) if kind == "random access" else Stream(ShardPieces(shards), window=16)
    return Loader(source, Preprocessing(image_size=16), Words(), 16, seed=3, reading=Reading(workers=2))


class Watch(Callback):
    """Keeps losses, and may stop."""

    def __init__(self, stop: int | None = None) -> None:
        self.losses: list[float] = []
        self.stop = stop

    def on_step(self, state: State) -> None:
        self.losses.append(state.loss)
        if state.step == self.stop:
            raise ZeroDivisionError


@pytest.mark.parametrize("kind", ["random access", "stream"])
def test_training_goes_on_and_the_report_counts(
    small: Any, dropping: Any, tmp_path: Path, shards: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(steps=20, warmup=2, lr=3e-3, precision="fp32")
    data, watch = loader(kind, shards), Watch()
    result = fit(small(), dropping(), data, recipe, folder=tmp_path, callbacks=[watch], show="text")
    assert result.step == 20 and len(watch.losses) == 20 and np.isfinite(watch.losses).all()
    assert result.samples == sum([16] * 20) or kind == "stream"
    readable = (SHARDS - 1) * SIZE - LOST
    expected = {"missing shard": 1, "truncated shard": 1, "unreadable picture": len(CORRUPT)}
    assert result.skipped is not None and result.skipped.counts == expected
    said = capsys.readouterr().out
    assert "skipped 10" in said and "8 unreadable picture" in said
    assert (tmp_path / "skipped.txt").read_text().startswith("skipped 10")
    if kind == "random access":
        assert len(data) == readable // 16


@pytest.mark.parametrize("kind", ["random access", "stream"])
def test_with_damage_a_resumed_training_ends_with_the_same_weights(
    small: Any, dropping: Any, tmp_path: Path, shards: str, kind: str
) -> None:
    recipe = Recipe(steps=20, warmup=2, lr=3e-3, precision="fp32")

    def train(folder: Path, watch: Watch) -> Any:
        return fit(
            small(), dropping(), loader(kind, shards), recipe,
            folder=folder, callbacks=[watch], saving=Saving(steps=1), show="nothing",
        )  # fmt: skip

    expected = train(tmp_path / "whole", Watch())
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", Watch(stop=7))
    found = train(tmp_path / "cut", Watch())
    for name, tensor in expected.clip.state_dict().items():
        assert torch.equal(found.clip.state_dict()[name], tensor), name
