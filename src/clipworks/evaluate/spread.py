"""How the vectors of a model lie on the sphere: how evenly, in how many directions, and pairs how close.

Uniformity and alignment after Wang and Isola, Understanding Contrastive Representation Learning through
Alignment and Uniformity on the Hypersphere, ICML 2020; relative alignment after Oh et al., Geodesic
Multi-Modal Mixup for Robust Fine-Tuning, NeurIPS 2023; the number of directions after Fürst et al., CLOOB,
NeurIPS 2022. Distances are taken as 2 - 2 cos in tiles, so memory grows with the number of vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipworks.errors import DataError, ShapeError

TILE = 1024


def uniformity(vectors: Tensor, t: float = 2.0) -> float:
    """ln of the mean of exp(-t ||x - y||²) over all pairs of different rows; lower is more even.

    Args:
        vectors: (n, D), unit length; of two modalities joined, for their union.
        t: above 0.

    Raises:
        DataError: for fewer than two vectors.
    """
    n = _rows(vectors)
    total = torch.zeros((), dtype=torch.float64, device=vectors.device)
    x = vectors.double()
    for start in range(0, n, TILE):
        total += torch.exp(-t * _squared(x[start : start + TILE], x)).sum()
    return float(torch.log((total - n) / (n * (n - 1))))


def relative_alignment(image_features: Tensor, text_features: Tensor) -> float:
    """How much closer a text is to its own picture than to the nearest other one; lower is better.

    mean_i (||t_i - v_i||² - min_{j≠i} ||t_i - v_j||²), below 0 where the own picture is the nearest.

    Args:
        image_features: (n, D), unit length.
        text_features: (n, D), unit length, row i of picture i.

    Raises:
        DataError: for fewer than two pairs.
        ShapeError: if the shapes differ.
    """
    n = _rows(image_features)
    if image_features.shape != text_features.shape:
        raise ShapeError(
            f"images {tuple(image_features.shape)} and texts {tuple(text_features.shape)} must be pairs"
        )
    images, texts = image_features.double(), text_features.double()
    gaps = []
    for start in range(0, n, TILE):
        squared = _squared(texts[start : start + TILE], images)
        own = torch.arange(start, start + len(squared), device=squared.device)[:, None]
        gaps.append(squared.gather(1, own).squeeze(1) - squared.scatter(1, own, torch.inf).amin(dim=1))
    return float(torch.cat(gaps).mean())


def directions(vectors: Tensor, share: float = 0.99) -> int:
    """How many eigenvalues of the covariance, largest first, hold this share of their sum.

    Args:
        vectors: (n, D).
        share: in (0, 1].

    Raises:
        DataError: for fewer than two vectors.
    """
    _rows(vectors)
    x = vectors.double()
    values = torch.linalg.svdvals(x - x.mean(dim=0)).square()
    held = values.cumsum(0) / values.sum()
    return int((held < share - 1e-12).sum()) + 1


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (n, m) of unit vectors."""
    return 2 - 2 * x @ y.T


def _rows(vectors: Tensor) -> int:
    if vectors.dim() != 2:
        raise ShapeError(f"vectors {tuple(vectors.shape)} must be (n, D)")
    if len(vectors) < 2:
        raise DataError(f"{len(vectors)} vectors have no distances between them")
    return len(vectors)
