"""`clipworks predict`: classify pictures with what `clipworks fit` has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import DeviceOption, JsonOption
from clipworks.errors import DataError


def predict(
    run: Annotated[Path, typer.Argument(help="The folder that `clipworks fit` wrote.")],
    photos: Annotated[
        list[str], typer.Argument(metavar="PHOTO", help="Files, folders, patterns ('photos/*.jpg').")
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The Clip, if it is not where it was.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print for each picture.")] = 3,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say which class each picture shows.

    Example: clipworks predict run photo.jpg
    """
    from rich.text import Text

    from clipworks.checkpoints.files import read_json
    from clipworks.cli.fit import RUN
    from clipworks.core.pictures import find_pictures
    from clipworks.methods.adapt.base import Adapter

    if not (run / RUN).is_file():
        raise DataError(f"{run}: no run of `clipworks fit` ({RUN} is missing)")
    clip = console.load_clip(model or str(read_json(run / RUN)["model"]), device)
    estimator: Adapter = Adapter.load(run, clip)
    paths = [
        path for photo in photos for path in (find_pictures(photo) if _is_several(photo) else [Path(photo)])
    ]
    if not paths:
        raise DataError(f"no picture in {', '.join(photos)}")
    found = estimator.predict_proba(paths)
    best = (-found).argsort(axis=1)[:, :top]
    names = estimator.texts_.names
    result: list[dict[str, Any]] = [
        {"photo": str(path), "classes": [{"name": names[c], "probability": float(row[c])} for c in order]}
        for path, row, order in zip(paths, found, best, strict=True)
    ]
    if as_json:
        console.print_json(result)
        return
    for one in result:
        table = console.make_table("class", ">probability", "", title="")
        for entry in one["classes"]:
            share = entry["probability"]
            table.add_row(Text(entry["name"]), f"{share:.1%}", console.bar(share))
        console.show(Text(one["photo"], style="bold"), table)


def _is_several(photo: str) -> bool:
    return Path(photo).is_dir() or any(sign in photo for sign in "*?[")
