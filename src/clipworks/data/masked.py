"""Pictures with a label for every pixel, from shards or folders.

    camvid/   train-000.tar  test-000.tar  classes.json     <key>.jpg with <key>.png
    set/      images/train/<name>.jpg  masks/train/<name>.png  (or images/ and masks/ without parts)

A mask holds one number a pixel. `classes.json` names the classes, as a list of names or as
`{"classes": [{"index", "name"}], "ignore"}`; without it masks only tell zero from the rest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipworks.core.pictures import find_pictures
from clipworks.data.captions import ClassTexts
from clipworks.data.shards import TarShards
from clipworks.errors import DataError


@dataclass(frozen=True)
class Masked:
    """Pictures and their masks, n of each, as bytes or paths.

    Attributes:
        keys: what each is called.
        images: for `read_picture`.
        masks: for `read_mask`.
        classes: the names that a mask's numbers count, or None.
        ignore: the number that stands for no class, or None.
    """

    keys: list[str]
    images: list[Any]
    masks: list[Any]
    classes: ClassTexts | None
    ignore: int | None

    def __len__(self) -> int:
        return len(self.images)

    def spread(self, most: int | None) -> Masked:
        """At most so many of them, evenly spread; None is all."""
        if most is None or most >= len(self):
            return self
        kept = [place * len(self) // most for place in range(most)]
        keys, images, masks = ([column[i] for i in kept] for column in (self.keys, self.images, self.masks))
        return Masked(keys, images, masks, self.classes, self.ignore)


def open_masked(folder: str | Path, split: str | None = None) -> Masked:
    """Read a set of pictures with masks.

    Args:
        folder: see the module's docstring.
        split: `train`, `test` …; None takes everything there is.

    Raises:
        DataError: if there are no such pictures, or one lacks its mask.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    classes, ignore = _classes(folder / "classes.json")
    shards = sorted(folder.glob(f"{split or '*'}-*.tar"))
    pairs = _sharded(shards) if shards else _in_folders(folder, split)
    keys, images, masks = (list(column) for column in zip(*pairs, strict=True))
    return Masked(keys, images, masks, classes, ignore)


def _sharded(shards: list[Path]) -> list[tuple[str, Any, Any]]:
    source = TarShards(shards, strict=True)
    pairs = []
    for index in range(len(source)):
        example = source[index]
        if example.image is None or "png" not in example.extra:
            raise DataError(f"{example.key}: has no picture with a mask (.jpg and .png), {shards[0]}")
        pairs.append((example.key, example.image, example.extra["png"]))
    return pairs


def _in_folders(folder: Path, split: str | None) -> list[tuple[str, Any, Any]]:
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() or not masks.is_dir():
        raise DataError(f"{folder}: has neither shards ({split or '*'}-*.tar) nor folders images/ and masks/")
    if split is not None and (images / split).is_dir():
        images, masks = images / split, masks / split
    elif split is not None:
        raise DataError(f"{folder}: has no part {split!r}: there is no {images / split}")
    there = {path.relative_to(masks).with_suffix(""): path for path in find_pictures(masks)}
    pairs = []
    for path in find_pictures(images):
        key = path.relative_to(images).with_suffix("")
        if key not in there:
            raise DataError(f"{path}: has no mask {masks / key}.png")
        pairs.append((key.as_posix(), path, there[key]))
    if not pairs:
        raise DataError(f"{images}: no pictures")
    return pairs


def _classes(path: Path) -> tuple[ClassTexts | None, int | None]:
    if not path.is_file():
        return None, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            return ClassTexts([str(name) for name in content]), None
        if "classes" not in content:
            return None, None
        entries = sorted(content["classes"], key=lambda entry: entry["index"])
        if [entry["index"] for entry in entries] != list(range(len(entries))):
            raise DataError(f"{path}: class indices are not 0 to {len(entries) - 1}")
        ignore = content.get("ignore")
        return ClassTexts([entry["name"] for entry in entries]), None if ignore is None else int(ignore)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: does not name classes ({error})") from error
