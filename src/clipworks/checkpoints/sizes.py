"""A Clip for pictures of another size, or texts of another length."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from clipworks.checkpoints import own, vocabulary
from clipworks.core.clip import Clip
from clipworks.core.config import ResNetConfig
from clipworks.core.towers import resize_positions
from clipworks.errors import ConfigError


def resized(clip: Clip, *, image_size: int | None = None, context_length: int | None = None) -> Clip:
    """A copy for pictures of another size, or texts of another length; weights and tokenizer are its own.

    The position tables are interpolated: the grid bicubic with antialiasing, the row of a text linearly, as
    open_clip does. A shorter causal text keeps the first positions as they are, so texts that fit are
    embedded as before.

    Raises:
        ConfigError: for an image size that is no multiple of the patch, or a context below two.
    """
    config = clip.config
    image_size = image_size or config.image.image_size
    context_length = context_length or config.text.context_length
    if context_length < 2:
        raise ConfigError(f"context_length must be at least 2, not {context_length}")
    image = dataclasses.replace(config.image, image_size=image_size)
    config = dataclasses.replace(
        config, image=image, text=dataclasses.replace(config.text, context_length=context_length)
    )
    weights = dict(clip.state_dict())
    leading = 1 if isinstance(image, ResNetConfig) else int(image.class_token)
    with torch.no_grad():
        weights["image.positions"] = resize_positions(
            weights["image.positions"], (image.grid, image.grid), leading
        )
        weights["text.positions"] = stretch_positions(
            weights["text.positions"], context_length, cut=config.text.mask == "causal"
        )
    preprocessing = dataclasses.replace(clip.preprocessing, image_size=image_size)
    tokenizer = clip.tokenizer and vocabulary.with_length(clip.tokenizer, context_length)
    if tokenizer is not None:
        config = dataclasses.replace(config, tokenizer=own.tokenizer_config(tokenizer))
    twin = own.build(config, weights, "resized", tokenizer, preprocessing)
    return twin.to(clip.device).train(clip.training)


def stretch_positions(positions: Tensor, length: int, cut: bool = True) -> Tensor:
    """A table of text positions (L, w) for another length: (length, w).

    Longer, it is interpolated linearly; shorter, its beginning if `cut`, else interpolated too.
    """
    if length <= positions.shape[0] and (cut or length == positions.shape[0]):
        return positions[:length]
    rows = positions.float().T[None]
    rows = torch.nn.functional.interpolate(rows, size=length, mode="linear", align_corners=False)
    return rows[0].T.to(positions.dtype)
