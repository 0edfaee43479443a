"""DenseCLIP: does the language half help a trained segmenter, beyond deep supervision and more channels?

Rao et al., CVPR 2022. Scenes of two to four large things at 64 pixels; the classes are the background and the
twelve colors of things, which the seedling tells apart by patches. Twenty or a hundred pictures train, the
tower stays frozen (the paper trains it), and all arms have the same crops, steps and head; the learning rate
was chosen for the head alone.

- fpn: the pyramid and head alone, by the loss of its logits;
- denseclip;
- no_decoder: γ stays zero, so that class vectors do not see the picture;
- free: K learned vectors in place of the text tower's, everything else as it is;
- permuted: the names of other classes.

Expected: DenseCLIP above the head alone, most with few pictures; free vectors near it. The claim is refuted
if it is not above the head alone after a hundred pictures; that language is the cause, if free vectors or
permuted names do as well. The larger budget has 500 pictures besides, and more steps.
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
from clipworks.data.world.scenes import COLORS, SceneConfig, render, sample
from clipworks.evaluate.dense import confusion, mean_iou
from clipworks.methods.dense.denseclip import DenseCLIP, Network, Seen, pixel_loss
from clipworks.parts.segmentation import Segmentation
from clipworks.proofs.base import Budget, Outcome, Proof

SIDE = 64
NAMES = ("background", *COLORS)
WORLD = SceneConfig(sizes=("large",), count=(2, 4))


@dataclass(frozen=True)
class Size:
    """How large the experiment is: scenes that train and test, and steps."""

    train: tuple[int, ...] = (20, 100)
    test: int = 150
    steps: int = 150


CLAIMED = 100  # pictures
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
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size, that of the claim last."""
    clip = load("seedling")
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
        "lr": 3e-3,
        "size": SIDE,
        "window": SIDE,
        "seed": seed,
        "progress": False,
    }
    most = max(size.train)
    images, masks = scenes(seed, range(most))
    test = scenes(seed, range(most, most + size.test))
    found: dict[str, Any] = {
        name: {
            f"at_{count}": measured(arm(clip, NAMES, **settings).fit(images[:count], masks[:count]), *test)
            for count in size.train
        }
        for name, arm in ARMS.items()
    }
    claimed = f"at_{CLAIMED if CLAIMED in size.train else most}"
    return Outcome(found["fpn"][claimed], found["denseclip"][claimed], found)


def scenes(seed: int, which: range) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scenes of a world, (H, W, 3), and their label maps (H, W), 0 for the background."""
    images, masks = [], []
    for index in which:
        scene = sample(WORLD, seed, index)
        shown = render(scene, SIDE)
        numbers = np.array([0] + [1 + COLORS.index(thing.color) for thing in scene.objects])
        images.append(shown.pixels)
        masks.append(numbers[shown.instances].astype(np.int64))
    return images, masks


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
