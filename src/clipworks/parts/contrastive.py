"""The contrastive loss, once for all papers: softmax (InfoNCE) and sigmoid form.

Logits are `l = scale * rows columnsᵀ + bias` with targets t (N, M) >= 0, by default the identity.

softmax   Each row's cross-entropy against its targets, normalized to sum 1, over all columns; the same
          for each column over all rows; mean of both directions (Radford et al., ICML 2021).
sigmoid   Sum over all pairs of the binary cross-entropy of l against t in [0, 1], divided by the number
          of rows (Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023).

`contrastive_loss` chooses between the plain form, which holds all N M logits, and the tiled one, whose
memory grows with N + M. Both are sums over pairs with coefficients that depend on the row and on the column
(`_Coefficients`); the tiled form walks over tiles of pairs, and because a loss is a scalar it computes the
gradient in the same walk and only scales it in the backward pass. The softmax form needs two walks, one for
the normalizers; what fits into `KEPT_BYTES` is not computed again in the second one. The file is long because
both forms stand in it beside the coefficients that they share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clipworks.errors import ConfigError, ShapeError

Form = Literal["softmax", "sigmoid"]
PLAIN_PAIRS = 1 << 20  # up to here the plain form is the faster one
TILE = (512, 2048)  # rows and columns of a tile: 4 MiB in fp32, near the cache
KEPT_BYTES = 1 << 28  # logits kept between the two walks of the softmax form
# exp(-x) of these is far below the precision and far above the smallest normal number.
_SPAN = {torch.float32: 60.0, torch.float64: 600.0}
_LINEAR = {torch.float32: 30.0, torch.float64: 40.0}  # softplus(x) = x from here on, to the last digit


@dataclass(frozen=True)
class Targets:
    """What belongs together.

    Attributes:
        positives: None for pairs (i, i); a tensor (N, M) of weights >= 0 (softmax: each row and column
            is normalized to sum 1; sigmoid: probabilities), boolean for several positives; or two tensors of
            ids, (N,) and (M,), where equal ids belong together.
        mask: (N, M) bool, False where a pair is left out; None leaves out none.
        smoothing: share of the target that is spread: over all pairs of the row or column that are not
            left out (softmax), or towards 1/2 (sigmoid).
    """

    positives: Tensor | tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    smoothing: float = 0.0


def contrastive_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None = None,
    *,
    form: Form = "softmax",
    targets: Targets | None = None,
    weights: Tensor | None = None,
    tiled: bool | None = None,
) -> Tensor:
    """The contrastive loss of N rows against M columns.

    Args:
        rows: (N, D), unit length for cosines; computed in fp32, or fp64 if given.
        columns: (M, D).
        scale: factor of the logits, 0-D; not its logarithm.
        bias: added to the logits, 0-D.
        form: `softmax` or `sigmoid`.
        targets: what belongs together; None for pairs (i, i). In the softmax form a row or column without any
            positive does not count.
        weights: (N,) >= 0, a weight for each row, and in the softmax form also for each column (then N = M).
            The softmax form is a weighted mean; the sigmoid form multiplies and still divides by N.
        tiled: True for memory linear in N + M (differentiable once), False for the plain form; None
            chooses by size.

    Returns:
        0-D, in the precision it was computed in.

    Raises:
        ShapeError: if shapes do not fit each other.
        ConfigError: for an unknown form or a smoothing outside [0, 1).
    """
    targets = targets or Targets()
    _check(rows, columns, form, targets, weights)
    dtype = torch.float64 if torch.float64 in (rows.dtype, columns.dtype) else torch.float32
    rows, columns = rows.to(dtype), columns.to(dtype)
    scale = torch.as_tensor(scale, device=rows.device).to(dtype)
    bias = None if bias is None else torch.as_tensor(bias, device=rows.device).to(dtype)
    if tiled is None:
        tiled = len(rows) * len(columns) > PLAIN_PAIRS
    with torch.autocast(rows.device.type, enabled=False):
        positives = _Positives.of(targets, len(rows), len(columns), dtype)
        if tiled:
            return _tiled(rows, columns, scale, bias, form, positives, weights)
        return _plain(rows, columns, scale, bias, form, positives, weights)


@dataclass
class _Positives:
    """Targets that can be asked for a part of all pairs."""

    shape: tuple[int, int]
    dense: Tensor | None
    ids: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    smoothing: float
    dtype: torch.dtype

    @classmethod
    def of(cls, targets: Targets, n: int, m: int, dtype: torch.dtype) -> _Positives:
        positives = targets.positives
        dense = positives if isinstance(positives, Tensor) else None
        ids = positives if isinstance(positives, tuple) else None
        return cls((n, m), dense, ids, targets.mask, targets.smoothing, dtype)

    @property
    def diagonal(self) -> bool:
        """Whether the positives are (i, i) and none of them is left out."""
        return self.dense is None and self.ids is None and self.mask is None

    def tile(self, r: slice, c: slice, device: torch.device) -> Tensor:
        """Targets of rows r and columns c, zero where a pair is left out."""
        if self.dense is not None:
            t = self.dense[r, c].to(self.dtype)
        elif self.ids is not None:
            t = (self.ids[0][r, None] == self.ids[1][None, c]).to(self.dtype)
        else:
            rows = torch.arange(r.start, r.stop, device=device)
            t = (rows[:, None] == torch.arange(c.start, c.stop, device=device)).to(self.dtype)
        return t if self.mask is None else t * self.mask[r, c]

    def kept(self, r: slice, c: slice) -> Tensor | None:
        """Which pairs of the tile take part; None if all do."""
        return None if self.mask is None else self.mask[r, c]

    def sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sums of the targets over each row (N,) and each column (M,)."""
        n, m = self.shape
        if self.diagonal:
            return (torch.ones(n, dtype=self.dtype, device=device),) * 2
        by_row = torch.zeros(n, dtype=self.dtype, device=device)
        by_column = torch.zeros(m, dtype=self.dtype, device=device)
        for r, c in _tiles(n, m):
            t = self.tile(r, c, device)
            by_row[r] += t.sum(1)
            by_column[c] += t.sum(0)
        return by_row, by_column

    def counts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of pairs that take part, of each row (N,) and each column (M,)."""
        n, m = self.shape
        if self.mask is None:
            by_row = torch.full((n,), float(m), dtype=self.dtype, device=device)
            return by_row, torch.full((m,), float(n), dtype=self.dtype, device=device)
        return self.mask.sum(1).to(self.dtype), self.mask.sum(0).to(self.dtype)


@dataclass
class _Coefficients:
    """The softmax loss as `Σ_i row_i lse_i + Σ_j column_j lse_j - Σ_ij l_ij (t_ij (x_i + y_j) + p_i + q_j)`.

    `row` and `column` are the weights of a row's and a column's cross-entropy in the total.
    """

    row: Tensor
    column: Tensor
    x: Tensor
    y: Tensor
    p: Tensor | None
    q: Tensor | None

    @classmethod
    def of(cls, positives: _Positives, weights: Tensor | None, device: torch.device) -> _Coefficients:
        sums = positives.sums(device)
        counts = positives.counts(device) if positives.smoothing else (None, None)
        parts = [_side(s, weights, n, positives.smoothing) for s, n in zip(sums, counts, strict=True)]
        (row, x, p), (column, y, q) = parts
        return cls(row, column, x, y, p, q)


def _side(
    sums: Tensor, weights: Tensor | None, counts: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For one direction: weight of each cross-entropy, factor of its targets, factor of its smoothed rest."""
    weight = (sums > 0).to(sums.dtype)
    if weights is not None:
        weight = weight * weights.to(sums.dtype)
    weight = weight / (2 * weight.sum()).clamp_min(torch.finfo(sums.dtype).tiny)
    factor = weight * (1 - smoothing) / torch.where(sums > 0, sums, 1)
    return weight, factor, None if counts is None else weight * smoothing / counts.clamp_min(1)


def _plain(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    form: Form,
    positives: _Positives,
    weights: Tensor | None,
) -> Tensor:
    logits = scale * rows @ columns.T
    if bias is not None:
        logits = logits + bias
    n, m = positives.shape
    everything = (slice(0, n), slice(0, m))
    if form == "softmax" and positives.diagonal and weights is None:  # the common case, in fused calls
        own = torch.arange(n, device=rows.device)
        smoothing = positives.smoothing
        forth = F.cross_entropy(logits, own, label_smoothing=smoothing)
        return (forth + F.cross_entropy(logits.T, own, label_smoothing=smoothing)) / 2
    t, kept = positives.tile(*everything, rows.device), positives.kept(*everything)
    if form == "sigmoid":
        t = t * (1 - positives.smoothing) + positives.smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
        losses = losses if kept is None else losses.masked_fill(~kept, 0)
        per_row = losses.sum(1)
        return (per_row if weights is None else per_row * weights.to(per_row.dtype)).sum() / n
    if kept is not None:
        logits = logits.masked_fill(~kept, torch.finfo(logits.dtype).min)
    a = _Coefficients.of(positives, weights, rows.device)
    total = logits.new_zeros(())
    for dim, factor, rest in ((1, a.x, a.p), (0, a.y, a.q)):
        log_p = logits.log_softmax(dim)
        share = t * factor.unsqueeze(dim)
        if rest is not None:
            share = share + rest.unsqueeze(dim).expand_as(t)
        # A row without any pair has weight zero; its log-probabilities are finite, so nothing becomes NaN.
        log_p = log_p if kept is None else log_p.masked_fill(~kept, 0)
        total = total - (share * log_p).sum()
    return total


# ---------------------------------------------------------------------------------------- the tiled form


def _tiled(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    form: Form,
    positives: _Positives,
    weights: Tensor | None,
) -> Tensor:
    inputs = [rows, columns, scale] + ([] if bias is None else [bias])
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _Tiled.apply(rows, columns, scale, bias, _Plan(form, positives, weights, wanted))


@dataclass
class _Plan:
    form: Form
    positives: _Positives
    weights: Tensor | None
    gradient_wanted: bool


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, plan: _Plan
    ) -> Tensor:
        walk = _Walk(rows, columns, scale, bias, plan)
        loss = walk.sigmoid() if plan.form == "sigmoid" else walk.softmax()
        if plan.gradient_wanted:
            ctx.save_for_backward(*walk.gradients())
        return loss.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = [
            gradient * upstream if needed else None for gradient, needed in zip(saved, ctx.needs_input_grad)
        ]
        return (*grads, None)


@dataclass
class _Walk:
    """One evaluation over tiles: the loss, and sums from which the gradients follow.

    With `G = dL/dl` the gradients are `scale G columns`, `scale Gᵀ rows`, `Σ rows (G columns)` and `Σ G`.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    bias: Tensor | None
    plan: _Plan
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scaled = self.rows * self.scale
        wanted = self.plan.gradient_wanted
        self.grad_rows = torch.zeros_like(self.rows if wanted else self.rows[:0])  # G columns, not yet scaled
        self.grad_columns = torch.zeros_like(self.columns if wanted else self.columns[:0])
        self.grad_bias = self.rows.new_zeros((), dtype=torch.float64)

    def gradients(self) -> tuple[Tensor, ...]:
        """Of rows, columns, scale and bias."""
        to_scale = (self.rows * self.grad_rows).sum(dtype=torch.float64).to(self.scale.dtype)
        return (
            self.grad_rows.mul_(self.scale),
            self.grad_columns.mul_(self.scale),
            to_scale,
            self.grad_bias.to(self.scale.dtype),
        )

    def buffer(self, name: str, r: slice, c: slice) -> Tensor:
        """Scratch memory of a tile, the same for all: new memory costs more than the arithmetic."""
        shape = (r.stop - r.start, c.stop - c.start)
        size = shape[0] * shape[1]
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.rows.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def logits(self, r: slice, c: slice, out: Tensor) -> Tensor:
        """Logits of a tile."""
        torch.mm(self.scaled[r], self.columns[c].T, out=out)
        return out if self.bias is None else out.add_(self.bias)

    def take(self, g: Tensor, r: slice, c: slice) -> None:
        """Add a tile of G to the sums."""
        self.grad_rows[r].addmm_(g, self.columns[c])
        self.grad_columns[c].addmm_(g.T, self.rows[r])
        if self.bias is not None:
            self.grad_bias += g.sum()

    def sigmoid(self) -> Tensor:
        """Loss of the sigmoid form: softplus(l) - t l, and G = sigmoid(l) - t."""
        n, m = self.plan.positives.shape
        weights = self.plan.weights
        positives = self.plan.positives
        factor = self.rows.new_full((n,), 1 / n) if weights is None else weights.to(self.rows.dtype) / n
        loss = self.rows.new_zeros((), dtype=torch.float64)
        for r, c in _tiles(n, m):
            logits = self.logits(r, c, self.buffer("logits", r, c))
            simple = positives.diagonal and not positives.smoothing
            kept = positives.kept(r, c)
            t = None if simple else positives.tile(r, c, logits.device)
            if t is not None and positives.smoothing:
                t = t * (1 - positives.smoothing) + positives.smoothing / 2
            losses = F.softplus(logits, threshold=_LINEAR[logits.dtype])
            if t is not None:
                losses -= t * logits
                if kept is not None:
                    losses *= kept
            per_row = losses.sum(1)
            own = _diagonal(r, c) if simple else None
            if own is not None:
                per_row[own.start - r.start : own.stop - r.start] -= _paired(logits, r, c)
            loss += (per_row * factor[r]).sum(dtype=torch.float64)
            if self.plan.gradient_wanted:
                g = logits.sigmoid_()
                if t is not None:
                    g -= t
                    if kept is not None:
                        g *= kept
                if own is not None:
                    _paired(g, r, c).sub_(1)
                self.take(g.mul_(factor[r, None]), r, c)
        return loss

    def softmax(self) -> Tensor:
        """Loss of the softmax form; two walks if a gradient is wanted."""
        n, m = self.plan.positives.shape
        positives = self.plan.positives
        a = _Coefficients.of(positives, self.plan.weights, self.rows.device)
        row_lse = self.rows.new_full((n,), -torch.inf, dtype=torch.float64)
        column_lse = self.rows.new_full((m,), -torch.inf, dtype=torch.float64)
        loss = self.rows.new_zeros((), dtype=torch.float64)
        kept_tiles: dict[tuple[int, int], Tensor] = {}
        budget = KEPT_BYTES // self.rows.element_size() if self.plan.gradient_wanted else 0
        for r, c in _tiles(n, m):
            size = (r.stop - r.start) * (c.stop - c.start)
            if budget >= size:
                budget -= size
                logits = kept_tiles[r.start, c.start] = self.logits(
                    r, c, self.rows.new_empty(r.stop - r.start, c.stop - c.start)
                )
            else:
                logits = self.logits(r, c, self.buffer("logits", r, c))
            if positives.mask is not None:
                logits.masked_fill_(~positives.mask[r, c], -torch.inf)
            by_row, by_column = _log_sums(logits, self.buffer("exp", r, c))
            row_lse[r] = torch.logaddexp(row_lse[r], by_row)
            column_lse[c] = torch.logaddexp(column_lse[c], by_column)
            loss -= self._linear(logits, a, r, c)
        # A row of weight zero may have no pair at all, and then minus infinity for its normalizer.
        loss += (a.row * row_lse).masked_fill(a.row == 0, 0).sum()
        loss += (a.column * column_lse).masked_fill(a.column == 0, 0).sum()
        if self.plan.gradient_wanted:
            for r, c in _tiles(n, m):
                if (r.start, c.start) in kept_tiles:
                    logits = kept_tiles.pop((r.start, c.start))
                else:
                    logits = self.logits(r, c, self.buffer("logits", r, c))
                    if positives.mask is not None:
                        logits.masked_fill_(~positives.mask[r, c], -torch.inf)
                self.take(self._gradient(logits, a, row_lse[r], column_lse[c], r, c), r, c)
        return loss

    def _linear(self, logits: Tensor, a: _Coefficients, r: slice, c: slice) -> Tensor:
        """`Σ l (t (x + y) + p + q)` of a tile, fp64."""
        positives = self.plan.positives
        own = _diagonal(r, c)
        if positives.diagonal:
            total = logits.new_zeros((), dtype=torch.float64)
            if own is not None:
                total = (_paired(logits, r, c).double() * (a.x[own] + a.y[own])).sum()
            if a.p is not None and a.q is not None:
                total = (
                    total + (logits.sum(1).double() * a.p[r]).sum() + (logits.sum(0).double() * a.q[c]).sum()
                )
            return total
        return (logits.masked_fill(logits == -torch.inf, 0) * self._shares(a, r, c)).sum(dtype=torch.float64)

    def _shares(self, a: _Coefficients, r: slice, c: slice) -> Tensor:
        """`t (x + y) + p + q` of a tile."""
        positives = self.plan.positives
        # Not in place: a tile may be the caller's own tensor.
        shares = positives.tile(r, c, self.rows.device) * (a.x[r, None] + a.y[None, c])
        if a.p is not None and a.q is not None:
            rest = a.p[r, None] + a.q[None, c]
            kept = positives.kept(r, c)
            shares += rest if kept is None else rest * kept
        return shares

    def _gradient(
        self, logits: Tensor, a: _Coefficients, row_lse: Tensor, column_lse: Tensor, r: slice, c: slice
    ) -> Tensor:
        """G of a tile, `row exp(l - row_lse) + column exp(l - column_lse) - shares`, over the logits."""
        dtype = logits.dtype
        used_r, used_c = a.row[r] > 0, a.column[c] > 0
        normalizers = torch.cat([row_lse[used_r], column_lse[used_c]])
        if normalizers.numel() == 0:
            return logits.zero_()
        top, low = normalizers.max(), normalizers.min()
        if top - low < _SPAN[dtype] and bool(used_r.all()) and bool(used_c.all()):
            # One exponential for both directions; it cannot overflow, for no logit exceeds its normalizer.
            u = (a.row[r].double() * (top - row_lse).exp()).to(dtype)
            v = (a.column[c].double() * (top - column_lse).exp()).to(dtype)
            factor = torch.add(u[:, None], v[None, :], out=self.buffer("exp", r, c))
            g = logits.sub_(top.to(dtype)).exp_().mul_(factor)
        else:
            by_row = (logits.double() - row_lse[:, None]).exp_().to(dtype).mul_(a.row[r, None])
            by_column = (logits.double() - column_lse[None, :]).exp_().to(dtype).mul_(a.column[None, c])
            # Where nothing counts, minus infinity less minus infinity was taken.
            by_row[~used_r], by_column[:, ~used_c] = 0, 0
            g = by_row.add_(by_column)
        if not self.plan.positives.diagonal:
            return g.sub_(self._shares(a, r, c))
        own = _diagonal(r, c)
        if own is not None:
            _paired(g, r, c).sub_(a.x[own] + a.y[own])
        if a.p is not None and a.q is not None:
            g.sub_(a.p[r, None]).sub_(a.q[None, c])
        return g


def _log_sums(logits: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp over each row (n,) and each column (m,) of a tile, fp64.

    One exponential serves both directions unless a row or column lies so far below the largest logit that it
    would vanish.
    """
    top = logits.max()
    if torch.isfinite(top):
        torch.sub(logits, top, out=scratch).exp_()
        by_row, by_column = scratch.sum(1), scratch.sum(0)
        floor = torch.exp(torch.tensor(-_SPAN[logits.dtype], dtype=torch.float64))
        if min(by_row.min(), by_column.min()) > floor:
            return by_row.double().log_().add_(top), by_column.double().log_().add_(top)
    return logits.logsumexp(1).double(), logits.logsumexp(0).double()


def _tiles(n: int, m: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, n, TILE[0]):
        for left in range(0, m, TILE[1]):
            yield slice(start, min(n, start + TILE[0])), slice(left, min(m, left + TILE[1]))


def _diagonal(r: slice, c: slice) -> slice | None:
    """The pairs (i, i) that lie in a tile."""
    start, stop = max(r.start, c.start), min(r.stop, c.stop)
    return slice(start, stop) if start < stop else None


def _paired(tile: Tensor, r: slice, c: slice) -> Tensor:
    """A view of the pairs (i, i) of a tile."""
    return tile.diagonal(r.start - c.start)


def _check(rows: Tensor, columns: Tensor, form: str, targets: Targets, weights: Tensor | None) -> None:
    if form not in ("softmax", "sigmoid"):
        raise ConfigError(f"form {form!r} is neither softmax nor sigmoid")
    if not 0 <= targets.smoothing < 1:
        raise ConfigError(f"smoothing must lie in [0, 1), not {targets.smoothing}")
    if rows.dim() != 2 or columns.dim() != 2 or rows.shape[1] != columns.shape[1]:
        raise ShapeError(
            f"rows {tuple(rows.shape)} and columns {tuple(columns.shape)} must be (N, D) and (M, D)"
        )
    n, m = len(rows), len(columns)
    if not n or not m:
        raise ShapeError(f"a contrastive loss of {n} rows and {m} columns has nothing to compare")
    positives = targets.positives
    if positives is None and n != m:
        raise ShapeError(
            f"without positives, row i belongs to column i; {n} rows and {m} columns do not pair"
        )
    if isinstance(positives, Tensor) and positives.shape != (n, m):
        raise ShapeError(f"positives {tuple(positives.shape)} must be ({n}, {m})")
    if isinstance(positives, tuple) and [len(ids) for ids in positives] != [n, m]:
        raise ShapeError(f"ids of {[len(ids) for ids in positives]} must be of {n} rows and {m} columns")
    if targets.mask is not None and (targets.mask.shape != (n, m) or targets.mask.dtype != torch.bool):
        raise ShapeError(f"mask {tuple(targets.mask.shape)} {targets.mask.dtype} must be ({n}, {m}) bool")
    if weights is not None and (weights.shape != (n,) or (form == "softmax" and n != m)):
        raise ShapeError(
            f"weights {tuple(weights.shape)} must be ({n},), and the softmax form needs N = M for them"
        )
