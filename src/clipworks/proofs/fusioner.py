"""Fusioner: does the fusion read the name, also one never trained on, or does it cut out what stands out?

Ma et al., BMVC 2022. Mosaics of four generated pictures of one thing each, whose masks are the quadrants; a
mosaic is asked for its four names. Names are color and shape, "red star"; mosaics of 60 % of these pairs are
trained, the others are unseen by Fusioner, though the seedling knows colors and shapes. All arms have the
same towers, pictures and steps.

The metric is the mean IoU over questions where a pixel belongs to the name whose score is highest (`best`),
one rule for all arms; names drawn by lot would give a seventh. `there` takes scores above one half,
Fusioner's own rule, under which an answer that cannot tell names apart reaches a quarter at most.

- maskclip: the patches' probabilities among the four; the last block's residual sum and MLP are kept or not,
  whichever is better on mosaics of training;
- Fusioner;
- blind: one constant vector for every name, in training and test; its scores are equal, so that `best` gives
  every pixel to all four names, a quarter;
- late: patches and names meet in the cosine only;
- meaningless: a fixed random vector for each name.

Expected: Fusioner above MaskCLIP and above blind on trained and on unseen names; meaningless names as good as
Fusioner on trained ones and at chance on unseen ones. The claim is refuted if Fusioner is not above MaskCLIP
on unseen names, that it reads names if blind or meaningless ones do as well. The larger budget trains on more
mosaics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import unit
from clipworks.data.randomness import key_number
from clipworks.data.world.scenes import COLORS, SHAPES, SceneConfig, render, sample
from clipworks.methods.dense.base import Segmenter
from clipworks.methods.dense.fusioner import Fusioner
from clipworks.methods.dense.maskclip import MaskCLIP
from clipworks.proofs.base import Budget, Outcome, Proof

HALF = 32  # pixels of a quarter's side


@dataclass(frozen=True)
class Size:
    """How large the experiment is: mosaics that train, that test of either kind, and epochs."""

    train: int = 1200
    test: int = 150
    epochs: int = 3


SIZES: dict[Budget, Size] = {"small": Size(), "full": Size(train=4800, test=400, epochs=5)}
CHOSEN_ON = 60  # mosaics of training, for MaskCLIP's path


@dataclass(frozen=True)
class Mosaics:
    """Pictures (64, 64, 3), masks (64, 64) that count `names`, and the four names of each."""

    images: list[np.ndarray]
    masks: list[np.ndarray]
    asked: list[list[int]]
    names: list[str]

    def first(self, count: int) -> Mosaics:
        """The first of them."""
        return Mosaics(self.images[:count], self.masks[:count], self.asked[:count], self.names)


class Constant:
    """The same vector for every name."""

    def __init__(self, width: int) -> None:
        self.width = width

    def vectors(self, names: Sequence[str]) -> Tensor:
        """K names to (K, D), all rows alike."""
        return torch.full((len(names), self.width), self.width**-0.5)


class Meaningless(Constant):
    """A random vector for each name, always the same one."""

    def vectors(self, names: Sequence[str]) -> Tensor:
        """K names to (K, D) of unit length."""
        rows = [
            torch.randn(self.width, generator=torch.Generator().manual_seed(key_number(name) >> 1))
            for name in names
        ]
        return unit(torch.stack(rows))


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    clip, generator = load("seedling"), np.random.default_rng(seed)
    pairs = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    order = [pairs[place] for place in generator.permutation(len(pairs))]
    trained, unseen = order[: len(order) * 3 // 5], order[len(order) * 3 // 5 :]
    pool = things(seed, 12_000)
    train = mosaics(pool, trained, size.train, generator)
    tests = {
        "trained": mosaics(pool, trained, size.test, generator),
        "unseen": mosaics(pool, unseen, size.test, generator),
    }
    seen: dict[str, Any] = {"size": 2 * HALF, "window": 2 * HALF, "progress": False}
    settings: dict[str, Any] = {
        **seen,
        "width": 64,
        "layers": 3,
        "heads": 4,
        "doublings": 1,
        "epochs": size.epochs,
        "batch_size": 16,
        "views": 1,
        "colors": False,
        "seed": seed,
    }
    plain = [MaskCLIP(clip, **seen, residual=kept) for kept in (True, False)]
    some = train.first(CHOSEN_ON)
    arms: dict[str, Segmenter] = {
        "maskclip": max(plain, key=lambda one: measured(one, some)["best"]),
        "fusioner": Fusioner(clip, **settings),
        "blind": Fusioner(clip, **settings, text=Constant(clip.width)),
        "late": Fusioner(clip, **settings, fusion="late"),
        "meaningless": Fusioner(clip, **settings, text=Meaningless(clip.width)),
    }
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        if isinstance(arm, Fusioner):
            arm.fit(train.images, train.masks, train.names)
        found[name] = {kind: measured(arm, test) for kind, test in tests.items()}
    return Outcome(found["maskclip"]["unseen"]["best"], found["fusioner"]["unseen"]["best"], found)


def things(seed: int, count: int) -> dict[str, list[int]]:
    """Numbers of scenes of one thing in a world, by the name of the thing."""
    found: dict[str, list[int]] = {}
    for index in range(count):
        scene = sample(CONFIG, seed, index)
        main = scene.objects[0]
        found.setdefault(f"{main.color} {main.shape}", []).append(index)
    return {name: [(seed << 20) + index for index in some] for name, some in found.items()}


CONFIG = SceneConfig(count=(1, 1))


def mosaics(
    pool: dict[str, list[int]], names: list[str], count: int, generator: np.random.Generator
) -> Mosaics:
    """Four pictures of different names each, drawn from a pool; a picture may come again."""
    there = [name for name in names if name in pool]
    images, masks, asked = [], [], []
    for _ in range(count):
        drawn = generator.choice(len(there), 4, replace=False).tolist()
        image = np.empty((2 * HALF, 2 * HALF, 3), np.uint8)
        mask = np.empty((2 * HALF, 2 * HALF), np.int64)
        for place, which in enumerate(drawn):
            rows = slice(HALF * (place // 2), HALF * (place // 2) + HALF)
            columns = slice(HALF * (place % 2), HALF * (place % 2) + HALF)
            numbers = pool[there[which]]
            number = numbers[int(generator.integers(len(numbers)))]
            image[rows, columns] = render(sample(CONFIG, number >> 20, number & 0xFFFFF), HALF).pixels
            mask[rows, columns] = which
        images.append(image)
        masks.append(mask)
        asked.append(drawn)
    return Mosaics(images, masks, asked, there)


def measured(segmenter: Segmenter, mosaics: Mosaics) -> dict[str, float]:
    """The mean IoU over all questions: each mosaic is asked for its four names.

    `best` gives a pixel to the name whose score is highest, the same rule for all arms; `there` takes those
    above one half, Fusioner's own.
    """
    values: dict[str, list[float]] = {"best": [], "there": []}
    for image, mask, asked in zip(mosaics.images, mosaics.masks, mosaics.asked, strict=True):
        scores = segmenter.segment(image, [mosaics.names[which] for which in asked]).scores
        truth = torch.from_numpy(mask) == torch.tensor(asked)[:, None, None]
        best = scores == scores.amax(dim=0)
        for rule, found in (("best", best), ("there", scores > 0.5)):
            both, either = (found & truth).sum(dim=(1, 2)), (found | truth).sum(dim=(1, 2))
            values[rule] += (both / either).tolist()
    return {rule: float(np.mean(some)) for rule, some in values.items()}


PROOF = Proof(
    slug="fusioner",
    claim="A fusion of patches and names trained on some names finds others better than MaskCLIP does.",
    baseline="MaskCLIP",
    method="Fusioner",
    metric="mean IoU over the questions of mosaics, names unseen in training",
    run=run,
    controls={
        "blind.unseen.best": "the names: one constant vector in their place",
        "late.unseen.best": "early fusion: patches and names meet in the cosine alone",
        "meaningless.unseen.best": "what the names mean: a random vector for each",
    },
)
