"""Evaluation sets as a user names them, and the retrieval measurements on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipworks.data import sets, templates
from clipworks.data.captions import ClassTexts, class_texts
from clipworks.data.folders import ImageFolder
from clipworks.data.parquet import ParquetExamples
from clipworks.data.source import Selected, Source, iterate
from clipworks.encode.bulk import encode_images, encode_texts
from clipworks.encode.precision import Precision
from clipworks.errors import ConfigError, DataError, nearest
from clipworks.evaluate.retrieval import pair_recall, recall

if TYPE_CHECKING:
    from clipworks.core.clip import Clip

NAMED_TEMPLATES = {
    "photo": (templates.PHOTO_TEMPLATE,),
    "simple": templates.SIMPLE_TEMPLATES,
    "imagenet": templates.IMAGENET_TEMPLATES,
}


def labeled_set(
    data: str,
    classes: Path | None,
    *,
    only: str = "",
    without: str = "",
    templates: str = "simple",
    synonyms: bool = True,
) -> tuple[Source, ClassTexts]:
    """A labeled set and its classes' texts, restricted to some classes.

    Args:
        data: Parquet files (a path or a pattern), or a folder with a folder a class.
        classes: file with the names of the classes; a folder of class folders names its own.
        only, without: class indices, as `class_slice` reads them.
        templates: `photo`, `simple`, `imagenet`, or a text file with one a line.
        synonyms: use all names of a class.

    Raises:
        DataError: if files are missing, or labels and names do not fit together.
        ConfigError: for templates that are not there.
    """
    source: Source
    if Path(data).is_dir() and not list(Path(data).glob("*.parquet")):
        folder = ImageFolder(data)
        source, names = folder, ClassTexts(folder.class_names)
        if classes is not None:
            names = class_texts(classes)
    else:
        if classes is None:
            raise DataError(f"{data}: the labels are numbers; --classes names the file with the names")
        source = ParquetExamples(sorted(Path(data).glob("*.parquet")) if Path(data).is_dir() else data)
        names = class_texts(classes)
    labels = source.labels
    if labels is None:
        raise DataError(f"{data}: has no labels")
    if len(labels) and labels.max() >= len(names):
        raise DataError(f"{data}: has a label {labels.max()}, but {classes} names {len(names)} classes")
    kept = set(class_slice(only, len(names))) if only else set(range(len(names)))
    kept -= set(class_slice(without, len(names)))
    if not kept:
        raise DataError("no class is left to classify")
    names = replace(names, templates=_templates(templates))
    if not synonyms:
        names = replace(names, synonyms=None)
    if len(kept) < len(names):
        chosen = sorted(kept)
        position = np.full(len(names), -1, dtype=np.int64)
        position[chosen] = np.arange(len(chosen))
        rows = np.flatnonzero(position[labels] >= 0)
        source, names = Selected(source, rows, position[labels[rows]]), names.select(chosen)
    return source, names


def class_slice(text: str, count: int) -> list[int]:
    """Class indices written as a slice (`9::10`) or a list (`3,5,7`), for `count` classes; "" is none.

    Raises:
        ConfigError: if it is neither, or names a class that is not there.
    """
    if not text:
        return []
    try:
        if ":" in text:
            return list(range(count))[slice(*(int(part) if part else None for part in text.split(":")))]
        indices = [int(part) for part in text.split(",")]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{text!r} is neither a slice like 9::10 nor a list like 3,5,7") from error
    outside = [index for index in indices if not 0 <= index < count]
    if outside:
        raise ConfigError(f"class {outside[0]} is not one of {count}")
    return indices


def emoji_retrieval(
    clip: Clip,
    folder: Path,
    languages: Sequence[str] | None = None,
    *,
    held_out: bool | None = True,
    precision: Precision = "fp32",
) -> list[dict[str, Any]]:
    """Emoji by their names, one row a language; with `held_out=True` among those no training may show."""
    rows = []
    source = sets.emoji(folder, tuple(languages) if languages else sets.LANGUAGES, held_out=held_out)
    features = encode_images(clip, _pixels(clip, source), precision=precision).features
    for language in source.languages:
        names = source.names(language)
        texts = encode_texts(clip, names, precision=precision)
        # Equal names belong to all pictures that bear them.
        places = {name: [i for i, other in enumerate(names) if other == name] for name in names}
        matches = torch.zeros(len(names), len(names), dtype=torch.bool)
        for i, name in enumerate(names):
            matches[i, places[name]] = True
        found = recall((texts @ features.T).cpu(), matches, (1, 10))
        rows.append({"texts": language, "pictures": len(names), **found})
    return rows


def caption_retrieval(
    clip: Clip, folder: Path, split: str, *, precision: Precision = "fp32"
) -> list[dict[str, Any]]:
    """Captioned photographs, both directions, all captions of a picture counting."""
    source = sets.captioned(folder, split)
    texts: list[str] = []
    owner: list[int] = []
    for row, example in enumerate(iterate(source)):
        choices = example.texts["alt"]
        listed = [choices] if isinstance(choices, str) else list(choices)
        texts += listed
        owner += [row] * len(listed)
    features = encode_images(
        clip, (source[row].image for row in range(len(source))), precision=precision
    ).features
    found = pair_recall(
        features.cpu(), encode_texts(clip, texts, precision=precision).cpu(), torch.tensor(owner)
    )
    return [{"texts": "captions", "pictures": len(source), **found}]


def _pixels(clip: Clip, source: Source) -> torch.Tensor:
    """All pictures of a small source on their backgrounds, (n, 3, s, s) uint8."""
    from clipworks.data.loader import Loader
    from clipworks.data.samplers import Sequential

    loader = Loader(source, clip.preprocessing, batch_size=256, sampler=Sequential(), texts=())
    return torch.cat([batch.images for batch in loader if batch.images is not None])


def _templates(name: str) -> tuple[str, ...]:
    if name in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(NAMED_TEMPLATES)
        close = nearest(name, NAMED_TEMPLATES)
        raise ConfigError(f"no templates {name!r}{close}; there are {known}, or a file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(line for line in lines if line)
