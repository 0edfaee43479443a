"""PRE: does the encoder carry a context over to new classes, or the start, or the learning rate?

(Pham Thi Minh et al., arXiv 2023.) The seedling meets single shapes in a style that it was not trained on.
All arms are fitted to K labeled pictures of each of 10 base classes, the same views in the same order for the
same number of steps, and measured among the base names and among 10 new ones. All contexts begin with
"a photo of a":

- zero-shot;
- CoOp with a quarter of the learning rate, with it and with four times it; the best on min(K, 4) further
  pictures a base class is the baseline, since an encoder is also a preconditioner;
- PRE; its encoder frozen at its random start; its gain learned from 0, so that it begins at the words;
- CoOp begun where PRE begins, at E(P) + P with no encoder.

Expected: PRE above CoOp on new classes, a little below it on base ones. The claim is refuted if it is no
better on new classes. If the same start without encoder, or another rate, does as well, the encoder is not
the cause.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected, Source
from clipworks.data.splits import examples_of, world_style
from clipworks.engine.randomness import own_randomness
from clipworks.evaluate.fewshot import accuracy_on, base_new, few_shot, harmonic_mean
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.coop import CoOp
from clipworks.methods.adapt.pre import PRE, PromptEncoder
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.features import Views, encode_views
from clipworks.parts.prompts import context_words
from clipworks.proofs.base import Budget, Outcome, Proof

STYLE = "sketch"  # the seedling has seen every other one
WORDS, LENGTH = "a photo of a", 4
LR = 0.002
RATES = {"quarter": LR / 4, "own": LR, "four_times": 4 * LR}
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        shots: pictures a base class.
        views: random views of each.
        epochs: of every learned arm.
        test: pictures of all classes.
    """

    shots: int
    views: int
    epochs: int
    test: int


SIZES: dict[Budget, Size] = {
    "small": Size(16, views=8, epochs=50, test=1000),
    "full": Size(16, views=50, epochs=50, test=1000),
}


@dataclass(frozen=True)
class Shown:
    """Features of pictures, raw (n, V, D), with labels (n,) that count the classes of their half."""

    features: Tensor
    labels: Labels


class Shift(nn.Module):
    """Adds a constant: CoOp, begun elsewhere."""

    offset: Tensor

    def __init__(self, offset: Tensor):
        super().__init__()
        self.register_buffer("offset", offset)

    def forward(self, vectors: Tensor) -> Tensor:
        """(M, w) to the constant (M, w), which the skip adds to what it is given."""
        return self.offset.expand_as(vectors)


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    clip = load("seedling")
    splits = world_style(STYLE, clip.preprocessing.image_size, seed)
    base, new = base_new(np.arange(len(splits.classes)))
    texts, others = (splits.classes.select([int(label) for label in half]) for half in (base, new))
    train_labels, held_labels = (labels_of(part) for part in (splits.train, splits.validation))
    draw = few_shot(train_labels, size.shots, seed, held_labels)

    def shown(source: Source, rows: Labels, half: Labels, views: int = 0) -> Shown:
        labels = labels_of(source)
        chosen = rows[np.isin(labels[rows], half)]
        pictures, _ = examples_of(Selected(source, chosen))
        made = Views(views, (0.08, 1.0), seed=seed)
        features = encode_views(pictures, clip.image, clip.preprocessing, made)
        return Shown(features, np.searchsorted(half, labels[chosen]))

    train = shown(splits.train, draw.train, base, size.views)
    held = shown(splits.validation, draw.validation, base)
    tests = [shown(splits.test, np.arange(size.test), half) for half in (base, new)]

    learned = arms(clip, texts, size.epochs, seed)
    found, on_held = {}, {}
    for name, method in learned.items():
        method.set_params(progress=False, seed=seed)
        method.fit(train.features, train.labels)
        found[name] = measured(method, tests, others)
        on_held[name] = accuracy_on(method, held.features[:, 0], held.labels)
    best = max((f"coop_{rate}" for rate in RATES), key=on_held.__getitem__)
    return Outcome(
        baseline=found[best]["new"], method=found["pre"]["new"], details={"arms": found, "best_coop": best}
    )


def labels_of(source: Source) -> Labels:
    """(n,)."""
    labels = source.labels
    return np.empty(0, np.int64) if labels is None else labels


def arms(clip: Clip, texts: ClassTexts, epochs: int, seed: int) -> dict[str, Adapter]:
    """Every arm, not fitted."""

    def pre(**settings: Any) -> PRE:
        return PRE(clip, texts, init=WORDS, lr=LR, epochs=epochs, **settings)

    with own_randomness(seed), torch.no_grad():
        drawn = PromptEncoder(clip.text.width).eval()  # type: ignore[arg-type]
        words = context_words(clip, WORDS, LENGTH).float().cpu()
        offset = drawn(words) - words
    return {
        "zero_shot": ZeroShot(clip, texts),
        **{
            f"coop_{name}": CoOp(clip, texts, init=WORDS, lr=rate, epochs=epochs)
            for name, rate in RATES.items()
        },
        "pre": pre(),
        "frozen_encoder": pre(prompt_encoder=Frozen(drawn.network)),
        "gain_from_zero": pre(gain=0.0),
        "same_start": pre(prompt_encoder=Shift(offset)),
    }


class Frozen(nn.Module):
    """An LSTM that is not learned."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False)

    def forward(self, vectors: Tensor) -> Tensor:
        """(M, w) to (M, w)."""
        encoded: Tensor = self.network(vectors)[0]
        return encoded


def measured(method: Adapter, tests: list[Shown], others: ClassTexts) -> dict[str, float]:
    """Accuracy in [0, 1] among base names and among new ones, and the harmonic mean of both."""
    base, new = tests
    on_base = accuracy_on(method, base.features[:, 0], base.labels)
    on_new = accuracy_on(method, new.features[:, 0], new.labels, others)
    return {"base": on_base, "new": on_new, "harmonic": harmonic_mean(on_base, on_new)}


PROOF = Proof(
    slug="pre",
    claim="A learned encoder with a skip connection before the context vectors makes a context that carries "
    "over better to new classes.",
    baseline="CoOp from the same words, the best of three learning rates on base validation pictures",
    method="PRE with one bidirectional LSTM layer",
    metric="accuracy among 10 new classes after 16 pictures of each of 10 base classes",
    run=run,
    controls={
        "arms.same_start.new": "the encoder: CoOp begun at the same disturbance of the words",
        "arms.frozen_encoder.new": "the encoder's learning",
    },
)
