"""Prompts in the text tower, alone or beside independent ones in the image tower. Khattak et al., CVPR 2023.

The paper of MaPLe compares with two methods that have what it has, save the coupling. With P_i (b_t, w_t)
in place of words before text block i < J_t, and Q_i (b_v, w_v) behind the patches before image block i < J_v,

- deep language prompts: P_i alone, of which P_0 starts from words, the others and Q_i from N(0, 0.02²);
- IVLP, independent vision-language prompts: P_i and Q_i, each trained by what it does to its own tower.

A text is `<context> <name>.`, and P_0 stands in place of the context's first b_t words, whose embeddings it
starts from; with b_t = 2 of "a photo of a", the words "of a" stay. Before block i > 0 what has become of the
prompts before is thrown away. Towers and scale are frozen. A tower of fewer than J blocks has prompts before
each.

Without a context P_0 is random and the prompts stand directly before the name; the paper's code does so for
any b_t > 4, here it has to be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.methods.adapt.base import ImageTower, TrainedAdapter
from clipworks.parts.dassl import DasslFile
from clipworks.parts.prompts import (
    context_bank,
    depth_in,
    prompted_images,
    random_prompts,
    read_text_prompts,
    read_vision_prompts,
    text_prompts,
    vision_tower,
)
from clipworks.parts.shots import Shots

L = TypeVar("L", bound="LanguagePrompts")
V = TypeVar("V", bound="IndependentPrompts")


@dataclass(eq=False, repr=False, kw_only=True)
class IndependentPrompts(TrainedAdapter):
    """IVLP: learned tokens in both towers that know nothing of each other.

    Args:
        text_length, vision_length: b_t and b_v, tokens before each block.
        text_depth, vision_depth: J_t and J_v, how many blocks have them.
        context: the words that P_0 starts from, at least b_t; None starts at random.
    """

    text_length: int = 2
    vision_length: int = 2
    text_depth: int = 12
    vision_depth: int = 12
    context: str | None = "a photo of a"
    lr: float = 0.0035
    epochs: int = 5
    batch_size: int = 4
    views: int = 1
    crop: tuple[float, float] = (0.08, 1.0)

    image_tower: ClassVar[ImageTower] = "trained"
    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        tower = vision_tower(self._model)
        depth = depth_in(tower, self.vision_depth, self.vision_length)
        vision = random_prompts(depth, self.vision_length, tower.width)
        text = text_prompts(self._model, self.text_depth, self.text_length, self.context)
        return nn.ModuleDict({"text": text, "vision": vision})

    def _encode(self, pixels: Tensor) -> Tensor:
        return prompted_images(vision_tower(self._model), pixels, list(self.module_["vision"]))

    def _class_features(self) -> Tensor:
        first, *deep = self.module_["text"]
        return unit(self._once("bank", self._bank)(first, deep))

    def _bank(self) -> object:
        return context_bank(self._model, self.texts_.names, self.text_length, self.context)

    @classmethod
    def from_checkpoint(
        cls: type[V], path: str | PathLike[str], clip: Clip, class_names: Sequence[str] | ClassTexts
    ) -> V:
        """Prompts that the authors of MaPLe released, `VLPromptLearner/model.pth.tar-5`.

        Raises:
            CheckpointError: if it is no such file, or was trained on another Clip.
        """
        file = DasslFile(path)
        text = read_text_prompts(file, clip.config.text.width)
        vision = read_vision_prompts(file, vision_tower(clip).width)
        file.finish(clip)
        made = cls(
            clip,
            class_names,
            text_length=len(text[0]),
            vision_length=len(vision[0]),
            text_depth=len(text),
            vision_depth=len(vision),
        )
        learned = {f"text.{i}": prompt for i, prompt in enumerate(text)}
        return made._learned_elsewhere(learned | {f"vision.{i}": prompt for i, prompt in enumerate(vision)})


@dataclass(eq=False, repr=False, kw_only=True)
class LanguagePrompts(TrainedAdapter):
    """Learned tokens in the text tower alone; pictures are encoded once, by the frozen tower.

    Args:
        length: b_t, tokens before each block.
        depth: J_t, how many blocks have them.
        context: the words that P_0 starts from, at least b_t; None starts at random.
    """

    length: int = 4
    depth: int = 12
    context: str | None = "a photo of a"
    lr: float = 0.0025
    epochs: int = 5
    batch_size: int = 4
    views: int = 5
    crop: tuple[float, float] = (0.08, 1.0)

    slug: ClassVar[str] = "language-prompts"
    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        return nn.ModuleDict({"text": text_prompts(self._model, self.depth, self.length, self.context)})

    def _class_features(self) -> Tensor:
        first, *deep = self.module_["text"]
        return unit(self._once("bank", self._bank)(first, deep))

    def _bank(self) -> object:
        return context_bank(self._model, self.texts_.names, self.length, self.context)

    @classmethod
    def from_checkpoint(
        cls: type[L], path: str | PathLike[str], clip: Clip, class_names: Sequence[str] | ClassTexts
    ) -> L:
        """Prompts that the authors of MaPLe released, a `VLPromptLearner` without vision prompts.

        Raises:
            CheckpointError: if it is no such file, or was trained on another Clip.
        """
        file = DasslFile(path)
        text = read_text_prompts(file, clip.config.text.width)
        file.finish(clip)
        made = cls(clip, class_names, length=len(text[0]), depth=len(text))
        return made._learned_elsewhere({f"text.{i}": prompt for i, prompt in enumerate(text)})
