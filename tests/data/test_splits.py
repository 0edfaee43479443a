"""Labeled data is opened whatever its form, with one meaning of a label in all of its parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipworks.data.splits import examples_of, halved, open_splits, world_style
from clipworks.errors import ConfigError, DataError


def fill(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
    return folder


def test_class_folders_are_training_data_of_which_every_other_picture_can_be_tested_on(
    tmp_path: Path,
) -> None:
    splits = open_splits(fill(tmp_path / "shots", {"hot_dog": 5, "cat": 4}))
    assert splits.classes.names == ("cat", "hot dog")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 0, 0)
    parts = halved(splits)
    train, test = ([part[i].key for i in range(len(part))] for part in (parts.train, parts.test))
    assert sorted(train + test) == sorted(splits.train[i].key for i in range(9))
    assert np.bincount(parts.test.labels).tolist() == [2, 2]  # type: ignore[arg-type]
    fill(tmp_path / "few", {"a": 1, "b": 2})
    with pytest.raises(DataError, match="'a' has a single picture"):
        halved(open_splits(tmp_path / "few"))


def test_train_and_test_folders_must_have_the_same_classes(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 2, "b": 2})
    fill(tmp_path / "val", {"a": 1, "b": 1})
    splits = open_splits(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (4, 0, 2)
    fill(tmp_path / "test", {"a": 1, "b": 2})
    splits = open_splits(tmp_path)
    assert (len(splits.validation), len(splits.test)) == (2, 3)
    fill(tmp_path / "test", {"c": 1})
    with pytest.raises(DataError, match="'c'"):
        open_splits(tmp_path)


def test_what_is_empty_or_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        open_splits(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_splits(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="label without image"):
        open_splits(tmp_path)
    with pytest.raises(ConfigError, match="sketch"):
        open_splits("world:sketsch")


def test_a_style_of_the_world_is_three_parts_of_twenty_classes() -> None:
    splits = world_style("sketch", 32)
    assert len(splits.classes) == 20
    for part in (splits.train, splits.validation, splits.test):
        assert np.bincount(part.labels, minlength=20).min() >= 20  # type: ignore[arg-type]
    example = splits.test[7]
    scene = example.extra["scene"]
    main = scene.objects[0]
    assert scene.style == "sketch"
    assert splits.classes.names[example.label] == f"{main.color} {main.shape}"  # type: ignore[index]


def test_parquet_has_its_own_parts(shelf: Path) -> None:
    splits = open_splits(shelf / "cifar10")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (5000, 0, 10_000)
    assert splits.classes.names[3] == "cat"
    pictures, labels = examples_of(splits.test)
    assert len(pictures) == len(labels) == 10_000
