"""Hooks into a tower's blocks: what one is, how two combine, and one that listens.

A hook is a function `(i, block, tokens) -> tokens`, called in place of block `i`; inside it,
`block(tokens)` runs the block as it is and `block(tokens, attend=f, feed=g)` with other halves.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class BlockCall(Protocol):
    """A block as a hook sees it: tokens (B, N, w) to tokens (B, N, w)."""

    def __call__(self, tokens: Tensor, **halves: Any) -> Tensor: ...


class Around(Protocol):
    """A hook: what to do in place of block `i` (tokens (B, N, w) to (B, M, w))."""

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor: ...


def compose(*hooks: Around | None) -> Around | None:
    """Several hooks as one, the first outermost; None entries are left out, and no hook at all is None.

    The outer hook gets a callable that runs the inner hook, with the same keywords: an `attend` that
    the outer one passes takes precedence over the inner one's.
    """
    chain = [hook for hook in hooks if hook is not None]
    if not chain:
        return None
    composed = chain[-1]
    for hook in reversed(chain[:-1]):
        composed = _nest(hook, composed)
    return composed


def _nest(outer: Around, inner: Around) -> Around:
    def both(i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        def call_inner(tokens: Tensor, **halves: Any) -> Tensor:
            def call_block(tokens: Tensor, **inner_halves: Any) -> Tensor:
                return block(tokens, **{**inner_halves, **halves})

            return inner(i, call_block, tokens)

        return outer(i, call_inner, tokens)

    return both


class Tap:
    """A hook that keeps the tokens after the given blocks: `tap = Tap(3, 6)`, later `tap[3]`.

    Without indices it keeps those of every block. What it kept is replaced by the next run.
    """

    def __init__(self, *blocks: int):
        self.blocks: frozenset[int] = frozenset(blocks)
        self.tokens: dict[int, Tensor] = {}

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        """Run the block and keep its tokens (B, N, w) if it is one of ours."""
        tokens = block(tokens)
        if not self.blocks or i in self.blocks:
            self.tokens[i] = tokens
        return tokens

    def __getitem__(self, i: int) -> Tensor:
        """The tokens (B, N, w) after block `i` in the last run."""
        return self.tokens[i]
