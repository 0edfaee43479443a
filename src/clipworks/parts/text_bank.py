"""Texts with learned vectors among their words: a common beginning once, chunk by chunk, nothing kept twice.

A learned context turns every step of training into a pass over the texts of all classes. Most of that pass is
the same for every class: under a causal mask, the context that stands before the names. Texts are therefore
packed (see `encode/packed`): what they share with each other is computed once, and no padding at all.

A chunk of texts at a time goes through the tower. If there are several, none keeps its activations: each is
computed again when its gradient is due, so memory is that of one chunk however many classes there are.
Values and gradients are those of the plain form. In attention, a query's scores with the shared beginning are
one product for all texts, so its keys are not copied for each of them either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipworks.core.attention import Attention, Mask
from clipworks.core.hooks import Around, BlockCall
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower
from clipworks.encode.packed import Bucket, Pack, pack, run_packed
from clipworks.errors import ConfigError, ShapeError

MEMORY = 1 << 29  # bytes of activations that a chunk may keep
_KEPT = 20  # numbers kept for a backward pass through a block, by position and unit of width, about


def with_slots(tokens: Tokens, vocab_size: int, start: int, count: int, *, per_text: bool = False) -> Tokens:
    """Texts in which the tokens at places `start` … `start + count - 1` are learned.

    A slot is an id from `vocab_size` on: `vocab_size + j` stands for learned vector j.

    Args:
        tokens: n texts, ids (n, L).
        vocab_size: of the tower.
        start: the first place, counted from the start token.
        count: M, how many.
        per_text: text i has vectors of its own, i·M … i·M + M - 1, instead of 0 … M - 1.

    Raises:
        ShapeError: if a text ends before its slots do.
    """
    if start + count > int(tokens.ends.min()):
        raise ShapeError(
            f"{count} learned vectors from place {start} on reach past the end of a text of "
            f"{int(tokens.ends.min()) + 1} tokens"
        )
    ids = tokens.ids.clone()
    slots = vocab_size + torch.arange(count).expand(len(ids), count)
    ids[:, start : start + count] = slots + torch.arange(len(ids))[:, None] * count * per_text
    return Tokens(ids, tokens.ends, tokens.owner)


class TextBank:
    """n texts through a text tower, with learned vectors in some of their places.

    Args:
        tower: our own text tower; its weights get no gradient if they ask for none.
        tokens: texts (n, L) on the CPU; ids from the vocabulary's size on are slots, see `with_slots`.
        memory: bytes of activations that may be kept at once, about.

    Raises:
        ConfigError: for a tower of another library.
    """

    def __init__(self, tower: torch.nn.Module, tokens: Tokens, *, memory: int = MEMORY):
        if not isinstance(tower, TextTower):
            raise ConfigError(f"learned words need a text tower of ours, not a {type(tower).__name__}")
        self.tower = tower
        self.count = len(tokens)
        per_position = 4 * _KEPT * sum(tower.width for _ in tower.blocks)
        self.chunks = _chunks(tower, tokens.cut(), max(1, memory // per_position))
        self.slots = 1 + max(
            (int(chunk.numbers.max()) for chunk in self.chunks if len(chunk.numbers)), default=-1
        )
        order = torch.cat([chunk.texts for chunk in self.chunks])
        self._inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))

    def __len__(self) -> int:
        return self.count

    @property
    def positions(self) -> int:
        """How many token positions a pass computes."""
        return sum(chunk.positions for chunk in self.chunks)

    def __call__(self, vectors: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """The texts' vectors, differentiable in all that is learned.

        Args:
            vectors: (S, w), what stands in the slots; positions are added to them as to words.
            deep: (S, w) each: before block i + 1, `deep[i]` overwrites what the slots have become; no
                positions are added.

        Returns:
            (n, D), not normalised.

        Raises:
            ShapeError: if there are fewer vectors than slots, or of another width.
        """
        for given in (vectors, *deep):
            if given.ndim != 2 or given.shape[0] < self.slots or given.shape[1] != self.tower.width:
                raise ShapeError(
                    f"learned vectors must be ({self.slots}, {self.tower.width}), not {tuple(given.shape)}"
                )
        learned = torch.is_grad_enabled() and any(given.requires_grad for given in (vectors, *deep))
        if learned and len(self.chunks) > 1:
            parts = [
                checkpoint(
                    chunk.run, self.tower, vectors, *deep, use_reentrant=False, preserve_rng_state=False
                )
                for chunk in self.chunks
            ]
        else:
            parts = [chunk.run(self.tower, vectors, *deep) for chunk in self.chunks]
        return torch.cat(parts)[self._inverse.to(vectors.device)]


@dataclass(frozen=True)
class _Chunk:
    """Some of the texts.

    Attributes:
        texts: (m,) int64, which they are.
        ids: (P,) or (m, L) int64, words; 0 in slots.
        places: where slots are, indices into the flattened ids.
        numbers: which learned vector stands in each.
        layout: the packed row, or for a tower that is not causal the texts themselves.
    """

    texts: Tensor
    ids: Tensor
    places: Tensor
    numbers: Tensor
    layout: Pack | Tokens

    @property
    def positions(self) -> int:
        return self.ids.numel()

    def run(self, tower: TextTower, vectors: Tensor, *deep: Tensor) -> Tensor:
        """Vectors (m, D)."""
        device = tower.positions.device
        places, numbers = self.places.to(device), self.numbers.to(device)

        def write(tokens: Tensor, values: Tensor) -> Tensor:
            flat = tokens.flatten(0, -2)
            return flat.index_copy(0, places, values[numbers].to(flat.dtype)).view_as(tokens)

        def overwrite(inner: Around | None) -> Around:
            def hook(i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
                if 1 <= i <= len(deep):
                    tokens = write(tokens, deep[i - 1])
                return block(tokens) if inner is None else inner(i, block, tokens)

            return hook

        content = write(tower.embedding(self.ids.to(device)), vectors)
        if isinstance(self.layout, Pack):
            layout = _on(self.layout, device)
            return run_packed(tower, layout, content, lambda layout: overwrite(_Shared(layout)))
        tokens = self.layout.to(device)
        placed = tower.run(tower.place(content), mask=tower.mask_for(tokens), around=overwrite(None))
        return tower.project(placed, at=tokens.ends)


def _on(layout: Pack, device: torch.device) -> Pack:
    """A pack whose indices and masks are on a device."""
    buckets = tuple(
        Bucket(
            bucket.queries.to(device),
            bucket.keys.to(device),
            None if bucket.mask is None else bucket.mask.to(device),
        )
        for bucket in layout.buckets
    )
    rows, columns, ends = (t.to(device) for t in (layout.rows, layout.columns, layout.ends))
    return Pack(rows, columns, ends, buckets, layout.inverse.to(device))


class _Shared:
    """A pack's hook in which a beginning that all texts of a bucket share is attended to in one product."""

    def __init__(self, layout: Pack):
        self.layout = layout
        self.beginnings = [_beginning(bucket) for bucket in layout.buckets]

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        return block(tokens, attend=self.attend)

    def attend(self, attention: Attention, x: Tensor, mask: Mask = None) -> Tensor:
        """Causal attention within each text: normed tokens (1, P, w) to (1, P, w)."""
        q, k, v = attention.qkv(x)[0].chunk(3, dim=-1)
        mixed = []
        for bucket, shared in zip(self.layout.buckets, self.beginnings, strict=True):
            if shared:
                part = _attend_in_two(attention, q, k, v, bucket, shared)
            else:
                part = attention.mix(
                    q[bucket.queries],
                    k[bucket.keys],
                    v[bucket.keys],
                    "causal" if bucket.mask is None else bucket.mask,
                )
            mixed.append(part.flatten(0, 1))
        return attention.out(torch.cat(mixed)[self.layout.inverse])[None]


def _beginning(bucket: Bucket) -> int:
    """How many keys all texts of a bucket share and all their queries see."""
    if len(bucket.keys) < 2 or bucket.mask is None:
        return 0
    same = (bucket.keys == bucket.keys[:1]).all(dim=0) & bucket.mask.flatten(0, 2).all(dim=0)
    return int(same.long().cumprod(dim=0).sum())


def _attend_in_two(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, shared: int
) -> Tensor:
    """One softmax over the shared keys and each text's own: (m, s, h d)."""
    heads = (attention.heads, attention.head_width)
    common = bucket.keys[0, :shared]
    queries = q[bucket.queries].unflatten(-1, heads) * attention.head_width**-0.5  # (m, s, h, d)
    own = bucket.keys[:, shared:]
    k_common, v_common = (t[common].unflatten(-1, heads) for t in (k, v))  # (c, h, d)
    k_own, v_own = (t[own].unflatten(-1, heads).transpose(1, 2) for t in (k, v))  # (m, h, r, d)
    flat = queries.flatten(0, 1).transpose(0, 1)  # (h, m s, d)
    with_common = (flat @ k_common.permute(1, 2, 0)).unflatten(1, queries.shape[:2])  # (h, m, s, c)
    with_own = queries.transpose(1, 2) @ k_own.mT  # (m, h, s, r)
    if bucket.mask is not None:
        with_own = with_own.masked_fill(~bucket.mask[..., shared:], float("-inf"))
    weights = torch.cat([with_common.transpose(0, 1), with_own], dim=-1).softmax(dim=-1)  # (m, h, s, c + r)
    of_common = weights[..., :shared].transpose(0, 1).flatten(1, 2) @ v_common.transpose(0, 1)  # (h, m s, d)
    of_own = weights[..., shared:] @ v_own  # (m, h, s, d)
    mixed = of_common.unflatten(1, queries.shape[:2]).permute(1, 2, 0, 3) + of_own.transpose(1, 2)
    return mixed.flatten(2)


def _chunks(tower: TextTower, tokens: Tokens, positions: int) -> list[_Chunk]:
    """Texts in the order of their ids, so that neighbors share beginnings, some positions at a time."""
    vocab_size = tower.embedding.num_embeddings
    causal = tower.config.mask == "causal"
    order = _order(tokens)
    chunks: list[_Chunk] = []
    start = 0
    while start < len(order):
        # A chunk is as many texts as fit when what they share with the one before is not counted.
        stop, filled = start, 0
        while stop < len(order) and (stop == start or filled < positions):
            filled += _own(tokens, order[stop - 1] if stop > start else None, order[stop], causal)
            stop += 1
        texts = torch.tensor(order[start:stop], dtype=torch.int64)
        some = tokens[texts]
        layout: Pack | Tokens = pack(some) if causal else some
        ids = some.ids[layout.rows, layout.columns] if isinstance(layout, Pack) else some.ids
        places = (ids.flatten() >= vocab_size).nonzero()[:, 0]
        numbers = ids.flatten()[places] - vocab_size
        chunks.append(_Chunk(texts, ids.masked_fill(ids >= vocab_size, 0), places, numbers, layout))
        start = stop
    return chunks


def _order(tokens: Tokens) -> list[int]:
    rows = [ids[: end + 1] for ids, end in zip(tokens.ids.tolist(), tokens.ends.tolist(), strict=True)]
    return sorted(range(len(rows)), key=rows.__getitem__)


def _own(tokens: Tokens, before: int | None, text: int, causal: bool) -> int:
    """How many positions a text brings beside those it shares with the one before it."""
    if not causal:
        return tokens.ids.shape[1]
    length = int(tokens.ends[text]) + 1
    if before is None:
        return length
    least = min(length, int(tokens.ends[before]) + 1)
    differs = (tokens.ids[text, :least] != tokens.ids[before, :least]).nonzero()
    return length - (int(differs[0]) if len(differs) else least)
