"""LaCLIP: do rewrites help on wordings never trained on, and because the draw varies from visit to visit?

Each picture of one colored shape has a caption in one stereotyped wording. A rewriter that sees the caption
alone says it in four other manners, with other words; the pipeline of `data/rewrite.py` runs it. Arms differ
in the texts that a visit draws from, and in nothing else:

    clip      the caption
    edits     the caption and four copies with cheap edits: a word replaced, dropped, inserted, two exchanged
    fixed     one of caption and rewrites for each picture, always the same: their words, but no variation
    laclip    caption and rewrites

and with the budget `full` one or two rewrites, rewrites of another picture's caption (which must hurt),
rewrites without the caption, rewrites of which three in ten say something false besides, and all texts at
once; and two other lengths of training. Zero-shot accuracy is measured with texts in the caption's wording
(A), in wordings and words of the rewrites alone (B), and in wordings of neither with the caption's names (C).
B by itself does not count, its words are new to CLIP: the claim is about the mean of B and C. If `fixed`
equals `laclip`, the gain is one of vocabulary.

Pictures are features of the seedling; the head over them and the text tower are fresh.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.core.tokenizer import FileTokenizer
from clipworks.data.randomness import Draws, key_number
from clipworks.data.rewrite import Pool, caption_in, read_rewrites, rewrite
from clipworks.data.rewritten import Rewritten
from clipworks.data.sentences import TextChoice
from clipworks.data.source import Example, Examples, iterate
from clipworks.data.world.scenes import BACKGROUNDS, Scene, SceneConfig
from clipworks.data.world.words import BACKGROUND_PHRASES
from clipworks.errors import DataError
from clipworks.methods.pretrain.base import Objective
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.laclip import LaClip
from clipworks.proofs.base import Budget, Outcome, Proof
from clipworks.proofs.cached import Sketch, seedling_features, train
from clipworks.proofs.laboratory import recipe_for, scenes, tokenizer_of

SHAPES: dict[str, tuple[str, str]] = {
    "circle": ("disc", "roundel"), "square": ("box", "block"), "triangle": ("wedge", "pyramid"),
    "star": ("asterisk", "twinkler"), "heart": ("valentine", "love sign"), "cross": ("plus", "crosslet"),
    "house": ("home", "hut"), "fish": ("swimmer", "herring"),
}  # fmt: skip
COLORS: dict[str, tuple[str, str]] = {
    "red": ("crimson", "scarlet"), "yellow": ("golden", "lemon"), "green": ("emerald", "mossy"),
    "blue": ("azure", "navy"), "purple": ("violet", "lilac"), "white": ("snowy", "pale"),
    "brown": ("chestnut", "tan"), "black": ("inky", "jet"),
}  # fmt: skip
GROUNDS = {name: phrases["en"] for name, phrases in BACKGROUND_PHRASES.items()}
CAPTION = "a photo of a {color} {shape} {ground}"
# The four manners; each has its own wordings.
MANNERS: dict[str, tuple[str, ...]] = {
    "detailed": ("there is one {shape} here whose color is {color}, and it is {ground}",
                 "the picture shows some {shape}, clearly {color}, placed {ground}"),
    "list": ("{shape}, {color}, {ground}", "{ground} / {color} / {shape}"),
    "natural": ("look, that {shape} {ground} is {color}", "somebody drew the {color} {shape} {ground}"),
    "scenic": ("{ground} one sees something {color}: it is the {shape}",
               "{ground} lies, all {color}, one lonely {shape}"),
}  # fmt: skip
REWORDED = (
    "there is one {shape} here whose color is {color}",
    "{shape}, {color}",
    "look, that {shape} is {color}",
    "one sees something {color}: it is the {shape}",
)
UNSEEN = (
    "my favorite {shape} has always been {color}",
    "{color} paint covers this nice {shape}",
    "which {shape}? the {color} kind",
    "i bought {color} things, among them another {shape}",
)
SEEN_CAPTION = re.compile(r"a photo of a (\w+) (\w+) (.+)")


@dataclass(frozen=True)
class Size:
    """How large the experiment is: pictures, steps at a batch of 256, and other lengths of training."""

    train: int
    test: int
    steps: int
    lengths: tuple[int, ...] = ()
    all_arms: bool = False


SIZES: dict[Budget, Size] = {
    "small": Size(train=2500, test=800, steps=300),
    "full": Size(train=20_000, test=4000, steps=1600, lengths=(400, 6400), all_arms=True),
}
BATCH = 256
LR = 3e-3  # towers as small as these bear it
PAIRS = [(color, shape) for shape in SHAPES for color in COLORS]


class Redescriber:
    """Says a caption in the manner of a pool and in other words; it sees the caption alone.

    `false` is the share of rewrites that add something which the caption does not say.
    """

    def __init__(self, manner: str, false: float = 0.0):
        self.manner, self.false = manner, false

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str]:
        """The caption of each prompt in other words."""
        return [self.say(caption_in(text), Draws(seed)) for text, seed in zip(prompts, seeds, strict=True)]

    def say(self, caption: str, draws: Draws) -> str:
        """One caption in other words.

        Raises:
            DataError: if it is no caption of this experiment.
        """
        found = SEEN_CAPTION.fullmatch(caption)
        if found is None:
            raise DataError(f"{caption!r} is no caption of this experiment")
        color, shape, ground = found.groups()
        names = [
            (name, *others)[draws.integers(3)]
            for name, others in ((color, COLORS[color]), (shape, SHAPES[shape]))
        ]
        wording = MANNERS[self.manner][draws.integers(len(MANNERS[self.manner]))]
        said = wording.format(color=names[0], shape=names[1], ground=ground)
        if draws.random() < self.false:
            said += f", beside a {list(COLORS)[draws.integers(len(COLORS))]} thing"
        return said


def rewrites_of(captions: Mapping[str, str], seed: int, false: float = 0.0) -> dict[str, list[str]]:
    """Four rewrites of every caption by key, one a manner, made by the pipeline."""
    found: dict[str, list[str]] = {key: [] for key in captions}
    for manner in MANNERS:
        pool = Pool(manner, tuple((text, text) for text in list(captions.values())[:16]))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rewrites.jsonl"
            rewrite(captions, out, Redescriber(manner, false), {manner: pool}, seed=seed, batch_size=1024)
            for key, texts in read_rewrites(out).items():
                found[key] += texts
    return found


def edits_of(captions: Mapping[str, str], seed: int) -> dict[str, list[str]]:
    """Four cheaply edited copies of every caption by key."""
    words = sorted({word for caption in captions.values() for word in caption.split()})

    def edited(caption: str, draws: Draws, kind: int) -> str:
        own = caption.split()
        place, other = draws.integers(len(own)), draws.integers(len(own))
        if kind == 0:
            own[place] = words[draws.integers(len(words))]
        elif kind == 1:
            own[place], own[other] = own[other], own[place]
        elif kind == 2:
            del own[place]
        else:
            own.insert(place, words[draws.integers(len(words))])
        return " ".join(own)

    return {
        key: [edited(caption, Draws(seed, key_number(key), kind), kind) for kind in range(4)]
        for key, caption in captions.items()
    }


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; it needs no data."""
    return experiment(seed, SIZES[budget])


@dataclass(frozen=True)
class World:
    """Pictures with captions; cached features (n, w) and labels (n,) of others; the words of all arms."""

    source: Examples
    features: dict[str, Tensor]
    test: Tensor
    labels: Tensor
    captions: dict[str, str]
    rewrites: dict[str, list[str]]
    tokenizer: FileTokenizer


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    world = made(seed, size)
    captions, rewrites = world.captions, world.rewrites
    none: dict[str, list[str]] = {key: [] for key in captions}
    arms: dict[str, Callable[[], Examples | Rewritten]] = {
        "clip": lambda: Rewritten(world.source, none),
        "edits": lambda: Rewritten(world.source, edits_of(captions, seed)),
        "fixed": lambda: with_texts(world.source, {
            key: [captions[key], *texts][Draws(seed, key_number(key)).integers(1 + len(texts))]
            for key, texts in rewrites.items()
        }),
        "laclip": lambda: Rewritten(world.source, rewrites),
    }  # fmt: skip
    if size.all_arms:
        others = dict(
            zip(rewrites, [*list(rewrites.values())[1:], next(iter(rewrites.values()))], strict=True)
        )
        arms |= {
            "one_rewrite": lambda: Rewritten(world.source, {key: t[:1] for key, t in rewrites.items()}),
            "two_rewrites": lambda: Rewritten(world.source, {key: t[:2] for key, t in rewrites.items()}),
            "rewrites_of_others": lambda: Rewritten(world.source, others),
            "without_captions": lambda: with_texts(world.source, rewrites),
            "partly_false": lambda: Rewritten(world.source, rewrites_of(captions, seed, false=0.3)),
        }
    results = {name: measured(seed, size.steps, world, source()) for name, source in arms.items()}
    if size.all_arms:
        everything = TextChoice({"rewrite": None})
        results["all_at_once"] = measured(
            seed, size.steps, world, arms["laclip"](), LaClip("all", fresh=True), everything
        )
    for steps in size.lengths:
        for name in ("clip", "laclip"):
            results[f"{name}_{steps}_steps"] = measured(seed, steps, world, arms[name]())
    for found in results.values():
        found["both"] = mean_of(found)
    details = {f"{name}_{kind}": value for name, found in results.items() for kind, value in found.items()}
    return Outcome(baseline=mean_of(results["clip"]), method=mean_of(results["laclip"]), details=details)


def mean_of(found: Mapping[str, float]) -> float:
    """The mean of wordings B and C."""
    return (found["reworded"] + found["unseen"]) / 2


def with_texts(source: Examples, texts: Mapping[str, str | Sequence[str]]) -> Examples:
    """The source with these texts under `rewrite`, by key."""
    return Examples(replace(one, texts={**one.texts, "rewrite": texts[one.key]}) for one in iterate(source))


def made(seed: int, size: Size) -> World:
    """Everything that the arms share."""
    config = SceneConfig(
        tuple(SHAPES), tuple(COLORS), textures=("plain",), backgrounds=BACKGROUNDS, count=(1, 1)
    )

    def caption(scene: Scene) -> dict[str, str]:
        thing = scene.objects[0]
        return {"alt": CAPTION.format(color=thing.color, shape=thing.shape, ground=GROUNDS[scene.background])}

    train_source = scenes(config, seed, range(size.train), caption, size=64)
    test_source = scenes(config, seed, range(size.train, size.train + size.test), caption, size=64)
    captions = {one.key: str(one.texts["alt"]) for one in iterate(train_source)}
    rewrites = rewrites_of(captions, seed)
    texts = [*captions.values(), *(text for own in rewrites.values() for text in own)]
    return World(
        without_pictures(train_source),
        dict(zip(captions, seedling_features(train_source), strict=True)),
        seedling_features(test_source),
        torch.tensor([label_of(one.extra["scene"]) for one in iterate(test_source)]),
        captions,
        rewrites,
        tokenizer_of(texts, 1024),
    )


def without_pictures(source: Examples) -> Examples:
    """The same examples, whose pictures are cached elsewhere."""
    return Examples(Example(key=one.key, texts=one.texts) for one in iterate(source))


def label_of(scene: Scene) -> int:
    """Which of `PAIRS` a scene shows."""
    return PAIRS.index((scene.objects[0].color, scene.objects[0].shape))


def measured(
    seed: int,
    steps: int,
    world: World,
    source: Examples | Rewritten,
    objective: Objective | None = None,
    texts: Any = ("rewrite",),
) -> dict[str, float]:
    """Train one arm; zero-shot accuracy in the three wordings."""
    sketch = Sketch(world.test.shape[1], world.tokenizer, seed)
    objective = objective or ClipObjective(source="rewrite", fresh=True)
    train(sketch, objective, source, world.features, recipe_for(steps, BATCH, seed, lr=LR), BATCH, texts)

    def accuracy(wordings: Sequence[str], synonyms: bool) -> float:
        """Mean over wordings, and where asked over the two other words of each name."""
        found = []
        for wording in wordings:
            for which in (0, 1) if synonyms else (None,):
                names = [
                    (COLORS[color][which], SHAPES[shape][which]) if which is not None else (color, shape)
                    for color, shape in PAIRS
                ]
                heads = [[wording.format(color=color, shape=shape)] for color, shape in names]
                found.append(sketch.accuracy(world.test, world.labels, heads))
        return sum(found) / len(found)

    return {
        "captions": accuracy(("a photo of a {color} {shape}",), synonyms=False),
        "reworded": accuracy(REWORDED, synonyms=True),
        "unseen": accuracy(UNSEEN, synonyms=False),
    }


PROOF = Proof(
    slug="laclip",
    claim="Texts drawn at each visit from a caption and its rewrites make a model understand new wordings "
    "better than the captions alone do.",
    baseline="CLIP on the captions",
    method="CLIP on captions and four rewrites, drawn at each visit",
    metric="zero-shot top-1, mean of reworded class texts and of wordings in neither captions nor rewrites",
    run=run,
    controls={
        "edits_both": "another's words: edits of the caption itself",
        "fixed_both": "variation: each picture keeps one of the texts",
    },
)
