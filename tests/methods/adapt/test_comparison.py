"""A comparison gives every method the same shots, goes on where it was, and reports what it measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from clipworks.core.clip import Clip
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Example, Examples
from clipworks.data.splits import Splits
from clipworks.errors import ConfigError, EstimatorInputError
from clipworks.evaluate.fewshot import few_shot
from clipworks.methods.adapt.comparison import RUNS, Data, _told, beside, compare, gather, summarize, write
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.nearest_mean import NearestMean
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.features import fingerprint

NAMES = ["zebra", "ant", "cow", "bee"]


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def colored(count: int, seed: int) -> tuple[list[Any], Any]:
    generator = np.random.default_rng(seed)
    y = np.arange(count) % 4
    pictures = generator.integers(0, 150, (count, 32, 32, 3), dtype=np.uint8)
    for i, label in enumerate(y):
        pictures[i, :, :, label % 3] += 50 if label < 3 else 100
    return list(pictures), y


@pytest.fixture(scope="module")
def data() -> Data:
    return Data("colors", colored(40, 0), colored(16, 1), colored(24, 2), ClassTexts(NAMES))


METHODS = ["zero-shot", "nearest-mean", "linear-probe"]


def test_every_run_is_the_plain_fit_on_the_protocols_draw(clip: Clip, data: Data, tmp_path: Path) -> None:
    runs = compare(clip, data, METHODS, [1, 4], [1, 2], tmp_path)
    assert len(runs) == 1 + 2 * 2 * 2
    found = {(run["method"], run["shots"], run["seed"]): run["accuracy"] for run in runs}
    X, y = data.train
    for shots in (1, 4):
        for seed in (1, 2):
            drawn = few_shot(y, shots, seed, data.validation[1]).train
            pictures = [X[i] for i in drawn]
            fitted = NearestMean(clip, NAMES).fit(pictures, y[drawn])
            assert found["nearest-mean", shots, seed] == pytest.approx(fitted.score(*data.test))
    assert found["zero-shot", 0, 1] == pytest.approx(ZeroShot(clip, NAMES).fit(X, y).score(*data.test))
    assert all(0 <= run["calibration_error"] <= 1 for run in runs)
    probe = next(run for run in runs if run["method"] == "linear-probe")
    assert probe["parameters"] == 4 * 16 + 4


def test_what_is_done_is_not_done_again(clip: Clip, data: Data, tmp_path: Path) -> None:
    first = compare(clip, data, METHODS, [1], [1, 2], tmp_path)
    with (tmp_path / RUNS).open("a") as file:
        file.write('{"method": "nearest-mean", "sho')  # an interruption in the middle of a line
    with mock.patch.object(NearestMean, "fit", side_effect=AssertionError("fitted again")):
        assert compare(clip, data, METHODS, [1], [1, 2], tmp_path) == first
    done: list[tuple[int, int]] = []
    more = compare(clip, data, METHODS, [1, 2], [1, 2], tmp_path, advance=lambda *a: done.append(a))
    assert [run for run in more if run["shots"] < 2] == first
    assert len(more) == len(first) + 4
    assert done[-1] == (9, 9)
    with mock.patch.object(LinearProbe, "fit", side_effect=AssertionError("fitted again")):
        assert compare(clip, data, METHODS, [1, 2], [1, 2], tmp_path) == more
        with pytest.raises(AssertionError, match="fitted again"):  # other settings are other runs
            compare(clip, data, METHODS, [1], [1], tmp_path, settings={"linear-probe": {"C": 1.0}})


def test_no_picture_is_encoded_twice_over_methods_shots_and_seeds(
    clip: Clip, data: Data, tmp_path: Path
) -> None:
    seen: list[int] = []
    forward = type(clip.image).forward

    def counted(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return forward(self, pixels)

    with mock.patch.object(type(clip.image), "forward", counted):
        compare(clip, data, METHODS, [1, 4, 8], [1, 2, 3], tmp_path)
    assert sum(seen) <= 40 + 16 + 24


def test_base_to_new_leaves_out_what_belongs_to_its_classes(clip: Clip, data: Data, tmp_path: Path) -> None:
    runs = compare(clip, data, METHODS, [2], [1], tmp_path, halves=True)
    assert [run["method"] for run in runs] == ["zero-shot"]
    X, y = data.test
    for half, measure in (([0, 1], "base"), ([2, 3], "new")):
        rows = np.flatnonzero(np.isin(y, half))
        names = [NAMES[label] for label in half]
        expected = (
            ZeroShot(clip, names).fit().score([X[i] for i in rows], [names[y[i] - half[0]] for i in rows])
        )
        assert runs[0][measure] == pytest.approx(expected)


def test_means_and_deviations_are_written_in_every_form(clip: Clip, data: Data, tmp_path: Path) -> None:
    runs = compare(clip, data, METHODS, [1, 2], [1, 2], tmp_path)
    rows = summarize(runs)
    own = [run["accuracy"] for run in runs if run["method"] == "nearest-mean" and run["shots"] == 2]
    (row,) = [row for row in rows if row["method"] == "nearest-mean" and row["shots"] == 2]
    assert row["accuracy"] == pytest.approx(np.mean(own))
    assert row["accuracy_deviation"] == pytest.approx(np.std(own))
    json_path, csv_path, plot_path = write(rows, runs, tmp_path)
    assert json.loads(json_path.read_text()) == {"means": rows, "runs": runs}
    with csv_path.open() as file:
        assert [line["method"] for line in csv.DictReader(file)] == [row["method"] for row in rows]
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_a_comparison_that_grows_shows_all_of_its_runs(clip: Clip, data: Data, tmp_path: Path) -> None:
    first = compare(clip, data, ["zero-shot", "nearest-mean"], [1, 4], [1, 2], tmp_path)
    other = Data("other", data.train, data.validation, data.test, data.classes)
    compare(clip, other, ["nearest-mean"], [1], [1], tmp_path)
    compare(clip, data, ["linear-probe"], [1], [1], tmp_path, settings={"linear-probe": {"C": 1e-3}})
    last = compare(clip, data, ["linear-probe"], [1], [1], tmp_path, settings={"linear-probe": {"C": 1e3}})

    def listed(runs: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps(run, sort_keys=True) for run in runs)

    assert listed(beside(last, tmp_path)) == listed(first + last)
    # A call that does not name a method shows the newest of its settings, the one that does its own.
    assert listed(beside(first, tmp_path)) == listed(first + last)
    again = compare(clip, data, ["linear-probe"], [1], [1], tmp_path, settings={"linear-probe": {"C": 1e-3}})
    assert listed(beside(again, tmp_path)) == listed(first + again)
    assert len(list(summarize(beside(last, tmp_path)))) == 4


def test_a_teacher_is_filed_under_its_weights(clip: Clip) -> None:
    assert _told({"teacher": clip}) == {"teacher": fingerprint(clip)}


def test_wrong_wishes_are_refused(clip: Clip, data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="linear-probe"):
        compare(clip, data, ["linear-prob"], [1], [1], tmp_path)
    with pytest.raises(ConfigError, match="not compared"):
        compare(clip, data, METHODS, [1], [1], tmp_path, settings={"coop": {}})
    with pytest.raises(EstimatorInputError, match="fewer than the 11 shots"):
        compare(clip, data, ["nearest-mean"], [11], [1], tmp_path)
    with pytest.raises(ConfigError, match="at least one"):
        compare(clip, data, METHODS, [], [1], tmp_path)


def test_fewer_test_pictures_are_the_same_draw_and_other_runs(data: Data) -> None:
    splits = Splits(
        *(Examples(Example(str(i), image, label=int(y)) for i, (image, y) in enumerate(zip(*part)))
          for part in (data.train, data.validation, data.test)),
        data.classes,
    )  # fmt: skip
    few, again, every = (gather("tiles", splits, most) for most in (5, 5, None))
    assert few.name != every.name and few.test[1].tolist() == again.test[1].tolist()
    assert len(few.test[1]) == 5 and len(every.test[1]) == len(data.test[1])
    assert len(few.train[1]) == len(data.train[1])


def test_a_method_that_lacks_a_setting_is_an_error_or_left_out(
    clip: Clip, data: Data, tmp_path: Path
) -> None:
    methods = ["nearest-mean", "promptkd", "zero-shot"]
    with pytest.raises(ConfigError, match="teacher"):
        compare(clip, data, methods, [2], [1], tmp_path / "error")
    left_out: dict[str, str] = {}
    runs = compare(clip, data, methods, [2], [1], tmp_path / "left", left_out=left_out)
    assert "teacher" in left_out["promptkd"]
    assert {run["method"] for run in runs} == {"nearest-mean", "zero-shot"}
