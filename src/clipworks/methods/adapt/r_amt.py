"""R-AMT: regularized mask tuning, which weights to switch off. Zheng et al., ICCV 2023.

No weight changes. Every weight W of the image tower's attention (and of its patch convolution) has a score m,
and b = 1 where m > t, else 0; the tower runs with W ⊙ b. All scores begin at 0.01, t = 0.005: every mask at
first is 1, and the tower CLIP's own. Backward, straight through, to masked entries too:

    ∂L/∂m := ∂L/∂b = ∂L/∂(W ⊙ b) ⊙ W

    L_a = CE + 1e-4·Σ_tensors ‖m‖₂
    L_b = −Σ_c softmax(p/τ)_c · log softmax(q/τ)_c · τ²,    p the original tower's logits, q the masked one's

Gradient dropout. With the gradients g_a and g_b of both on m, and U uniform on [0, 1) for each entry,

    P = ½·(1 + sign(g_a)·(g_a + g_b)/(|g_a| + |g_b| + 1e-8))
    applied = ((1 − λ) + λ·1[P > U])·g_a

so a score follows its task where that agrees with staying like CLIP, and else by chance, as often as its
share says. g_b itself is never applied. λ = 0 is AMT, without dropout. What is deployed is the bits:
W ← W ⊙ b, once.

Adam moves a score by at most about lr a step. Its reach R = Σ lr/(0.01 − t) says how far all steps lead:
below 1 no score that is pulled evenly gets to t. If Σ lr·B_t < 0.01 − t, with B_t the most that Adam's step t
can be in units of lr (Cauchy–Schwarz), none does whatever its gradients are.

The paper's recipe is λ = 0.3 with 16 shots and 1 with fewer, and on ImageNet, SUN397 and Food101.

Deviations. The authors' τ is 1, and here it is fixed. Their uniform start of the scores is left out.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints.layouts import rules
from clipworks.core.clip import Clip
from clipworks.core.resnet import ModifiedResNet
from clipworks.core.towers import VisionTower
from clipworks.core.variant import variant
from clipworks.data.captions import ClassTexts
from clipworks.errors import CheckpointError, ConfigError, nearest
from clipworks.methods.adapt.base import Adapter, ImageTower, TrainedAdapter
from clipworks.parts.schedules import Schedule, steps_of_epoch
from clipworks.parts.shots import Shots, Step

R = TypeVar("R", bound="RAMT")
Where = Literal["attention", "attention+mlp"]

EPSILON = 1e-8  # of P
NUMBER = re.compile(r"\.(in_proj_)?weight$")


def maskable(tower: nn.Module, where: Where = "attention", patch_embedding: bool = True) -> list[str]:
    """Names of the weights of an image tower that get a mask.

    Of a ViT the query-key-value and the output weight of every block, its MLP's on demand, and the patch
    convolution; of a ResNet all convolutions and the attention pool.

    Raises:
        ConfigError: for a tower that is neither.
    """
    if where not in get_args(Where):
        raise ConfigError(f"where must be one of {', '.join(get_args(Where))}, not {where!r}")
    if isinstance(tower, ModifiedResNet):
        names = [name for name, module in tower.named_modules() if isinstance(module, nn.Conv2d)]
        return [f"{name}.weight" for name in [*names, "pool.qkv", "pool.out"]]
    if not isinstance(tower, VisionTower):
        raise ConfigError(f"masks need an image tower of ours, not a {type(tower).__name__}")
    parts = ["attention.qkv", "attention.out"] + ["mlp.fc", "mlp.proj"] * (where == "attention+mlp")
    names = [
        f"patches.{name}".rstrip(".")
        for name, module in tower.patches.named_modules()
        if isinstance(module, nn.Conv2d) and patch_embedding
    ]
    names += [f"blocks.{i}.{part}" for i in range(len(tower.blocks)) for part in parts]
    return [f"{name}.weight" for name in names]


def keep_probability(g_a: Tensor, g_b: Tensor) -> Tensor:
    """P of two gradients of any shape: 1 where they agree, |g_a|/(|g_a| + |g_b|) where they oppose."""
    return 0.5 * (1 + g_a.sign() * (g_a + g_b) / (g_a.abs() + g_b.abs() + EPSILON))


def dropped(g_a: Tensor, g_b: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """g_a, of any shape, with gradient dropout by g_b: where it is dropped, 1 − λ of it is left."""
    uniform = torch.rand(g_a.shape, generator=generator, device=g_a.device)
    return torch.where(keep_probability(g_a, g_b) > uniform, g_a, (1 - drop) * g_a)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """L_b of each picture (B,), from logits (B, C)."""
    p = (teacher / temperature).softmax(dim=1)
    return -(p * (student / temperature).log_softmax(dim=1)).sum(dim=1) * temperature**2


def largest_steps(count: int) -> Tensor:
    """B_t of steps t = 1 … n = count, (n,) fp64: the most that Adam (0.9, 0.999) moves in units of lr."""
    t = torch.arange(1, count + 1, dtype=torch.float64)
    ratio = 0.81 / 0.999
    powers = (1 - ratio**t) / (1 - ratio)
    return 0.1 * (powers / 0.001).sqrt() * (1 - 0.999**t).sqrt() / (1 - 0.9**t)


class Scores(nn.Module):
    """m of each masked weight, fp32.

    Args:
        weights: W by name.
        init: what every score begins with.
        threshold: t.
    """

    def __init__(self, weights: Mapping[str, Tensor], init: float, threshold: float):
        super().__init__()
        self.names = list(weights)
        self.threshold = threshold
        self.values = nn.ParameterList(
            [nn.Parameter(torch.full(weight.shape, init, dtype=torch.float32)) for weight in weights.values()]
        )

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """b by name, bool, of any shape."""
        return {name: m > self.threshold for name, m in zip(self.names, self.values, strict=True)}


@dataclass(eq=False, repr=False, kw_only=True)
class RAMT(TrainedAdapter):
    """A tower of which single weights are switched off.

    After `fit`, `masks_` has the bits by the names of the image tower's weights, `masked_share_` and
    `masked_by_tensor_` say how many are 0, and `reach_` is R.

    Args:
        where: which weights of a ViT's blocks are masked; a ResNet has all convolutions and its pool masked.
        patch_embedding: mask the patch convolution too, as the paper's code does.
        threshold: t.
        init: what all scores begin with.
        penalty: weight of the scores' norms.
        drop: λ.
        text: another fitted estimator of the family over the same Clip, whose class vectors replace the
            zero-shot ones.
    """

    where: Where = "attention"
    patch_embedding: bool = True
    threshold: float = 5e-3
    init: float = 1e-2
    penalty: float = 1e-4
    drop: float = 1.0
    text: Adapter | None = None
    views: int = 1
    crop: tuple[float, float] = (0.5, 1.0)
    lr: float = 8e-5
    epochs: int = 30

    image_tower: ClassVar[ImageTower] = "trained"
    retargets: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ("clip", "store", "text")
    schedule: ClassVar[Schedule] = Schedule("adam", weight_decay=0.0, decay="epoch", drop_last=True)

    # --- learning ---

    def _weights(self) -> dict[str, Tensor]:
        """W by name, without gradient."""
        tower = self._model.image
        names = maskable(tower, self.where, self.patch_embedding)
        return {name: tower.get_parameter(name).detach() for name in names}

    def _prepare(self, shots: Shots | None) -> nn.Module:
        if not 0 <= self.drop <= 1:
            raise ConfigError(f"drop is a share in [0, 1], not {self.drop}")
        if not self.threshold < self.init:
            raise ConfigError(f"init ({self.init}) must be above the threshold ({self.threshold})")
        if shots is not None:
            self._check_reach(shots)
        return Scores(self._weights(), self.init, self.threshold)

    def _check_reach(self, shots: Shots) -> None:
        """Set `reach_`, and see that a mask can flip."""
        steps = steps_of_epoch(len(shots), self.batch_size, self.schedule.drop_last)
        rates = torch.tensor(
            [
                self.schedule.lr(self.lr, epoch, self.epochs, epoch * steps, self.epochs * steps)
                for epoch in range(self.epochs)
                for _ in range(steps)
            ],
            dtype=torch.float64,
        )
        distance = self.init - self.threshold
        self.reach_ = float(rates.sum()) / distance
        words = f"{len(rates)} steps of at most lr={self.lr:g} have a reach of {self.reach_:.2g}"
        if float((rates * largest_steps(len(rates))).sum()) < distance:
            raise ConfigError(
                f"{words}: no score can get to the threshold; more epochs or a smaller batch_size"
            )
        if self.reach_ < 1:
            warnings.warn(f"{words}: below 1 hardly a mask will change", stacklevel=2)

    def _backward(self, step: Step) -> Tensor:
        scores: Scores = self.module_
        weights, masks = self._once("weights", self._weights), scores.masks()
        leaves = {name: (W * masks[name]).requires_grad_() for name, W in weights.items()}
        student = self._logits(variant(self._model.image, leaves)(step.inputs)).float()
        teacher = self._logits(self._teacher(step)).float()
        task = (F.cross_entropy(student, step.labels, reduction="none") * step.weights).mean()
        likeness = (distillation(student, teacher) * step.weights).mean()
        of_task = torch.autograd.grad(task, list(leaves.values()), retain_graph=True)
        of_likeness = torch.autograd.grad(likeness, list(leaves.values()))
        norms = torch.zeros((), device=task.device)
        with torch.no_grad():
            for W, m, g_task, g_b in zip(weights.values(), scores.values, of_task, of_likeness, strict=True):
                norm = m.norm()
                norms += norm
                g_a = g_task.float() * W.float() + self.penalty * m / norm.clamp_min(1e-12)
                m.grad = self._applied(g_a, g_b.float() * W.float())
        return task.detach() + self.penalty * norms

    def _applied(self, g_a: Tensor, g_b: Tensor) -> Tensor:
        """What the optimizer is given of both gradients, all of one shape."""
        generator = self._once("dropout", lambda: torch.Generator(self._device).manual_seed(self.seed))
        return dropped(g_a, g_b, self.drop, generator)

    @torch.no_grad()
    def _teacher(self, step: Step) -> Tensor:
        """Features (b, D) of the original tower; those of plain pictures are computed once."""
        if step.shots.views.count:
            return super()._encode(step.inputs)
        known: dict[int, Tensor] = self._once("teacher", dict)
        new = [i for i, row in enumerate(step.rows.tolist()) if row not in known]
        if new:
            features = super()._encode(step.inputs[new])
            known.update(zip(step.rows[new].tolist(), features, strict=True))
        return torch.stack([known[row] for row in step.rows.tolist()])

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        super()._fit(shots, validation)
        self.masks_ = self.module_.masks()
        del self.module_  # what is left of the scores is one bit each

    # --- the masked tower ---

    def masked_tower(self) -> nn.Module:
        """The image tower with W ⊙ b; everything else it shares with the Clip's."""
        masks = vars(self).get("masks_")
        masks = self.module_.masks() if masks is None else masks
        return variant(self._model.image, {name: W * masks[name] for name, W in self._weights().items()})

    def _encode(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._once("tower", self.masked_tower)(pixels)
        return features

    def _class_features(self) -> Tensor:
        if self.text is None:
            return super()._class_features()
        text, names = self.text, list(self.texts_.names)
        vectors: Tensor = self._once(
            "stacked",
            lambda: (text if list(text.texts_.names) == names else text.for_classes(names)).class_features(),
        )
        return vectors

    @property
    def trainable_parameters(self) -> int:
        """How many scores were fitted."""
        self._check_fitted()
        return sum(mask.numel() for mask in self.masks_.values())

    @property
    def masked_by_tensor_(self) -> dict[str, float]:
        """The share of zeros of each mask, by the weight's name."""
        self._check_fitted()
        return {name: 1 - float(mask.float().mean()) for name, mask in self.masks_.items()}

    @property
    def masked_share_(self) -> float:
        """The share of zeros of all masks."""
        zeros = sum(int((~mask).sum()) for mask in self.masks_.values())
        return zeros / self.trainable_parameters

    # --- disk ---

    def _learned(self) -> dict[str, Tensor]:
        if "masks_" not in vars(self):
            return super()._learned()
        return {f"masks_.{name}": torch.from_numpy(pack(mask)) for name, mask in self.masks_.items()}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        if "module_" in vars(self):
            super()._restore(tensors)
            return
        packed = {name.removeprefix("masks_."): bits.numpy().tobytes() for name, bits in tensors.items()}
        self._take(packed, "what was learned")

    def _take(self, packed: Mapping[str, bytes], source: str) -> None:
        """Set the masks from bits by name."""
        weights = self._weights()
        if packed.keys() != weights.keys():
            odd = min(packed.keys() ^ weights.keys())
            raise CheckpointError(f"{source}: has other masks than this tower takes, {odd} for one")
        self.masks_ = {
            name: unpack(packed[name], W.shape, f"{source}: the mask of {name}").to(self._device)
            for name, W in weights.items()
        }

    @classmethod
    def from_checkpoint(
        cls: type[R],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str] | ClassTexts,
        **settings: Any,
    ) -> R:
        """Read a file of the authors' code, `shared/model.pth.tar-30`; `where` is settled by what it masks.

        Args:
            path: the file.
            clip: the Clip whose weights it masks; which one is not in the file.
            class_names: any, since the bits hold no classes.
            settings: further ones.

        Raises:
            CheckpointError: if it holds something else, or masks of another tower.
        """
        found = published_bits(Path(path))
        for where in get_args(Where):
            estimator = cls(clip, class_names, **{**settings, "where": where})
            theirs = published_names(clip, estimator._weights())
            if set(theirs) == set(found):
                break
        else:
            odd = next((key for key in found if key not in theirs), None)
            said = (
                f"{min(set(theirs) - set(found))} is missing"
                if odd is None
                else f"{odd}{nearest(odd, theirs)}"
            )
            raise CheckpointError(f"{path}: does not fit the tower of {clip.config.name!r}: {said}")
        estimator.classes_, estimator.texts_ = estimator._settle(None)
        estimator.fitted_on_, estimator.n_features_in_ = "pictures", clip.width
        parts: dict[str, list[Tensor]] = {}
        for key, (ours, shape) in theirs.items():
            parts.setdefault(ours, []).append(unpack(found[key], shape, f"{path}: {key}"))
        estimator.masks_ = {name: torch.cat(part).to(estimator._device) for name, part in parts.items()}
        return estimator


def pack(mask: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A mask of any shape as ⌈n/8⌉ bytes: row by row, most significant bit first, zeros at the end."""
    return np.packbits(mask.cpu().numpy().reshape(-1))


def unpack(bits: bytes, shape: Sequence[int], source: str) -> Tensor:
    """The inverse of `pack`: a mask of any shape, bool.

    Raises:
        CheckpointError: if it is no string of bytes of the length that belongs to the shape.
    """
    count = math.prod(shape)
    if not isinstance(bits, bytes) or len(bits) != -(-count // 8):
        held = f"{len(bits)} bytes" if isinstance(bits, bytes) else type(bits).__name__
        raise CheckpointError(f"{source}: {held}, and {-(-count // 8)} bytes belong to {tuple(shape)}")
    flat = np.unpackbits(np.frombuffer(bits, np.uint8))[:count]
    return torch.from_numpy(flat.astype(bool).reshape(tuple(shape)))


def published_names(clip: Clip, names: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The authors' names of masks of some weights, each with the name of ours and the shape; in order.

    Query, key and value of a ResNet's pool, one weight here, are three there.
    """
    wanted = {f"image.{name}": tuple(clip.image.get_parameter(name).shape) for name in names}
    found = {}
    for one in rules("openai", clip.config):
        if one.ours not in wanted:
            continue
        rows, *others = wanted[one.ours]
        for theirs in one.theirs:
            key = NUMBER.sub(".mask_real", theirs.removeprefix("visual."))
            found[key] = (one.ours.removeprefix("image."), (rows // len(one.theirs), *others))
    return found


def published_bits(path: Path) -> dict[str, bytes]:
    """The `state_dict` of a checkpoint of the authors' code; nothing in it is run."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    bits = held.get("state_dict") if isinstance(held, Mapping) else None
    if not isinstance(bits, Mapping) or not bits:
        raise CheckpointError(f"{path}: has no state_dict with masks")
    return dict(bits)
