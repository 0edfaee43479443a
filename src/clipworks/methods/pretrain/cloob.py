"""CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP. Fürst et al., NeurIPS 2022.

Before they are compared, embeddings are replaced by what a Hopfield memory of the batch retrieves for them:
an average of the stored patterns that resemble them, so that features that occur together support each
other. X and Y (N, D) are the unit image and text embeddings of the global batch, row i a pair.

    r(ξ, Z) = Zᵀ softmax(β Z ξ), then to unit length                                 (retrieval, one step)
    U_x = r(X, X)   U_y = r(Y, X)        what the images hold for each image and each text
    V_x = r(X, Y)   V_y = r(Y, Y)        what the texts hold
    L(A, B) = τ mean_i (-a_i·b_i / τ + ln Σ_{j≠i} exp(a_i·b_j / τ))                                 (InfoLOOB)
    loss = L(U_x, U_y) + L(V_y, V_x)

InfoLOOB leaves the positive out of its denominator ("leave one out bound"). Its gradient is that of InfoNCE
divided by 1 - p, p the positive's probability there, so it never stops pulling; it is bounded below, but not
by zero. Anchors are the memory's own modality, one direction each. At β = 0, or with all embeddings alike,
all retrievals are equal and the loss is 2 τ ln(N - 1), a plateau without gradient. Fresh towers, whose
embeddings lie in a narrow cone, start near it: gradients are tiny there, so the recipe's eps must be far
below them (1e-8, not 1e-6), or `scaled=False` makes the loss 1/τ times larger.

τ is a constant: with respect to 1/τ the loss only falls, so a learned one would climb to its bound. The
trained model is a plain CLIP whose scale is ln(1/τ); nothing is retrieved at inference.

Where this differs from the authors' code: gradients reach the rows of all processes (there only a process's
own, which gives 1/W of the gradient for W processes), biases and norms do not decay, and one cosine stands in
place of their restarts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipworks.checkpoints import files, foreign, layouts
from clipworks.checkpoints.settings import Stated, from_caller
from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import Tokenizer
from clipworks.data.batch import Batch
from clipworks.engine.recipe import Recipe
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.pretrain.base import Objective, pairs

# The authors' command for CC3M at a batch of 512, and what a small ViT at a batch of 256 takes.
RECIPE = Recipe(epochs=31, lr=1e-3, warmup=20_000, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
SMALL_RECIPE = Recipe(epochs=32, lr=1e-3, warmup=500, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
TILED_FROM = 8192  # rows from which no N x N matrix is kept
TILE = 1024


class CLOOB(Objective):
    """The loss of CLOOB.

    Args:
        inverse_temperature: 1/τ, a constant.
        beta: inverse temperature β of the retrieval: 8 on CC3M, 14.3 on YFCC. It must grow with ln N, or a
            large batch makes every retrieval an average of everything.
        scaled: False leaves out the factor τ, as relatives of the method do.
        source: which texts of the batch, one a picture.
    """

    def __init__(
        self,
        inverse_temperature: float = 30.0,
        beta: float = 8.0,
        scaled: bool = True,
        *,
        source: str = "alt",
    ):
        super().__init__()
        if not (inverse_temperature > 0 and beta >= 0):
            raise ConfigError(
                f"inverse_temperature must be above 0 and beta not below: {inverse_temperature}, {beta}"
            )
        self.inverse_temperature = inverse_temperature
        self.beta = beta
        self.scaled = scaled
        self.source = source

    def prepare(self, clip: Clip) -> Clip:
        """The same model with its scale at ln(1/τ), frozen; so is a bias, which this loss has not."""
        with torch.no_grad():
            clip.scale.fill_(math.log(self.inverse_temperature))
        clip.scale.requires_grad_(False)
        if clip.bias is not None:
            clip.bias.requires_grad_(False)
        return clip

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image` and `text` (B, D), unit length; `scale` and `bias`."""
        return pairs(clip, batch, self.source)

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`loss`, and what it consists of and comes from, 0-D each.

        Returns:
            `loss`, the sum of `image` L(U_x, U_y) and `text` L(V_y, V_x); `cosine`, the mean of a pair's own
            embeddings; `patterns`, how many stored patterns a retrieval averages (the exponential of its
            entropy); `off_plateau`, how far the loss is below 2 τ ln(N - 1).

        Raises:
            ConfigError: for fewer than two pairs.
        """
        x, y = features["image"], features["text"]
        factor = 1.0 if self.scaled else self.inverse_temperature
        with torch.autocast(x.device.type, enabled=False):
            (u_x, a), (u_y, b), (v_x, c), (v_y, d) = (
                _retrieve(state, stored, self.beta) for stored in (x, y) for state in (x, y)
            )
            image = factor * info_loob(u_x, u_y, self.inverse_temperature)
            text = factor * info_loob(v_y, v_x, self.inverse_temperature)
            plateau = 2 * factor / self.inverse_temperature * math.log(len(x) - 1)
            with torch.no_grad():
                cosine = (x * y).sum(dim=1).mean()
                patterns = torch.stack([a, b, c, d]).mean()
        return {
            "loss": image + text,
            "image": image,
            "text": text,
            "cosine": cosine,
            "patterns": patterns,
            "off_plateau": plateau - (image + text).detach(),
        }


def hopfield_retrieve(state: Tensor, stored: Tensor, beta: float) -> Tensor:
    """One step of a modern Hopfield network: what the stored patterns hold for each state.

    Attention without projections, heads or the root of D; gradients reach states and patterns.

    Args:
        state: (M, D), unit length.
        stored: (N, D), unit length.
        beta: inverse temperature.

    Returns:
        (M, D), unit length, in fp32 (fp64 if given).

    Raises:
        ShapeError: if the widths differ.
    """
    return _retrieve(state, stored, beta)[0]


def info_loob(anchors: Tensor, samples: Tensor, inverse_temperature: float | Tensor) -> Tensor:
    """InfoLOOB of N anchors against N samples, row i a pair, times the temperature.

    Args:
        anchors: (N, D), unit length.
        samples: (N, D), unit length.
        inverse_temperature: 1/τ, above 0.

    Returns:
        0-D, in fp32 (fp64 if given).

    Raises:
        ShapeError: if the shapes differ.
        ConfigError: for fewer than two pairs, where nothing is left to compare with.
    """
    if anchors.shape != samples.shape or anchors.dim() != 2:
        raise ShapeError(
            f"anchors {tuple(anchors.shape)} and samples {tuple(samples.shape)} must be (N, D) both"
        )
    n = len(anchors)
    if n < 2:
        raise ConfigError(f"InfoLOOB compares each pair with the others of the batch, which has {n}")
    dtype = _precision(anchors, samples)
    anchors, samples = anchors.to(dtype), samples.to(dtype)

    def rows(start: int, tile: Tensor) -> Tensor:
        own = torch.arange(start, start + len(tile), device=tile.device)
        logits = inverse_temperature * tile @ samples.T
        others = logits.masked_fill(own[:, None] == torch.arange(n, device=tile.device), -math.inf)
        return others.logsumexp(dim=1) - logits.gather(1, own[:, None]).squeeze(1)

    with torch.autocast(anchors.device.type, enabled=False):
        return _in_tiles(rows, anchors).mean() / inverse_temperature


def from_checkpoint(path: str | Path, *, tokenizer: Tokenizer | Literal[False] | None = None) -> Clip:
    """A Clip of a file of the authors: a plain CLIP with a ModifiedResNet, whose scale is their ln(1/τ).

    Their names are OpenAI's except that the whole text tower stands under `transformer.` and the scale is
    called `logit_inv_tau`. A file with OpenAI's own names is read too, with its names left alone.

    Args:
        path: a checkpoint of their training, or its weights alone; unpickled as tensors only.
        tokenizer: another than CLIP's; False for none.

    Raises:
        CheckpointError: naming the file and the tensor at fault.
    """
    label = str(path)
    weights = layouts.clean(files.read(Path(path)).weights, label)
    if "transformer.token_embedding.weight" in weights:
        weights = {re.sub(r"^transformer\.", "", name): tensor for name, tensor in weights.items()}
    weights.pop("logit_scale_hopfield", None)  # ln β of older files: of the loss, not of the model
    if "logit_inv_tau" in weights:
        weights["logit_scale"] = weights.pop("logit_inv_tau").reshape(())
    for name in ("visual.attnpool.k_proj.bias", "ln_final.weight"):
        if name not in weights:
            raise CheckpointError(f"{label}: {name} is missing, so this is no CLOOB with a ResNet")
    heads = (len(weights["visual.attnpool.k_proj.bias"]) // 64, len(weights["ln_final.weight"]) // 64)
    told = Stated("CLOOB's code", from_caller("quick_gelu", "clip", heads).settings)
    return foreign.assemble(weights, [told], label, tokenizer=tokenizer, name=Path(path).stem)


def _retrieve(state: Tensor, stored: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """What `hopfield_retrieve` gives, and how many patterns it averages in the mean, 0-D, no gradient."""
    if state.dim() != 2 or stored.dim() != 2 or state.shape[1] != stored.shape[1]:
        raise ShapeError(
            f"state {tuple(state.shape)} and stored {tuple(stored.shape)} must be (M, D) and (N, D)"
        )
    dtype = _precision(state, stored)
    state, stored = state.to(dtype), stored.to(dtype)
    counts: list[Tensor] = []

    def rows(start: int, tile: Tensor) -> Tensor:
        weights = (beta * tile @ stored.T).softmax(dim=1)
        with torch.no_grad():
            counts.append(torch.special.entr(weights).sum(dim=1).exp())
        return unit(weights @ stored)

    with torch.autocast(state.device.type, enabled=False):
        retrieved = _in_tiles(rows, state)
    return retrieved, torch.cat(counts).mean()


def _in_tiles(rows: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
    """`rows(start, tile)` over tiles of x (N, D), joined; each is computed again when gradients go back."""
    if len(x) <= TILED_FROM:
        return rows(0, x)
    tiles = [
        checkpoint(rows, start, x[start : start + TILE], use_reentrant=False, preserve_rng_state=False)
        for start in range(0, len(x), TILE)
    ]
    return torch.cat(tiles)


def _precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
