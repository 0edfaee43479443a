"""The configs of transformers and open_clip, read as what they say; nothing in them is ever executed.

A key that is left out has the default that the format gives it: that, too, says something. A key that
stands for a computation we do not have, or that is unknown, is an error. `auto_map` and `trust_remote_code`,
which name programs, are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from clipworks.checkpoints.files import read_json
from clipworks.checkpoints.settings import Settings, Stated, Words, triple
from clipworks.core.config import Activation
from clipworks.errors import CheckpointError, nearest

# hidden_act of transformers.
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TANH = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIGLIP_VISION = CLIP_VISION | _TANH | {"patch_size": 16}
SIGLIP_TEXT = (
    CLIP_TEXT
    | _TANH
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
    }
)
DEFAULTS = {"clip": (CLIP_VISION, CLIP_TEXT), "siglip": (SIGLIP_VISION, SIGLIP_TEXT)}
# What Pillow numbers its filters by.
RESAMPLE = {2: "bilinear", 3: "bicubic"}

# Of open_clip's options, those that change nothing at inference, and the only values known of the others.
OPEN_CLIP_IDLE = frozenset(
    [
        "patch_dropout",
        "output_tokens",
        "timm_model_pretrained",
        "timm_drop",
        "timm_drop_path",
        "hf_model_pretrained",
        "attn_pooler_queries",
        "attn_pooler_heads",
        "hf_proj_type",
        "hf_pooler_type",
        "timm_proj_bias",
        "pad_id",
        "eos_id",
    ]
)
_OFF: dict[str, tuple[Any, ...]] = dict.fromkeys(
    [
        "final_ln_after_pool",
        "qk_norm",
        "scaled_cosine_attn",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
    ],
    (False,),
)
_NONE: dict[str, tuple[Any, ...]] = {"ls_init_value": (None,), "block_type": (None, "default")}
OPEN_CLIP_VISION: dict[str, tuple[Any, ...]] = {
    **_OFF,
    **_NONE,
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "act_kwargs": (None, {}),
}
OPEN_CLIP_TEXT: dict[str, tuple[Any, ...]] = {
    **_OFF,
    **_NONE,
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "hf_model_name": (None, ""),
    "tokenizer_mode": (None, ""),
}
# timm's SigLIP towers: heads, and their activation as timm defines them (the name alone decides it there).
TIMM = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
TIMM_TANH = ("vit_base_patch32_siglip", "vit_giantopt_patch16_siglip")
CLEAN = {"canonicalize": "siglip", "lower": "clip"}


def transformers(folder: Path) -> list[Stated]:
    """What `config.json` and `preprocessor_config.json` of a `CLIPModel` or `SiglipModel` say.

    Raises:
        CheckpointError: naming the file and the key that is unknown or contradicts another.
    """
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        raise CheckpointError(f"{path}: model_type is {kind!r}; read are {' and '.join(DEFAULTS)}")
    vision = _part(config, "vision", DEFAULTS[kind][0], path)
    text = _part(config, "text", DEFAULTS[kind][1], path)
    siglip = kind == "siglip"
    if vision["num_channels"] != 3 or (siglip and vision.get("vision_use_head") is False):
        raise CheckpointError(f"{path}: only towers of three channels, and SigLIP's with its head, are read")
    claims: dict[str, tuple[str, Any]] = {
        "sigmoid": ("model_type siglip", siglip),
        "image.kind": ("the kind of pooling", "attention" if siglip else "class"),
        "image.width": ("vision_config.hidden_size", vision["hidden_size"]),
        "image.depth": ("vision_config.num_hidden_layers", vision["num_hidden_layers"]),
        "image.mlp": ("vision_config.intermediate_size", vision["intermediate_size"]),
        "image.patch": ("vision_config.patch_size", vision["patch_size"]),
        "image.size": ("vision_config.image_size", vision["image_size"]),
        "text.width": ("text_config.hidden_size", text["hidden_size"]),
        "text.depth": ("text_config.num_hidden_layers", text["num_hidden_layers"]),
        "text.mlp": ("text_config.intermediate_size", text["intermediate_size"]),
        "text.length": ("text_config.max_position_embeddings", text["max_position_embeddings"]),
        "text.vocabulary": ("text_config.vocab_size", text["vocab_size"]),
    }
    if siglip:
        claims["width"] = ("text_config.projection_size", text.get("projection_size") or text["hidden_size"])
    else:
        claims["width"] = ("projection_dim", config.get("projection_dim", 512))
    settings = Settings(
        activation=_activation(vision["hidden_act"], "vision_config.hidden_act", path),
        text_activation=_activation(text["hidden_act"], "text_config.hidden_act", path),
        image_heads=_count(vision["num_attention_heads"], "vision_config.num_attention_heads", path),
        text_heads=_count(text["num_attention_heads"], "text_config.num_attention_heads", path),
        norm_eps=float(vision["layer_norm_eps"]),
        text_norm_eps=float(text["layer_norm_eps"]),
        text_mask="none" if siglip else "causal",
    )
    end = text["eos_token_id"]
    # An end of 2 is what old configs say of models that are read at the largest id.
    words = Words(
        "file",
        full=siglip,
        end=None if siglip or end == 2 else end,
        largest=not siglip and end == 2,
    )
    stated = [Stated(str(path), settings, claims, words, name=str(config.get("_name_or_path") or ""))]
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            inner = values.get("image_processor", values if name.startswith("pre") else None)
            if isinstance(inner, dict):
                return [*stated, _processor(inner, folder / name)]
    return stated


def _part(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """One tower's config with the format's defaults; the older key `…_config_dict` overrides the newer."""
    newer, older = config.get(f"{name}_config") or {}, config.get(f"{name}_config_dict") or {}
    if not isinstance(newer, dict) or not isinstance(older, dict):
        raise CheckpointError(f"{path}: {name}_config is no JSON object")
    for key in defaults:
        if key in newer and key in older and newer[key] != older[key]:
            raise CheckpointError(
                f"{path}: {key} is {newer[key]} in {name}_config, but {older[key]} in {name}_config_dict"
            )
    return {**defaults, **newer, **older}


def _processor(values: Mapping[str, Any], path: Path) -> Stated:
    """What an image processor's config says.

    Raises:
        CheckpointError: if it prepares pictures in a way that we do not.
    """
    for key in ("do_resize", "do_normalize", "do_rescale"):
        if values.get(key, True) is not True:
            raise CheckpointError(f"{path}: {key} is {values[key]}, which is not supported")
    if abs(values.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-7:
        raise CheckpointError(f"{path}: rescale_factor is {values['rescale_factor']}, not 1/255")
    resample = values.get("resample", 3)
    if resample not in RESAMPLE:
        raise CheckpointError(f"{path}: resample is {resample}; read are 2 (bilinear) and 3 (bicubic)")
    size, crop = values.get("size"), values.get("crop_size")
    cropped = values.get("do_center_crop", crop is not None)
    shortest, height, width = _sides(size, "shortest_edge")
    side = shortest or height
    _, crop_height, crop_width = _sides(crop, "")
    square = height == width and (not cropped or crop_height in (None, side))
    if side is None or (shortest is None and not square):
        raise CheckpointError(
            f"{path}: size is {size} and crop_size {crop}, which give no square that is known here"
        )
    if shortest is not None and (not cropped or (crop_height, crop_width) != (side, side)):
        raise CheckpointError(f"{path}: size is {size} but crop_size {crop}: only equal ones are supported")
    try:
        mean, std = triple(values["image_mean"]), triple(values["image_std"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: image_mean and image_std must be three numbers each") from error
    settings = Settings(
        mean=mean,
        std=std,
        resize="shortest" if shortest else "squash",
        interpolation=cast(Any, RESAMPLE[resample]),
    )
    return Stated(str(path), settings, {"image.size": ("size", side)})


def _sides(value: Any, edge: str) -> tuple[int | None, int | None, int | None]:
    """A size as (shortest edge, height, width)."""
    if isinstance(value, dict):
        return value.get(edge), value.get("height"), value.get("width")
    if isinstance(value, int):
        return (value, None, None) if edge else (None, value, value)
    return None, None, None


def open_clip(path: Path) -> Stated:
    """What `open_clip_config.json` says.

    Raises:
        CheckpointError: naming the key that is unknown, or asks for what we do not have.
    """
    whole = read_json(path)
    model, picture = whole.get("model_cfg", whole), whole.get("preprocess_cfg") or {}
    if not isinstance(model, dict) or not isinstance(picture, dict) or "embed_dim" not in model:
        raise CheckpointError(f"{path}: has no model_cfg with an embed_dim")
    _check_keys(model, MODEL_KEYS, path, "model_cfg")
    vision, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    _check_options(vision, OPEN_CLIP_VISION, VISION_KEYS, path, "vision_cfg")
    _check_options(text, OPEN_CLIP_TEXT, TEXT_KEYS, path, "text_cfg")
    activation: Activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width = text.get("width", 512)
    claims: dict[str, tuple[str, Any]] = {
        "width": ("embed_dim", model["embed_dim"]),
        "sigmoid": ("init_logit_bias", model.get("init_logit_bias") is not None),
        "text.width": ("text_cfg.width", width),
        "text.depth": ("text_cfg.layers", text.get("layers", 12)),
        "text.mlp": ("text_cfg.mlp_ratio", int(width * text.get("mlp_ratio", 4.0))),
        "text.length": ("text_cfg.context_length", text.get("context_length", 77)),
        "text.vocabulary": ("text_cfg.vocab_size", text.get("vocab_size", 49408)),
        "text.bias": ("text_cfg.proj_bias", bool(text.get("proj_bias", False))),
    }
    tower, more = _open_clip_vision(vision, activation, path)
    tanh = (text.get("act_kwargs") or {}) == {"approximate": "tanh"}
    if text.get("act_kwargs") and not (tanh and activation == "gelu"):
        raise CheckpointError(f"{path}: text_cfg.act_kwargs is {text['act_kwargs']}, which is not supported")
    interpolation, resize = picture.get("interpolation", "bicubic"), picture.get("resize_mode", "shortest")
    if interpolation not in ("bicubic", "bilinear") or resize not in ("shortest", "squash", "longest"):
        raise CheckpointError(
            f"{path}: preprocess_cfg has {interpolation!r} and {resize!r}, which are not supported"
        )
    try:
        mean, std = (triple(picture[key]) if key in picture else None for key in ("mean", "std"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: preprocess_cfg.mean and .std must be three numbers each") from error
    if "size" in picture:
        size = picture["size"]
        sides = size if isinstance(size, list) else [size, size]
        if "image.size" in more and sides != [more["image.size"][1]] * 2:
            raise CheckpointError(
                f"{path}: preprocess_cfg.size is {size}, vision_cfg.image_size {more['image.size'][1]}"
            )
    heads, eps = tower["heads"], tower["eps"]
    settings = Settings(
        activation=tower["activation"],
        text_activation="gelu_tanh" if tanh else activation,
        image_heads=heads,
        text_heads=_count(text.get("heads", 8), "text_cfg.heads", path),
        norm_eps=eps,
        text_norm_eps=_eps(text.get("norm_kwargs"), 1e-5, path),
        mean=mean,
        std=std,
        resize=resize,
        interpolation=interpolation,
        text_mask="none" if text.get("no_causal_mask") else "causal",
    )
    return Stated(str(path), settings, claims | more, _open_clip_words(text, path))


MODEL_KEYS = frozenset(
    [
        "embed_dim",
        "vision_cfg",
        "text_cfg",
        "quick_gelu",
        "init_logit_scale",
        "init_logit_bias",
        "nonscalar_logit_scale",
        "custom_text",
        "output_dict",
    ]
)
VISION_KEYS = frozenset(
    [
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "norm_kwargs",
        "timm_model_name",
        "timm_pool",
        "timm_proj",
    ]
)
TEXT_KEYS = frozenset(
    [
        "context_length",
        "vocab_size",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "no_causal_mask",
        "pool_type",
        "proj_bias",
        "act_kwargs",
        "norm_kwargs",
    ]
)


def _open_clip_vision(
    vision: Mapping[str, Any], activation: Activation, path: Path
) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Heads, eps and activation of an image tower, and the claims about its shapes."""
    size = vision.get("image_size", 224)
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    claims: dict[str, tuple[str, Any]] = {"image.size": ("vision_cfg.image_size", size)}
    timm = vision.get("timm_model_name")
    if timm:
        match = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)(\..+)?", timm)
        if (
            not match
            or match[1] not in TIMM
            or (vision.get("timm_pool"), vision.get("timm_proj")) != ("map", "none")
        ):
            raise CheckpointError(
                f"{path}: the image tower {timm} of timm is not read, only its SigLIP towers are"
            )
        claims |= {
            "image.kind": ("timm_pool", "attention"),
            "image.patch": ("timm_model_name", int(match[2])),
        }
        tanh = timm.startswith(TIMM_TANH)
        return {"heads": TIMM[match[1]], "eps": 1e-6, "activation": "gelu_tanh" if tanh else "gelu"}, claims
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    head_width = _count(vision.get("head_width", 64), "vision_cfg.head_width", path)
    eps = _eps(vision.get("norm_kwargs"), 1e-5, path)
    if isinstance(layers, list):
        claims |= {
            "image.kind": ("vision_cfg.layers", "resnet"),
            "image.layers": ("vision_cfg.layers", layers),
        }
        claims["image.width"] = ("vision_cfg.width", width)
        return {"heads": width * 32 // head_width, "eps": None, "activation": activation}, claims
    claims |= {
        "image.kind": ("vision_cfg.pool_type", "class"),
        "image.width": ("vision_cfg.width", width),
        "image.depth": ("vision_cfg.layers", layers),
        "image.mlp": ("vision_cfg.mlp_ratio", int(width * vision.get("mlp_ratio", 4.0))),
        "image.patch": ("vision_cfg.patch_size", vision.get("patch_size", 16)),
    }
    return {"heads": width // head_width, "eps": eps, "activation": activation}, claims


def _open_clip_words(text: Mapping[str, Any], path: Path) -> Words:
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "last", "eos"):
        raise CheckpointError(f"{path}: text_cfg.pool_type is {pool!r}, which is not supported")
    options = text.get("tokenizer_kwargs") or {}
    if not text.get("hf_tokenizer_name"):
        if options or pool != "argmax":
            raise CheckpointError(
                f"{path}: text_cfg has {options or pool!r}, which is not supported for CLIP's vocabulary"
            )
        return Words("clip")
    clean = options.get("clean", "whitespace")
    if clean not in CLEAN or set(options) - {"clean"}:
        raise CheckpointError(
            f"{path}: text_cfg.tokenizer_kwargs is {options}; read is clean, one of {', '.join(CLEAN)}"
        )
    return Words(
        "file",
        clean=cast(Any, CLEAN[clean]),
        full=pool == "last",
        end=text.get("eos_id", 2) if pool == "eos" else None,
        largest=pool == "argmax",
    )


def _check_keys(values: Mapping[str, Any], allowed: frozenset[str], path: Path, place: str) -> None:
    for key in values:
        if key not in allowed:
            raise CheckpointError(f"{path}: {place}.{key} is not known here{nearest(key, allowed)}")


def _check_options(
    values: Mapping[str, Any],
    options: Mapping[str, tuple[Any, ...]],
    keys: frozenset[str],
    path: Path,
    place: str,
) -> None:
    _check_keys(values, keys | options.keys() | OPEN_CLIP_IDLE, path, place)
    for key, allowed in options.items():
        if key in values and values[key] not in allowed:
            raise CheckpointError(f"{path}: {place}.{key} is {values[key]!r}, which is not supported")


def _activation(name: Any, key: str, path: Path) -> Activation:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{path}: {key} is {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _count(value: Any, key: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r}, not a positive whole number")
    return value


def _eps(options: Any, default: float, path: Path) -> float:
    options = options or {}
    if set(options) - {"eps"}:
        raise CheckpointError(f"{path}: norm_kwargs is {options}; read is eps")
    return float(options.get("eps", default))
