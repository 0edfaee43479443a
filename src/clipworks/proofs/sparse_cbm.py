"""Sparse concept bottlenecks: what does the Gumbel loss gain, and can its concepts be believed? (2024)

Single shapes of the generated world in all its styles; the classes are 20 pairs of color and shape, and the
concepts all values of all attributes, so that which concept is true of which picture is known. All arms read
the same features of the seedling and take the same number of steps:

- zero-shot, with bare names and with a template;
- `linear`: a bias-free linear classifier on the image features; `on_zero_shot`: the C × C layer on zero-shot
  logits that is called linear probing in the paper's table; `on_scores`: U = I, only H learns;
- U and H with each loss on U, from the authors' start and from the identity;
- `spread`: a penalty mean (c − c̄)² with, at each step, the gradient norm of the Gumbel loss instead of it;
- `random_phrases`: the Gumbel loss with phrases of no meaning;
- Concept Matrix Search by cosine, cubed, centered, and with phrases of no meaning.

Beside accuracy, of every bottleneck: `fidelity`, the mean area under the ROC curve of c_m as a detector of
attribute m (of CLIP's own scores S_m: `scores`); `needed`, how many concepts bring 95 % of the contributions
to a prediction; `overlap`, the share of the five named concepts on which two seeds agree.

Expected: with the identity fidelity is that of S, from the authors' start it is chance; the Gumbel loss gains
nothing over no loss on U. The claim is refuted if, from the authors' start, Gumbel is not better than the
best of ℓ1, contrastive and no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.data.world.dataset import WorldScenes
from clipworks.data.world.scenes import COLORS, SHAPES, SceneConfig, attributes
from clipworks.errors import require
from clipworks.methods.adapt.sparse_cbm import ConceptMatrixSearch, SparseCBM, gumbel_loss
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.concepts import world_concepts
from clipworks.parts.features import encode_views
from clipworks.parts.schedules import rows_of_epoch
from clipworks.proofs.base import Budget, Outcome, Proof

CLASSES = 20
KINDS = ("gumbel", "l1", "contrastive", "similarity", "none")
LR, BATCH = 3e-4, 128


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        train, test: pictures.
        epochs: of every trained arm.
        temperatures: τ tried besides 1, from the authors' start.
    """

    train: int
    test: int
    epochs: int
    temperatures: tuple[float, ...] = ()


SIZES: dict[Budget, Size] = {
    "small": Size(2000, 1000, epochs=40),
    "full": Size(4000, 2000, epochs=100, temperatures=(0.5, 2.0)),
}


@dataclass(frozen=True)
class Shown:
    """Pictures as the seedling has them.

    Attributes:
        features: (n, D) raw.
        labels: (n,) int64.
        truth: (n, M), which concept is true of which picture.
    """

    features: Tensor
    labels: np.ndarray[Any, np.dtype[np.int64]]
    truth: np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(eq=False, repr=False, kw_only=True)
class SpreadCBM(SparseCBM):
    """The control: a plain penalty on spread, as strong as the Gumbel loss is at each step."""

    slug = "spread-cbm"

    def _loss_on_u(self, scores: Tensor, c: Tensor) -> Tensor:
        spread = (c - c.mean()).square().mean()
        (ours,) = torch.autograd.grad(spread, c, retain_graph=True)
        noise = self._once("noise", lambda: torch.Generator().manual_seed(self.seed))
        at = c.detach().requires_grad_()
        (theirs,) = torch.autograd.grad(gumbel_loss(at, self.temperature, noise), at)
        return float(theirs.norm() / ours.norm().clamp_min(1e-12)) * spread


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    clip = load("seedling")
    train, test, classes = shown(clip, seed, size)
    found = arms(clip, classes, train, test, size, seed)
    authors = {kind: found[f"{kind}_uniform"]["accuracy"] for kind in KINDS}
    return Outcome(
        baseline=max(authors["l1"], authors["contrastive"], authors["none"]),
        method=authors["gumbel"],
        details=found,
    )


@torch.no_grad()
def shown(clip: Clip, seed: int, size: Size) -> tuple[Shown, Shown, ClassTexts]:
    """Training and test pictures, and what their classes are called."""
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:CLASSES]
    config = SceneConfig(pairs=tuple(pairs[place] for place in sorted(drawn)), count=(1, 1))
    side = clip.preprocessing.image_size
    world = WorldScenes(config, seed, size.train + size.test, side, sources=(), label="pair")
    pictures = [world[index].image for index in range(len(world))]
    features = encode_views(pictures, clip.image, clip.preprocessing)[:, 0]
    used = np.unique(world.labels)
    labels = np.searchsorted(used, world.labels)
    truth = np.stack([attributes(world.scene(index)).max(0) for index in range(len(world))])
    parts = (slice(0, size.train), slice(size.train, None))
    one, other = (Shown(features[part], labels[part], truth[part]) for part in parts)
    return one, other, ClassTexts([world.class_names[label] for label in used])


def arms(
    clip: Clip, classes: ClassTexts, train: Shown, test: Shown, size: Size, seed: int
) -> dict[str, dict[str, float]]:
    """What was measured of every arm."""
    X, y = test.features, test.labels
    words = world_concepts()
    noise = meaningless(len(words), seed)

    def bottleneck(form: type[SparseCBM] = SparseCBM, seed: int = seed, **settings: Any) -> SparseCBM:
        given: dict[str, Any] = {"concepts": words, "lr": LR, "epochs": size.epochs, "batch_size": BATCH}
        made = form(clip, classes, seed=seed, progress=False, **{**given, **settings})
        return made.fit(train.features, train.labels)

    def search(**settings: Any) -> dict[str, float]:
        made = ConceptMatrixSearch(clip, classes, **{"concepts": words, **settings}).fit(X, y)
        return {"accuracy": made.score(X, y)}

    bare, zero_shot = (ZeroShot(clip, classes_).fit(X, y) for classes_ in (plain(classes), classes))
    scale, K = zero_shot.scale, clip.embed_texts(list(words))

    def head(inputs: Tensor, of_test: Tensor) -> dict[str, float]:
        return {"accuracy": trained_head(inputs, train.labels, of_test, y, size.epochs, seed)}

    f, g = unit(train.features), unit(X)
    found: dict[str, dict[str, float]] = {
        "zero_shot_bare": {"accuracy": bare.score(X, y)},
        "zero_shot": {"accuracy": zero_shot.score(X, y)},
        "linear": head(scale * f, scale * g),
        "on_zero_shot": head(zero_shot.logits(f), zero_shot.logits(g)),
        "on_scores": head(scale * f @ K.mT, scale * g @ K.mT),
        "scores": {"fidelity": fidelity(g @ K.mT, test.truth)},
    }
    for init in ("uniform", "identity"):
        for kind in KINDS:
            found[f"{kind}_{init}"] = measured(bottleneck(kind=kind, init=init), test)
        gumbel, again = (named(bottleneck(init=init, seed=seed + extra), X) for extra in (0, 1))
        found[f"gumbel_{init}"]["overlap"] = float(np.mean([len(a & b) / 5 for a, b in zip(gumbel, again)]))
    found["spread_uniform"] = measured(bottleneck(SpreadCBM, init="uniform"), test)
    found["random_phrases_uniform"] = {"accuracy": bottleneck(init="uniform", concepts=noise).score(X, y)}
    for temperature in size.temperatures:
        found[f"gumbel_uniform_at_{temperature:g}"] = measured(
            bottleneck(init="uniform", temperature=temperature), test
        )
    found |= {
        "search": search(),
        "search_cubed": search(power=3),
        "search_centered": search(center=True),
        "search_random_phrases": search(concepts=noise),
    }
    return found


def plain(classes: ClassTexts) -> ClassTexts:
    """The names alone, as the paper's zero-shot has them."""
    return ClassTexts(classes.names, templates=("{}",))


def meaningless(count: int, seed: int) -> list[str]:
    """Phrases of two words of five letters that mean nothing."""
    letters = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), (count, 2, 5))
    return [" ".join("".join(word) for word in phrase) for phrase in letters]


def trained_head(
    inputs: Tensor, labels: Any, of_test: Tensor, test_labels: Any, epochs: int, seed: int
) -> float:
    """Accuracy of one bias-free layer on inputs (n, d), with the steps of the bottlenecks."""
    targets = torch.from_numpy(labels)
    weights = torch.zeros(int(targets.max()) + 1, inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=LR)
    for epoch in range(epochs):
        for rows in rows_of_epoch(len(inputs), BATCH, seed, epoch, False):
            optimizer.zero_grad()
            F.cross_entropy(inputs[rows] @ weights.mT, targets[rows]).backward()
            optimizer.step()
    likeliest = (of_test @ weights.detach().mT).argmax(dim=1).numpy()
    return float((likeliest == test_labels).mean())


def measured(bottleneck: SparseCBM, test: Shown) -> dict[str, float]:
    """Accuracy, fidelity, concepts needed, and how far names are kept."""
    return {
        "accuracy": bottleneck.score(test.features, test.labels),
        "fidelity": fidelity(bottleneck.concept_scores(test.features), test.truth),
        "needed": needed(bottleneck.contributions(test.features)[0]),
        "identity": float(bottleneck.identity_.mean()),
    }


def fidelity(scores: Tensor, truth: Any) -> float:
    """Mean area under the ROC curve of (n, M) scores over the concepts of which both answers occur."""
    stats = require("scipy.stats", extra="adapt", purpose="the proof of sparse-cbm")
    true = truth.sum(axis=0).astype(float)
    mixed = (true > 0) & (true < len(truth))
    ranks = (stats.rankdata(scores.numpy(), axis=0) * truth).sum(axis=0)  # of the true ones
    areas = (ranks - true * (true + 1) / 2)[mixed] / (true * (len(truth) - true))[mixed]
    return float(areas.mean())


def needed(contributions: Tensor, share: float = 0.95) -> float:
    """How many of the largest contributions (n, M) make up a share of their absolute sum, on average."""
    sizes = contributions.abs().sort(dim=1, descending=True).values.cumsum(dim=1)
    return float((sizes < share * sizes[:, -1:]).sum(dim=1).double().mean() + 1)


def named(bottleneck: SparseCBM, X: Tensor) -> list[set[str]]:
    """The five concepts named for each picture, of features X (n, D)."""
    return [{reason.concept for reason in found.reasons} for found in bottleneck.explain(X, top=5)]


PROOF = Proof(
    slug="sparse-cbm",
    claim="The Gumbel loss on the concept layer gains accuracy over a sparse, a contrastive and no loss.",
    baseline="the best of l1, contrastive and no loss, from the authors' start",
    method="Gumbel, from the authors' start",
    metric="accuracy",
    run=run,
    controls={
        "none_uniform.accuracy": "any loss on the concept layer",
        "spread_uniform.accuracy": "the form of the Gumbel loss, a plain penalty on spread in its place",
        "random_phrases_uniform.accuracy": "concepts that mean something",
    },
)
