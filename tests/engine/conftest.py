"""A model, an objective and data so small that a whole training takes a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipworks.core.clip import unit
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine import Recipe

SHORT = Recipe(epochs=3, warmup=4, lr=3e-3, precision="fp32", seed=1)


class Batches:
    """The same examples in an order that the epoch decides; resumes by its position."""

    def __init__(self, count: int = 4, size: int = 8, side: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(
            0, 256, (count * size, 3, side, side), generator=generator, dtype=torch.uint8
        )
        self.ids = torch.randint(1, 60, (count * size, 6), generator=generator)
        self.count, self.size = count, size
        self.epoch = self.taken = 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.taken = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.taken = state["epoch"], state["taken"]

    def batch(self, rows: Tensor) -> Batch:
        tokens = Tokens(self.ids[rows], torch.full((len(rows),), 5), None)
        return Batch(images=self.images[rows], texts={"alt": tokens}, keys=[str(int(row)) for row in rows])

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch))
        for rows in order.view(self.count, self.size)[self.taken :]:
            self.taken += 1
            yield self.batch(rows)
        self.epoch, self.taken = self.epoch + 1, 0


class Dropping(nn.Module):
    """CLIP's loss with dropout on the features, so that random numbers matter, and a parameter of its own."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(share)
        self.head = nn.Linear(16, 16)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(16))
            self.head.bias.zero_()

    def prepare(self, clip: nn.Module) -> nn.Module:
        return clip

    def features(self, clip: Any, batch: Batch) -> dict[str, Any]:
        image = unit(self.head(self.dropout(clip.image(batch.images))))
        text = unit(self.dropout(clip.text(batch.texts["alt"])))
        return {"image": image, "text": text, "scale": clip.scale}

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        logits = features["scale"].exp() * features["image"] @ features["text"].T
        own = torch.arange(len(logits))
        forth, back = nn.functional.cross_entropy(logits, own), nn.functional.cross_entropy(logits.T, own)
        return {"forth": forth / 2, "back": back / 2}


@pytest.fixture
def small(tiny_clip: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of a Clip for pictures of 16 pixels and 64 words."""

    def build(seed: int = 0, **config: Any) -> Any:
        return tiny_clip(
            seed, image={"image_size": 16, **config}, text={"vocab_size": 64, "context_length": 8}
        )

    return build


@pytest.fixture
def batches() -> type[Batches]:
    return Batches


@pytest.fixture
def dropping() -> type[Dropping]:
    return Dropping


@pytest.fixture
def short() -> Recipe:
    return SHORT
