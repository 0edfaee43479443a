"""A training fed by the real loader resumes exactly, wherever it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.core.images import Preprocessing
from clipworks.core.tokenizer import Tokens
from clipworks.data.loader import Loader, Reading
from clipworks.data.source import Example, Examples
from clipworks.engine import Callback, Recipe, Saving, State, fit


class Words:
    """A tokenizer of texts that are numbers."""

    def __call__(self, texts: list[str]) -> Tokens:
        ids = torch.tensor([[1 + int(text) % 60, 63] for text in texts])
        return Tokens(ids, torch.ones(len(texts), dtype=torch.int64))


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: State) -> None:
        if state.step == self.step:
            raise ZeroDivisionError


def loader(workers: int) -> Loader:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(26)]
    examples = [
        Example(str(i), picture, {"alt": [str(i), str(i + 26)]}) for i, picture in enumerate(pictures)
    ]
    return Loader(
        Examples(examples), Preprocessing(image_size=16), Words(), 8, seed=3, reading=Reading(workers=workers)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_and_between_epochs_it_ends_with_the_same_weights(
    small: Any, dropping: Any, tmp_path: Path, workers: int
) -> None:
    recipe = Recipe(epochs=3, warmup=2, lr=3e-3, precision="fp32")

    def train(folder: Path, *callbacks: Callback) -> Any:
        return fit(
            small(), dropping(), loader(workers), recipe,
            folder=folder, callbacks=callbacks, saving=Saving(steps=1), show="nothing",
        )  # fmt: skip

    expected = train(tmp_path / "whole")
    assert expected.step == 9
    for step in (2, 4, 7):  # 4 resumes at an end of an epoch
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / str(step), StopAt(step))
        result = train(tmp_path / str(step))
        assert result.samples == 72
        for name, tensor in expected.clip.state_dict().items():
            assert torch.equal(result.clip.state_dict()[name], tensor), f"{name}, stopped at step {step}"
