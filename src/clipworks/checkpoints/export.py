"""A Clip in the folders of other tools: transformers' `CLIPModel` and `SiglipModel`, and open_clip's.

Only JSON, safetensors and vocabularies are written, so neither tool has to be installed. What has no
counterpart there (a convolutional stem, blocks of different widths, ...) is an error, never left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from clipworks.checkpoints import layouts, own, rules, vocabulary
from clipworks.checkpoints.configs import TIMM, TIMM_TANH
from clipworks.checkpoints.layouts import Layout
from clipworks.core.clip import Clip
from clipworks.core.config import Activation, BlockConfig, Config, ResNetConfig, TextConfig, VisionConfig
from clipworks.core.tokenizer import ClipTokenizer, FileTokenizer
from clipworks.errors import CheckpointError

HIDDEN_ACT: dict[Activation, str] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
}
RESAMPLE = {"bilinear": 2, "bicubic": 3}
# The names under which transformers and open_clip look for weights.
TRANSFORMERS_WEIGHTS, OPEN_CLIP_WEIGHTS = "model.safetensors", "open_clip_model.safetensors"


def to_transformers(clip: Clip, folder: Path) -> Path:
    """Write the folder that `CLIPModel.from_pretrained` or `SiglipModel.from_pretrained` reads.

    Raises:
        CheckpointError: if this architecture has no counterpart there.
    """
    config = own.describe(clip)
    image, text = config.image, config.text
    if isinstance(image, ResNetConfig):
        raise CheckpointError(f"{folder}: transformers has no ResNet of CLIP's; save_open_clip writes it")
    siglip = image.pooling == "attention"
    expected = (text.mask, text.projection, config.sigmoid)
    if expected != (("none", "biased", True) if siglip else ("causal", "linear", False)):
        raise CheckpointError(
            f"{folder}: transformers has no model with {image.pooling} pooling, a text tower of mask "
            f"{text.mask} and {text.projection} projection, and logits "
            f"{'with' if config.sigmoid else 'without'} bias"
        )
    if not siglip and image.patch_bias:
        raise CheckpointError(f"{folder}: transformers' CLIPModel has patches without a bias")
    if config.preprocessing.resize == "longest":
        raise CheckpointError(f"{folder}: transformers has no picture processor that pads to a square")
    weights = _written(clip, "transformers", config, folder)
    if siglip:
        weights = {
            name: t.reshape(1) if name in ("logit_scale", "logit_bias") else t for name, t in weights.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    own.write_safetensors(weights, folder / TRANSFORMERS_WEIGHTS, "pt")
    own.write_json(_transformers_config(config, image, clip.tokenizer), folder / "config.json")
    own.write_json(_processor(config), folder / "preprocessor_config.json")
    if clip.tokenizer is not None:
        _write_tokenizer(clip.tokenizer, folder)
    return folder


def to_open_clip(clip: Clip, folder: Path) -> Path:
    """Write `open_clip_model.safetensors` and `open_clip_config.json`, for `local-dir:` and the hub.

    Raises:
        CheckpointError: if this architecture has no counterpart there.
    """
    config = own.describe(clip)
    values = {
        "model_cfg": _open_clip_model(config, clip.tokenizer, folder),
        "preprocess_cfg": _open_clip_pictures(config),
    }
    siglip = isinstance(config.image, VisionConfig) and config.image.pooling == "attention"
    weights = _written(clip, "siglip" if siglip else "openai", config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    own.write_safetensors(weights, folder / OPEN_CLIP_WEIGHTS, "pt")
    own.write_json(values, folder / "open_clip_config.json")
    if isinstance(clip.tokenizer, FileTokenizer):
        _write_tokenizer(clip.tokenizer, folder)
    return folder


def _written(clip: Clip, layout: Layout, config: Config, folder: Path) -> dict[str, Tensor]:
    try:
        weights = rules.write(layouts.rules(layout, config), clip.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}


def _uniform(tower: VisionConfig | TextConfig, what: str) -> BlockConfig:
    """The block that all blocks of a tower are like.

    Raises:
        CheckpointError: if they differ, or the heads do not make up the width.
    """
    first = tower.blocks[0] if tower.blocks else None
    if first is None or set(tower.blocks) != {first} or first.heads * first.head_width != tower.width:
        raise CheckpointError(
            f"the blocks of the {what} tower differ, or their heads do not make up its width: "
            "no other tool has such a tower"
        )
    return first


def _transformers_config(config: Config, image: VisionConfig, tokenizer: Any) -> dict[str, Any]:
    text, siglip = config.text, image.pooling == "attention"
    pictures, words = _uniform(image, "image"), _uniform(text, "text")
    start, end, pad = (getattr(tokenizer, name, None) for name in ("start", "end", "pad"))
    kind = "siglip" if siglip else "clip"
    vision_config: dict[str, Any] = {
        "model_type": f"{kind}_vision_model",
        "hidden_size": image.width,
        "intermediate_size": pictures.mlp_width,
        "num_hidden_layers": len(image.blocks),
        "num_attention_heads": pictures.heads,
        "num_channels": 3,
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "hidden_act": HIDDEN_ACT[image.activation],
        "layer_norm_eps": image.norm_eps,
        "attention_dropout": 0.0,
    }
    text_config: dict[str, Any] = {
        "model_type": f"{kind}_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": words.mlp_width,
        "num_hidden_layers": len(text.blocks),
        "num_attention_heads": words.heads,
        "max_position_embeddings": text.context_length,
        "hidden_act": HIDDEN_ACT[text.activation],
        "layer_norm_eps": text.norm_eps,
        "attention_dropout": 0.0,
        "bos_token_id": start,
        # 2 is how transformers is told to read a text at its largest id; without a tokenizer nothing better
        # is known.
        "eos_token_id": end if end is not None else 2,
        "pad_token_id": pad,
    }
    if siglip:
        text_config["projection_size"] = config.width
    else:
        vision_config["projection_dim"] = text_config["projection_dim"] = config.width
    return {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": kind,
        **({} if siglip else {"projection_dim": config.width}),
        "dtype": "float32",
        "torch_dtype": "float32",
        "vision_config": vision_config,
        "text_config": text_config,
    }


def _processor(config: Config) -> dict[str, Any]:
    image, siglip = (
        config.image,
        isinstance(config.image, VisionConfig) and config.image.pooling == "attention",
    )
    side = {"height": image.image_size, "width": image.image_size}
    values: dict[str, Any] = {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "processor_class": "SiglipProcessor" if siglip else "CLIPProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": RESAMPLE[config.preprocessing.interpolation],
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    if config.preprocessing.resize == "shortest":
        return values | {
            "size": {"shortest_edge": image.image_size},
            "do_center_crop": True,
            "crop_size": side,
        }
    return values | {"size": side, "do_center_crop": False}


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer as transformers reads it.

    Raises:
        CheckpointError: for a tokenizer that cannot be written.
    """
    if isinstance(tokenizer, ClipTokenizer):
        special = {"bos_token": vocabulary.START, "eos_token": vocabulary.END}
        special |= {"unk_token": vocabulary.END, "pad_token": vocabulary.END}
        own.write_json(vocabulary.clip_vocabulary(), folder / "vocab.json")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.clip_merges()), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        kind = "CLIPTokenizer"
    elif isinstance(tokenizer, FileTokenizer):
        content, special = _tokenizer_content(tokenizer)
        own.write_json(content, folder / "tokenizer.json")
        kind = "PreTrainedTokenizerFast"
    else:
        raise CheckpointError(f"{folder}: a {type(tokenizer).__name__} cannot be written for other tools")
    settings = {"tokenizer_class": kind, "model_max_length": tokenizer.context_length, **special}
    own.write_json(settings, folder / "tokenizer_config.json")
    own.write_json(special, folder / "special_tokens_map.json")


def _tokenizer_content(tokenizer: FileTokenizer) -> tuple[dict[str, Any], dict[str, str]]:
    """A `tokenizer.json` that adds start and end and cleans by itself, and its special tokens by name."""
    from tempfile import TemporaryDirectory

    from clipworks.core.tokenizer import FILE

    with TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        content = json.loads((Path(scratch) / FILE).read_text(encoding="utf-8"))
    spelled = {i: token for token, i in vocabulary.token_ids(content).items()}
    special = {
        name: spelled[i]
        for name, i in (
            ("bos_token", tokenizer.start),
            ("eos_token", tokenizer.end),
            ("pad_token", tokenizer.pad),
        )
        if i is not None
    }
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    around = [special.get(name) for name in ("bos_token", "eos_token")]
    before, behind = ([{"SpecialToken": {"id": one, "type_id": 0}}] if one else [] for one in around)
    ids = {
        one: {"id": one, "ids": [vocabulary.token_ids(content)[one]], "tokens": [one]}
        for one in around
        if one
    }
    if ids:
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*before, sequence, *behind],
            "pair": [*before, sequence, *behind, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": ids,
        }
    else:
        content["post_processor"] = None
    content["normalizer"] = _normalizer(tokenizer.clean, content.get("normalizer"))
    return content, special


def _normalizer(clean: str, inner: Any) -> Any:
    """What `clean` does to a text, as rules of the tokenizers library, which has none for broken text."""
    steps: list[dict[str, Any]] = []
    if clean == "siglip":
        steps += [
            {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
            {"type": "Replace", "pattern": {"Regex": "[!-/:-@\\[-`{-~]"}, "content": ""},
        ]
    if clean in ("clip", "siglip"):
        steps.append({"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "})
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    if clean != "none":
        steps.append({"type": "Lowercase"})
    if not steps:
        return inner
    return {"type": "Sequence", "normalizers": [*steps, *([inner] if inner else [])]}


def _open_clip_model(config: Config, tokenizer: Any, folder: Path) -> dict[str, Any]:
    image, text = config.image, config.text
    words = _uniform(text, "text")
    quick = text.activation == "quick_gelu"
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": words.heads,
        "layers": len(text.blocks),
        "mlp_ratio": _ratio(words.mlp_width, text.width),
    }
    if text.activation == "gelu_tanh":
        text_cfg["act_kwargs"] = {"approximate": "tanh"}
    if text.norm_eps != 1e-5:
        text_cfg["norm_kwargs"] = {"eps": text.norm_eps}
    if text.projection == "biased":
        text_cfg["proj_bias"] = True
    if text.mask == "none":
        text_cfg["no_causal_mask"] = True
    elif text.mask != "causal" or text.projection == "none":
        raise CheckpointError(
            f"{folder}: open_clip has no text tower with mask {text.mask} and projection {text.projection}"
        )
    if isinstance(tokenizer, FileTokenizer):
        text_cfg |= _open_clip_words(tokenizer, folder)
    model: dict[str, Any] = {"embed_dim": config.width, "vision_cfg": {}, "text_cfg": text_cfg}
    if quick:
        model["quick_gelu"] = True
    if config.sigmoid:
        model["init_logit_bias"] = -10
    vision: dict[str, Any] = {"image_size": image.image_size}
    model["vision_cfg"] = vision
    if isinstance(image, ResNetConfig):
        if image.heads != image.width // 2:
            raise CheckpointError(
                f"{folder}: open_clip's ResNet of width {image.width} has {image.width // 2} heads, "
                f"not {image.heads}"
            )
        return model | {
            "vision_cfg": vision | {"layers": list(image.layers), "width": image.width, "patch_size": None}
        }
    if image.pooling == "attention":
        return model | {"custom_text": True, "vision_cfg": vision | _timm(image, folder)}
    if image.activation != text.activation or image.patch_bias:
        raise CheckpointError(
            f"{folder}: in open_clip both towers have one activation, and patches have no bias"
        )
    pictures = _uniform(image, "image")
    vision |= {
        "layers": len(image.blocks),
        "width": image.width,
        "head_width": pictures.head_width,
        "patch_size": image.patch_size,
        "mlp_ratio": _ratio(pictures.mlp_width, image.width),
    }
    if image.norm_eps != 1e-5:
        vision["norm_kwargs"] = {"eps": image.norm_eps}
    if image.activation == "gelu_tanh":
        raise CheckpointError(
            f"{folder}: open_clip's own image tower has GELU and quick GELU, not the tanh form"
        )
    return model


def _timm(image: VisionConfig, folder: Path) -> dict[str, Any]:
    """The name of a SigLIP tower in timm, which has them in fixed widths only."""
    widths = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}
    kind, block = widths.get(image.width, ""), _uniform(image, "image")
    name = f"vit_{kind}_patch{image.patch_size}_siglip_{image.image_size}"
    activation = "gelu_tanh" if name.startswith(TIMM_TANH) else "gelu"
    if not kind or block.heads != TIMM[kind] or image.activation != activation:
        raise CheckpointError(
            f"{folder}: open_clip takes SigLIP's tower from timm, which has none of width {image.width} "
            f"with {block.heads} heads and {image.activation}"
        )
    return {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}


def _open_clip_words(tokenizer: FileTokenizer, folder: Path) -> dict[str, Any]:
    # The files beside the weights do what `clean` does; open_clip's own names come first where it has one.
    clean = {"siglip": "canonicalize", "clip": "lower"}.get(tokenizer.clean)
    if clean is None:
        raise CheckpointError(f"{folder}: open_clip has no cleaning of texts that equals {tokenizer.clean!r}")
    words: dict[str, Any] = {"hf_tokenizer_name": folder.name, "tokenizer_kwargs": {"clean": clean}}
    words["pool_type"] = "last" if tokenizer.pad_full else "eos"
    return words if tokenizer.pad_full else words | {"eos_id": tokenizer.end}


def _open_clip_pictures(config: Config) -> dict[str, Any]:
    return {
        "mean": list(config.image.mean),
        "std": list(config.image.std),
        "interpolation": config.preprocessing.interpolation,
        "resize_mode": config.preprocessing.resize,
    }


def _ratio(hidden: int, width: int) -> float:
    """A ratio from which `int(width * ratio)` gives the hidden width back.

    Raises:
        CheckpointError: if there is none.
    """
    for ratio in (hidden / width, hidden / width + 1e-9, (hidden + 0.5) / width):
        if int(width * ratio) == hidden:
            return ratio
    raise CheckpointError(f"no ratio gives an MLP of {hidden} for a width of {width}")
