"""Vectors of places in a picture, read from an image tower by different paths.

`all_vectors(tower, pixels, around=hook)` sends pictures of any size through a tower and projects every token.
Which path the last blocks take is the hook's: none (the tower as it is), `LastValues` (every patch sees only
itself in the last block: MaskCLIP, Zhou et al., ECCV 2022), or a method's own. `KeepNormed` listens inside a
block. `dual_vectors` reads both the tower as it is and a `ValuePath` beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.attention import MLP, Attend, Attention, Mask
from clipworks.core.clip import Clip
from clipworks.core.hooks import Around, BlockCall
from clipworks.core.resnet import ModifiedResNet
from clipworks.core.towers import Interpolation, VisionTower, resize_positions
from clipworks.errors import ConfigError

DenseTower = VisionTower | ModifiedResNet
SHARPNESS = 100.0  # of MaskCLIP's softmax, whatever scale the Clip has learned


class LastValues:
    """A hook: in block `last` the attention matrix is the identity.

    u = out(V ln_1(x)); with `residual` the block goes on as ever, u ← u + x, u ← u + mlp(ln_2(u)); without,
    u alone is what comes out. `keys` are the keys (B, N, w) of that block in the last run.

    Args:
        last: the number of that block, from 0.
        residual: keep the residual sum and the MLP.
    """

    keys: Tensor

    def __init__(self, last: int, residual: bool = True) -> None:
        self.last, self.residual = last, residual

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        """Tokens (B, N, w) to tokens (B, N, w)."""
        if i != self.last:
            return block(tokens)
        if self.residual:
            return block(tokens, attend=self._value)
        kept = Kept()
        block(tokens, attend=kept.of(self._value), feed=_nothing)
        return kept.tokens

    def _value(self, attention: Attention, x: Tensor, mask: Mask) -> Tensor:
        _, self.keys, values = attention.qkv(x).chunk(3, dim=-1)
        return attention.out(values)


class ValuePath:
    """A hook that carries a second stream of tokens z beside the tower's own y, along values alone.

    z begins as what enters block `start`, and in every block from there on

        z ← z + out(softmax(V Vᵀ / √d) V),   V the values of ln_1(y);

    it has no MLP and never reaches y, which takes every block as it is. `tokens` (B, N, w) is z after the
    last run; with `start` the number of blocks it is y. (AnomalyCLIP, Zhou et al., ICLR 2024.)
    """

    tokens: Tensor

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        """Tokens y (B, N, w) to tokens (B, N, w)."""
        if i < self.start:
            self.tokens = block(tokens)
            return self.tokens
        if i == self.start:
            self.tokens = tokens
        return block(tokens, attend=self._both)

    def _both(self, attention: Attention, x: Tensor, mask: Mask) -> Tensor:
        q, k, v = attention.qkv(x).chunk(3, dim=-1)
        # Out of place: whoever keeps z after some block keeps that block's z.
        self.tokens = self.tokens + attention.out(attention.mix(v, v, v, mask))
        return attention.out(attention.mix(q, k, v, mask))


class KeepNormed:
    """A hook that keeps what enters the MLP of block `i`: `ln_2(x + attention(ln_1(x)))`, (B, N, w).

    The block itself is unchanged. `tokens` is that of the last run.
    """

    tokens: Tensor

    def __init__(self, i: int) -> None:
        self.i = i

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        """Tokens (B, N, w) to tokens (B, N, w)."""
        return block(tokens, feed=self._keep) if i == self.i else block(tokens)

    def _keep(self, mlp: MLP, x: Tensor) -> Tensor:
        self.tokens = x
        return mlp(x)


class Kept:
    """Keeps what an `attend` gives back, for a hook that wants it by itself."""

    tokens: Tensor

    def of(self, attend: Attend) -> Attend:
        """The same function, listened to."""

        def listened(attention: Attention, x: Tensor, mask: Mask) -> Tensor:
            self.tokens = attend(attention, x, mask)
            return self.tokens

        return listened


def _nothing(mlp: MLP, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def all_vectors(
    tower: DenseTower,
    pixels: Tensor,
    *,
    around: Around | None = None,
    interpolation: Interpolation = "bicubic",
    antialias: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Project every token of a picture.

    Args:
        tower: an image tower of ours.
        pixels: (B, 3, H, W), floats in [0, 1] or bytes, H and W multiples of the patch size.
        around: a hook for the blocks of a vision transformer.
        interpolation: of the position table for another grid than its own.
        antialias: see `resize_positions`; dense papers leave it out.

    Returns:
        The class token's vector (B, D), or None where the tower has none, and the places' (B, D, h, w),
        both after the last norm and not of unit length.

    Raises:
        ConfigError: for a hook on a ResNet.
    """
    content = tower.read(pixels)
    if isinstance(tower, ModifiedResNet):
        if around is not None:
            raise ConfigError("a ResNet has no tokens to take another path: use a vision transformer")
        return None, tower.project(tower.run(tower.place(content)), at="all")
    grid, leading = content.shape[1:3], int(tower.config.class_token)
    positions = resize_positions(
        tower.positions, grid, leading, interpolation=interpolation, antialias=antialias
    )
    tokens = tower.run(tower.place(content, positions=positions), around=around)
    vectors = tower.project(tokens, at="all")
    return vectors[:, 0] if leading else None, as_map(vectors[:, leading:], grid)


def dual_vectors(
    tower: VisionTower,
    pixels: Tensor,
    start: int,
    *,
    global_norm: bool = False,
    interpolation: Interpolation = "bilinear",
    antialias: bool = False,
) -> tuple[Tensor, Tensor]:
    """The picture's vector by the tower as it is, and its places' vectors along a `ValuePath`.

    Args:
        tower: a vision transformer whose pooling is its class token.
        pixels: (B, 3, H, W), floats in [0, 1] or bytes, H and W multiples of the patch size.
        start: the block in which the value path begins; the number of blocks for none.
        global_norm: send the class token through the last norm, as the tower itself does.
        interpolation, antialias: of the position table, see `all_vectors`.

    Returns:
        (B, D), and (B, D, h, w) after the last norm; both not of unit length.

    Raises:
        ConfigError: for a tower without a class token to read, or a block that it does not have.
    """
    if tower.config.pooling != "class":
        raise ConfigError(f"a tower whose pooling is {tower.config.pooling!r} has no class token to read")
    if not 0 <= start <= len(tower.blocks):
        raise ConfigError(f"a value path begins in block 0 to {len(tower.blocks)}, not {start}")
    content = tower.read(pixels)
    positions = resize_positions(
        tower.positions, content.shape[1:3], 1, interpolation=interpolation, antialias=antialias
    )
    path = ValuePath(start)
    y = tower.run(tower.place(content, positions=positions), around=path)
    whole = tower.project(y) if global_norm else tower.projection(y[:, 0])
    return whole, as_map(tower.project(path.tokens[:, 1:], at="all"), content.shape[1:3])


def probabilities(features: Tensor, vectors: Tensor) -> Tensor:
    """How likely each place shows each class, by MaskCLIP and what is built on it.

    P = softmax_c(100·F̂·t_c), computed in fp32.

    Args:
        features: F, (B, D, h, w), of any length.
        vectors: t, (K, D), unit length.

    Returns:
        (B, K, h, w) fp32, summing to one over K.
    """
    with torch.autocast(features.device.type, enabled=False):
        cosines = torch.einsum("bdhw,kd->bkhw", F.normalize(features.float(), dim=1), vectors.float())
        return (SHARPNESS * cosines).softmax(dim=1)


def as_map(tokens: Tensor, grid: tuple[int, ...] | torch.Size) -> Tensor:
    """Tokens of places (B, h w, D), row by row, to (B, D, h, w)."""
    return tokens.mT.unflatten(2, tuple(grid))


def dense_tower(clip: Clip) -> DenseTower:
    """The image tower, if it has places.

    Raises:
        ConfigError: if it is another library's.
    """
    if not isinstance(clip.image, (VisionTower, ModifiedResNet)):
        raise ConfigError(f"places need an image tower of ours, not a {type(clip.image).__name__}")
    return clip.image


def cell_of(tower: DenseTower) -> int:
    """How many pixels a place is wide: the patch size, or 32 for a ResNet."""
    return 32 if isinstance(tower, ModifiedResNet) else tower.config.patch_size
