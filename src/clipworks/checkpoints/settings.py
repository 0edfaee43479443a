"""What the weights of a file cannot say, who says it, and what happens when two disagree.

Three may speak: the file's own config, the table of known models, and the caller. What two of them say must
agree; nothing is overruled in silence, because a wrong activation or a wrong mean gives plausible numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clipworks.core.config import CLIP_MEAN, CLIP_STD, Activation, Config, ResNetConfig, VisionConfig
from clipworks.errors import CheckpointError, ConfigError

Triple = tuple[float, float, float]
Statistics = Literal["clip", "half"] | tuple[Triple, Triple]
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS: dict[str, tuple[Triple, Triple]] = {"clip": (CLIP_MEAN, CLIP_STD), "half": (HALF, HALF)}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Settings:
    """What shapes cannot say. None means: not said.

    `text_activation` and `text_norm_eps` are None where the text tower has the image tower's.
    """

    activation: Activation | None = None
    text_activation: Activation | None = None
    image_heads: int | None = None
    text_heads: int | None = None
    norm_eps: float | None = None
    text_norm_eps: float | None = None
    mean: Triple | None = None
    std: Triple | None = None
    resize: Literal["shortest", "squash", "longest"] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    text_mask: Literal["causal", "none"] | None = None


@dataclass(frozen=True)
class Words:
    """How a file's texts become ids, as far as its config says.

    Attributes:
        kind: `clip` for CLIP's own vocabulary, `file` for a `tokenizer.json` beside the weights.
        clean: how a text is cleaned before; None for what the tokenizer's files say.
        full: every text is filled up to the context and read at its last position.
        end: the id that must end every text; None if nothing is said.
        largest: a text is read at its largest id, which must then be the end.
    """

    kind: Literal["clip", "file"]
    clean: Literal["clip", "siglip", "lower", "none"] | None = None
    full: bool = False
    end: int | None = None
    largest: bool = False


@dataclass(frozen=True)
class Stated:
    """What one source says.

    Attributes:
        source: a file's path, or how else to name it in a message.
        settings: what shapes cannot say.
        claims: what shapes say too: a fact (see `geometry.facts`) to the config's key and its value.
        words: how texts become ids; None if nothing is said.
        name: the model's name, if it has one.
    """

    source: str
    settings: Settings = Settings()
    claims: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    words: Words | None = None
    name: str = ""


# Of a layout that only one training code writes, that code says what shapes do not.
_SLIP = Settings(
    activation="gelu",  # the towers differ
    text_activation="quick_gelu",
    text_heads=8,
    norm_eps=1e-6,
    text_norm_eps=1e-5,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    resize="shortest",
    interpolation="bilinear",
)
BY_LAYOUT: dict[str, Stated] = {
    "slip": Stated("SLIP's training code", _SLIP),
    "laclip": Stated("LaCLIP's training code", _SLIP),
}


def from_config(config: Config, source: str, *, sizes: bool = True) -> Stated:
    """What a complete Config says; without `sizes` neither image size nor context length is claimed."""
    from clipworks.checkpoints.geometry import facts

    image, text = config.image, config.text
    vision = isinstance(image, VisionConfig)
    claims = {fact: (fact, value) for fact, value in facts(config).items()}
    if not sizes:
        del claims["image.size"], claims["text.length"]
    return Stated(
        source,
        Settings(
            activation=image.activation if isinstance(image, VisionConfig) else text.activation,
            text_activation=text.activation,
            image_heads=image.heads if isinstance(image, ResNetConfig) else image.blocks[0].heads,
            text_heads=text.blocks[0].heads,
            norm_eps=image.norm_eps if isinstance(image, VisionConfig) and vision else text.norm_eps,
            text_norm_eps=text.norm_eps,
            mean=image.mean,
            std=image.std,
            resize=config.preprocessing.resize,
            interpolation=config.preprocessing.interpolation,
            text_mask="none" if text.mask == "none" else "causal",
        ),
        claims,
        name=config.name,
    )


def from_caller(
    activation: str | None = None, statistics: Statistics | None = None, heads: tuple[int, int] | None = None
) -> Stated:
    """What the caller of `load` says.

    Raises:
        ConfigError: for an unknown activation, statistics that are no two triples, or heads below one.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    mean: Triple | None = None
    std: Triple | None = None
    if statistics is not None:
        try:
            mean, std = (
                STATISTICS[statistics] if isinstance(statistics, str) else (triple(one) for one in statistics)
            )
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                'statistics must be "clip", "half" or a mean and a deviation of three numbers each, '
                f"not {statistics!r}"
            ) from None
    if heads is not None and (len(heads) != 2 or min(heads) < 1):
        raise ConfigError(
            f"heads must be two numbers, of the image tower and of the text tower, not {heads!r}"
        )
    image_heads, text_heads = heads or (None, None)
    settings = Settings(
        activation=activation,  # type: ignore[arg-type]
        text_activation=activation,  # type: ignore[arg-type]
        image_heads=image_heads,
        text_heads=text_heads,
        mean=mean,
        std=std,
    )
    return Stated("the arguments", settings)


def triple(values: Any) -> Triple:
    """Three numbers as floats.

    Raises:
        ValueError: if they are not three.
        TypeError: if they are not numbers.
    """
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def merged(stated: Sequence[Stated], file: str) -> Settings:
    """All that is said, of which no two may disagree.

    Raises:
        CheckpointError: naming the setting, both values and who says them.
    """
    found: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for one in stated:
        for name, value in dataclasses.asdict(one.settings).items():
            if value is None:
                continue
            if name in found and not _equal(found[name], value):
                raise CheckpointError(
                    f"{file}: {name} is {found[name]} in {said_by[name]}, but {value} in {one.source}; "
                    "one of them is wrong"
                )
            if name not in found:
                found[name], said_by[name] = value, one.source
    return Settings(**found)


def check_claims(
    stated: Sequence[Stated], found: Mapping[str, Any], file: str, but: Sequence[str] = ()
) -> None:
    """The configs' numbers must be those of the weights.

    Args:
        found: `geometry.facts` of the weights.
        but: facts that the caller has changed on purpose.

    Raises:
        CheckpointError: naming the config, its key, and both values.
    """
    for one in stated:
        for fact, (key, value) in one.claims.items():
            if fact not in but and fact in found and found[fact] != value:
                raise CheckpointError(
                    f"{file}: {key} is {value} in {one.source}, but the weights have {found[fact]}"
                )
            if fact not in found:
                raise CheckpointError(f"{file}: {one.source} has {key}, of which these weights have nothing")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        # Some configs are written with fewer digits than others.
        return len(one) == len(other) and all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))
    return bool(one == other)
