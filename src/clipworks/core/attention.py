"""Attention, the MLP and the block that every tower is made of.

A block is `x + attend(ln_1(x))`, then `x + feed(ln_2(x))`. Both may be handed in when the block is
called, so that every other path through it (values only, v-v, cross-frame, experts) is a function of
the public steps `qkv`, `mix` and `out`, and the residual sums stay the block's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.core.config import Activation, BlockConfig
from clipworks.errors import ConfigError

SHORT = 128  # tokens up to which products written out are faster to train on a CPU than the fused kernel

Mask: TypeAlias = "None | str | Tensor | Callable[[int], None | str | Tensor]"
Attend = Callable[["Attention", Tensor, Mask], Tensor]
Feed = Callable[["MLP", Tensor], Tensor]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Takes any shape and keeps it."""
        return x * torch.sigmoid(1.702 * x)


def activation_module(name: Activation) -> nn.Module:
    """The module of an activation's name."""
    if name == "quick_gelu":
        return QuickGELU()
    return nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")


class NormedQKV(nn.Linear):
    """The Linear of an attention whose queries and keys are normed, each head's d numbers by themselves.

    Gain and bias are shared by the heads. It stands in the place of `Attention.qkv`, so every path that is
    written from `qkv` sees normed queries and keys; values stay as they are.
    """

    def __init__(self, width: int, heads: int, head_width: int, eps: float):
        super().__init__(width, 3 * heads * head_width)
        self.query_norm = nn.LayerNorm(head_width, eps=eps)
        self.key_norm = nn.LayerNorm(head_width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, w) to (B, N, 3 h d)."""
        q, k, v = super().forward(x).chunk(3, dim=-1)
        d = self.query_norm.normalized_shape[0]
        q, k = (
            norm(each.unflatten(-1, (-1, d))).flatten(-2)
            for norm, each in ((self.query_norm, q), (self.key_norm, k))
        )
        return torch.cat([q, k, v], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention in three public steps.

    `qkv(x)` is a Linear (B, N, w) -> (B, N, 3 h d) that holds queries, keys and values side by side
    (`chunk(3, -1)` parts them), with norms on queries and keys where `qk_norm_eps` is given; `mix(q, k, v,
    mask)` attends; `out` is a Linear (B, N, h d) -> (B, N, w).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int | None = None,
        out_width: int | None = None,
        qk_norm_eps: float | None = None,
    ):
        super().__init__()
        head_width = head_width or width // heads
        self.heads = heads
        self.head_width = head_width
        self.qkv = (
            nn.Linear(width, 3 * heads * head_width)
            if qk_norm_eps is None
            else NormedQKV(width, heads, head_width, qk_norm_eps)
        )
        self.out = nn.Linear(heads * head_width, out_width or width)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, h d) to (B, h, N, d)."""
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        """Attend: q (B, Nq, h d), k and v (B, Nk, h d) to (B, Nq, h d).

        Args:
            mask: None or `"full"` (all see all), `"causal"` (a query sees keys up to its own place; with
                fewer queries than keys, the queries are the last ones), a tensor that broadcasts to
                (B, h, Nq, Nk), boolean with True where a key may be seen or float to be added to the
                scores, or a function of Nk that returns one of these.

        Raises:
            ConfigError: if the mask is another string.
        """
        if callable(mask):
            mask = mask(k.shape[1])
        causal = isinstance(mask, str) and mask == "causal"
        if isinstance(mask, str):
            if mask not in ("causal", "full"):
                raise ConfigError(
                    f"mask must be 'causal', 'full', a tensor, a function or None, not {mask!r}"
                )
            mask = None
        if causal and q.shape[1] != k.shape[1]:
            ones = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
            mask, causal = ones.tril(k.shape[1] - q.shape[1]), False
        q, k, v = self.split(q), self.split(k), self.split(v)
        if q.requires_grad and q.device.type == "cpu" and k.shape[2] <= SHORT:
            # The fused kernel's backward pass is slow on short sequences there: a whole training step was
            # measured to take 1.3 to 1.5 times as long with it.
            mixed = _weights(q * self.head_width**-0.5 @ k.transpose(-1, -2), mask, causal) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return mixed.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        """(B, N, w) to (B, N, w)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(self.mix(q, k, v, mask))

    def first(self, x: Tensor) -> Tensor:
        """What the first token gathers from all: (B, N, w) to (B, 1, w), without the other queries."""
        if isinstance(self.qkv, NormedQKV):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return self.out(self.mix(q[:, :1], k, v))
        width = self.heads * self.head_width
        weights, biases = (tensor.tensor_split([width]) for tensor in (self.qkv.weight, self.qkv.bias))
        k, v = F.linear(x, weights[1], biases[1]).chunk(2, dim=-1)
        return self.out(self.mix(F.linear(x[:, :1], weights[0], biases[0]), k, v))


def _weights(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores (B, h, Nq, Nk) to attention weights of the same shape."""
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    elif mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


class MLP(nn.Module):
    """`proj(act(fc(x)))`: (B, N, w) -> (B, N, hidden) -> (B, N, w)."""

    def __init__(self, width: int, hidden: int, activation: Activation):
        super().__init__()
        self.fc = nn.Linear(width, hidden)
        self.act = activation_module(activation)
        self.proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, w) to (B, N, w)."""
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    """A pre-norm transformer block whose two halves may be handed in."""

    def __init__(
        self,
        width: int,
        config: BlockConfig,
        activation: Activation,
        norm_eps: float,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(
            width, config.heads, config.head_width, qk_norm_eps=norm_eps if qk_norm else None
        )
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, config.mlp_width, activation)

    def forward(
        self, tokens: Tensor, mask: Mask = None, attend: Attend | None = None, feed: Feed | None = None
    ) -> Tensor:
        """(B, N, w) to (B, N, w).

        Args:
            mask: as `Attention.mix` takes it.
            attend: `f(attention, x, mask)` in place of the attention; x (B, N, w) is already normed.
            feed: `g(mlp, x)` in place of the MLP; x (B, N, w) is already normed.
        """
        x = self.ln_1(tokens)
        tokens = tokens + (self.attention(x, mask) if attend is None else attend(self.attention, x, mask))
        x = self.ln_2(tokens)
        return tokens + (self.mlp(x) if feed is None else feed(self.mlp, x))

    def first(self, tokens: Tensor) -> Tensor:
        """The first token after the block, (B, N, w) to (B, 1, w), without computing the others."""
        first = tokens[:, :1] + self.attention.first(self.ln_1(tokens))
        return first + self.mlp(self.ln_2(first))
