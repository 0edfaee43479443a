"""Clip: two towers, a scale and a bias, and what people do with them.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021. With
unit vectors I and T, `logits = exp(scale) I Tᵀ + bias` (bias only for models trained with the sigmoid
loss). Of a tower, Clip asks only `tower(x) -> (B, D)`, `out_width` and `prepare`.

The methods that deal with pictures, lists and files hand on to the rooms that do the work: `encode` and
`checkpoints`. They are imported when called, and nothing else here knows them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.core.config import Config, VisionConfig
from clipworks.core.images import Preprocessing
from clipworks.core.initialize import Uninitialized, initialize
from clipworks.core.resnet import ModifiedResNet
from clipworks.core.tokenizer import Tokenizer, Tokens
from clipworks.core.towers import TextTower, VisionTower
from clipworks.errors import ConfigError, ShapeError

DEFAULT_TEMPLATES = ("a photo of a {}.",)
INITIAL_SCALE = math.log(1 / 0.07)
SIGMOID_SCALE, SIGMOID_BIAS = math.log(10.0), -10.0


@dataclass(frozen=True)
class Classification:
    """What `classify` found: `probabilities` (B, C), rows sum to one, for `labels` of length C."""

    labels: tuple[str, ...]
    probabilities: Tensor

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each picture its `k` likeliest labels with their probabilities, best first."""
        values, indices = self.probabilities.topk(min(k, len(self.labels)))
        return [
            [(self.labels[i], float(p)) for p, i in zip(row_p, row_i, strict=True)]
            for row_p, row_i in zip(values.tolist(), indices.tolist(), strict=True)
        ]


class Clip(nn.Module):
    """A CLIP: `image` and `text` towers, the logarithm of the logit `scale`, a `bias` or None.

    Attributes:
        config: geometry, frozen.
        tokenizer: strings to `Tokens`.
        preprocessing: pictures to bytes (3, n, n).
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        *,
        config: Config,
        tokenizer: Tokenizer | None = None,
        preprocessing: Preprocessing | None = None,
    ):
        super().__init__()
        self.image = image
        self.text = text
        self.scale = nn.Parameter(torch.tensor(SIGMOID_SCALE if config.sigmoid else INITIAL_SCALE))
        self.bias = nn.Parameter(torch.tensor(SIGMOID_BIAS)) if config.sigmoid else None
        self.config = config
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing or Preprocessing(
            image_size=config.image.image_size,
            resize=config.preprocessing.resize,
            interpolation=config.preprocessing.interpolation,
        )

    @classmethod
    def from_config(cls, config: Config, tokenizer: Tokenizer | None = None, *, seed: int | None = 0) -> Clip:
        """A fresh CLIP with the paper's initial weights; `seed=None` leaves them for a checkpoint to fill."""
        # Torch's own initial values would cost time and the global generator. The meta device would do
        # without them too, but leaving it imports a compiler's worth of modules.
        with Uninitialized():
            image: VisionTower | ModifiedResNet
            if isinstance(config.image, VisionConfig):
                image = VisionTower(config.image, config.width)
            else:
                image = ModifiedResNet(config.image, config.width)
            text = TextTower(config.text, config.width)
        clip = cls(image, text, config=config, tokenizer=tokenizer)
        if seed is not None:
            initialize(clip, torch.Generator().manual_seed(seed))
        return clip.eval()

    @property
    def width(self) -> int:
        """D, the number of features of an embedding."""
        return self.config.width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.scale.device

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Unit vectors (..., B, D) and (..., C, D) to logits (..., B, C) in fp32.

        Raises:
            ShapeError: if their widths differ.
        """
        if image_features.shape[-1] != text_features.shape[-1]:
            raise ShapeError(
                f"image features of width {image_features.shape[-1]} and text features of width "
                f"{text_features.shape[-1]} do not come from one model"
            )
        cosine = image_features.float() @ text_features.float().transpose(-1, -2)
        logits = self.scale.float().exp() * cosine
        return logits if self.bias is None else logits + self.bias.float()

    def forward(self, pixels: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) and n texts to unit vectors (B, D) and (n, D) in fp32."""
        return unit(self.image(pixels)), unit(self.text(tokens))

    def embed_images(self, images: Any, **options: Any) -> Tensor:
        """Unit vectors (n, D) fp32 of pictures: paths, PIL pictures, arrays, tensors, or several of them.

        Computed without gradient. Options (batch size, precision, engine, progress, what to do with pictures
        that cannot be read) are those of `clipworks.encode.bulk.encode_images`, which also reports them.

        Raises:
            PictureError: for a picture that cannot be read, naming it.
        """
        from clipworks.encode import bulk

        return bulk.encode_images(self, images, **options).features

    def embed_texts(self, texts: str | Iterable[str], **options: Any) -> Tensor:
        """Unit vectors (n, D) fp32 of strings, computed without gradient and without computing any padding.

        Options are those of `clipworks.encode.bulk.encode_texts`.
        """
        from clipworks.encode import bulk

        return bulk.encode_texts(self, texts, **options)

    def class_features(
        self,
        class_names: Sequence[str | Sequence[str]],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        **options: Any,
    ) -> Tensor:
        """The zero-shot head (C, D), unit length: a class's vector is the mean over templates and synonyms.

        Args:
            class_names: a name a class, or several that mean the same.
            templates: strings with one `{}`.

        Raises:
            ConfigError: without classes, with an empty name, or for a template without `{}`.
        """
        names = [[entry] if isinstance(entry, str) else list(entry) for entry in class_names]
        if not names or not all(entry and all(name.strip() for name in entry) for entry in names):
            raise ConfigError("every class needs a name: give at least one label, and none that is empty")
        for template in templates:
            if "{}" not in template:
                raise ConfigError(f"the template {template!r} has no {{}} for the class name")
        prompts = [
            template.replace("{}", name) for entry in names for name in entry for template in templates
        ]
        features = self.embed_texts(prompts, **options)
        counts = [len(entry) * len(templates) for entry in names]
        return unit(torch.stack([rows.mean(dim=0) for rows in features.split(counts)]))

    def classify(
        self,
        images: Any,
        labels: Sequence[str | Sequence[str]],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        **options: Any,
    ) -> Classification:
        """Which of the labels fits each picture: softmax over the labels, sigmoid models included.

        Raises:
            ConfigError: without labels, or with a label that appears twice.
            PictureError: for a picture that cannot be read.
        """
        names = tuple(entry if isinstance(entry, str) else entry[0] for entry in labels)
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"the label {sorted(twice)[0]!r} is given more than once")
        text_features = self.class_features(labels, templates)
        image_features = self.embed_images(images, **options)
        with torch.no_grad():
            return Classification(names, self.logits(image_features, text_features).softmax(dim=-1).cpu())

    def save(self, folder: str | Path) -> Path:
        """Write weights (safetensors), config, preprocessing and tokenizer to a folder that `load` reads."""
        from clipworks.checkpoints import own

        return own.save(self, Path(folder))

    def save_pretrained_hf(self, folder: str | Path) -> Path:
        """Write the folder that `transformers` loads as a `CLIPModel` or `SiglipModel`.

        Raises:
            CheckpointError: if this architecture has no counterpart there.
        """
        from clipworks.checkpoints import export

        return export.to_transformers(self, Path(folder))

    def save_open_clip(self, folder: str | Path) -> Path:
        """Write `open_clip_model.safetensors` and `open_clip_config.json`.

        Raises:
            CheckpointError: if this architecture has no counterpart there.
        """
        from clipworks.checkpoints import export

        return export.to_open_clip(self, Path(folder))

    def __deepcopy__(self, memo: dict[int, Any]) -> Clip:
        """A copy with weights of its own; the tokenizer is shared, it holds no state that matters."""
        memo[id(self.tokenizer)] = self.tokenizer
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., D) to unit length in fp32 (fp64 stays fp64)."""
    return F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)
