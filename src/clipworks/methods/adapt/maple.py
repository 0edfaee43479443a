"""MaPLe: multi-modal prompt learning. Khattak et al., CVPR 2023.

Learned tokens before the first J blocks of both towers, those of the image tower being a linear image of
those of the text tower. With P_i (b, w_t) and maps F_i from w_t to w_v numbers learned, i = 0 … J - 1,

    P̃_i = F_i(P_i)
    text:    [_, W_{i+1}] = B_i([P_i, W_i])     i < J, words W;                     freely from block J on
    image:   [x_{i+1}, _] = B̃_i([x_i, P̃_i])     i < J, class token and patches x;   freely from block J on
    logits = exp(scale) · f̂ · t̂ᵀ

So what the pictures want reaches the text prompts too: ∂L/∂P_i = ∂L/∂P_i|text + F_iᵀ ∂L/∂P̃_i. Towers and
scale are frozen. Before block i > 0 what has become of the prompts before is thrown away; "depth J" counts
block 0.

A text is `<context> <name>.`, and P_0 stands in place of the context's first b words, whose embeddings it
starts from; with b = 2 of "a photo of a", the words "of a" stay. The other P_i are drawn from N(0, 0.02²).
P̃_0 stands behind the patches, before the first norm, without a position. F_0 has torch's initial weights;
the deeper maps start as copies of one such layer. After training only P_i and P̃_i are needed.

Deviations. Widths are read off the towers, of which the one with fewer blocks limits J. Prompts, maps and
loss stay in fp32, where the paper's code rounds prompts to half precision in every pass. Without a context
P_0 is random and the prompts stand directly before the name; the code does so for any b > 4, here it is
asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.methods.adapt.base import ImageTower, TrainedAdapter
from clipworks.parts.dassl import DasslFile
from clipworks.parts.prompts import (
    context_bank,
    context_words,
    depth_in,
    prompted_images,
    random_prompts,
    vision_tower,
)
from clipworks.parts.shots import Shots

M = TypeVar("M", bound="MaPLe")


class CoupledPrompts(nn.Module):
    """Text prompts, and maps that make vision prompts of them.

    Attributes:
        prompts: P_i, (b, w_t) each.
        maps: F_i, one for each block that has prompts.
    """

    def __init__(self, prompts: nn.ParameterList, vision_width: int):
        super().__init__()
        text_width = prompts[0].shape[-1]
        self.prompts = prompts
        first, deeper = (nn.Linear(text_width, vision_width) for _ in range(2))
        self.maps = nn.ModuleList([first, *(copy.deepcopy(deeper) for _ in prompts[1:])])

    def text_prompts(self) -> list[Tensor]:
        """P_i, J of (b, w_t)."""
        return list(self.prompts)

    def vision_prompts(self) -> list[Tensor]:
        """P̃_i = F_i(P_i), J of (b, w_v), in fp32 whatever the towers compute in."""
        with torch.autocast(self.prompts[0].device.type, enabled=False):
            return [to_vision(prompt) for to_vision, prompt in zip(self.maps, self.prompts, strict=True)]


@dataclass(eq=False, repr=False, kw_only=True)
class MaPLe(TrainedAdapter):
    """Coupled prompts in both towers.

    Args:
        prompt_length: b, tokens before each block.
        depth: J, how many blocks have them; the paper takes 9 from base to new classes of a data set, and 3
            (with lr 0.0026 and 2 epochs) from one data set to others.
        context: the words that P_0 starts from, at least b; None starts at random.
    """

    prompt_length: int = 2
    depth: int = 9
    context: str | None = "a photo of a"
    lr: float = 0.0035
    epochs: int = 5
    batch_size: int = 4
    views: int = 1
    crop: tuple[float, float] = (0.08, 1.0)

    image_tower: ClassVar[ImageTower] = "trained"
    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        clip, length = self._model, self.prompt_length
        tower = vision_tower(clip)
        depth = min(depth_in(side, self.depth, length) for side in (tower, clip.text))
        first = None if self.context is None else context_words(clip, self.context, length)
        return CoupledPrompts(random_prompts(depth, length, clip.config.text.width, first), tower.width)

    def _encode(self, pixels: Tensor) -> Tensor:
        prompts = self.module_.vision_prompts
        folded = prompts() if self._learning else self._once("vision prompts", prompts)
        return prompted_images(vision_tower(self._model), pixels, folded)

    def _class_features(self) -> Tensor:
        first, *deep = self.module_.text_prompts()
        return unit(self._once("bank", self._bank)(first, deep))

    def _bank(self) -> object:
        return context_bank(self._model, self.texts_.names, self.prompt_length, self.context)

    @classmethod
    def from_checkpoint(
        cls: type[M], path: str | PathLike[str], clip: Clip, class_names: Sequence[str] | ClassTexts
    ) -> M:
        """What the authors released, `MultiModalPromptLearner/model.pth.tar-5` (or -2); J is the file's.

        Raises:
            CheckpointError: if it is no such file, or was trained on another Clip.
        """
        file, learner = DasslFile(path), "prompt_learner."
        text_width, vision_width = clip.config.text.width, vision_tower(clip).width
        first = file.take(f"{learner}ctx", None, text_width)
        deep = range(file.count(f"{learner}compound_prompts_text.{{}}"))
        prompts = [
            first,
            *(file.take(f"{learner}compound_prompts_text.{i}", *first.shape) for i in deep),
        ]
        learned = {f"prompts.{i}": prompt for i, prompt in enumerate(prompts)}
        names = ["proj", *(f"compound_prompt_projections.{i}" for i in deep)]
        for i, name in enumerate(names):
            learned[f"maps.{i}.weight"] = file.take(f"{learner}{name}.weight", vision_width, text_width)
            learned[f"maps.{i}.bias"] = file.take(f"{learner}{name}.bias", vision_width)
        file.drop(f"{learner}token_prefix", f"{learner}token_suffix")
        file.finish(clip)
        made = cls(clip, class_names, prompt_length=len(first), depth=len(prompts))
        return made._learned_elsewhere(learned)
