"""Long-CLIP: Unlocking the Long-Text Capability of CLIP. Zhang et al., ECCV 2024.

A trained CLIP is given a longer table of text positions and then tuned briefly on pictures with a long and
a short caption. Nothing of it is left in the model afterwards but a plain Clip of the new context.

Knowledge-preserved stretching. The first m = 20 rows of the table P stay; every later one becomes r = 4:

    P'_t = P_u for t < m,   u(t) = m + (t - m)/r for t >= m, linear between the rows around u.

The last r rows have no right neighbour and continue the last slope. 77 positions become 248. The m kept rows
are never changed, so a text of up to m + 1 tokens is read exactly as before until the blocks change.

Primary component matching. With unit vectors v of pictures, mu their mean, X = v - mu and V the first k right
singular vectors of X, the short caption is compared with a coarse image vector, the long one with all of it:

    v~ = X V V^T + mu                                                       (not normalized again)
    L  = CLIP(v, t_long) + CLIP(v~, t_short),   both with one scale and label smoothing 0.1.

The gradient goes through the subspace too. Deviations from the published code, all on purpose: the components
are found in groups of examples (128 there, the rows of one device) that are formed by the examples' keys, so
that the loss depends neither on the order of the pairs nor on the number of processes; kept and trained rows
are one table; nothing is rounded to half precision.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipworks.checkpoints import files, layouts, own, rules, vocabulary
from clipworks.checkpoints.geometry import geometry
from clipworks.checkpoints.settings import Settings
from clipworks.core.clip import Clip, unit
from clipworks.core.config import CLIP_MEAN, CLIP_STD
from clipworks.core.tokenizer import Tokenizer
from clipworks.core.towers import TextTower
from clipworks.core.variant import variant
from clipworks.data.batch import Batch
from clipworks.data.randomness import key_number
from clipworks.encode.packed import text_vectors
from clipworks.engine.recipe import Recipe
from clipworks.errors import CheckpointError, ConfigError, DataError, ShapeError
from clipworks.methods.pretrain.base import Objective, pairs
from clipworks.parts.contrastive import Targets, contrastive_loss

KEEP, RATIO = 20, 4
# The training notes, at a batch of 2,048; the scale starts at ln 100 and is not bounded.
RECIPE = Recipe(
    epochs=6, lr=1e-6, warmup=200, weight_decay=1e-2, betas=(0.9, 0.999), eps=1e-8, scale_limit=None
)


class LongClip(Objective):
    """Long and short captions against fine and coarse image vectors.

    The batch has the texts `long` and `short`. A loader cuts texts at its tokenizer's length, so prepare the
    Clip first and hand that one to both; to prepare it again changes nothing:

        objective = LongClip()
        clip = objective.prepare(clip)
        loader = Loader(source, clip.preprocessing, clip.tokenizer, 128, texts=("long", "short"))
        fit(clip, objective, loader, RECIPE, folder=...)

    Args:
        keep: m, rows of the position table that stay as they are; None takes the paper's share, 20 of 77.
        ratio: r, rows that each of the others becomes; 1 for a Clip that has been stretched before.
        components: k; None compares short captions with the whole image vector.
        component_group: examples among which components are found.
        short_weight: factor of the short captions' loss.
        smoothing: label smoothing.
        scale: what the logits' scale is set to before the training, CLIP's own after its training; None
            leaves it, for a model that has not come as far.
    """

    def __init__(
        self,
        *,
        keep: int | None = None,
        ratio: int = RATIO,
        components: int | None = 32,
        component_group: int = 128,
        short_weight: float = 1.0,
        smoothing: float = 0.1,
        scale: float | None = 100.0,
    ):
        super().__init__()
        if components is not None and components < 1:
            raise ConfigError(f"components must be at least 1, or None for all of them, not {components}")
        if components is not None and component_group <= components + 1:
            raise ConfigError(
                f"groups of {component_group} examples have {component_group - 1} components: "
                f"{components} of them leave nothing out"
            )
        self.keep = keep
        self.ratio = ratio
        self.components = components
        self.component_group = component_group
        self.short_weight = short_weight
        self.smoothing = smoothing
        self.scale = scale
        self._prepared: weakref.ref[Clip] | None = None
        self._kept = 0

    @property
    def texts(self) -> Mapping[str, int | None]:
        """A long and a short caption a picture."""
        return {"long": 1, "short": 1}

    def prepare(self, clip: Clip) -> Clip:
        """A copy of the Clip with the stretched table, the longer tokenizer and the new scale.

        Raises:
            ConfigError: for a Clip of the sigmoid form, or one whose text tower looks at its padding.
        """
        if self._prepared is not None and self._prepared() is clip:
            return clip
        if clip.bias is not None:
            raise ConfigError("Long-CLIP tunes a CLIP of the softmax form; this one has a bias")
        length = clip.config.text.context_length
        self._kept = math.ceil(KEEP / 77 * length) if self.keep is None else self.keep
        clip = stretched(clip, self._kept, self.ratio)
        if self.scale is not None:
            with torch.no_grad():
                clip.scale.fill_(math.log(self.scale))
        self._prepared = weakref.ref(clip)
        return clip

    def groups(self, clip: Clip) -> list[dict[str, Any]]:
        """The published code decays everything; the table may not decay, or its kept rows would move."""
        table = clip.text.get_parameter("positions")
        rest = [p for p in clip.parameters() if p.requires_grad and p is not table]
        return [{"params": rest}, {"params": [table], "weight_decay": 0.0}]

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image`, `text` (the long one) and `short` (B, D), unit length; `scale`; `place` (B,) int64."""
        tokens = batch.texts.get("short")
        if tokens is None or tokens.owner is not None:
            raise DataError(
                "Long-CLIP takes one `short` text a picture beside the `long` one; the batch has "
                f"{'several' if tokens is not None else ', '.join(batch.texts) or 'none'}"
            )
        table = clip.text.get_parameter("positions")
        frozen = torch.cat([table[: self._kept].detach(), table[self._kept :]])
        clip = variant(clip, weights={"text.positions": frozen})
        rows = pairs(clip, batch, "long") | {"short": unit(text_vectors(clip.text, tokens))}
        if batch.keys:
            numbers = [key_number(key) >> 1 for key in batch.keys]
            rows["place"] = torch.tensor(numbers, dtype=torch.int64, device=table.device)
        return rows

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`long` and `short`, 0-D.

        Raises:
            ConfigError: if a group has so few examples that their components leave nothing out.
        """
        image, scale = features["image"], features["scale"].exp()
        targets = Targets(smoothing=self.smoothing)
        coarse = image if self.components is None else self.coarse(image, features.get("place"))
        return {
            "long": contrastive_loss(image, features["text"], scale, targets=targets),
            "short": self.short_weight * contrastive_loss(coarse, features["short"], scale, targets=targets),
        }

    def coarse(self, image: Tensor, place: Tensor | None = None) -> Tensor:
        """Image vectors (N, D) seen along k components of their group, (N, D); groups go by `place` (N,)."""
        n, k = len(image), self.components or 0
        order = torch.arange(n, device=image.device) if place is None else place.argsort(stable=True)
        groups = order.tensor_split(max(1, math.ceil(n / self.component_group)))
        if len(groups[-1]) <= k + 1:
            raise ConfigError(
                f"{len(groups[-1])} examples have {len(groups[-1]) - 1} components, so components={k} leaves "
                "nothing out; take a larger batch, fewer components, or None for all of them"
            )
        return torch.cat([primary_components(image[group], k) for group in groups])[order.argsort()]


def short_caption(text: str) -> str:
    """A long caption up to its first full stop that a blank follows."""
    return text.replace("\n", " ").split(". ")[0]


def stretched_length(length: int, keep: int = KEEP, ratio: int = RATIO) -> int:
    """Rows of a stretched table, m + r (L - m)."""
    return keep + ratio * (length - keep)


def stretch_positions(table: Tensor, keep: int = KEEP, ratio: int = RATIO) -> Tensor:
    """A position table (L, w) to (keep + ratio (L - keep), w), computed in at least fp32.

    Raises:
        ShapeError: if the table is not (L, w).
        ConfigError: if it has not more rows than are kept and than two, or the ratio is below 1.
    """
    if table.dim() != 2:
        raise ShapeError(f"a position table is (L, w), not {tuple(table.shape)}")
    if not 0 <= keep < len(table) or len(table) < 2 or ratio < 1:
        raise ConfigError(
            f"a table of {len(table)} positions cannot keep {keep} and stretch the others {ratio} times"
        )
    rows = table if table.dtype == torch.float64 else table.float()
    t = torch.arange(stretched_length(len(table), keep, ratio), device=table.device)
    u = torch.where(t < keep, t.double(), keep + (t - keep).double() / ratio)
    left = u.floor().long().clamp(max=len(table) - 2)  # at the end the last slope goes on
    share = (u - left)[:, None].to(rows.dtype)
    # Written so that u on a row gives that row bit for bit, the last one too.
    values = torch.where(share == 1, rows[left + 1], rows[left] + share * (rows[left + 1] - rows[left]))
    return values.to(table.dtype)


def stretched(clip: Clip, keep: int = KEEP, ratio: int = RATIO) -> Clip:
    """A copy of a Clip with a stretched table; its tokenizer takes texts of the new length.

    Raises:
        ConfigError: if the text tower is not causal, so that padding would change what it says.
    """
    if not isinstance(clip.text, TextTower):
        raise ConfigError("only a text tower of this package has a position table that can be stretched")
    if clip.config.text.mask != "causal":
        raise ConfigError(
            f"a text tower with mask {clip.config.text.mask!r} sees its padding and cannot be stretched"
        )
    twin = copy.deepcopy(clip)
    table = nn.Parameter(stretch_positions(clip.text.positions.detach(), keep, ratio))
    text, tower = replace(clip.config.text, context_length=len(table)), cast(TextTower, twin.text)
    tower.positions, tower.config = table, text
    twin.config = replace(clip.config, text=text)
    if clip.tokenizer is not None:
        twin.tokenizer = vocabulary.with_length(clip.tokenizer, len(table))
        twin.config = replace(twin.config, tokenizer=own.tokenizer_config(twin.tokenizer))
    return twin


# ------------------------------------------------------------------------------------ primary components


def primary_components(vectors: Tensor, k: int) -> Tensor:
    """Vectors (N, D) seen along their first k principal components: (N, D), of the same mean.

    Differentiable once, through the subspace too. Where the k-th and the next singular value are equal to
    working precision the subspace is not defined; such pairs of directions give no gradient.

    Raises:
        ConfigError: if k is below 1.
    """
    if k < 1:
        raise ConfigError(f"there are no first {k} components")
    with torch.autocast(vectors.device.type, enabled=False):
        # Eigenvalues are squares of singular values and gaps between them small: worth fp64 where there is.
        rows = vectors.float() if vectors.device.type == "mps" else vectors.double()
        mean = rows.mean(dim=0, keepdim=True)
        centered = rows - mean
        if len(rows) <= rows.shape[1]:
            shown = _Leading.apply(centered, k)
        else:
            shown = _Leading.apply(centered.T, k).T
        return (shown + mean).to(vectors.dtype)


class _Leading(torch.autograd.Function):
    """Y (s, b) to P Y, P the projector onto the k leading eigenvectors u of A = Y Y^T, s of them in all.

    dP = sum over i <= k < j of (u_i u_j^T + u_j u_i^T) (u_i^T dA u_j) / (lambda_i - lambda_j): only gaps
    across the cut are divided by, not those within the subspace. So with G the gradient of P Y,

        dL/dY = P G + (C + C^T) Y,   C = sum_{i <= k < j} u_i u_j^T (u_i^T (G Y^T + Y G^T) u_j) / gap_ij.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, k: int) -> Tensor:
        values, vectors = torch.linalg.eigh(y @ y.T)
        first, rest = vectors[:, -k:], vectors[:, :-k]
        ctx.save_for_backward(y, values, vectors)
        ctx.k = k
        # Nothing left out: exactly the input.
        return y.clone() if rest.shape[1] == 0 else first @ (first.T @ y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        y, values, vectors = ctx.saved_tensors
        k = ctx.k
        first, rest = vectors[:, -k:], vectors[:, :-k]
        if rest.shape[1] == 0:
            return gradient, None
        gap = values[-k:, None] - values[None, :-k]
        defined = gap > len(values) * torch.finfo(values.dtype).eps * values[-1]
        a, b = first.T @ y, rest.T @ y  # (k, b) and (s - k, b)
        c, d = first.T @ gradient, rest.T @ gradient
        weight = torch.where(defined, (c @ b.T + a @ d.T) / torch.where(defined, gap, 1), 0)
        return first @ (c + weight @ b) + rest @ (weight.T @ a), None


# --------------------------------------------------------------------------------------- released weights


def fold_tables(kept: Tensor, trained: Tensor, keep: int = KEEP) -> Tensor:
    """The published model's two position tables (L, w) as one: rows below `keep` of `kept`, then `trained`.

    Raises:
        ShapeError: if their shapes differ.
    """
    if kept.shape != trained.shape:
        raise ShapeError(f"the two tables {tuple(kept.shape)} and {tuple(trained.shape)} differ in shape")
    return torch.cat([kept[:keep], trained[keep:]])


def from_checkpoint(
    path: str | Path, original: Clip | None = None, *, tokenizer: Tokenizer | Literal[False] | None = None
) -> Clip:
    """A plain Clip of context 248 from a released file (`longclip-B.pt`, `longclip-L.pt`).

    Args:
        path: a state dict with `positional_embedding` and `positional_embedding_res`.
        original: the CLIP that it was tuned from. Given, a file with one table is compared with it: copies
            in other layouts have been made from the wrong table, whose later rows were never trained.
        tokenizer: CLIP's if left out; False for none.

    Raises:
        CheckpointError: naming the file and the tensor at fault.
    """
    path = Path(path)
    label = str(path)
    weights = layouts.clean(files.read(path).weights, label)
    layout = layouts.recognize(weights, label)
    trained = weights.pop("positional_embedding_res", None)
    if trained is not None:
        if layout != "openai":
            raise CheckpointError(f"{label}: has a second position table, but not OpenAI's names")
        try:
            weights["positional_embedding"] = fold_tables(weights["positional_embedding"], trained)
        except (KeyError, ShapeError) as error:
            raise CheckpointError(f"{label}: its two position tables do not fit: {error}") from error
    names = {
        "openai": ("visual.class_embedding", "ln_final.weight"),
        "transformers": ("vision_model.embeddings.class_embedding", "text_model.final_layer_norm.weight"),
    }
    if layout not in names or any(name not in weights for name in names[layout]):
        raise CheckpointError(
            f"{label}: not a Long-CLIP of a vision transformer in a layout that was released"
        )
    image_heads, text_heads = (weights[name].numel() // 64 for name in names[layout])
    settings = Settings(
        activation="quick_gelu",
        image_heads=image_heads,
        text_heads=text_heads,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
    config = geometry(layout, weights, settings, label, path.stem)
    shapes = {name: tuple(value.shape) for name, value in own.skeleton(config).state_dict().items()}
    ours = rules.read(layouts.rules(layout, config), weights, shapes, label)
    if trained is None:
        _warn_if_untrained(ours["text.positions"], original, label)
    return own.build(config, ours, label, vocabulary.choose(config, None, None, tokenizer, label))


def _warn_if_untrained(table: Tensor, original: Clip | None, label: str) -> None:
    """The published conversion to another layout took the table of which only the first rows are used."""
    if original is None:
        warnings.warn(
            f"{label}: has one position table; if it is the one of which only the first {KEEP} rows were "
            "meant, long texts are read by untrained positions. Pass the original CLIP to compare",
            stacklevel=3,
        )
        return
    stretch = stretch_positions(original.text.get_parameter("positions").detach().to(table.device))
    if stretch.shape == table.shape and torch.allclose(
        stretch[KEEP:].float(), table[KEEP:].float(), atol=1e-3
    ):
        warnings.warn(
            f"{label}: positions {KEEP} to {len(table) - 1} are the stretched ones of the original CLIP and "
            "were never trained; load the released file with `positional_embedding_res` instead",
            stacklevel=3,
        )
