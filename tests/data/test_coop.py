"""CoOp's split files and folders are read as its code reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipworks.data.coop import SETS, load_coop, read_split
from clipworks.data.templates import SIMPLE_TEMPLATES
from clipworks.errors import DataError

SPLIT: dict[str, Any] = {
    "train": [["b/2.jpg", 4, "banded_cat"], ["a/1.jpg", 1, "dog"], ["b/3.jpg", 4, "banded_cat"]],
    "val": [["a/4.jpg", 1, "dog"]],
    "test": [["b/5.jpg", 4, "banded_cat"]],
}


def lay_out(folder: Path, split: Any = None, name: str = "split_zhou_OxfordPets.json") -> Path:
    split = SPLIT if split is None else split
    for path in ("a/1.jpg", "b/2.jpg", "b/3.jpg", "a/4.jpg", "b/5.jpg"):
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / path).write_bytes(b"picture")
    (folder / name).write_text(json.dumps(split))
    return folder / name


def test_labels_count_the_sorted_labels_and_names_lose_their_underscores(tmp_path: Path) -> None:
    path = lay_out(tmp_path / "oxford_pets")
    for splits in (read_split(path, path.parent / "images"), load_coop("oxford_pets", tmp_path)):
        assert splits.classes.names == ("dog", "banded cat")
        assert splits.train.labels is not None and splits.train.labels.tolist() == [1, 0, 1]
        assert splits.train[0].key == "b/2.jpg"
        assert splits.train[0].image == tmp_path / "oxford_pets" / "images" / "b/2.jpg"
        assert (len(splits.validation), len(splits.test)) == (1, 1)
    assert load_coop("oxford_pets", tmp_path).classes.templates == ("a photo of a {}, a type of pet.",)


def test_the_eleven_sets_have_the_papers_prompts() -> None:
    assert len(SETS) == 11
    assert all("{}" in one.template for one in SETS.values())
    assert SETS["eurosat"].template.format("River") == "a centered satellite photo of River."
    assert SETS["dtd"].template.format("banded") == "banded texture."
    assert SETS["food101"].template.format("pizza") == "a photo of pizza, a type of food."
    assert sum(bool(one.split) for one in SETS.values()) == 9
    assert SIMPLE_TEMPLATES[0] == "itap of a {}."  # the seven that ImageNet's zero-shot head averages


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": []}, "empty"),
        ({"train": [["a/1.jpg", 1, "dog"], ["b/2.jpg", 1, "cat"]]}, "both 'dog' and 'cat'"),
        ({"test": [["a/1.jpg", 9, "eel"]]}, "'eel'"),
        ({"train": [["nowhere.jpg", 1, "dog"]], "val": [], "test": []}, r"nowhere\.jpg"),
        ({"train": "abc"}, "not a split"),
    ],
)
def test_a_split_that_does_not_fit_together_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    path = lay_out(tmp_path, SPLIT | change)
    with pytest.raises(DataError, match=said):
        read_split(path, tmp_path / "images")


def test_missing_files_and_unknown_names_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATASETS"):
        load_coop("eurosat", tmp_path)
    with pytest.raises(DataError, match="eurosat"):
        load_coop("eurosatt", tmp_path)


def test_aircraft_has_its_official_lists(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    (folder / "images").mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nA300 B4\n")
    for part, line in (
        ("train", "001 A300 B4\n002 707-320"),
        ("val", "003 A300 B4"),
        ("test", "004 707-320"),
    ):
        (folder / f"images_variant_{part}.txt").write_text(line + "\n")
    (folder / "images" / "001.jpg").write_bytes(b"x")
    splits = load_coop("fgvc_aircraft", tmp_path)
    assert splits.classes.names == ("707-320", "A300 B4")
    assert np.array_equal(splits.train.labels, [1, 0])
    (folder / "images_variant_test.txt").write_text("004 Unknown\n")
    with pytest.raises(DataError, match="Unknown"):
        load_coop("fgvc_aircraft", tmp_path)


def test_imagenets_validation_is_its_test(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    for part in ("train", "val"):
        for wnid in ("n02", "n01"):
            (folder / "images" / part / wnid).mkdir(parents=True)
            (folder / "images" / part / wnid / "x.jpg").write_bytes(b"x")
    (folder / "classnames.txt").write_text("n01 tench\nn02 goldfish bowl\n")
    splits = load_coop("imagenet", tmp_path)
    assert splits.classes.names == ("tench", "goldfish bowl")
    assert [splits.test[i].key for i in range(2)] == ["val/n01/x.jpg", "val/n02/x.jpg"]
    assert splits.validation[0].key == splits.test[0].key
