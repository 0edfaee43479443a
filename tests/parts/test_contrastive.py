"""The contrastive loss against naive formulas, closed forms and itself in tiles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipworks.errors import ConfigError, ShapeError
from clipworks.parts import contrastive
from clipworks.parts.contrastive import Targets, contrastive_loss


def vectors(
    n: int, m: int, width: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.nn.functional.normalize(torch.randn(n, width, generator=generator, dtype=dtype), dim=-1)
    b = torch.nn.functional.normalize(torch.randn(m, width, generator=generator, dtype=dtype), dim=-1)
    return a, b


def naive_softmax(logits: Tensor, t: Tensor, mask: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """One pair at a time, from the definition."""

    def direction(scores: Tensor, t: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        total, norm = 0 * scores.sum(), torch.zeros((), dtype=scores.dtype)
        for i in range(len(scores)):
            allowed = [j for j in range(scores.shape[1]) if mask[i, j]]
            mass = sum(float(t[i, j]) for j in allowed)
            if mass == 0:
                continue
            normalizer = torch.stack([scores[i, j] for j in allowed]).logsumexp(0)
            for j in allowed:
                target = (1 - smoothing) * float(t[i, j]) / mass + smoothing / len(allowed)
                total = total - weights[i] * target * (scores[i, j] - normalizer)
            norm = norm + weights[i]
        return total / norm

    return (direction(logits, t, mask, weights) + direction(logits.T, t.T, mask.T, weights)) / 2


def naive_sigmoid(logits: Tensor, t: Tensor, mask: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """One pair at a time, from the definition."""
    total = 0 * logits.sum()
    for i in range(len(logits)):
        for j in range(logits.shape[1]):
            if mask[i, j]:
                target = float(t[i, j]) * (1 - smoothing) + smoothing / 2
                positive = torch.log(1 / (1 + torch.exp(-logits[i, j])))
                negative = torch.log(1 / (1 + torch.exp(logits[i, j])))
                total = total - weights[i] * (target * positive + (1 - target) * negative)
    return total / len(logits)


NAIVE = {"softmax": naive_softmax, "sigmoid": naive_sigmoid}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every case has several, cut at odd places, and few of them are kept."""
    monkeypatch.setattr(contrastive, "TILE", (3, 5))
    monkeypatch.setattr(contrastive, "KEPT_BYTES", 8 * 15 * 2)


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_loss_of_equal_pairs_is_the_logarithm_of_their_number(n: int) -> None:
    rows = torch.ones(n, 4) / 2
    for tiled in (False, True):
        assert contrastive_loss(rows, rows, 10.0, tiled=tiled).item() == pytest.approx(math.log(n), abs=1e-5)


def test_sigmoid_loss_at_zero_logits_is_n_times_the_logarithm_of_two() -> None:
    rows = torch.zeros(6, 4)
    for tiled in (False, True):
        loss = contrastive_loss(rows, rows, 10.0, 0.0, form="sigmoid", tiled=tiled)
        assert loss.item() == pytest.approx(6 * math.log(2), rel=1e-6)


@given(
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    form=st.sampled_from(["softmax", "sigmoid"]),
    kind=st.sampled_from(["diagonal", "dense", "boolean", "ids"]),
    masked=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    tiled=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_option_agrees_with_the_naive_double_loop(
    n: int,
    m: int,
    seed: int,
    form: str,
    kind: str,
    masked: bool,
    weighted: bool,
    smoothing: float,
    tiled: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "diagonal" or (weighted and form == "softmax"):
        m = n
    a, b = vectors(n, m, 3, seed)
    t = torch.eye(n, m, dtype=torch.float64)
    positives = None
    if kind == "dense":
        positives = t = torch.rand(n, m, generator=generator, dtype=torch.float64) * (
            torch.rand(n, m, generator=generator) < 0.7
        )
    elif kind == "boolean":
        positives = torch.rand(n, m, generator=generator) < 0.4
        t = positives.double()
    elif kind == "ids":
        positives = (
            torch.randint(0, 3, (n,), generator=generator),
            torch.randint(0, 3, (m,), generator=generator),
        )
        t = (positives[0][:, None] == positives[1]).double()
    mask = torch.rand(n, m, generator=generator) < 0.8 if masked else torch.ones(n, m, dtype=torch.bool)
    weights = (
        torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
        if weighted
        else torch.ones(max(n, m)).double()
    )
    if form == "softmax" and not ((t * mask).sum() > 0):
        return  # no positive at all: checked by a test of its own
    inputs = [x.requires_grad_() for x in (a, b, torch.tensor(3.0).double(), torch.tensor(-0.7).double())]
    expected = NAIVE[form](inputs[2] * a @ b.T + inputs[3], t, mask, weights, smoothing)
    before = contrastive.TILE, contrastive.KEPT_BYTES
    contrastive.TILE, contrastive.KEPT_BYTES = (3, 5), 8 * 15 * 2
    try:
        loss = contrastive_loss(
            *inputs,
            form=form,  # type: ignore[arg-type]
            targets=Targets(positives, mask if masked else None, smoothing),
            weights=weights if weighted else None,
            tiled=tiled,
        )
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    finally:
        contrastive.TILE, contrastive.KEPT_BYTES = before
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for ours, naive, x in zip(gradients, torch.autograd.grad(expected, inputs), inputs, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(x) if ours is None else ours, naive, atol=1e-12, rtol=1e-10
        )


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_tiled_gradient_is_that_of_the_plain_form_at_2048(form: str) -> None:
    a, b = vectors(2048, 2048, 16, 0)
    results = []
    for tiled in (False, True):
        inputs = [
            x.clone().requires_grad_()
            for x in (a, b, torch.tensor(14.3).double(), torch.tensor(-10.0).double())
        ]
        loss = contrastive_loss(*inputs, form=form, tiled=tiled)  # type: ignore[arg-type]
        # The bias cancels in the softmax form.
        results.append([loss, *torch.autograd.grad(loss, inputs[: 3 + (form == "sigmoid")])])
    for plain, tiles in zip(*results, strict=True):
        torch.testing.assert_close(tiles, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.usefixtures("small_tiles")
def test_tiled_softmax_is_exact_where_one_exponential_would_vanish(scale: float) -> None:
    a, b = vectors(11, 11, 3, 4, torch.float32)
    a[2] *= 5  # normalizers of rows and columns now differ by hundreds
    results = []
    for tiled in (False, True):
        rows, columns = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss = contrastive_loss(rows, columns, scale, tiled=tiled)
        results.append([loss, *torch.autograd.grad(loss, (rows, columns))])
    for plain, tiles in zip(*results, strict=True):
        torch.testing.assert_close(tiles, plain, atol=1e-4 * scale, rtol=1e-5)
        assert torch.isfinite(tiles).all()


def test_several_positives_that_are_one_give_the_loss_of_pairs() -> None:
    a, b = vectors(9, 9, 4, 1)
    pairs = contrastive_loss(a, b, 7.0)
    ids = torch.arange(9)
    assert contrastive_loss(a, b, 7.0, targets=Targets((ids, ids))).item() == pytest.approx(
        pairs.item(), rel=1e-12
    )
    assert contrastive_loss(a, b, 7.0, targets=Targets(torch.eye(9))).item() == pytest.approx(
        pairs.item(), rel=1e-6
    )


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_loss_does_not_depend_on_the_order_of_the_pairs(form: str) -> None:
    a, b = vectors(12, 12, 4, 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    loss, other = (contrastive_loss(x, y, 5.0, -1.0, form=form) for x, y in ((a, b), (a[order], b[order])))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(other.item(), rel=1e-12)


@pytest.mark.parametrize("tiled", [False, True])
def test_rows_of_weight_zero_and_without_positive_do_not_count(tiled: bool) -> None:
    a, b = vectors(6, 6, 4, 3)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0]).double()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[4:], mask[:, 4:] = False, False
    rows = a.clone().requires_grad_()
    loss = contrastive_loss(rows, b, 5.0, targets=Targets(mask=mask), weights=weights, tiled=tiled)
    loss.backward()
    assert loss.item() == pytest.approx(contrastive_loss(a[:4], b[:4], 5.0).item(), rel=1e-12)
    assert rows.grad is not None and torch.isfinite(rows.grad).all() and not rows.grad[4:].any()


@pytest.mark.parametrize("tiled", [False, True])
def test_without_any_positive_the_softmax_loss_is_zero_with_zero_gradient(tiled: bool) -> None:
    a, b = vectors(4, 4, 3, 0)
    rows = a.clone().requires_grad_()
    loss = contrastive_loss(rows, b, 5.0, targets=Targets(torch.zeros(4, 4)), tiled=tiled)
    loss.backward()
    assert loss.item() == 0 and rows.grad is not None and not rows.grad.any()


def test_half_precision_features_are_compared_in_fp32() -> None:
    a, b = vectors(64, 64, 16, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(a.bfloat16(), b.bfloat16(), 50.0)
    expected = contrastive_loss(a.bfloat16().float(), b.bfloat16().float(), 50.0)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_wrong_shapes_and_options_are_named() -> None:
    a, b = vectors(4, 5, 3, 0)
    with pytest.raises(ShapeError, match="4 rows and 5 columns"):
        contrastive_loss(a, b, 1.0)
    with pytest.raises(ShapeError, match=r"\(4, 3\).*\(5, 2\)"):
        contrastive_loss(a, b[:, :2], 1.0)
    with pytest.raises(ConfigError, match="hinge"):
        contrastive_loss(a, a, 1.0, form="hinge")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"1\.5"):
        contrastive_loss(a, a, 1.0, targets=Targets(smoothing=1.5))
    with pytest.raises(ShapeError, match=r"\(4, 4\)"):
        contrastive_loss(a, b, 1.0, targets=Targets(torch.ones(4, 4)))
