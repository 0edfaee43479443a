"""Learned tokens in a tower: in front of its first block, and overwritten in front of the next ones.

With J lists of b vectors P_0 … P_{J-1}, P_0 goes in before block 0; before block i = 1 … J - 1 what has
become of the tokens in these places is thrown away and P_i stands there. From block J on they flow freely.
In pictures the places are the last ones, behind the patches and without positions (Jia et al., Visual Prompt
Tuning, ECCV 2022); in texts they are words behind the start token (`context_texts`, run by a `TextBank`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.core.hooks import BlockCall
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import VisionTower
from clipworks.errors import ConfigError
from clipworks.parts.context import spoken, text_tower
from clipworks.parts.dassl import DasslFile
from clipworks.parts.text_bank import TextBank, with_slots

DEVIATION = 0.02  # of random prompts


class DeepPrompts:
    """A hook that overwrites tokens in front of blocks 1 … J - 1.

    Args:
        values: J entries, (b, w) or (B, b, w); the first is not read, it went in before the first block.
        place: where in the sequence they stand; with a step of 1.
    """

    def __init__(self, values: Sequence[Tensor], place: slice):
        self.values = values
        self.place = place

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        """Run the block on tokens (B, N, w), some of them overwritten."""
        if 1 <= i < len(self.values):
            start, stop, _ = self.place.indices(tokens.shape[1])
            value = self.values[i].to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :start], value, tokens[:, stop:]], dim=1)
        return block(tokens)


def prompted_images(tower: VisionTower, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Pictures through an image tower with prompts behind their patches, differentiable in both.

    Args:
        tower: its own pooling reads the picture's tokens, not the prompts.
        pixels: (B, 3, H, W), bytes or floats in [0, 1].
        prompts: P_0 … P_{J-1}, (b, w) or (B, b, w) each; none at all is the plain tower.

    Returns:
        (B, D), not normalized.
    """
    if not prompts:
        vectors: Tensor = tower(pixels)
        return vectors
    length = prompts[0].shape[-2]
    placed = tower.place(tower.read(pixels), extra=prompts[0].to(tower.positions.dtype))
    tokens = tower.run(placed, around=DeepPrompts(prompts, slice(-length, None)))
    return tower.project(tokens[:, :-length])


def vision_tower(clip: Clip) -> VisionTower:
    """The image tower, if it has tokens.

    Raises:
        ConfigError: if it is no vision transformer of ours.
    """
    if not isinstance(clip.image, VisionTower):
        raise ConfigError(
            f"the image tower of {clip.config.name!r} is a {type(clip.image).__name__}, which has no tokens "
            "to put prompts among: take a vision transformer, or prompts in the text tower alone"
        )
    return clip.image


def random_prompts(depth: int, length: int, width: int, first: Tensor | None = None) -> nn.ParameterList:
    """J prompts (b, w), drawn from N(0, 0.02²); the first may be given."""
    drawn = [torch.randn(length, width) * DEVIATION for _ in range(depth)]
    if first is not None:
        drawn[0] = first.detach().float().clone()
    return nn.ParameterList([nn.Parameter(prompt) for prompt in drawn])


def context_words(clip: Clip, context: str, length: int) -> Tensor:
    """The embeddings (b, w) of a context's first b words, where learned ones start.

    Raises:
        ConfigError: if the context has fewer tokens: names of classes would be overwritten with it.
    """
    ids = _ids(clip, context)
    if len(ids) < length:
        raise ConfigError(
            f"{length} learned words cannot start from {context!r}, which has {len(ids)}: give a longer "
            "context, or None to start at random"
        )
    return text_tower(clip).embedding.weight[ids[:length]].detach().clone()


def context_texts(
    clip: Clip, names: Sequence[str], length: int, context: str | None, stop: str = "."
) -> Tokens:
    """One text `<context> <name>.` a class, ids (C, L) on the CPU, whose first b words are slots.

    A slot is the id `vocabulary + j`, as `TextBank` wants it. Words of the context behind the b-th stay;
    without a context the slots stand directly before the name.

    Raises:
        ConfigError: if the context is shorter than the slots.
        DataError: if a text does not fit the tower.
    """
    if clip.tokenizer is None:
        raise ConfigError(f"the Clip {clip.config.name!r} has no tokenizer to read class names with")
    if context is None:
        # Any word will do: the slots take its places.
        fillers = (" ".join([word] * length) for word in ("X", "a", "the"))
        context = next(filler for filler in fillers if len(_ids(clip, filler)) == length)
    elif len(_ids(clip, context)) < length:
        context_words(clip, context, length)
    texts = clip.tokenizer([f"{context} {name}{stop}" for name in names], truncate="error")
    start = int(clip.tokenizer.start is not None)
    return with_slots(texts, text_tower(clip).embedding.num_embeddings, start, length)


def _ids(clip: Clip, text: str) -> list[int]:
    if clip.tokenizer is None:
        raise ConfigError(f"the Clip {clip.config.name!r} has no tokenizer to read {text!r} with")
    return clip.tokenizer.encode(text)


def context_bank(clip: Clip, names: Sequence[str], length: int, context: str | None) -> TextBank:
    """The bank of `context_texts`: `bank(P_0, [P_1, …])` are the classes' vectors (C, D), not normalized."""
    return TextBank(clip.text, context_texts(clip, spoken(names), length, context))


def depth_in(tower: nn.Module, depth: int, length: int) -> int:
    """J, at most the blocks of a tower.

    Raises:
        ConfigError: for less than one block or one token.
    """
    if depth < 1 or length < 1:
        raise ConfigError(f"prompts need a depth and a length of at least 1, not {depth} and {length}")
    return min(depth, len(tower.blocks))  # type: ignore[arg-type]


def read_vision_prompts(file: DasslFile, width: int) -> list[Tensor]:
    """Q_0 … Q_{J-1}, (b, w) each, out of a checkpoint in which they are parameters of the tower's blocks."""
    first = file.take("image_encoder.VPT", None, width)
    name = "image_encoder.transformer.resblocks.{}.VPT_shallow"
    deep = range(1, 1 + file.count(name, 1))
    return [first, *(file.take(name.format(i), *first.shape) for i in deep)]


def text_prompts(clip: Clip, depth: int, length: int, context: str | None) -> nn.ParameterList:
    """P_0 … P_{J-1} at their start, (b_t, w_t) each."""
    depth = depth_in(clip.text, depth, length)
    first = None if context is None else context_words(clip, context, length)
    return random_prompts(depth, length, clip.config.text.width, first)


def read_text_prompts(file: DasslFile, width: int) -> list[Tensor]:
    """P_0 … P_{J-1} of a file, (b_t, w_t) each, taken out; the training classes' texts are left out."""
    first = file.take("prompt_learner.ctx", None, width)
    file.drop("prompt_learner.token_prefix", "prompt_learner.token_suffix")
    name = "text_encoder.transformer.resblocks.{}.VPT_shallow"
    deep = range(1, 1 + file.count(name, 1))
    return [first, *(file.take(name.format(i), len(first), width) for i in deep)]
