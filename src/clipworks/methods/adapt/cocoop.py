"""CoCoOp: conditional prompt learning. Zhou et al., CVPR 2022.

CoOp's context, shifted by the picture: a small network π, the meta-net, sees the unit image feature f̂(x), and
its output is added to all M vectors of the context (eq. 3),

    V_m(x) = V_m + π(f̂(x)),    π = Linear(D, ⌊D/16⌋) → ReLU → Linear(⌊D/16⌋, w)
    p(c | x) ∝ exp(s·cos(g([V₁(x)] … [V_M(x)] [name of c] .), f(x)))

so that every picture has class vectors of its own. What was learned depends less on the training classes:
accuracy on new ones, which falls under CoOp, holds up. The price is a text pass a picture, in training and
in use. The passes of several pictures go through one `TextBank`: the context of each is computed once for
all classes, and a chunk at a time, so memory does not grow with pictures × classes.

Recipe: CoOp's, with M = 4 from "a photo of a", batch 1, 10 epochs at 16 shots. π has torch's default start,
which is not zero. Deviations: fp32 in place of fp16, and cached views, as in `coop`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import Tokens
from clipworks.errors import ConfigError
from clipworks.methods.adapt.base import TrainedAdapter
from clipworks.parts.context import spoken, text_tower, token_count
from clipworks.parts.dassl import DasslFile
from clipworks.parts.prompts import DEVIATION, context_texts, context_words
from clipworks.parts.shots import Shots
from clipworks.parts.text_bank import TextBank

REDUCTION = 16
T = TypeVar("T", bound="CoCoOp")


@dataclass(eq=False, repr=False, kw_only=True)
class CoCoOp(TrainedAdapter):
    """Learned words in front of the class names that depend on the picture.

    Args:
        init: words to start from; M is the number of their tokens. None starts at random.
        context_length: M, where `init` is None.
        text_chunk: texts of pictures × classes that prediction computes at once, about.
    """

    init: str | None = "a photo of a"
    context_length: int = 4
    text_chunk: int = 2048
    views: int = 8
    crop: tuple[float, float] = (0.08, 1.0)
    epochs: int = 10
    batch_size: int = 1

    slug: ClassVar[str] = "cocoop"
    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        clip, text, length = self._model, text_tower(self._model), self._length
        if length < 1 or self.text_chunk < 1:
            raise ConfigError(
                "context_length and text_chunk must be at least 1, "
                f"not {self.context_length} and {self.text_chunk}"
            )
        if self.init is None:
            context = DEVIATION * torch.randn(length, text.width)
        else:
            context = context_words(clip, self.init, length)
        hidden = max(1, clip.width // REDUCTION)
        layers = [("linear1", nn.Linear(clip.width, hidden)), ("linear2", nn.Linear(hidden, text.width))]
        learned = nn.Module()
        learned.context = nn.Parameter(context)
        learned.meta_net = nn.Sequential(OrderedDict([layers[0], ("relu", nn.ReLU()), layers[1]]))
        return learned.to(text.positions.dtype)

    def class_features(self, image_features: Tensor | None = None) -> Tensor:
        """Unit vectors (B, C, D) of the classes as pictures with features (B, D) shift them.

        Without pictures, those of the context as it is, (C, D).
        """
        self._check_fitted()
        if self._learning:
            return self._shifted(image_features)
        with torch.no_grad(), self._undisturbed():
            return self._shifted(image_features)

    def _shifted(self, image_features: Tensor | None) -> Tensor:
        context = self.module_.context
        if image_features is None:
            return unit(self._bank(1)(context))
        shifts = self.module_.meta_net(unit(image_features).to(context))  # π(f̂(x)), (B, w)
        contexts = context + shifts[:, None]  # V(x), (B, M, w)
        features = unit(self._bank(len(contexts))(contexts.flatten(0, 1)))
        return features.unflatten(0, (len(contexts), -1))

    def _logits(self, features: Tensor) -> Tensor:
        if self._learning:
            return super()._logits(features)
        pictures = max(1, self.text_chunk // len(self.classes_))
        return torch.cat([super(CoCoOp, self)._logits(some) for some in features.split(pictures)])

    @classmethod
    def from_checkpoint(cls: type[T], path: str | PathLike[str], clip: Clip, class_names: Sequence[str]) -> T:
        """Context and meta-net of a file of the authors' code, `prompt_learner/model.pth.tar-<epoch>`.

        The embeddings of the training classes' texts in it are left out: these names are read instead.

        Args:
            path: the file; only tensors are made of it.
            clip: the Clip that it was trained with.
            class_names: any.

        Raises:
            CheckpointError: if the file is damaged, holds something else, or was made for another width.
        """
        file = DasslFile(path)
        file.drop("token_prefix", "token_suffix")
        loaded = cls(clip, list(class_names), init=None)
        width, hidden = text_tower(clip).width, max(1, clip.width // REDUCTION)
        learned = {
            "context": file.take("ctx", None, width),
            "meta_net.linear1.weight": file.take("meta_net.linear1.weight", hidden, clip.width),
            "meta_net.linear1.bias": file.take("meta_net.linear1.bias", hidden),
            "meta_net.linear2.weight": file.take("meta_net.linear2.weight", width, hidden),
            "meta_net.linear2.bias": file.take("meta_net.linear2.bias", width),
        }
        file.finish(clip)
        loaded.context_length = len(learned["context"])
        return loaded._learned_elsewhere(learned)

    # --- texts ---

    @property
    def _length(self) -> int:
        """M."""
        return self.context_length if self.init is None else token_count(self._model, self.init)

    def _bank(self, pictures: int) -> TextBank:
        """The texts of all classes with a context for each of some pictures, picture by picture."""

        def make() -> TextBank:
            text = text_tower(self._model)
            names = spoken(self.texts_.names)
            tokens = context_texts(self._model, names, self._length, self.init)
            slots = tokens.ids >= text.embedding.num_embeddings
            offsets = torch.arange(pictures)[:, None, None] * self._length
            ids = (tokens.ids + slots * offsets).flatten(0, 1)
            return TextBank(text, Tokens(ids, tokens.ends.repeat(pictures)))

        bank: TextBank = self._once(f"bank {pictures}", make)
        return bank
