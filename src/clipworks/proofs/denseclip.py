"""DenseCLIP: does the language half help a trained segmenter, beyond deep supervision and more channels?

Rao et al., CVPR 2022. Scenes of the world at 64 pixels, 18 shapes and the background; a few train, the
tower stays frozen (the paper trains it), and all arms have the same crops, steps and head. The classes' names
are those of the world, the background's is "background".

- fpn: the pyramid and head alone, by the loss of its logits;
- DenseCLIP;
- no_decoder: γ stays zero, so that class vectors do not see the picture;
- free: K learned vectors in place of the text tower's, everything else as it is;
- permuted: the names of other classes.

Expected: DenseCLIP above the head alone, most with few pictures; free vectors near it. The claim is refuted
if it is not above the head alone; that language is the cause, if free vectors or permuted names do as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipworks.checkpoints.zoo import load
from clipworks.data.world.dataset import WorldScenes
from clipworks.data.world.scenes import SHAPES
from clipworks.evaluate.dense import confusion, mean_iou
from clipworks.methods.dense.denseclip import DenseCLIP, Network, Seen, pixel_loss
from clipworks.parts.segmentation import Segmentation
from clipworks.proofs.base import Budget, Outcome, Proof

SIDE = 64
NAMES = ("background", *SHAPES)


@dataclass(frozen=True)
class Size:
    """How large the experiment is: scenes that train and test, and steps."""

    train: tuple[int, ...] = (100,)
    test: int = 100
    steps: int = 150


SIZES: dict[Budget, Size] = {"small": Size(), "full": Size(train=(20, 100, 500), test=400, steps=600)}


class HeadAlone(DenseCLIP):
    """The pyramid and head; the score map's channels are zero and its loss is left out."""

    def _network(self, classes: int) -> Network:
        network = super()._network(classes)
        network.score_map = lambda seen, vectors: _zeros(seen, classes)  # type: ignore[method-assign]
        return network

    def _loss(self, network: Network, seen: Seen, vectors: Tensor, labels: Tensor) -> Tensor:
        return pixel_loss(network.logits(seen, network.score_map(seen, vectors)), labels)


class NoDecoder(DenseCLIP):
    """γ = 0, and not learned."""

    def _network(self, classes: int) -> Network:
        network = super()._network(classes)
        network.gamma = nn.Parameter(torch.zeros_like(network.gamma), requires_grad=False)
        return network

    def _groups(self, network: Network) -> list[dict[str, Any]]:
        groups = super()._groups(network)
        for group in groups:
            group["params"] = [one for one in group["params"] if one.requires_grad]
        return [group for group in groups if group["params"]]


class FreeVectors(DenseCLIP):
    """One learned vector a class in place of the text tower's; they begin as long as those are."""

    def _network(self, classes: int) -> Network:
        network = super()._network(classes)
        lengths = super()._bank(NAMES)(network.contexts.detach()).norm(dim=1, keepdim=True)
        drawn = torch.randn(classes, self.clip.width)
        network.contexts = nn.Parameter(drawn / drawn.norm(dim=1, keepdim=True) * lengths)
        return network

    def _bank(self, names: Sequence[str]) -> Any:
        return _itself


class Permuted(DenseCLIP):
    """Every class under the name of another."""

    def _bank(self, names: Sequence[str]) -> Any:
        order = np.random.default_rng(self.seed).permutation(len(names))
        return super()._bank([names[place] for place in order])


def _zeros(seen: Seen, classes: int) -> Tensor:
    batch, _, height, width = seen.places.shape
    return seen.places.new_zeros(batch, classes, height, width)


def _itself(contexts: Tensor) -> Tensor:
    return contexts


ARMS: dict[str, Callable[..., DenseCLIP]] = {
    "fpn": HeadAlone,
    "denseclip": DenseCLIP,
    "no_decoder": NoDecoder,
    "free": FreeVectors,
    "permuted": Permuted,
}


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed."""
    size, clip = SIZES[budget], load("seedling")
    settings: dict[str, Any] = {
        "decoder_width": 64,
        "decoder_layers": 2,
        "head_width": 64,
        "train_tower": False,
        "crop": SIDE,
        "scale": (1.0, 1.5),
        "views": 2,
        "steps": size.steps,
        "batch_size": 16,
        "lr": 1e-3,
        "size": SIDE,
        "window": SIDE,
        "seed": seed,
        "progress": False,
    }
    images, masks = scenes(2 * seed, max(size.train))
    test = scenes(2 * seed + 1, size.test)
    found: dict[str, Any] = {
        name: {
            f"at_{count}": measured(arm(clip, NAMES, **settings).fit(images[:count], masks[:count]), *test)
            for count in size.train
        }
        for name, arm in ARMS.items()
    }
    return Outcome(found["fpn"]["at_100"], found["denseclip"]["at_100"], found)


def scenes(seed: int, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first scenes of a world, (H, W, 3), and their label maps (H, W), 0 for the background."""
    world = WorldScenes(None, seed, count, SIDE, sources=())
    truths = [world[index].extra["truth"] for index in range(count)]
    return [one.pixels for one in truths], [one.classes.astype(np.int64) for one in truths]


def measured(segmenter: DenseCLIP, images: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """Mean IoU over all classes."""
    counts = torch.zeros(len(NAMES), len(NAMES) + 1, dtype=torch.int64)
    for found, truth in zip(segmenter.segment_all(images, list(NAMES)), masks, strict=True):
        if isinstance(found, Segmentation):
            counts += confusion(found.map, truth, len(NAMES))
    return mean_iou(counts).mean


PROOF = Proof(
    slug="denseclip",
    claim="A pyramid and head that also see the score map of class names segment better than without it.",
    baseline="the pyramid and head alone",
    method="DenseCLIP, its tower frozen",
    metric="mean IoU after 100 pictures",
    run=run,
    controls={
        "no_decoder.at_100": "the context decoder",
        "free.at_100": "language: free class vectors in its place",
        "permuted.at_100": "the right names: those of other classes in their place",
    },
)
