"""Sparse concept bottlenecks: labels from named concepts. Sparse Concept Bottleneck Models, arXiv 2404.03323.

With unit image features f̂ (B, D), unit text features K (M, D) of M short phrases, bare, and CLIP's scale s,

    S = s·f̂Kᵀ (B, M),    c = S Uᵀ,    y = c Hᵀ,    U (M, M), H (C, M), no biases
    loss = CE(y) + L_U,  H gets the gradient of CE alone

and L_U, the `kind`, is one of

    gumbel       ½·[mean −log softmax_batch((c + g)/τ) + mean −log softmax_concepts((c + g')/τ)],  g ~ Gumbel
    contrastive  CLIP's symmetric loss with the k-th picture of the batch and the k-th concept as pairs
    l1           l1·‖U‖₁/M
    similarity   −mean over concepts of cos(S_m, c_m), both centered over the batch (Label-free CBM)
    none         nothing

A prediction is read as contributions (c_m − c̄_m)·H_ym with the training mean c̄: S is about as large for
every concept, so that uncentered ones are mostly offset.

What the equations imply, and a reader of explanations has to know:

- The Gumbel loss is convex and symmetric in the entries of c: it is least where c is constant. It is a
  penalty on spread, and makes nothing one-hot. `pairing="diagonal"` takes the batch's diagonal instead of all
  entries, as the paper's text has it (on the raw score: its logarithm, which is taken there, does not exist
  for c ≤ 0).
- Cross-entropy, ℓ1 and Gumbel are the same for (PU, HPᵀ) with any permutation P, and so is a random start.
  Axis m of c then carries the name of concept m by convention only. Started at U = I it does mean it.
  `identity_` tells: the correlation of c_m with S_m over the training pictures.
- y is linear in f̂. With M ≥ D concepts that span the space every linear probe can be had: no bottleneck.
- Under Adam ℓ1 leaves no weight at exactly zero, and at the authors' 1e-3 it is very weak.

Concept Matrix Search needs no training: the class whose name's profile over the concepts is most like the
picture's,

    V = f̂Kᵀ,  T = ŵKᵀ with bare class names ŵ, rows divided by their sums;   argmax_c cos(V_i, T_c)

Row sums, if positive, do not change that, so it is zero-shot with class vectors KᵀKŵ_c/‖Kŵ_c‖.

Deviations. `init="identity"` is the default here, for the reason above; `"uniform"` is the authors' start.
Their released trainer leaves the head as it starts; here U and H both learn, as their tables need.
`standardize` and `center` are ours. Of Concept Matrix Search the variant that divides columns by their sum
over the pictures asked about is left out: a prediction would depend on the company it is made in.

The file is long because two methods stand in it, and the report for which the first is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints.files import read as read_weights
from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.data.randomness import fold, key_number
from clipworks.errors import CheckpointError, ConfigError
from clipworks.methods.adapt.base import Adapter, TrainedAdapter
from clipworks.parts.concepts import Concepts, bare, read_concepts
from clipworks.parts.features import Views
from clipworks.parts.schedules import Schedule
from clipworks.parts.shots import Shots, Step

Kind = Literal["gumbel", "contrastive", "l1", "similarity", "none"]
Pairing = Literal["all", "diagonal"]
Init = Literal["identity", "uniform"]
Rule = Literal["cosine", "max"]
S = TypeVar("S", bound="SparseCBM")

MANY = 4000  # concepts; U has their square
FAITHFUL = 0.5  # the least `identity_` at which a concept's name is taken at its word


# --- the losses on U ---


def gumbel_loss(
    c: Tensor, temperature: float, generator: torch.Generator, pairing: Pairing = "all"
) -> Tensor:
    """L_U "gumbel" of concept scores (B, M), 0-D.

    Args:
        c: fp32 or fp64, any size.
        temperature: τ.
        generator: of the noise, on the CPU, fresh for either direction.
        pairing: over all entries, or over the first min(B, M) of the diagonal.
    """
    total = c.new_zeros(())
    for dim in (0, 1):
        drawn = torch.rand(c.shape, generator=generator, dtype=c.dtype).clamp(1e-12, 1 - 1e-7)
        noise = -(-drawn.log()).log()
        # In log space: the logarithm of a softmax would be infinite for large scores.
        logs = ((c + noise.to(c.device)) / temperature).log_softmax(dim=dim)
        total = total - 0.5 * (logs.mean() if pairing == "all" else logs.diagonal().mean())
    return total


def contrastive_loss(c: Tensor) -> Tensor:
    """L_U "contrastive" of concept scores (B, M), 0-D: min(B, M) pairs on the diagonal, both ways."""
    pairs = min(c.shape)
    target = torch.arange(pairs, device=c.device)
    return 0.5 * (F.cross_entropy(c[:pairs], target) + F.cross_entropy(c.mT[:pairs], target))


def similarity_loss(scores: Tensor, c: Tensor, power: int = 1) -> Tensor:
    """L_U "similarity" of S and c (B, M), 0-D in [-1, 1]; `power` 3 cubes the centered entries first."""
    one, other = ((part - part.mean(dim=0)) ** power for part in (scores, c))
    return -F.cosine_similarity(one, other, dim=0).mean()


# --- the bottleneck ---


class ConceptLayers(nn.Module):
    """Scores S (B, M) to c (B, M) and y (B, C).

    Attributes:
        cbl: U, as `Linear`.
        head: H.
        mean, std: (M,), taken off S and divided by; 0 and 1 unless S is standardized.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, concepts: int, classes: int, init: Init):
        super().__init__()
        self.cbl = nn.Linear(concepts, concepts, bias=False)  # starts uniform on ±1/√M
        self.head = nn.Linear(concepts, classes, bias=False)
        if init == "identity":
            nn.init.eye_(self.cbl.weight)
        self.register_buffer("mean", torch.zeros(concepts))
        self.register_buffer("std", torch.ones(concepts))

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """c and y of S, in the type of S."""
        c = ((scores - self.mean) / self.std) @ self.cbl.weight.to(scores.dtype).mT
        return c, c @ self.head.weight.to(scores.dtype).mT


@dataclass(frozen=True)
class Reason:
    """What one concept added to a logit.

    Attributes:
        concept: its phrase.
        contribution: (c_m − c̄_m)·H_ym.
        identity: correlation of c_m with CLIP's own score of the phrase on the training pictures.
    """

    concept: str
    contribution: float
    identity: float

    def __str__(self) -> str:
        doubt = (
            "" if self.identity >= FAITHFUL else f" (the name is in doubt: correlation {self.identity:.2f})"
        )
        return f"{self.contribution:+.2f} {self.concept}{doubt}"


@dataclass(frozen=True)
class Explanation:
    """Why a picture got its label.

    Attributes:
        label: of `classes_`.
        logit: its y.
        offset: the part of y that every picture gets, Σ_m c̄_m·H_ym.
        reasons: the concepts that added or took most, the largest first.
        others: what all further concepts added together; offset, reasons and others sum to the logit.
    """

    label: Any
    logit: float
    offset: float
    reasons: tuple[Reason, ...]
    others: float

    def __str__(self) -> str:
        return f"{self.label}: " + ", ".join(map(str, self.reasons))


@dataclass(eq=False, repr=False, kw_only=True)
class SparseCBM(TrainedAdapter):
    """A linear classifier over named concepts; see the module's head for its equations.

    After `fit`, `concepts_` are the phrases and `identity_` (M,) says how far each axis still means its own.

    Args:
        concepts: a list of phrases, a text file with one a line, or `"world"`, the generated world's words.
        kind: the loss on U.
        init: of U; `identity` ties each axis to its concept, `uniform` is the authors'.
        temperature: τ of `gumbel`.
        pairing: of `gumbel`.
        l1: weight of `l1`.
        power: 3 cubes what `similarity` compares.
        standardize: S by its mean and deviation over the training pictures.
    """

    concepts: Concepts | None = None
    kind: Kind = "gumbel"
    init: Init = "identity"
    temperature: float = 1.0
    pairing: Pairing = "all"
    l1: float = 1e-3
    power: int = 1
    standardize: bool = False
    lr: float = 3e-4
    epochs: int = 40
    batch_size: int = 128

    schedule: ClassVar[Schedule] = Schedule("adam", weight_decay=0.0, decay="constant")

    def _prepare(self, shots: Shots | None) -> nn.Module:
        for name, value, known in (
            ("kind", self.kind, get_args(Kind)),
            ("init", self.init, get_args(Init)),
            ("pairing", self.pairing, get_args(Pairing)),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, not {self.temperature}")
        if len(self.concepts_) > MANY:
            warnings.warn(
                f"{len(self.concepts_)} concepts make a layer of {len(self.concepts_) ** 2:,} weights; "
                "filter_concepts shortens the list",
                stacklevel=2,
            )
        layers = ConceptLayers(len(self.concepts_), len(self.classes_), self.init)
        with torch.no_grad():  # by the names, so that no order of the classes makes another estimator
            for row, name in zip(layers.head.weight, self.texts_.names, strict=True):
                drawn = torch.Generator().manual_seed(fold(self.seed, key_number(name)) >> 1)
                row.uniform_(-1, 1, generator=drawn).div_(len(row) ** 0.5)
        if shots is not None and self.standardize:
            scores = self._scores_of(shots.vectors.flatten(0, 1).to(self._device)).cpu()
            layers.mean.copy_(scores.mean(dim=0))
            layers.std.copy_(scores.std(dim=0).clamp_min(1e-6))
        return layers

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        self.concepts_ = read_concepts(self.concepts)
        texts = self._texts_of_concepts
        super()._fit(shots, validation)
        self._cache["K"] = texts  # no phrase is encoded twice
        self._measure(shots.vectors.flatten(0, 1))

    @torch.no_grad()
    def _measure(self, features: Tensor) -> None:
        """c̄ and how far the axes of c mean their concepts, on pictures (n, D)."""
        scores = self._scores_of(features.double().to(self._device))
        c, _ = self.module_(scores)
        self.concept_mean_ = c.mean(dim=0)
        self.identity_ = F.cosine_similarity(scores - scores.mean(dim=0), c - self.concept_mean_, dim=0)

    def _loss(self, step: Step) -> Tensor:
        scores = self._scores_of(step.inputs)
        c, y = self.module_(scores)
        entropy = F.cross_entropy(y.float(), step.labels, reduction="none")
        return (entropy * step.weights).mean() + self._loss_on_u(scores.float(), c.float())

    def _loss_on_u(self, scores: Tensor, c: Tensor) -> Tensor:
        """L_U; H is not in it, so H gets the gradient of the cross-entropy alone."""
        if self.kind == "gumbel":
            noise = self._once("noise", lambda: torch.Generator().manual_seed(self.seed))
            return gumbel_loss(c, self.temperature, noise, self.pairing)
        if self.kind == "contrastive":
            return contrastive_loss(c)
        if self.kind == "l1":
            return self.l1 * self.module_.cbl.weight.abs().sum() / len(self.concepts_)
        return similarity_loss(scores, c, self.power) if self.kind == "similarity" else c.new_zeros(())

    @property
    def _texts_of_concepts(self) -> Tensor:
        """K, (M, D)."""
        found: Tensor = self._once("K", lambda: self._model.embed_texts(list(self.concepts_)))
        return found

    def _scores_of(self, features: Tensor) -> Tensor:
        """S (n, M) of features (n, D) of any length."""
        vectors = unit(features)
        return self.scale * vectors @ self._texts_of_concepts.to(vectors.dtype).mT

    def fold(self) -> tuple[Tensor, Tensor]:
        """The three layers as one: fp64 weights (C, D) on unit image features, and offsets (C,).

        The offsets are 0 unless S is standardized.
        """
        self._check_fitted()
        layers = self.module_
        with torch.no_grad(), self._undisturbed():
            heads = layers.head.weight.double() @ layers.cbl.weight.double() / layers.std.double()
            return self.scale * heads @ self._texts_of_concepts.double(), -heads @ layers.mean.double()

    def _class_features(self) -> Tensor:
        return unit(self.fold()[0]).float()

    def _logits(self, features: Tensor) -> Tensor:
        if self._learning:
            return self.module_(self._scores_of(features))[1]
        weights, offsets = self._once("fold", self.fold)
        vectors = unit(features)
        return vectors @ weights.to(vectors.dtype).mT + offsets.to(vectors.dtype)

    @torch.no_grad()
    def concept_scores(self, X: Any) -> Tensor:
        """c of pictures or features, (n, M) fp64."""
        features = self._vectors(X)
        with self._undisturbed():
            return self.module_(self._scores_of(features.double().to(self._device)))[0].cpu()

    @torch.no_grad()
    def contributions(self, X: Any) -> tuple[Tensor, Tensor]:
        """Of each picture to its predicted class: (c_m − c̄_m)·H_ym, (n, M) fp64, and which class, (n,)."""
        self._check_fitted()
        if "concept_mean_" not in vars(self):
            raise ConfigError("the means of the concepts are not known: call calibrate(pictures) first")
        c = self.concept_scores(X)
        heads = self.module_.head.weight.double().cpu()
        chosen = (c @ heads.mT).argmax(dim=1)
        return (c - self.concept_mean_.cpu()) * heads[chosen], chosen

    def calibrate(self: S, X: Any) -> S:
        """Take c̄ and `identity_` from these pictures or features, as `fit` takes them from its own."""
        features = self._vectors(X)
        with self._undisturbed():
            self._measure(features)
        return self

    @torch.no_grad()
    def explain(self, X: Any, top: int = 5) -> list[Explanation]:
        """The concepts that decided each picture.

        Args:
            X: pictures or features.
            top: how many concepts are named.

        Raises:
            ConfigError: if no pictures were seen yet from which contributions could be centered.
        """
        contributions, chosen = self.contributions(X)
        offsets = self.module_.head.weight.double().cpu() @ self.concept_mean_.cpu()
        found = []
        for row, label in zip(contributions, chosen.tolist(), strict=True):
            largest = row.abs().topk(min(top, len(row))).indices.tolist()
            reasons = tuple(
                Reason(self.concepts_[m], float(row[m]), float(self.identity_[m])) for m in largest
            )
            others = float(row.sum()) - sum(reason.contribution for reason in reasons)
            logit = float(row.sum() + offsets[label])
            found.append(
                Explanation(self.classes_[label].item(), logit, float(offsets[label]), reasons, others)
            )
        return found

    @classmethod
    def from_checkpoint(
        cls: type[S],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str] | ClassTexts,
        concepts: Concepts,
    ) -> S:
        """Read what the authors' trainer saves, `<accuracy>_checkpoint_<epoch>_epoch.pth`.

        Args:
            path: its file holds neither concepts nor classes; the order of both lists decides.
            clip: the backbone; the copy in the file is left out.
            class_names: in the order of the trained labels.
            concepts: in the order of the trained ones.

        Raises:
            CheckpointError: for other tensors than U and H, or shapes that do not fit the lists.
        """
        made = cls(clip, class_names, concepts=concepts)
        made.concepts_ = read_concepts(concepts)
        names = list(class_names.names if isinstance(class_names, ClassTexts) else class_names)
        held = read_weights(Path(path)).weights
        own = {name: tensor.float() for name, tensor in held.items() if not name.startswith("backbone.")}
        count = len(made.concepts_)
        shapes = {"cbl.weight": (count, count), "head.weight": (len(names), count)}
        for name, shape in shapes.items():
            if name not in own:
                raise CheckpointError(f"{path}: has no {name}; it is not a plain concept bottleneck")
            if tuple(own[name].shape) != shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(own[name].shape)}, and {count} concepts and {len(names)} "
                    f"classes need {shape}"
                )
        if own.keys() != shapes.keys():
            raise CheckpointError(f"{path}: {sorted(own.keys() - shapes.keys())[0]} is not understood")
        order = [names.index(name) for name in sorted(names)]  # as `classes_` has them
        return made._learned_elsewhere(
            {
                "cbl.weight": own["cbl.weight"],
                "head.weight": own["head.weight"][order],
                "mean": torch.zeros(count),
                "std": torch.ones(count),
            }
        )


# --- without training ---


@dataclass(eq=False, repr=False, kw_only=True)
class ConceptMatrixSearch(Adapter):
    """Classes by their names' profiles over concepts; `fit()` needs no example.

    Args:
        concepts: as `SparseCBM` takes them.
        rule: the class whose profile has the largest cosine with the picture's, or that with the largest
            entry at the picture's largest concept.
        power: entries are raised to it before they are compared.
        center: take off each profile's mean instead of dividing by its sum.
    """

    concepts: Concepts | None = None
    rule: Rule = "cosine"
    power: int = 1
    center: bool = False

    slug: ClassVar[str] = "concept-matrix-search"
    labels_needed: ClassVar[bool | None] = None
    every_class: ClassVar[bool] = False
    retargets: ClassVar[bool] = True

    def fit(self, X: Any = None, y: Any = None, **options: Any) -> ConceptMatrixSearch:
        """Settle classes and concepts; pictures and labels only name the classes."""
        return super().fit(X, y, **options)

    def _read(self, X: Any, y: Any, sample_weight: Any) -> Shots:
        if X is not None:
            return super()._read(X, y, sample_weight)
        self.classes_, self.texts_ = self._settle(None)
        self.fitted_on_, self.n_features_in_ = "pictures", self._model.width
        return Shots(torch.empty(0, dtype=torch.int64), torch.empty(0))

    def _from_pictures(self, images: list[Any], labels: Tensor, weights: Tensor, views: Views) -> Shots:
        return Shots(labels, weights)  # no picture has to be encoded

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        if self.rule not in get_args(Rule):
            raise ConfigError(f"rule must be one of {', '.join(get_args(Rule))}, not {self.rule!r}")
        if self.power < 1:
            raise ConfigError(f"power must be at least 1, not {self.power}")
        self.concepts_ = read_concepts(self.concepts)

    @property
    def _texts_of_concepts(self) -> Tensor:
        """K, (M, D)."""
        found: Tensor = self._once(
            "K", lambda: self._model.embed_texts([bare(phrase) for phrase in self.concepts_])
        )
        return found

    @property
    def _names(self) -> Tensor:
        """ŵ, (C, D): bare class names."""
        found: Tensor = self._once(
            "names", lambda: self._model.embed_texts([bare(name) for name in self.texts_.names])
        )
        return found

    def _profiles(self, vectors: Tensor) -> Tensor:
        """V or T, (n, M), of unit vectors (n, D)."""
        found = vectors @ self._texts_of_concepts.to(vectors.dtype).mT
        found = (
            found - found.mean(dim=1, keepdim=True)
            if self.center
            else found / (found.sum(dim=1, keepdim=True) + 1e-8)
        )
        return found**self.power

    def _class_features(self) -> Tensor:
        """KᵀT_c, unit: what a picture's cosines are with, up to its own factor, at power 1."""
        return unit(unit(self._profiles(self._names)) @ self._texts_of_concepts)

    def _logits(self, features: Tensor) -> Tensor:
        vectors = unit(features)
        pictures = self._profiles(vectors)
        classes = self._profiles(self._names.to(vectors.dtype))
        if self.rule == "max":
            return self.scale * classes.mT[pictures.argmax(dim=1)]
        return self.scale * unit(pictures) @ unit(classes).mT
