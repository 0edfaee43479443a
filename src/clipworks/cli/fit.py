"""`clipworks fit`: adapt a Clip to labeled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import DeviceOption, JsonOption, ModelOption
from clipworks.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipworks.methods.adapt.base import Adapter

RUN = "run.json"


def fit(
    method: Annotated[
        str, typer.Argument(help="coop, gda, linear-probe, zero-shot …: see the guide on adapting.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A folder with a folder a class, or with train/ and test/ of such; Parquet; a set of CoOp's."
        ),
    ],
    shots: Annotated[int | None, typer.Option(min=1, help="Pictures of each class; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is learned.")] = Path("run"),
    model: ModelOption = console.SEEDLING,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE...", help="Settings of the method: epochs=20 lr=0.01."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEMPLATE...", help="Sentences with {} for the class name; several are averaged."
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder that keeps features, so that no picture is encoded twice.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw and of the method.")] = 1,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Adapt a Clip to your classes; what was learned is saved, the Clip stays as it is.

    Where the data has a test part, or shots leave pictures over, accuracy on those is measured.

    Example: clipworks fit linear-probe --data shots/ --out flowers
    """
    import time

    from clipworks.checkpoints.own import write_json
    from clipworks.data.splits import examples_of, open_splits
    from clipworks.evaluate.fewshot import few_shot, places_in, take
    from clipworks.methods.adapt.base import method_named

    chosen = method_named(method)
    clip = console.load_clip(model, device)
    splits = open_splits(data, size=clip.preprocessing.image_size)
    pictures, labels = examples_of(splits.train)
    classes = splits.classes
    if template:
        import dataclasses

        classes = dataclasses.replace(classes, templates=tuple(template))
    given = load_teacher(read_settings(chosen, settings or []), device)
    estimator = chosen(clip, classes, **{"seed": seed, "store": store, **given})
    test = examples_of(splits.test) if len(splits.test) else None
    validation = None
    if shots is not None:
        import numpy as np

        held = examples_of(splits.validation) if len(splits.validation) else None
        draw = few_shot(labels, shots, seed, None if held is None else held[1])
        if held is not None:
            validation = take(held[0], draw.validation), held[1][draw.validation]
        if test is None:
            rest = np.setdiff1d(np.arange(len(labels)), draw.train)
            test = (take(pictures, rest), labels[rest]) if len(rest) else None
        pictures, labels = take(pictures, draw.train), labels[draw.train]
    elif len(splits.validation):
        validation = examples_of(splits.validation)
    started = time.perf_counter()
    if estimator.labels_needed is True:
        estimator.fit(pictures, labels, validation=validation)
    else:
        estimator.fit(pictures)
    seconds = time.perf_counter() - started
    accuracy = None
    if test is not None:
        likely = estimator.predict_proba(test[0]).argmax(axis=1)
        accuracy = float((likely == places_in(classes, estimator)[test[1]]).mean())
    estimator.save(out)
    result = {
        "method": method,
        "model": model,
        "data": data,
        "classes": len(classes),
        "pictures": len(labels),
        "shots": shots,
        "seed": seed,
        "parameters": estimator.trainable_parameters,
        "seconds": seconds,
        "accuracy": accuracy,
        "test_pictures": 0 if test is None else len(test[1]),
        "out": str(out),
    }
    write_json(result, out / RUN)
    if as_json:
        console.print_json(result)
        return
    said = "" if accuracy is None else f", {accuracy:.1%} of {result['test_pictures']} test pictures right"
    console.show(
        f"{method} fitted to {len(labels)} pictures of {len(classes)} classes in {seconds:.1f} s{said}"
    )
    console.show(f"clipworks predict {out} photo.jpg")


def load_teacher(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """The settings, with the model or the run of `clipworks fit` in the place of a `teacher`'s name."""
    from clipworks.checkpoints.files import read_json
    from clipworks.methods.adapt.base import Adapter

    name = settings.get("teacher")
    if not isinstance(name, str):
        return settings
    if not (Path(name) / RUN).is_file():
        return {**settings, "teacher": console.load_clip(name, device)}
    taught = console.load_clip(str(read_json(Path(name) / RUN)["model"]), device)
    return {**settings, "teacher": Adapter.load(name, taught)}


def read_settings(method: type[Adapter], given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` settings of a method, values read as JSON where they are that, else as words.

    Raises:
        ConfigError: for a setting that the method does not have, or without a value.
    """
    known = [name for name in method._get_param_names() if name not in ("clip", "class_names")]
    return read_values(method.__name__, known, given)


def read_values(method: str, known: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """The same for any method, by its name and the names of its settings."""
    import json

    settings: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, not {one!r}")
        if name not in known:
            there = f"{nearest(name, known)}; there are {', '.join(known)}"
            raise ConfigError(f"{method} has no setting {name!r}{there}")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
        if isinstance(settings[name], list):
            settings[name] = tuple(settings[name])
    return settings
