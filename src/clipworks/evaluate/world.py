"""What a Clip knows of the generated world: attributes named zero-shot, captions told from their swaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.data.world.captions import Claim, describe, say
from clipworks.data.world.dataset import WorldScenes
from clipworks.data.world.scenes import ATTRIBUTES, COLORS, SHAPES, SceneConfig
from clipworks.data.world.words import Thing
from clipworks.errors import ConfigError, nearest
from clipworks.evaluate.zeroshot import zero_shot_features

Swap = Literal["attribute", "relation"]
# Of a world that no training of ours shows: those start from seed 0.
SEED = 7_000_000


@dataclass(frozen=True)
class Known:
    """How much of something is known.

    Attributes:
        accuracy: in [0, 1].
        chance: what guessing gives.
        samples: pictures asked about.
    """

    accuracy: float
    chance: float
    samples: int


def attribute_texts(attribute: str, language: str = "en") -> list[list[str]]:
    """Captions of one thing for each value of an attribute, over 36 things that differ in all else.

    Raises:
        ConfigError: if there is no such attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ConfigError(
            f"attribute {attribute!r} is none of {', '.join(ATTRIBUTES)}{nearest(attribute, ATTRIBUTES)}"
        )
    things = [(SHAPES[i % len(SHAPES)], COLORS[5 * i % len(COLORS)]) for i in range(36)]
    return [
        list(dict.fromkeys(say(_claim(attribute, value, shape, color), language) for shape, color in things))
        for value in ATTRIBUTES[attribute]
    ]


def _claim(attribute: str, value: str, shape: str, color: str) -> Claim:
    looks: dict[str, Any] = {"shape": shape, "color": color, "texture": None, "size": None}
    if attribute in looks and value != "plain":  # a caption leaves unsaid that a thing is plain
        looks[attribute] = value
    where = {attribute: value} if attribute in ("background", "style") else {}
    return Claim((Thing(**looks),), **where)


def attributes(
    clip: Clip,
    names: Sequence[str] = tuple(ATTRIBUTES),
    *,
    config: SceneConfig | None = None,
    language: str = "en",
    count: int = 1000,
    seed: int = SEED,
) -> dict[str, Known]:
    """Zero-shot accuracy on attributes of scenes with one thing in them.

    Args:
        clip: the model.
        names: of attributes.
        config: which scenes; by default all, with one thing.
        language: of the captions that stand for the values.
        count: how many scenes.
        seed: which world.
    """
    world = WorldScenes(
        config or SceneConfig(count=(1, 1)), seed, count, clip.config.image.image_size, sources=()
    )
    scenes = [world.scene(i) for i in range(count)]
    vectors = clip.embed_images([world[i].image for i in range(count)])
    found = {}
    for name in names:
        values = ATTRIBUTES[name]
        texts = clip.class_features(attribute_texts(name, language), templates=("{}",))
        owners = [scene if name in ("background", "style") else scene.objects[0] for scene in scenes]
        labels = torch.tensor([values.index(getattr(owner, name)) for owner in owners])
        top1, _, _ = zero_shot_features(vectors, labels.to(vectors.device), texts)
        found[name] = Known(top1, 1 / len(values), count)
    return found


def swaps(clip: Clip, kind: Swap, *, count: int = 1000, seed: int = SEED) -> Known:
    """How often a true caption is closer to its picture than the same caption with something exchanged.

    Args:
        clip: the model.
        kind: `attribute`: a thing's shape, color, texture or size is another's or another; `relation`: two
            things are related the other way round.
        count: how many scenes, of two or three things.
        seed: which world.
    """
    world = WorldScenes(SceneConfig(count=(2, 3)), seed, count, clip.config.image.image_size, sources=())
    true, false = (
        ("short", "negative-attribute") if kind == "attribute" else ("relation", "negative-relation")
    )
    scenes = [world.scene(i) for i in range(count)]
    vectors = clip.embed_images([world[i].image for i in range(count)])
    right, wrong = (
        clip.embed_texts([describe(scene, sort) for scene in scenes]).to(vectors) for sort in (true, false)
    )
    return Known(float(_preferred(vectors, right, wrong).mean()), 0.5, count)


def _preferred(vectors: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """(n,): 1 where the right text is closer, 1/2 where neither is."""
    difference = (vectors * (right - wrong)).sum(dim=1)
    return (difference.sign() + 1) / 2


def report(clip: Clip, languages: Sequence[str] = ("en",), count: int = 1000) -> Iterator[dict[str, Any]]:
    """Rows of everything: `{what, language, accuracy, chance, samples}`."""
    for language in languages:
        for name, known in attributes(clip, language=language, count=count).items():
            yield {"what": name, "language": language, **vars(known)}
    for kind in ("attribute", "relation"):
        yield {"what": f"{kind} swap", "language": "en", **vars(swaps(clip, kind, count=count))}  # type: ignore[arg-type]
