from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipworks.data.augment import RandomView, resample
from clipworks.data.batch import Batch
from clipworks.errors import ConfigError, ShapeError


def pictures(count: int, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_a_view_is_what_pillow_cuts_out() -> None:
    images = pictures(12)
    view = RandomView(10)
    keys = [f"k{row}" for row in range(12)]
    boxes, flips = view.boxes(keys, 3, 24, 32)
    made = view(images, keys, 3)
    assert made.dtype == torch.float32
    for row in range(12):
        picture = Image.fromarray(images[row].permute(1, 2, 0).numpy())
        cut = picture.resize((10, 10), Image.Resampling.BILINEAR, box=tuple(boxes[row].tolist()))
        expected = np.asarray(cut).transpose(2, 0, 1) / 255
        if flips[row]:
            expected = expected[:, :, ::-1]
        # Pillow rounds to bytes after each of its two passes.
        np.testing.assert_allclose(made[row].numpy(), expected, atol=1.6 / 255)


def test_views_can_be_made_again_one_by_one_and_in_any_company() -> None:
    images, keys = pictures(7), list("abcdefg")
    view = RandomView(9)
    together = view(images, keys, torch.arange(7))
    for row in (6, 2):
        torch.testing.assert_close(view(images[row : row + 1], keys[row : row + 1], row)[0], together[row])
    assert not torch.equal(view(images, keys, 0), view(images, keys, 1))
    assert not torch.equal(view(images, keys, 0), RandomView(9, seed=1)(images, keys, 0))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1), st.floats(0.2, 5))
def test_boxes_stay_inside_and_keep_their_share(height: int, width: int, least: float, ratio: float) -> None:
    view = RandomView(4, crop=(least, 1), ratio=(min(ratio, 1 / ratio), max(ratio, 1 / ratio)))
    boxes, _ = view.boxes([str(row) for row in range(50)], 0, height, width)
    left, top, right, bottom = boxes.double().T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= width * (1 + 1e-6)).all() and (bottom <= height * (1 + 1e-6)).all()
    share = (right - left) * (bottom - top) / (height * width)
    assert share.min() > least * 0.999 and share.max() < 1.001


def test_half_of_the_views_are_mirrored_and_crops_spread_over_their_range() -> None:
    boxes, flips = RandomView(8, crop=(0.25, 0.75)).boxes([str(row) for row in range(4000)], 1, 64, 64)
    assert abs(flips.float().mean() - 0.5) < 0.04
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 4096
    assert abs(share.mean() - 0.5) < 0.01
    assert not RandomView(8, flip=False).boxes(["a", "b", "c", "d"], 0, 8, 8)[1].any()


def test_the_whole_picture_at_its_size_is_the_picture() -> None:
    images = pictures(5, 16, 16)
    box = torch.tensor([[0.0, 0, 16, 16]]).expand(5, -1)
    flips = torch.tensor([False, True, False, False, True])
    made = resample(images, box, flips, 16)
    expected = torch.where(flips[:, None, None, None], images.flip(3), images) / 255
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(resample(images / 255, box, flips, 16), expected)


def test_gradients_reach_the_pixels() -> None:
    images = (pictures(3) / 255).requires_grad_()
    RandomView(6)(images, list("abc")).sum().backward()
    assert images.grad is not None
    # Every output is an average of inputs, so what arrives adds up to the number of outputs.
    torch.testing.assert_close(images.grad.sum(), torch.tensor(3.0 * 3 * 36), rtol=1e-4, atol=1e-2)


def test_a_batch_uses_its_view_numbers() -> None:
    view, images = RandomView(5), pictures(2)
    batch = Batch(images=images, keys=["a", "b"], features={"view": torch.tensor([4, 0])})
    made = view.of(batch)
    assert made.images is not None
    torch.testing.assert_close(made.images[0], view(images[:1], ["a"], 4)[0])
    torch.testing.assert_close(made.images[1], view(images[1:], ["b"], 0)[0])
    assert batch.images is images


def test_views_of_a_batch_cost_little() -> None:
    images, keys, view = pictures(240, 64, 64), [f"k{row}" for row in range(240)], RandomView(48)
    seconds = []
    for number in range(6):
        began = time.thread_time()
        view(images, keys, number)
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 0.2  # about 0.012 on an idle core


@pytest.mark.parametrize("options", [{"size": 0}, {"crop": (0, 1)}, {"crop": (0.5, 0.2)}, {"ratio": (2, 1)}])
def test_impossible_ranges_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RandomView(**{"size": 4, **options})  # type: ignore[arg-type]


def test_a_key_a_picture_is_asked_for() -> None:
    with pytest.raises(ShapeError, match="2 keys"):
        RandomView(4)(pictures(3), ["a", "b"])
