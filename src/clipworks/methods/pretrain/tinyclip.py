"""TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance. Wu et al., ICCV 2023.

A small CLIP starts from a piece of its teacher's own weights and learns the teacher's similarities between
the pictures and the texts of a batch.

Affinity mimicking. Unit vectors I, T of the student and I*, T* of the teacher, s = 50 for both:

    S = s I T^T,  A = s I* T*^T
    L_soft = 1/2 mean_i CE(softmax(A_i.), softmax(S_i.)) + 1/2 mean_j CE(softmax(A_.j), softmax(S_.j))
    L      = alpha L_soft + (1 - alpha) L_CLIP,      alpha = 1 in the published runs

Weight inheritance. Manual: every k-th block and the first channels, heads and units (`inherit`). Automatic:
masks z on the residual channels of a tower, on heads and on MLP units, drawn from hard concrete distributions
and learned together with the weights under a budget (`InheritanceMasks`):

    z = clip(1.2 sigmoid((logit u + log a) 3/2) - 0.1, 0, 1),   p = P(z > 0) = sigmoid(log a + 1.5986)
    penalty = l1 max(0, s* - s) + l2 max(0, s* - s)^2,  s the expected sparsity, l1 and l2 maximized.

`finish` folds the masks into a smaller plain Clip. Stages are a list of objectives for `fit`, each beginning
with what the one before it left:

    fit(inherit(teacher, (12, 512), (9, 512)), AffinityMimicking(teacher), ...)                one by hand
    fit(copy.deepcopy(teacher), automatic_stages(teacher, (0.25, 0.5), full=teacher.config), ...)     four

Deviations, on purpose: the fold is exact (the published one also scales the projections and loses the bias of
attentions without heads), and a later stage has masks of the folded model's size. The file is long because
the paper has three parts that are used one without the other: the loss, two ways of inheriting, and files of
models that no other tool's layout describes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clipworks.checkpoints import files, layouts, own, rules, vocabulary
from clipworks.checkpoints.geometry import geometry
from clipworks.checkpoints.settings import Settings
from clipworks.core.clip import Clip, unit
from clipworks.core.config import (
    CLIP_MEAN,
    CLIP_STD,
    BlockConfig,
    Config,
    ResNetConfig,
    TextConfig,
    VisionConfig,
)
from clipworks.core.images import fit as fit_pixels
from clipworks.core.tokenizer import Tokenizer
from clipworks.data.batch import Batch
from clipworks.encode.packed import text_vectors
from clipworks.engine.recipe import Recipe
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.pretrain.base import Objective, pairs
from clipworks.parts.contrastive import contrastive_loss
from clipworks.parts.pruning import TOWERS, Gates, check_gateable, cut, gated

# The scripts: 1,024 pairs on each of eight or 32 devices.
RECIPE = Recipe(
    epochs=6, lr=1e-4, warmup=2000, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, clip_gradient=5.0
)
MASK_RECIPE = replace(RECIPE, epochs=None, steps=3000, warmup=3000)  # 5,000 and 8,000 in the later stages
FOLDED_RECIPE = replace(RECIPE, warmup=0)  # after the masks: fresh AdamW, no warm-up


# ----------------------------------------------------------------------------------- affinity mimicking


class AffinityMimicking(Objective):
    """The teacher's similarities in the batch, in place of which picture belongs to which text.

    Args:
        teacher: a frozen Clip that is run beside the student, on the same pictures and token ids; None if the
            batch brings its vectors as features `teacher_image` and `teacher_text` (see
            `parts.teacher.TeacherTable`).
        scale: s of student and teacher; the student's scale is set to its logarithm and frozen.
        alpha: share of the mimicking loss; the rest is CLIP's own.
        source: which texts of the batch.
        begin: what the student becomes before it is trained, for instance `InheritanceMasks.finish` of the
            stage before or `functools.partial(inherit, image=(6, 256), text=(3, 256))`.
    """

    def __init__(
        self,
        teacher: Clip | None = None,
        *,
        scale: float = 50.0,
        alpha: float = 1.0,
        source: str = "alt",
        begin: Callable[[Clip], Clip] | None = None,
    ):
        super().__init__()
        if not 0 <= alpha <= 1 or scale <= 0:
            raise ConfigError(f"alpha {alpha} must lie in [0, 1] and scale {scale} above 0")
        # In a tuple it is no part of the module: neither trained, saved nor synchronized with it.
        self._teacher: tuple[Clip, ...] = () if teacher is None else (teacher.eval(),)
        self._begin = begin
        self.scale = scale
        self.alpha = alpha
        self.source = source

    def prepare(self, clip: Clip) -> Clip:
        """The student, with its scale fixed.

        Raises:
            ConfigError: if it is the teacher itself, reads other token ids, or is of the sigmoid form.
        """
        clip = clip if self._begin is None else self._begin(clip)
        if clip.bias is not None:
            raise ConfigError("affinity mimicking is of the softmax form; this student has a bias")
        for teacher in self._teacher:
            if teacher is clip:
                raise ConfigError("the student is the teacher itself: train a copy (copy.deepcopy)")
            words = [each.tokenizer.fingerprint() for each in (clip, teacher) if each.tokenizer is not None]
            if len(set(words)) > 1:
                raise ConfigError(
                    "student and teacher have different tokenizers: give the teacher's vectors (TeacherTable)"
                )
        with torch.no_grad():
            clip.scale.fill_(math.log(self.scale))
        clip.scale.requires_grad_(False)
        return clip

    def groups(self, clip: Clip) -> list[dict[str, Any]]:
        """As published: whatever has two or more axes decays, tables of positions too."""
        trained = [parameter for parameter in clip.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() >= 2]},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image`, `text` (B, D) of the student, `teacher_image`, `teacher_text` (B, D*), unit length."""
        rows = pairs(clip, batch, self.source)
        if self._teacher:
            image, text = self._mimicked(batch)
        else:
            missing = {"teacher_image", "teacher_text"} - batch.features.keys()
            if missing:
                raise DataError(
                    f"the batch has no feature {min(missing)!r}: give AffinityMimicking a teacher, or its "
                    "vectors to the loader (transform=parts.teacher.TeacherTable.of(teacher, source))"
                )
            image, text = batch.features["teacher_image"], batch.features["teacher_text"]
        return {"image": rows["image"], "text": rows["text"], "teacher_image": image, "teacher_text": text}

    @torch.no_grad()
    def _mimicked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels = cast(Tensor, batch.images)
        teacher = self._teacher[0].to(pixels.device)
        size = teacher.config.image.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = fit_pixels(pixels if pixels.is_floating_point() else pixels.float() / 255, size)
        return unit(teacher.image(pixels)), unit(text_vectors(teacher.text, batch.texts[self.source]))

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`loss`, 0-D, which is minimized; `divergence`: by how much L_soft exceeds the teacher's entropy."""
        image, text = features["image"], features["text"]
        soft, entropy = affinity_loss(
            image, text, features["teacher_image"], features["teacher_text"], self.scale
        )
        loss = soft
        if self.alpha < 1:
            loss = self.alpha * soft + (1 - self.alpha) * contrastive_loss(image, text, self.scale)
        return {"loss": loss, "divergence": (soft - entropy).detach()}


def affinity_loss(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: float = 50.0
) -> tuple[Tensor, Tensor]:
    """L_soft and its least value, the teacher's entropy, both 0-D in at least fp32.

    Args:
        image, text: (N, D), unit length, the student's.
        teacher_image, teacher_text: (N, D*), unit length.
        scale: s.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, teacher_image, teacher_text = (
            rows if rows.dtype == torch.float64 else rows.float()
            for rows in (image, text, teacher_image, teacher_text)
        )
        student, teacher = scale * image @ text.T, scale * teacher_image @ teacher_text.T
        soft, entropy = student.new_zeros(()), student.new_zeros(())
        for dim in (1, 0):
            target, log_target = teacher.softmax(dim), teacher.log_softmax(dim)
            soft = soft - (target * student.log_softmax(dim)).sum(dim).mean() / 2
            entropy = entropy - (target * log_target).sum(dim).mean() / 2
        return soft, entropy


# ----------------------------------------------------------------------------------- inheriting by hand

Depth = Literal["front", "even"]
Layers = int | tuple[int, int, int, int]


def inherit(teacher: Clip, image: tuple[Layers, int], text: tuple[int, int], depth: Depth = "front") -> Clip:
    """A smaller Clip made of blocks of the teacher and the first entries along every axis of their weights.

    Args:
        teacher: where the weights come from; it stays as it is.
        image, text: (blocks, width) of the student's towers; heads and MLP units go with the width. A ResNet
            takes its four numbers of bottlenecks and the width of its first stage.
        depth: `front` takes blocks 0, step, 2 step, … with step = floor(L_t / L_s), as published: 12 blocks
            to 9 are the first nine. `even` spreads them from the first to the last.

    Raises:
        ConfigError: for a student that is larger, or whose width does not hold whole heads.
    """
    vision, image_layers = _smaller(teacher.config.image, *image, depth, "image")
    words, text_layers = _smaller(teacher.config.text, *text, depth, "text")
    config = replace(
        teacher.config,
        image=cast("VisionConfig | ResNetConfig", vision),
        text=cast(TextConfig, words),
        name=f"{teacher.config.name}, inherited".lstrip(", "),
    )
    theirs = teacher.state_dict()
    weights = {}
    for name, target in own.skeleton(config).state_dict().items():
        found = _of_block(name, image_layers if name.startswith("image.") else text_layers)
        weights[name] = _leading(theirs[found], target.shape, packed=name.split(".")[-2:-1] == ["qkv"])
    clip = own.build(config, weights, "inherited", teacher.tokenizer, teacher.preprocessing)
    return clip.to(teacher.device)


def kept_layers(theirs: int, ours: int, depth: Depth = "front") -> list[int]:
    """Which of a teacher's blocks a student takes over.

    Raises:
        ConfigError: if the student has more blocks, or none.
    """
    if not 1 <= ours <= theirs:
        raise ConfigError(f"a student of {ours} blocks cannot inherit from a teacher of {theirs}")
    if depth == "front":
        return [i * (theirs // ours) for i in range(ours)]
    return [round(i * (theirs - 1) / max(1, ours - 1)) for i in range(ours)]


def _smaller(
    tower: VisionConfig | ResNetConfig | TextConfig, layers: Layers, width: int, depth: Depth, label: str
) -> tuple[VisionConfig | ResNetConfig | TextConfig, list[list[int]] | list[int]]:
    """The student's tower, and which block of the teacher each of its blocks is."""

    def part(entries: int, what: str) -> int:
        if entries * width % tower.width:
            raise ConfigError(
                f"{label}: width {width} of {tower.width} leaves no whole number of {entries} {what}"
            )
        return entries * width // tower.width

    if not 1 <= width <= tower.width:
        raise ConfigError(
            f"{label}: a student of width {width} cannot inherit from a teacher of {tower.width}"
        )
    if isinstance(tower, ResNetConfig) != isinstance(layers, tuple):
        raise ConfigError(f"{label}: layers={layers!r}; a ResNet takes four numbers, a transformer one")
    if isinstance(tower, ResNetConfig) and isinstance(layers, tuple):
        stages = [kept_layers(t, s, depth) for t, s in zip(tower.layers, layers, strict=True)]
        return replace(tower, layers=layers, width=width, heads=part(tower.heads, "heads")), stages
    assert not isinstance(tower, ResNetConfig) and isinstance(layers, int)  # noqa: S101  for the type checker
    kept = kept_layers(len(tower.blocks), layers, depth)
    blocks = tuple(
        BlockConfig(part(b.heads, "heads"), b.head_width, part(b.mlp_width, "MLP units"))
        for b in (tower.blocks[i] for i in kept)
    )
    if isinstance(tower, TextConfig):
        return replace(tower, width=width, blocks=blocks), kept
    stem = tuple(replace(stage, width=part(stage.width, "channels of the stem")) for stage in tower.stem)
    return replace(tower, width=width, blocks=blocks, stem=stem), kept


def _of_block(name: str, layers: list[list[int]] | list[int]) -> str:
    """The teacher's name of a student's weight."""
    match = re.match(r"(\w+\.blocks\.)(\d+)(?:\.(\d+)(?=\.))?(.*)", name)
    if match is None:
        return name
    start, block, bottleneck, rest = match.groups()
    kept = layers[int(block)]
    if isinstance(kept, list):
        return f"{start}{block}.{kept[int(bottleneck)]}{rest}"
    return f"{start}{kept}{rest}"


def _leading(tensor: Tensor, shape: Sequence[int], packed: bool) -> Tensor:
    """The first entries along every axis; of packed queries, keys and values the first of each."""
    if packed:
        thirds = tensor.reshape(3, -1, *tensor.shape[1:])
        return _leading(thirds, (3, shape[0] // 3, *shape[1:]), False).reshape(*shape)
    return tensor[tuple(slice(size) for size in shape)]


# ------------------------------------------------------------------------------------ inheriting by masks

LIMIT = math.log(100)  # |log a| after every step
START = 10.0
SHIFT = 2 / 3 * math.log(1.1 / 0.1)  # 1.5986: temperature 2/3, stretched to (-0.1, 1.1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of masks with parameters log a, any shape."""
    return torch.sigmoid(log_alpha + SHIFT)


def drawn(log_alpha: Tensor) -> Tensor:
    """Masks in [0, 1] drawn from torch's generator, of any shape."""
    u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    return (1.2 * torch.sigmoid((u.logit() + log_alpha) * 1.5) - 0.1).clamp(0, 1)


def settled(log_alpha: Tensor) -> Tensor:
    """Masks (n,) without chance: sigmoid(1.2 log a), but the smallest, as many as is expected, are 0."""
    log_alpha = log_alpha.detach()
    closed = round(len(log_alpha) - float(open_probability(log_alpha).sum()))
    z = torch.sigmoid(1.2 * log_alpha)
    return z.index_fill(0, log_alpha.argsort(stable=True)[:closed], 0.0)


class TowerMasks(nn.Module):
    """Parameters log a of the masks of one transformer tower."""

    def __init__(self, tower: VisionConfig | TextConfig):
        super().__init__()
        self.hidden = nn.Parameter(torch.full((tower.width,), START))
        self.heads = nn.ParameterList(torch.full((block.heads,), START) for block in tower.blocks)
        self.units = nn.ParameterList(torch.full((block.mlp_width,), START) for block in tower.blocks)
        self.head_widths = [block.head_width for block in tower.blocks]

    def gates(self, how: Callable[[Tensor], Tensor]) -> Gates:
        """All masks, made by `drawn` or `settled`."""
        return Gates(how(self.hidden), tuple(map(how, self.heads)), tuple(map(how, self.units)))

    def size(self) -> Tensor:
        """Expected number E of weights in the blocks, 0-D: biases of q, k, v count, the others do not."""
        width = len(self.hidden)
        per_channel = self.hidden.new_zeros(())
        for heads, units, d in zip(self.heads, self.units, self.head_widths, strict=True):
            per_channel = per_channel + (4 * d + 4 * d / width) * open_probability(heads).sum()
            per_channel = per_channel + 2 * open_probability(units).sum()
        return open_probability(self.hidden).sum() * per_channel


def full_size(tower: VisionConfig | TextConfig) -> int:
    """F: all weights and biases of a tower's blocks but their norms'; L (12 w² + 9 w) for an ordinary one."""
    inner = [(block.heads * block.head_width, block.mlp_width) for block in tower.blocks]
    return sum(4 * a * tower.width + 2 * m * tower.width + 3 * a + m + 2 * tower.width for a, m in inner)


class InheritanceMasks(Objective):
    """Learns which channels, heads and units to keep, beside the weights; `finish` then cuts the others.

    Args:
        objective: what the masked student learns.
        target: s*, the sparsity at the end: the share of the blocks' weights that is to go, of both towers
            together, so that they share the cut as they like.
        start: s* before the first step.
        ramp: steps over which s* rises.
        full: the model that sparsity is relative to; None takes the student as it begins. A later stage names
            the first one's.
        lr: of the masks and of the penalty's factors. log a starts at 4.6 after the first step and closes
            below -1.6, so `lr` times the steps must be 12 or more (60 in the first published stage).

    Attributes:
        image, text: the masks, once it is prepared.
        linear, quadratic: l1 and l2.
    """

    image: TowerMasks
    text: TowerMasks
    steps: Tensor

    def __init__(
        self,
        objective: AffinityMimicking,
        target: float,
        *,
        start: float = 0.0,
        ramp: int = 1000,
        full: Config | None = None,
        lr: float = 0.02,
    ):
        super().__init__()
        if not 0 <= start <= target < 1 or ramp < 1:
            raise ConfigError(f"sparsity cannot rise from {start} to {target} over {ramp} steps")
        self.objective = objective
        self.target = target
        self.start = start
        self.ramp = ramp
        self.lr = lr
        self._full = full
        self._full_size = 0
        self.linear = nn.Parameter(torch.tensor(10.0))
        self.quadratic = nn.Parameter(torch.tensor(10.0))
        self.register_buffer("steps", torch.zeros(()))

    def prepare(self, clip: Clip) -> Clip:
        """The student as its objective prepares it; the masks are made for it, all open.

        Raises:
            ConfigError: for a tower that cannot have masks.
        """
        clip = self.objective.prepare(clip)
        check_gateable(clip)
        full = self._full or clip.config
        self._full_size = 0
        for label in TOWERS:
            tower, config = getattr(clip, label), getattr(full, label)
            setattr(self, label, TowerMasks(tower.config).to(clip.device))
            self._full_size += full_size(config)
        with torch.no_grad():
            self.steps.zero_()
            for factor in (self.linear, self.quadratic):
                factor.fill_(10.0)
        return clip

    def groups(self, clip: Clip) -> list[dict[str, Any]]:
        """The weights as their objective has it; masks and factors at a rate of their own that stays."""
        masks = [*self.image.parameters(), *self.text.parameters(), self.linear, self.quadratic]
        own = {"lr": self.lr, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "scheduled": False}
        return [*self.objective.groups(clip), {"params": masks, **own}]

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """Those of the objective for the student under masks drawn once for the batch; the rest is 0-D."""
        self.clamp()
        rows = self.objective.features(gated(clip, self.gates(drawn)), batch)
        return rows | {
            "sparsity": self.expected_sparsity(),
            "linear": self.linear,
            "quadratic": self.quadratic,
            "steps": self.steps.clone(),
        }

    @torch.no_grad()
    def clamp(self) -> None:
        """Bound log a; before each step instead of after it, which is the same but for the very first."""
        for parameter in (*self.image.parameters(), *self.text.parameters()):
            parameter.clamp_(-LIMIT, LIMIT)

    def expected_sparsity(self) -> Tensor:
        """s, 0-D: the share of the full model's weights that is expected to go."""
        return 1 - (self.image.size() + self.text.size()) / self._full_size

    def target_at(self, step: Tensor) -> Tensor:
        """s* at a step, both 0-D."""
        return self.start + (self.target - self.start) * (step / self.ramp).clamp(max=1)

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`loss`, 0-D, the objective's with the penalty; `sparsity` and `penalty` beside it."""
        terms = self.objective.loss(features)
        excess = (self.target_at(features["steps"]) - features["sparsity"]).clamp(min=0)
        # The factors climb where the weights descend: the same value, its gradient reversed.
        linear, quadratic = (2 * each.detach() - each for each in (features["linear"], features["quadratic"]))
        penalty = linear * excess + quadratic * excess.square()
        return terms | {
            "loss": terms["loss"] + penalty,
            "penalty": penalty.detach(),
            "sparsity": features["sparsity"].detach(),
        }

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Go back from `loss`, 0-D, and count the step: called once in it, however a batch is cut."""
        terms["loss"].backward()
        self.steps += 1

    def gates(self, how: Callable[[Tensor], Tensor]) -> dict[str, Gates]:
        """All masks of both towers, (w,), (h,) and (m,), made by `drawn` or `settled`."""
        return {"image": self.image.gates(how), "text": self.text.gates(how)}

    def finish(self, clip: Clip) -> Clip:
        """A smaller plain Clip that computes what the student under `settled` masks computes."""
        self.clamp()
        with torch.no_grad():
            return cut(clip, self.gates(settled))


def automatic_stages(
    teacher: Clip | None,
    targets: Sequence[float] = (0.25, 0.5, 0.75),
    *,
    full: Config,
    ramp: int = 1000,
    lr: float = 0.02,
) -> list[Objective]:
    """Objectives for `fit`, two for each target: masks, then training of what they left.

    Args:
        teacher: as `AffinityMimicking` takes it; the same in all stages.
        targets: sparsities, relative to the original model.
        full: the original model's config.
        ramp, lr: as `InheritanceMasks` takes them.
    """
    stages: list[Objective] = []
    for start, target in pairwise((0.0, *targets)):
        learned = AffinityMimicking(teacher)
        masks = InheritanceMasks(learned, target, start=start, ramp=ramp, full=full, lr=lr)
        stages += [masks, AffinityMimicking(teacher, begin=masks.finish)]
    return stages


# ---------------------------------------------------------------------------------------- released weights

_PARTS = (
    (re.compile(r"^_?(?:image|text)_encoder(?:_without_ddp)?\."), ""),
    (re.compile(r"^_?logit_scale(?:_without_ddp)?\.logit_scale$"), "logit_scale"),
)


def from_checkpoint(path: str | Path, *, tokenizer: Tokenizer | Literal[False] | None = None) -> Clip:
    """A Clip from a released file, manual or auto, of any of its three kinds of names.

    All were trained with the exact GELU, also those cut from OpenAI's models. Heads and MLP units of each
    block are read off the shapes; a block without attention has no heads.

    Args:
        path: a dict with `state_dict`.
        tokenizer: CLIP's if left out; False for none.

    Raises:
        CheckpointError: naming the file and the tensor at fault.
    """
    label = str(path)
    weights = layouts.clean(_joined(files.read(Path(path)).weights, label), label)
    if layouts.recognize(weights, label) != "openai":
        raise CheckpointError(f"{label}: not a TinyCLIP in a layout that was released")
    blocks = {"image": _blocks(weights, "visual."), "text": _blocks(weights, "")}
    pool = weights.get("visual.attnpool.positional_embedding")
    settings = Settings(
        activation="gelu",
        image_heads=1 if pool is None else pool.shape[1] // 64,
        text_heads=1,  # replaced by the blocks' own below
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
    config = geometry("openai", weights, settings, label, Path(path).stem)
    if isinstance(config.image, VisionConfig):
        config = replace(config, image=replace(config.image, blocks=blocks["image"]))
    config = replace(config, text=replace(config.text, blocks=blocks["text"]))
    shapes = {name: tuple(value.shape) for name, value in own.skeleton(config).state_dict().items()}
    ours = rules.read(layouts.rules("openai", config), weights, shapes, label)
    return own.build(config, ours, label, vocabulary.choose(config, None, None, tokenizer, label))


def _joined(weights: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """Weights without their parts' prefixes; a second copy must be equal, masks are left out."""
    joined: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        bare = layouts.WRAPPERS.sub("", name)
        for pattern, replacement in _PARTS:
            bare = pattern.sub(replacement, bare)
        if "l0_module" in bare.split("."):
            continue
        if bare in joined and not torch.equal(joined[bare], tensor):
            raise CheckpointError(f"{label}: {name} differs from the other copy of {bare} in the file")
        joined[bare] = tensor
    return joined


def _blocks(weights: dict[str, Tensor], prefix: str) -> tuple[BlockConfig, ...]:
    """Each block's heads, 64 wide, and MLP units; where there is no attention, one without heads is put."""
    start = f"{prefix}transformer.resblocks."
    numbers = {int(name.removeprefix(start).split(".")[0]) for name in weights if name.startswith(start)}
    blocks = []
    for i in sorted(numbers):
        place = f"{start}{i}"
        if f"{place}.mlp.c_fc.weight" not in weights:
            return ()  # incomplete: what is missing is said by name when the weights are read
        units, width = weights[f"{place}.mlp.c_fc.weight"].shape
        if not any(name.startswith((f"{place}.attn.", f"{place}.ln_1.")) for name in weights):
            for name, shape in (("in_proj_weight", (0, width)), ("in_proj_bias", (0,))):
                weights[f"{place}.attn.{name}"] = torch.zeros(shape)
            weights[f"{place}.attn.out_proj.weight"] = torch.zeros(width, 0)
            weights[f"{place}.attn.out_proj.bias"] = torch.zeros(width)
            weights[f"{place}.ln_1.weight"], weights[f"{place}.ln_1.bias"] = (
                torch.ones(width),
                torch.zeros(width),
            )
        packed = weights.get(f"{place}.attn.in_proj_weight")
        blocks.append(BlockConfig(0 if packed is None else len(packed) // 192, 64, units))
    return tuple(blocks)
