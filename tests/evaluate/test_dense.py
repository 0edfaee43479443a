"""Counts and rankings equal naive loops; what is perfect scores one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from clipworks.errors import DataError, ShapeError
from clipworks.evaluate.dense import (
    average_precision,
    boundary_f,
    confusion,
    image_auroc,
    mean_iou,
    per_region_overlap,
    pixel_auroc,
)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def test_iou_is_that_of_a_loop_over_pixels_and_classes() -> None:
    truth = (drawn(0, 3, 20, 30) * 6).astype(int) - 1  # -1 stands for what does not count
    truth[truth == -1] = 255
    found = (drawn(1, 3, 20, 30) * 5).astype(int) - 1
    counts = sum(confusion(torch.from_numpy(one), two, 5) for one, two in zip(found, truth, strict=True))
    expected = []
    for label in range(5):
        hits = union = 0
        for one, two in zip(found.flatten(), truth.flatten(), strict=True):
            if two != 255:
                hits += int(one == label and two == label)
                union += int(one == label or two == label)
        expected.append(hits / union)
    measured = mean_iou(counts)
    assert np.allclose(measured.per_class, expected)
    assert np.isclose(measured.mean, np.mean(expected))


def test_a_perfect_map_has_one_and_a_class_that_never_occurs_is_left_out() -> None:
    truth = torch.tensor([[0, 0, 2], [2, 2, 0]])
    measured = mean_iou(confusion(truth, truth, 4))
    assert measured.mean == 1
    assert np.isnan(measured.per_class[[1, 3]]).all()
    wrong = mean_iou(confusion(torch.full_like(truth, 1), truth, 4))
    assert wrong.mean == 0
    assert np.isnan(wrong.per_class).tolist() == [False, False, False, True]


def test_answers_without_a_label_are_wrong_ones() -> None:
    truth = torch.zeros(2, 2, dtype=torch.long)
    found = torch.tensor([[0, 0], [0, -1]])
    assert mean_iou(confusion(found, truth, 2)).mean == 0.75


def test_rankings_are_those_of_scikit_learn_on_any_scale() -> None:
    scores = np.round(drawn(2, 400) * 40 - 20, 1)  # with ties, outside 0 … 1
    labels = (drawn(3, 400) + scores / 60 > 0.6).astype(int)
    assert np.isclose(image_auroc(scores, labels), roc_auc_score(labels, scores), atol=1e-6)
    assert np.isclose(average_precision(scores, labels), average_precision_score(labels, scores), atol=1e-6)
    maps, masks = (
        [scores[:200].reshape(10, 20), scores[200:].reshape(20, 10)],
        [
            labels[:200].reshape(10, 20),
            labels[200:].reshape(20, 10),
        ],
    )
    assert np.isclose(pixel_auroc(maps, masks), roc_auc_score(labels, scores), atol=1e-6)
    assert np.isclose(pixel_auroc([3 * one + 7 for one in maps], masks), pixel_auroc(maps, masks))


def regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected regions by flooding."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        region, border = [], [left.pop()]
        while border:
            y, x = border.pop()
            region.append((y, x))
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    border.append(near)
        found.append(region)
    return found


def test_overlap_of_regions_is_that_of_a_loop_over_thresholds_and_regions() -> None:
    maps, masks = drawn(4, 3, 12, 12), drawn(5, 3, 12, 12) > 0.8
    thresholds = np.linspace(maps.max(), maps.min(), 51)
    curve, rates = [], []
    for threshold in thresholds:
        shares = [
            np.mean([one[place] >= threshold for place in region])
            for one, mask in zip(maps, masks, strict=True)
            for region in regions(mask)
        ]
        curve.append(np.mean(shares))
        rates.append((maps[~masks] >= threshold).mean())
    x, y = [0.0], [0.0]
    for rate, share, rate_before, share_before in zip(
        rates, curve, [0.0, *rates[:-1]], [0.0, *curve[:-1]], strict=True
    ):
        if rate >= 0.3:
            part = (0.3 - rate_before) / (rate - rate_before)
            x, y = [*x, 0.3], [*y, share_before + part * (share - share_before)]
            break
        x, y = [*x, rate], [*y, share]
    area = sum((x[place + 1] - x[place]) * (y[place + 1] + y[place]) / 2 for place in range(len(x) - 1))
    assert np.isclose(per_region_overlap(maps, masks, thresholds=50), area / 0.3)


def test_overlap_of_a_perfect_map_is_one_and_of_its_inverse_nothing() -> None:
    masks = drawn(6, 2, 16, 16) > 0.7
    assert per_region_overlap(masks.astype(float), masks) == 1
    assert per_region_overlap(masks.astype(float), masks, stretched=True) == 1
    assert per_region_overlap(1.0 - masks, masks) < 0.2


def test_every_region_counts_the_same_whatever_its_size() -> None:
    mask = np.zeros((1, 20, 20), bool)
    mask[0, :10, :10], mask[0, 15, 15] = True, True
    small, large = np.zeros((1, 20, 20)), np.zeros((1, 20, 20))
    small[0, 15, 15], large[0, :10, :10] = 1, 1
    assert per_region_overlap(small, mask) == per_region_overlap(large, mask)


def test_borders_match_within_some_pixels_and_not_beyond() -> None:
    truth = torch.zeros(20, 20, dtype=torch.long)
    truth[:, 10:] = 1
    assert boundary_f(truth, truth) == 1
    assert boundary_f(torch.zeros_like(truth), torch.zeros_like(truth)) == 1
    assert boundary_f(torch.roll(truth, 2, 1)[:, 3:], truth[:, 3:], 2) == 1
    assert boundary_f(torch.roll(truth, 3, 1)[:, 4:], truth[:, 4:], 2) == 0
    ignored = truth.clone()
    ignored[:, 5:15] = 255
    assert boundary_f(torch.zeros_like(truth), ignored) == 1


def test_what_cannot_be_compared_is_refused() -> None:
    ones = torch.ones(2, 2, dtype=torch.long)
    with pytest.raises(ShapeError, match="cannot be compared"):
        confusion(ones, torch.ones(2, 3), 2)
    with pytest.raises(DataError, match="labels run from 1 to 1, not from 0 to 0"):
        confusion(ones, ones, 1)
    with pytest.raises(DataError, match="no pixel"):
        mean_iou(confusion(ones, 255 * ones, 3))
    with pytest.raises(DataError, match="all of one kind"):
        pixel_auroc([np.ones((2, 2))], [np.zeros((2, 2))])
    with pytest.raises(ShapeError, match="differ in size"):
        pixel_auroc([np.ones((2, 2))], [np.zeros((2, 3))])
