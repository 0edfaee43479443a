"""Segmenters side by side on one set: mean IoU, two trivial answers, overlays beside the truth.

A method that learns is fitted to the set's `train` part, all are measured on its `test` part. Two answers
need no method, and a map must beat both to say anything about places:

    largest class everywhere        the class with most pixels of the training masks
    image-level label everywhere    what the Clip says of the picture as a whole, by its zero-shot head

Every run is a line of `runs.jsonl` as soon as it is done, so an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.core.pictures import read_picture
from clipworks.data.captions import ClassTexts
from clipworks.data.masked import Masked
from clipworks.data.templates import IMAGENET_TEMPLATES
from clipworks.errors import ConfigError, DataError, require
from clipworks.evaluate.dense import confusion, mean_iou
from clipworks.evaluate.zeroshot import class_features
from clipworks.methods import dense
from clipworks.methods.dense.base import Segmenter
from clipworks.parts.features import fingerprint
from clipworks.parts.localization import AffinityTeacher
from clipworks.parts.segmentation import Segmentation, read_mask

Advance = Callable[[int, int], None]
RUNS = "runs.jsonl"
LARGEST, WHOLE = "largest class", "image-level label"
NO_LABEL = 255


def compare(
    clip: Clip,
    train: Masked,
    test: Masked,
    methods: Sequence[str],
    folder: Path,
    *,
    name: str = "",
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    overlays: int = 0,
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Fit and measure every method, and both trivial answers.

    Args:
        clip: the model.
        train: what methods learn from; those that need no labels see its pictures alone.
        test: what is measured on.
        methods: names, see `method_named`.
        folder: of the runs, the fitted methods and the overlays.
        name: what runs on this set are filed under.
        seed: of all methods.
        settings: by method, in place of its defaults.
        overlays: of so many test pictures, evenly spread, write what each method found beside the truth.
        advance: told how many test pictures of all methods are done, of how many.

    Returns:
        A record a run: `method`, `mean_iou`, `per_class` (None for a class that never occurs),
        `pixel_accuracy`, `fit_seconds`, `segment_seconds`, `pictures`.

    Raises:
        ConfigError: for an unknown method, or one that does not segment.
        DataError: for a set without class names, or masks that do not fit its pictures.
    """
    classes = test.classes
    if classes is None:
        raise DataError("a comparison needs the names of the classes: classes.json beside the pictures")
    settings = settings or {}
    for one in methods:
        if not issubclass(dense.method_named(one), Segmenter):
            raise ConfigError(f"{one} does not segment pictures")
    unknown = set(settings) - set(methods)
    if unknown:
        raise ConfigError(f"settings are given for {sorted(unknown)[0]!r}, which is not compared")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model": fingerprint(clip), "data": name, "train": len(train), "test": len(test), "seed": seed}
    known = {_key(run): run for run in _read(folder / RUNS)}
    drawn = np.linspace(0, len(test) - 1, min(overlays, len(test))).astype(int).tolist()
    plan = [LARGEST, WHOLE, *methods]
    runs = []
    for number, method in enumerate(plan):
        wanted = {**about, "method": method, "settings": _told(settings.get(method, {}))}
        run = known.get(_key(wanted))
        missing = [i for i in drawn if not _overlay(folder, method, i).is_file()]
        if run is None or (missing and method in methods):

            def done(count: int, number: int = number) -> None:
                if advance is not None:
                    advance(number * len(test) + count, len(plan) * len(test))

            run = {**wanted, **_measure(clip, train, test, method, settings, seed, folder, drawn, done)}
            _append(folder / RUNS, run)
        runs.append(run)
    return runs


def fitted(method: Segmenter, train: Masked, classes: ClassTexts) -> Segmenter:
    """Let a method learn from a training part, if it learns.

    A method that wants a teacher has one that looks at colors and places alone, so that it sees no mask.
    """
    learn = getattr(method, "fit", None)
    if learn is None:
        return method
    asks = inspect.signature(learn).parameters
    if "teacher" in asks:
        return cast(Segmenter, learn(train.images, AffinityTeacher()))
    told = {"class_names": classes, "ignore": NO_LABEL if train.ignore is None else train.ignore}
    options = {name: value for name, value in told.items() if name in asks}
    return cast(Segmenter, learn(train.images, train.masks, **options))


def _measure(
    clip: Clip,
    train: Masked,
    test: Masked,
    method: str,
    settings: Mapping[str, Mapping[str, Any]],
    seed: int,
    folder: Path,
    drawn: Sequence[int],
    done: Callable[[int], None],
) -> dict[str, Any]:
    classes = cast(ClassTexts, test.classes)
    started = time.perf_counter()
    answers: Iterable[Tensor | Segmentation]
    if method == LARGEST:
        answers = _everywhere([_largest(train, len(classes))] * len(test), test)
    elif method == WHOLE:
        answers = _everywhere(_image_level(clip, test, classes), test)
    else:
        segmenter = _made(method, clip, train, classes, {"seed": seed, **settings.get(method, {})})
        if hasattr(segmenter, "fit"):
            fitted(segmenter, train, classes).save(folder / method)
        answers = cast(Iterable[Segmentation], segmenter.segment_all(test.images, list(classes.names)))
    learned = time.perf_counter()
    counts = torch.zeros(len(classes), len(classes) + 1, dtype=torch.int64)
    for place, answer in enumerate(answers):
        found = answer.map if isinstance(answer, Segmentation) else cast(Tensor, answer)
        truth = read_mask(test.masks[place], (found.shape[0], found.shape[1]), where=test.keys[place])
        counts += confusion(found, truth, len(classes), test.ignore)
        if isinstance(answer, Segmentation) and place in drawn:
            path = _overlay(folder, method, place)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside(test.images[place], answer, truth, test.ignore).save(path)
        done(place + 1)
    measured = mean_iou(counts)
    values: list[float] = measured.per_class.tolist()
    return {
        "mean_iou": measured.mean,
        "per_class": {
            label: None if np.isnan(value) else value
            for label, value in zip(classes.names, values, strict=True)
        },
        "pixel_accuracy": float(counts.diagonal().sum()) / max(1, int(counts.sum())),
        "fit_seconds": learned - started,
        "segment_seconds": time.perf_counter() - learned,
        "pictures": len(test),
    }


def _made(
    method: str, clip: Clip, train: Masked, classes: ClassTexts, settings: Mapping[str, Any]
) -> Segmenter:
    """The method, told the classes and what does not count where these are settings of it."""
    chosen = dense.method_named(method)
    told = {"class_names": list(classes.names), "ignore": NO_LABEL if train.ignore is None else train.ignore}
    known = {field.name for field in fields(chosen)}
    given = {name: value for name, value in told.items() if name in known}
    return cast(Segmenter, chosen(clip, **{"progress": False, **given, **settings}))


def _largest(train: Masked, classes: int) -> int:
    counts = np.zeros(classes, np.int64)
    for mask in train.masks:
        values = read_mask(mask)
        counts += np.bincount(values[(values >= 0) & (values < classes)], minlength=classes)[:classes]
    return int(counts.argmax())


def _image_level(clip: Clip, test: Masked, classes: ClassTexts) -> list[int]:
    texts = ClassTexts(list(classes.names), templates=tuple(IMAGENET_TEMPLATES))
    likely = clip.logits(clip.embed_images(list(test.images)), class_features(clip, texts))
    return [int(place) for place in likely.argmax(dim=1)]


def _everywhere(labels: Sequence[int], test: Masked) -> Iterable[Tensor]:
    for label, image in zip(labels, test.images, strict=True):
        picture = read_picture(image)
        yield torch.full((picture.height, picture.width), label, dtype=torch.int16)


def beside(image: Any, found: Segmentation, truth: NDArray[np.int64], ignore: int | None) -> Image.Image:
    """The picture with its true labels, and to the right of it with those that were found."""
    labels = torch.from_numpy(np.where(truth == ignore, -1, truth).astype(np.int16))
    real = Segmentation(found.labels, labels, found.coarse, found.cells, found.background)
    left, right = real.overlay(image, legend=False), found.overlay(image)
    wide = Image.new("RGB", (left.width + 4 + right.width, max(left.height, right.height)), "white")
    wide.paste(left)
    wide.paste(right, (left.width + 4, 0))
    return wide


def write(runs: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write `comparison.json`, and a plot of mean IoU, `comparison.png`.

    Raises:
        MissingExtra: without matplotlib.
    """
    content, plot = folder / "comparison.json", folder / "comparison.png"
    content.write_text(json.dumps(list(runs), indent=1) + "\n", encoding="utf-8")
    require("matplotlib", extra="evaluate", purpose="the plot of a comparison")
    from matplotlib.figure import Figure

    order = sorted(runs, key=lambda run: run["mean_iou"])
    figure = Figure(figsize=(7, 1 + 0.45 * len(order)), layout="constrained")
    axes = figure.subplots()
    colors = ["gray" if run["method"] in (LARGEST, WHOLE) else "tab:blue" for run in order]
    bars = axes.barh([run["method"] for run in order], [100 * run["mean_iou"] for run in order], color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("mean IoU, %")
    figure.savefig(plot, dpi=150)
    return [content, plot]


def _overlay(folder: Path, method: str, place: int) -> Path:
    return folder / "overlays" / f"{place:05}-{method}.png"


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (bool, int, float, str)) else repr(value)
        for name, value in settings.items()
    }


def _key(run: Mapping[str, Any]) -> str:
    names = ("model", "data", "train", "test", "seed", "method", "settings")
    return json.dumps([run.get(name) for name in names], sort_keys=True)


def _append(path: Path, run: Mapping[str, Any]) -> None:
    """Add a line; one that an interruption has cut off is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(run).encode() + b"\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """The runs that are there; a line that was cut off by an interruption is left out."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs
