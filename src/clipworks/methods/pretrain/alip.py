"""ALIP: Adaptive Language-Image Pre-training with Synthetic Caption. Yang et al., ICCV 2023.

A picture v has its raw web text r and a synthetic caption c. Where the two texts agree less than usual the
sample counts less, and each text of such a sample counts by its own agreement with the picture. Nothing is
filtered: a bad text loses weight as a positive and stays a negative. With unit vectors and s_ab = Σ a b:

    m ← 0.99 m + 0.01 mean(s)          one running mean m for each of s_rc, s_rv, s_cv, before the gates
    u = exp(γ_s (s_rc - m_rc))         w = min(1, u)                      language consistency    (eq. 2)
    p_r = exp(γ_p (s_rv - m_rv))       p_c = exp(γ_p (s_cv - m_cv))       description consistency (eq. 4)
        where u < 1; elsewhere both are 1
    L = L_r + L_c,  L_t = 1/N Σ_i w_i p_t,i ½ (-log softmax_j(a v_i t_j)_i - log softmax_j(a v_j t_i)_i)

The two kinds of text have softmaxes of their own; no gradient goes through w and p. The halves and the mean
are the authors' code's, the equations have sums. Where their figure prints max for min and m - s for s - m,
equations and code are followed.

The means start at 1 (`start="one"`), which takes some 450 steps to be forgotten; `start="batch"` corrects
for the start, so that the first step uses its own means, as a short training needs.

Deviations, with what they change: the loss is in fp32 and the gradient exact over all processes (theirs
differentiates each process's own rows, so a clip at norm 1 there is a larger one here); beta 1 stays 0.9
(their scheduler moves it between 0.95 and 0.85); the warm-up is linear; gains, biases and tables do not
decay; the scale has its upper bound ln 100 alone, its lower one of 0 is never met; initial weights are
CLIP's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import INITIAL_SCALE, Clip, unit
from clipworks.core.tokenizer import Tokenizer, Tokens
from clipworks.data.batch import Batch
from clipworks.encode.packed import text_vectors
from clipworks.engine.recipe import Recipe
from clipworks.errors import ConfigError, DataError
from clipworks.methods.pretrain.base import Objective
from clipworks.parts.contrastive import contrastive_loss

# The authors' command for YFCC15M at a batch of 4,096: 32 epochs are 117,696 steps.
RECIPE = Recipe(
    epochs=32, lr=1e-3, final_lr=4e-6, warmup=11_770, weight_decay=0.2, eps=1e-8, clip_gradient=1.0
)
# At a batch of 256 and 300 to 2,000 steps, together with `start="batch"`.
SMALL_RECIPE = Recipe(epochs=8, lr=1e-3, warmup=100, weight_decay=0.2, eps=1e-8, clip_gradient=1.0)

MEANS = ("mean_text_caption", "mean_text_image", "mean_caption_image")


@dataclass(frozen=True)
class Gates:
    """What the gates say of N samples.

    Attributes:
        sample: w (N,), in (0, 1].
        text, caption: p_r and p_c (N,), positive; 1 where w is 1.
        means: the running means with this batch in them, 0-D each, by the names of `MEANS`.
    """

    sample: Tensor
    text: Tensor
    caption: Tensor
    means: dict[str, Tensor]


class Alip(Objective):
    """Contrastive losses of both texts, weighted by how well picture, text and caption agree.

    `loss` looks at the running means and `backward` moves them, so a loss can be asked for without being
    taken. The batch needs one text a picture of each of two sources.

    Args:
        gamma_sample: γ_s, steepness of the language consistency gate; 0 leaves all samples their weight.
        gamma_pair: γ_p, steepness of the description consistency gate.
        momentum: share of a running mean that stays in a step.
        start: what the means start from, `one` or the first `batch`.
        source: the raw texts.
        synthetic: the captions.
        fresh: give the model the paper's initial scale, ln(1/0.07).

    Raises:
        ConfigError: for a negative steepness, a momentum outside [0, 1) or an unknown start.
    """

    mean_text_caption: Tensor
    mean_text_image: Tensor
    mean_caption_image: Tensor
    steps: Tensor

    def __init__(
        self,
        gamma_sample: float = 2.0,
        gamma_pair: float = 2.0,
        momentum: float = 0.99,
        start: Literal["one", "batch"] = "one",
        *,
        source: str = "alt",
        synthetic: str = "synthetic",
        fresh: bool = False,
    ):
        super().__init__()
        if gamma_sample < 0 or gamma_pair < 0:
            raise ConfigError(f"gammas must not be negative: {gamma_sample}, {gamma_pair}")
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum {momentum} lies outside [0, 1)")
        if start not in ("one", "batch"):
            raise ConfigError(f"start {start!r} is neither 'one' nor 'batch'")
        self.gamma_sample, self.gamma_pair = float(gamma_sample), float(gamma_pair)
        self.momentum, self.start = float(momentum), start
        self.source, self.synthetic = source, synthetic
        self.fresh = fresh
        for name in MEANS:
            self.register_buffer(name, torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def texts(self) -> Mapping[str, int | None]:
        """One raw text and one caption a picture."""
        return {self.source: 1, self.synthetic: 1}

    def prepare(self, clip: Clip) -> Clip:
        """The same model, with the paper's initial scale where `fresh`."""
        if self.fresh:
            with torch.no_grad():
                clip.scale.fill_(INITIAL_SCALE)
        return clip

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image`, `text` and `caption` (B, D), unit length; `scale` 0-D, a logarithm.

        Raises:
            DataError: if the batch lacks pictures or a source, or a picture has not one text of each.
        """
        if batch.images is None:
            raise DataError("the batch has no pictures")
        both = Tokens.cat([_one_each(batch, source) for source in (self.source, self.synthetic)])
        text, caption = unit(text_vectors(clip.text, both)).chunk(2)
        return {
            "image": unit(clip.image(batch.images)),
            "text": text,
            "caption": caption,
            "scale": clip.scale,
        }

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`loss`, 0-D, and without gradient what it is made of.

        `raw` and `caption` are L_r and L_c; then the running means, the means of w, p_r and p_c, and the
        share of weights above 1.
        """
        image, text, caption, scale = (features[name] for name in ("image", "text", "caption", "scale"))
        gates = self.gates(image, text, caption)
        weights = {"raw": gates.sample * gates.text, "caption": gates.sample * gates.caption}
        parts = {
            # The shared function is a weighted mean; L_t divides by N.
            name: weights[name].mean() * contrastive_loss(image, rows, scale.exp(), weights=weights[name])
            for name, rows in (("raw", text), ("caption", caption))
        }
        with torch.no_grad():
            meters = {
                "sample_weight": gates.sample.mean(),
                "text_weight": gates.text.mean(),
                "caption_weight": gates.caption.mean(),
                "above_one": (torch.stack(list(weights.values())) > 1).float().mean(),
            }
        detached = {name: part.detach() for name, part in parts.items()}
        return {"loss": parts["raw"] + parts["caption"], **detached, **gates.means, **meters}

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Go back, and take over the running means (0-D) that the terms were computed with."""
        terms["loss"].backward()
        with torch.no_grad():
            for name in MEANS:
                getattr(self, name).copy_(terms[name])
            self.steps += 1

    @torch.no_grad()
    def gates(self, image: Tensor, text: Tensor, caption: Tensor) -> Gates:
        """Weights (N,) of unit vectors of pictures, texts and captions, (N, D) each, of a global batch."""
        similarities = dict(zip(MEANS, (_agreement(text, caption), _agreement(text, image),
                                        _agreement(caption, image))))  # fmt: skip
        share = self._share()
        means = {
            name: getattr(self, name).lerp(s.mean().to(share.dtype), share)
            for name, s in similarities.items()
        }
        excess = {name: s - means[name] for name, s in similarities.items()}
        agreeing = (self.gamma_sample * excess["mean_text_caption"]).exp()
        suspect = agreeing < 1
        text_weight, caption_weight = (
            torch.where(suspect, (self.gamma_pair * excess[name]).exp(), 1.0) for name in MEANS[1:]
        )
        return Gates(agreeing.clamp(max=1), text_weight, caption_weight, means)

    def _share(self) -> Tensor:
        """The weight of the next batch in the means: 1 - β, or (1 - β) / (1 - β^k) in step k.

        The latter makes m the average EMA_0 / (1 - β^k) of all batches so far, which forgets no start.
        """
        mean = self.mean_text_caption
        if self.start == "one" or self.momentum == 0:
            return torch.full_like(mean, 1 - self.momentum)
        step = (self.steps + 1).to(mean.dtype)
        return (1 - self.momentum) / -torch.expm1(step * math.log(self.momentum))


def from_checkpoint(
    path: str | Path,
    clip: Clip | None = None,
    *,
    heads: tuple[int, int] = (12, 8),
    tokenizer: Tokenizer | Literal[False] | None = None,
) -> Clip:
    """The model of the authors' file `ALIP_YFCC15M_B32.pt`, or of a `model_<epoch>.pt` of their training.

    The file has OpenAI's names and no word of its activation, which is the exact GELU in both towers; the
    running means are not in it.

    Args:
        path: the file.
        clip: a model whose heads and tokenizer the file shares, in place of ViT-B/32's.
        heads: of image and text tower.
        tokenizer: as `load` takes it.

    Raises:
        CheckpointError: if the file does not hold such a model.
    """
    if clip is not None:
        heads = (clip.config.image.blocks[0].heads, clip.config.text.blocks[0].heads)  # type: ignore[union-attr]
        tokenizer = clip.tokenizer or False
    return load(path, activation="gelu", statistics="clip", heads=heads, tokenizer=tokenizer)


def _agreement(one: Tensor, other: Tensor) -> Tensor:
    """Row-wise cosines (N,) of unit vectors (N, D)."""
    one, other = (x if x.dtype == torch.float64 else x.float() for x in (one, other))
    return (one * other).sum(1)


def _one_each(batch: Batch, source: str) -> Tokens:
    """One text a picture, ids (B, L); a picture without one must not borrow another's and move the means."""
    if source not in batch.texts:
        raise DataError(
            f"the batch has no texts of source {source!r}, only {', '.join(batch.texts) or 'none'}"
        )
    tokens = batch.texts[source]
    if tokens.owner is None:
        return tokens
    missing = len(batch) - len(tokens.owner.unique())
    if missing:
        raise DataError(f"{missing} of {len(batch)} pictures of the batch have no text of source {source!r}")
    raise DataError(f"source {source!r} has several texts a picture; this objective takes one")
