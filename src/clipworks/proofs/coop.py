"""CoOp: do learned words beat written ones, and what do they cost on new classes? (Zhou et al., IJCV 2022)

The seedling meets single shapes, 20 classes, in a style that it was not trained on, with K labeled pictures a
class. All arms read features of the same draw; whatever has something to choose chooses it on the same
min(K, 4) further pictures a class (so far fewer labels than the whole validation split of Tip-Adapter's
code):

- zero-shot with the plain template, and with the mean of seven;
- nearest class mean, and a linear probe with C chosen;
- CoOp; the adapters named as its rivals: CLIP-Adapter, Tip-Adapter, Tip-Adapter-F; and controls of the
  mechanism: CoOp on pictures whose labels were permuted, and (full budget) with the classes' names permuted,
  which shows how much comes from CLIP's words.

Then the weakness that CoCoOp names: fitted to one half of the classes, measured on the other, CoOp against
zero-shot and against CoCoOp after the same number of pictures.

Expected: CoOp above zero-shot at the most shots; on new classes below CoCoOp. The claim is refuted if at the
most shots CoOp is not above zero-shot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected, Source
from clipworks.data.splits import examples_of, world_style
from clipworks.evaluate.fewshot import accuracy_on, base_new, few_shot, harmonic_mean
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.clip_adapter import ClipAdapter
from clipworks.methods.adapt.cocoop import CoCoOp
from clipworks.methods.adapt.coop import CoOp
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.nearest_mean import NearestMean
from clipworks.methods.adapt.tip_adapter import TipAdapter, TipAdapterF
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.features import Views, encode_views
from clipworks.proofs.base import Budget, Outcome, Proof

STYLE = "sketch"  # the seedling has seen every other one
SEVEN = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        shots: numbers of pictures a class; the last decides.
        lengths: M, of which the first is the method's.
        views: random views of each picture.
        test: pictures.
        epochs: of CoOp; 0 is the paper's number.
        conditional_epochs: of CoCoOp, of which every step sees one picture.
        variants: measure other positions and a context a class, too.
    """

    shots: Sequence[int]
    lengths: Sequence[int]
    views: int
    test: int
    epochs: int = 0
    conditional_epochs: int = 10
    variants: bool = False


SIZES: dict[Budget, Size] = {
    # A quarter of the paper's epochs and a third of CoCoOp's: what two cores have time for.
    "small": Size((1, 16), (4,), views=8, test=600, epochs=50, conditional_epochs=3),
    "full": Size((1, 2, 4, 8, 16), (4, 16), views=8, test=1000, variants=True),
}


@dataclass(frozen=True)
class Shown:
    """Features of pictures: raw (n, V, D), with labels (n,) that count the classes."""

    features: Tensor
    labels: Labels

    def of(self, half: Labels) -> Shown:
        """The pictures of some classes, whose labels count these."""
        rows = np.flatnonzero(np.isin(self.labels, half))
        return Shown(self.features[rows], np.searchsorted(half, self.labels[rows]))


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    clip = load("seedling")
    splits = world_style(STYLE, clip.preprocessing.image_size, seed)
    train_labels, held_labels = splits.train.labels, splits.validation.labels
    assert train_labels is not None and held_labels is not None  # noqa: S101 - the world labels its scenes
    test = shown(clip, Selected(splits.test, range(size.test)))
    found: dict[str, Any] = {}
    for shots in size.shots:
        draw = few_shot(train_labels, shots, seed, held_labels)
        pictures = Selected(splits.train, draw.train)
        train = shown(clip, pictures, Views(size.views, (0.08, 1.0), seed=seed))
        held = shown(clip, Selected(splits.validation, draw.validation))
        found[str(shots)] = arms(clip, splits.classes, train, held, test, size, seed)
    last = found[str(size.shots[-1])]
    found["new_classes"] = halves(clip, splits.classes, train, test, size, seed)
    return Outcome(baseline=last["zero_shot"], method=last["coop"], details=found)


@torch.no_grad()
def shown(clip: Clip, source: Source, views: Views | None = None) -> Shown:
    """What a Clip makes of pictures, or of random views of them."""
    pictures, labels = examples_of(source)
    return Shown(encode_views(pictures, clip.image, clip.preprocessing, views or Views()), labels)


def arms(
    clip: Clip, classes: ClassTexts, train: Shown, held: Shown, test: Shown, size: Size, seed: int
) -> dict[str, float]:
    """Accuracy in [0, 1] of every arm."""
    X, y = test.features[:, 0], test.labels
    validation = (held.features[:, 0], held.labels)

    def score(method: Adapter, labels: Labels = train.labels, *, chooses: bool = False) -> float:
        method.set_params(progress=False, seed=seed)
        method.fit(train.features, labels, validation=validation if chooses else None)
        return method.score(X, y)

    def coop(length: int = size.lengths[0], **settings: Any) -> CoOp:
        return CoOp(clip, classes, context_length=length, epochs=size.epochs, **settings)

    permute = np.random.default_rng(seed).permutation
    misnamed = classes.select([int(label) for label in permute(len(classes))])
    seven = ClassTexts(classes.names, templates=SEVEN)
    found = {
        "zero_shot": score(ZeroShot(clip, classes)),
        "seven_templates": score(ZeroShot(clip, seven)),
        "nearest_mean": score(NearestMean(clip, classes)),
        "probe": score(LinearProbe(clip, classes, C="auto"), chooses=True),
        "clip_adapter": score(ClipAdapter(clip, classes)),
        "tip_adapter": score(TipAdapter(clip, classes), chooses=True),
        "tip_adapter_f": score(TipAdapterF(clip, classes), chooses=True),
        "coop": score(coop()),
        "permuted_labels": score(coop(), permute(train.labels)),
    }
    for length in size.lengths[1:]:
        found[f"coop_{length}"] = score(coop(length))
    if size.variants:
        found["permuted_names"] = score(coop().set_params(class_names=misnamed))
        found["per_class"] = score(coop(per_class=True))
        found["middle"] = score(coop(position="middle"))
        found["front"] = score(coop(position="front"))
    return found


def halves(
    clip: Clip, classes: ClassTexts, train: Shown, test: Shown, size: Size, seed: int
) -> dict[str, dict[str, float]]:
    """Fitted to the base classes, measured on them and on the new ones."""
    base, new = base_new(np.arange(len(classes)))
    texts, others = (classes.select([int(label) for label in half]) for half in (base, new))
    shots = train.of(base)
    conditional = CoCoOp(clip, texts, epochs=size.conditional_epochs)
    # The same words to start from, and as many steps as CoCoOp has.
    steps = size.conditional_epochs * len(shots.labels)
    epochs = max(1, steps // max(1, len(shots.labels) // 32))
    learners: dict[str, Adapter] = {
        "zero_shot": ZeroShot(clip, texts),
        "coop": CoOp(clip, texts, init=conditional.init, epochs=epochs),
        "cocoop": conditional,
    }
    found = {}
    for name, method in learners.items():
        method.set_params(progress=False, seed=seed)
        method.fit(shots.features, shots.labels)
        on = {
            "base": accuracy_on(method, test.of(base).features[:, 0], test.of(base).labels),
            "new": accuracy_on(method, test.of(new).features[:, 0], test.of(new).labels, others),
        }
        found[name] = {**on, "harmonic": harmonic_mean(on["base"], on["new"])}
    return found


PROOF = Proof(
    slug="coop",
    claim="A few labeled pictures a class teach CLIP words around the class names that beat written ones.",
    baseline="zero-shot with the plain template",
    method="CoOp, 4 shared vectors",
    metric="accuracy with 16 pictures a class in a style never seen",
    run=run,
)
