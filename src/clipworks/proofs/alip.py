"""ALIP: do its gates help over both texts at equal weight, and is it the right samples that lose weight?

Pictures of one thing have a raw text that names shape, color and texture, and a caption that names shape and
background. A share of the raw texts belongs to another picture or is boiler-plate; one caption in ten belongs
to another picture. Which ones is known here and never shown to the method. Arms, of the same steps, pictures
and initial values:

    equal      both texts at equal weight, the fair baseline: most of the paper's gain comes from captions
    alip       both gates
    permuted   ALIP's weights, exchanged among the samples of a batch: the same numbers without their meaning

and with the budget `full` raw texts or captions alone, the first gate alone, the second gate with the sign
that the authors' figure prints, the paper's start of the means, and as a ceiling the wrong texts at weight 0;
all of it also with clean raw texts. Measured are zero-shot accuracies of what raw texts name (color, texture)
and of what captions name (shape, background), and how well the weights tell wrong texts from right ones, also
within thirds of the raw texts' length, since a long text resembles a short caption less.

If ALIP is better than equal weights and not than permuted ones, its weighting helps for another reason.
Pictures are features of the seedling; the head over them and the text tower are fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.core.tokenizer import FileTokenizer
from clipworks.data.batch import Batch
from clipworks.data.randomness import Draws
from clipworks.data.source import Example, Examples, iterate
from clipworks.data.world.scenes import Scene, SceneConfig
from clipworks.data.world.words import BACKGROUND_PHRASES
from clipworks.methods.pretrain.alip import Alip, Gates
from clipworks.methods.pretrain.base import Objective
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.parts.contrastive import contrastive_loss
from clipworks.proofs.base import Budget, Outcome, Proof
from clipworks.proofs.cached import Sketch, seedling_features, train
from clipworks.proofs.laboratory import recipe_for, scenes, tokenizer_of

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "house", "fish")
COLORS = ("red", "yellow", "green", "blue", "purple", "white", "brown", "black")
TEXTURES = ("plain", "striped", "dotted", "checkered")
GROUNDS = {name: phrases["en"] for name, phrases in BACKGROUND_PHRASES.items()}
# What is asked of a picture: the values of an attribute, and how a text names one.
QUESTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "color": (COLORS, "{value} {shape}"),
    "texture": (TEXTURES, "{value} {shape}"),
    "shape": (SHAPES, "a {value}"),
    "background": (tuple(GROUNDS), "a {shape} {value}"),
}
FILLERS = ("free shipping", "stock photo", "click to enlarge", "shop now", "image 3 of 12")
WRONG_RAW, WRONG_CAPTIONS = 0.5, 0.1
BATCH = 256
LR = 3e-3  # towers as small as these bear it


@dataclass(frozen=True)
class Size:
    """How large the experiment is: pictures, and steps at a batch of 256."""

    train: int
    test: int
    steps: int
    all_arms: bool = False


SIZES: dict[Budget, Size] = {
    "small": Size(train=3000, test=1000, steps=250),
    "full": Size(train=20_000, test=4000, steps=2000, all_arms=True),
}


class Permuted(Alip):
    """ALIP whose weights go to other samples of the batch, all weights of a sample together."""

    def gates(self, image: Tensor, text: Tensor, caption: Tensor) -> Gates:
        """Weights (N,) that say nothing of the samples that they weigh."""
        found = super().gates(image, text, caption)
        order = torch.randperm(len(image), generator=torch.Generator().manual_seed(int(self.steps)))
        return replace(
            found, sample=found.sample[order], text=found.text[order], caption=found.caption[order]
        )


class Reversed(Alip):
    """ALIP whose second gate has the sign of the authors' figure: what fits less counts more."""

    def gates(self, image: Tensor, text: Tensor, caption: Tensor) -> Gates:
        """Weights (N,), those of the second gate inverted."""
        found = super().gates(image, text, caption)
        return replace(found, text=1 / found.text, caption=1 / found.caption)


class Oracle(Alip):
    """Both texts, the wrong ones at weight 0; `right` says by key which of the two are right."""

    def __init__(self, right: Mapping[str, tuple[bool, bool]]):
        super().__init__()
        self.right = right

    def features(self, clip: Any, batch: Batch) -> dict[str, Any]:
        """As of ALIP, and `right` (B, 2)."""
        right = torch.tensor([self.right[key] for key in batch.keys], dtype=torch.float32)
        return super().features(clip, batch) | {"right": right}

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`contrastive`, 0-D."""
        scale, total = features["scale"].exp(), torch.zeros(())
        for name, weights in zip(("text", "caption"), features["right"].unbind(1), strict=True):
            loss = contrastive_loss(features["image"], features[name], scale, weights=weights)
            total = total + weights.mean() * loss
        return {"contrastive": total}

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Go back from the 0-D loss; there are no means to move."""
        terms["contrastive"].backward()


@dataclass(frozen=True)
class World:
    """Texts with what is wrong with them; cached features (n, w) and scenes of other pictures.

    Attributes:
        source: training examples, `alt` and `synthetic`.
        right: by key, whether raw text and caption are.
        features: by key, (w,).
        test: (n, w), in the order of `scenes`.
    """

    source: Examples
    right: dict[str, tuple[bool, bool]]
    features: dict[str, Tensor]
    test: Tensor
    scenes: list[Scene]
    tokenizer: FileTokenizer


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; it needs no data."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    noisy = made(seed, size, WRONG_RAW)
    arms = arms_of(noisy, size)
    results = {name: measured(seed, size, noisy, objective) for name, objective in arms.items()}
    details = {f"{name}_{kind}": value for name, found in results.items() for kind, value in found.items()}
    if size.all_arms:
        clean = made(seed, size, 0.0, noisy)
        for name, objective in arms_of(clean, size).items():
            found = measured(seed, size, clean, objective)
            details |= {f"clean_{name}_{kind}": value for kind, value in found.items()}
    return Outcome(results["equal"]["accuracy"], results["alip"]["accuracy"], details)


def arms_of(world: World, size: Size) -> dict[str, Objective]:
    """The objectives that are compared."""
    arms: dict[str, Objective] = {
        "equal": Alip(0, 0, start="batch", fresh=True),
        "alip": Alip(start="batch", fresh=True),
        "permuted": Permuted(start="batch", fresh=True),
    }
    if size.all_arms:
        arms |= {
            "raw_alone": ClipObjective(fresh=True),
            "captions_alone": ClipObjective(source="synthetic", fresh=True),
            "first_gate_alone": Alip(2, 0, start="batch", fresh=True),
            "reversed": Reversed(start="batch", fresh=True),
            "start_at_one": Alip(fresh=True),
            "oracle": Oracle(world.right),
        }
    return arms


def made(seed: int, size: Size, wrong: float, shown: World | None = None) -> World:
    """Everything that the arms share; the pictures' features are those of `shown` where it is given."""
    config = SceneConfig(SHAPES, COLORS, TEXTURES, count=(1, 1))
    pictures = scenes(config, seed, range(size.train + size.test), lambda scene: {}, size=64)
    every = list(iterate(pictures))
    known = [example.extra["scene"] for example in every[: size.train]]
    examples, right = [], {}
    for row, example in enumerate(every[: size.train]):
        draws = Draws(seed, 0xA119, row)
        other = known[(row + 1 + draws.integers(len(known) - 1)) % len(known)]
        bad_raw, bad_caption = draws.random() < wrong, draws.random() < WRONG_CAPTIONS
        boiler_plate = draws.random() < 1 / 3
        raw = raw_text(other if bad_raw else known[row], draws)
        if bad_raw and boiler_plate:
            raw = f"{FILLERS[draws.integers(len(FILLERS))]} img {draws.integers(9999)}"
        texts = {"alt": raw, "synthetic": caption_of(other if bad_caption else known[row])}
        examples.append(Example(example.key, texts=texts))
        right[example.key] = (not bad_raw, not bad_caption)
    if shown is None:
        rows = seedling_features(pictures)
        features = {example.key: vector for example, vector in zip(examples, rows)}
        test = rows[size.train :]
    else:
        features, test = shown.features, shown.test
    sentences = [str(text) for example in examples for text in example.texts.values()]
    return World(
        Examples(examples),
        right,
        features,
        test,
        [example.extra["scene"] for example in every[size.train :]],
        tokenizer_of(sentences, 1024),
    )


def raw_text(scene: Scene, draws: Draws) -> str:
    """What a web text says: the shape, mostly its color and texture, now and then trade talk."""
    thing = scene.objects[0]
    words = [thing.texture] if draws.random() < 0.8 else []
    words += [thing.color] if draws.random() < 0.9 else []
    talk = f" | {FILLERS[draws.integers(len(FILLERS))]}" if draws.random() < 0.4 else ""
    return " ".join([*words, thing.shape]) + talk


def caption_of(scene: Scene) -> str:
    """What a captioner says: shape and background."""
    return f"a {scene.objects[0].shape} {GROUNDS[scene.background]}"


def measured(seed: int, size: Size, world: World, objective: Objective) -> dict[str, float]:
    """Train one arm; accuracies by attribute and, where weights were given, what they tell."""
    sketch = Sketch(world.test.shape[1], world.tokenizer, seed)
    recipe = recipe_for(size.steps, BATCH, seed, lr=LR)
    train(sketch, objective, world.source, world.features, recipe, BATCH, ("alt", "synthetic"))
    found = {}
    for name, (values, wording) in QUESTIONS.items():
        labels = [
            values.index(getattr(s if name == "background" else s.objects[0], name)) for s in world.scenes
        ]
        texts = [
            [wording.format(value=GROUNDS.get(value, value), shape=shape) for shape in SHAPES]
            for value in values
        ]
        found[name] = sketch.accuracy(world.test, torch.tensor(labels), texts)
    found["accuracy"] = sum(found.values()) / len(found)
    return found | (told(sketch, world) if type(objective) is Alip and objective.gamma_sample else {})


@torch.no_grad()
def told(sketch: Sketch, world: World) -> dict[str, float]:
    """How well agreement tells wrong texts from right ones: areas under the curve, 1/2 for not at all."""
    examples = list(iterate(world.source))
    image = sketch.embed_images(torch.stack([world.features[example.key] for example in examples]))
    raw, caption = (
        sketch.embed_texts([str(example.texts[name]) for example in examples])
        for name in ("alt", "synthetic")
    )
    agree, raw_fits, caption_fits = (raw * caption).sum(1), (raw * image).sum(1), (caption * image).sum(1)
    right = torch.tensor([world.right[example.key] for example in examples])
    length = torch.tensor([len(str(example.texts["alt"])) for example in examples]).argsort(stable=True)
    suspect = agree < agree.mean()
    either = ~right.all(1)
    found = {
        "tells_sample": area(-agree, either),
        "tells_raw": area(-raw_fits[suspect], ~right[suspect, 0]),
        "tells_caption": area(-caption_fits[suspect], ~right[suspect, 1]),
    }
    for name, third in zip(("short", "middle", "long"), length.chunk(3), strict=True):
        found[f"tells_sample_{name}"] = area(-agree[third], either[third])
    return found


def area(scores: Tensor, positive: Tensor) -> float:
    """How often a positive of (n,) bool has a larger score (n,) than a negative: the area under the curve."""
    one, other = scores[positive, None], scores[None, ~positive]
    if not one.numel() or not other.numel():
        return 0.5
    return float((one > other).double().mean() + (one == other).double().mean() / 2)


PROOF = Proof(
    slug="alip",
    claim="With half of the raw texts wrong, weights by agreement make a better model than equal weights of "
    "raw text and caption.",
    baseline="raw text and caption at equal weight",
    method="ALIP",
    metric="zero-shot top-1, mean over color, texture, shape and background",
    run=run,
    controls={
        "permuted_accuracy": "weights of the right samples: they are dealt out at random",
    },
)
