"""`clipworks anomaly`: learn what a defect is, and find defects in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import DeviceOption, JsonOption, ModelOption
from clipworks.errors import DataError, PictureError

RUN = "run.json"

FaultlessOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PHOTO...", help="Faultless pictures, files or folders, that set the thresholds."),
]
QuantileOption = Annotated[
    float, typer.Option(min=0, max=1, help="The share of faultless pictures that stays below a threshold.")
]

app = typer.Typer(
    help="Learn what a defect is from pictures with masks, and find defects in things never seen before.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="Example: clipworks anomaly fit tiles/ --out run ; clipworks anomaly score run photos/",
)


@app.command(cls=console.Command)
def fit(
    data: Annotated[
        Path, typer.Argument(help="A folder with images/ and masks/, or with shards of both.", metavar="SET")
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is learned.")] = Path("run"),
    faultless: FaultlessOption = None,
    quantile: QuantileOption = 0.99,
    epochs: Annotated[int, typer.Option(min=1, help="Of the training.")] = 15,
    model: ModelOption = console.SEEDLING,
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Learn from faultless and faulty pictures; a mask is above zero where a defect is.

    Thresholds come from --faultless, or else from the faultless pictures of the set.

    Example: clipworks anomaly fit tiles/ --out run
    """
    from clipworks.checkpoints.own import write_json
    from clipworks.data.masked import open_masked
    from clipworks.methods.dense.anomalyclip import AnomalyCLIP

    found = open_masked(data)
    others = _pictures(faultless) if faultless else None
    method = AnomalyCLIP(console.load_clip(model, device), epochs=epochs, seed=seed)
    views = method.view(found.images, found.masks)
    method.fit_views(views)
    faulty = views.faulty.tolist() if views.faulty is not None else []
    if others is None:
        others = [image for image, marked in zip(found.images, faulty, strict=True) if not marked]
    method.calibrate(others, quantile)
    method.save(out)
    result = {
        "data": str(data),
        "model": model,
        "pictures": len(found),
        "faulty": sum(faulty),
        "loss": method.losses_[-1],
        "threshold": method.threshold_,
        "image_threshold": method.image_threshold_,
        "out": str(out),
    }
    write_json(result, out / RUN)
    if as_json:
        console.print_json(result)
        return
    typer.echo(f"learned from {len(found)} pictures, {sum(faulty)} of them faulty")
    typer.echo(f"clipworks anomaly score {out} photos/")


@app.command(cls=console.Command)
def score(
    run: Annotated[Path, typer.Argument(help="The folder that `clipworks anomaly fit` wrote.")],
    photos: Annotated[
        list[str], typer.Argument(metavar="PHOTO", help="Files, folders, patterns ('photos/*.jpg').")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures with their heat maps; the colors never vary.")
    ] = None,
    faultless: FaultlessOption = None,
    quantile: QuantileOption = 0.99,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The Clip, if it is not where it was.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say how faulty each picture is, and where; with --faultless the thresholds are of this product.

    A picture that cannot be read is left out and reported; the exit code
    is 2 if none could be read.

    Example: clipworks anomaly score run photos/ --out maps
    """
    from clipworks.checkpoints.files import read_json
    from clipworks.methods.dense.anomalyclip import AnomalyCLIP
    from clipworks.methods.dense.base import Unreadable
    from clipworks.parts.heat import overlay

    if not (run / RUN).is_file():
        raise DataError(f"{run}: no run of `clipworks anomaly fit` ({RUN} is missing)")
    paths = _pictures(photos)
    clip = console.load_clip(model or str(read_json(run / RUN)["model"]), device)
    method = AnomalyCLIP.load(run, clip)
    if faultless:
        method.calibrate(_pictures(faultless), quantile)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for number, (path, found) in enumerate(zip(paths, method.score_all(paths, on_error="skip"), strict=True)):
        if isinstance(found, Unreadable):
            skipped.append({"path": str(path), "reason": found.reason})
            continue
        values, likely = found.maps[0], float(found.image[0])
        row: dict[str, Any] = {
            "path": str(path),
            "score": likely,
            "faulty": likely > method.image_threshold_,
            "highest": float(values.max()),
            "share": float((values > method.threshold_).float().mean()),
        }
        if out is not None:
            # Numbered, because folders may hold files of one name.
            target = out / f"{number:04d}-{path.stem}.png"
            overlay(path, values, threshold=method.threshold_).save(target)
            row["overlay"] = str(target)
        rows.append(row)
    if not rows:
        raise PictureError(f"none of {len(paths)} pictures could be read: {skipped[0]['reason']}")
    limits = {"threshold": method.threshold_, "image_threshold": method.image_threshold_}
    if as_json:
        console.print_json({**limits, "pictures": rows, "skipped": skipped})
        return
    from rich.text import Text

    table = console.make_table("picture", ">score", "faulty", ">marked")
    for row in rows:
        said = "yes" if row["faulty"] else "no"
        table.add_row(Text(row["path"]), f"{row['score']:.3f}", said, f"{row['share']:.1%}")
    console.show(table)
    for one in skipped:
        console.note(f"skipped {one['reason']}")


def _pictures(given: list[str]) -> list[Path]:
    from clipworks.core.pictures import find_pictures

    paths = list(dict.fromkeys(path for one in given for path in find_pictures(one)))
    if not paths:
        raise DataError(f"no picture in {', '.join(given)}")
    return paths
