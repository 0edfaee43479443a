"""CoOp: context optimization for CLIP. Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022.

Replaces the words around a class name by M learned vectors of the width w of the text tower's words,

    t_c = [V]₁ [V]₂ … [V]_M [name of c] .                                   (eq. 2; position "end")
    p(c | x) = exp(s·cos(g(t_c), f(x))) / Σ_j exp(s·cos(g(t_j), f(x)))      (eq. 3)
    t_c = [V]₁ … [V]_⌊M/2⌋ [name of c] [V]_⌊M/2⌋₊₁ … [V]_M .                (eq. 4; "middle")

("front" has the name before the context), with one context for all classes or one a class (`per_class`, the
paper's CSC), fitted by cross-entropy on a few labeled pictures. Both towers and s stay frozen, so pictures
are encoded once, and inference costs what zero-shot costs. The context starts from N(0, 0.02²), or from the
embeddings of words (`init`), and is then the zero-shot prompt of these words. Positions are added to the
context as to words. The end token stays where it was whatever the position of the name, and the feature is
read there.

Recipe: SGD 0.002, batch 32, cosine by epoch after one epoch at 1e-5, decay 5e-4 on the context too; random
resized crops and flips; the last epoch is deployed.

Deviations. fp32 in place of fp16, in which the first and last epochs round to nothing. Each picture has a
fixed number of random views (`views`), encoded once, of which every epoch shows another one; theirs are
drawn without end. M of `init` counts tokens; theirs counts blanks, and a word of two tokens breaks it. They
ignore `per_class` with `init`, here each class then starts from these words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import Tokens
from clipworks.data.captions import ClassTexts
from clipworks.errors import ConfigError
from clipworks.methods.adapt.base import TrainedAdapter
from clipworks.parts.context import spoken, text_tower, token_count
from clipworks.parts.dassl import DasslFile
from clipworks.parts.prompts import DEVIATION, context_texts, context_words
from clipworks.parts.shots import Shots
from clipworks.parts.text_bank import TextBank

Position = Literal["end", "middle", "front"]
C = TypeVar("C", bound="CoOp")


@dataclass(eq=False, repr=False, kw_only=True)
class CoOp(TrainedAdapter):
    """Learned words around the class names.

    Args:
        context_length: M; with `init`, the number of its tokens stands instead.
        per_class: a context for each class; it then serves no other class names.
        position: of the class name: `end`, `middle` or `front`.
        init: words to start from, such as "a photo of a"; None starts at random.
        epochs: 0 takes the paper's for the number of shots: 50 for 1, 100 below 8, 200 from 8 on (which for
            ImageNet are 50 at any number).
    """

    context_length: int = 16
    per_class: bool = False
    position: Position = "end"
    init: str | None = None
    views: int = 8
    crop: tuple[float, float] = (0.08, 1.0)
    epochs: int = 0

    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        if self.position not in get_args(Position):
            raise ConfigError(
                f"position must be one of {', '.join(get_args(Position))}, not {self.position!r}"
            )
        if self._length < 1:
            raise ConfigError(f"a context has at least one token; context_length={self.context_length}")
        clip, text = self._model, text_tower(self._model)
        classes = len(self.classes_) if self.per_class else 1
        if self.init is None:
            context = DEVIATION * torch.randn(classes, self._length, text.width)
        else:
            context = context_words(clip, self.init, self._length).repeat(classes, 1, 1)
        context = context.to(text.positions.dtype)
        return nn.ParameterDict({"context": context if self.per_class else context[0]})

    def _epochs(self, shots: Shots) -> int:
        if self.epochs:
            return self.epochs
        most = int(shots.counts(len(self.classes_)).max())
        return 50 if most == 1 else 100 if most < 8 else 200

    def _class_features(self) -> Tensor:
        return unit(self._bank(self.module_["context"].flatten(0, -2)))

    @property
    def context(self) -> Tensor:
        """V, what was learned: (M, w), or (C, M, w) with the classes in the order of `classes_`."""
        self._check_fitted()
        learned: Tensor = self.module_["context"]
        return learned.detach()

    def nearest_words(self, k: int = 1) -> list[list[tuple[str, float]]]:
        """The k tokens of the vocabulary nearest to each context vector, with their Euclidean distances.

        What was learned is not words: few of these mean anything.

        Returns:
            M entries, or C·M, class by class.
        """
        words = text_tower(self._model).embedding.weight.detach()
        near, ids = torch.cdist(self.context.flatten(0, -2).to(words), words).topk(k, largest=False)
        decode = self._model.tokenizer.decode  # type: ignore[union-attr]  # without one there is no context
        return [
            [(decode([i]).strip(), distance) for i, distance in zip(*row, strict=True)]
            for row in zip(ids.tolist(), near.tolist(), strict=True)
        ]

    def for_classes(self: C, class_names: Sequence[str] | ClassTexts) -> C:
        """The fitted context around other class names.

        Raises:
            ConfigError: if each class has a context of its own.
        """
        if self.per_class:
            raise ConfigError("a context for each class serves no others; fit with per_class=False")
        return super().for_classes(class_names)

    @classmethod
    def from_checkpoint(
        cls: type[C],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str],
        *,
        position: Position = "end",
    ) -> C:
        """The context of a file of the authors' code, `prompt_learner/model.pth.tar-<epoch>`.

        Neither class names nor the position are in the file. The embeddings of the training classes' texts
        are, and are left out: these names are read instead.

        Args:
            path: the file; only tensors are made of it.
            clip: the Clip that it was trained with.
            class_names: in the order of the training, if each has a context of its own.
            position: the `ctp` of the folder's name.

        Raises:
            CheckpointError: if the file is damaged, holds something else, or was made for another width.
        """
        file = DasslFile(path)
        file.drop("token_prefix", "token_suffix")
        loaded = cls(clip, list(class_names), position=position)
        loaded.per_class = "ctx" in file and file.weights["ctx"].ndim == 3
        if loaded.per_class:
            own = file.take("ctx", len(class_names), None, text_tower(clip).width)
            _, texts = loaded._settle(None)
            context = own[[list(class_names).index(name) for name in texts.names]]
        else:
            context = file.take("ctx", None, text_tower(clip).width)
        file.finish(clip)
        loaded.context_length = context.shape[-2]
        return loaded._learned_elsewhere({"context": context})

    # --- texts ---

    @property
    def _length(self) -> int:
        """M."""
        return self.context_length if self.init is None else token_count(self._model, self.init)

    @property
    def _bank(self) -> TextBank:
        bank: TextBank = self._once("bank", lambda: TextBank(self._model.text, self._texts()))
        return bank

    def _texts(self) -> Tokens:
        """A text a class; ids from the vocabulary's size on stand for context vectors."""
        names = spoken(self.texts_.names)
        length, clip = self._length, self._model
        tokens = context_texts(clip, names, length, self.init)
        slots = tokens.ids >= text_tower(self._model).embedding.num_embeddings
        start = int(slots[0].to(torch.uint8).argmax())
        ids = tokens.ids + slots * torch.arange(len(names))[:, None] * (length * self.per_class)
        before = {"end": length, "middle": length // 2, "front": 0}[self.position]
        lead = self.init or "X"
        for row, name in zip(ids, names, strict=True):
            # How many tokens the name has behind words. Where it ends in punctuation, the full stop belongs
            # to its last token and is moved with it.
            own = token_count(clip, f"{lead} {name}") - token_count(clip, lead)
            context, word = row[start : start + length].clone(), row[start + length :][:own].clone()
            row[start : start + length + own] = torch.cat([context[:before], word, context[before:]])
        return Tokens(ids, tokens.ends, tokens.owner)
