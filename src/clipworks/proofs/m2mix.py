"""m²-Mix: do mixtures help beyond a softer temperature and repulsion within a modality? (Oh et al., 2023.)

The seedling is fine-tuned on a few hundred pairs; on held-out pairs it retrieves in both directions. All arms
have the same batches, steps and learning rate, which was chosen once, on development seed 0, for `plain`:

    zero_shot     the seedling as it is
    plain         CLIP's loss at the model's temperature: the baseline
    soft          the same at five times the temperature; most of the paper's gain is claimed to be here
    m2            m²-Mix
    ends          m²-Mix with λ drawn from {0, 1}: the same negatives, each wholly image or text

and with the budget `full` two more weights of m²-Mix, no fading, mixtures of vectors that are no pair
(`mismatched`), random vectors at the mixtures' angles to the images (`noise`), and m³-Mix with both of its
targets. Beside retrieval: zero-shot accuracy on what was not trained (of forgetting), uniformity of images
and texts together, relative alignment, and the calibration error of retrieval. The claim is refuted if m²
retrieves no better than `plain`, or is no more uniform; if it is not above both `soft` and `ends`, mixing is
not shown to be the cause.

Data: scenes of one thing in a style that the seedling never saw, with their captions; or with `data`,
photographs of Flickr8k, and Tiny-ImageNet's classes that the seedling never saw for forgetting.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip, unit
from clipworks.data.batch import Batch
from clipworks.data.captions import ClassTexts
from clipworks.data.sets import captioned, tiny_imagenet
from clipworks.data.source import Example, Examples, Selected, Source, iterate
from clipworks.data.templates import SIMPLE_TEMPLATES
from clipworks.data.world.captions import describe
from clipworks.data.world.scenes import COLORS, SHAPES, Scene, SceneConfig, sample
from clipworks.engine import Recipe
from clipworks.engine.schedule import resize
from clipworks.errors import DataError
from clipworks.evaluate.held import pixels_of
from clipworks.evaluate.retrieval import pair_recall
from clipworks.evaluate.spread import relative_alignment, uniformity
from clipworks.evaluate.zeroshot import class_features, zero_shot_features
from clipworks.methods.pretrain.m2mix import M2Mix, SingleMix
from clipworks.proofs.base import Budget, Outcome, Proof
from clipworks.proofs.laboratory import scenes, train

WEIGHT = 0.01
LR = 1e-4  # of 3e-5 and 1e-4, by what `plain` retrieves of the test pairs of development seed 0
STYLE, PIXELS = "sketch", 64  # of the scenes; the seedling has seen every other style
NEVER_SEEN = tuple(range(9, 200, 10))  # classes of Tiny-ImageNet that the seedling was not trained on


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        train, test: pairs.
        probe: labeled pictures that show forgetting.
        epochs, batch_size: of each training.
        pixels: side of the pictures; the seedling takes smaller ones than its own.
        more: whether all arms are run.
    """

    train: int
    test: int
    probe: int
    epochs: int
    batch_size: int
    pixels: int
    more: bool


SIZES: dict[Budget, Size] = {
    "small": Size(600, 300, 300, epochs=9, batch_size=100, pixels=32, more=False),
    "full": Size(600, 300, 1000, epochs=9, batch_size=100, pixels=64, more=True),
}


class Ends(M2Mix):
    """λ is 0 or 1, equally often."""

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """As of m²-Mix, λ rounded."""
        found = super().features(clip, batch)
        return found | {"mix": found["mix"].round()}


class Mismatched(M2Mix):
    """Mixtures of each image with the text of another pair."""

    def mixtures(self, v: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """(N, D)."""
        return super().mixtures(v, t.roll(1, dims=0), weight)


class Noise(M2Mix):
    """Random vectors that are as far from each pair's image as its mixture is."""

    def mixtures(self, v: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """(N, D); the directions are the same in each step."""
        n = super().mixtures(v, t, weight)
        away = torch.randn(v.shape, generator=torch.Generator().manual_seed(len(v))).to(v)
        away = unit(away - (away * v).sum(dim=1, keepdim=True) * v)
        cosine = (n * v).sum(dim=1, keepdim=True).clamp(-1, 1)
        return cosine * v + (1 - cosine.square()).clamp_min(1e-12).sqrt() * away


def arms(temperature: float, more: bool) -> dict[str, M2Mix]:
    """Every objective by its arm; `temperature` is the model's own."""
    found = {
        "plain": M2Mix(0.0),
        "soft": M2Mix(0.0, temperature=5 * temperature),
        "m2": M2Mix(WEIGHT),
        "ends": Ends(WEIGHT),
    }
    if more:
        found |= {
            "m2_tenth": M2Mix(WEIGHT / 10),
            "m2_times_5": M2Mix(WEIGHT * 5),
            "m2_unfaded": M2Mix(WEIGHT, fade=False),
            "mismatched": Mismatched(WEIGHT),
            "noise": Noise(WEIGHT),
            "m3_both": M2Mix(WEIGHT, 0.2, single=SingleMix()),
            "m3_first": M2Mix(WEIGHT, 0.2, single=SingleMix(pair_target="first")),
        }
    return found


@dataclass(frozen=True)
class Pairs:
    """Pairs to train on and to retrieve, and labeled pictures of something else."""

    train: Source
    test: Source
    probe: Source
    classes: ClassTexts


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed."""
    return experiment(seed, SIZES[budget], data)


def experiment(seed: int, size: Size, data: Path | None = None) -> Outcome:
    """The experiment at any size."""
    clip = load("seedling")
    pairs = world(seed, size) if data is None else photographs(seed, size, data)
    measure = Measure(clip, pairs, size.pixels)
    found = {"zero_shot": measure(clip)}
    steps = size.epochs * (len(pairs.train) // size.batch_size)
    recipe = Recipe(
        epochs=size.epochs,
        lr=LR,
        warmup=max(1, steps // 10),
        weight_decay=0.2,
        betas=(0.9, 0.999),
        eps=1e-8,
        precision="fp32",
        image_sizes=((1.0, size.pixels),),
        seed=seed,
    )
    for name, objective in arms(math.exp(-float(clip.scale.detach())), size.more).items():
        tuned = train(copy.deepcopy(clip), objective, pairs.train, recipe, size.batch_size)
        found[name] = measure(tuned)
    return Outcome(baseline=found["plain"]["recall"], method=found["m2"]["recall"], details=found)


class Measure:
    """Everything that is measured of a model, on pictures decoded once."""

    def __init__(self, clip: Clip, pairs: Pairs, pixels: int):
        self.pixels, self.classes = pixels, pairs.classes
        self.images, _, _ = pixels_of(clip, pairs.test)
        self.probe, self.labels, _ = pixels_of(clip, pairs.probe)
        said = [_texts(example) for example in iterate(pairs.test)]
        self.texts = [text for own in said for text in own]
        self.owner = torch.tensor([row for row, own in enumerate(said) for _ in own])

    def __call__(self, clip: Clip) -> dict[str, float]:
        """Numbers by name; recalls and accuracies in [0, 1]."""
        images, texts = self._embed(clip, self.images), clip.embed_texts(self.texts)
        recall = pair_recall(images, texts, self.owner, ks=(1, 5))
        first = torch.tensor([self.owner.tolist().index(row) for row in range(len(images))])
        probe = self._embed(clip, self.probe)
        scale = float(clip.scale.detach().exp())
        return {
            "recall": (recall["text_to_image_recall@1"] + recall["image_to_text_recall@1"]) / 2,
            **recall,
            "probe": zero_shot_features(probe, self.labels, class_features(clip, self.classes))[0],
            "uniformity": uniformity(torch.cat([images, texts[first]])),
            "image_uniformity": uniformity(images),
            "relative_alignment": relative_alignment(images, texts[first]),
            "calibration_error": calibration_error(scale * texts @ images.T, self.owner),
        }

    def _embed(self, clip: Clip, pixels: Tensor) -> Tensor:
        return clip.embed_images((resize(pixels, self.pixels)).to(torch.uint8))


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1] of the first answer of softmax logits (n, m), labels (n,)."""
    confidence, found = logits.softmax(dim=1).max(dim=1)
    right = (found == labels).float()
    place = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins).index_add_(0, place, confidence - right)
    return float(gaps.abs().sum() / len(labels))


def world(seed: int, size: Size) -> Pairs:
    """Scenes of one thing in one style, no caption twice; scenes in another style, to be named."""
    config = SceneConfig(count=(1, 1), styles=(STYLE,))
    wanted = size.train + size.test
    first: dict[str, int] = {}
    for index in range(10 * wanted):  # so many that there are enough captions
        first.setdefault(describe(sample(config, seed, index), "short"), index)
        if len(first) == wanted:
            break
    chosen = list(first.values())

    def shown(config: SceneConfig, which: Sequence[int]) -> Source:
        return Examples(
            example
            for index in which
            for example in iterate(scenes(config, seed, range(index, index + 1), _described, size=PIXELS))
        )

    single = SceneConfig(count=(1, 1), styles=("flat",))
    names = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
    return Pairs(
        shown(config, chosen[: size.train]),
        shown(config, chosen[size.train :]),
        shown(single, range(size.probe)),
        ClassTexts(names, templates=("{a} {}",)),
    )


def _described(scene: Scene) -> dict[str, str]:
    return {"alt": describe(scene, "short")}


def photographs(seed: int, size: Size, data: Path) -> Pairs:
    """Photographs with five captions each, of which the seed draws those trained on, and unseen classes."""
    folder = data / "flickr8k-1000"
    if not folder.is_dir():
        raise DataError(f"{data}: no flickr8k-1000 in it")
    generator = np.random.default_rng(seed)
    every = captioned(folder, "train")
    chosen = generator.permutation(len(every))[: size.train]
    held = captioned(folder, "test")
    unseen = tiny_imagenet(data / "tiny-imagenet", "val", NEVER_SEEN)
    probe = Selected(unseen, generator.permutation(len(unseen))[: size.probe])
    classes = ClassTexts(unseen.classes.names, templates=SIMPLE_TEMPLATES)
    return Pairs(Selected(every, chosen), Selected(held, range(min(size.test, len(held)))), probe, classes)


def _texts(example: Example) -> Sequence[str]:
    own = example.texts["alt"]
    return [own] if isinstance(own, str) else list(own)


PROOF = Proof(
    slug="m2mix",
    claim="Fine-tuned with geodesic mixtures as further negatives, a model retrieves held-out pairs better "
    "than with the contrastive loss alone.",
    baseline="fine-tuning with the contrastive loss",
    method="m²-Mix",
    metric="recall@1 on held-out pairs, mean over both directions",
    run=run,
    controls={
        "soft.recall": "mixtures: only the temperature is softer",
        "ends.recall": "mixing: each negative is wholly image or text",
    },
)
