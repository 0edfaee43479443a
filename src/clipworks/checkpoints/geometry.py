"""The geometry of a CLIP read off the shapes of its weights.

Widths, depths, patch and context follow from shapes. Other things do not: into how many heads a width is
cut, the activation, mean and deviation of the pixels. A file that does not say them is not guessed at; they
come in as `Settings`, from the file's own config, the table of known models or the caller (see `settings`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from clipworks.checkpoints.layouts import TIMM_VISUAL, Layout
from clipworks.checkpoints.settings import Settings
from clipworks.core.config import (
    BlockConfig,
    Config,
    PreprocessingConfig,
    ResNetConfig,
    TextConfig,
    VisionConfig,
)
from clipworks.errors import CheckpointError, ConfigError

T = TypeVar("T")
HEADS = "into how many heads it is cut"
# Of the image towers of SLIP's training code, by their width.
SLIP_HEADS = {384: 12, 768: 12, 1024: 16}


def geometry(
    layout: Layout, weights: Mapping[str, Tensor], settings: Settings, source: str, name: str = ""
) -> Config:
    """The Config of cleaned weights of any shape; its tokenizer is left at the default.

    Raises:
        CheckpointError: naming the tensor whose shape contradicts another, or what nobody said.
    """
    shapes = Shapes(weights, source)
    if layout == "slip" and settings.image_heads is None:
        width = shapes.of("visual.patch_embed.proj.weight", 4)[0]
        settings = replace(settings, image_heads=SLIP_HEADS.get(width))
    check_complete(settings, layout, shapes)
    try:
        image, width = _image(layout, shapes, settings)
        text = (
            _transformers_text(shapes, settings)
            if layout == "transformers"
            else _text(layout, shapes, settings)
        )
        siglip = isinstance(image, VisionConfig) and image.pooling == "attention"
        return Config(
            width=width,
            image=image,
            text=text,
            sigmoid="logit_bias" in weights,
            preprocessing=PreprocessingConfig(
                resize=settings.resize or ("squash" if siglip else "shortest"),
                interpolation=settings.interpolation or "bicubic",
            ),
            name=name,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def check_complete(settings: Settings, layout: Layout, shapes: Shapes) -> None:
    """What has no safe default must have been said.

    Raises:
        CheckpointError: naming all that is missing, and the arguments that say it.
    """
    missing, arguments = [], []
    if settings.activation is None:
        missing.append("its activation")
        arguments.append('activation="quick_gelu" or "gelu"')
    if settings.mean is None or settings.std is None:
        missing.append("mean and deviation of its pictures")
        arguments.append('statistics="clip" or "half"')
    # Norms on queries and keys say by their shape how wide a head of that tower is.
    if settings.text_heads is None or (settings.image_heads is None and layout != "laclip"):
        missing.append(HEADS)
        arguments.append("heads=(image, text)")
    if missing:
        raise CheckpointError(
            f"{shapes.source}: the file does not say {', '.join(missing)}, and a wrong guess gives wrong "
            'answers without an error: pass like="NAME", a known model whose settings it shares, or '
            f"{', '.join(arguments)}"
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
            raise CheckpointError(
                f"{self.source}: {name} has shape {shape}, expected {dimensions} dimensions"
            )
        return shape

    def depth(self, pattern: str) -> int:
        """How many numbered parts there are: `pattern` holds one group, the number.

        Raises:
            CheckpointError: if one in between is missing.
        """
        found = {int(match[1]) for name in self.weights if (match := re.match(pattern, name))}
        if found != set(range(len(found))):
            gap = min(set(range(len(found))) - found)
            where = pattern.replace("\\", "").replace("(d+)", str(gap))
            raise CheckpointError(f"{self.source}: {where}* is missing, though there are higher numbers")
        return len(found)

    def square(self, cells: int, name: str) -> int:
        """The side of a square of so many cells.

        Raises:
            CheckpointError: if it is none.
        """
        side = round(max(cells, 0) ** 0.5)
        if cells < 1 or side * side != cells:
            raise CheckpointError(
                f"{self.source}: {name} has {cells} places for patches, which is no square grid"
            )
        return side

    def blocks(
        self, depth: int, width: int, heads: int | None, what: str, mlp: str
    ) -> tuple[BlockConfig, ...]:
        """One entry a block; `mlp` names the weight of the entrance of block {}'s MLP.

        Raises:
            CheckpointError: if the width cannot be cut into so many heads.
        """
        if not heads or width % heads:
            raise CheckpointError(f"{self.source}: the {what} width {width} cannot be cut into {heads} heads")
        return tuple(BlockConfig(heads, width // heads, self.of(mlp.format(i), 2)[0]) for i in range(depth))


def _image(layout: Layout, shapes: Shapes, settings: Settings) -> tuple[VisionConfig | ResNetConfig, int]:
    """The image tower, and D."""
    if layout == "transformers":
        return _transformers_vision(shapes, settings)
    if layout == "siglip":
        image = _timm(shapes, settings)
        return image, image.width
    if layout in TIMM_VISUAL:
        return _timm_visual(layout, shapes, settings), shapes.of("image_projection", 2)[1]
    if "visual.layer1.0.conv1.weight" in shapes.weights:
        return _resnet(shapes, settings), shapes.of("visual.attnpool.c_proj.weight", 2)[0]
    return _openai_vision(shapes, settings), shapes.of("visual.proj", 2)[1]


def _openai_vision(shapes: Shapes, settings: Settings) -> VisionConfig:
    width, _, patch, _ = shapes.of("visual.conv1.weight", 4)
    places = shapes.of("visual.positional_embedding", 2)[0]
    grid = shapes.square(places - 1, "visual.positional_embedding")
    depth = shapes.depth(r"visual\.transformer\.resblocks\.(\d+)\.")
    mlp = "visual.transformer.resblocks.{}.mlp.c_fc.weight"
    return VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        blocks=shapes.blocks(depth, width, settings.image_heads, "image", mlp),
        activation=known(settings.activation),
        norm_eps=settings.norm_eps or 1e-5,
        patch_bias="visual.conv1.bias" in shapes.weights,
        mean=known(settings.mean),
        std=known(settings.std),
    )


def _resnet(shapes: Shapes, settings: Settings) -> ResNetConfig:
    width = shapes.of("visual.layer1.0.conv1.weight", 4)[0]
    places, channels = shapes.of("visual.attnpool.positional_embedding", 2)
    grid = shapes.square(places - 1, "visual.attnpool.positional_embedding")
    first, second, third, fourth = (shapes.depth(rf"visual\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    heads = known(settings.image_heads)
    if channels % heads:
        raise CheckpointError(
            f"{shapes.source}: the pool's width {channels} cannot be cut into {heads} heads"
        )
    return ResNetConfig(
        image_size=grid * 32,
        layers=(first, second, third, fourth),
        width=width,
        heads=heads,
        mean=known(settings.mean),
        std=known(settings.std),
    )


def _timm(shapes: Shapes, settings: Settings) -> VisionConfig:
    trunk = "visual.trunk"
    width, _, patch, _ = shapes.of(f"{trunk}.patch_embed.proj.weight", 4)
    grid = shapes.square(shapes.of(f"{trunk}.pos_embed", 3)[1], f"{trunk}.pos_embed")
    depth = shapes.depth(r"visual\.trunk\.blocks\.(\d+)\.")
    blocks = shapes.blocks(depth, width, settings.image_heads, "image", trunk + ".blocks.{}.mlp.fc1.weight")
    return _siglip_vision(settings, width, patch, grid, blocks)


def _timm_visual(layout: Layout, shapes: Shapes, settings: Settings) -> VisionConfig:
    width, _, patch, _ = shapes.of("visual.patch_embed.proj.weight", 4)
    grid = shapes.square(shapes.of("visual.pos_embed", 3)[1] - 1, "visual.pos_embed")
    depth = shapes.depth(r"visual\.blocks\.(\d+)\.")
    heads = settings.image_heads
    if layout == "laclip":
        head_width = shapes.of("visual.blocks.0.attn.q_norm.weight", 1)[0]
        heads = width // head_width if width % head_width == 0 else None
        if settings.image_heads not in (None, heads):
            raise CheckpointError(
                f"{shapes.source}: norms of {head_width} numbers cannot be those of {settings.image_heads} "
                f"heads in a width of {width}"
            )
    return VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        blocks=shapes.blocks(depth, width, heads, "image", "visual.blocks.{}.mlp.fc1.weight"),
        activation=known(settings.activation),
        norm_eps=settings.norm_eps or 1e-6,
        pre_norm=False,
        patch_bias=True,
        mean=known(settings.mean),
        std=known(settings.std),
        qk_norm=layout == "laclip",
    )


def _siglip_vision(
    settings: Settings, width: int, patch: int, grid: int, blocks: tuple[BlockConfig, ...]
) -> VisionConfig:
    return VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        blocks=blocks,
        activation=known(settings.activation),
        norm_eps=settings.norm_eps or 1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        pooling="attention",
        projection=False,
        mean=known(settings.mean),
        std=known(settings.std),
    )


def _text(layout: Layout, shapes: Shapes, settings: Settings) -> TextConfig:
    prefix, siglip = "" if layout in ("openai", *TIMM_VISUAL) else "text.", layout == "siglip"
    vocabulary, width = shapes.of(f"{prefix}token_embedding.weight", 2)
    depth = shapes.depth(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    mlp = prefix + "transformer.resblocks.{}.mlp.c_fc.weight"
    return TextConfig(
        context_length=shapes.of(f"{prefix}positional_embedding", 2)[0],
        vocab_size=vocabulary,
        width=width,
        blocks=shapes.blocks(depth, width, settings.text_heads, "text", mlp),
        activation=known(settings.text_activation or settings.activation),
        norm_eps=settings.text_norm_eps or settings.norm_eps or (1e-6 if siglip else 1e-5),
        mask=settings.text_mask or ("none" if siglip else "causal"),
        projection="biased" if f"{prefix}text_projection.bias" in shapes.weights else "linear",
    )


def _transformers_vision(shapes: Shapes, settings: Settings) -> tuple[VisionConfig, int]:
    embeddings = "vision_model.embeddings"
    siglip = "vision_model.head.probe" in shapes.weights
    width, _, patch, _ = shapes.of(f"{embeddings}.patch_embedding.weight", 4)
    places = shapes.of(f"{embeddings}.position_embedding.weight", 2)[0]
    grid = shapes.square(places - (not siglip), f"{embeddings}.position_embedding.weight")
    depth = shapes.depth(r"vision_model\.encoder\.layers\.(\d+)\.")
    mlp = "vision_model.encoder.layers.{}.mlp.fc1.weight"
    blocks = shapes.blocks(depth, width, settings.image_heads, "image", mlp)
    if siglip:
        return _siglip_vision(settings, width, patch, grid, blocks), width
    image = VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        blocks=blocks,
        activation=known(settings.activation),
        norm_eps=settings.norm_eps or 1e-5,
        mean=known(settings.mean),
        std=known(settings.std),
    )
    return image, shapes.of("visual_projection.weight", 2)[0]


def _transformers_text(shapes: Shapes, settings: Settings) -> TextConfig:
    siglip = "vision_model.head.probe" in shapes.weights
    vocabulary, width = shapes.of("text_model.embeddings.token_embedding.weight", 2)
    depth = shapes.depth(r"text_model\.encoder\.layers\.(\d+)\.")
    mlp = "text_model.encoder.layers.{}.mlp.fc1.weight"
    return TextConfig(
        context_length=shapes.of("text_model.embeddings.position_embedding.weight", 2)[0],
        vocab_size=vocabulary,
        width=width,
        blocks=shapes.blocks(depth, width, settings.text_heads, "text", mlp),
        activation=known(settings.text_activation or settings.activation),
        norm_eps=settings.text_norm_eps or settings.norm_eps or (1e-6 if siglip else 1e-5),
        mask=settings.text_mask or ("none" if siglip else "causal"),
        projection="biased" if siglip else "linear",
    )


def facts(config: Config) -> dict[str, Any]:
    """What a config says about shapes, by the names under which files' configs are compared with it."""
    image, text = config.image, config.text
    found: dict[str, Any] = {
        "width": config.width,
        "sigmoid": config.sigmoid,
        "image.size": image.image_size,
        "image.width": image.width,
        "text.width": text.width,
        "text.depth": len(text.blocks),
        "text.mlp": text.blocks[0].mlp_width if text.blocks else None,
        "text.length": text.context_length,
        "text.vocabulary": text.vocab_size,
        "text.bias": text.projection == "biased",
        "image.kind": "resnet" if isinstance(image, ResNetConfig) else image.pooling,
    }
    if isinstance(image, ResNetConfig):
        return found | {"image.layers": list(image.layers)}
    return found | {
        "image.depth": len(image.blocks),
        "image.patch": image.patch_size,
        "image.mlp": image.blocks[0].mlp_width if image.blocks else None,
    }


def known(value: T | None) -> T:
    """A setting that `check_complete` has made sure of.

    Raises:
        CheckpointError: if it is None after all.
    """
    if value is None:
        raise CheckpointError("a setting is missing")
    return value
