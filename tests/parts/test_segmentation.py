"""A segmentation says at every pixel what its scores say, and its pictures show that."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipworks.errors import ConfigError, DataError, ShapeError
from clipworks.parts import segmentation
from clipworks.parts.segmentation import UNKNOWN, UNKNOWN_COLOR, Segmentation, palette, read_mask

NAMES = ("sky", "road", "tree")


def of(coarse: Tensor, size: tuple[int, int], **more: object) -> Segmentation:
    cells = (coarse.shape[1], coarse.shape[2])
    return Segmentation.of(NAMES[: len(coarse)], coarse, cells, size, **more)  # type: ignore[arg-type]


def drawn(h: int = 5, w: int = 7, labels: int = 3) -> Tensor:
    return torch.rand(labels, h, w, generator=torch.Generator().manual_seed(0)).softmax(dim=0)


@pytest.mark.parametrize("at_once", [1, 3 * 61 * 7, 1 << 24])
def test_the_map_is_the_label_with_the_best_stretched_score(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "AT_ONCE", at_once)  # bands of one row, of seven, one of all
    found = of(drawn(), (44, 61))
    assert torch.equal(found.map.long(), found.scores.argmax(dim=0))
    assert found.map.dtype == torch.int16
    assert torch.equal(torch.cat([scores for _, scores in found.bands()], dim=1), found.scores)


def test_pixels_below_the_limit_are_unknown_and_no_others() -> None:
    sure = of(drawn(), (60, 80))
    best = sure.scores.amax(dim=0)
    limit = float(best.median())
    found = of(drawn(), (60, 80), unknown_below=limit)
    assert torch.equal(found.map, torch.where(best < limit, -1, sure.map.long()).to(torch.int16))
    assert "unknown" in found.shares()
    assert "unknown" not in sure.shares()


def test_shares_are_counts_and_sum_to_one() -> None:
    for limit in (None, 0.36):
        found = of(drawn(), (33, 47), unknown_below=limit)
        shares = found.shares()
        assert abs(sum(shares.values()) - 1) < 1e-12
        for place, name in enumerate(NAMES):
            assert shares[name] == int((found.map == place).sum()) / (33 * 47)


def test_colors_are_different_and_the_background_is_black() -> None:
    colors = palette(40).astype(int)
    apart = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 999 * np.eye(40, dtype=int)
    assert apart.min() > 10
    found = of(drawn(), (8, 8), background=1)
    assert found.palette[1].tolist() == [0, 0, 0]
    assert np.array_equal(found.palette[[0, 2]], palette(3)[[0, 2]])


def test_an_overlay_is_the_mean_of_picture_and_colors() -> None:
    image = np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8)
    found = of(drawn(), (21, 30), unknown_below=0.4, background=2)
    colors = np.concatenate([found.palette, [UNKNOWN_COLOR]])  # -1 is the last
    above = colors[found.map.numpy()].astype(float)
    for opacity in (0.0, 0.3, 1.0):
        shown = np.asarray(found.overlay(image, opacity, legend=False)).astype(float)
        assert np.abs(shown - ((1 - opacity) * image + opacity * above)).max() <= 1


def test_a_legend_stands_beside_the_picture_and_names_what_occurs_by_its_color() -> None:
    coarse = torch.zeros(3, 4, 4)
    coarse[0], coarse[2, :, 2:] = 0.5, 1.0  # the road is nowhere
    found = of(coarse, (200, 160))
    image = np.full((200, 160, 3), 90, np.uint8)
    plain, told = found.overlay(image, legend=False), found.overlay(image)
    assert np.array_equal(np.asarray(told)[:200, :160], np.asarray(plain))
    beside = np.asarray(told)[:, 160:].reshape(-1, 3)
    there = {tuple(color) for color in np.unique(beside, axis=0).tolist()}
    sky, road, tree = (tuple(color) for color in found.palette.tolist())
    assert {sky, tree} <= there
    assert road not in there
    assert (255, 255, 255) in there


def test_a_legend_fits_beside_a_picture_of_one_pixel() -> None:
    found = of(drawn(1, 1), (1, 1))
    assert found.overlay(np.zeros((1, 1, 3), np.uint8)).height > 1


def test_a_saved_map_is_read_back_with_its_colors(tmp_path: Path) -> None:
    found = of(drawn(), (19, 23), unknown_below=0.4)
    path = found.save(tmp_path / "map.png")
    with Image.open(path) as image:
        assert image.mode == "P"
        colors = np.array(image.getpalette()).reshape(-1, 3)
        assert np.array_equal(colors[:3], found.palette)
        assert tuple(colors[255]) == UNKNOWN_COLOR
    expected = torch.where(found.map == UNKNOWN, 255, found.map.long()).numpy()
    assert np.array_equal(read_mask(path, (19, 23)), expected)
    about = json.loads((tmp_path / "map.json").read_text())
    assert about == {"labels": list(NAMES), "shares": found.shares(), "unknown": 255}


def test_masks_are_read_from_everything_that_holds_one_number_a_pixel(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    gray = Image.fromarray(values)
    gray.save(tmp_path / "gray.png")
    stream = io.BytesIO()
    gray.save(stream, "PNG")
    sixteen = Image.fromarray(values.astype(np.uint16) * 300)
    sixteen.save(tmp_path / "sixteen.png")
    for mask in (values, torch.from_numpy(values), values[None], values[..., None], gray, stream.getvalue()):
        assert np.array_equal(read_mask(mask, (3, 4)), values)
    assert np.array_equal(read_mask(tmp_path / "gray.png"), values)
    assert np.array_equal(read_mask(tmp_path / "sixteen.png"), values.astype(int) * 300)
    assert read_mask(values > 3).dtype == np.int64


def test_what_is_no_mask_or_picture_of_that_size_is_refused(tmp_path: Path) -> None:
    found = of(drawn(), (8, 9))
    with pytest.raises(ShapeError, match="the picture is 9x8, its segmentation"):
        found.overlay(np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"opacity must be from 0 to 1, not 1\.5"):
        found.overlay(np.zeros((8, 9, 3), np.uint8), 1.5)
    many = Segmentation(tuple(f"label {i}" for i in range(256)), found.map, found.coarse, found.cells)
    with pytest.raises(ConfigError, match="255 labels, not 256"):
        many.picture()
    with pytest.raises(DataError, match="a mask of 8x9 for a picture of 9x8"):
        read_mask(np.zeros((8, 9), np.uint8), (9, 8))
    with pytest.raises(DataError, match="not a picture of mode RGB"):
        read_mask(Image.new("RGB", (3, 3)))
    with pytest.raises(DataError, match="whole numbers, not float"):
        read_mask(np.zeros((3, 3)))
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(DataError, match=r"not a mask: .*mask\.png"):
        read_mask(tmp_path / "mask.png")


def test_without_scores_the_map_and_its_shares_stay() -> None:
    found = of(drawn(), (8, 9))
    light = found.without_scores()
    assert torch.equal(light.map, found.map)
    assert light.shares() == found.shares()
    assert light.coarse.numel() == 0


def test_an_overlay_takes_what_is_a_picture(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))
    image.save(tmp_path / "photo.png")
    found = of(drawn(), (8, 9))
    shown = [found.overlay(one) for one in (image, tmp_path / "photo.png", np.asarray(image))]
    assert all(np.array_equal(np.asarray(one), np.asarray(shown[0])) for one in shown)
