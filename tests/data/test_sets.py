from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipworks.core.images import Preprocessing
from clipworks.data.backgrounds import Plain
from clipworks.data.loader import Loader, Reading
from clipworks.data.mixture import Mixture
from clipworks.data.samplers import Sequential, UniqueLabels
from clipworks.data.sentences import TextChoice
from clipworks.data.sets import LANGUAGES, captioned, cifar10, emoji, is_held_out, tiny_imagenet
from clipworks.errors import DataError

pytest.importorskip("pyarrow")


@pytest.mark.shelf
def test_tiny_imagenet_gives_pictures_of_the_classes_that_are_named(shelf: Path) -> None:
    folder = shelf / "tiny-imagenet"
    records = json.loads((folder / "classes.json").read_text())
    validation = tiny_imagenet(folder, "val")
    assert len(validation) == 10_000 and len(validation.classes) == 200
    assert np.bincount(validation.labels).tolist() == [50] * 200
    assert list(validation.classes.names) == [record["name"] for record in records]
    some = tiny_imagenet(folder, "val", ["banana", 0, "pizza"])
    assert len(some) == 150 and some.classes.names == ("banana", "goldfish", "pizza")
    example = some[70]
    assert example.label is not None
    names = some.classes.all_names(example.label)
    assert all(any(name in caption for name in names) for caption in example.texts["alt"])
    one_shard = tiny_imagenet(folder, "train", shards=1)
    assert len(one_shard) == 12_600 and set(np.bincount(one_shard.labels)) == {63}


@pytest.mark.shelf
def test_cifar10_is_in_the_same_form(shelf: Path) -> None:
    source = cifar10(shelf / "cifar10", "train")
    assert len(source) == 5000 and source.classes.names[3] == "cat"
    assert np.bincount(source.labels).tolist() == [500] * 10


@pytest.mark.shelf
def test_a_tenth_of_the_emoji_is_held_out(shelf: Path) -> None:
    folder = shelf / "noto-emoji"
    everything, training, held_out = (emoji(folder, held_out=which) for which in (None, False, True))
    keys = [
        {source[index].key for index in range(len(source))} for source in (everything, training, held_out)
    ]
    assert len(keys[0]) == 1586 and keys[1] | keys[2] == keys[0] and not keys[1] & keys[2]
    assert 0.07 < len(keys[2]) / 1586 < 0.13
    assert all(is_held_out(key) for key in keys[2])
    annotations = {record["key"]: record for record in json.loads((folder / "annotations.json").read_text())}
    example = held_out[5]
    record = annotations[example.key]
    for language in LANGUAGES:
        assert all(record[language]["name"] in text for text in example.texts[language])
    assert sorted(example.texts["alt"]) == sorted(text for code in LANGUAGES for text in example.texts[code])
    assert example.background == Plain() and held_out.names("de")[5] == record["de"]["name"]
    two = emoji(folder, ["fr", "zh"])[0]
    assert set(two.texts) == {"alt", "fr", "zh"}


@pytest.mark.shelf
def test_emoji_stand_before_white_in_evaluation_and_before_changing_colors_in_training(shelf: Path) -> None:
    folder = shelf / "noto-emoji"
    held_out = Loader(emoji(folder, held_out=True), Preprocessing(64), None, 8, sampler=Sequential())
    batch = next(iter(held_out))
    reference = Preprocessing(64, background=(255, 255, 255))
    source = emoji(folder, held_out=True)
    for row in range(8):
        assert batch.images is not None
        difference = batch.images[row].int() - reference(source[row].image).int()
        assert difference.abs().max() <= 1
    training = Loader(
        emoji(folder), Preprocessing(64), None, 64, sampler=Sequential(), reading=Reading(cache="memory")
    )
    first, second = training.batch(0, 0), training.batch(1, 0)
    assert first.images is not None and second.images is not None
    corners = (first.images[:, :, 0, 0] != second.images[:, :, 0, 0]).any(dim=1)
    assert corners.float().mean() > 0.7
    middle = (
        (first.images[:, :, 28:36, 28:36].int() - second.images[:, :, 28:36, 28:36].int())
        .abs()
        .float()
        .mean()
    )
    assert middle < 10  # the emoji themselves stay


@pytest.mark.shelf
def test_photographs_have_five_captions(shelf: Path) -> None:
    source = captioned(shelf / "flickr8k-1000", "test")
    assert len(source) == 300
    assert all(len(source[index].texts["alt"]) == 5 for index in range(300))


@pytest.mark.shelf
def test_the_mixture_of_the_sets_makes_batches_without_repeated_classes_or_captions(
    shelf: Path, spell: Any, read: Any
) -> None:
    mixture = Mixture(
        [
            (
                tiny_imagenet(shelf / "tiny-imagenet", "train", list(range(180)), shards=1),
                160,
                UniqueLabels(),
            ),
            (emoji(shelf / "noto-emoji"), 48),
            (captioned(shelf / "flickr8k-1000", "train"), 32),
        ]
    )
    loader = Loader(mixture, Preprocessing(64), spell, texts=TextChoice({"alt": 1}, unique=True))
    assert len(loader) == 180 * 63 // 160
    for epoch in range(2):
        batch = loader.batch(epoch, 11)
        assert batch.images is not None and batch.images.shape == (240, 3, 64, 64)
        assert len(set(batch.features["label"][:160].tolist())) == 160
        assert torch.bincount(batch.features["part"]).tolist() == [160, 48, 32]
        assert len(set(read(batch.texts["alt"]))) == 240
    assert not loader.skipped.total


def test_sets_that_are_not_there_say_what_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no files train-\*\.parquet"):
        tiny_imagenet(tmp_path, "train")
    (tmp_path / "test-000.tar").touch()
    with pytest.raises(DataError, match="did you mean test"):
        captioned(tmp_path, "tset")
    with pytest.raises(DataError, match="no language 'it'"):
        emoji(tmp_path, ["it"])
    with pytest.raises(DataError):
        emoji(tmp_path)


def test_emoji_and_annotations_must_fit_together(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with tarfile.open(tmp_path / "all-000.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "u1.png")
    for content, says in [
        ("[]", "1 pictures have no annotation, the first is u1"),
        ("{", "annotations.json"),
    ]:
        (tmp_path / "annotations.json").write_text(content)
        with pytest.raises(DataError, match=says):
            emoji(tmp_path)
