"""Other tools' names and ours: a tested bijection for each layout.

    openai         openai/CLIP and open_clip's plain `CLIP`: `visual.…`, `transformer.resblocks.N.…`
    custom         open_clip's `CustomTextCLIP`: the same, its text tower under `text.`
    siglip         open_clip's SigLIP: a timm tower under `visual.trunk.`, text under `text.`
    slip           SLIP's training code: a timm tower under `visual.`, `image_projection`, else as openai; its
                   head of the image-image loss (`image_mlp`) is left out, as SLIP itself leaves it out
    laclip         LaCLIP's, which grew from it: norms on q and k besides
    transformers   `CLIPModel` and `SiglipModel`: `vision_model.…`, `text_model.…`

A layout is recognized by its names, and the geometry is read off the shapes; what shapes cannot say
(number of heads of an odd width, activation, norm eps, statistics) comes from the file's own config or from
the table of known models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor

from clipworks.checkpoints.rules import Rule, batch_norm, linear, rule
from clipworks.core.config import Config, ResNetConfig, TextConfig, VisionConfig
from clipworks.errors import CheckpointError

Layout = Literal["openai", "custom", "siglip", "slip", "laclip", "transformers"]
TIMM_VISUAL = ("slip", "laclip")  # a timm tower under `visual.`, and text names without a prefix

# What DataParallel, compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What people's own training modules call the model that they hold.
WHOLE = ("model.", "clip.", "clip_model.")

# Not weights: buffers and geometry that older files carry along.
IGNORED = re.compile(
    r"(^|\.)(attn_mask|input_resolution|context_length|vocab_size|embeddings\.position_ids|position_ids)$"
)


def recognize(names: Mapping[str, Tensor], source: str) -> Layout:
    """The layout of a file by the names in it (its tensors may have any shape).

    Raises:
        CheckpointError: if it is none of these.
    """
    if "visual.trunk.patch_embed.proj.weight" in names:
        return "siglip"
    if "visual.blocks.0.attn.qkv.weight" in names and "image_projection" in names:
        return "laclip" if "visual.blocks.0.attn.q_norm.weight" in names else "slip"
    if "text_model.embeddings.token_embedding.weight" in names:
        return "transformers"
    if "text.token_embedding.weight" in names:
        return "custom"
    if "token_embedding.weight" in names and any(name.startswith("visual.") for name in names):
        return "openai"
    some = ", ".join(sorted(names)[:3])
    raise CheckpointError(
        f"{source}: the names of its weights belong to no layout known here (it has {some} …)"
    )


def clean(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of any shape, without the prefixes of wrappers (`module.`) and without what is no weight.

    Raises:
        CheckpointError: if two names become one.
    """
    bare_names = [WRAPPERS.sub("", name) for name in weights]
    prefix = next((one for one in WHOLE if weights and all(name.startswith(one) for name in bare_names)), "")
    cleaned: dict[str, Tensor] = {}
    for name, bare in zip(weights, bare_names, strict=True):
        bare, tensor = bare.removeprefix(prefix), weights[name]
        if IGNORED.search(bare):
            continue
        if bare in cleaned:
            raise CheckpointError(
                f"{source}: {name} is there twice, with and without the prefix of a wrapper"
            )
        # A 1-D scale of one element is met as often as the 0-D one.
        single = bare in ("logit_scale", "logit_bias") and tensor.numel() == 1
        cleaned[bare] = tensor.reshape(()) if single else tensor
    return cleaned


def without_heads(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any shape, without those of a head that only the training needed."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if layout != "slip" or not name.startswith("image_mlp.")
    }


def rules(layout: Layout, config: Config) -> Iterator[Rule]:
    """All rules of a layout for one geometry.

    Raises:
        CheckpointError: if the layout has no place for this architecture.
    """
    yield rule("scale", "logit_scale")
    if config.sigmoid:
        yield rule("bias", "logit_bias")
    if layout == "transformers":
        yield from _transformers(config)
        return
    if layout == "siglip":
        yield from _timm(_vision(config, layout))
    elif layout in TIMM_VISUAL:
        yield from _timm_visual(_vision(config, layout), layout)
    elif isinstance(config.image, ResNetConfig):
        yield from _resnet(config.image)
    else:
        yield from _openai_vision(_vision(config, layout))
    yield from _openai_text(config.text, "" if layout in ("openai", *TIMM_VISUAL) else "text.")


def _vision(config: Config, layout: str) -> VisionConfig:
    image = config.image
    if not isinstance(image, VisionConfig) or image.stem or image.qk_norm != (layout == "laclip"):
        raise CheckpointError(f"the layout {layout} has no place for this image tower")
    return image


def _openai_vision(image: VisionConfig) -> Iterator[Rule]:
    if image.pooling != "class" or not image.pre_norm or not image.projection:
        raise CheckpointError(
            "this layout has no place for an image tower without class token, first norm or projection"
        )
    yield rule("image.patches.weight", "visual.conv1.weight")
    if image.patch_bias:
        yield rule("image.patches.bias", "visual.conv1.bias")
    yield rule("image.class_token", "visual.class_embedding")
    yield rule("image.positions", "visual.positional_embedding")
    yield from linear("image.ln_pre", "visual.ln_pre")
    yield from linear("image.ln_post", "visual.ln_post")
    yield rule("image.projection.weight", "visual.proj", change="transposed")
    for i in range(len(image.blocks)):
        yield from _openai_block(f"image.blocks.{i}", f"visual.transformer.resblocks.{i}")


def _openai_text(text: TextConfig, prefix: str) -> Iterator[Rule]:
    yield rule("text.embedding.weight", f"{prefix}token_embedding.weight")
    yield rule("text.positions", f"{prefix}positional_embedding")
    yield from linear("text.ln_final", f"{prefix}ln_final")
    if text.projection == "linear":
        yield rule("text.projection.weight", f"{prefix}text_projection", change="transposed")
    elif text.projection == "biased":
        yield from linear("text.projection", f"{prefix}text_projection")
    for i in range(len(text.blocks)):
        yield from _openai_block(f"text.blocks.{i}", f"{prefix}transformer.resblocks.{i}")


def _openai_block(ours: str, theirs: str) -> Iterator[Rule]:
    yield from linear(f"{ours}.ln_1", f"{theirs}.ln_1")
    yield rule(f"{ours}.attention.qkv.weight", f"{theirs}.attn.in_proj_weight")
    yield rule(f"{ours}.attention.qkv.bias", f"{theirs}.attn.in_proj_bias")
    yield from linear(f"{ours}.attention.out", f"{theirs}.attn.out_proj")
    yield from linear(f"{ours}.ln_2", f"{theirs}.ln_2")
    yield from linear(f"{ours}.mlp.fc", f"{theirs}.mlp.c_fc")
    yield from linear(f"{ours}.mlp.proj", f"{theirs}.mlp.c_proj")


def _resnet(image: ResNetConfig) -> Iterator[Rule]:
    for n in (1, 2, 3):
        yield rule(f"image.stem.conv_{n}.weight", f"visual.conv{n}.weight")
        yield from batch_norm(f"image.stem.bn_{n}", f"visual.bn{n}")
    for i, depth in enumerate(image.layers):
        for j in range(depth):
            ours, theirs = f"image.blocks.{i}.{j}", f"visual.layer{i + 1}.{j}"
            for n in (1, 2, 3):
                yield rule(f"{ours}.conv_{n}.weight", f"{theirs}.conv{n}.weight")
                yield from batch_norm(f"{ours}.bn_{n}", f"{theirs}.bn{n}")
            if j == 0:
                yield rule(f"{ours}.shortcut.conv.weight", f"{theirs}.downsample.0.weight")
                yield from batch_norm(f"{ours}.shortcut.bn", f"{theirs}.downsample.1")
    yield rule("image.positions", "visual.attnpool.positional_embedding")
    for kind in ("weight", "bias"):
        packed = (f"visual.attnpool.{part}_proj.{kind}" for part in "qkv")
        yield rule(f"image.pool.qkv.{kind}", *packed)
    yield from linear("image.pool.out", "visual.attnpool.c_proj")


def _timm_visual(image: VisionConfig, layout: str) -> Iterator[Rule]:
    if image.pooling != "class" or image.pre_norm or not (image.projection and image.patch_bias):
        raise CheckpointError(f"the layout {layout} has no place for this image tower")
    yield rule("image.class_token", "visual.cls_token", change="leading", ones=2)
    yield rule("image.projection.weight", "image_projection", change="transposed")
    yield from _timm_trunk(image, "visual")
    for i in range(len(image.blocks) if image.qk_norm else 0):
        yield from linear(f"image.blocks.{i}.attention.qkv.query_norm", f"visual.blocks.{i}.attn.q_norm")
        yield from linear(f"image.blocks.{i}.attention.qkv.key_norm", f"visual.blocks.{i}.attn.k_norm")


def _timm_trunk(image: VisionConfig, trunk: str) -> Iterator[Rule]:
    yield from linear("image.patches", f"{trunk}.patch_embed.proj")
    yield rule("image.positions", f"{trunk}.pos_embed", change="leading", ones=1)
    yield from linear("image.ln_post", f"{trunk}.norm")
    for i in range(len(image.blocks)):
        ours, theirs = f"image.blocks.{i}", f"{trunk}.blocks.{i}"
        yield from linear(f"{ours}.ln_1", f"{theirs}.norm1")
        yield from linear(f"{ours}.attention.qkv", f"{theirs}.attn.qkv")
        yield from linear(f"{ours}.attention.out", f"{theirs}.attn.proj")
        yield from linear(f"{ours}.ln_2", f"{theirs}.norm2")
        yield from linear(f"{ours}.mlp.fc", f"{theirs}.mlp.fc1")
        yield from linear(f"{ours}.mlp.proj", f"{theirs}.mlp.fc2")


def _timm(image: VisionConfig) -> Iterator[Rule]:
    if image.pooling != "attention" or image.class_token or image.pre_norm or image.projection:
        raise CheckpointError("the layout siglip has no place for this image tower")
    trunk = "visual.trunk"
    yield from _timm_trunk(image, trunk)
    pool = f"{trunk}.attn_pool"
    yield rule("image.pool.probe", f"{pool}.latent", change="leading", ones=2)
    for kind in ("weight", "bias"):
        yield rule(f"image.pool.attention.qkv.{kind}", f"{pool}.q.{kind}", f"{pool}.kv.{kind}", shares=(1, 2))
    yield from linear("image.pool.attention.out", f"{pool}.proj")
    yield from linear("image.pool.ln", f"{pool}.norm")
    yield from linear("image.pool.mlp.fc", f"{pool}.mlp.fc1")
    yield from linear("image.pool.mlp.proj", f"{pool}.mlp.fc2")


def _transformers(config: Config) -> Iterator[Rule]:
    image, text = _vision(config, "transformers"), config.text
    siglip = image.pooling == "attention"
    embeddings = "vision_model.embeddings"
    yield rule("image.patches.weight", f"{embeddings}.patch_embedding.weight")
    if image.patch_bias:
        yield rule("image.patches.bias", f"{embeddings}.patch_embedding.bias")
    if image.class_token:
        yield rule("image.class_token", f"{embeddings}.class_embedding")
    yield rule("image.positions", f"{embeddings}.position_embedding.weight")
    if image.pre_norm:
        yield from linear("image.ln_pre", "vision_model.pre_layrnorm")
    yield from linear("image.ln_post", "vision_model.post_layernorm")
    for i in range(len(image.blocks)):
        yield from _transformers_block(f"image.blocks.{i}", f"vision_model.encoder.layers.{i}")
    if siglip:
        head = "vision_model.head"
        yield rule("image.pool.probe", f"{head}.probe", change="leading", ones=2)
        yield rule("image.pool.attention.qkv.weight", f"{head}.attention.in_proj_weight")
        yield rule("image.pool.attention.qkv.bias", f"{head}.attention.in_proj_bias")
        yield from linear("image.pool.attention.out", f"{head}.attention.out_proj")
        yield from linear("image.pool.ln", f"{head}.layernorm")
        yield from linear("image.pool.mlp.fc", f"{head}.mlp.fc1")
        yield from linear("image.pool.mlp.proj", f"{head}.mlp.fc2")
    if image.projection:
        yield rule("image.projection.weight", "visual_projection.weight")
    yield rule("text.embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield rule("text.positions", "text_model.embeddings.position_embedding.weight")
    yield from linear("text.ln_final", "text_model.final_layer_norm")
    for i in range(len(text.blocks)):
        yield from _transformers_block(f"text.blocks.{i}", f"text_model.encoder.layers.{i}")
    if text.projection == "biased":
        yield from linear("text.projection", "text_model.head")
    elif text.projection == "linear":
        yield rule("text.projection.weight", "text_projection.weight")


def _transformers_block(ours: str, theirs: str) -> Iterator[Rule]:
    yield from linear(f"{ours}.ln_1", f"{theirs}.layer_norm1")
    for kind in ("weight", "bias"):
        packed = (f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield rule(f"{ours}.attention.qkv.{kind}", *packed)
    yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
    yield from linear(f"{ours}.ln_2", f"{theirs}.layer_norm2")
    yield from linear(f"{ours}.mlp.fc", f"{theirs}.mlp.fc1")
    yield from linear(f"{ours}.mlp.proj", f"{theirs}.mlp.fc2")
