"""Texts through a causal tower without a padded token and without computing a beginning twice.

Under a causal mask the keys and values at a position depend only on the tokens up to it, so texts that
begin alike share them in every block. The texts are ordered by their ids; each one then brings only the
positions behind what it shares with the one before it. These positions of all texts, and nothing else, stand
one after the other in a single row (1, P, w): norms, linear layers and the MLP run on that row, and only
attention looks at the texts one by one. It is the tower's own `run` with another `attend`, exact and
differentiable, so it serves zero-shot heads, learned contexts and any list of captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clipworks.core.attention import Attention, Mask
from clipworks.core.hooks import Around, BlockCall
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower


@dataclass(frozen=True)
class Bucket:
    """Texts that bring equally many positions: where their queries and keys stand in the row.

    queries (m, s) and keys (m, L) int64 index the row; mask (m, 1, s, L) is True where a key may be seen,
    or None if the m texts bring all their positions and are equally long.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Pack:
    """How texts lie in one row of P positions.

    Attributes:
        rows, columns: (P,) int64; position p of the row is `ids[rows[p], columns[p]]`.
        ends: (n,) int64; where each text, in the order given, ends in the row.
        buckets: together they cover every position once.
        inverse: (P,) int64; concatenating the buckets' queries and indexing with it gives 0 … P - 1.
    """

    rows: Tensor
    columns: Tensor
    ends: Tensor
    buckets: tuple[Bucket, ...]
    inverse: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def attend(self, attention: Attention, x: Tensor, mask: Mask = None) -> Tensor:
        """Causal attention within each text: normed tokens (1, P, w) to (1, P, w)."""
        q, k, v = attention.qkv(x)[0].chunk(3, dim=-1)
        mixed = [
            attention.mix(
                q[bucket.queries],
                k[bucket.keys],
                v[bucket.keys],
                "causal" if bucket.mask is None else bucket.mask,
            ).flatten(0, 1)
            for bucket in self.buckets
        ]
        return attention.out(torch.cat(mixed)[self.inverse])[None]

    def __call__(self, i: int, block: BlockCall, tokens: Tensor, /) -> Tensor:
        """The hook: block `i` on the row (1, P, w) with this pack's attention."""
        return block(tokens, attend=self.attend)


def pack(tokens: Tokens) -> Pack:
    """Lay texts, ids (n, L) and ends (n,), into one row; beginnings that are equal are laid once."""
    return _lay(*_ordered(tokens))


def _ordered(tokens: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order by ids; in that order, each text's length and what it shares with the one before; (n,)."""
    ids, lengths = tokens.ids.numpy(), tokens.ends.numpy() + 1
    # Behind its end a text has no ids of its own; -1 keeps what stands there from looking like a beginning.
    ids = np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, -1)
    order = np.lexsort(ids.T[::-1])
    ids, lengths = ids[order], lengths[order]
    shared = np.zeros(len(ids), dtype=np.int64)
    if len(ids) > 1:
        differs = ids[1:] != ids[:-1]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), ids.shape[1])
        shared[1:] = np.minimum(first, lengths[1:])
    return order, lengths, shared


def _lay(order: np.ndarray, lengths: np.ndarray, shared: np.ndarray) -> Pack:
    own = lengths - shared
    starts = np.concatenate([[0], np.cumsum(own)])
    total, longest = int(starts[-1]), int(lengths.max())
    text = np.repeat(np.arange(len(order)), own)
    columns = np.arange(total) - starts[text] + shared[text]
    # place[i, t]: where position t of text i stands; what it shares, it inherits from the text before.
    place = np.zeros((len(order), longest), dtype=np.int64)
    place[text, columns] = np.arange(total)
    owner = np.where(np.arange(longest) >= shared[:, None], np.arange(len(order))[:, None], 0)
    owner = np.maximum.accumulate(owner, axis=0)
    place = np.take_along_axis(place, owner, axis=0)

    ends = np.empty(len(order), dtype=np.int64)
    ends[order] = place[np.arange(len(order)), lengths - 1]
    buckets, covered = [], []
    for count in np.unique(own[own > 0]):
        members = np.flatnonzero(own == count)
        reach = int(lengths[members].max())
        offsets = shared[members][:, None] + np.arange(count)
        queries = place[members[:, None], offsets]
        keys = np.where(np.arange(reach) < lengths[members][:, None], place[members, :reach], 0)
        whole = bool((own[members] == lengths[members]).all())
        mask = None if whole else torch.from_numpy((np.arange(reach) <= offsets[..., None])[:, None])
        buckets.append(Bucket(torch.from_numpy(queries), torch.from_numpy(keys), mask))
        covered.append(queries.ravel())
    inverse = np.empty(total, dtype=np.int64)
    inverse[np.concatenate(covered)] = np.arange(total)
    return Pack(
        torch.from_numpy(order[text]),
        torch.from_numpy(columns),
        torch.from_numpy(ends),
        tuple(buckets),
        torch.from_numpy(inverse),
    )


def run_packed(
    tower: TextTower, packed: Pack, content: Tensor, around: Callable[[Pack], Around] | None = None
) -> Tensor:
    """Word vectors of a row, (P, w), through a causal tower to the vectors (n, D) of its texts.

    Args:
        content: what stands at each position of the row; learned vectors may, gradients reach them.
        around: a function of the pack that returns another hook than the pack itself, to compose with it.
    """
    hook = packed if around is None else around(packed)
    placed = tower.place(content[None], positions=packed.columns)
    row = tower.run(placed, around=hook)
    return tower.project(row[0, packed.ends][:, None])


def share_computed(tokens: Tokens) -> float:
    """The share of all positions (n, L) that is left when equal beginnings are laid once; in (0, 1]."""
    if len(tokens) < 2:
        return 1.0
    _, lengths, shared = _ordered(tokens)
    return float((lengths - shared).sum() / lengths.sum())


def text_vectors(tower: nn.Module, tokens: Tokens) -> Tensor:
    """Vectors (n, D), not normalised, of texts of a training step: packed on a CPU, plain on an accelerator.

    There, laying the row out would have to wait for the device, and the padding of short captions is cheap.
    """
    if isinstance(tower, TextTower) and tokens.ids.device.type == "cpu":
        return text_features(tower, tokens, positions=1 << 30)
    return tower(tokens)


def text_features(tower: TextTower, tokens: Tokens, positions: int = 4096) -> Tensor:
    """Vectors (n, D), not normalised, of texts given as tokens (n, L) on the CPU; equal to `tower(tokens)`.

    Args:
        positions: about how many positions go through the tower at once.
    """
    device = tower.positions.device
    if len(tokens) == 1 or tower.config.mask != "causal":
        return torch.cat([tower(part.to(device)) for part in _slices(tokens, positions)])
    order, lengths, shared = _ordered(tokens)
    number = np.cumsum(lengths - shared) // max(1, positions)
    features = []
    for rows in np.split(order, np.flatnonzero(np.diff(number)) + 1):
        part = tokens[torch.from_numpy(rows)]
        packed = pack(part)
        content = tower.embedding(part.ids[packed.rows, packed.columns].to(device))
        features.append(run_packed(tower, packed, content))
    inverse = torch.empty(len(order), dtype=torch.int64)
    inverse[torch.from_numpy(order)] = torch.arange(len(order))
    return torch.cat(features)[inverse.to(device)]


def _slices(tokens: Tokens, positions: int) -> Iterator[Tokens]:
    step = max(1, positions // tokens.ids.shape[1])
    for start in range(0, len(tokens), step):
        yield tokens[start : start + step]
