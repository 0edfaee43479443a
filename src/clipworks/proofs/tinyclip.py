"""TinyCLIP: a piece of a teacher's weights and its similarities make a small CLIP (Wu et al., ICCV 2023).

A teacher is trained on scenes of one colored shape with captions. A student of two thirds of its width and
half of its depth, a fifth of the weights in its blocks, is then trained briefly on other scenes, with equal
steps, batches, learning rate and scale 50 in every arm. Compared are TinyCLIP by hand (inherited weights,
affinity mimicking) and the same model from scratch with CLIP's own loss; the claim is refuted if it is no
better in the end. Beside it stand, to tell where a gain comes from,

- from scratch with affinity mimicking: is it the loss?
- inherited and then shuffled inside each tensor: is it only the spread of the initial weights?

and with the budget `full` also inherited weights with CLIP's loss, random channels and evenly spread blocks
in place of the first, inheritance in two stages, and by learned masks to the same size.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from clipworks.core.clip import Clip
from clipworks.data.batch import Batch
from clipworks.data.captions import ClassTexts
from clipworks.data.loader import Loader, Reading
from clipworks.data.source import Source, TextChoices
from clipworks.data.world.captions import Claim, place, say
from clipworks.data.world.scenes import Scene, SceneConfig
from clipworks.data.world.words import Thing
from clipworks.engine import Recipe, Saving, fit
from clipworks.engine.callbacks import Callback, State
from clipworks.methods.pretrain.base import Objective
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.tinyclip import (
    AffinityMimicking,
    Depth,
    InheritanceMasks,
    full_size,
    inherit,
)
from clipworks.parts.pruning import TOWERS, Gates, cut
from clipworks.parts.teacher import TeacherTable
from clipworks.proofs import laboratory
from clipworks.proofs.base import Budget, Outcome, Proof

SHAPES = ("circle", "square", "triangle", "star", "cross", "house")
COLORS = ("red", "yellow", "green", "blue", "white", "black")
SCENES = SceneConfig(
    shapes=SHAPES,
    colors=COLORS,
    textures=("plain",),
    sizes=("large",),
    backgrounds=("grass", "sky", "sand", "snow"),
    styles=("flat", "photo"),
    count=(1, 1),
)
MASK_STEPS, MASK_RATE, MASK_RAMP = 60, 0.2, 20


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        train, test: scenes; the teacher and the students each have `train` of their own.
        samples: examples that the teacher sees.
        steps, batch_size, lr: of the students.
        teacher, student: (blocks, width) of both towers.
        every: steps between two points of the curve.
        all_arms: whether the arms beside the four main ones are run.
    """

    train: int
    test: int
    samples: int
    steps: int
    batch_size: int
    lr: float
    teacher: tuple[int, int]
    student: tuple[int, int]
    every: int
    all_arms: bool


SIZES: dict[Budget, Size] = {
    "small": Size(2500, 800, 24_000, 100, 64, 1e-3, (4, 96), (2, 64), 20, all_arms=False),
    "full": Size(10_000, 4000, 200_000, 200, 64, 1e-3, (4, 192), (2, 128), 20, all_arms=True),
}


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    theirs, ours = (
        laboratory.scenes(SCENES, seed, range(first, first + size.train), caption)
        for first in (0, size.train)
    )
    test = laboratory.scenes(SCENES, seed, range(2 * size.train, 2 * size.train + size.test), caption)
    tokenizer = laboratory.tokenizer_of(str(theirs[i].texts["alt"]) for i in range(len(theirs)))
    depth, width = size.teacher
    teacher = laboratory.fresh_clip(tokenizer, seed, width=width, depth=depth)
    steps = max(1, size.samples // 96)
    recipe = laboratory.recipe_for(steps, 96, seed, lr=1.5e-3)
    laboratory.train(teacher, ClipObjective(fresh=True), theirs, recipe, 96)

    names = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
    classes = ClassTexts(names, templates=("{a} {}",))
    study = Study(teacher, ours, size, seed, lambda clip: laboratory.classify(clip, test, classes))
    small = inherit(teacher, size.student, size.student)

    def scratch() -> Clip:
        return Clip.from_config(small.config, tokenizer, seed=seed)

    arms: dict[str, Curve] = {
        "scratch": study(scratch(), alpha=0),
        "scratch_affinity": study(scratch()),
        "inherited_affinity": study(copy.deepcopy(small)),
        "shuffled_affinity": study(shuffled(small, seed)),
    }
    if size.all_arms:
        even: Depth = "even"
        arms["inherited"] = study(copy.deepcopy(small), alpha=0)
        arms["random_channels"] = study(random_channels(teacher, small, seed))
        arms["even_blocks"] = study(inherit(teacher, size.student, size.student, even))
        arms["two_stages"] = study.stages(*two_stages(teacher, size))
        arms["masks"] = study.stages(*masks(teacher, small, size))
    return Outcome(
        baseline=arms["scratch"].final,
        method=arms["inherited_affinity"].final,
        details={"teacher": study.accuracy(teacher)}
        | {name: {"final": curve.final, "area": curve.area} for name, curve in arms.items()},
    )


def caption(scene: Scene) -> dict[str, TextChoices]:
    """Color, shape and place; always the same text, for a teacher's table has one an example."""
    thing = scene.objects[0]
    return {"alt": say(Claim((Thing(thing.shape, thing.color),), place=place(thing)))}


class Curve(Callback):
    """Accuracy during a training, at equal distances; `area` is its mean and `final` its last value."""

    def __init__(self, accuracy: Callable[[Clip], float], every: int, points: Sequence[float] = ()):
        self.accuracy = accuracy
        self.every = every
        self.points = list(points)

    def on_step(self, state: State) -> None:
        if state.step % self.every == 0:
            training = state.clip.training
            state.clip.eval()
            self.points.append(self.accuracy(state.clip))  # type: ignore[arg-type]
            state.clip.train(training)

    @property
    def area(self) -> float:
        return sum(self.points) / max(1, len(self.points))

    @property
    def final(self) -> float:
        return self.points[-1]


class Study:
    """Trains students under equal conditions, all from one table of the teacher's vectors."""

    def __init__(
        self, teacher: Clip, source: Source, size: Size, seed: int, accuracy: Callable[[Clip], float]
    ):
        self.tokenizer = teacher.tokenizer
        self.table: Callable[[Batch], Batch] = TeacherTable.of(teacher, source)
        self.source, self.size, self.seed, self.accuracy = source, size, seed, accuracy

    def __call__(self, student: Clip, alpha: float = 1.0) -> Curve:
        """One stage."""
        return self.stages(student, [AffinityMimicking(alpha=alpha)], [self.size.steps])

    def stages(self, student: Clip, objectives: Sequence[Objective], steps: Sequence[int]) -> Curve:
        """Several stages; the curve begins with the model as it is."""
        curve = Curve(self.accuracy, self.size.every, [self.accuracy(student)])
        recipes: list[Recipe] = [
            laboratory.recipe_for(each, self.size.batch_size, self.seed, lr=self.size.lr, clip_gradient=5.0)
            for each in steps
        ]
        loader = Loader(
            self.source,
            student.preprocessing,
            self.tokenizer,
            self.size.batch_size,
            seed=self.seed,
            reading=Reading(workers=1, cache="memory"),
            transform=self.table,
        )
        with tempfile.TemporaryDirectory() as folder:
            result = fit(
                student,
                objectives,
                loader,
                recipes,
                folder=folder,
                callbacks=[curve],
                saving=Saving(minutes=None),
                show="nothing",
            )
        if steps[-1] % self.size.every:
            curve.points.append(self.accuracy(result.clip))  # type: ignore[arg-type]
        return curve


def shuffled(clip: Clip, seed: int) -> Clip:
    """A copy whose entries have changed places inside each tensor."""
    twin = copy.deepcopy(clip)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.copy_(
                tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
            )
    return twin


def random_channels(teacher: Clip, like: Clip, seed: int) -> Clip:
    """The same blocks as `like`, with random channels, heads and units of the teacher, equal over blocks."""
    depth = [len(getattr(like, label).blocks) for label in TOWERS]
    whole = inherit(teacher, (depth[0], teacher.config.image.width), (depth[1], teacher.config.text.width))
    generator = torch.Generator().manual_seed(seed)

    def some(n: int, kept: int) -> torch.Tensor:
        return torch.zeros(n).index_fill(0, torch.randperm(n, generator=generator)[:kept], 1.0)

    gates = {}
    for label in TOWERS:
        full, small = getattr(whole.config, label), getattr(like.config, label)
        pairs = list(zip(full.blocks, small.blocks, strict=True))
        gates[label] = Gates(
            some(full.width, small.width),
            tuple(some(a.heads, b.heads) for a, b in pairs),
            tuple(some(a.mlp_width, b.mlp_width) for a, b in pairs),
        )
    return cut(whole, gates)


def two_stages(teacher: Clip, size: Size) -> tuple[Clip, list[Objective], list[int]]:
    """Half of the blocks first, then two thirds of the width, in the same steps together."""
    depth, width = size.student
    first = inherit(teacher, (depth, size.teacher[1]), (depth, size.teacher[1]))
    second = partial(inherit, image=(depth, width), text=(depth, width))
    half = size.steps // 2
    return first, [AffinityMimicking(), AffinityMimicking(begin=second)], [half, size.steps - half]


def masks(teacher: Clip, like: Clip, size: Size) -> tuple[Clip, list[Objective], list[int]]:
    """Masks down to the size of `like`, then training of what they left, in the same steps together."""
    left = [sum(full_size(getattr(clip.config, label)) for label in TOWERS) for clip in (like, teacher)]
    learned = InheritanceMasks(AffinityMimicking(), 1 - left[0] / left[1], ramp=MASK_RAMP, lr=MASK_RATE)
    objectives = [learned, AffinityMimicking(begin=learned.finish)]
    return copy.deepcopy(teacher), objectives, [MASK_STEPS, max(1, size.steps - MASK_STEPS)]


PROOF = Proof(
    slug="tinyclip",
    claim="A small model that inherits weights of its teacher and mimics its similarities classifies better "
    "after a short training than the same model from scratch with the contrastive loss.",
    baseline="the same model from scratch with CLIP's loss",
    method="TinyCLIP, inherited by hand",
    metric="zero-shot top-1 accuracy after the training",
    run=run,
    controls={
        "scratch_affinity.final": "inherited weights",
        "shuffled_affinity.final": "inherited weights at their places: they are shuffled",
    },
)
