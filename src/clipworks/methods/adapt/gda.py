"""GDA: Gaussian discriminant analysis on CLIP features, in closed form. Wang et al., ICLR 2024.

The classes are Gaussians with one shared covariance. With unit image features z of all N training views,
class means μ_c, the features' differences to their class means in R, and S = RᵀR (D, D),

    P = D·[(N − 1)Σ + tr(Σ)·I]⁻¹ = D·(S + t·I)⁻¹,     Σ = S/(N − 1),  t = tr(S)/(N − 1)          (eq. 6)
    w_c = P μ_c,   b_c = log π_c − ½ μ_cᵀ P μ_c,   π_c = 1/C                                      (eq. 4)
    logits = s·z·tᵀ + α·(z·Wᵀ + b)

P is the precision of Kubokawa and Srivastava. It is D/(N − 1) times a ridge-regularized inverse covariance,
so one α means different things for different N; what compares is a = α·D/(N − 1), and a = 1 is the plain
log-likelihood. N counts views as if they were independent: their number is a hyperparameter.

Classes without an image (`for_classes`). For each new class with text vector t, its 64 nearest training views
stand in for its images; with z running over them,

    μ = mean of these 64 and of 16 copies of t,    S_t = Σ (z − t)(z − t)ᵀ,    P_t = D·(S_t + tr(S_t)/63·I)⁻¹

and P is the mean of the P_t over the new classes. The paper's base classes have, in this setting, another P:
the pseudo-inverse of the mean over classes of each class's covariance (`covariance="class-mean"`).

Images without a label (`UnsupervisedGDA`) are given to classes by expectation maximization: γ, at first the
zero-shot probabilities, are the softmax of the logits above, and

    μ_k = Σ_i γ_ik z_i / Σ_i γ_ik,    Σ = 1/C·Σ_k [Σ_i γ_ik (z_i − μ_k)(z_i − μ_k)ᵀ / Σ_i γ_ik]

Deviations. The paper's s is 100, here it is the Clip's own scale, which in the released models is 100. Of the
Gaussian logits the mean over classes is left out, which no probability sees; what is left is small enough
for fp32. Statistics are fp64, and P is never formed: a Cholesky factor solves for all means. α is chosen by
the paper's grid on validation pictures; without such, where the paper has nothing to say, by folds over
pictures. The paper takes the number 512 for D in `for_classes`; it carries α over from P to P_t, here a is
carried over, which is the same for `class-mean`. For EM the paper names neither P, α nor when to stop: here P
is the one above, a = 1, and it stops when no label changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor

from clipworks.core.clip import unit
from clipworks.data.captions import ClassTexts
from clipworks.errors import ConfigError
from clipworks.methods.adapt.base import Adapter
from clipworks.parts.shots import Shots

Covariance = Literal["ks", "class-mean", "isotropic", "diagonal"]
G = TypeVar("G", bound="GDA")

ALPHAS = tuple(10.0**power for power in range(-4, 3))
LIKELIHOODS = tuple(10.0 ** (half / 2) for half in range(-8, 5))  # a, where folds choose it
NO_FOLDS = 1e-3  # α, where no picture can be left out; the usual choice of validation pictures at one shot
FOLDS = 4
NEIGHBORS, TEXT_COPIES = 64, 16
FP32_EPSILON = 2.0**-23


@dataclass(frozen=True)
class Statistics:
    """All that the pooled Gaussians need of the data; they add up over shards and subtract for folds.

    Attributes:
        counts: n_c, (C,) fp64, weighted.
        sums: of the vectors of each class, (C, D) fp64.
        second: Σ z zᵀ, (D, D) fp64.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    @classmethod
    def of(cls, vectors: Tensor, labels: Tensor, weights: Tensor, classes: int) -> Statistics:
        """Of vectors (m, D) with labels (m,) int64 and weights (m,)."""
        z, w = vectors.double(), weights.double()
        weighted = z * w[:, None]
        counts = torch.zeros(classes, dtype=z.dtype).index_add_(0, labels, w)
        sums = torch.zeros(classes, z.shape[1], dtype=z.dtype).index_add_(0, labels, weighted)
        return cls(counts, sums, weighted.mT @ z)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.counts + other.counts, self.sums + other.sums, self.second + other.second)

    def __sub__(self, other: Statistics) -> Statistics:
        return Statistics(self.counts - other.counts, self.sums - other.sums, self.second - other.second)

    @property
    def total(self) -> float:
        """N."""
        return float(self.counts.sum())

    @property
    def means(self) -> Tensor:
        """μ, (C, D)."""
        return self.sums / self.counts[:, None]

    @property
    def scatter(self) -> Tensor:
        """S = Σ z zᵀ − Σ_c n_c μ_c μ_cᵀ, (D, D)."""
        return self.second - self.sums.mT @ self.means

    @property
    def spread(self) -> bool:
        """Whether S is more than rounding."""
        return self.total > 1 and float(self.scatter.trace()) > 1e-12 * float(self.second.trace())


def ridged(scatter: Tensor, total: float, means: Tensor, form: Covariance = "ks") -> Tensor:
    """P μ for P = D·(S + t·I)⁻¹ with t = tr(S)/(N − 1).

    Args:
        scatter: S, (D, D) fp64, its trace above 0.
        total: N, above 1.
        means: μ, (C, D) fp64.
        form: `ks`; with `diagonal` S is its own diagonal, with `isotropic` that diagonal's mean.

    Returns:
        (C, D).
    """
    width, trace = len(scatter), scatter.trace()
    ridge = trace / (total - 1)
    if form == "isotropic":
        return means * (width / (trace / width + ridge))
    if form == "diagonal":
        return means * (width / (scatter.diagonal() + ridge))
    # The condition number of S + t·I is at most N, as no eigenvalue of S is above its trace.
    factor = torch.linalg.cholesky(scatter + ridge * torch.eye(width, dtype=scatter.dtype))
    return width * torch.cholesky_solve(means.mT, factor).mT


def pseudo_inverted(covariance: Tensor, means: Tensor) -> Tensor:
    """Σ⁺ μ, (C, D), of Σ (D, D) and μ (C, D) in fp64.

    Eigenvalues below D·2⁻²³ of the largest are taken for 0, as the paper's code does by computing in fp32.
    """
    values, axes = torch.linalg.eigh(covariance)
    kept = values > len(values) * FP32_EPSILON * values[-1]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return (means @ axes * inverse) @ axes.mT


def discriminant(means: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """W (C, D) and b (C,) of means μ and P μ, without what all classes share."""
    bias = -0.5 * (means * directions).sum(dim=1)
    return directions - directions.mean(dim=0), bias - bias.mean()


@dataclass(eq=False, repr=False, kw_only=True)
class GDA(Adapter):
    """Zero-shot logits plus those of Gaussians with one covariance.

    After `fit`, `alpha_` is α and `likelihood_` is a.

    Args:
        alpha: α, or `"auto"`: of 1e-4, 1e-3, … 100 the first that is best on the validation data. Without
            such data a, in half-decades, is the first best over four folds (fewer if a class has fewer
            pictures), the views of a picture being together in one; with one picture a class α is 1e-3.
        covariance: `ks` is the paper's; `class-mean` its other one, for base and new classes; `isotropic`
            makes it nearest mean with text, `diagonal` has no correlations.
        keep_features: keep the training features, half precision, which `for_classes` needs.
    """

    views: int = 10
    alpha: float | Literal["auto"] = "auto"
    covariance: Covariance = "ks"
    keep_features: bool = True

    retargets: ClassVar[bool] = True

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        _check_alpha(self.alpha)
        if self.covariance not in get_args(Covariance):
            known = ", ".join(get_args(Covariance))
            raise ConfigError(f"covariance must be one of {known}, not {self.covariance!r}")
        if not shots.weights.all():
            shots = shots.select(shots.weights.nonzero()[:, 0])
        counts = shots.counts(len(self.classes_))
        if not counts.all():
            name = self.classes_[int(counts.argmin())].item()
            raise ConfigError(f"the class {name!r} has no picture that counts: give one, or leave it out")
        whole = self._statistics(shots)
        self._solve(whole, shots)
        factor = self._factor
        if self.alpha != "auto":
            self.alpha_ = float(self.alpha)
        elif validation is not None:
            self.alpha_ = self._by_validation(validation)
        else:
            folds = folds_of(shots.labels, counts, shots.vectors.shape[1])
            self.alpha_ = NO_FOLDS if folds is None else self._by_folds(shots, whole, folds) / factor
            self._solve(whole, shots)
        self.likelihood_ = self.alpha_ * factor
        if self.keep_features:
            self.features_ = unit(shots.vectors).flatten(0, 1).half()

    # --- the classifier ---

    def _solve(self, statistics: Statistics, shots: Shots) -> None:
        """Set W, b and N from the statistics of some examples, and these."""
        if not statistics.spread:
            raise ConfigError(
                f"every class, {self.classes_[0].item()!r} the first, has a single vector, so there is no "
                "covariance: give more pictures, or views of them"
            )
        means = statistics.means
        if self.covariance == "class-mean":
            directions = pseudo_inverted(self._class_mean(shots), means)
        else:
            directions = ridged(statistics.scatter, statistics.total, means, self.covariance)
        self._keep(means, directions)
        self.total_ = statistics.total

    def _statistics(self, shots: Shots) -> Statistics:
        return _statistics(shots, shots.labels, len(self.classes_))

    def _class_mean(self, shots: Shots) -> Tensor:
        """The mean over classes of their covariances, each with the divisor n_c − 1; (D, D)."""
        found = torch.zeros(shots.vectors.shape[-1], shots.vectors.shape[-1], dtype=torch.float64)
        for label, name in enumerate(self.classes_):
            rows = shots.select((shots.labels == label).nonzero()[:, 0])
            own = _statistics(rows, torch.zeros_like(rows.labels), 1)
            if own.total <= 1:
                raise ConfigError(
                    f"the class {name.item()!r} has one vector and so no covariance of its own: "
                    "give more pictures, or views of them"
                )
            found += own.scatter / (own.total - 1)
        return found / len(self.classes_)

    def _keep(self, means: Tensor, directions: Tensor) -> None:
        weights, bias = discriminant(means, directions)
        self.weights_, self.bias_ = weights.to(self._device), bias.to(self._device)

    @property
    def _factor(self) -> float:
        """a/α: by how much P is larger than an inverse covariance."""
        return 1.0 if self.covariance == "class-mean" else self.weights_.shape[1] / (self.total_ - 1)

    def gaussian_logits(self, features: Tensor) -> Tensor:
        """Of features (B, D) z·Wᵀ + b without its mean over classes, (B, C); what α weighs."""
        vectors = unit(features)
        return torch.addmm(self.bias_.to(vectors), vectors, self.weights_.to(vectors).mT)

    def _logits(self, features: Tensor) -> Tensor:
        return super()._logits(features) + self.alpha_ * self.gaussian_logits(features)

    # --- α ---

    def _by_validation(self, held: Shots) -> float:
        right = self._right(held.vectors[:, 0], held.labels, ALPHAS)
        best = int(right.argmax())  # the first of equal ones
        return ALPHAS[best] if right[best] else 0.1

    def _by_folds(self, shots: Shots, whole: Statistics, folds: Tensor) -> float:
        """a, by how many views are right when the fold of their picture is left out."""
        right = torch.zeros(len(LIKELIHOODS), dtype=torch.int64)
        views = shots.vectors.shape[1]
        for fold in range(int(folds.max()) + 1):
            train, away = (shots.select(rows.nonzero()[:, 0]) for rows in (folds != fold, folds == fold))
            self._solve(whole - self._statistics(away), train)
            # N is another one without the fold: a is carried over, not α.
            alphas = [likelihood / self._factor for likelihood in LIKELIHOODS]
            right += self._right(away.vectors.flatten(0, 1), away.labels.repeat_interleave(views), alphas)
        return LIKELIHOODS[int(right.argmax())]

    @torch.no_grad()
    def _right(self, features: Tensor, labels: Tensor, alphas: Sequence[float]) -> Tensor:
        """How many of features (m, D) each α classifies right, (len(alphas),) int64."""
        on_device = features.to(self._device)
        zero_shot, gaussian = super()._logits(on_device), self.gaussian_logits(on_device)
        likeliest = [(zero_shot + alpha * gaussian).argmax(dim=1).cpu() for alpha in alphas]
        return torch.stack([(found == labels).sum() for found in likeliest])

    # --- other classes ---

    def for_classes(self: G, class_names: Sequence[str] | ClassTexts) -> G:
        """The fitted estimator for other class names: if it has them all, it is restricted to them.

        Otherwise all of them are new classes, whose pictures their nearest training views stand in for.

        Raises:
            ConfigError: if there are new names and the training features were not kept.
        """
        places = {name: place for place, name in enumerate(self.texts_.names)}
        twin = super().for_classes(class_names)
        if all(name in places for name in twin.texts_.names):
            rows = [places[name] for name in twin.texts_.names]
            twin.weights_, twin.bias_ = self.weights_[rows], self.bias_[rows]
            return twin
        if not self.keep_features:
            raise ConfigError("new class names need the training features: fit with keep_features=True")
        texts = twin.class_features().double().cpu()
        means, directions = stand_ins(texts, self.features_.double().cpu())
        twin._keep(means, directions)
        twin.alpha_ = self.likelihood_
        return twin


def _statistics(shots: Shots, labels: Tensor, classes: int) -> Statistics:
    """Of all views of some examples; the weight of an example is that of each of its views."""
    views = shots.vectors.shape[1]
    weights = shots.weights.double() * shots.mean_weight
    return Statistics.of(
        unit(shots.vectors.double()).flatten(0, 1),
        labels.repeat_interleave(views),
        weights.repeat_interleave(views),
        classes,
    )


@torch.no_grad()
def stand_ins(
    texts: Tensor, features: Tensor, neighbors: int = NEIGHBORS, copies: int = TEXT_COPIES
) -> tuple[Tensor, Tensor]:
    """Means μ and P μ, (C, D) each, of classes without a picture.

    Args:
        texts: t, (C, D) unit fp64.
        features: training views (N, D) unit fp64; at least two.
        neighbors: how many stand in for the pictures of a class; of fewer, all.
        copies: how often t counts in the mean.
    """
    count = min(neighbors, len(features))
    nearest = (texts @ features.mT).topk(count, dim=1).indices
    means = torch.stack(
        [(features[rows].sum(dim=0) + copies * text) / (count + copies) for text, rows in zip(texts, nearest)]
    )
    directions = torch.zeros_like(means)
    for text, rows in zip(texts, nearest):
        residual = features[rows] - text
        directions += ridged(residual.mT @ residual, count, means) / len(texts)
    return means, directions


def folds_of(labels: Tensor, counts: Tensor, views: int) -> Tensor | None:
    """Which fold each picture is in, (n,) int64: those of a class take turns.

    None if a class would be left with fewer than two vectors, from which no covariance can be learned.
    """
    fewest = int(counts.min())
    folds = min(fewest, FOLDS)
    if (fewest - math.ceil(fewest / folds)) * views < 2:
        return None
    found = torch.empty_like(labels)
    for label, count in enumerate(counts.tolist()):
        found[labels == label] = torch.arange(count) % folds
    return found


def _check_alpha(alpha: float | Literal["auto"]) -> None:
    number = isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha >= 0
    if alpha != "auto" and not number:
        raise ConfigError(f"alpha must be a number from 0 on or 'auto', not {alpha!r}")


@dataclass(eq=False, repr=False, kw_only=True)
class UnsupervisedGDA(Adapter):
    """The same classifier fitted to pictures without labels, by expectation maximization.

    After `fit`, `alpha_` is α and `n_iter_` how many rounds there were.

    Args:
        alpha: α, or `"auto"`: (N − 1)/D, so that Gaussians have the weight of their likelihood.
        rounds: at most.
    """

    alpha: float | Literal["auto"] = "auto"
    rounds: int = 20

    slug: ClassVar[str] = "gda-unsupervised"
    labels_needed: ClassVar[bool | None] = False
    every_class: ClassVar[bool] = False

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        _check_alpha(self.alpha)
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.rounds}")
        features = shots.vectors.flatten(0, 1)
        weights = (shots.weights.double() * shots.mean_weight).repeat_interleave(shots.vectors.shape[1])
        z, total = unit(features.double()), float(weights.sum())
        if total <= 1:
            raise ConfigError(f"{type(self).__name__} needs more than one picture to learn a covariance from")
        self.alpha_ = (total - 1) / z.shape[1] if self.alpha == "auto" else float(self.alpha)

        zero_shot = super()._logits(features.to(self._device)).double().cpu()
        logits, means = zero_shot, torch.zeros(zero_shot.shape[1], z.shape[1], dtype=z.dtype)
        for number in range(1, self.rounds + 1):
            means, covariance = maximization(z, logits.softmax(dim=1) * weights[:, None], means)
            if float(covariance.trace()) <= 1e-12:
                raise ConfigError("the pictures are all alike: there is no covariance to learn")
            w, b = discriminant(means, ridged((total - 1) * covariance, total, means))
            before, logits = logits, zero_shot + self.alpha_ * (z @ w.mT + b)
            self.n_iter_ = number
            if torch.equal(before.argmax(dim=1), logits.argmax(dim=1)):
                break
        self.weights_, self.bias_ = w.to(self._device), b.to(self._device)

    def _logits(self, features: Tensor) -> Tensor:
        vectors = unit(features)
        gaussian = torch.addmm(self.bias_.to(vectors), vectors, self.weights_.to(vectors).mT)
        return super()._logits(features) + self.alpha_ * gaussian


def maximization(vectors: Tensor, gamma: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The M-step: means (C, D) and the mean over classes of their covariances, (D, D).

    Args:
        vectors: (n, D) fp64.
        gamma: γ, (n, C) fp64, rows sum to one (or to a weight).
        before: (C, D); a class to which nothing belongs any more keeps its mean and is left out of the
            covariance.
    """
    mass = gamma.sum(dim=0)
    alive = mass > 1e-12
    share = torch.where(alive, gamma / mass.clamp_min(1e-12), 0.0)  # each column sums to one
    means = torch.where(alive[:, None], share.mT @ vectors, before)
    own = means[alive]
    second = (vectors * share.sum(dim=1, keepdim=True)).mT @ vectors
    return means, (second - own.mT @ own) / int(alive.sum())
