"""How good label maps and maps of defects are: mean IoU, AUROC, overlap of regions, boundaries.

Counting and ranking are torchmetrics', connected regions scipy's. Everything is computed in fp64 or on whole
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clipworks.errors import DataError, ShapeError, require


@dataclass(frozen=True)
class MeanIoU:
    """Intersection over union: `mean` over classes that occur, and `per_class` (K,), NaN for others."""

    mean: float
    per_class: NDArray[np.float64]


def confusion(found: Tensor, truth: Any, classes: int, ignore: int | None = 255) -> Tensor:
    """How often a pixel of one class (rows) was given each class (columns), (K, K) int64.

    Args:
        found: (..., H, W) whole numbers below K; -1 is an answer that is no class, and always wrong: it
            counts in an extra last column, so the result is (K, K + 1).
        truth: the same shape.
        classes: K.
        ignore: pixels of this truth do not count.

    Raises:
        ShapeError: if the shapes differ.
        DataError: for a truth that is no class.
    """
    metrics = require("torchmetrics.functional.classification", extra="dense", purpose="mean IoU")
    truth = torch.as_tensor(np.asarray(truth))
    if found.shape != truth.shape:
        raise ShapeError(f"a label map {tuple(found.shape)} cannot be compared with {tuple(truth.shape)}")
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore is None else truth != ignore
    answers, truths = found[counted].long(), truth[counted].long()
    if len(truths) and not 0 <= int(truths.min()) <= int(truths.max()) < classes:
        raise DataError(
            f"labels run from {int(truths.min())} to {int(truths.max())}, not from 0 to {classes - 1}"
        )
    answers = torch.where(answers < 0, classes, answers)
    if not len(truths):
        return torch.zeros(classes, classes + 1, dtype=torch.int64)
    counts: Tensor = metrics.multiclass_confusion_matrix(answers, truths, num_classes=classes + 1)
    return counts[:classes]


def mean_iou(counts: Tensor) -> MeanIoU:
    """Of the `confusion` (K, K + 1) of a test set; classes that were neither there nor found are left out.

    Raises:
        DataError: if nothing was counted.
    """
    classes = len(counts)
    hits = counts.diagonal().double()
    union = counts.sum(dim=1) + counts[:, :classes].sum(dim=0) - hits
    if not float(union.sum()):
        raise DataError("no pixel was compared")
    per_class = torch.where(union > 0, hits / union, torch.nan).numpy()
    return MeanIoU(float(np.nanmean(per_class)), per_class)


def image_auroc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve of scores (n,) for labels (n,), 1 for unusual.

    Raises:
        DataError: if all labels are equal.
    """
    metrics = require("torchmetrics.functional.classification", extra="dense", purpose="AUROC")
    return float(metrics.binary_auroc(*_ranked(scores, labels)))


def pixel_auroc(maps: Sequence[Any], masks: Sequence[Any]) -> float:
    """Area under the ROC curve over all pixels of maps (H, W), each with its mask, above zero for defects.

    Raises:
        ShapeError: if a map and its mask differ in size.
        DataError: if there are no defects, or nothing else.
    """
    return image_auroc(*_pixels(maps, masks))


def average_precision(scores: Any, labels: Any) -> float:
    """Average precision of scores (n,) for labels (n,), 1 for unusual.

    Raises:
        DataError: if all labels are equal.
    """
    metrics = require("torchmetrics.functional.classification", extra="dense", purpose="average precision")
    return float(metrics.binary_average_precision(*_ranked(scores, labels)))


def per_region_overlap(
    maps: Sequence[Any],
    masks: Sequence[Any],
    limit: float = 0.3,
    *,
    thresholds: int = 200,
    stretched: bool = False,
) -> float:
    """PRO: the mean overlap with defect regions, averaged over false-positive rates from 0 to `limit`.

    Bergmann et al., CVPR 2020. A region is 8-connected; at a threshold its overlap is the share of it that
    lies above. The curve of the mean overlap over all regions against the share of faultless pixels that
    lie above is cut at `limit`, with a point interpolated there.

    Args:
        maps: n of (H, W), more is more unusual.
        masks: n of (H, W), above zero where the defect is.
        limit: the largest false-positive rate.
        thresholds: how many, evenly between the smallest and the largest value of all maps.
        stretched: stretch the rates below the limit from their own range to 0 … 1 instead of dividing by
            `limit`, as AnomalyCLIP's code does.

    Raises:
        ShapeError, DataError: as `pixel_auroc`.
    """
    ndimage = require("scipy.ndimage", extra="dense", purpose="the overlap of regions")
    values, faulty = _pixels(maps, masks)
    steps = np.linspace(float(values.max()), float(values.min()), thresholds + 1)
    # How many pixels reach each threshold is read from sorted values, not by comparing all of them again.
    overlaps = np.zeros(len(steps))
    regions = 0
    for one, mask in zip(maps, masks, strict=True):
        numbered, count = ndimage.label(_array(mask) > 0, structure=np.ones((3, 3)))
        for region in range(1, count + 1):
            inside = np.sort(_array(one)[numbered == region].astype(np.float64))
            overlaps += 1 - np.searchsorted(inside, steps) / len(inside)
            regions += 1
    normal = np.sort(values[faulty == 0].numpy())
    rates = 1 - np.searchsorted(normal, steps) / len(normal)
    curve = overlaps / regions
    if stretched:
        below = rates < limit
        x, y = rates[below], curve[below]
        if len(x) < 2 or x[-1] == x[0]:
            return float(y.mean()) if len(y) else 0.0
        return _area(y, (x - x[0]) / (x[-1] - x[0]))
    end = float(np.interp(limit, rates, curve))
    x = np.concatenate([[0.0], rates[rates < limit], [limit]])
    y = np.concatenate([[0.0], curve[rates < limit], [end]])
    return _area(y, x) / limit


def boundary_f(found: Tensor, truth: Any, pixels: int = 2, ignore: int | None = 255) -> float:
    """How well borders between labels match: F of precision and recall within some pixels.

    Args:
        found, truth: (H, W) label maps.
        pixels: how far (in the larger of both directions) a border pixel may lie from one of the other map.
        ignore: truth that does not count; its own borders do not either.

    Returns:
        F in [0, 1]; 1 if neither map has a border.

    Raises:
        ShapeError: if the shapes differ.
    """
    truth = torch.as_tensor(np.asarray(truth))
    if found.shape != truth.shape:
        raise ShapeError(f"a label map {tuple(found.shape)} cannot be compared with {tuple(truth.shape)}")
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore is None else truth != ignore
    mine, theirs = _borders(found.long(), counted), _borders(truth.long(), counted)
    if not mine.any() and not theirs.any():
        return 1.0
    precision = float((mine & _widened(theirs, pixels)).sum()) / max(1, int(mine.sum()))
    recall = float((theirs & _widened(mine, pixels)).sum()) / max(1, int(theirs.sum()))
    return 2 * precision * recall / max(1e-12, precision + recall)


def _area(y: NDArray[np.float64], x: NDArray[np.float64]) -> float:
    return float(torch.trapezoid(torch.from_numpy(y), torch.from_numpy(x)))


def _borders(labels: Tensor, counted: Tensor) -> Tensor:
    """Pixels whose right or lower neighbor is another label, both of them counted, (H, W) bool."""
    edges = torch.zeros_like(counted)
    edges[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & counted[:, :-1] & counted[:, 1:]
    edges[:-1] |= (labels[:-1] != labels[1:]) & counted[:-1] & counted[1:]
    return edges


def _widened(edges: Tensor, pixels: int) -> Tensor:
    return F.max_pool2d(edges[None].float(), 2 * pixels + 1, stride=1, padding=pixels)[0] > 0


def _array(values: Any) -> NDArray[Any]:
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)


def _pixels(maps: Sequence[Any], masks: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """All values and whether they are of defects, (p,) each."""
    if len(maps) != len(masks) or not len(maps):
        raise ShapeError(f"{len(maps)} maps and {len(masks)} masks: there must be one mask a map")
    for one, mask in zip(maps, masks, strict=True):
        if _array(one).shape != _array(mask).shape:
            raise ShapeError(f"a map {_array(one).shape} and its mask {_array(mask).shape} differ in size")
    values = np.concatenate([_array(one).ravel() for one in maps]).astype(np.float64)
    faulty = np.concatenate([(_array(mask) > 0).ravel() for mask in masks])
    return torch.from_numpy(values), torch.from_numpy(faulty).long()


def _ranked(scores: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Ranks in place of scores: torchmetrics would squash values outside 0 … 1, and ties stay ties."""
    numbers, truth = _array(scores).astype(np.float64), torch.as_tensor(_array(labels)).long()
    if not len(truth) or int(truth.min()) == int(truth.max()):
        raise DataError("a ROC curve needs usual and unusual examples; these are all of one kind")
    distinct, ranks = np.unique(numbers, return_inverse=True)
    return torch.from_numpy(ranks / max(1, len(distinct) - 1)), truth
