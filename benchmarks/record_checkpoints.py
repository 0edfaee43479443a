"""Records what open_clip answers on small random models, for tests/checkpoints/test_recorded.py.

    .venv-peers/bin/python benchmarks/record_checkpoints.py

Run it in the environment of the peers; the SigLIP cases need timm there besides (`pip install --no-deps
timm`: the part of it that is used runs without torchvision, which it names). Each file holds the weights
as open_clip names them (in fp16, which is also what it computed with), the pixels and ids that went in, and
its unit vectors and logits. The model's `open_clip_config.json` stands in the file's metadata.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

RECORD = Path(__file__).resolve().parent.parent / "tests" / "checkpoints" / "recorded"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 256, "width": 32, "heads": 2, "layers": 2}
VISION: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
SIGLIP_TEXT: dict[str, Any] = {
    **TEXT,
    "width": 48,
    "heads": 3,
    "hf_tokenizer_name": "none",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
TIMM: dict[str, Any] = {
    "image_size": 32,
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": "none",
}

CASES: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "vit-quickgelu": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "vit-custom-text": {"embed_dim": 24, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "vit-odd": {
        "embed_dim": 20,
        "vision_cfg": {
            **VISION,
            "width": 40,
            "head_width": 8,
            "mlp_ratio": 2.3,
            "norm_kwargs": {"eps": 1e-3},
        },
        "text_cfg": {
            **TEXT,
            "layers": 3,
            "heads": 4,
            "mlp_ratio": 1.5,
            "act_kwargs": {"approximate": "tanh"},
        },
    },
    "resnet": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 4, "patch_size": None},
        "text_cfg": TEXT,
    },
    "siglip": {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TIMM, "timm_model_name": "vit_base_patch8_siglip_32"},
        "text_cfg": SIGLIP_TEXT,
    },
    "siglip2": {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TIMM, "image_size": 64, "timm_model_name": "vit_base_patch32_siglip_64"},
        "text_cfg": {**SIGLIP_TEXT, "width": 24, "act_kwargs": {"approximate": "tanh"}},
    },
}


class Empty(type):
    """The class of empty classes, whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Anything(ModuleType):
    """A module in which every name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision, and all its parts, as such modules."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it has everything already."""


def import_timm() -> None:
    """Import timm, and open_clip after it, where there is no torchvision."""
    import transformers  # noqa: F401 - so that it has looked for torchvision before one is shown

    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(Finder())
    import open_clip  # noqa: F401
    import timm  # noqa: F401


def register_small_towers() -> None:
    """Give timm two small SigLIP towers, under names of the form that its own have."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def tower(size: int, patch: int, width: int, **options: Any) -> Any:
        return VisionTransformer(
            img_size=size, patch_size=patch, embed_dim=width, depth=2, num_heads=12, class_token=False,
            num_classes=0, global_pool="map", **options,
        )  # fmt: skip

    def vit_base_patch8_siglip_32(pretrained: bool = False, **_: Any) -> Any:
        return tower(32, 8, 48)

    def vit_base_patch32_siglip_64(pretrained: bool = False, **_: Any) -> Any:
        return tower(64, 32, 24, act_layer="gelu_tanh")

    for function in (vit_base_patch8_siglip_32, vit_base_patch32_siglip_64):
        function.__module__ = "timm.models.vision_transformer"
        register_model(function)


def record(name: str, config: dict[str, Any]) -> int:
    """Write one case; returns the size of its file."""
    import open_clip
    import torch
    from open_clip.model import CLIP, CustomTextCLIP
    from safetensors.torch import save_file

    options = {key: value for key, value in config.items() if key != "custom_text"}
    model: Any = (CustomTextCLIP if config.get("custom_text") else CLIP)(**json.loads(json.dumps(options)))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or key in ("logit_scale", "logit_bias"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            gain = key.endswith("weight") and tensor.ndim == 1
            if key.endswith("running_var"):
                noise = noise.abs() + 0.5
            elif gain:
                noise = 1 + 0.2 * noise
            else:
                noise = noise * (0.3 if tensor.ndim < 2 else min(0.3, tensor[0].numel() ** -0.5))
            tensor.copy_(noise.half().float())
        for key in ("logit_scale", "logit_bias"):
            if getattr(model, key, None) is not None:
                getattr(model, key).data = getattr(model, key).data.half().float()
    model.eval()
    siglip = "siglip" in name
    mean, std = (HALF, HALF) if siglip else (MEAN, STD)
    side = config["vision_cfg"]["image_size"]
    pixels = torch.randint(256, (3, 3, side, side), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1, 255, (4, 12), generator=generator)
    if not siglip:
        ends = torch.tensor([11, 3, 7, 1])
        ids[torch.arange(12) > ends[:, None]] = 0
        ids[torch.arange(4), ends] = 255
    with torch.no_grad():
        normal = (pixels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        image = model.encode_image(normal, normalize=True)
        text = model.encode_text(ids, normalize=True)
        logits = model.get_logits(normal, ids)[0]
    tensors = {
        f"weights/{key}": value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    tensors |= {"pixels": pixels, "ids": ids.short(), "image": image, "text": text, "logits": logits}
    picture = {
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "resize_mode": "squash" if siglip else "shortest",
    }
    whole = {"model_cfg": config, "preprocess_cfg": picture}
    about = {"peer": f"open_clip {open_clip.__version__}, torch {torch.__version__}"}
    if siglip:
        import timm

        about["peer"] += f", timm {timm.__version__}"
    path = RECORD / f"open_clip-{name}.safetensors"
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        path,
        metadata={**about, "config": json.dumps(whole)},
    )
    path.chmod(0o644)
    return path.stat().st_size


def main() -> None:
    """Write the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if left out")
    chosen = parser.parse_args().cases or list(CASES)
    RECORD.mkdir(parents=True, exist_ok=True)
    if any("siglip" in name for name in chosen):
        import_timm()
        register_small_towers()
    for name in chosen:
        print(f"{name}: {record(name, CASES[name]):,} bytes")


if __name__ == "__main__":
    main()
