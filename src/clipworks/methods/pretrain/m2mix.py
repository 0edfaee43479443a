"""m³-Mix: Geodesic Multi-Modal Mixup for Robust Fine-Tuning. Oh et al., NeurIPS 2023.

Images and texts of CLIP lie in two cones with empty sphere between them, and fine-tuning leaves them there.
Mixtures of each pair's image and text on the great circle between them stand in for the other pairs in a
second contrastive loss, where they are harder than any real negative. v and t (N, D) are the unit vectors of
the global batch, ī the partner of i, e the epoch from 0, τ and τ₂ constants.

    m_λ(a, b) = (sin(λθ) a + sin((1 - λ)θ) b) / sin θ,  θ = arccos(a·b)                    (geodesic mixup)
    C = ½ (CE rows + CE columns) of v tᵀ / τ, targets (i, i)                               (CLIP)
    M = CE(image rows) + CE(text rows), λ ~ Beta(b, b), n_j = m_λ(v_j, t_j)                (m²-Mix)
        image rows: v_i·t_i / τ₂ on the diagonal, v_i·n_j / τ₂ elsewhere; text rows: t_i·n_j / τ₂ elsewhere
    V = CE of m_λ(v_i, v_ī) against t / τ, targets λ on i and 1 - λ on ī; both directions  (V-Mix)
    L = the same of v against m_λ(t_i, t_ī)                                                (L-Mix)
    W = CE of m_λ(v_i, v_ī) against m_λ(t_i, t_ī), one λ, target i ("first") or i and ī    (VL-Mix)
    loss = C + (w M + w_1 (V + L) + w_2 W) / (e + 1)                                       (m³-Mix)

Each term has its own λ in each step, a constant for the gradient; λ weights the first vector. M is a sum of
two means. In W the published code gives weight 1 to i and also to ī, which is a true negative near the ends
of the arc; with one λ on both sides i alone is right. Both towers are trained, the temperatures are not.

Where this differs from the authors' code: the loss is in fp32, and so are the weights (theirs are rounded to
fp16 after each step, which swallows steps below 8e-6); matrices alone decay; partners are the reverse of a
random order instead of the loader's, so that the order of a batch does not matter; captions that say the
same are positives of each other in C and no negatives of each other elsewhere; the cosine is bounded, so that
equal vectors mix to themselves instead of NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipworks.checkpoints import files, foreign, layouts
from clipworks.checkpoints.settings import Stated, from_caller
from clipworks.core.clip import Clip
from clipworks.core.tokenizer import Tokenizer
from clipworks.data.batch import Batch
from clipworks.engine.recipe import Recipe
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.pretrain.base import Objective, pairs
from clipworks.parts.contrastive import Targets, contrastive_loss
from clipworks.parts.duplicates import token_keys

# The authors' scripts for pairs of Flickr30k at a batch of 128, 226 steps an epoch.
RECIPE = Recipe(epochs=9, lr=1e-5, warmup=203, weight_decay=0.2, betas=(0.9, 0.999), eps=1e-8)
BOUND = 1 - 1e-6  # of a cosine: beyond it the great circle is not determined
# What the authors' model has besides a CLIP; the last is memory that nobody has written to.
NOT_OF_CLIP = ("prompts_weights", "text_bias", "logit_scale2", "text_projection_mix")


@dataclass(frozen=True)
class SingleMix:
    """Mixtures within a modality, which make m³-Mix of m²-Mix.

    Attributes:
        weight: of V-Mix and of L-Mix.
        beta: of the distribution of λ.
        pair_weight: of VL-Mix.
        pair_target: what a mixed pair is matched with: `both` members as the published code has it, or the
            `first`.
    """

    weight: float = 0.05
    beta: float = 0.5
    pair_weight: float = 0.1
    pair_target: Literal["both", "first"] = "both"

    def __post_init__(self) -> None:
        if self.weight < 0 or self.pair_weight < 0 or self.beta <= 0:
            raise ConfigError(f"weights must not be negative and beta must be above 0: {self}")
        if self.pair_target not in ("both", "first"):
            raise ConfigError(f"pair_target {self.pair_target!r} is neither both nor first")


class M2Mix(Objective):
    """Fine-tuning with m²-Mix, or m³-Mix with `single`.

    Args:
        weight: w of m²-Mix; the scripts sweep 0.001 to 0.05.
        beta: b of its λ; the scripts have 0.5 for m², 0.2 for m³.
        mix_temperature: τ₂.
        temperature: τ; None takes the model's own.
        fade: divide everything but C by the number of the epoch.
        single: mixtures within a modality; None has none.
        source: which texts of the batch, one a picture.
    """

    def __init__(
        self,
        weight: float = 0.01,
        beta: float = 0.5,
        mix_temperature: float = 0.07,
        temperature: float | None = None,
        fade: bool = True,
        single: SingleMix | None = None,
        *,
        source: str = "alt",
    ):
        super().__init__()
        if weight < 0 or beta <= 0 or mix_temperature <= 0 or (temperature is not None and temperature <= 0):
            raise ConfigError(
                "weight must not be negative, beta and temperatures must be above 0: "
                f"{weight}, {beta}, {mix_temperature}, {temperature}"
            )
        self.weight = weight
        self.beta = beta
        self.mix_temperature = mix_temperature
        self.temperature = temperature
        self.fade = fade
        self.single = single
        self.source = source
        self.epoch: Tensor
        self.register_buffer("epoch", torch.zeros(()))

    def prepare(self, clip: Clip) -> Clip:
        """The same model with its scale at -ln τ where τ is given; the scale, and a bias, are frozen."""
        if self.temperature is not None:
            with torch.no_grad():
                clip.scale.fill_(-math.log(self.temperature))
        clip.scale.requires_grad_(False)
        if clip.bias is not None:  # adds the same to all logits of a softmax
            clip.bias.requires_grad_(False)
        return clip

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that begins, from 0."""
        self.epoch.fill_(epoch)

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """Vectors, and what is drawn.

        Returns:
            `image` and `text` (B, D), unit length; `scale` and `bias`; `caption` (B,) int64, the same for
            captions that say the same; `order` (B,), random numbers by which the rows of the global batch
            are sorted; `mix` (B, k), a λ for each of k terms, of which the first row in that order is used,
            so that all processes use the same; `epoch`, 0-D.
        """
        clip.eval()  # as the paper tunes it: batch norms keep their statistics
        features: dict[str, Any] = pairs(clip, batch, self.source)
        v = features["image"]
        concentration = [self.beta] + ([] if self.single is None else [self.single.beta] * 3)
        b = torch.tensor(concentration, device=v.device)
        keys = batch.features.get("caption")
        return features | {
            "caption": token_keys(batch.texts[self.source]) if keys is None else keys,
            "order": torch.rand(len(v), device=v.device),
            "mix": torch.distributions.Beta(b, b, validate_args=False).sample((len(v),)),
            "epoch": self.epoch.clone(),
        }

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`contrastive` C and what is added to it, weights included: `m2`, `image_mix` V, `text_mix` L,
        `pair_mix` W; 0-D each. A weight of 0 leaves its term out.
        """
        v, t, scale = features["image"], features["text"], features["scale"].exp()
        keys = features["caption"]
        order = features["order"].argsort()
        partner = torch.empty_like(order).scatter_(0, order, order.flip(0))
        mix = features["mix"].detach()[order[:1]][0]
        share = 1 / (features["epoch"] + 1) if self.fade else 1.0
        terms = {"contrastive": contrastive_loss(v, t, scale, targets=Targets((keys, keys)))}
        with torch.autocast(v.device.type, enabled=False):
            if self.weight:
                n = self.mixtures(v, t, mix[0])
                loss = m2_loss(v, t, n, self.mix_temperature, keys[:, None] == keys)
                terms["m2"] = share * self.weight * loss
            if self.single is not None:
                losses = single_losses(v, t, scale, mix[1:], partner, keys, self.single.pair_target)
                weights = (self.single.weight, self.single.weight, self.single.pair_weight)
                for (name, loss), weight in zip(losses.items(), weights, strict=True):
                    if weight:
                        terms[name] = share * weight * loss
        return terms

    def mixtures(self, v: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """The negatives n (N, D) of m²-Mix: each pair's vectors (N, D) mixed with λ = `weight`."""
        return geodesic_mix(v, t, weight)


def geodesic_mix(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """The point of the great circle from b to a at the share `weight` of its way: m_λ(a, b).

    Args:
        a, b: (..., D), unit length. Where they are equal the result is that vector; where they are opposite
            it is finite and not of unit length, for there are many great circles.
        weight: λ in [0, 1], broadcast over (..., 1).

    Returns:
        (..., D), unit length, in fp32 (fp64 if given); differentiable with respect to all three.

    Raises:
        ShapeError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise ShapeError(f"vectors {tuple(a.shape)} and {tuple(b.shape)} cannot be mixed")
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    theta = (a * b).sum(dim=-1, keepdim=True).clamp(-BOUND, BOUND).arccos()
    return ((weight * theta).sin() * a + ((1 - weight) * theta).sin() * b) / theta.sin()


def m2_loss(v: Tensor, t: Tensor, n: Tensor, temperature: float, left_out: Tensor | None = None) -> Tensor:
    """M of m²-Mix: each pair's own similarity against those of its image, and of its text, with mixtures.

    Args:
        v, t: (N, D), unit length, row i a pair.
        n: (N, D), the mixture that stands in for pair j as a negative in row j.
        temperature: τ₂.
        left_out: (N, N) bool, True where mixture j is no negative of pair i; the diagonal is not read.

    Returns:
        0-D, the sum of the means over image rows and text rows.
    """
    own = torch.arange(len(v), device=v.device)
    diagonal = own[:, None] == own
    positive = (v * t).sum(dim=1, keepdim=True)
    total = v.new_zeros(())
    for anchors in (v, t):
        # Chosen, not multiplied by masks: what is not chosen may be anything.
        logits = torch.where(diagonal, positive, anchors @ n.T) / temperature
        if left_out is not None:
            logits = logits.masked_fill(left_out & ~diagonal, -math.inf)
        total = total + F.cross_entropy(logits, own)
    return total


def single_losses(
    v: Tensor,
    t: Tensor,
    scale: Tensor,
    weights: Tensor,
    partner: Tensor,
    keys: Tensor,
    pair_target: Literal["both", "first"],
) -> dict[str, Tensor]:
    """V, L and W: contrastive losses of mixtures of rows with their partners.

    Args:
        v, t: (N, D), unit length, row i a pair.
        scale: 1/τ.
        weights: (3,), the λ of each.
        partner: (N,) int64, an involution; a row may be its own partner.
        keys: (N,), equal for captions that say the same.
        pair_target: as in `SingleMix`.

    Returns:
        `image_mix`, `text_mix` and `pair_mix`, 0-D each.
    """
    own = torch.arange(len(v), device=v.device)
    first = (own[:, None] == own).to(v.dtype)
    second = first[partner]
    # A mixture says what both its members say, and nothing that says the same is a negative of it.
    same = keys[:, None] == keys
    image_says, text_says = same | same[partner], same | same[:, partner]
    paired = (first + second).bool()

    def mixed(x: Tensor, weight: Tensor) -> Tensor:
        return geodesic_mix(x, x[partner], weight)

    def loss(images: Tensor, texts: Tensor, positives: Tensor, says: Tensor) -> Tensor:
        return contrastive_loss(images, texts, scale, targets=Targets(positives, paired | ~says))

    def soft(weight: Tensor) -> Tensor:
        return weight * first + (1 - weight) * second

    # The loss has targets of sum 1; two targets of weight 1 are twice that.
    hard, mass = (first, 1) if pair_target == "first" else (first + second, 2)
    in_v, in_l, in_w = weights.unbind()
    everything = image_says | image_says[:, partner]
    return {
        "image_mix": loss(mixed(v, in_v), t, soft(in_v), image_says),
        "text_mix": loss(v, mixed(t, in_l), soft(in_l), text_says),
        "pair_mix": mass * loss(mixed(v, in_w), mixed(t, in_w), hard, everything),
    }


def from_checkpoint(path: str | Path, *, tokenizer: Tokenizer | Literal[False] | None = None) -> Clip:
    """A Clip of a file that the authors' script saves: OpenAI's names and four tensors that are not CLIP's.

    Its scale is the starting model's, not the temperature that it was tuned with.

    Args:
        path: the file; unpickled as tensors only.
        tokenizer: another than CLIP's; False for none.

    Raises:
        CheckpointError: naming the file and the tensor at fault.
    """
    label = str(path)
    weights = layouts.clean(files.read(Path(path)).weights, label)
    for name in NOT_OF_CLIP:
        weights.pop(name, None)
    image = "visual.ln_pre.weight" if "visual.ln_pre.weight" in weights else "visual.attnpool.k_proj.bias"
    for name in (image, "ln_final.weight"):
        if name not in weights:
            raise CheckpointError(f"{label}: {name} is missing, so this is no CLIP with OpenAI's names")
    heads = (len(weights[image]) // 64, len(weights["ln_final.weight"]) // 64)  # every head is 64 wide
    told = Stated("the code of m³-Mix", from_caller("quick_gelu", "clip", heads).settings)
    return foreign.assemble(weights, [told], label, tokenizer=tokenizer, name=Path(path).stem)
