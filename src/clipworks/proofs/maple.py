"""MaPLe: does coupling the prompts of both towers help classes never trained on? (Khattak et al., CVPR 2023)

The seedling is fitted to 16 pictures each of one half of 20 classes, single shapes in a style that it was not
trained on, and measured on that half and, under their names, on the other. All arms see the same draw in the
same number of steps of the same size, at the same learning rate:

- zero-shot, and CoOp from the words "a photo of a";
- deep language prompts and VPT, each in one tower alone;
- IVLP with MaPLe's depth and length: prompts in both towers without the maps, the fair rival;
- MaPLe, and MaPLe with its maps frozen as they start, which couples at random.

J is three quarters of the image tower's blocks, or all of the text tower's if these are fewer. H is the
harmonic mean of the accuracies on both halves. Expected: H of MaPLe above that of CoOp, mostly from new
classes; against IVLP a small difference that may well stay undecided. The claim is refuted if H is not above
CoOp's; that of the coupling if it is below IVLP's.

The larger budget also measures depth 1 and four tokens, and CoOp by its own recipe; tries two learning rates,
of which each arm takes the better one on four more pictures a base class, if the data has a validation part;
and repeats all with CIFAR-10, if its folder is given.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected, Source
from clipworks.data.splits import Splits, examples_of, open_splits, world_style
from clipworks.evaluate.fewshot import accuracy_on, base_new, few_shot, harmonic_mean
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.coop import CoOp
from clipworks.methods.adapt.ivlp import IndependentPrompts, LanguagePrompts
from clipworks.methods.adapt.maple import MaPLe
from clipworks.methods.adapt.vpt import VisionPrompts
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.features import FeatureStore
from clipworks.parts.shots import Shots
from clipworks.proofs.base import Budget, Outcome, Proof

STYLE = "sketch"  # the seedling has seen every other one
SHOTS = 16
INIT = "a photo of a"
Arm = Callable[[float], Adapter]  # of the learning rate


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        test: pictures.
        epochs: of every arm.
        rates: learning rates; if several, chosen on validation pictures.
        shots: pictures a class.
        variants: measure other depths and lengths, and CoOp by its own recipe.
    """

    test: int
    epochs: int
    rates: Sequence[float]
    shots: int = SHOTS
    variants: bool = False


SIZES: dict[Budget, Size] = {
    "small": Size(test=1000, epochs=5, rates=(0.0035,)),
    "full": Size(test=1000, epochs=5, rates=(0.0035, 0.0025), variants=True),
}


class FrozenMaps(MaPLe):
    """MaPLe whose maps are not trained: the coupling is there, and random."""

    def _prepare(self, shots: Shots | None) -> nn.Module:
        coupled = super()._prepare(shots)
        coupled.maps.requires_grad_(False)  # type: ignore[union-attr]
        return coupled


@dataclass(frozen=True)
class Half:
    """Some of the classes: what is said of them, and pictures with labels (n,) that count them."""

    classes: ClassTexts
    pictures: list[Any]
    labels: NDArray[np.int64]


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated, with photographs besides."""
    size, clip = SIZES[budget], load("seedling")
    outcome = experiment(clip, world_style(STYLE, clip.preprocessing.image_size, seed), seed, size)
    if data is None or budget == "small":
        return outcome
    splits = open_splits(data / "cifar10" if (data / "cifar10").is_dir() else data)
    photographs = experiment(clip, splits, seed, size)
    return Outcome(outcome.baseline, outcome.method, {**outcome.details, "photographs": photographs.details})


def experiment(clip: Clip, splits: Splits, seed: int, size: Size) -> Outcome:
    """The experiment on any data, at any size."""
    base, new = base_new(np.arange(len(splits.classes)))
    draw = few_shot(labels_of(splits.train), size.shots, seed, labels_of(splits.validation))
    rows = np.random.default_rng(seed).permutation(len(splits.test))[: size.test]
    train = half(Selected(splits.train, draw.train), splits.classes, base)
    held = half(Selected(splits.validation, draw.validation), splits.classes, base)
    on_base, on_new = (half(Selected(splits.test, rows), splits.classes, these) for these in (base, new))

    def fitted(arm: Arm, rate: float) -> Adapter:
        return arm(rate).set_params(progress=False, seed=seed).fit(train.pictures, train.labels)

    def measured(arm: Arm) -> dict[str, float]:
        choices = [fitted(arm, rate) for rate in size.rates]
        best = choices[0]
        if len(choices) > 1 and len(held.pictures):
            best = max(choices, key=lambda one: one.score(held.pictures, held.labels))
        of_base = accuracy_on(best, on_base.pictures, on_base.labels)
        of_new = accuracy_on(best, on_new.pictures, on_new.labels, on_new.classes)
        return {"base": of_base, "new": of_new, "harmonic": harmonic_mean(of_base, of_new)}

    with tempfile.TemporaryDirectory() as store:
        every = arms(clip, train.classes, size, FeatureStore(store))
        found = {name: measured(arm) for name, arm in every.items()}
    return Outcome(found["coop"]["harmonic"], found["maple"]["harmonic"], dict(found))


def labels_of(source: Source) -> NDArray[np.int64]:
    """(n,)."""
    labels = source.labels
    return np.empty(0, np.int64) if labels is None else labels


def half(source: Source, classes: ClassTexts, chosen: NDArray[np.int64]) -> Half:
    """The pictures of some classes."""
    rows = np.flatnonzero(np.isin(labels_of(source), chosen))
    pictures, labels = examples_of(Selected(source, rows)) if len(rows) else ([], np.empty(0, np.int64))
    return Half(classes.select([int(label) for label in chosen]), pictures, np.searchsorted(chosen, labels))


def arms(clip: Clip, classes: ClassTexts, size: Size, store: FeatureStore) -> dict[str, Arm]:
    """What is compared, by name; arms that leave the image tower as it is share a store."""
    depth = math.ceil(3 * len(clip.image.blocks) / 4)  # type: ignore[arg-type]
    depth = min(depth, len(clip.text.blocks))  # type: ignore[arg-type]
    length = 2
    same: dict[str, Any] = {"epochs": size.epochs, "batch_size": 4}
    # Towers that stay as they are read as many views from a table as the others see.
    seen: dict[str, Any] = {"views": size.epochs, "store": store, **same}

    def ivlp(rate: float) -> Adapter:
        prompts = IndependentPrompts(clip, classes, lr=rate, **same)
        lengths = {"text_length": length, "vision_length": length}
        return prompts.set_params(**lengths, text_depth=depth, vision_depth=depth)

    found: dict[str, Arm] = {
        "zero_shot": lambda _: ZeroShot(clip, classes, store=store),
        "coop": lambda rate: CoOp(clip, classes, init=INIT, lr=rate, **seen),
        "language": lambda rate: LanguagePrompts(clip, classes, lr=rate, **seen),
        "vpt": lambda rate: VisionPrompts(clip, classes, lr=rate, **same),
        "ivlp": ivlp,
        "maple": lambda rate: MaPLe(clip, classes, prompt_length=length, depth=depth, lr=rate, **same),
        "frozen_maps": lambda rate: FrozenMaps(
            clip, classes, prompt_length=length, depth=depth, lr=rate, **same
        ),
    }
    if size.variants:
        found["depth_1"] = lambda rate: MaPLe(clip, classes, depth=1, lr=rate, **same)
        found["4_tokens"] = lambda rate: MaPLe(clip, classes, prompt_length=4, depth=depth, lr=rate, **same)
        found["coop_recipe"] = lambda _: CoOp(clip, classes, init=INIT, store=store)
    return found


PROOF = Proof(
    slug="maple",
    claim="Prompts in both towers, those of the pictures made of those of the texts, do better on classes "
    "seen and never seen together than words learned for the texts alone.",
    baseline="CoOp in as many steps",
    method="MaPLe",
    metric="harmonic mean of the accuracies on base and new classes, 16 pictures a base class",
    run=run,
    controls={
        "ivlp.harmonic": "the coupling of the two towers' prompts",
        "frozen_maps.harmonic": "that the coupling is learned",
    },
)
