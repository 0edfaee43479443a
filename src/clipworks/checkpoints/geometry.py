"""The geometry of a CLIP read off the shapes of its weights.

Widths, depths, patch and context follow from shapes. Three things do not: how many heads a width is cut
into (64 wide unless somebody says otherwise), the activation, and the eps of the norms. They come in as
`Hints`, from the file's own config or the table of known models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from clipworks.checkpoints.layouts import Layout
from clipworks.core.config import (
    CLIP_MEAN,
    CLIP_STD,
    Activation,
    BlockConfig,
    Config,
    PreprocessingConfig,
    ResNetConfig,
    TextConfig,
    TokenizerConfig,
    VisionConfig,
)
from clipworks.errors import CheckpointError


@dataclass(frozen=True)
class Hints:
    """What shapes cannot say. None means: as the layout usually has it."""

    activation: Activation | None = None
    text_activation: Activation | None = None
    image_heads: int | None = None
    text_heads: int | None = None
    norm_eps: float | None = None
    text_norm_eps: float | None = None
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    text_mask: str | None = None
    tokenizer: TokenizerConfig | None = None
    preprocessing: PreprocessingConfig | None = None
    name: str = ""


def geometry(layout: Layout, weights: Mapping[str, Tensor], hints: Hints, source: str) -> Config:
    """The Config of cleaned weights.

    Raises:
        CheckpointError: naming the tensor whose shape contradicts another or the hints.
    """
    shapes = Shapes(weights, source)
    if layout == "transformers":
        return _transformers(shapes, hints)
    sigmoid = "logit_bias" in weights
    prefix = "" if layout == "openai" else "text."
    text = _text(shapes, hints, prefix, siglip=layout == "siglip")
    if layout == "siglip":
        image: VisionConfig | ResNetConfig = _timm(shapes, hints)
        width = image.width
    elif "visual.layer1.0.conv1.weight" in weights:
        image = _resnet(shapes, hints)
        width = shapes.of("visual.attnpool.c_proj.weight", 2)[0]
    else:
        image = _openai_vision(shapes, hints)
        width = shapes.of("visual.proj", 2)[1]
    return Config(
        width=width,
        image=image,
        text=text,
        sigmoid=sigmoid,
        tokenizer=hints.tokenizer or TokenizerConfig(),
        preprocessing=hints.preprocessing or PreprocessingConfig(resize="squash" if layout == "siglip" else "shortest"),
        name=hints.name,
    )


class Shapes:
    """Shapes by name, with errors that say which file and which tensor."""

    def __init__(self, weights: Mapping[str, Tensor], source: str):
        self.weights = weights
        self.source = source

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that must have so many dimensions.

        Raises:
            CheckpointError: if it is missing or has another number.
        """
        if name not in self.weights:
            raise CheckpointError(f"{self.source}: the tensor {name} is missing")
        shape = tuple(self.weights[name].shape)
        if len(shape) != dimensions:
            raise CheckpointError(f"{self.source}: {name} has shape {shape}, expected {dimensions} dimensions")
        return shape

    def depth(self, pattern: str) -> int:
        """How many numbered parts there are: `pattern` holds one group, the number."""
        found = {int(match[1]) for name in self.weights if (match := re.match(pattern, name))}
        if found != set(range(len(found))):
            gap = min(set(range(len(found))) - found)
            raise CheckpointError(f"{self.source}: block {gap} of {pattern} is missing")
        return len(found)

    def square(self, cells: int, name: str) -> int:
        """The side of a square of so many cells.

        Raises:
            CheckpointError: if it is none.
        """
        side = round(cells**0.5)
        if side * side != cells:
            raise CheckpointError(f"{self.source}: {name} has {cells} places, which is no square grid")
        return side

    def heads(self, width: int, given: int | None, what: str) -> int:
        """The number of heads: as given, else 64 wide.

        Raises:
            CheckpointError: if the width is not divisible.
        """
        heads = given or max(1, width // 64)
        if width % heads:
            raise CheckpointError(f"{self.source}: the {what} width {width} cannot be cut into {heads} heads")
        return heads


def _blocks(shapes: Shapes, depth: int, width: int, heads: int, name: str) -> tuple[BlockConfig, ...]:
    return tuple(
        BlockConfig(heads, width // heads, shapes.of(name.format(i), 2)[0]) for i in range(depth)
    )


def _image_size(shapes: Shapes, grid: int, patch: int, hints: Hints) -> int:
    size = grid * patch
    # A grid may leave some pixels over (384 into patches of 14); the hint then has the true size.
    if hints.image_size and hints.image_size // patch != grid:
        raise CheckpointError(
            f"{shapes.source}: an image size of {hints.image_size} gives {hints.image_size // patch} patches a side, "
            f"the position table has {grid}"
        )
    return size


def _statistics(hints: Hints, siglip: bool) -> dict[str, tuple[float, float, float]]:
    half = (0.5, 0.5, 0.5)
    return {
        "mean": hints.mean or (half if siglip else CLIP_MEAN),
        "std": hints.std or (half if siglip else CLIP_STD),
    }


def _openai_vision(shapes: Shapes, hints: Hints) -> VisionConfig:
    width, _, patch, _ = shapes.of("visual.conv1.weight", 4)
    places = shapes.of("visual.positional_embedding", 2)[0]
    grid = shapes.square(places - 1, "visual.positional_embedding")
    depth = shapes.depth(r"visual\.transformer\.resblocks\.(\d+)\.")
    heads = shapes.heads(width, hints.image_heads, "image")
    return VisionConfig(
        image_size=_image_size(shapes, grid, patch, hints),
        patch_size=patch,
        width=width,
        blocks=_blocks(shapes, depth, width, heads, "visual.transformer.resblocks.{}.mlp.c_fc.weight"),
        activation=hints.activation or "gelu",
        norm_eps=hints.norm_eps or 1e-5,
        **_statistics(hints, False),
    )


def _resnet(shapes: Shapes, hints: Hints) -> ResNetConfig:
    width = shapes.of("visual.layer1.0.conv1.weight", 4)[0]
    places, channels = shapes.of("visual.attnpool.positional_embedding", 2)
    grid = shapes.square(places - 1, "visual.attnpool.positional_embedding")
    layers = tuple(shapes.depth(rf"visual\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    return ResNetConfig(
        image_size=_image_size(shapes, grid, 32, hints),
        layers=layers,  # type: ignore[arg-type]
        width=width,
        heads=shapes.heads(channels, hints.image_heads, "pool"),
        **_statistics(hints, False),
    )


def _timm(shapes: Shapes, hints: Hints) -> VisionConfig:
    trunk = "visual.trunk"
    width, _, patch, _ = shapes.of(f"{trunk}.patch_embed.proj.weight", 4)
    grid = shapes.square(shapes.of(f"{trunk}.pos_embed", 3)[1], f"{trunk}.pos_embed")
    depth = shapes.depth(r"visual\.trunk\.blocks\.(\d+)\.")
    heads = shapes.heads(width, hints.image_heads, "image")
    return _siglip_vision(
        shapes, hints, width, patch, grid, _blocks(shapes, depth, width, heads, trunk + ".blocks.{}.mlp.fc1.weight")
    )


def _siglip_vision(
    shapes: Shapes, hints: Hints, width: int, patch: int, grid: int, blocks: tuple[BlockConfig, ...]
) -> VisionConfig:
    return VisionConfig(
        image_size=_image_size(shapes, grid, patch, hints),
        patch_size=patch,
        width=width,
        blocks=blocks,
        activation=hints.activation or "gelu_tanh",
        norm_eps=hints.norm_eps or 1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        pooling="attention",
        projection=False,
        **_statistics(hints, True),
    )


def _text(shapes: Shapes, hints: Hints, prefix: str, siglip: bool) -> TextConfig:
    vocabulary, width = shapes.of(f"{prefix}token_embedding.weight", 2)
    length = shapes.of(f"{prefix}positional_embedding", 2)[0]
    depth = shapes.depth(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    heads = shapes.heads(width, hints.text_heads, "text")
    biased = f"{prefix}text_projection.bias" in shapes.weights
    return TextConfig(
        context_length=length,
        vocab_size=vocabulary,
        width=width,
        blocks=_blocks(shapes, depth, width, heads, prefix + "transformer.resblocks.{}.mlp.c_fc.weight"),
        activation=hints.text_activation or hints.activation or ("gelu_tanh" if siglip else "gelu"),
        norm_eps=hints.text_norm_eps or hints.norm_eps or (1e-6 if siglip else 1e-5),
        mask=hints.text_mask or ("none" if siglip else "causal"),  # type: ignore[arg-type]
        projection="biased" if biased else "linear",
    )


def _transformers(shapes: Shapes, hints: Hints) -> Config:
    embeddings = "vision_model.embeddings"
    siglip = "vision_model.head.probe" in shapes.weights
    width, _, patch, _ = shapes.of(f"{embeddings}.patch_embedding.weight", 4)
    places = shapes.of(f"{embeddings}.position_embedding.weight", 2)[0]
    grid = shapes.square(places - (not siglip), f"{embeddings}.position_embedding.weight")
    depth = shapes.depth(r"vision_model\.encoder\.layers\.(\d+)\.")
    heads = shapes.heads(width, hints.image_heads, "image")
    blocks = _blocks(shapes, depth, width, heads, "vision_model.encoder.layers.{}.mlp.fc1.weight")
    if siglip:
        image, out = _siglip_vision(shapes, hints, width, patch, grid, blocks), width
    else:
        image = VisionConfig(
            image_size=_image_size(shapes, grid, patch, hints),
            patch_size=patch,
            width=width,
            blocks=blocks,
            activation=hints.activation or "quick_gelu",
            norm_eps=hints.norm_eps or 1e-5,
            **_statistics(hints, False),
        )
        out = shapes.of("visual_projection.weight", 2)[0]
    vocabulary, text_width = shapes.of("text_model.embeddings.token_embedding.weight", 2)
    text_depth = shapes.depth(r"text_model\.encoder\.layers\.(\d+)\.")
    text_heads = shapes.heads(text_width, hints.text_heads, "text")
    text = TextConfig(
        context_length=shapes.of("text_model.embeddings.position_embedding.weight", 2)[0],
        vocab_size=vocabulary,
        width=text_width,
        blocks=_blocks(shapes, text_depth, text_width, text_heads, "text_model.encoder.layers.{}.mlp.fc1.weight"),
        activation=hints.text_activation or hints.activation or ("gelu_tanh" if siglip else "quick_gelu"),
        norm_eps=hints.text_norm_eps or hints.norm_eps or (1e-6 if siglip else 1e-5),
        mask=hints.text_mask or ("none" if siglip else "causal"),  # type: ignore[arg-type]
        projection="biased" if siglip else "linear",
    )
    return Config(
        width=out,
        image=image,
        text=text,
        sigmoid=siglip,
        tokenizer=hints.tokenizer or TokenizerConfig(),
        preprocessing=hints.preprocessing or PreprocessingConfig(resize="squash" if siglip else "shortest"),
        name=hints.name,
    )
