"""AMU-Tuning: effective logit bias for CLIP-based few-shot learning. Tang et al., CVPR 2024.

Few-shot methods for CLIP add a bias to zero-shot logits. Here it comes from auxiliary features, those of a
second frozen encoder, through a linear head W (C, D_a) that has a loss of its own beside the fused one, and
counts the more the less sure CLIP is. With unit features z of CLIP, a of the auxiliary, and unit texts T,

    f₀ = s·z·Tᵀ,   r = a·Wᵀ,   b = (r − mean_c r) / std_c r                 each picture's row is standardized
    logits = f₀ + α·κ(f₀)·b                                                 κ: a number a picture
    L = λ·CE(logits) + (1 − λ)·CE(b)                                        both branches
    κ = (C / (4·m₄))^ρ,   m₄ = mean_c ((p_c − μ)/σ)⁴,   p = softmax(f₀)     kurtosis; ρ = 0.4

Deviations are over C − 1. W starts at the class means of a (averaged over views, made unit); it is all that
is learned, by AdamW with a cosine over steps. b is the same under W → cW + 1vᵀ, so the means need no length.

Two numbers of the paper belong to ImageNet's 1,000 classes. It has 250 where κ has C/4 here, the same there;
m₄ of a sure p is about C, so with 250 and ten classes nothing would count as sure. And since b moves a margin
by α·√(2(C − 1)) at most, its α of 0.5 is here the middle of a grid at 0.5·√(1000/C). α and the epoch are
chosen on validation data (the released code chooses the epoch on the test data). Without such data α is the
middle, and the last epoch is taken, at one picture a class the first, after which it only gets worse there.
`RELEASE` are the settings of the released commands, which leave the uncertainty out. The paper's s is 100,
here it is the Clip's own, in the released models 100.

The auxiliary sees the pixels of the same view that CLIP sees. The paper's is a MoCo v3 ResNet-50, which
`parts/encoders` reads. Where there is no second encoder, the mean of CLIP's patch tokens before its last norm
and projection stands in (ours).

The gradient is written out, and heads of several α are trained at once: 10,000 steps on a head of 100 classes
would spend most of their time in bookkeeping otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints.files import read_object
from clipworks.core.clip import Clip, unit
from clipworks.core.images import fit
from clipworks.core.resnet import ModifiedResNet
from clipworks.core.towers import VisionTower
from clipworks.data.captions import ClassTexts
from clipworks.encode.bulk import evaluating
from clipworks.errors import CheckpointError, ConfigError, EstimatorInputError
from clipworks.methods.adapt.base import Adapter
from clipworks.parts.features import fingerprint
from clipworks.parts.schedules import Schedule, rows_of_epoch
from clipworks.parts.shots import Shots

Auxiliary = Callable[[Tensor], Tensor] | Clip | Literal["patches", "own"]
Uncertainty = Literal["none", "moment", "entropy", "max", "max-min", "top5", "energy", "var"]
U = TypeVar("U", bound="AMUTuning")

ALPHA, FACTORS = 0.5, (0.25, 0.5, 1.0, 2.0, 4.0)  # at 1,000 classes, and the grid around it
RELEASE: Mapping[str, Any] = {"alpha": 0.5, "branch_weight": 0.35, "uncertainty": "none"}
RELEASED_ALPHAS = (0.5, 0.65, 1.0, 2.0)
SCHEDULE = Schedule("adamw", weight_decay=0.01, eps=1e-4, decay="step")


def standardize(raw: Tensor) -> tuple[Tensor, Tensor]:
    """b and 1/std of raw biases r (..., C): rows of mean 0 and deviation 1; both 0 where all r are equal."""
    mean = raw.sum(dim=-1, keepdim=True) / raw.shape[-1]  # `mean` is slower on short rows
    centered = raw - mean
    variance = centered.square().sum(dim=-1, keepdim=True) / (raw.shape[-1] - 1)
    rounding = mean.square() * (4 * torch.finfo(raw.dtype).eps) ** 2
    inverse = variance.rsqrt().masked_fill_(variance <= rounding, 0.0)
    return centered * inverse, inverse


def confidence(
    zero_shot: Tensor, kind: Uncertainty = "moment", power: float = 0.4, scale: float | None = None
) -> Tensor:
    """κ of zero-shot logits (..., C), (..., 1): how much of the bias a picture gets.

    Args:
        zero_shot: f₀.
        kind: `moment` is the paper's and `none` is 1; the others are the code's, of which `var` grows with
            confidence and `energy` hardly varies.
        power: ρ.
        scale: what m₄ is compared with; None is C/4.

    Returns:
        fp32 (fp64 of fp64). 1 where it is not defined: `moment` of a uniform p, differences of equal ones.

    Raises:
        ConfigError: for an unknown kind, or `top5` of fewer than five classes.
    """
    p = zero_shot.softmax(
        dim=-1, dtype=zero_shot.dtype if zero_shot.dtype == torch.float64 else torch.float32
    )
    classes = p.shape[-1]
    if kind not in get_args(Uncertainty):
        raise ConfigError(f"uncertainty must be one of {', '.join(get_args(Uncertainty))}, not {kind!r}")
    if kind == "top5" and classes < 5:
        raise ConfigError(f"uncertainty 'top5' compares five classes, and there are {classes}")
    top = p.amax(dim=-1, keepdim=True)
    if kind == "none":
        return torch.ones_like(top)
    if kind == "moment":
        centered = p - p.mean(dim=-1, keepdim=True)
        largest = centered.abs().amax(dim=-1, keepdim=True)
        # No ratio of moments sees a scale; fp32 would lose the fourth powers of small ones.
        centered = torch.where(largest > 4 * torch.finfo(p.dtype).eps * top, centered / largest, 0.0)
        variance = centered.square().sum(dim=-1, keepdim=True) / (classes - 1)
        moment = centered.pow(4).mean(dim=-1, keepdim=True) / variance.square()
        found = ((classes / 4 if scale is None else scale) / moment) ** power
    elif kind == "entropy":
        entropy = torch.special.entr(p).sum(dim=-1, keepdim=True)
        found = (power * entropy / math.log(classes)).exp()
    elif kind == "max":
        found = top**-power
    elif kind == "max-min":
        found = (top - p.amin(dim=-1, keepdim=True)) ** -power
    elif kind == "top5":
        found = (top - p.topk(5, dim=-1).values[..., 4:]) ** -power
    elif kind == "energy":
        # As released: of p, not of logits, and the maximum is added inside the factor.
        found = (2 * (((p - top) / 2).logsumexp(dim=-1, keepdim=True) + top)) ** -power
    else:
        found = p.std(dim=-1, keepdim=True)
    return torch.where(found.isfinite(), found, 1.0)


def fuse(zero_shot: Tensor, bias: Tensor, strength: Tensor) -> Tensor:
    """f₀ (..., C) plus b (..., C) times α·κ (..., 1)."""
    return torch.addcmul(zero_shot, bias, strength)


def gradient(
    bias: Tensor,
    inverse: Tensor,
    zero_shot: Tensor,
    strength: Tensor,
    targets: Tensor,
    branch_weight: float,
) -> Tensor:
    """dL/dr, (..., C), of one picture's λ·CE(f₀ + ακb) + (1 − λ)·CE(b) each.

    Args:
        bias, inverse: from `standardize`, (..., C) and (..., 1).
        zero_shot: f₀, (..., C).
        strength: ακ, (..., 1).
        targets: one-hot, (..., C).
        branch_weight: λ.
    """
    fused = branch_weight * strength
    back = fuse(zero_shot, bias, strength).softmax(dim=-1).mul_(fused)
    back.add_(bias.softmax(dim=-1), alpha=1 - branch_weight)
    back.addcmul_(targets, fused + (1 - branch_weight), value=-1)  # dL/db; its sum over classes is 0
    along = (back * bias).sum(dim=-1, keepdim=True)
    return back.addcmul_(along, bias, value=-1 / (bias.shape[-1] - 1)).mul_(inverse)


@dataclass(eq=False, repr=False, kw_only=True)
class AMUTuning(Adapter):
    """Zero-shot logits plus a tuned bias from auxiliary features.

    Features that are given instead of pictures are [z | a], (n, D + D_a), CLIP's before the auxiliary's; with
    `auxiliary="own"` z alone. `class_features` are CLIP's texts with zeros for the auxiliary's part. After
    `fit`, `alpha_` is α, `epochs_` how many were trained and `head_` is W.

    Args:
        auxiliary: the second encoder: any function or module from pixels (B, 3, H, W) in [0, 1], of the size
            that the Clip reads, to features (B, D_a), see `parts/encoders`; another Clip; `"patches"`, the
            Clip's own patch tokens; or `"own"`, its own features once more. A module is used in evaluation
            mode and never changed.
        alpha: α, or `"auto"`: of five around 0.5·√(1000/C) the first that is best on the validation data.
        branch_weight: λ, of the fused logits' loss.
        uncertainty: which κ, see `confidence`.
        power: ρ.
        init: W starts at `means` of the classes or `random`.
        lr, epochs, batch_size: of the training.
    """

    auxiliary: Auxiliary = "patches"
    alpha: float | Literal["auto"] = "auto"
    branch_weight: float = 0.35
    uncertainty: Uncertainty = "moment"
    power: float = 0.4
    init: Literal["means", "random"] = "means"
    lr: float = 1e-3
    epochs: int = 50
    batch_size: int = 8
    views: int = 8

    shared: ClassVar[tuple[str, ...]] = ("clip", "store", "auxiliary")

    # --- the two encoders ---

    def _encode(self, pixels: Tensor) -> Tensor:
        """[z | a], (B, D + D_a) raw; z alone where it is its own auxiliary."""
        if self.auxiliary == "own":
            return super()._encode(pixels)
        if self.auxiliary == "patches":
            vectors, features = patch_features(self._model.image, pixels)
            return torch.cat([vectors, features], dim=1)
        features = _features(self.auxiliary, pixels)
        if features.ndim != 2 or len(features) != len(pixels):
            raise ConfigError(
                f"auxiliary must make (B, D_a) of pixels, and made {tuple(features.shape)} of {len(pixels)}"
            )
        return torch.cat([super()._encode(pixels).float(), features.float()], dim=1)

    @property
    def encoder(self) -> str:
        """The name of both encoders in a store."""
        own, name = super().encoder, self._auxiliary_name()
        if not name:
            raise ConfigError(
                "a store tells encoders apart by weights: make the auxiliary an nn.Module, or leave store out"
            )
        return own if name == "own" else f"{own}{name}"

    def _auxiliary_name(self) -> str:
        """What stands for the auxiliary: a word, or a fingerprint; nothing for a function without weights."""
        if isinstance(self.auxiliary, str):
            return self.auxiliary
        if isinstance(self.auxiliary, Clip):
            return fingerprint(self.auxiliary.image, self.auxiliary.preprocessing)
        return (
            fingerprint(self.auxiliary, repr(self.auxiliary)) if isinstance(self.auxiliary, nn.Module) else ""
        )

    def _split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., D) and a (..., D_a) of features."""
        width = self._model.width
        return (features, features) if self.auxiliary == "own" else features.tensor_split((width,), dim=-1)  # type: ignore[return-value]

    def _class_features(self) -> Tensor:
        return F.pad(self._texts(), (0, self.n_features_in_ - self._model.width))

    def _texts(self) -> Tensor:
        """T, (C, D)."""
        return cast(Tensor, self._once("texts", super()._class_features))

    def _zero_shot(self, z: Tensor) -> Tensor:
        """f₀ of z (..., D), (..., C)."""
        vectors, bias = unit(z), self._model.bias
        logits = self.scale * (vectors @ self._texts().to(vectors).mT)
        return logits if bias is None else logits + float(bias)

    def _logits(self, features: Tensor) -> Tensor:
        z, a = self._split(features)
        zero_shot = self._zero_shot(z)
        kappa = confidence(zero_shot, self.uncertainty, self.power)
        return fuse(zero_shot, self.bias_logits(a), self.alpha_ * kappa)

    def bias_logits(self, auxiliary_features: Tensor) -> Tensor:
        """b of auxiliary features (B, D_a), (B, C): what α·κ weighs."""
        vectors = unit(auxiliary_features)
        raw = vectors @ self.head_.to(vectors).mT
        return standardize(raw)[0] if self.standardized_ else raw

    @property
    def trainable_parameters(self) -> int:
        """Those of W."""
        self._check_fitted()
        return self.head_.numel()

    # --- the fit ---

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        self._check(shots)
        self.auxiliary_, self.standardized_ = self._auxiliary_name(), True
        if not shots.weights.all():
            shots = shots.select(shots.weights.nonzero()[:, 0])
        counts = shots.counts(len(self.classes_))
        if not counts.all():
            name = self.classes_[int(counts.argmin())].item()
            raise ConfigError(f"the class {name!r} has no picture that counts: give one, or leave it out")
        alphas = self._alphas(validation is not None)
        heads, best, epochs = self._train(shots, validation, alphas, 1 if counts.max() == 1 else self.epochs)
        if not heads.isfinite().all():
            raise ConfigError(f"the head is not finite any more: lower lr ({self.lr})")
        self.alpha_, self.epochs_ = alphas[best], epochs
        self.head_ = heads[best].clone()

    def _alphas(self, chosen: bool) -> list[float]:
        """α, or those to choose from."""
        if self.alpha != "auto":
            return [float(self.alpha)]
        middle = ALPHA * math.sqrt(1000 / len(self.classes_))
        return [middle * factor for factor in (FACTORS if chosen else (1.0,))]

    @torch.no_grad()
    def _train(
        self, shots: Shots, held: Shots | None, alphas: Sequence[float], last: int
    ) -> tuple[Tensor, int, int]:
        """Heads (A, C, D_a) of A values of α, which is best, and after how many epochs.

        Args:
            shots: the examples.
            held: those that choose α and the epoch.
            alphas: (A,).
            last: of how many epochs the training ends where nothing chooses.
        """
        device, classes, count = self._device, len(self.classes_), len(shots)
        zero_shot, strength, auxiliary = self._inputs(shots.vectors.to(device), alphas)
        labels = shots.labels.to(device)
        targets = F.one_hot(labels, classes).to(auxiliary)[:, None]
        weights = shots.weights.to(auxiliary)
        generator = torch.Generator().manual_seed(self.seed)
        first = self._start(shots, generator).to(auxiliary)
        heads = first.repeat(len(alphas), 1)
        moments, taken = (torch.zeros_like(heads), torch.zeros_like(heads)), torch.zeros((), device=device)
        offsets = torch.randint(shots.vectors.shape[1], (count,), generator=generator)
        if held is not None:
            held_inputs = self._inputs(held.vectors[:, :1].to(device), alphas)
            right = torch.full((len(alphas),), -1, device=device)
            kept, when = heads.unflatten(0, (len(alphas), classes)).clone(), torch.zeros_like(right)
            last = self.epochs
        steps_an_epoch, number = -(-count // self.batch_size), 0
        of_batch = torch.arange(count, device=device) // self.batch_size
        sizes = of_batch.bincount()[of_batch]
        for epoch in range(last):
            order = torch.cat(list(rows_of_epoch(count, self.batch_size, self.seed, epoch, False)))
            # Each view is seen once in V epochs.
            view = ((offsets + epoch) % shots.vectors.shape[1])[order]
            shuffled = [tensor[order, view] for tensor in (zero_shot, strength, auxiliary)]
            shuffled += [targets[order], (weights[order] / sizes)[:, None, None]]
            parts = zip(*(tensor.split(self.batch_size) for tensor in shuffled), strict=True)
            for some_zero_shot, some_strength, some, some_targets, some_weights in parts:
                bias, inverse = standardize((some @ heads.mT).unflatten(1, (len(alphas), classes)))
                back = gradient(
                    bias, inverse, some_zero_shot, some_strength, some_targets, self.branch_weight
                )
                back.mul_(some_weights)
                rate = SCHEDULE.lr(self.lr, epoch, self.epochs, number, self.epochs * steps_an_epoch)
                _adamw(heads, back.flatten(1).mT @ some, moments, taken, rate)
                number += 1
            if held is not None:
                found = _right(heads, held_inputs, held.labels.to(device))
                better = found > right
                right, when = torch.where(better, found, right), torch.where(better, epoch, when)
                kept[better] = heads.unflatten(0, (len(alphas), classes))[better]
        if held is None:
            return heads.unflatten(0, (len(alphas), classes)), 0, last
        best = int(right.argmax())  # the first of equal ones
        return kept, best, int(when[best]) + 1

    def _inputs(self, vectors: Tensor, alphas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Of features (n, V, ·) f₀ (n, V, 1, C), ακ (n, V, A, 1) and unit a (n, V, D_a)."""
        z, a = self._split(vectors)
        zero_shot = self._zero_shot(z)[..., None, :]
        kappa = confidence(zero_shot, self.uncertainty, self.power)
        return zero_shot, kappa * kappa.new_tensor(list(alphas))[:, None], unit(a)

    def _start(self, shots: Shots, generator: torch.Generator) -> Tensor:
        """W at the start, (C, D_a)."""
        _, a = self._split(shots.vectors)
        classes, width = len(self.classes_), a.shape[-1]
        if self.init == "random":
            return (2 * torch.rand(classes, width, generator=generator) - 1) * width**-0.5
        return class_means(unit(a.mean(dim=1)), shots.labels, shots.weights, classes)

    def _check(self, shots: Shots) -> None:
        number = isinstance(self.alpha, (int, float)) and math.isfinite(self.alpha) and self.alpha >= 0
        if self.alpha != "auto" and not number:
            raise ConfigError(f"alpha must be a number from 0 on or 'auto', not {self.alpha!r}")
        if not 0 <= self.branch_weight <= 1:
            raise ConfigError(f"branch_weight is a share in [0, 1], not {self.branch_weight}")
        if self.init not in ("means", "random"):
            raise ConfigError(f"init must be 'means' or 'random', not {self.init!r}")
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ConfigError(
                "epochs and batch_size must be at least 1 and lr above 0, "
                f"not epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}"
            )
        if isinstance(self.auxiliary, str) and self.auxiliary not in ("patches", "own"):
            raise ConfigError(
                f"auxiliary must be 'patches', 'own', a Clip or a function, not {self.auxiliary!r}"
            )
        given, width = shots.vectors.shape[-1], self._model.width
        if given != width if self.auxiliary == "own" else given <= width:
            wanted = "CLIP's alone" if self.auxiliary == "own" else "CLIP's and the auxiliary's, side by side"
            raise EstimatorInputError(
                f"features must be {wanted}, CLIP's are {width} wide and {given} were given: "
                "give pictures, or auxiliary='own' for CLIP's features alone"
            )

    # --- disk ---

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        super()._restore(tensors)
        if self._auxiliary_name() != self.auxiliary_:
            raise CheckpointError("what was learned belongs to another auxiliary encoder than the one given")

    @classmethod
    def from_checkpoint(
        cls: type[U],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str] | ClassTexts,
        *,
        validation: tuple[Any, Any] | None = None,
        **settings: Any,
    ) -> U:
        """A head of the authors' code, `fc.weight` or the bare tensor (C, D_a).

        The file says neither α nor whether biases are standardized. With validation data, a few hundred
        pictures or features with labels that count the classes, both are what is most often right on them
        (`released_accuracies_` has all that was tried). Without, α must be given; biases are standardized.

        Args:
            path: the file, `best_adapter_16shots.pt`.
            clip: the Clip of that training.
            class_names: in the order of the head's rows.
            validation: see above.
            settings: of the estimator; `auxiliary` is what the head was trained on, `resnet50(…)` for the
                released ones. `uncertainty` is `none` unless it is given, as in the released commands.

        Raises:
            CheckpointError: if it holds something else, or a head of other classes or features.
            ConfigError: without validation data and α.
        """
        made = cls(clip, class_names, **{**RELEASE, "alpha": "auto", **settings})
        made.classes_, made.texts_ = made._settle(None, numbers=True)
        made.fitted_on_, made.auxiliary_ = "pictures", made._auxiliary_name()
        side = clip.preprocessing.image_size
        with torch.no_grad(), made._undisturbed():
            made.n_features_in_ = made._encode(torch.zeros(1, 3, side, side, device=made._device)).shape[1]
        width = made.n_features_in_ - (0 if made.auxiliary == "own" else clip.width)
        made.head_ = read_head(Path(path), len(made.classes_), width).to(made._device)
        made.standardized_ = True
        if made.alpha != "auto":
            made.alpha_ = float(made.alpha)
        elif validation is None:
            raise ConfigError(
                f"{path} does not say what alpha is: give alpha, or validation=(pictures, labels)"
            )
        else:
            made._choose(made._read_more(*validation))
        return made

    def _choose(self, held: Shots) -> None:
        self.released_accuracies_ = {}
        choices = [(form, alpha) for form in (True, False) for alpha in RELEASED_ALPHAS]
        for self.standardized_, self.alpha_ in choices:
            found = self.logits(held.vectors[:, 0]).argmax(dim=1).cpu() == held.labels
            name = f"{'standardized' if self.standardized_ else 'raw'} {self.alpha_:g}"
            self.released_accuracies_[name] = float(found.float().mean())
        accuracies = list(self.released_accuracies_.values())
        self.standardized_, self.alpha_ = choices[accuracies.index(max(accuracies))]


def _adamw(weights: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], taken: Tensor, lr: float) -> None:
    """A step of AdamW, in place; by torch's kernel alone: an optimizer's bookkeeping costs as much again."""
    taken.add_(1)
    torch._fused_adamw_(
        [weights],
        [grad],
        [moments[0]],
        [moments[1]],
        [],
        [taken],
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=SCHEDULE.weight_decay,
        eps=SCHEDULE.eps,
        amsgrad=False,
        maximize=False,
    )


def _right(heads: Tensor, inputs: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
    """How many of m examples each of A heads (A·C, D_a) has right, (A,) int64."""
    zero_shot, strength, auxiliary = (tensor[:, 0] for tensor in inputs)
    bias = standardize((auxiliary @ heads.mT).unflatten(1, (strength.shape[1], zero_shot.shape[-1])))[0]
    return (fuse(zero_shot, bias, strength).argmax(dim=-1) == labels[:, None]).sum(dim=0)


def class_means(vectors: Tensor, labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """The weighted mean of the vectors (n, D) of each class, (C, D), not made unit."""
    share = F.one_hot(labels, classes).to(vectors) * weights.to(vectors)[:, None]
    return share.mT @ vectors / share.sum(dim=0)[:, None]


def patch_features(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A tower's vectors (B, D), raw, and the mean (B, w) of its patch tokens after the last block.

    Raises:
        ConfigError: for a tower without tokens.
    """
    if not isinstance(tower, (VisionTower, ModifiedResNet)):
        raise ConfigError(f"{type(tower).__name__} shows no patch tokens: give an auxiliary, or 'own'")
    tokens = tower.run(tower.place(tower.read(pixels)))
    if isinstance(tower, ModifiedResNet):
        return tower.project(tokens), tokens.flatten(2).mean(dim=2)
    return tower.project(tokens), tokens[:, int(tower.config.class_token) :].mean(dim=1)


def _features(auxiliary: Callable[[Tensor], Tensor] | Clip, pixels: Tensor) -> Tensor:
    """What a second encoder makes of pixels (B, 3, H, W), bytes or floats in [0, 1]."""
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    if isinstance(auxiliary, Clip):
        pixels = fit(pixels, auxiliary.preprocessing.image_size)
        auxiliary = auxiliary.image
    if not isinstance(auxiliary, nn.Module):
        return auxiliary(pixels)
    with evaluating(auxiliary):
        features: Tensor = auxiliary(pixels)
    return features


def read_head(path: Path, classes: int, width: int) -> Tensor:
    """W (C, D_a) of a released file: a state dict with `fc.weight`, also one level down, or a bare tensor.

    Raises:
        CheckpointError: for other names, a bias, or another shape.
    """
    found = read_object(path)
    if isinstance(found, Mapping):
        inner = found.get("state_dict", found)
        if not isinstance(inner, Mapping) or set(inner) != {"fc.weight"}:
            names = ", ".join(map(str, inner)) if isinstance(inner, Mapping) else type(inner).__name__
            raise CheckpointError(f"{path}: a head is fc.weight and nothing else, and this file has {names}")
        found = inner["fc.weight"]
    if not isinstance(found, Tensor) or found.shape != (classes, width):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CheckpointError(
            f"{path}: a head of {classes} classes on {width} features is ({classes}, {width}), not {shape}"
        )
    if not found.isfinite().all():
        raise CheckpointError(f"{path}: the head holds values that are not finite")
    # A copy: the file is mapped, and may be written over.
    return found.detach().float().clone()
