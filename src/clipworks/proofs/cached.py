"""Two-tower models on picture features that the seedling computed once: a training takes seconds.

Only the head over the pictures and the text tower learn, both from fresh weights; so experiments about texts
can see each picture many times, and several arms of one experiment share pictures to the last bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import unit
from clipworks.core.tokenizer import FileTokenizer
from clipworks.core.towers import TextTower
from clipworks.data.batch import Batch
from clipworks.data.loader import Loader, Reading
from clipworks.data.sentences import TextChoice
from clipworks.data.source import Source, iterate
from clipworks.encode.packed import text_features
from clipworks.engine import Recipe, Saving, fit
from clipworks.methods.pretrain.base import Objective
from clipworks.proofs.laboratory import fresh_clip


def seedling_features(source: Source) -> Tensor:
    """What the seedling says of each picture of a source, (n, w) unit vectors."""
    return load("seedling").embed_images([example.image for example in iterate(source)])


class Sketch(nn.Module):
    """A model of which an objective asks what it asks of a Clip; its pictures are cached features.

    Attributes:
        image: features (B, w) to vectors (B, D), a norm and two layers.
        text: a fresh text tower.
        scale, bias: as of a Clip.
    """

    def __init__(
        self, feature_width: int, tokenizer: FileTokenizer, seed: int, width: int = 64, depth: int = 2
    ):
        super().__init__()
        clip = fresh_clip(tokenizer, seed, width=width, depth=depth)
        generator = torch.Generator().manual_seed(seed)
        layers = [(feature_width, 2 * width), (2 * width, width)]
        first, second = (nn.utils.skip_init(nn.Linear, *sizes) for sizes in layers)
        with torch.no_grad():
            for layer in (first, second):
                layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
        self.image = nn.Sequential(nn.LayerNorm(feature_width), first, nn.GELU(), second)
        self.text: TextTower = cast(TextTower, clip.text)
        self.scale, self.bias = clip.scale, None
        self.tokenizer, self.width = tokenizer, width

    @torch.no_grad()
    def embed_images(self, features: Tensor) -> Tensor:
        """Cached features (n, w) to unit vectors (n, D)."""
        return unit(self.image(features))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, D)."""
        return unit(text_features(self.text, self.tokenizer(list(texts))))

    def accuracy(self, features: Tensor, labels: Tensor, texts: Sequence[Sequence[str]]) -> float:
        """Top-1 in [0, 1] of cached features (n, w) with labels (n,) among classes that have texts each."""
        vectors = self.embed_texts([text for own in texts for text in own])
        head = unit(torch.stack([rows.mean(dim=0) for rows in vectors.split([len(own) for own in texts])]))
        found = (self.embed_images(features) @ head.T).argmax(dim=1)
        return float((found == labels).float().mean())


def train(
    sketch: Sketch,
    objective: Objective,
    source: Source,
    features: Mapping[str, Tensor],
    recipe: Recipe,
    batch_size: int,
    texts: Sequence[str] | TextChoice,
) -> Sketch:
    """Train a sketch on the texts of a source and the cached features (w,) of its keys."""

    def with_features(batch: Batch) -> Batch:
        return replace(batch, images=torch.stack([features[key] for key in batch.keys]))

    loader = Loader(
        source,
        None,
        sketch.tokenizer,
        batch_size,
        texts=texts,
        seed=recipe.seed,
        reading=Reading(workers=1),
        transform=with_features,
    )
    arguments: dict[str, Any] = {"saving": Saving(minutes=None), "show": "nothing"}
    with tempfile.TemporaryDirectory() as folder:
        fit(sketch, objective, loader, recipe, folder=folder, **arguments)
    return sketch.eval()
