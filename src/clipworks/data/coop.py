"""The eleven data sets of CoOp (Zhou et al., IJCV 2022), as every prompt-learning paper after it splits them.

Nine of them come with a file `split_zhou_<Name>.json` that its authors published, `{"train": [[path, label,
name], …], "val": …, "test": …}`; Aircraft has its official lists, and ImageNet its folders, whose validation
split serves as both validation and test. Class order is that of the labels, names are those of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipworks.data.captions import ClassTexts
from clipworks.data.source import Example, Examples
from clipworks.data.splits import Splits
from clipworks.data.templates import PHOTO_TEMPLATE
from clipworks.errors import DataError, nearest


@dataclass(frozen=True)
class CoopSet:
    """Where a data set lies below the root, and the sentence around its class names.

    Attributes:
        folder: of the data set; the file with the split lies in it.
        images: the folder that the paths of the split start from, below `folder`.
        split: name of the file with the split; empty for Aircraft and ImageNet.
        template: of CoOp's hand-made prompt.
    """

    folder: str
    images: str
    split: str
    template: str = PHOTO_TEMPLATE


SETS: dict[str, CoopSet] = {
    "imagenet": CoopSet("imagenet", "images", ""),
    "caltech101": CoopSet("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": CoopSet(
        "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."
    ),
    "stanford_cars": CoopSet("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": CoopSet(
        "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."
    ),
    "food101": CoopSet("food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food."),
    "fgvc_aircraft": CoopSet("fgvc_aircraft", "images", "", "a photo of a {}, a type of aircraft."),
    "sun397": CoopSet("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": CoopSet("dtd", "images", "split_zhou_DescribableTextures.json", "{} texture."),
    "eurosat": CoopSet("eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."),
    "ucf101": CoopSet(
        "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}."
    ),
}


def read_split(path: str | Path, images: str | Path, template: str = PHOTO_TEMPLATE) -> Splits:
    """Read a `split_zhou_*.json`.

    Args:
        path: the file.
        images: the folder that its paths start from.
        template: a sentence around the class names.

    Raises:
        DataError: if it is missing or no such file, or a picture that it names is missing.
    """
    path, images = Path(path), Path(images)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = {
            part: [(str(where), int(label), str(name)) for where, label, name in content[part]]
            for part in ("train", "val", "test")
        }
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; CoOp's DATASETS.md says where to get it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a split with train, val and test ({error})") from error
    return _splits(path, images, parts, template)


def load_coop(name: str, root: str | Path) -> Splits:
    """One of the eleven data sets, in the folders that CoOp's DATASETS.md lays out.

    Raises:
        DataError: for an unknown name, or if files are missing.
    """
    if name not in SETS:
        raise DataError(f"no data set {name!r}{nearest(name, SETS)}; there are {', '.join(SETS)}")
    one = SETS[name]
    folder = Path(root) / one.folder
    images = folder / one.images
    if one.split:
        return read_split(folder / one.split, images, one.template)
    parts = _imagenet(folder) if name == "imagenet" else _aircraft(folder)
    return _splits(folder, images, parts, one.template)


Item = tuple[str, int, str]


def _splits(where: Path, images: Path, parts: dict[str, list[Item]], template: str) -> Splits:
    if not parts["train"]:
        raise DataError(f"{where}: the training part is empty")
    names: dict[int, str] = {}
    for _, label, name in parts["train"]:
        if names.setdefault(label, name) != name:
            raise DataError(f"{where}: label {label} is both {names[label]!r} and {name!r}")
    order = {label: place for place, label in enumerate(sorted(names))}
    for part, items in parts.items():
        for _, label, name in items:
            if label not in order:
                raise DataError(f"{where}: {part} has a label {label} ({name!r}) that train lacks")
    first = images / parts["train"][0][0]
    if not first.is_file():
        raise DataError(f"{where}: names {parts['train'][0][0]}, which is not in {images}")

    def examples(items: Iterable[Item]) -> Examples:
        return Examples(Example(key, images / key, label=order[label]) for key, label, _ in items)

    spoken = [names[label].replace("_", " ") for label in sorted(names)]
    classes = ClassTexts(spoken, templates=(template,))
    return Splits(examples(parts["train"]), examples(parts["val"]), examples(parts["test"]), classes)


def _aircraft(folder: Path) -> dict[str, list[Item]]:
    order = {name: label for label, name in enumerate(_lines(folder / "variants.txt"))}
    parts: dict[str, list[Item]] = {}
    for part in ("train", "val", "test"):
        listed = folder / f"images_variant_{part}.txt"
        parts[part] = []
        for line in _lines(listed):
            number, _, variant = line.partition(" ")
            if variant not in order:
                raise DataError(f"{listed}: {variant!r} is none of variants.txt")
            parts[part].append((f"{number}.jpg", order[variant], variant))
    return parts


def _imagenet(folder: Path) -> dict[str, list[Item]]:
    names = dict(line.split(" ", 1) for line in _lines(folder / "classnames.txt"))
    parts: dict[str, list[Item]] = {}
    for part in ("train", "val"):
        below = folder / "images" / part
        if not below.is_dir():
            raise DataError(f"{below}: no such folder")
        wnids = sorted(one.name for one in below.iterdir() if one.is_dir())
        unknown = [wnid for wnid in wnids if wnid not in names]
        if unknown:
            raise DataError(f"{below}: has a folder {unknown[0]} that classnames.txt does not name")
        parts[part] = [
            (f"{part}/{wnid}/{file.name}", label, names[wnid])
            for label, wnid in enumerate(wnids)
            for file in sorted((below / wnid).iterdir())
        ]
    return parts | {"test": parts["val"]}


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
