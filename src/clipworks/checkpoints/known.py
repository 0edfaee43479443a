"""The models that are known by name: where their weights are, and what the weights cannot say.

Names are those of open_clip, `ARCHITECTURE/TAG`. Repositories, activations and statistics were taken from
open_clip 3.3 (`pretrained.py` and its model configs) and the nine SHA-256 sums from OpenAI's addresses.
Nothing here imports torch, so that the list can be shown at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipworks.checkpoints.settings import HALF, Words
from clipworks.core.config import (
    CLIP_MEAN,
    CLIP_STD,
    Activation,
    Config,
    PreprocessingConfig,
    ResNetConfig,
    TextConfig,
    VisionConfig,
    uniform_blocks,
)

WEIGHTS, OLDER_WEIGHTS = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


@dataclass(frozen=True)
class Known:
    """A published model.

    Attributes:
        name: as open_clip has it.
        repository: on the hub; "" for what ships with this package.
        config: everything about it.
        words: how its texts become ids.
        sha256: of the archive that OpenAI published; "" for others.
        file: the file of weights in the repository; `OLDER_WEIGHTS` is tried next.
    """

    name: str
    repository: str
    config: Config
    words: Words
    sha256: str = ""
    file: str = WEIGHTS


def parameters(config: Config) -> int:
    """How many numbers a model of this geometry learns."""
    image, text = config.image, config.text
    if isinstance(image, ResNetConfig):
        count = _resnet_parameters(image, config.width)
    else:
        count = _stem_parameters(image) + image.class_token * image.width
        count += (image.grid**2 + image.class_token) * image.width + _norms(image.width, 1 + image.pre_norm)
        count += _blocks_parameters(image)
        count += sum(_norms(block.head_width, 2) for block in image.blocks) * image.qk_norm
        count += image.width * config.width * image.projection
        if image.pooling == "attention":
            last = image.blocks[-1]
            count += (
                image.width + _attention(image.width, last.heads * last.head_width) + _norms(image.width, 1)
            )
            count += 2 * image.width * last.mlp_width + image.width + last.mlp_width
    count += (text.vocab_size + text.context_length) * text.width + _norms(text.width, 1)
    count += _blocks_parameters(text)
    if text.projection != "none":
        count += (text.width + (text.projection == "biased")) * config.width
    return count + 1 + config.sigmoid


def _blocks_parameters(tower: VisionConfig | TextConfig) -> int:
    width = tower.width
    return sum(
        _norms(width, 2) + _attention(width, block.heads * block.head_width)
        + 2 * width * block.mlp_width + width + block.mlp_width
        for block in tower.blocks
    )  # fmt: skip


def _stem_parameters(image: VisionConfig) -> int:
    if not image.stem:
        return (3 * image.patch_size**2 + image.patch_bias) * image.width
    count, channels = 0, 3
    for stage in image.stem:
        pair = 2 * (9 * stage.width**2 + _norms(stage.width, 1))
        count += 9 * channels * stage.width + _norms(stage.width, 1) + stage.depth * pair
        channels = stage.width
    return count + (channels + 1) * image.width


def _attention(width: int, inner: int, out: int | None = None) -> int:
    out = out or width
    return 3 * inner * (width + 1) + out * (inner + 1)


def _norms(width: int, count: int) -> int:
    return 2 * width * count


def _resnet_parameters(image: ResNetConfig, out: int) -> int:
    half, width = image.width // 2, image.width
    count = 9 * (3 * half + half * half + half * width) + _norms(half, 2) + _norms(width, 1)
    channels = width
    for i, depth in enumerate(image.layers):
        inner = width * 2**i
        for j in range(depth):
            count += (
                channels * inner
                + 9 * inner * inner
                + 4 * inner * inner
                + _norms(inner, 2)
                + _norms(4 * inner, 1)
            )
            if j == 0:
                count += 4 * channels * inner + _norms(4 * inner, 1)
            channels = 4 * inner
    return count + (image.grid**2 + 1) * channels + _attention(channels, channels, out)


def _text(width: int, depth: int = 12) -> TextConfig:
    return TextConfig(77, 49408, width, uniform_blocks(depth, width))


def _vit(
    size: int,
    patch: int,
    width: int,
    depth: int,
    text: TextConfig,
    out: int,
    heads: int | None = None,
    ratio: float = 4.0,
) -> Config:
    blocks = uniform_blocks(depth, width, heads, ratio)
    return Config(out, VisionConfig(size, patch, width, blocks), text)


def _rn(size: int, layers: tuple[int, int, int, int], width: int, text: int, out: int) -> Config:
    return Config(out, ResNetConfig(size, layers, width, heads=width // 2), _text(text))


def _siglip(size: int, patch: int, vocabulary: int, image: Activation, text: Activation) -> Config:
    blocks = uniform_blocks(12, 768)
    vision = VisionConfig(
        size, patch, 768, blocks, image, 1e-6, class_token=False, pre_norm=False, patch_bias=True,
        pooling="attention", projection=False, mean=HALF, std=HALF,
    )  # fmt: skip
    words = TextConfig(64, vocabulary, 768, blocks, text, 1e-6, mask="none", projection="biased")
    return Config(768, vision, words, sigmoid=True, preprocessing=PreprocessingConfig(resize="squash"))


ARCHITECTURES: dict[str, Config] = {
    "RN50": _rn(224, (3, 4, 6, 3), 64, 512, 1024),
    "RN101": _rn(224, (3, 4, 23, 3), 64, 512, 512),
    "RN50x4": _rn(288, (4, 6, 10, 6), 80, 640, 640),
    "RN50x16": _rn(384, (6, 8, 18, 8), 96, 768, 768),
    "RN50x64": _rn(448, (3, 15, 36, 10), 128, 1024, 1024),
    "ViT-B-32": _vit(224, 32, 768, 12, _text(512), 512),
    "ViT-B-32-256": _vit(256, 32, 768, 12, _text(512), 512),
    "ViT-B-16": _vit(224, 16, 768, 12, _text(512), 512),
    "ViT-L-14": _vit(224, 14, 1024, 24, _text(768), 768),
    "ViT-L-14-336": _vit(336, 14, 1024, 24, _text(768), 768),
    "ViT-H-14": _vit(224, 14, 1280, 32, _text(1024, 24), 1024, heads=16),
    "ViT-g-14": _vit(224, 14, 1408, 40, _text(1024, 24), 1024, heads=16, ratio=4.3637),
    "ViT-bigG-14": _vit(224, 14, 1664, 48, _text(1280, 32), 1280, heads=16, ratio=4.9231),
    "ViT-B-16-SigLIP": _siglip(224, 16, 32000, "gelu", "gelu"),
    "ViT-B-16-SigLIP-256": _siglip(256, 16, 32000, "gelu", "gelu"),
    "ViT-B-16-SigLIP-384": _siglip(384, 16, 32000, "gelu", "gelu"),
    "ViT-B-16-SigLIP-512": _siglip(512, 16, 32000, "gelu", "gelu"),
    "ViT-B-32-SigLIP2-256": _siglip(256, 32, 256000, "gelu_tanh", "gelu_tanh"),
    "ViT-B-16-SigLIP2": _siglip(224, 16, 256000, "gelu", "gelu_tanh"),
    "ViT-B-16-SigLIP2-256": _siglip(256, 16, 256000, "gelu", "gelu_tanh"),
    "ViT-B-16-SigLIP2-384": _siglip(384, 16, 256000, "gelu", "gelu_tanh"),
    "ViT-B-16-SigLIP2-512": _siglip(512, 16, 256000, "gelu", "gelu_tanh"),
}

# Quick GELU: what OpenAI, and those who followed its code, trained with. The others trained with GELU.
_QUICK = """
RN50/openai                     timm/resnet50_clip.openai
RN101/openai                    timm/resnet101_clip.openai
RN50x4/openai                   timm/resnet50x4_clip.openai
RN50x16/openai                  timm/resnet50x16_clip.openai
RN50x64/openai                  timm/resnet50x64_clip.openai
ViT-B-32/openai                 timm/vit_base_patch32_clip_224.openai
ViT-B-16/openai                 timm/vit_base_patch16_clip_224.openai
ViT-L-14/openai                 timm/vit_large_patch14_clip_224.openai
ViT-L-14-336/openai             timm/vit_large_patch14_clip_336.openai
ViT-B-32/laion400m_e32          timm/vit_base_patch32_clip_224.laion400m_e32
ViT-B-32/metaclip_400m          timm/vit_base_patch32_clip_224.metaclip_400m
ViT-B-32/metaclip_fullcc        timm/vit_base_patch32_clip_224.metaclip_2pt5b
ViT-B-16/metaclip_400m          timm/vit_base_patch16_clip_224.metaclip_400m
ViT-B-16/metaclip_fullcc        timm/vit_base_patch16_clip_224.metaclip_2pt5b
ViT-L-14/metaclip_400m          timm/vit_large_patch14_clip_224.metaclip_400m
ViT-L-14/metaclip_fullcc        timm/vit_large_patch14_clip_224.metaclip_2pt5b
ViT-H-14/metaclip_fullcc        timm/vit_huge_patch14_clip_224.metaclip_2pt5b
ViT-bigG-14/metaclip_fullcc     timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b
ViT-B-16/dfn2b                  apple/DFN2B-CLIP-ViT-B-16
ViT-L-14/dfn2b                  apple/DFN2B-CLIP-ViT-L-14
"""
_GELU = """
ViT-B-16/laion400m_e32          timm/vit_base_patch16_clip_224.laion400m_e32
ViT-L-14/laion400m_e32          timm/vit_large_patch14_clip_224.laion400m_e32
ViT-B-32/laion2b_e16            timm/vit_base_patch32_clip_224.laion2b_e16
ViT-B-32/laion2b_s34b_b79k      laion/CLIP-ViT-B-32-laion2B-s34B-b79K
ViT-B-16/laion2b_s34b_b88k      laion/CLIP-ViT-B-16-laion2B-s34B-b88K
ViT-L-14/laion2b_s32b_b82k      laion/CLIP-ViT-L-14-laion2B-s32B-b82K
ViT-H-14/laion2b_s32b_b79k      laion/CLIP-ViT-H-14-laion2B-s32B-b79K
ViT-g-14/laion2b_s12b_b42k      laion/CLIP-ViT-g-14-laion2B-s12B-b42K
ViT-g-14/laion2b_s34b_b88k      laion/CLIP-ViT-g-14-laion2B-s34B-b88K
ViT-bigG-14/laion2b_s39b_b160k  laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
ViT-B-32/datacomp_xl_s13b_b90k  laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K
ViT-B-32-256/datacomp_s34b_b86k laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K
ViT-B-16/datacomp_xl_s13b_b90k  laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K
ViT-L-14/datacomp_xl_s13b_b90k  laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K
ViT-H-14/metaclip_altogether    timm/vit_huge_patch14_clip_224.metaclip_altogether
"""
_LISTS: tuple[tuple[str, Activation], ...] = ((_QUICK, "quick_gelu"), (_GELU, "gelu"))
# The one of these that was trained with other statistics.
_HALF = ("ViT-L-14/laion2b_s32b_b82k",)
_SHA256 = {
    "RN50/openai": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101/openai": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4/openai": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16/openai": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64/openai": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B-32/openai": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16/openai": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14/openai": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336/openai": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def _known(name: str, repository: str, activation: Activation) -> Known:
    config = ARCHITECTURES[name.partition("/")[0]]
    mean, std = (HALF, HALF) if name in _HALF else (CLIP_MEAN, CLIP_STD)
    if isinstance(config.image, VisionConfig):
        image: VisionConfig | ResNetConfig = replace(config.image, activation=activation, mean=mean, std=std)
    else:
        image = replace(config.image, mean=mean, std=std)
    config = replace(config, image=image, text=replace(config.text, activation=activation), name=name)
    return Known(name, repository, config, Words("clip"), _SHA256.get(name, ""))


def _table() -> dict[str, Known]:
    found = [
        _known(name, repository, activation)
        for lines, activation in _LISTS
        for name, repository in (line.split() for line in lines.strip().splitlines())
    ]
    found += [
        Known(
            f"{name}/webli",
            f"timm/{name}",
            replace(config, name=f"{name}/webli"),
            Words("file", "siglip", full=True),
        )
        for name, config in ARCHITECTURES.items()
        if config.sigmoid
    ]
    return {known.name: known for known in found}


MODELS: dict[str, Known] = _table()
# open_clip marks the activation in the architecture's name; here every model brings its own.
ALIASES: dict[str, str] = {
    name.replace("/", "-quickgelu/"): name
    for name, known in MODELS.items()
    if known.config.text.activation == "quick_gelu"
}
