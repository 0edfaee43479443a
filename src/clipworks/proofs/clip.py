"""CLIP: names that were learned from captions alone classify pictures zero-shot (Radford et al., ICML 2021).

A small CLIP is trained on pictures with captions, then classifies new pictures among the names of all
classes. The claim is refuted if, on the classes whose captions it saw, it stays within three times chance.
Beside it stand chance, a classifier that the same image tower becomes when it is trained on labels, and the
classes that no caption named. With the budget `full`, softmax and sigmoid form are compared at two batch
sizes on equally many examples; expected is that the sigmoid is no worse at the small one, and equal at the
large one (Zhai et al., ICCV 2023).

Data: scenes of one colored shape each, whose classes are pairs like "red circle", a quarter of them never
shown in training; or with `data`, a folder of Tiny-ImageNet, of which each seed draws classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.core.tokenizer import FileTokenizer
from clipworks.data.batch import Batch
from clipworks.data.captions import ClassTexts, class_names, draw_text
from clipworks.data.randomness import Draws
from clipworks.data.sets import tiny_imagenet
from clipworks.data.source import Example, Examples, Source
from clipworks.data.world.dataset import WorldScenes
from clipworks.data.world.scenes import SceneConfig
from clipworks.errors import DataError
from clipworks.evaluate.zeroshot import labeled_batches
from clipworks.methods.pretrain.base import Objective
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.parts.contrastive import Form
from clipworks.proofs.base import Budget, Outcome, Proof
from clipworks.proofs.laboratory import classify, fresh_clip, recipe_for, tokenizer_of, train

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "house", "fish")
COLORS = ("red", "yellow", "green", "blue", "purple", "white", "brown", "black")
TIMES_CHANCE = 3
SEEN = 0.75  # the share of classes whose captions are shown


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        train, test: pictures.
        samples: examples seen in each training.
        batch_size: of the main comparison.
        batch_sizes: of softmax against sigmoid; none leaves that out.
        width, depth: of both towers.
        classes: of Tiny-ImageNet.
    """

    train: int
    test: int
    samples: int
    batch_size: int
    batch_sizes: tuple[int, ...]
    width: int
    depth: int
    classes: int


SIZES: dict[Budget, Size] = {
    "small": Size(3000, 800, 48_000, 96, (), width=96, depth=3, classes=20),
    "full": Size(20_000, 4000, 400_000, 256, (16, 256), width=192, depth=5, classes=100),
}


@dataclass(frozen=True)
class Pictures:
    """Captioned training pictures of seen classes, and new labeled pictures of seen and unseen ones.

    Labels count all classes, in the order of `classes`.
    """

    train: Source
    seen: Source
    unseen: Source
    classes: ClassTexts


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed."""
    return experiment(seed, SIZES[budget], data)


def experiment(seed: int, size: Size, data: Path | None = None) -> Outcome:
    """The experiment at any size."""
    pictures = world(seed, size) if data is None else photographs(seed, size, data)
    tokenizer = tokenizer_of(_captions(pictures.train, seed))
    chance = 1 / len(pictures.classes)

    clip = learn(tokenizer, ClipObjective(fresh=True), pictures, size, size.batch_size, seed)
    seen, unseen = (classify(clip, part, pictures.classes) for part in (pictures.seen, pictures.unseen))
    supervised = Supervised(len(pictures.classes), clip.width, seed)
    labeled = learn(tokenizer, supervised, pictures, size, size.batch_size, seed)
    details: dict[str, Any] = {
        "chance": chance,
        "unseen_names": unseen,
        "supervised": supervised_accuracy(labeled, supervised.head, pictures.seen),
    }
    for batch_size in size.batch_sizes:
        forms: tuple[Form, ...] = ("softmax", "sigmoid")
        for form in forms:
            objective = ClipObjective(form, fresh=True)
            trained = learn(tokenizer, objective, pictures, size, batch_size, seed, form)
            details[f"{form}_batch_{batch_size}"] = classify(trained, pictures.seen, pictures.classes)
    return Outcome(baseline=TIMES_CHANCE * chance, method=seen, details=details)


class Supervised(Objective):
    """Cross-entropy of a linear layer on the image tower's vectors; the text tower rests."""

    def __init__(self, classes: int, width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head = nn.utils.skip_init(nn.Linear, width, classes)
        with torch.no_grad():
            self.head.weight.normal_(std=width**-0.5, generator=generator)
            self.head.bias.zero_()

    def prepare(self, clip: Clip) -> Clip:
        """The same model with everything but the image tower frozen."""
        clip.requires_grad_(False)
        clip.image.requires_grad_(True)
        return clip

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`logits` (B, C) and `label` (B,)."""
        return {"logits": self.head(clip.image(batch.images)), "label": batch.features["label"]}

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`cross_entropy`, 0-D."""
        return {"cross_entropy": F.cross_entropy(features["logits"].float(), features["label"])}


def learn(
    tokenizer: FileTokenizer,
    objective: Objective,
    pictures: Pictures,
    size: Size,
    batch_size: int,
    seed: int,
    form: Form = "softmax",
) -> Clip:
    """A CLIP for pictures of 32 pixels, from its initial weights trained on `size.samples` examples."""
    clip = fresh_clip(tokenizer, seed, width=size.width, depth=size.depth, sigmoid=form == "sigmoid")
    lr = 3e-3 * (batch_size / 256) ** 0.5
    recipe = recipe_for(max(1, size.samples // batch_size), batch_size, seed, lr=lr, optimizer="muon")
    return train(clip, objective, pictures.train, recipe, batch_size)


@torch.no_grad()
def supervised_accuracy(clip: Clip, head: nn.Linear, source: Source) -> float:
    """Top-1 in [0, 1] of a trained head."""
    hits = total = 0
    for pixels, labels in labeled_batches(clip, source, workers=1)[0]:
        hits += int((head(clip.image(pixels)).argmax(dim=1) == labels).sum())
        total += len(labels)
    return hits / max(1, total)


def world(seed: int, size: Size) -> Pictures:
    """Scenes of one shape; which pairs of shape and color are never shown is drawn from the seed."""
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    drawn = np.random.default_rng(seed).permutation(len(pairs))
    kept = round(SEEN * len(pairs))
    seen, unseen = ([pairs[i] for i in sorted(half)] for half in (drawn[:kept], drawn[kept:]))
    names = [f"{color} {shape}" for shape, color in pairs]

    def scenes(which: list[tuple[str, str]], first: int, length: int) -> Source:
        config = SceneConfig(pairs=tuple(which), count=(1, 1))
        source = WorldScenes(config, seed, first + length, size=32, sources=("short",), label="pair")
        return Examples(
            Example(
                key=f"{first + i}",
                image=example.image,
                texts={"alt": example.texts["short"]},
                label=names.index(source.class_names[example.label]),
            )
            for i, example in enumerate(source[index] for index in range(first, first + length))
            if example.label is not None
        )

    return Pictures(
        train=scenes(seen, 0, size.train),
        seen=scenes(seen, size.train, size.test),
        unseen=scenes(unseen, size.train + size.test, size.test // 2),
        classes=ClassTexts(names, templates=("{a} {}",)),
    )


def photographs(seed: int, size: Size, data: Path) -> Pictures:
    """Classes of Tiny-ImageNet drawn from the seed, captioned with their names, pictures of 64 pixels."""
    folder = data / "tiny-imagenet" if (data / "tiny-imagenet").is_dir() else data
    if not (folder / "classes.json").is_file():
        raise DataError(f"{data}: no classes.json, so not a folder of Tiny-ImageNet")
    generator = np.random.default_rng(seed)
    everything = len(class_names(folder / "classes.json"))
    chosen = [int(i) for i in generator.choice(everything, min(size.classes, everything), replace=False)]
    kept = round(SEEN * len(chosen))
    train = tiny_imagenet(folder, "train", chosen)
    test = tiny_imagenet(folder, "val", chosen)

    def some(source: Source, wanted: range, most: int) -> Source:
        labels = source.labels
        rows = np.flatnonzero(np.isin(labels, wanted)) if labels is not None else np.empty(0, np.int64)
        rows = generator.permutation(rows)[:most]
        return Examples(source[int(row)] for row in rows)

    return Pictures(
        train=some(train, range(kept), size.train),
        seen=some(test, range(kept), size.test),
        unseen=some(test, range(kept, len(chosen)), size.test),
        classes=replace(test.classes, templates=("a photo of {a} {}.",)),
    )


def _captions(source: Source, seed: int) -> Iterable[str]:
    return [
        draw_text(source[index].texts["alt"], Draws(seed, 0, 0, index))
        for index in range(min(len(source), 5000))
    ]


PROOF = Proof(
    slug="clip",
    claim="A model that saw pictures with captions classifies new pictures by name, among all names, better "
    "than three times chance.",
    baseline="three times chance",
    method="zero-shot CLIP",
    metric="top-1 accuracy on classes whose captions were seen",
    run=run,
)
