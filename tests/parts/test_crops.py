"""Crops with masks: what a pixel shows and what its label says stay together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clipworks.errors import ConfigError, ShapeError
from clipworks.parts.crops import MaskedCrop, recolored


def labeled(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat areas of 12 x 12 pixels whose gray is 20 times their label, 1 to 12."""
    places = torch.arange(height)[:, None] // 12 * 3 + torch.arange(width) // 12
    mask = 1 + places % 12
    return (20 * mask).byte().expand(3, height, width).contiguous(), mask


@given(
    # Enlarged by more than four, a pixel would mix with one that lies further than the two looked at below.
    *(st.integers(24, 70), st.integers(24, 70)),
    *(st.sampled_from([8, 32, 48]), st.integers(0, 5), st.booleans()),
)
def test_a_label_stays_with_its_pixel(height: int, width: int, size: int, view: int, flip: bool) -> None:
    pixels, mask = labeled(height, width)
    found, labels = MaskedCrop(size, flip=flip)(pixels, mask, seed=3, index=1, view=view)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.uint8
    assert labels.shape == (size, size)
    filled = labels != 255
    assert set(labels[filled].tolist()) <= set(mask.flatten().tolist())
    assert (found[:, ~filled] == 0).all()
    # Away from borders of areas, where bilinear pixels mix, the gray is exactly its label's.
    inner = torch.ones_like(filled)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            inner &= labels.roll(step, axis) == labels
    inner[[0, 1, -2, -1]] = inner[:, [0, 1, -2, -1]] = False
    difference = (found[0].int() - 20 * labels)[inner & filled].abs()
    # A downscaled pixel's filter is wider than two pixels of what comes out only at its rim.
    assert not len(difference) or int(difference.max()) <= 1


def test_the_same_numbers_give_the_same_view_and_others_another(untouched_rng: None) -> None:
    pixels, mask = labeled(60, 50)
    crop = MaskedCrop(32)
    views = [
        crop(pixels, mask, seed=seed, index=index, view=view) for seed, index, view in np.ndindex(2, 2, 2)
    ]
    again = crop(pixels, mask, seed=1, index=0, view=1)
    assert torch.equal(again[0], views[5][0])
    assert torch.equal(again[1], views[5][1])
    for i, (first, _) in enumerate(views):
        assert not any(torch.equal(first, other) for other, _ in views[:i])


def test_without_scale_and_flip_the_crop_is_a_slice_of_the_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 40, 40), generator=generator, dtype=torch.uint8)
    mask = torch.arange(1600).reshape(40, 40)
    whole = MaskedCrop(40, scale=(1, 1), flip=False, ignore=-1)(pixels, mask, seed=0, index=0)
    assert torch.equal(whole[0], pixels)
    assert torch.equal(whole[1], mask)
    mirrored = [MaskedCrop(40, scale=(1, 1), ignore=-1)(pixels, mask, seed=0, index=i) for i in range(8)]
    assert {torch.equal(found, pixels.flip(2)) for found, _ in mirrored} == {True, False}
    assert all(torch.equal(labels, mask) or torch.equal(labels, mask.flip(1)) for _, labels in mirrored)


def test_a_small_picture_is_black_and_without_class_where_it_ends() -> None:
    pixels, mask = torch.full((3, 10, 20), 200, dtype=torch.uint8), torch.zeros(10, 20, dtype=torch.long)
    found, labels = MaskedCrop(32, short=16, scale=(1, 1), flip=False)(pixels, mask, seed=0, index=0)
    assert (found[:, :16] == 200).all()
    assert (labels[:16] == 0).all()
    assert (found[:, 16:] == 0).all()
    assert (labels[16:] == 255).all()


def test_one_class_does_not_fill_a_crop_where_another_place_is_mixed() -> None:
    pixels, mask = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.long)
    mask[:, 44:] = 1
    mask[:20] = 255  # pixels without a class do not count
    crop = {"size": 24, "short": 64, "scale": (1.0, 1.0), "flip": False}

    def shares(largest: float | None) -> list[float]:
        found = [
            MaskedCrop(**crop, largest_share=largest)(pixels, mask, seed=0, index=i)[1] for i in range(40)
        ]
        return [float((one == 0).sum() / (one != 255).sum().clamp(min=1)) for one in found]

    assert sum(share in (0.0, 1.0) for share in shares(None)) > 10
    assert sum(0.25 <= share <= 0.75 for share in shares(0.75)) > 35


def test_recoloring_is_repeatable_varied_and_leaves_some_as_they_are(untouched_rng: None) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 24, 24), generator=generator, dtype=torch.uint8)
    views = [recolored(pixels, seed=0, index=0, view=view) for view in range(40)]
    assert all(view.shape == pixels.shape and view.dtype == torch.uint8 for view in views)
    assert torch.equal(views[7], recolored(pixels, seed=0, index=0, view=7))
    changes = [float((view.float() - pixels.float()).abs().mean()) for view in views]
    assert min(changes) < 4  # nothing happened, but for the way through HSV
    assert max(changes) > 25
    gray = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    for view in range(10):  # saturation and hue leave gray gray
        found = recolored(gray, seed=0, index=0, view=view).int()
        assert int((found - found[:1]).abs().max()) <= 1


def test_what_cannot_be_cut_is_refused() -> None:
    pixels, mask = labeled(20, 20)
    with pytest.raises(ShapeError, match=r"\(20, 19\)"):
        MaskedCrop(8)(pixels, mask[:, :19], seed=0, index=0)
    with pytest.raises(ShapeError, match="float32"):
        MaskedCrop(8)(pixels.float(), mask, seed=0, index=0)
    for wrong in ({"size": 0}, {"size": 8, "scale": (2.0, 1.0)}, {"size": 8, "largest_share": 0.0}):
        with pytest.raises(ConfigError):
            MaskedCrop(**wrong)
