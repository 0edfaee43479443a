"""A batch: pictures, texts by source, cached features, boxes and keys, row for row of the same examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from clipworks.core.tokenizer import Tokens
from clipworks.data.source import Example
from clipworks.errors import DataError

__all__ = ["Batch", "Example"]


@dataclass
class Batch:
    """B examples.

    Attributes:
        images: (B, 3, H, W), uint8 or float in [0, 1]; None where there are no pictures.
        texts: for each source (`alt`, `synthetic`, `short`, `region`, `rewrite`, language codes) its
            sentences. Without `owner` there is exactly one a row, in order; with it, `owner[j]` is the
            row to which sentence j belongs, so a row may have several or none.
        features: tensors with one row an example, (B, …), or 0-D ones that belong to the whole batch.
            The loader adds, (B,) int64 each: `label`, -1 where an example has none; `part`, which source
            of a mixture it is from, since labels mean something else in each; and `view`, how many
            passes over its source are behind it, which with the key says which crop to make.
        boxes: one entry an example, for instance (k, 4) tensors; None where there are none.
        keys: one name an example.
    """

    images: Tensor | None = None
    texts: dict[str, Tokens] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    boxes: list[Any] | None = None
    keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = len(self)
        counts: dict[str, int] = {"keys": len(self.keys)} if self.keys else {}
        if self.images is not None:
            counts["images"] = len(self.images)
        if self.boxes is not None:
            counts["boxes"] = len(self.boxes)
        counts |= {f"features {name}": len(value) for name, value in self.features.items() if value.ndim}
        counts |= {f"texts {name}": len(text.ids) for name, text in self.texts.items() if text.owner is None}
        wrong = {name: count for name, count in counts.items() if count != size}
        if wrong:
            raise DataError(f"a batch has one row an example in every part: {counts} do not fit together")

    def __len__(self) -> int:
        if self.keys:
            return len(self.keys)
        if self.images is not None:
            return len(self.images)
        for tensor in self.features.values():
            if tensor.ndim:
                return len(tensor)
        for tokens in self.texts.values():
            if tokens.owner is None:
                return len(tokens.ids)
        return len(self.boxes) if self.boxes is not None else 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device; what is there already is not copied."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU can overlap with work."""
        return self._map(lambda value: value.pin_memory())

    def slice(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`; sentences follow the rows that own them."""
        start, stop, _ = slice(start, stop).indices(len(self))
        return Batch(
            images=None if self.images is None else self.images[start:stop],
            texts={name: _rows(tokens, start, stop) for name, tokens in self.texts.items()},
            features={name: rows[start:stop] if rows.ndim else rows for name, rows in self.features.items()},
            boxes=None if self.boxes is None else self.boxes[start:stop],
            keys=self.keys[start:stop],
        )

    def split(self, parts: int) -> Iterator[Batch]:
        """The batch as `parts` batches of nearly equal size, in order; none is empty.

        Raises:
            DataError: if there are fewer rows than parts.
        """
        size = len(self)
        if not 1 <= parts <= size:
            raise DataError(f"a batch of {size} cannot be split into {parts} parts")
        edges = [size * part // parts for part in range(parts + 1)]
        for start, stop in pairwise(edges):
            yield self.slice(start, stop)

    def _map(self, move: Callable[[Any], Any]) -> Batch:
        boxes = self.boxes
        return replace(
            self,
            images=None if self.images is None else move(self.images),
            texts={name: move(tokens) for name, tokens in self.texts.items()},
            features={name: move(value) for name, value in self.features.items()},
            boxes=boxes and [move(box) if isinstance(box, Tensor) else box for box in boxes],
        )


def _rows(tokens: Tokens, start: int, stop: int) -> Tokens:
    if tokens.owner is None:
        return tokens[start:stop]
    kept = tokens[(tokens.owner >= start) & (tokens.owner < stop)]
    return replace(kept, owner=None if kept.owner is None else kept.owner - start)
