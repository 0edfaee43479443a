"""The geometry of a CLIP, as frozen dataclasses that map one to one onto JSON.

Nothing here imports torch, so a list of models can be shown without loading it. Every block of a
tower has an entry of its own, so that a pruned tower is an ordinary one. Sources of the defaults:
Radford et al. 2021 and the published `clip/model.py`; SigLIP's from Zhai et al. 2023.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from clipworks.errors import ConfigError, nearest

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class BlockConfig:
    """One transformer block: `heads` of `head_width` each, and the hidden width of its MLP."""

    heads: int
    head_width: int
    mlp_width: int


def uniform_blocks(
    depth: int, width: int, heads: int | None = None, mlp_ratio: float = 4.0
) -> tuple[BlockConfig, ...]:
    """`depth` equal blocks; heads are `width / 64` wide unless their number is given.

    Raises:
        ConfigError: if the width is not divisible by the number of heads.
    """
    heads = heads or max(1, width // 64)
    if width % heads:
        raise ConfigError(f"a width of {width} cannot be divided into {heads} heads")
    return (BlockConfig(heads, width // heads, int(width * mlp_ratio)),) * depth


@dataclass(frozen=True)
class StemStage:
    """A stage of a convolutional stem: one 3x3 convolution of stride 2, then `depth` residual pairs."""

    width: int
    depth: int = 0


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer.

    `stem` empty means the reference's single convolution of `patch_size`; otherwise the stages halve
    the picture one after the other and `patch_size` must be two to the number of stages. `qk_norm` puts
    a norm over each head's queries and keys.
    """

    image_size: int
    patch_size: int
    width: int
    blocks: tuple[BlockConfig, ...]
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    pooling: Literal["class", "mean", "attention"] = "class"
    projection: bool = True
    stem: tuple[StemStage, ...] = ()
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.stem and 2 ** len(self.stem) != self.patch_size:
            raise ConfigError(
                f"a stem of {len(self.stem)} stages has a stride of {2 ** len(self.stem)}, "
                f"but patch_size is {self.patch_size}"
            )
        if self.pooling == "class" and not self.class_token:
            raise ConfigError('pooling="class" needs class_token=True')

    @property
    def grid(self) -> int:
        """Patches along one side at the tower's own image size."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ResNetConfig:
    """CLIP's ModifiedResNet: bottlenecks a stage, width of the first stage, heads of the pool."""

    image_size: int
    layers: tuple[int, int, int, int]
    width: int
    heads: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.image_size % 32:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of 32, the stride of a ResNet")

    @property
    def grid(self) -> int:
        """Cells along one side of the last stage at the tower's own image size."""
        return self.image_size // 32


@dataclass(frozen=True)
class TextConfig:
    """A text transformer.

    `mask` says which tokens a token may look at: those before it (`causal`), those that are not
    padding (`padding`), or all of them, padding included (`none`, as SigLIP was trained).
    `projection` is a matrix (`linear`), a matrix with a bias (`biased`) or absent (`none`).
    """

    context_length: int
    vocab_size: int
    width: int
    blocks: tuple[BlockConfig, ...]
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    mask: Literal["causal", "padding", "none"] = "causal"
    projection: Literal["linear", "biased", "none"] = "linear"


@dataclass(frozen=True)
class TokenizerConfig:
    """How strings become ids: CLIP's own vocabulary, or a `tokenizer.json` with its settings."""

    kind: Literal["clip", "file"] = "clip"
    start: int | None = None
    end: int | None = None
    pad: int = 0
    pad_full: bool = False
    clean: Literal["clip", "siglip", "lower", "none"] = "clip"
    fingerprint: str | None = None


@dataclass(frozen=True)
class PreprocessingConfig:
    """How a picture becomes a square of pixels; its side is the image tower's `image_size`."""

    resize: Literal["shortest", "squash", "longest"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class Config:
    """A whole CLIP. `width` is D, the number of features of an embedding."""

    width: int
    image: VisionConfig | ResNetConfig
    text: TextConfig
    sigmoid: bool = False
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    name: str = ""

    def __post_init__(self) -> None:
        for label, tower in (("image", self.image), ("text", self.text)):
            projected = getattr(tower, "projection", True) not in (False, "none")
            if not projected and tower.width != self.width:
                raise ConfigError(
                    f"the {label} tower has no projection, so its width {tower.width} must equal {self.width}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON; the inverse of `from_dict`."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from what `to_dict` gave.

        Raises:
            ConfigError: on an unknown or missing key (with the nearest name) or a value of the wrong kind.
        """
        return build(cls, values)


T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], place: str = "") -> T:
    """Make a dataclass from a mapping, strictly: unknown keys, missing keys and wrong kinds are errors.

    Raises:
        ConfigError: naming the place of the fault, `image.blocks[3].heads` for instance.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place or cls.__name__}: expected a mapping, found {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{_join(place, key)}: unknown key{nearest(key, fields)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _coerce(hints[name], values[name], _join(place, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(place, name)}: missing")
    return cls(**arguments)


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _coerce(hint: Any, value: Any, place: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, place)  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(options, value, place)
    if origin is Literal:
        if value not in options:
            raise ConfigError(f"{place}: {value!r} is none of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{place}: expected a list, found {value!r}")
        variadic = len(options) == 2 and options[1] is Ellipsis
        if not variadic and len(options) != len(value):
            raise ConfigError(f"{place}: expected {len(options)} values, found {len(value)}")
        inner = (options[0],) * len(value) if variadic else options
        return tuple(
            _coerce(h, v, f"{place}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place}: expected keys and values, found {value!r}")
        return {key: _coerce(options[1], held, _join(place, str(key))) for key, held in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{place}: expected {hint.__name__}, found {value!r}")
    return value


def _coerce_union(options: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in options:
        return None
    reasons = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _coerce(option, value, place)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(reasons[0])


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
