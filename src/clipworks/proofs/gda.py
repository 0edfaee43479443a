"""GDA: is it the shared covariance, or class means, text and a tuned weight? (Wang et al., ICLR 2024)

The seedling meets single shapes, 20 classes, in a style that it was not trained on, with K labeled pictures a
class. All arms read the same features of the same views of the same draw, and whatever has a weight to choose
chooses it on the same min(K, 4) further pictures a class:

- zero-shot;
- Tip-Adapter: zero-shot + α·exp(−β(1 − z·Fᵀ))·L with the training features F and their labels L;
- a linear probe;
- GDA, and with an isotropic covariance (nearest mean with text), a diagonal one, without the text, and of the
  plain pictures instead of random views.

Expected: near Tip-Adapter at one shot; above Tip-Adapter and the isotropic control from 4 shots on. The claim
is refuted if at 16 shots GDA is no better than the better of these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected, Source
from clipworks.data.splits import examples_of, world_style
from clipworks.evaluate.fewshot import few_shot
from clipworks.methods.adapt.gda import GDA
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.features import Views, encode_views
from clipworks.proofs.base import Budget, Outcome, Proof

STYLE = "sketch"  # the seedling has seen every other one
BETAS = (0.5, 1.0, 2.0, 5.5, 10.0, 20.0, 50.0)  # 5.5 is Tip-Adapter's own start
TIP_ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        shots: numbers of pictures a class; the last decides.
        views: random views of each.
        test: pictures.
    """

    shots: Sequence[int]
    views: int
    test: int


SIZES: dict[Budget, Size] = {
    "small": Size((1, 4, 16), views=4, test=600),
    "full": Size((1, 2, 4, 8, 16), views=10, test=1000),
}


@dataclass(frozen=True)
class Shown:
    """Features of pictures, raw, with labels (n,) that count the classes.

    Attributes:
        plain: (n, 1, D).
        views: (n, V, D) of random views; the plain ones where there are none.
    """

    plain: Tensor
    views: Tensor
    labels: np.ndarray[Any, np.dtype[np.int64]]


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    clip = load("seedling")
    splits = world_style(STYLE, clip.preprocessing.image_size, seed)
    train_labels, held_labels = (labels_of(part) for part in (splits.train, splits.validation))
    test = shown(clip, Selected(splits.test, range(size.test)), 0, seed)
    found: dict[str, dict[str, float]] = {}
    for shots in size.shots:
        draw = few_shot(train_labels, shots, seed, held_labels)
        train = shown(clip, Selected(splits.train, draw.train), size.views, seed)
        held = shown(clip, Selected(splits.validation, draw.validation), 0, seed)
        found[str(shots)] = arms(clip, splits.classes, train, held, test)
    last = found[str(size.shots[-1])]
    return Outcome(baseline=max(last["tip_adapter"], last["isotropic"]), method=last["gda"], details=found)


def labels_of(source: Source) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(n,)."""
    labels = source.labels
    return np.empty(0, np.int64) if labels is None else labels


@torch.no_grad()
def shown(clip: Clip, source: Source, views: int, seed: int) -> Shown:
    """What a Clip makes of pictures, and of random views of them."""
    pictures, labels = examples_of(source)
    plain = encode_views(pictures, clip.image, clip.preprocessing)
    several = (
        encode_views(pictures, clip.image, clip.preprocessing, Views(views, seed=seed)) if views else plain
    )
    return Shown(plain, several, labels)


def arms(clip: Clip, classes: ClassTexts, train: Shown, held: Shown, test: Shown) -> dict[str, float]:
    """Accuracy in [0, 1] of every arm."""
    X, y = test.plain[:, 0], test.labels
    validation = (held.plain[:, 0], held.labels)

    def fitted(views: Tensor, **settings: Any) -> GDA:
        gda = GDA(clip, classes, keep_features=False, progress=False, **settings)
        return gda.fit(views, train.labels, validation=validation)

    zero_shot = ZeroShot(clip, classes).fit(*validation)
    probe = LinearProbe(clip, classes, C="auto", progress=False)
    gda = fitted(train.views)
    without_text = gda.gaussian_logits(X).argmax(dim=1).numpy()
    return {
        "zero_shot": zero_shot.score(X, y),
        "tip_adapter": tip_adapter(zero_shot, train, held, test),
        "probe": probe.fit(train.views, train.labels, validation=validation).score(X, y),
        "gda": gda.score(X, y),
        "isotropic": fitted(train.views, covariance="isotropic").score(X, y),
        "diagonal": fitted(train.views, covariance="diagonal").score(X, y),
        "without_text": float((without_text == y).mean()),
        # Without a second picture a class there is no covariance in plain pictures.
        **({"plain_views": fitted(train.plain).score(X, y)} if np.bincount(train.labels).max() > 1 else {}),
        "alpha": gda.alpha_,
    }


def tip_adapter(zero_shot: ZeroShot, train: Shown, held: Shown, test: Shown) -> float:
    """Accuracy of Tip-Adapter without training; a picture's key is the mean over its views, as it has it."""
    keys = unit(unit(train.views).mean(dim=1))
    values = torch.nn.functional.one_hot(torch.from_numpy(train.labels), len(zero_shot.classes_)).to(keys)

    def right(part: Shown, beta: float, alpha: float) -> float:
        features = part.plain[:, 0]
        cached = torch.exp(-beta * (1 - unit(features) @ keys.mT)) @ values
        likeliest = (zero_shot.logits(features) + alpha * cached).argmax(dim=1).numpy()
        return float((likeliest == part.labels).mean())

    beta, alpha = max(product(BETAS, TIP_ALPHAS), key=lambda pair: right(held, *pair))
    return right(test, beta, alpha)


PROOF = Proof(
    slug="gda",
    claim="A shared covariance in closed form brings more than class means with text, and than a cache of "
    "the same pictures.",
    baseline="the better of Tip-Adapter and the same classifier with an isotropic covariance",
    method="GDA",
    metric="accuracy with 16 pictures a class",
    run=run,
)
