"""The best evaluation's weights are kept; a training that no longer gets better ends, also when resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine import Recipe, fit
from clipworks.engine.checkpoints import tensors_once
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.parts.keep_best import KeepBest


@pytest.fixture
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 8})


def batch() -> Batch:
    ids = torch.stack([torch.full((4,), 62), torch.arange(1, 5), torch.full((4,), 63)], dim=1)
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(images=pixels, texts={"alt": Tokens(ids, torch.full((4,), 2))}, keys=list("abcd"))


class Scores:
    """Gives the next number each time, and remembers the weights it saw."""

    def __init__(self, *numbers: float) -> None:
        self.numbers, self.seen = list(numbers), []

    def __call__(self, clip: Any) -> dict[str, float]:
        self.seen.append({name: tensor.clone() for name, tensor in tensors_once(clip).items()})
        return {"other": 0.0, "score": self.numbers[len(self.seen) - 1]}


def train(clip: Any, folder: Path, scores: Scores, patience: int | None) -> Any:
    keeper = KeepBest(scores, "score", folder / "best.safetensors", patience)
    recipe = Recipe(epochs=6, warmup=0, lr=1e-3, precision="fp32")
    return fit(clip, ClipObjective(), [batch()], recipe, folder=folder, callbacks=[keeper], show="nothing")


def test_the_best_trained_weights_are_kept_though_the_start_was_better(clip: Any, tmp_path: Path) -> None:
    scores = Scores(0.9, 0.1, 0.3, 0.2, 0.3, 0.1, 0.0)
    assert train(clip, tmp_path, scores, None).step == 6
    kept = load_file(tmp_path / "best.safetensors")
    assert kept.keys() == scores.seen[2].keys()
    assert all(torch.equal(kept[name], scores.seen[2][name]) for name in kept)
    assert not torch.equal(kept["image.projection.weight"], scores.seen[4]["image.projection.weight"])


def test_a_training_ends_after_its_patience_and_stays_ended(clip: Any, tmp_path: Path) -> None:
    scores = Scores(0.0, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)
    assert train(clip, tmp_path, scores, 2).step == 3
    assert len(scores.seen) == 4
    again = Scores()
    assert train(clip, tmp_path, again, 2).step == 3 and not again.seen
    assert train(clip, tmp_path, Scores(0.0, 0.0, 0.0), None).step == 6
