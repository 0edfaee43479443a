"""PRE: prompt learning with a reparameterization encoder. Pham Thi Minh et al., arXiv 2309.07760, 2023.

CoOp learns M vectors P that stand before every class name. Here a small network E with a skip connection
rewrites them first, and both are learned:

    P' = E(P) + P                  E a bidirectional LSTM over the M vectors, w/2 wide each way
    t_c = text tower([start] P' name . [end]),    loss = cross-entropy of s·cos(f, t_c)

The vectors are no longer free of each other, and the search moves differently: E is also a learned
preconditioner of P. After the fit P' is a constant, so prediction costs what CoOp's costs.

Sizes: P (M, w), E of one layer 4·w·(3w/2 + 2) numbers; torch's default initialization, zero initial state.
At the size of CLIP's word vectors the untrained LSTM's output is as long as its input, so the fit begins at a
random disturbance of the words. With `gain`, P' = P + g·E(P) and g is learned from that value on: from 0 the
fit begins at zero-shot.

Deviations. The authors' other encoders are `lstm2` (two layers, dropout 0.05 between them) and `mlp` (Linear
to 64, ReLU, Linear back, each vector by itself); their Transformer does not run as published, and their
separate networks are never trained. Features are cached for some views of each picture, one a step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.engine.randomness import own_randomness
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.adapt.base import Adapter, TrainedAdapter
from clipworks.parts.context import spoken, text_tower, token_count
from clipworks.parts.dassl import DasslFile
from clipworks.parts.prompts import DEVIATION, context_texts, context_words
from clipworks.parts.shots import Shots
from clipworks.parts.text_bank import TextBank, with_slots

P = TypeVar("P", bound="PRE")

HIDDEN, DROPOUT = 64, 0.05
ENCODERS = ("lstm", "lstm2", "mlp")


class PromptEncoder(nn.Module):
    """Vectors (M, w), or (C, M, w), to P' of the same shape.

    Args:
        width: w, even for an LSTM.
        encoder: `lstm`, `lstm2`, `mlp`, or a module that keeps the shape of vectors (..., M, w).
        residual: P' = P + E(P), else E(P).
        gain: None, or what g begins with in P' = P + g·E(P).

    Raises:
        ConfigError: for another name, or an odd width.
    """

    def __init__(
        self, width: int, encoder: str | nn.Module = "lstm", residual: bool = True, gain: float | None = None
    ):
        super().__init__()
        self.network = encoder if isinstance(encoder, nn.Module) else _network(encoder, width)
        self.residual = residual
        self.gain = None if gain is None else nn.Parameter(torch.tensor(float(gain)))

    def forward(self, vectors: Tensor) -> Tensor:
        """P to P', in fp32 whatever the towers run in."""
        with torch.autocast(vectors.device.type, enabled=False):
            encoded = self.network(vectors)
            encoded = encoded[0] if isinstance(encoded, tuple) else encoded  # an LSTM also gives its state
            if encoded.shape != vectors.shape:
                raise ShapeError(
                    f"the encoder made {tuple(encoded.shape)} of context vectors {tuple(vectors.shape)}"
                )
            if self.gain is not None:
                encoded = self.gain * encoded
            return vectors + encoded if self.residual else encoded


def _network(name: str, width: int) -> nn.Module:
    if name == "mlp":
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))
    if name not in ENCODERS:
        raise ConfigError(f"a prompt encoder is one of {', '.join(ENCODERS)} or a module, not {name!r}")
    if width % 2:
        raise ConfigError(f"a bidirectional encoder needs an even width of the text tower, not {width}")
    layers = 2 if name == "lstm2" else 1
    dropout = DROPOUT if layers > 1 else 0.0
    return nn.LSTM(width, width // 2, layers, batch_first=True, dropout=dropout, bidirectional=True)


class Prompt(nn.Module):
    """What PRE learns: start vectors P (M, w) or (C, M, w), and the encoder; called, it gives P'."""

    def __init__(self, vectors: Tensor, encoder: PromptEncoder):
        super().__init__()
        self.vectors = nn.Parameter(vectors)
        self.encoder = encoder

    def forward(self) -> Tensor:
        """P', shaped as P."""
        rewritten: Tensor = self.encoder(self.vectors)
        return rewritten


@dataclass(eq=False, repr=False, kw_only=True)
class PRE(TrainedAdapter):
    """A context before the class names that an encoder has rewritten.

    After `fit`, `context_` is P'.

    Args:
        context_length: M; with `init`, the number of its tokens stands instead.
        init: words whose vectors P begins with; None draws from N(0, 0.02²).
        prompt_encoder: `lstm`, `lstm2`, `mlp`, or a module that keeps the shape of vectors (..., M, w).
        residual: add P to what the encoder makes of it.
        gain: None, or what a learned factor of the encoder's output begins with.
        per_class: vectors of its own for each class, P (C, M, w); serves no other class names.
        keep_encoder: save P and E too, instead of P' alone.
    """

    context_length: int = 4
    init: str | None = "a photo of a"
    prompt_encoder: str | nn.Module = "lstm"
    residual: bool = True
    gain: float | None = None
    per_class: bool = False
    keep_encoder: bool = False
    views: int = 8
    crop: tuple[float, float] = (0.08, 1.0)

    retargets: ClassVar[bool] = True

    # --- the context ---

    def _prepare(self, shots: Shots | None) -> nn.Module:
        count, width = self._length, text_tower(self._model).width
        if count < 1:
            raise ConfigError(f"a context has at least one token; context_length={self.context_length}")
        classes = len(self.classes_) if self.per_class else 1
        if self.init is None:
            vectors = torch.randn(classes, count, width) * DEVIATION
        else:
            vectors = context_words(self._model, self.init, count).float().cpu().repeat(classes, 1, 1)
        # An encoder that was handed in is a setting; what is learned is a copy of it.
        network = self.prompt_encoder
        if isinstance(network, nn.Module):
            network = copy.deepcopy(network)
        encoder = PromptEncoder(width, network, self.residual, self.gain)
        return Prompt(vectors if self.per_class else vectors[0], encoder)

    @property
    def _length(self) -> int:
        """M."""
        return self.context_length if self.init is None else token_count(self._model, self.init)

    def _bank(self) -> TextBank:
        """The texts of all classes with slots in the places of the context."""
        tower, count = text_tower(self._model), self._length
        tokens = context_texts(self._model, spoken(self.texts_.names), count, self.init)
        if self.per_class:
            vocab_size = tower.embedding.num_embeddings
            start = int((tokens.ids[0] >= vocab_size).nonzero()[0])
            tokens = with_slots(tokens, vocab_size, start, count, per_text=True)
        return TextBank(tower, tokens)

    def _class_features(self) -> Tensor:
        context = vars(self).get("context_")
        if context is None:
            self.module_.train(self._learning)  # dropout of two layers
            context = self.module_()
        bank: TextBank = self._once("bank", self._bank)
        return unit(bank(context.flatten(0, -2)))

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        super()._fit(shots, validation)
        self._fold()

    def _fold(self) -> None:
        """Keep P' as a constant."""
        with torch.no_grad():
            self.module_.eval()
            self.context_ = self.module_().detach()
        self.parameters_ = sum(p.numel() for group in self._parameters() for p in group["params"])

    def for_classes(self: P, class_names: Sequence[str] | ClassTexts) -> P:
        """The fitted context before other class names.

        Raises:
            ConfigError: if each class has a context of its own.
        """
        if self.per_class:
            raise ConfigError("with per_class=True the context belongs to its classes; fit it to others")
        return super().for_classes(class_names)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers were fitted, of P and of E."""
        self._check_fitted()
        return self.parameters_

    # --- disk ---

    def _learned(self) -> dict[str, Tensor]:
        found = super()._learned()
        return found if self._learning or self.keep_encoder else {"context_": found["context_"]}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        if any(name.startswith("module_.") for name in tensors):
            super()._restore(tensors)
        else:
            Adapter._restore(self, tensors)
        context = tensors.get("context_")
        if context is not None:
            classes = (len(self.classes_),) if self.per_class else ()
            expected = (*classes, self._length, text_tower(self._model).width)
            if tuple(context.shape) != expected:
                raise CheckpointError(f"context_ is {tuple(context.shape)}, and must be {expected}")

    @classmethod
    def from_checkpoint(
        cls: type[P],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str] | ClassTexts,
        **settings: Any,
    ) -> P:
        """Read a file of the authors' code, `prompt_learner/model.pth.tar-50`, with an LSTM of one layer.

        Args:
            path: the file.
            clip: the Clip whose context it is; which one is not in the file.
            class_names: any, since the context serves all.
            settings: others than the file's, for instance `init=None` where M is not four.

        Raises:
            CheckpointError: if it holds something else, or of other shapes.
        """
        file = DasslFile(path)
        estimator = cls(clip, class_names, **settings)
        estimator.classes_, estimator.texts_ = estimator._settle(None)
        estimator.fitted_on_, estimator.n_features_in_ = "pictures", clip.width
        with torch.no_grad(), own_randomness(estimator.seed):
            module = estimator._prepare(None)
        # The encoder's attribute had another name when the released files were written: ends of keys count.
        taken: dict[str, Tensor] = {}
        for ours, parameter in module.named_parameters():
            end = "ctx" if ours == "vectors" else ours.replace("encoder.network", "lstm_head")
            matching = [key for key in file.weights if key == end or key.endswith(f".{end}")]
            if len(matching) != 1:
                raise CheckpointError(f"{path}: {len(matching)} tensors are called {end}, and one must be")
            taken[ours] = file.take(matching[0], *parameter.shape)
        # Embeddings of the training classes' texts.
        file.drop(*[key for key in file.weights if key.endswith(("token_prefix", "token_suffix"))])
        file.finish(clip)
        module.load_state_dict(taken)
        estimator.module_ = module.to(estimator._device)
        estimator._fold()
        return estimator
