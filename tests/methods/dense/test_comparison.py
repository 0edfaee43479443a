"""Segmenters are compared with answers that need none, once each, on the pixels that count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipworks.cli import app
from clipworks.core.clip import Clip
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.captions import ClassTexts
from clipworks.data.masked import Masked
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods import dense
from clipworks.methods.dense import comparison
from clipworks.methods.dense.maskclip import MaskCLIP

NAMES = ("sky", "road", "car")
QUICK = {"maskclip": {"templates": ("a {}",)}}


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer()).eval()


def part(count: int, seed: int) -> Masked:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (24, 36, 3), dtype=np.uint8) for _ in range(count)]
    masks = []
    for _ in range(count):
        mask = np.ones((24, 36), np.uint8)
        mask[:8], mask[-4:, :5] = 0, 9  # 9 does not count; no car anywhere
        masks.append(mask)
    keys = [f"frame {seed} {i}" for i in range(count)]
    return Masked(keys, images, masks, ClassTexts(list(NAMES)), 9)


def compared(clip: Clip, folder: Path, methods: tuple[str, ...] = ("maskclip",), **more: Any) -> Any:
    return comparison.compare(clip, part(3, 0), part(4, 1), methods, folder, settings=QUICK, **more)


def test_trivial_answers_have_the_iou_that_counting_gives(clip: Any, tmp_path: Path) -> None:
    largest, whole, maskclip = compared(clip, tmp_path)
    sky, road = 8 * 36, 16 * 36 - 4 * 5
    assert largest["method"] == "largest class"
    assert largest["per_class"] == {"sky": 0, "road": pytest.approx(road / (sky + road)), "car": None}
    assert largest["mean_iou"] == pytest.approx(road / (sky + road) / 2)
    assert largest["pixel_accuracy"] == pytest.approx(road / (sky + road))
    # The whole picture's label is the zero-shot one.
    test = part(4, 1)
    labels = comparison._image_level(clip, test, test.classes or ClassTexts([]))
    from clipworks.data.templates import IMAGENET_TEMPLATES

    expected = clip.classify(test.images, list(NAMES), IMAGENET_TEMPLATES).probabilities.argmax(dim=1)
    assert labels == expected.tolist()
    assert whole["pixel_accuracy"] == pytest.approx(
        sum({0: sky, 1: road}.get(label, 0) for label in labels) / (4 * (sky + road))
    )
    assert 0 <= maskclip["mean_iou"] <= 1


def test_a_methods_iou_is_that_of_its_maps_over_pixels_that_count(clip: Any, tmp_path: Path) -> None:
    run = compared(clip, tmp_path)[-1]
    test, segmenter = part(4, 1), MaskCLIP(clip, templates=("a {}",))
    found = torch.stack([segmenter.segment(image, NAMES).map for image in test.images]).long().numpy()
    truth = np.stack(test.masks)
    counted = truth != 9
    for label, name in enumerate(NAMES):
        one, two = (found == label) & counted, (truth == label) & counted
        if (one | two).any():
            assert run["per_class"][name] == pytest.approx((one & two).sum() / (one | two).sum())
    assert run["pixel_accuracy"] == pytest.approx((found == truth)[counted].mean())


def test_what_is_there_is_not_computed_again(clip: Any, tmp_path: Path) -> None:
    first = compared(clip, tmp_path, overlays=2)
    assert len(list((tmp_path / "overlays").iterdir())) == 2
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"method": "cut o')  # interrupted while it wrote
    with mock.patch.object(comparison, "_measure", side_effect=AssertionError("again")):
        assert compared(clip, tmp_path, overlays=2) == first
        with pytest.raises(AssertionError, match="again"):
            compared(clip, tmp_path, seed=1)
    assert compared(clip, tmp_path, seed=1)[0]["mean_iou"] == first[0]["mean_iou"]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 7


def test_an_overlay_stands_beside_the_truth(clip: Any) -> None:
    test = part(1, 1)
    found = MaskCLIP(clip, templates=("a {}",)).segment(test.images[0], NAMES)
    shown = np.asarray(comparison.beside(test.images[0], found, test.masks[0].astype(np.int64), 9))
    right = np.asarray(found.overlay(test.images[0]))
    assert np.array_equal(shown[: right.shape[0], 40 : 40 + right.shape[1]], right)
    sky = 0.45 * test.images[0][0, 0] + 0.55 * found.palette[0]
    unknown = 0.45 * test.images[0][23, 0] + 0.55 * 128
    assert np.abs(shown[0, 0] - sky).max() <= 1
    assert np.abs(shown[23, 0] - unknown).max() <= 1


def test_methods_are_found_by_name_and_by_what_they_saved(clip: Any, tmp_path: Path) -> None:
    found = dense.methods()
    assert found["maskclip"] is MaskCLIP
    assert all(
        name.replace("-", "_") == method.__module__.rsplit(".", 1)[-1] for name, method in found.items()
    )
    loaded = dense.load(MaskCLIP(clip, residual=False).save(tmp_path / "run"), clip)
    assert isinstance(loaded, MaskCLIP)
    assert not loaded.residual
    with pytest.raises(ConfigError, match="no method 'maskclop'; did you mean maskclip"):
        dense.method_named("maskclop")
    about = tmp_path / "run" / "estimator.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "method": "CoOp"}))
    with pytest.raises(CheckpointError, match="'CoOp', which is no method for places"):
        dense.load(tmp_path / "run", clip)


def test_what_cannot_be_compared_is_refused(clip: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fusioner', which is not compared"):
        comparison.compare(clip, part(1, 0), part(1, 1), ["maskclip"], tmp_path, settings={"fusioner": {}})
    with pytest.raises(ConfigError, match="anomalyclip does not segment"):
        compared(clip, tmp_path, ("anomalyclip",))
    nameless = Masked(["a"], part(1, 0).images, part(1, 0).masks, None, None)
    with pytest.raises(DataError, match="names of the classes"):
        comparison.compare(clip, nameless, nameless, [], tmp_path)


def test_the_command_compares_a_folder_of_shards_or_pictures(tmp_path: Path, tiny_clip: Any) -> None:
    model = tiny_clip(tokenizer=ClipTokenizer()).save(tmp_path / "model")
    for name, seed in (("train", 0), ("test", 1)):
        for kind in ("images", "masks"):
            (tmp_path / "set" / kind / name).mkdir(parents=True)
        own = part(3, seed)
        for key, image, mask in zip(own.keys, own.images, own.masks, strict=True):
            Image.fromarray(image).save(tmp_path / "set/images" / name / f"{key}.png")
            Image.fromarray(mask).save(tmp_path / "set/masks" / name / f"{key}.png")
    classes = {"classes": [{"index": i, "name": name} for i, name in enumerate(NAMES)], "ignore": 9}
    (tmp_path / "set" / "classes.json").write_text(json.dumps(classes))
    words = ["bench", "dense", "--methods", "maskclip", "--data", tmp_path / "set", "--model", model]
    words += ["--out", tmp_path / "out", "--overlays", "1", "--pictures", "2", "--set", "maskclip.size=32"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "largest class" in done.stdout
    assert "sky" in done.stdout
    runs = json.loads(CliRunner().invoke(app, [str(word) for word in [*words, "--json"]]).stdout)
    assert [run["method"] for run in runs] == ["largest class", "image-level label", "maskclip"]
    assert {run["pictures"] for run in runs} == {2}
    assert runs[-1]["settings"] == {"size": 32}
    for name in ("comparison.json", "comparison.png", "overlays/00000-maskclip.png"):
        assert (tmp_path / "out" / name).is_file()
    for bad, said in (
        (["--methods", "maskclop"], "maskclip"),
        (["--data", "nowhere"], "no such folder"),
        (["--set", "maskclip"], "METHOD.NAME=VALUE"),
        (["--set", "maskclip.sise=3"], "size"),
    ):
        done = CliRunner().invoke(app, [str(word) for word in [*words, *bad]])
        assert done.exit_code == 2
        assert said in done.stderr
