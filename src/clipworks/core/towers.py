"""The open tower: a vision transformer and a text transformer whose insides are four public steps.

    content = tower.read(x)                  what the tower is given, as vectors
    tokens = tower.place(content)            class token, positions, first norm
    tokens = tower.run(tokens, around=hook)  the blocks
    vector = tower.project(tokens)           (B, D), not normalised
    vector = tower(x)                        all in a row

Architecture: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
ICML 2021, and its published `model.py`; attention pooling without a class token: SigLIP, Zhai et al.,
ICCV 2023. A method never copies a tower and never patches one: `around` is the hook (see `hooks`),
`variant` varies weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipworks.core.attention import MLP, Attention, Block, Mask, NormedQKV
from clipworks.core.config import TextConfig, VisionConfig
from clipworks.core.hooks import Around, BlockCall, Tap, compose
from clipworks.core.stem import ConvolutionalStem
from clipworks.core.tokenizer import Tokens
from clipworks.core.variant import variant
from clipworks.errors import ConfigError, ShapeError

__all__ = ["Tap", "TextTower", "Tower", "VisionTower", "compose", "resize_positions", "variant"]

At = Tensor | Literal["all"] | None
Interpolation = Literal["bicubic", "bilinear"]


class Tower(nn.Module):
    """What all towers share: the walk through the blocks.

    Attributes:
        width: width of the tokens, w.
        out_width: number of features of the projected vector, D.
        blocks: the blocks, a `ModuleList`.
        mask: the attention mask used when `run` is given none.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    # For wrappers that shard parameters and must know every way into the module.
    forward_methods: ClassVar[tuple[str, ...]] = ("read", "place", "run", "project", "prepare")

    width: int
    out_width: int
    blocks: nn.ModuleList
    mask: Mask = None
    checkpointing: bool = False

    def run(
        self,
        tokens: Tensor,
        start: int = 0,
        stop: int | None = None,
        mask: Mask = None,
        around: Around | None = None,
    ) -> Tensor:
        """Send tokens (B, N, w) through blocks `start` to `stop` (exclusive; all of them by default).

        Args:
            mask: None for the tower's own, `"full"` for none at all, else as `Attention.mix` takes it.
            around: a hook `(i, block, tokens) -> tokens` called in place of block `i`.

        Returns:
            Tokens (B, M, w); M is N unless the hook changes it.
        """
        indices = range(len(self.blocks))[start:stop]
        mask = self.mask if mask is None else mask
        for i in indices:
            call = self._call(self.blocks[i], mask)
            tokens = call(tokens) if around is None else around(i, call, tokens)
        return tokens

    def _call(self, block: nn.Module, mask: Mask) -> BlockCall:
        if self.checkpointing and torch.is_grad_enabled():
            return partial(checkpoint, block, mask=mask, use_reentrant=False)
        return partial(block, mask=mask)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Give an image tower the mean and deviation of its channels, each (3,), for pixels in [0, 1]."""
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block by itself, in place: equal blocks share one compilation."""
        for block in self.blocks:
            block.compile(**options)


class VisionTower(Tower):
    """A vision transformer: pixels (B, 3, H, W) in [0, 1] to vectors (B, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, out_width: int):
        super().__init__()
        self.config = config
        self.width = config.width
        self.out_width = out_width
        width, grid = config.width, config.grid
        self.set_statistics(config.mean, config.std)
        if config.stem:
            self.patches: nn.Module = ConvolutionalStem(config.stem, width)
        else:
            self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(grid * grid + config.class_token, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, block, config.activation, config.norm_eps, config.qk_norm) for block in config.blocks
        )
        self.ln_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.projection = nn.Linear(width, out_width, bias=False) if config.projection else nn.Identity()

    def prepare(self, pixels: Tensor) -> Tensor:
        """Check and scale pixels (B, 3, H, W): bytes to [0, 1] floats; floats pass as they are.

        Raises:
            ShapeError: if they are not (B, 3, H, W), or H or W is not a multiple of the patch size.
        """
        return check_pixels(pixels, self.config.patch_size)

    def read(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), floats in [0, 1] or bytes, to patch vectors (B, h, w, width).

        Mean and deviation are applied here, differentiably.
        """
        pixels = (self.prepare(pixels) - self.mean) / self.std
        return self.patches(pixels.to(self.positions.dtype)).permute(0, 2, 3, 1)

    def place(self, content: Tensor, extra: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Patch vectors (B, h, w, width) to tokens (B, N, width): class token first, positions, first norm.

        Args:
            content: from `read`; a grid other than the tower's own gets interpolated positions.
            extra: more tokens (B, M, width) or (M, width), appended at the end without a position.
            positions: a table that already fits this grid, (h w, width), with the class token's row before
                it if there is one; None for the tower's own, interpolated as `resize_positions` does.

        Raises:
            ShapeError: if `positions` fits another grid.
        """
        batch, height, width, channels = content.shape
        tokens = content.reshape(batch, height * width, channels)
        if positions is None:
            positions = resize_positions(self.positions, (height, width), int(self.config.class_token))
        elif positions.shape != (height * width + int(self.config.class_token), channels):
            raise ShapeError(f"positions {tuple(positions.shape)} do not fit a grid of {height}x{width}")
        if self.config.class_token:
            tokens = torch.cat([self.class_token.expand(batch, 1, -1), tokens], dim=1)
        tokens = tokens + positions
        if extra is not None:
            tokens = torch.cat([tokens, extra.expand(batch, -1, -1)], dim=1)
        return self.ln_pre(tokens)

    def project(self, tokens: Tensor, at: At = None) -> Tensor:
        """Tokens (B, N, width) to vectors, not normalised.

        Args:
            at: None for the tower's own pooling, an index (B,) int64 into the tokens, or `"all"`.

        Returns:
            (B, D), or (B, N, D) for `"all"`. A single token of a tower with attention pooling is read as
            if the pool had attended to that token alone.
        """
        if isinstance(at, Tensor):
            tokens = tokens[torch.arange(len(tokens), device=tokens.device), at]
        elif at is None and self.config.pooling == "class":
            tokens = tokens[:, 0]
        tokens = self.ln_post(tokens)
        if self.pool is not None:
            tokens = self.pool(tokens) if at is None else self.pool.each(tokens)
        elif at is None and self.config.pooling == "mean":
            tokens = tokens.mean(dim=1)
        return self.projection(tokens)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] or bytes to vectors (B, D), not normalised."""
        tokens = self.place(self.read(pixels))
        if not self._reads_the_first_token():
            return self.project(self.run(tokens))
        # Nothing reads the other tokens of the last block, so they are not computed.
        return self.project(self.blocks[-1].first(self.run(tokens, stop=-1)))  # type: ignore[operator]

    def _reads_the_first_token(self) -> bool:
        if self.config.pooling != "class" or not len(self.blocks) or self.checkpointing:
            return False
        last = self.blocks[-1]
        if type(last) is not Block or type(last.attention) is not Attention:
            return False
        # A block that a variant, a compiler or a forward hook has changed is run as it is.
        qkv = last.attention.qkv
        changed = type(qkv) not in (nn.Linear, NormedQKV) or any(m._forward_hooks for m in last.modules())
        return not changed and last._compiled_call_impl is None


class AttentionPool(nn.Module):
    """SigLIP's head: one learned probe attends over all tokens, then `x + mlp(ln(x))`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        block = config.blocks[-1]
        self.probe = nn.Parameter(torch.zeros(config.width))
        self.attention = Attention(config.width, block.heads, block.head_width)
        self.ln = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, block.mlp_width, config.activation)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normed tokens (B, N, w) to (B, w)."""
        q_weight, kv_weight = self.attention.qkv.weight.tensor_split([self.width], dim=0)
        q_bias, kv_bias = self.attention.qkv.bias.tensor_split([self.width], dim=0)
        q = F.linear(self.probe, q_weight, q_bias).expand(tokens.shape[0], 1, -1)
        k, v = F.linear(tokens, kv_weight, kv_bias).chunk(2, dim=-1)
        return self._finish(self.attention.mix(q, k, v))[:, 0]

    def each(self, tokens: Tensor) -> Tensor:
        """Normed tokens (..., w) to (..., w), each as if it were the only one attended to."""
        v = self.attention.qkv(tokens).chunk(3, dim=-1)[2]
        return self._finish(v)

    @property
    def width(self) -> int:
        """Rows of the packed weight that make the queries."""
        return self.attention.heads * self.attention.head_width

    def _finish(self, mixed: Tensor) -> Tensor:
        x = self.attention.out(mixed)
        return x + self.mlp(self.ln(x))


class TextTower(Tower):
    """A text transformer: `Tokens` of n texts to vectors (n, D), read where each text ends."""

    def __init__(self, config: TextConfig, out_width: int):
        super().__init__()
        self.config = config
        self.width = config.width
        self.out_width = out_width
        self.mask = "causal" if config.mask == "causal" else None
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, block, config.activation, config.norm_eps) for block in config.blocks
        )
        self.ln_final = nn.LayerNorm(config.width, eps=config.norm_eps)
        biased = config.projection == "biased"
        self.projection = (
            nn.Identity() if config.projection == "none" else nn.Linear(config.width, out_width, bias=biased)
        )

    def prepare(self, tokens: Tokens) -> Tokens:
        """Tokens with ids (n, L) and ends (n,), as they are: the tokenizer has cut them already."""
        return tokens

    def read(self, tokens: Tokens) -> Tensor:
        """Tokens with ids (n, L) to word vectors (n, L, w)."""
        return self.embedding(self.prepare(tokens).ids)

    def place(self, content: Tensor, extra: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Word vectors (n, L, w) to tokens (n, L, w): positions added.

        Args:
            content: from `read`, or vectors learned in their place.
            extra: more tokens (n, M, w) or (M, w), appended at the end without a position.
            positions: the place of each token in its text, (L,) or (n, L) int64; 0 … L - 1 if left out.

        Raises:
            ShapeError: if the texts are longer than the position table.
        """
        length, context = content.shape[1], self.positions.shape[0]
        if positions is not None:
            tokens = content + self.positions[positions]
        elif length <= context:
            tokens = content + self.positions[:length]
        else:
            raise ShapeError(
                f"texts of {length} tokens do not fit a context of {context}; "
                "cut them in the tokenizer or stretch the position table"
            )
        if extra is None:
            return tokens
        return torch.cat([tokens, extra.expand(len(tokens), -1, -1)], dim=1)

    def padding_mask(self, ends: Tensor) -> Callable[[int], Tensor]:
        """For ends (n,), the function of the length L that masks what lies behind them: (n, 1, 1, L) bool."""

        def mask(length: int) -> Tensor:
            return (torch.arange(length, device=ends.device) <= ends[:, None])[:, None, None]

        return mask

    def mask_for(self, tokens: Tokens) -> Mask:
        """The mask these texts (n, L) need: the tower's own, or one over their padding."""
        return self.padding_mask(tokens.ends) if self.config.mask == "padding" else self.mask

    def project(self, tokens: Tensor, at: At = None) -> Tensor:
        """Tokens (n, L, w) to vectors, not normalised.

        Args:
            at: where each text ends, (n,) int64; None for the last token; `"all"` for every token.

        Returns:
            (n, D), or (n, L, D) for `"all"`.
        """
        if isinstance(at, Tensor):
            tokens = tokens[torch.arange(len(tokens), device=tokens.device), at]
        elif at is None:
            tokens = tokens[:, -1]
        return self.projection(self.ln_final(tokens))

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens of n texts to vectors (n, D), not normalised."""
        placed = self.place(self.read(tokens))
        return self.project(self.run(placed, mask=self.mask_for(tokens)), at=tokens.ends)


def check_pixels(pixels: Tensor, stride: int) -> Tensor:
    """Pixels (B, 3, H, W), floats in [0, 1] or bytes, to floats in [0, 1].

    Raises:
        ShapeError: for another shape, or sides that are not multiples of `stride`.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ShapeError(f"pixels must be (B, 3, H, W), not {tuple(pixels.shape)}")
    if pixels.shape[2] % stride or pixels.shape[3] % stride:
        raise ShapeError(
            f"pixels of {pixels.shape[2]}x{pixels.shape[3]} cannot be cut into patches of {stride}"
        )
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise ShapeError(f"pixels must be floats in [0, 1] or uint8, not {pixels.dtype}")
    return pixels


def resize_positions(
    positions: Tensor,
    grid: Sequence[int],
    leading: int = 0,
    *,
    interpolation: Interpolation = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """A position table (leading + g², w) for another grid: (leading + h w, w).

    Computed in fp32; the `leading` rows (class token) are kept. The table's own grid gives back the table
    itself.

    Args:
        positions: the table.
        grid: h and w.
        leading: rows before the grid's.
        interpolation: `bicubic` or `bilinear`.
        antialias: smooth before a smaller grid is sampled, as the published loaders do.

    Raises:
        ConfigError: if the table is not square.
    """
    height, width = grid
    side = round((positions.shape[0] - leading) ** 0.5)
    if side * side != positions.shape[0] - leading:
        raise ConfigError(
            f"a position table of {positions.shape[0]} rows with {leading} leading is not a square grid"
        )
    if (height, width) == (side, side):
        return positions
    head, table = positions[:leading], positions[leading:]
    maps = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(
        maps, size=(height, width), mode=interpolation, antialias=antialias, align_corners=False
    )
    table = maps.permute(0, 2, 3, 1).reshape(height * width, -1).to(positions.dtype)
    return torch.cat([head, table])
