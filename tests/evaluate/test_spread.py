"""How vectors lie on the sphere: naive forms, closed forms, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipworks.core.clip import unit
from clipworks.errors import DataError, ShapeError
from clipworks.evaluate import spread
from clipworks.evaluate.spread import directions, relative_alignment, uniformity


def vectors(n: int, width: int = 6, seed: int = 0) -> Tensor:
    return unit(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)))


def test_uniformity_is_the_mean_over_all_different_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(9)
    expected = math.log(torch.nn.functional.pdist(x.double()).square().mul(-2).exp().mean())
    assert uniformity(x) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(spread, "TILE", 4)
    assert uniformity(x) == pytest.approx(expected, abs=1e-6)


def test_uniformity_of_a_set_with_itself_has_a_closed_form() -> None:
    x = vectors(9)
    n, alone = 9, math.exp(uniformity(x))
    assert uniformity(torch.cat([x, x])) == pytest.approx(
        math.log((1 + 2 * (n - 1) * alone) / (2 * n - 1)), abs=1e-6
    )


def test_uniformity_is_zero_for_equal_vectors_and_falls_as_they_spread() -> None:
    assert uniformity(vectors(1).expand(5, -1)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(6)) == pytest.approx(-4)
    assert uniformity(unit(vectors(50) + 1)) > uniformity(vectors(50))


def test_relative_alignment_is_the_naive_tensor_form(monkeypatch: pytest.MonkeyPatch) -> None:
    v, t = vectors(9), vectors(9, seed=1)
    squared = (t[:, None] - v[None]).square().sum(dim=-1)
    others = squared + torch.diag(torch.full((9,), torch.inf))
    expected = (squared.diagonal() - others.amin(dim=1)).mean().item()
    assert relative_alignment(v, t) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(spread, "TILE", 4)
    assert relative_alignment(v, t) == pytest.approx(expected, abs=1e-5)
    assert relative_alignment(torch.eye(6), torch.eye(6)) == pytest.approx(-2)


def test_directions_count_the_eigenvalues_that_hold_the_share() -> None:
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    flat = x * torch.tensor([1.0, 1.0, 1.0, 1e-3, 1e-3, 1e-3]) + 5
    assert directions(flat) == 3
    assert directions(x) == 6 and directions(x, 0.5) == 3
    values = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
    assert directions(x, float(values[:2].sum() / values.sum())) == 2


def test_too_few_or_unpaired_vectors_are_refused() -> None:
    with pytest.raises(DataError, match="1 vectors"):
        uniformity(vectors(1))
    with pytest.raises(ShapeError, match="must be pairs"):
        relative_alignment(vectors(3), vectors(4))
