"""LaCLIP: Improving CLIP Training with Language Rewrites. Fan et al., NeurIPS 2023.

A language model rewrites every caption in M manners, once and beforehand (`data/rewrite.py`). Each time a
picture comes up, its text is drawn evenly from the caption and its rewrites, and the loss is CLIP's:

    L = CLIP(I, aug(T)),  aug(T) ~ uniform {T, T_1, …, T_M}

With `texts_per_sample="all"` a step takes all M + 1 texts of each picture and averages CLIP's loss over them,
where a text meets the texts of its own number only (the paper's multi-text variant):

    L = 1/(M + 1) Σ_j CLIP(I, T_j)

The draw is the loader's, so that nothing is tokenized that is not used: under the source `rewrite` a picture
has the list of all M + 1 texts (`clipworks.data.rewritten.Rewritten` puts them there); the loader draws one
by seed, key and visit, or takes all with `TextChoice({"rewrite": None})`.

The runs on CC3M, CC12M and RedCaps, both arms, had a ViT-B/16 with norms on queries and keys and no norm
before its blocks, and two activations: `CONFIG`, `fresh_model`.

Deviations: the loss is in fp32 (their logits are fp16); only matrices decay (there class token, position
tables and all projections do too, at 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipworks.checkpoints import files, layouts
from clipworks.checkpoints.settings import IMAGENET_MEAN, IMAGENET_STD
from clipworks.checkpoints.zoo import load
from clipworks.core.clip import INITIAL_SCALE, Clip, unit
from clipworks.core.config import Config, PreprocessingConfig, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer, Tokenizer, Tokens
from clipworks.core.towers import VisionTower
from clipworks.data.batch import Batch
from clipworks.encode.packed import text_vectors
from clipworks.engine.recipe import Recipe
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.pretrain.base import Objective, pairs
from clipworks.parts.contrastive import contrastive_loss

# The authors' command for CC12M at a batch of 8,192; the warm-up is one epoch.
RECIPE = Recipe(epochs=35, lr=1e-3, final_lr=0.01, warmup=1340, weight_decay=0.5, eps=1e-8)
# At a batch of 256 to 1,024; fewer than five visits a picture show little of the rewrites.
SMALL_RECIPE = Recipe(epochs=10, lr=1e-3, warmup=500, weight_decay=0.1)

CONFIG = Config(
    width=512,
    image=VisionConfig(
        image_size=224,
        patch_size=16,
        width=768,
        blocks=uniform_blocks(12, 768),
        activation="gelu",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        qk_norm=True,
    ),
    text=TextConfig(77, 49408, 512, uniform_blocks(12, 512), activation="quick_gelu"),
    preprocessing=PreprocessingConfig(resize="shortest", interpolation="bilinear"),
    name="laclip-ViT-B-16",
)


class LaClip(Objective):
    """CLIP's loss over texts that are drawn anew at each visit.

    Args:
        texts_per_sample: 1, the text that the loader has drawn; or `all` that the batch has of each picture,
            equally many.
        source: the texts, of which the caption itself is one.
        fresh: give the model the paper's initial scale, ln(1/0.07).

    Raises:
        ConfigError: for another number of texts.
    """

    def __init__(
        self, texts_per_sample: Literal[1, "all"] = 1, *, source: str = "rewrite", fresh: bool = False
    ):
        super().__init__()
        if texts_per_sample not in (1, "all"):
            raise ConfigError(f"texts_per_sample is 1 or 'all', not {texts_per_sample!r}")
        self.texts_per_sample = texts_per_sample
        self.source = source
        self.fresh = fresh

    @property
    def texts(self) -> Mapping[str, int | None]:
        """One text a picture, drawn anew, or all of them."""
        return {self.source: 1 if self.texts_per_sample == 1 else None}

    def prepare(self, clip: Clip) -> Clip:
        """The same model, with the paper's initial scale where `fresh`."""
        if self.fresh:
            with torch.no_grad():
                clip.scale.fill_(INITIAL_SCALE)
        return clip

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image` (B, D) and `text` (B, D), or (B, M + 1, D) for all texts, unit length; `scale` 0-D.

        Raises:
            DataError: if the batch lacks pictures or the texts, or has not equally many of each picture.
        """
        if self.texts_per_sample == 1:
            features = pairs(clip, batch, self.source)
            return {name: features[name] for name in ("image", "text", "scale")}
        if batch.images is None or self.source not in batch.texts:
            raise DataError(f"the batch needs pictures and texts of source {self.source!r}")
        tokens = batch.texts[self.source]
        text = unit(text_vectors(clip.text, tokens))[_by_picture(tokens, len(batch), self.source)]
        return {"image": unit(clip.image(batch.images)), "text": text, "scale": clip.scale}

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`contrastive`, 0-D, over all pairs of the global batch; of all texts the mean."""
        image, text, scale = features["image"], features["text"], features["scale"].exp()
        columns = text.unbind(1) if text.dim() == 3 else (text,)
        return {"contrastive": torch.stack([contrastive_loss(image, rows, scale) for rows in columns]).mean()}


def _by_picture(tokens: Tokens, size: int, source: str) -> Tensor:
    """Which texts are those of each picture, (B, M + 1) int64, in their order."""
    owner = tokens.owner
    if owner is None:
        return torch.arange(size, device=tokens.ids.device)[:, None]
    # On an accelerator the counts are not looked at, for that would wait for it; the total shows most faults.
    each = len(owner) // size
    equal = len(owner) == size * each > 0
    if owner.device.type == "cpu" and equal:
        equal = bool((owner.bincount(minlength=size) == each).all())
    if not equal:
        raise DataError(
            f"{len(owner)} texts of source {source!r} are not equally many for each of {size} pictures"
        )
    return owner.argsort(stable=True).view(size, each)


def fresh_model(tokenizer: Tokenizer | None = None, *, config: Config = CONFIG, seed: int = 0) -> Clip:
    """The authors' model with initial weights as theirs, `config` for another size.

    Texts and projections have CLIP's; class token and positions are N(0, 0.02²) cut at two units, and all
    else of the image tower has torch's defaults, which the authors' rebuilt blocks came to have.
    """
    clip = Clip.from_config(config, tokenizer or ClipTokenizer(config.text.context_length), seed=seed)
    if not isinstance(clip.image, VisionTower):
        raise ConfigError("the authors' image tower is a vision transformer")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for table in (clip.image.class_token, clip.image.positions):
            nn.init.trunc_normal_(table, std=0.02, a=-2.0, b=2.0, generator=generator)
        for layer in (clip.image.patches, *clip.image.blocks.modules()):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                bound = layer.weight[0].numel() ** -0.5
                for tensor in (layer.weight, layer.bias):
                    if tensor is not None:
                        tensor.uniform_(-bound, bound, generator=generator)
    return clip


def from_checkpoint(path: str | Path, *, tokenizer: Tokenizer | Literal[False] | None = None) -> Clip:
    """The model of one of the authors' files, of LaCLIP or of its baseline.

    Those of CC3M, CC12M and RedCaps have names of their own, which say everything. Those of LAION-400M are
    open_clip's plain CLIP: ViT-B/32 and B/16 with the exact GELU, L/14 with the quick one, which names and
    shapes do not tell.

    Args:
        path: the file.
        tokenizer: as `load` takes it.

    Raises:
        CheckpointError: if the file does not hold such a model.
    """
    weights = layouts.clean(files.read(Path(path)).weights, str(path))
    layout = layouts.recognize(weights, str(path))
    if layout == "laclip":
        return load(path, tokenizer=tokenizer)
    if layout != "openai" or "visual.class_embedding" not in weights:
        raise CheckpointError(f"{path}: not a model that LaCLIP's authors released (its layout is {layout})")
    image, text = weights["visual.class_embedding"].numel(), weights["ln_final.weight"].numel()
    return load(
        path,
        activation="quick_gelu" if image == 1024 else "gelu",
        statistics="clip",
        heads=(image // 64, text // 64),
        tokenizer=tokenizer,
    )
