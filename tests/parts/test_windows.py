"""Windows cover a picture, and what they saw blends without a trace of where they ended."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from clipworks.errors import ConfigError
from clipworks.parts.windows import Canvas, aligned_stride, stretch, taper, window_starts


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 400), st.integers(1, 60), st.floats(0, 0.99))
def test_windows_lie_inside_overlap_as_asked_and_leave_nothing_out(
    length: int, window: int, overlap: float
) -> None:
    stride = aligned_stride(window, overlap, 1)
    starts = window_starts(length, window, stride)
    seen = np.zeros(length, int)
    for start in starts:
        assert start >= 0
        assert start + window <= max(length, window)
        seen[start : start + window] += 1
    assert seen.min() >= 1
    assert starts == sorted(set(starts))
    assert all(0 < b - a <= stride for a, b in pairwise(starts))
    assert stride <= window


def test_a_stride_is_the_largest_multiple_of_a_cell_that_keeps_the_overlap() -> None:
    for cells in range(1, 9):
        for tenths in range(10):
            expected = max(
                (step for step in range(1, cells + 1) if step * 10 <= cells * (10 - tenths)), default=1
            )
            assert aligned_stride(16 * cells, tenths / 10, 16) == 16 * expected


@pytest.mark.parametrize("blend", ["uniform", "smooth"])
def test_a_canvas_holds_the_weighted_means_of_a_loop_over_windows_and_cells(blend: str) -> None:
    canvas = Canvas(2, 9, 11, blend)  # type: ignore[arg-type]
    sums, weights = np.zeros((2, 9, 11)), np.zeros((9, 11))
    places = [(top, left) for top in window_starts(9, 4, 3) for left in window_starts(11, 6, 2)]
    for number, (top, left) in enumerate(places):
        maps = drawn(number, 2, 4, 6)
        canvas.add(top, left, maps)
        for y in range(4):
            for x in range(6):
                weight = 1.0
                if blend == "smooth":
                    weight = np.sin(np.pi * (y + 0.5) / 4) ** 2 * np.sin(np.pi * (x + 0.5) / 6) ** 2
                weights[top + y, left + x] += weight
                sums[:, top + y, left + x] += weight * maps[:, y, x].numpy()
    assert np.allclose(canvas.blended().numpy(), sums / weights, atol=1e-6)


@pytest.mark.parametrize("blend", ["uniform", "smooth"])
def test_a_canvas_of_one_window_is_the_window(blend: str) -> None:
    canvas, maps = Canvas(3, 5, 7, blend), drawn(0, 3, 5, 7)  # type: ignore[arg-type]
    canvas.add(0, 0, maps)
    assert torch.allclose(canvas.blended(), maps)


def test_smooth_windows_at_half_overlap_sum_to_one_and_never_vanish() -> None:
    for cells in (2, 8, 28):
        weights = taper(cells, "smooth")
        assert torch.allclose(weights[: cells // 2] + weights[cells // 2 :], torch.ones(cells // 2))
        assert torch.equal(weights, weights.flip(0)) or torch.allclose(weights, weights.flip(0))
    for cells in range(1, 40):
        assert 0 < float(taper(cells, "smooth").min()) <= float(taper(cells, "smooth").max()) <= 1


def test_windows_of_one_linear_map_blend_to_that_map() -> None:
    """What all windows agree on has no seam, wherever they end and however they are weighed."""
    whole = (0.01 * torch.arange(40)[:, None] + 0.02 * torch.arange(53))[None]
    for blend, overlap in (("smooth", 0.5), ("smooth", 0.25), ("uniform", 0.0), ("uniform", 0.4)):
        canvas = Canvas(1, 40, 53, blend)  # type: ignore[arg-type]
        stride = aligned_stride(12, overlap, 1)
        for top in window_starts(40, 12, stride):
            for left in window_starts(53, 12, stride):
                canvas.add(top, left, whole[:, top : top + 12, left : left + 12])
        assert torch.allclose(canvas.blended(), whole, atol=1e-5)


def test_windows_that_disagree_fade_into_each_other() -> None:
    """Two windows of different height: a step of the whole height without blending, of a fraction with it."""

    def largest_step(blend: str, overlap: float) -> float:
        canvas = Canvas(1, 16, 24, blend)  # type: ignore[arg-type]
        for number, left in enumerate(window_starts(24, 16, aligned_stride(16, overlap, 1))):
            canvas.add(0, left, torch.full((1, 16, 16), float(number)))
        return float(canvas.blended().diff(dim=2).abs().max())

    assert largest_step("uniform", 0.5) >= 0.5
    assert largest_step("smooth", 0.5) < 0.2


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16))
def test_stretching_whole_cells_is_torchs_interpolation(h: int, w: int, H: int, W: int, seed: int) -> None:
    maps = drawn(seed, 2, h, w)
    expected = F.interpolate(maps[None], (H, W), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(stretch(maps, (h, w), (H, W)), expected, atol=1e-5)


def test_stretching_leaves_padding_out() -> None:
    """Half a cell of padding: the picture's pixels are those of the padded map, cut."""
    maps = drawn(3, 2, 4, 5)
    padded = F.interpolate(maps[None], (32, 40), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(stretch(maps, (28 / 8, 37 / 8), (28, 37)), padded[:, :28, :37], atol=1e-5)


def test_rows_of_a_stretched_map_are_the_whole_ones() -> None:
    maps = drawn(4, 3, 5, 6)
    whole = stretch(maps, (4.7, 5.3), (61, 47))
    rows = [stretch(maps, (4.7, 5.3), (61, 47), slice(start, start + 9)) for start in range(0, 61, 9)]
    assert torch.equal(torch.cat(rows, dim=1), whole)


def test_what_cannot_be_is_refused() -> None:
    for overlap in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="share from 0 to below 1"):
            aligned_stride(64, overlap, 16)
    for window in (8, 40):
        with pytest.raises(ConfigError, match=f"a multiple of 16 pixels, not {window}"):
            aligned_stride(window, 0.5, 16)
    with pytest.raises(ConfigError, match="smooth or uniform, not 'sharp'"):
        taper(4, "sharp")  # type: ignore[arg-type]


# A picture of 24 million pixels in a process of its own, whose memory nothing else has touched. The tower is
# tiny, so what is measured is the way: windows, canvas, stretching, the map.
LARGE = """
import resource, sys
import numpy as np
import torch
from PIL import Image
from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.methods.dense.base import Asked, Segmenter

torch.set_num_threads(1)


class Ramp(Segmenter):
    '''Scores that rise linearly over the picture: pixels carry their own place in red and green.'''

    def _asked(self, texts, background):
        return Asked(texts, torch.zeros(len(texts), 16), background)

    def _maps(self, pixels, asked):
        self.tower(torch.nn.functional.interpolate(pixels.float() / 255, (32, 32)))
        means = torch.nn.functional.avg_pool2d(pixels.float() / 255, self.patch)
        ramp = (means[:, 0] + means[:, 1]) / 2
        return torch.stack([ramp, 1 - ramp] + [ramp * 0] * (len(asked.texts) - 2), dim=1)


blocks = uniform_blocks(depth=1, width=16, heads=1)
clip = Clip.from_config(
    Config(
        width=16,
        image=VisionConfig(image_size=224, patch_size=16, width=16, blocks=blocks),
        text=TextConfig(77, 1000, 16, blocks),
        name="tiny",
    )
)
height, width = 4000, 6000
array = np.zeros((height, width, 3), np.uint8)
array[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
array[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
image = Image.fromarray(array)
small = Ramp(clip, size="full")
small.segment(image.crop((0, 0, 500, 400)), [f"label {i}" for i in range(8)])
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = small.segment(image, [f"label {i}" for i in range(8)])
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1024
steps, truths = 0.0, 0.0
for rows, scores in found.bands():
    ramp = (array[rows, :, 0].astype(np.float32) + array[rows, :, 1]) / 510
    inside = np.s_[:, 16:-16]  # the outermost half cells have nothing to lie between
    if 0 < rows.start and rows.stop < height:
        truths = max(truths, float(np.abs(scores[0].numpy() - ramp)[inside].max()))
        steps = max(steps, float(scores[0].diff(dim=1).abs().max()), float(scores[0].diff(dim=0).abs().max()))
print(grown, truths, steps, found.size[0], found.size[1])
"""


@pytest.mark.slow
def test_a_picture_of_24_million_pixels_has_bounded_memory_and_no_seams() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    grown, off, step, height, width = (float(word) for word in done.stdout.split())
    assert (height, width) == (4000, 6000)
    assert grown < 2048
    # Bytes are steps of 1/255; half of one in two channels, and nothing more, at seams or elsewhere.
    assert off < 2 / 255
    assert step < 1 / 255
