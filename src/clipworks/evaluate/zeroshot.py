"""Zero-shot classification of a labeled set: the protocol of Radford et al., ICML 2021, section 3.1.

Class vectors are the mean over templates (and, if asked, synonyms) of unit text vectors, unit again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipworks.data.captions import ClassTexts
from clipworks.data.loader import Loader, Reading
from clipworks.data.samplers import Sequential
from clipworks.data.source import Source
from clipworks.encode.precision import Precision
from clipworks.errors import DataError

if TYPE_CHECKING:
    from clipworks.core.clip import Clip


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy of a zero-shot head.

    Attributes:
        top1, top5: shares in [0, 1].
        samples: pictures counted.
        per_class: (C,) fp32 accuracy of each class, NaN for a class without pictures.
        seconds: wall time, text head included.
    """

    top1: float
    top5: float
    samples: int
    per_class: Tensor
    seconds: float


def accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the label is first, and among the first five: logits (B, C), labels (B,) to two (B,) bool.

    A label that ties with others counts as found only if it would be in every order of the ties.
    """
    own = logits.gather(1, labels[:, None])
    # The label itself is one of those not below it.
    rank = (logits >= own).sum(dim=1)
    return rank <= 1, rank <= 5


def zero_shot_features(
    image_features: Tensor, labels: Tensor, text_features: Tensor
) -> tuple[float, float, Tensor]:
    """Accuracy from unit vectors: images (n, D), labels (n,) int64, class vectors (C, D).

    Returns:
        top-1, top-5 and the accuracy of each class (C,).

    Raises:
        DataError: if a label has no class vector.
    """
    classes = len(text_features)
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but there are {classes} classes"
        )
    first, five = accuracy(image_features.float() @ text_features.float().T, labels)
    counts = torch.bincount(labels, minlength=classes).float()
    hits = torch.bincount(labels[first], minlength=classes).float()
    total = max(1, len(labels))
    return float(first.sum()) / total, float(five.sum()) / total, hits / counts


def zero_shot(
    clip: Clip,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: ClassTexts,
    *,
    precision: Precision = "fp32",
) -> ZeroShot:
    """Zero-shot accuracy of a Clip.

    Args:
        clip: the model.
        batches: pairs of pixels (B, 3, H, W), bytes or floats in [0, 1], and labels (B,) int64.
        classes: names, synonyms, descriptions and templates; all sentences of a class are averaged.
        precision: `fp32`, `bf16` or `auto`.

    Raises:
        DataError: if there are no pictures, or a label has no class.
    """
    started = time.perf_counter()
    text_features = class_features(clip, classes)
    features, labels = [], []
    for pixels, targets in batches:
        features.append(clip.embed_images(pixels, precision=precision))
        labels.append(targets)
    if not features:
        raise DataError("no pictures to classify")
    known = torch.cat(labels).to(text_features.device)
    top1, top5, per_class = zero_shot_features(torch.cat(features), known, text_features)
    return ZeroShot(top1, top5, len(known), per_class, time.perf_counter() - started)


def class_features(clip: Clip, classes: ClassTexts) -> Tensor:
    """Class vectors (C, D), unit length: the mean over all sentences of a class, articles in their places."""
    return clip.class_features([classes.texts(index) for index in range(len(classes))], templates=("{}",))


def labeled_batches(
    clip: Clip, source: Source, batch_size: int = 250, workers: int = 2
) -> tuple[Iterator[tuple[Tensor, Tensor]], Loader]:
    """A labeled source in its order, prepared for this Clip: pixels (B, 3, n, n) uint8 and labels (B,) int64.

    Returns:
        The batches, and the loader whose `skipped` tells afterwards what could not be read.
    """
    loader = Loader(
        source,
        clip.preprocessing,
        batch_size=batch_size,
        sampler=Sequential(),
        texts=(),
        reading=Reading(workers=workers),
    )
    pairs = ((batch.images, batch.features["label"]) for batch in loader if batch.images is not None)
    return pairs, loader
