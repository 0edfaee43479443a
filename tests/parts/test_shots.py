"""Features and pictures are told apart, weights are shares, and views take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.errors import EstimatorInputError
from clipworks.parts.shots import Shots, are_features, view_features, weights_of

GRAY = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    "table",
    [GRAY, torch.zeros(3, 4), GRAY.tolist(), [1.0, 2.0], list(GRAY), list(torch.zeros(3, 4)),
     GRAY.astype(int), GRAY.astype(object)],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_tables_are_features(table: Any) -> None:
    assert are_features(table)


@pytest.mark.parametrize(
    "pictures",
    ["a.jpg", Path("a.jpg"), ["a.jpg"], [Path("a.jpg")], np.array(["a.jpg"]), np.array([Path("a.jpg")]),
     Image.new("RGB", (4, 4)), [Image.new("RGB", (4, 4))],
     np.zeros((2, 4, 4, 3), np.uint8), [np.zeros((4, 4, 3))],
     torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4), [torch.zeros(3, 4, 4)], [b"bytes"], b"bytes", []],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_pictures_are_not(pictures: Any) -> None:
    assert not are_features(pictures)


def test_views_are_floats_on_three_axes_that_no_picture_has() -> None:
    assert view_features(np.zeros((5, 2, 16), np.float32)) is not None
    for other in (torch.zeros(5, 2, 3), torch.zeros(5, 16), np.zeros((5, 2, 16), np.uint8), [1]):
        assert view_features(other) is None


def test_weights_have_mean_one_and_keep_their_proportions() -> None:
    weights, mean = weights_of([1, 2, 3], 3)
    assert weights.tolist() == pytest.approx([0.5, 1, 1.5])
    assert mean == 2
    assert weights_of(None, 2)[0].tolist() == [1, 1]
    assert weights_of(3.0, 2)[0].tolist() == [1, 1]
    shots = Shots(torch.tensor([0, 1, 1]), weights, torch.zeros(3, 1, 2), mean_weight=mean)
    part = shots.select(torch.tensor([0, 2]))
    assert part.weights.tolist() == pytest.approx([0.5, 1.5])
    assert (part.weights * part.mean_weight).tolist() == pytest.approx([1, 3])


def test_pixels_are_no_features() -> None:
    shots = Shots(
        torch.zeros(2, dtype=torch.int64), torch.ones(2), pixels=torch.zeros(2, 3, 4, 4), keys=["a", "b"]
    )
    with pytest.raises(EstimatorInputError, match="features"):
        _ = shots.vectors


def test_views_take_turns_by_content_where_it_is_known() -> None:
    features, labels, rows = torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    named = Shots(labels, torch.ones(4), features, keys=["d", "c", "b", "a"])
    turned = named.select(torch.tensor([3, 2, 1, 0]))
    for epoch in range(6):
        assert torch.equal(named.view_numbers(rows, epoch), turned.view_numbers(rows.flip(0), epoch))
    for start in (0, 3):
        seen = torch.stack([named.view_numbers(rows, epoch) for epoch in range(start, start + 3)])
        assert (seen.sort(dim=0)[0] == torch.arange(3)[:, None]).all()
