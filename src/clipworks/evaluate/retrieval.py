"""Retrieval: how often what belongs to a query is among the first k of a gallery.

Recall@k as in Radford et al., ICML 2021, section 3.1.4, and the captioning sets it cites: a query counts as
answered if any of its matches is among its k nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipworks.errors import ShapeError


def ranks(similarity: Tensor, matches: Tensor) -> Tensor:
    """The rank of each query's best match, from 1.

    Args:
        similarity: (n, m) of n queries with m things.
        matches: (n, m) bool, what belongs to each query; at least one each.

    Returns:
        (n,) int64. What ties with the best match counts as ranked before it.

    Raises:
        ShapeError: if the shapes differ or a query has no match.
    """
    if similarity.shape != matches.shape or matches.dtype != torch.bool:
        raise ShapeError(
            f"matches must be bool {tuple(similarity.shape)}, not {matches.dtype} {tuple(matches.shape)}"
        )
    if not matches.any(dim=1).all():
        raise ShapeError("a query has no match in the gallery")
    best = similarity.masked_fill(~matches, float("-inf")).amax(dim=1, keepdim=True)
    return (similarity >= best).logical_and(~matches).sum(dim=1) + 1


def recall(similarity: Tensor, matches: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall in [0, 1] at each k, `{"recall@1": …}`; similarity (n, m), matches (n, m) bool."""
    found = ranks(similarity, matches)
    return {f"recall@{k}": float((found <= k).float().mean()) for k in ks}


def pair_recall(
    image_features: Tensor, text_features: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Both directions for pictures with one or more texts each.

    Args:
        image_features: (n, D), unit length.
        text_features: (m, D), unit length.
        owner: (m,) int64, the picture of each text.
        ks: where the ranking is cut.

    Returns:
        `text_to_image_recall@k` and `image_to_text_recall@k`, in [0, 1].
    """
    similarity = text_features.float() @ image_features.float().T
    matches = owner[:, None] == torch.arange(len(image_features), device=owner.device)
    forth = recall(similarity, matches, ks)
    back = recall(similarity.T, matches.T, ks)
    return {f"text_to_image_{k}": v for k, v in forth.items()} | {
        f"image_to_text_{k}": v for k, v in back.items()
    }


def average_precision(similarity: Tensor, matches: Tensor) -> Tensor:
    """The mean, over a query's matches, of the precision at the rank of each; the whole gallery is ranked.

    Args:
        similarity: (n, m) of n queries with m things.
        matches: (n, m) bool, what belongs to each query; at least one each. Leave out a query that is in the
            gallery itself by a similarity of -inf, which counts neither as a match nor before one.

    Returns:
        (n,) fp32 in [0, 1]; its mean is mAP. Of things with equal similarity the first in the gallery counts
        as ranked first.

    Raises:
        ShapeError: if the shapes differ or a query has no match.
    """
    if similarity.shape != matches.shape or matches.dtype != torch.bool:
        raise ShapeError(
            f"matches must be bool {tuple(similarity.shape)}, not {matches.dtype} {tuple(matches.shape)}"
        )
    order = similarity.argsort(dim=1, descending=True, stable=True)
    found = (matches & (similarity > float("-inf"))).gather(1, order).float()
    if not found.any(dim=1).all():
        raise ShapeError("a query has no match in the gallery")
    places = torch.arange(1, found.shape[1] + 1, device=found.device)
    return (found.cumsum(dim=1) / places * found).sum(dim=1) / found.sum(dim=1)
