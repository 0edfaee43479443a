"""Labeled data as a user has it, opened as training, validation and test parts of the same classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipworks.data.captions import ClassTexts, class_texts
from clipworks.data.folders import ImageFolder
from clipworks.data.source import Examples, Selected, Source
from clipworks.data.templates import PHOTO_TEMPLATE
from clipworks.errors import DataError

WORLD = "world:"
WORLD_CLASSES, WORLD_PART = 20, 1000  # classes, and pictures in each part


@dataclass(frozen=True)
class Splits:
    """A labeled data set; `validation` and `test` may be empty.

    Attributes:
        train, validation, test: examples whose labels count `classes`.
        classes: what is said about each class, in the order of the labels.
    """

    train: Source
    validation: Source
    test: Source
    classes: ClassTexts


def open_splits(data: str | Path, *, size: int = 64) -> Splits:
    """Open labeled data.

    Args:
        data: a folder with one folder a class; with `train` and `test` (also `val`) folders of such; with
            Parquet files `train-*.parquet`, `test-*` or `val-*` and `classes.json`; one of CoOp's eleven
            data sets, with its split file; or `world:STYLE`, generated pictures in one visual style.
        size: of generated pictures.

    Raises:
        DataError: if it is none of these, or empty, or parts do not have the same classes.
        ConfigError: for an unknown style.
    """
    if str(data).startswith(WORLD):
        return world_style(str(data).removeprefix(WORLD), size)
    folder = Path(data)
    coop = _coop(folder)
    if coop is not None:
        return coop
    if folder.is_dir() and any(folder.glob("train-*.parquet")):
        return _parquet(folder)
    if (folder / "train").is_dir():
        return _folders(folder)
    pictures = ImageFolder(folder)
    return Splits(pictures, Examples([]), Examples([]), _spoken(pictures.class_names))


def examples_of(source: Source) -> tuple[list[Any], NDArray[np.int64]]:
    """The pictures of a source as they are stored, and their labels (n,).

    Raises:
        DataError: if it has no labels.
    """
    labels = source.labels
    if labels is None:
        raise DataError("the examples have no labels")
    return [source[index].image for index in range(len(source))], labels


def halved(splits: Splits) -> Splits:
    """The same, with every other training picture of a class as the test part where there is none.

    Raises:
        DataError: if a class has a single picture.
    """
    if len(splits.test):
        return splits
    labels = splits.train.labels
    if labels is None:
        raise DataError("the examples have no labels")
    away = np.zeros(len(labels), bool)
    for label in range(len(splits.classes)):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise DataError(
                f"class {splits.classes.names[label]!r} has a single picture: none is left to test on"
            )
        away[rows[1::2]] = True
    train, test = (Selected(splits.train, np.flatnonzero(rows)) for rows in (~away, away))
    return replace(splits, train=train, test=test)


def world_style(style: str, size: int = 64, seed: int = 0) -> Splits:
    """Pictures of one colored shape each, all in one style; 20 pairs of color and shape are the classes."""
    from clipworks.data.world.dataset import WorldScenes
    from clipworks.data.world.scenes import COLORS, SHAPES, SceneConfig

    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:WORLD_CLASSES]
    config = SceneConfig(pairs=tuple(pairs[i] for i in sorted(drawn)), styles=(style,), count=(1, 1))
    scenes = WorldScenes(config, seed, 3 * WORLD_PART, min(max(size, 32), 256), sources=(), label="pair")
    used = np.unique(scenes.labels)
    places = np.searchsorted(used, scenes.labels)
    parts = [range(start, start + WORLD_PART) for start in range(0, 3 * WORLD_PART, WORLD_PART)]
    train, validation, test = (Selected(scenes, part, places[part.start : part.stop]) for part in parts)
    classes = ClassTexts([scenes.class_names[label] for label in used], templates=(PHOTO_TEMPLATE,))
    return Splits(train, validation, test, classes)


def _coop(path: Path) -> Splits | None:
    """One of CoOp's data sets, given as its folder or as its split file."""
    from clipworks.data.coop import SETS, load_coop, read_split

    folder = path.parent if path.suffix == ".json" else path
    for name, one in SETS.items():
        named = folder.name == one.folder and (not one.split or path.suffix != ".json")
        official = not one.split and (
            (folder / "variants.txt").is_file() or (folder / "classnames.txt").is_file()
        )
        if named and (official or (one.split and (folder / one.split).is_file())):
            return load_coop(name, folder.parent)
        if one.split and path.name == one.split:
            return read_split(path, folder / one.images, one.template)
    return None


def _parquet(folder: Path) -> Splits:
    from clipworks.data.parquet import ParquetExamples

    def part(*names: str) -> Source:
        for name in names:
            files = sorted(folder.glob(f"{name}-*.parquet"))
            if files:
                return ParquetExamples(files)
        return Examples([])

    test = part("test", "val")
    held = part("val") if any(folder.glob("test-*.parquet")) else Examples([])
    texts = class_texts(folder / "classes.json")
    return Splits(part("train"), held, test, texts)


def _folders(folder: Path) -> Splits:
    train = ImageFolder(folder / "train")

    def part(*names: str) -> Source:
        for name in names:
            if (folder / name).is_dir():
                found = ImageFolder(folder / name)
                if found.class_names != train.class_names:
                    odd = sorted(set(found.class_names) ^ set(train.class_names))
                    raise DataError(
                        f"{folder / name}: has not the classes of train; {odd[0]!r} is in one alone"
                    )
                return found
        return Examples([])

    held = part("val", "validation")
    test = part("test")
    if not len(test):
        held, test = test, held
    return Splits(train, held, test, _spoken(train.class_names))


def _spoken(names: list[str]) -> ClassTexts:
    return ClassTexts([name.replace("_", " ") for name in names], templates=(PHOTO_TEMPLATE,))
