"""PromptKD: unsupervised prompt distillation for vision-language models. Li et al., CVPR 2024.

A large CLIP, tuned with a few labels, teaches a small one to see, on pictures without labels. Its class
vectors T (C, D_t) of all names are computed once and kept; the small one's text tower is not used at all.

    student   f_s with b tokens before each of its first J blocks (`parts/prompts`)
              g: Linear(D_s, D_t) → BatchNorm → ReLU → Linear(D_t, D_t)
              û = g(f_s(x)), unit;   q = s_s·û Tᵀ
    teacher   p = s_t·f̂_t(x) Tᵀ, of the same view
    L = w·τ²·mean_b KL(softmax(p_b/τ) ‖ softmax(q_b/τ)),      w = λ/C

The authors divide the sum by B·C and give λ = 1000 (200 for Aircraft, Flowers and DTD), so that what a
picture counts depends on the number of classes; here w is the weight of a picture, and `normalize="numel"`
has theirs. g starts at random, the student at chance.

The teacher is any Clip, or any fitted estimator of this family whose class vectors are the same for every
picture; of an estimator p are its own logits. Theirs is `PromptSRC`, which this file has too, and is long for
that: independent prompts in both towers, with

    L = CE + 25·mean|t̂ − t̂₀| + 10·mean|f̂ − f̂₀| + mean_b KL(softmax(s·f̂₀ t̂₀ᵀ) ‖ softmax(s·f̂ t̂ᵀ))/C

against the frozen towers (t̂₀: the mean over many templates of raw features, then unit), and weights that are
a mean over the epochs n = 1 … E with weights ∝ N(n; 15, 1).

Deviations. Ours are w = 10, a gradient norm of at most 1 and fp32, as theirs is near divergence with few
classes, and a fixed set of `views` a picture, of which the teacher is asked once; as many views as epochs are
theirs, a new one each. Their epochs are chosen on test data; here the last is taken, or with `patience` the
one of the least KL on pictures held out. Where the two take pictures of different sizes, both see one view at
their own. t̂₀ has our list of ImageNet templates, which is longer than theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.core.images import fit as resized
from clipworks.data.captions import ClassTexts
from clipworks.data.templates import IMAGENET_TEMPLATES
from clipworks.encode.bulk import evaluating
from clipworks.errors import CheckpointError, ConfigError
from clipworks.evaluate.zeroshot import class_features
from clipworks.methods.adapt.base import BATCH, Adapter, ImageTower, TrainedAdapter, print_of
from clipworks.parts.dassl import DasslFile
from clipworks.parts.features import Views, content, pixels_of
from clipworks.parts.prompts import (
    context_bank,
    depth_in,
    prompted_images,
    random_prompts,
    read_text_prompts,
    read_vision_prompts,
    text_prompts,
    vision_tower,
)
from clipworks.parts.schedules import DASSL, Schedule
from clipworks.parts.shots import Shots, Step

K = TypeVar("K", bound="PromptKD")
P = TypeVar("P", bound="PromptSRC")
Normalize = Literal["picture", "numel"]


def distillation(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """τ²·KL(softmax(p/τ) ‖ softmax(q/τ)) of each picture, (B,) of logits (B, C) of teacher and student."""
    logs, others = ((logits / temperature).log_softmax(dim=1) for logits in (p, q))
    return temperature**2 * F.kl_div(others, logs, reduction="none", log_target=True).sum(dim=1)


def projector(width: int, teacher_width: int) -> nn.Sequential:
    """g, (n, D_s) to (n, D_t), at torch's own start."""
    return nn.Sequential(
        nn.Linear(width, teacher_width),
        nn.BatchNorm1d(teacher_width),
        nn.ReLU(),
        nn.Linear(teacher_width, teacher_width),
    )


def at_size(pixels: Tensor, clip: Clip) -> Tensor:
    """Square pixels (B, 3, n, n), bytes or floats in [0, 1], at the size that a Clip takes."""
    size = clip.preprocessing.image_size
    if pixels.shape[-1] == size:
        return pixels
    floats = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return resized(floats, size, "squash", interpolation=clip.preprocessing.interpolation)


# --- the teacher ---


class Teacher:
    """A Clip or a fitted estimator that is asked about some classes.

    Args:
        source: it.
        texts: C classes, in the order in which answers are wanted.

    Raises:
        ConfigError: if it is neither, does not know a class, or has no class vectors of its own.
    """

    def __init__(self, source: Any, texts: ClassTexts):
        if not isinstance(source, (Clip, Adapter)):
            raise ConfigError(
                f"a teacher is a Clip or a fitted estimator of this family, not {type(source).__name__}"
            )
        self.order = list(range(len(texts)))
        if isinstance(source, Adapter):
            source._check_fitted()
            if not set(texts.names) <= set(source.texts_.names):
                source = _for_classes(source, texts)
            self.order = [source.texts_.names.index(name) for name in texts.names]
        self.source, self.texts = source, texts
        self.clip: Clip = source if isinstance(source, Clip) else source._model

    def vectors(self) -> Tensor:
        """T, (C, D_t), unit length, without gradient."""
        with torch.no_grad():
            if isinstance(self.source, Clip):
                with evaluating(self.source):
                    return class_features(self.source, self.texts).detach()
            found = self.source.class_features()
        if found.ndim != 2:
            raise ConfigError(f"{type(self.source).__name__} has other class vectors for every picture")
        return found[self.order].float()

    @torch.no_grad()
    def logits(self, pixels: Tensor, vectors: Tensor) -> Tensor:
        """p (B, C) of pixels (B, 3, H, W), bytes or floats in [0, 1], in fp32; `vectors` is T."""
        pixels = at_size(pixels, self.clip)
        if isinstance(self.source, Clip):
            with evaluating(self.source):
                cosines = unit(self.source.image(pixels)) @ vectors.mT
                return math.exp(float(self.source.scale.detach())) * cosines
        with self.source._undisturbed():
            features = self.source._encode(pixels.to(self.source._device))
        return self.source.logits(features)[:, self.order].float()


def _for_classes(source: Adapter, texts: ClassTexts) -> Adapter:
    if not source.retargets:
        lacking = next(name for name in texts.names if name not in source.texts_.names)
        raise ConfigError(f"the teacher, a {type(source).__name__}, does not know the class {lacking!r}")
    return source.for_classes(texts)


@dataclass
class FixedViews(Shots):
    """Shots that show each picture in V views, one after the other, instead of in a new one each epoch."""

    def inputs(self, rows: Tensor, epoch: int) -> Tensor:
        """Pixels (b, 3, H, W) of view `epoch` modulo V."""
        return super().inputs(rows, epoch % len(self.views))


# --- the student ---


@dataclass(eq=False, repr=False, kw_only=True)
class PromptKD(TrainedAdapter):
    """A small image tower with prompts that says what a large CLIP says; `fit` takes pictures and no labels.

    After `fit`, `text_vectors_` are the teacher's T: what is saved classifies without the teacher, and
    `for_classes` needs it for new names only.

    Args:
        teacher: a Clip, or a fitted estimator such as `PromptSRC`; its own accuracy bounds what is learned.
        vision_length: b.
        depth: J, at most the tower's blocks.
        kd_weight: w, or with `normalize="numel"` λ.
        temperature: τ.
        normalize: divide the loss by the number of pictures, or by that of pictures times classes.
        views: how many views of a picture there are; at least `epochs`: a new one each.
    """

    teacher: Any = None
    vision_length: int = 4
    depth: int = 9
    kd_weight: float = 10.0
    temperature: float = 1.0
    normalize: Normalize = "picture"
    lr: float = 0.005
    epochs: int = 20
    batch_size: int = 8
    views: int = 4
    crop: tuple[float, float] = (0.08, 1.0)

    image_tower: ClassVar[ImageTower] = "trained"
    labels_needed: ClassVar[bool | None] = False
    every_class: ClassVar[bool] = False
    retargets: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ("clip", "store", "teacher")
    only_to_fit: ClassVar[tuple[str, ...]] = ("teacher",)
    schedule: ClassVar[Schedule] = replace(DASSL, clip_norm=1.0)

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        if self.normalize not in get_args(Normalize):
            known = ", ".join(get_args(Normalize))
            raise ConfigError(f"normalize must be one of {known}, not {self.normalize!r}")
        if not (self.temperature > 0 and self.kd_weight > 0):
            raise ConfigError(
                f"temperature and kd_weight must be above 0, not {self.temperature} and {self.kd_weight}"
            )
        if min(len(shots), self.batch_size) < 2:
            raise ConfigError("batch normalization needs two pictures and a batch_size of at least 2")
        self.text_vectors_ = self._teacher.vectors().to(self._device)
        self.teacher_print_ = print_of(self.teacher)
        shots = FixedViews(**{item.name: getattr(shots, item.name) for item in fields(Shots)})
        super()._fit(shots, validation)
        self.module_.eval()

    def _prepare(self, shots: Shots | None) -> nn.Module:
        tower = vision_tower(self._model)
        prompts = random_prompts(
            depth_in(tower, self.depth, self.vision_length), self.vision_length, tower.width
        )
        g = projector(self._model.width, self.text_vectors_.shape[1])
        return nn.ModuleDict({"vision": prompts, "projector": g}).eval()

    @property
    def _teacher(self) -> Teacher:
        found: Teacher = self._once("teacher", lambda: Teacher(self.teacher, self.texts_))
        return found

    def _encode(self, pixels: Tensor) -> Tensor:
        self.module_.train(self._learning)
        pixels = at_size(pixels, self._model)
        features = prompted_images(vision_tower(self._model), pixels, list(self.module_["vision"]))
        projected: Tensor = self.module_["projector"](features.float())
        return projected

    def _class_features(self) -> Tensor:
        return self.text_vectors_

    def _loss(self, step: Step) -> Tensor:
        p, q = self._said(step), self._logits(self._encode(step.inputs)).float()
        loss = self.kd_weight * (step.weights * distillation(p, q, self.temperature)).mean()
        return loss / q.shape[1] if self.normalize == "numel" else loss

    def _said(self, step: Step) -> Tensor:
        """p (b, C) of a step; of a view that comes again the teacher is asked once."""
        views, shots = len(step.shots.views), step.shots
        if views >= self.epochs:
            return self._teacher.logits(step.inputs, self.text_vectors_)
        table: Tensor = self._once(
            "table", lambda: torch.full((len(shots), views, len(self.texts_)), float("nan"))
        )
        view = step.epoch % views
        new = table[step.rows, view, 0].isnan()
        if new.any():
            asked = self._teacher.logits(step.inputs[new.to(step.inputs.device)], self.text_vectors_)
            table[step.rows[new], view] = asked.cpu()
        return table[step.rows, view].to(step.inputs.device)

    @torch.no_grad()
    def _accuracy(self, shots: Shots) -> float:
        """exp(−KL) on plain views: what `patience` goes by, as there are no labels."""
        teacher, kept = self._teacher, self._cache
        self.__dict__["_kept"] = {}
        total = 0.0
        for rows in torch.arange(len(shots)).split(256):
            pixels = shots.plain(rows).to(self._device)
            q = self._logits(self._encode(pixels)).float()
            total += float(distillation(teacher.logits(pixels, self.text_vectors_), q).sum())
        self.__dict__["_kept"] = kept
        return math.exp(-total / len(shots))

    def _from_pictures(self, images: list[Any], labels: Tensor, weights: Tensor, views: Views) -> Shots:
        # At the larger of both sizes: a teacher that sees more is not asked about a small picture.
        own, other = self._model.preprocessing, self._teacher.clip.preprocessing
        largest = replace(own, image_size=max(own.image_size, other.image_size))
        pixels = torch.cat(list(pixels_of(images, largest, BATCH)))
        return Shots(labels, weights, pixels=pixels, keys=[content(one).hex() for one in images], views=views)

    def _read_more(self, X: Any, y: Any) -> Shots:
        if y is not None:
            raise ConfigError(
                f"{type(self).__name__} learns without labels: give validation=(pictures, None)"
            )
        given = self._several(X)
        labels = torch.zeros(len(given), dtype=torch.int64)
        return self._from_pictures(given, labels, torch.ones(len(given)), Views())

    def for_classes(self: K, class_names: Sequence[str] | ClassTexts) -> K:
        """The fitted student for other names: rows of T, or of a new T where the teacher has to be asked.

        Raises:
            ConfigError: for a new name if there is no teacher, or it is another one than that of the fit.
        """
        twin = super().for_classes(class_names)
        names = list(self.texts_.names)
        if set(twin.texts_.names) <= set(names):
            twin.text_vectors_ = self.text_vectors_[[names.index(name) for name in twin.texts_.names]]
            return twin
        new = next(name for name in twin.texts_.names if name not in names)
        if self.teacher is None:
            raise ConfigError(
                f"{new!r} is a new class, and only the teacher can say what it is like: give it"
            )
        if print_of(self.teacher) != self.teacher_print_:
            raise ConfigError(f"the teacher has changed since the fit; its vector of {new!r} would not fit")
        twin.text_vectors_ = Teacher(self.teacher, twin.texts_).vectors().to(self._device)
        return twin

    @classmethod
    def from_checkpoint(
        cls: type[K],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str] | ClassTexts,
        teacher: Clip | Adapter,
    ) -> K:
        """A student that the authors released, `VLPromptLearner/…`.

        Args:
            path: its file; class vectors are not in it.
            clip: the student's.
            class_names: all of the data set.
            teacher: the one it was taught by, with its weights: `PromptSRC.from_checkpoint`.

        Raises:
            CheckpointError: if it is no such file, or does not fit student and teacher.
        """
        file = DasslFile(path)
        prompts = read_vision_prompts(file, vision_tower(clip).width)
        made = cls(clip, class_names, teacher=teacher, vision_length=len(prompts[0]), depth=len(prompts))
        _, texts = made._settle(None)
        made.text_vectors_ = Teacher(teacher, texts).vectors().to(clip.device)
        made.teacher_print_ = print_of(teacher)
        width, inner = made.text_vectors_.shape[1], "VPT_image_trans.conv1."
        learned = {f"vision.{i}": prompt for i, prompt in enumerate(prompts)}
        for layer, last in (("0", clip.width), ("3", width)):  # 1 × 1 convolutions
            learned[f"projector.{layer}.weight"] = file.take(f"{inner}{layer}.weight", width, last, 1, 1)[
                ..., 0, 0
            ]
            learned[f"projector.{layer}.bias"] = file.take(f"{inner}{layer}.bias", width)
        for name in ("weight", "bias", "running_mean", "running_var"):
            learned[f"projector.1.{name}"] = file.take(f"{inner}1.{name}", width)
        learned["projector.1.num_batches_tracked"] = file.take(f"{inner}1.num_batches_tracked").long()
        leave_out(file)
        file.finish(clip)
        return made._learned_elsewhere(learned)


def leave_out(file: DasslFile) -> None:
    """What their code saves beside: embeddings of the training classes, and second frozen towers."""
    for name in list(file.weights):
        if name.startswith(("prompt_learner.token_", "prompt_learner.ZS_image_encoder.")):
            file.drop(name)


# --- the authors' teacher ---


class EpochAverage:
    """The mean of states after epochs n = 1 … E with weights ∝ N(n; mean, deviation), which sum to 1."""

    def __init__(self, epochs: int, mean: float, deviation: float):
        heights = [math.exp(-0.5 * ((n - mean) / deviation) ** 2) for n in range(1, epochs + 1)]
        if not sum(heights):
            raise ConfigError(f"no epoch of {epochs} is near {mean}, where the average of weights is taken")
        self.weights = [height / sum(heights) for height in heights]
        self.state: dict[str, Tensor] = {}
        self.done = 0

    def add(self, module: nn.Module) -> None:
        """The state after one more epoch."""
        weight = self.weights[self.done]
        for name, tensor in module.state_dict().items():
            part = weight * tensor.detach()
            self.state[name] = self.state[name] + part if name in self.state else part
        self.done += 1


@dataclass(eq=False, repr=False, kw_only=True)
class PromptSRC(TrainedAdapter):
    """Prompts in both towers held near the frozen ones: the teacher. Khattak et al., ICCV 2023.

    Args:
        length, depth: tokens, and blocks that have them, in both towers.
        context: the words from which the text's first prompts start, at least `length`.
        text_weight, image_weight: of the L1 terms.
        average_at, average_over: mean and deviation, in epochs, of the weights' average.
    """

    length: int = 4
    depth: int = 9
    context: str = "a photo of a"
    text_weight: float = 25.0
    image_weight: float = 10.0
    average_at: float = 15.0
    average_over: float = 1.0
    lr: float = 0.0025
    epochs: int = 20
    batch_size: int = 4
    views: int = 1
    crop: tuple[float, float] = (0.08, 1.0)

    slug: ClassVar[str] = "promptsrc"
    image_tower: ClassVar[ImageTower] = "trained"
    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        clip, tower = self._model, vision_tower(self._model)
        text = text_prompts(clip, self.depth, self.length, self.context)
        vision = random_prompts(depth_in(tower, self.depth, self.length), self.length, tower.width)
        return nn.ModuleDict({"text": text, "vision": vision})

    def _encode(self, pixels: Tensor) -> Tensor:
        return prompted_images(vision_tower(self._model), pixels, list(self.module_["vision"]))

    def _class_features(self) -> Tensor:
        first, *deep = self.module_["text"]
        bank = self._once(
            "bank", lambda: context_bank(self._model, self.texts_.names, self.length, self.context)
        )
        return unit(bank(first, deep))

    @torch.no_grad()
    def _anchors(self) -> Tensor:
        """t̂₀, (C, D)."""
        clip, names = self._model, self.texts_.names
        sums = []
        for name in names:
            tokens = clip.tokenizer([template.replace("{}", name) for template in IMAGENET_TEMPLATES])  # type: ignore[misc]
            sums.append(clip.text(tokens.cut().to(clip.device)).mean(dim=0))
        return unit(torch.stack(sums))

    def _loss(self, step: Step) -> Tensor:
        average: EpochAverage | None = self._cache.get("average")
        if average is not None and step.epoch > average.done:
            average.add(self.module_)
        t0 = self._once("anchors", self._anchors)
        with torch.no_grad():
            f0 = unit(self._model.image(step.inputs))
        f, t = unit(self._encode(step.inputs)), self.class_features()
        q = self.scale * f @ t.mT
        entropy = F.cross_entropy(q, step.labels, reduction="none")
        kept = distillation(self.scale * f0 @ t0.mT, q) / q.shape[1]
        near = self.image_weight * (f - f0).abs().mean(dim=1)
        picture = (step.weights * (entropy + near + kept)).mean()
        return picture + self.text_weight * (t - t0).abs().mean()

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        average = EpochAverage(self.epochs, self.average_at, self.average_over)
        self._cache["average"] = average
        super()._fit(shots, validation)
        if self.patience is None:
            average.add(self.module_)
            self.module_.load_state_dict(average.state)

    @classmethod
    def from_checkpoint(
        cls: type[P], path: str | PathLike[str], clip: Clip, class_names: Sequence[str] | ClassTexts
    ) -> P:
        """A teacher that PromptKD's authors released, `<Set>/VLPromptLearner/model-best.pth.tar`.

        The depth is that of the file.

        Raises:
            CheckpointError: if it is no such file, or was trained on another Clip.
        """
        file = DasslFile(path)
        text = read_text_prompts(file, clip.config.text.width)
        vision = read_vision_prompts(file, vision_tower(clip).width)
        if len(vision) != len(text) or len(vision[0]) != len(text[0]):
            raise CheckpointError(
                f"{path}: has {len(text)} text prompts of {len(text[0])} tokens and {len(vision)} image "
                f"prompts of {len(vision[0])}; a teacher has as many in both towers"
            )
        leave_out(file)
        file.finish(clip)
        made = cls(clip, class_names, length=len(text[0]), depth=len(text))
        learned = {f"text.{i}": prompt for i, prompt in enumerate(text)}
        return made._learned_elsewhere(learned | {f"vision.{i}": prompt for i, prompt in enumerate(vision)})
