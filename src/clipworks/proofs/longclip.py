"""Long-CLIP: long captions are learned and short ones kept (Zhang et al., ECCV 2024).

A small CLIP is trained on scenes of one or two things with captions of up to 16 tokens, then tuned briefly on
scenes of four with captions of four sentences; its logits keep the scale that they have. Compared are, at
equal steps, batches and learning rate, Long-CLIP and the paper's own control, direct tuning: all positions
interpolated, long captions alone. Two abilities count:

- late: which of ten pictures is told by a caption, where all ten captions agree up to token 16 and beyond,
  so a model that is cut there is right one time in ten;
- short: zero-shot classification of scenes of one thing, as the model knew them before.

Beside it stand the untouched model, both stretched tables without training, and Long-CLIP without the short
captions, without principal components, and with all of the position table trained. Expected: kept positions
lose nothing of the short ability and interpolated ones do; the short branch keeps it in training; what the
components add to the short branch is open. The claim is refuted if the mean of both abilities is no better
than after direct tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from clipworks.checkpoints import sizes
from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Example, Source, TextChoices
from clipworks.data.world.captions import Claim, place, say
from clipworks.data.world.scenes import Object, Scene, SceneConfig, render, sample
from clipworks.data.world.words import Thing
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.longclip import LongClip, short_caption
from clipworks.proofs import laboratory
from clipworks.proofs.base import Budget, Outcome, Proof

SHAPES = ("circle", "square", "triangle", "star", "cross", "house")
COLORS = ("red", "yellow", "green", "blue", "white", "black")
CONTEXT = 16
PLAIN = SceneConfig(
    shapes=SHAPES,
    colors=COLORS,
    textures=("plain",),
    sizes=("medium",),
    styles=("flat", "photo"),
    overlap=0,
    repeats=0,
)
FEW, MANY = replace(PLAIN, count=(1, 2)), replace(PLAIN, count=(4, 4))
GROUP = 10


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        known, new: scenes of the first training and of the tuning.
        samples: examples seen in the first training.
        steps, batch_size: of the tuning.
        groups: of ten pictures each, for the late metric.
        test: pictures for each other metric.
        width, depth: of both towers.
        components: k.
        lr: of the tuning.
    """

    known: int
    new: int
    samples: int
    steps: int
    batch_size: int
    groups: int
    test: int
    width: int
    depth: int
    components: int
    lr: float


SIZES: dict[Budget, Size] = {
    "small": Size(3000, 1500, 24_000, 40, 64, 40, 600, width=96, depth=3, components=16, lr=1e-4),
    "full": Size(10_000, 4000, 150_000, 150, 64, 100, 2000, width=128, depth=4, components=16, lr=1e-4),
}


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    new = laboratory.scenes(MANY, seed, range(size.new), long_and_short)
    known = laboratory.scenes(FEW, seed, range(size.new, size.new + size.known), few)
    tokenizer = laboratory.tokenizer_of(
        (str(new[i].texts["long"]) for i in range(len(new))), context_length=CONTEXT
    )
    base = laboratory.fresh_clip(tokenizer, seed, width=size.width, depth=size.depth)
    steps = max(1, size.samples // 96)
    laboratory.train(base, ClipObjective(fresh=True), known, laboratory.recipe_for(steps, 96, seed), 96)

    measure = Measure(seed, size)
    arms: dict[str, Clip] = {"untouched": base}
    arms["stretched"] = LongClip(scale=None).prepare(base)
    arms["interpolated"] = interpolated(base)
    k = min(size.components, size.batch_size - 2)
    direct = LongClip(keep=0, ratio=1, components=None, short_weight=0, scale=None)
    arms["direct"] = tuned(arms["interpolated"], direct, new, size, seed)
    for name, objective in {
        "long_only": LongClip(components=None, short_weight=0, scale=None),
        "without_components": LongClip(components=None, scale=None),
        "long_clip": LongClip(components=k, scale=None),
    }.items():
        arms[name] = tuned(base, objective, new, size, seed)
    found = {name: measure(clip) for name, clip in arms.items()}
    for abilities in found.values():
        abilities["both"] = (abilities["late"] + abilities["short"]) / 2
    return Outcome(found["direct"]["both"], found["long_clip"]["both"], found)


def sentence(thing: Object) -> str:
    """Color, shape and place of a thing."""
    return say(Claim((Thing(thing.shape, thing.color),), place=place(thing)))


def long_and_short(scene: Scene) -> Mapping[str, TextChoices]:
    """One sentence a thing, and the first of them."""
    long = ". ".join(sentence(thing) for thing in scene.objects) + "."
    return {"long": long, "short": short_caption(long)}


def few(scene: Scene) -> Mapping[str, TextChoices]:
    """What the first training reads: one or two sentences, which fill the 16 tokens."""
    own = [sentence(thing) for thing in scene.objects]
    return {"alt": own + [f"{a}. {b}." for a in own for b in own if a != b]}


def interpolated(base: Clip) -> Clip:
    """The Clip with all positions interpolated to the length that Long-CLIP gives it."""
    clip = LongClip(scale=None).prepare(base)
    with torch.no_grad():
        table = sizes.stretch_positions(base.text.get_parameter("positions"), clip.config.text.context_length)
        clip.text.get_parameter("positions").copy_(table)
    return clip


def tuned(base: Clip, objective: LongClip, new: Source, size: Size, seed: int) -> Clip:
    """A tuned copy; all arms see the same batches at the same rate."""
    clip = objective.prepare(copy.deepcopy(base))
    recipe = laboratory.recipe_for(
        size.steps, size.batch_size, seed, lr=size.lr, warmup=min(10, size.steps), weight_decay=0.01,
        betas=(0.9, 0.999), scale_limit=None,
    )  # fmt: skip
    return laboratory.train(clip, objective, new, recipe, size.batch_size, texts=("long", "short"))


class Measure:
    """Late and short ability of a Clip, in [0, 1], on scenes that no training has."""

    def __init__(self, seed: int, size: Size):
        first = size.new + size.known
        single = replace(PLAIN, count=(1, 1))
        names = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
        self.single = laboratory.scenes(single, seed, range(first, first + size.test), lambda _: {})
        self.classes = ClassTexts(names, templates=("{a} {}",))
        self.groups = [group(seed, first + size.test + number) for number in range(size.groups)]
        fresh = range(first + size.test + size.groups, first + size.test + size.groups + size.test // 2)
        self.long = laboratory.scenes(MANY, seed, fresh, long_and_short)

    def __call__(self, clip: Clip) -> dict[str, float]:
        """`late`, `short`, and text-to-image recall@1 of `long` captions among all pictures."""
        examples = [example for group in self.groups for example in group]
        images = clip.embed_images([example.image for example in examples]).unflatten(0, (-1, GROUP))
        texts = clip.embed_texts([str(example.texts["long"]) for example in examples])
        found = (texts.unflatten(0, (-1, GROUP)) @ images.transpose(1, 2)).argmax(dim=2)
        return {
            "late": float((found == torch.arange(GROUP)).float().mean()),
            "short": laboratory.classify(clip, self.single, self.classes),
            "long": laboratory.retrieve(clip, self.long, "long")["text_to_image_recall@1"],
        }


def group(seed: int, index: int) -> list[Example]:
    """Ten scenes that differ in what their last two things are, and not in where."""
    generator = np.random.default_rng([seed, index])
    scene = sample(MANY, seed, index)
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    drawn = generator.permutation(len(pairs))[: 2 * GROUP]
    examples = []
    for member in range(GROUP):
        looks = [pairs[i] for i in drawn[2 * member : 2 * member + 2]]
        last = [
            replace(thing, shape=shape, color=color)
            for thing, (shape, color) in zip(scene.objects[2:], looks, strict=True)
        ]
        one = replace(scene, objects=(*scene.objects[:2], *last))
        examples.append(Example(f"{index}-{member}", render(one, 32).pixels, texts=long_and_short(one)))
    return examples


PROOF = Proof(
    slug="longclip",
    claim="Tuned on long captions, a model with kept positions and a short branch joins late sentences and "
    "the short texts that it knew before better than direct tuning does.",
    baseline="direct tuning: positions interpolated, long captions alone",
    method="Long-CLIP",
    metric="mean of late-sentence recall@1 and zero-shot accuracy",
    run=run,
    controls={
        "long_only.both": "the short branch",
        "without_components.both": "the coarse image vectors",
    },
)
