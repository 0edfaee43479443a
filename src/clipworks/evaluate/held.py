"""What is measured again and again while a model changes: pairs held out, and what it knew before.

Pictures are decoded once, so that a measurement costs the model's own passes and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipworks.data.augment import RandomView
from clipworks.data.captions import ClassTexts
from clipworks.data.loader import Loader, Reading
from clipworks.data.randomness import permutation
from clipworks.data.samplers import Sequential
from clipworks.data.source import Selected, Source, iterate
from clipworks.errors import DataError
from clipworks.evaluate.retrieval import ranks
from clipworks.evaluate.zeroshot import class_features, zero_shot_features
from clipworks.parts.duplicates import caption_key

if TYPE_CHECKING:
    from clipworks.core.clip import Clip

KS = (1, 5, 10)
_PROBE = 0x980BE

_EVERYDAY = """
person man woman child baby crowd dog cat horse cow sheep bird fish butterfly insect spider snake frog
monkey elephant bear rabbit mouse tree flower grass leaf mushroom fruit apple orange banana vegetable
bread cake pizza soup meat cheese egg coffee bottle glass cup plate bowl spoon knife table chair sofa bed
lamp window door wall floor stairs kitchen bathroom office shop street road bridge tower church house
skyscraper castle tent car truck bus train bicycle motorcycle boat ship airplane helicopter wheel engine
machine tool hammer saw rope box bag backpack umbrella hat shirt dress shoe glove watch ring necklace
book newspaper map sign poster painting drawing statue mask toy doll ball guitar piano drum trumpet
camera telephone computer keyboard television clock candle fire smoke mountain hill rock cave desert
beach sea lake river waterfall snow ice rain cloud sky sunset night moon star forest field garden park
stadium playground hand face eye hair medicine microscope brick fabric wood metal paper plastic logo text
chart pattern
"""
EVERYDAY = tuple(_EVERYDAY.split())
"""Names of everyday things, for models about which nothing else is known."""


def pixels_of(clip: Clip, source: Source, workers: int = 2) -> tuple[Tensor, Tensor, list[str]]:
    """All pictures of a source that can be read, prepared for a Clip.

    Returns:
        Pixels (n, 3, s, s) uint8, labels (n,) int64 (-1 where there are none), and the n keys.

    Raises:
        DataError: if no picture can be read.
    """
    loader = Loader(
        source,
        clip.preprocessing,
        batch_size=100,
        sampler=Sequential(),
        texts=(),
        reading=Reading(workers=workers),
    )
    batches = [batch for batch in loader if batch.images is not None and len(batch)]
    if not batches:
        raise DataError(f"no picture can be read: {loader.skipped}")
    pixels = torch.cat([batch.images for batch in batches if batch.images is not None])
    labels = torch.cat([batch.features["label"] for batch in batches])
    return pixels, labels, [key for batch in batches for key in batch.keys]


@dataclass(frozen=True)
class HeldPairs:
    """Pictures and captions for retrieval in both directions.

    Attributes:
        pixels: (n, 3, s, s) uint8.
        texts: m captions, no two the same.
        matches: (m, n) bool, which captions belong to which picture; a caption that says the same as one of
            another picture (`parts.duplicates`) belongs to both.
    """

    pixels: Tensor
    texts: tuple[str, ...]
    matches: Tensor

    @classmethod
    def of(cls, clip: Clip, pairs: Source, workers: int = 2) -> HeldPairs:
        """The pairs of a source with texts `alt`, prepared for a Clip.

        Raises:
            DataError: if no picture can be read.
        """
        pixels, _, keys = pixels_of(clip, pairs, workers)
        said: dict[str, Sequence[str]] = {}
        for example in iterate(pairs):
            choices = example.texts["alt"]
            said[example.key] = [choices] if isinstance(choices, str) else choices
        texts = tuple(dict.fromkeys(text for key in keys for text in said[key]))
        rows: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            rows.setdefault(caption_key(text), []).append(row)
        matches = torch.zeros(len(texts), len(keys), dtype=torch.bool)
        for column, key in enumerate(keys):
            for text in said[key]:
                matches[rows[caption_key(text)], column] = True
        return cls(pixels, texts, matches)

    def similarity(self, clip: Clip) -> Tensor:
        """Cosines (m, n) of captions and pictures, on the CPU."""
        images, texts = clip.embed_images(self.pixels), clip.embed_texts(self.texts)
        return (texts @ images.T).cpu()

    def measure(self, clip: Clip) -> dict[str, float]:
        """Recall in [0, 1] at 1, 5 and 10 in both directions, and `recall`, the mean of the six."""
        return self.recall_of(self.similarity(clip))

    def recall_of(self, similarity: Tensor) -> dict[str, float]:
        """What `measure` gives, from cosines (m, n)."""
        found: dict[str, float] = {}
        for name, cosines, matches in (
            ("text_to_image", similarity, self.matches),
            ("image_to_text", similarity.T, self.matches.T),
        ):
            place = ranks(cosines, matches)
            found |= {f"{name}@{k}": float((place <= k).double().mean()) for k in KS}
        return {"recall": sum(found.values()) / len(found), **found}


@dataclass(frozen=True)
class Probe:
    """Pictures with labels, by which one sees what a model forgets.

    Attributes:
        pixels: (n, 3, s, s) uint8.
        labels: (n,) int64.
        classes: the names that the labels mean.
        kind: what the number says: `accuracy`, or `agreement` with the starting model.
    """

    pixels: Tensor
    labels: Tensor
    classes: ClassTexts
    kind: str = "accuracy"

    def measure(self, clip: Clip) -> float:
        """The share of pictures in [0, 1] that zero-shot classification gives their label."""
        features = clip.embed_images(self.pixels)
        texts = class_features(clip, self.classes)
        return zero_shot_features(features, self.labels.to(features.device), texts)[0]


def labeled_probe(
    clip: Clip, source: Source, classes: ClassTexts, *, most: int = 1000, seed: int = 0, workers: int = 2
) -> Probe:
    """A probe of labeled pictures, at most so many of them, drawn by the seed.

    Raises:
        DataError: if there are no labels, or no picture can be read.
    """
    if source.labels is None:
        raise DataError("a probe needs pictures with labels")
    rows = sorted(permutation(len(source), _PROBE, seed)[:most].tolist())
    pixels, labels, _ = pixels_of(clip, Selected(source, rows), workers)
    return Probe(pixels, labels, classes)


def agreement_probe(
    clip: Clip,
    pixels: Tensor,
    names: Sequence[str] = EVERYDAY,
    *,
    views: int = 4,
    most: int = 1000,
    seed: int = 0,
) -> Probe:
    """A probe without labels: what the model itself says now, where it is surest.

    The pictures and `views` crops of each are classified among the names; the half with the largest distance
    between the first and the second name keeps the first as its label. The starting model agrees with itself
    in all of them; how far another one does not tells what has moved, not whether it got worse.

    Args:
        clip: the model as it is before training.
        pixels: (n, 3, s, s) uint8, pictures that are not trained on.
        names: of the classes.
        views: crops of each picture.
        most: pictures in the probe at most.
        seed: of the crops.

    Raises:
        DataError: without pictures.
    """
    if not len(pixels):
        raise DataError("a probe needs at least one picture")
    view = RandomView(pixels.shape[-1], crop=(0.1, 0.6), seed=seed)
    pixels = pixels[: 2 * most]
    keys = [str(index) for index in range(len(pixels))]
    crops = [(view(pixels, keys, number) * 255).round().to(torch.uint8) for number in range(views)]
    every = torch.cat([pixels, *crops])
    classes = ClassTexts(names)
    cosines = (clip.embed_images(every) @ class_features(clip, classes).T).cpu()
    first, second = cosines.topk(2, dim=1).values.unbind(dim=1)
    kept = (first - second).argsort(descending=True, stable=True)[: min(most, -(-len(every) // 2))]
    kept = kept.sort().values
    return Probe(every[kept], cosines[kept].argmax(dim=1), classes, "agreement")


@dataclass(frozen=True)
class Gauges:
    """What a fine-tuning is watched with.

    Attributes:
        held: pairs that choose the best model.
        probe: what shall not be forgotten.
        test: pairs that choose nothing; None for none.
        further: more measurements of a model at the end, `clip -> {name: share}`.
    """

    held: HeldPairs
    probe: Probe
    test: HeldPairs | None = None
    further: tuple[Callable[[Clip], Mapping[str, float]], ...] = ()

    @property
    def shown(self) -> HeldPairs:
        """The pairs from which examples are taken."""
        return self.held if self.test is None else self.test

    def every_epoch(self, clip: Clip) -> dict[str, float]:
        """`recall` and the recalls it is the mean of, and the probe under its kind."""
        return {**self.held.measure(clip), self.probe.kind: self.probe.measure(clip)}

    def everything(self, clip: Clip) -> dict[str, float]:
        """All measurements, those of pairs as `validation …` and `test …`."""
        row = {f"validation {name}": value for name, value in self.held.measure(clip).items()}
        if self.test is not None:
            row |= {f"test {name}": value for name, value in self.test.measure(clip).items()}
        row[f"probe {self.probe.kind}"] = self.probe.measure(clip)
        for measure in self.further:
            row |= measure(clip)
        return row
