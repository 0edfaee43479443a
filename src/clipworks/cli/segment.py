"""`clipworks segment`: which label each pixel of a picture has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.classify import find, read_labels
from clipworks.cli.console import BatchOption, DeviceOption, JsonOption, ModelOption, PrecisionOption
from clipworks.errors import ConfigError, PictureError

if TYPE_CHECKING:
    from clipworks.core.clip import Clip
    from clipworks.methods.dense.base import Segmenter

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def segment(
    photos: Annotated[
        list[str] | None, typer.Argument(metavar="PHOTO", help="Files, folders, patterns ('photos/*.jpg').")
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option(metavar="LABEL...", help='What there may be: road car sky, "red car".')
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text file with one label a line, in UTF-8.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The label that means none of the others.")
    ] = None,
    unknown_below: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Leave pixels without a label whose best score is lower."),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME|FOLDER", help="maskclip, or the folder of a fitted method.")
    ] = "maskclip",
    size: Annotated[
        str | None,
        typer.Option(metavar="PIXELS|full", help="Shorter side at which pictures are looked at."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Overlay: overlay.png for one picture, a folder for several."),
    ] = None,
    model: ModelOption = console.SEEDLING,
    precision: PrecisionOption = "fp32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 8,
    as_json: JsonOption = False,
) -> None:
    """Say which of the labels each pixel shows.

    Prints the share of each label. --out writes pictures with the labels' colors laid over them and a
    legend beside; a folder gets NAME.png for each picture. Pictures come before --labels, or after a
    bare `--`. One that cannot be read is left out and reported; the exit code is 2 if none could be read.

    Example: clipworks segment street.jpg --labels road car sky --out overlay.png
    """
    names = read_labels(labels or [], labels_file)
    if background is not None and background not in names:
        raise ConfigError(f"--background {background!r} is none of the labels {names}")
    settings: dict[str, Any] = {"precision": console.check_precision(precision), "progress": False}
    if size is not None:
        settings["size"] = _size(size)
    paths, skipped = find(photos or [], names)
    targets = _targets(out, paths, photos or [])

    clip = console.load_clip(model, device)
    segmenter = _segmenter(method, clip, settings)
    rows: list[dict[str, Any]] = []
    with console.progress("segmenting") as advance:
        found = segmenter.segment_all(
            paths,
            names,
            background=background,
            unknown_below=unknown_below,
            batch_size=batch_size,
            on_error="skip",
            progress=False,
        )
        for done, (path, one) in enumerate(zip(paths, found, strict=True)):
            advance(done, len(paths))
            reason = getattr(one, "reason", None)
            if reason is not None:
                skipped.append((str(path), reason))
                continue
            row = {"path": str(path), "height": one.size[0], "width": one.size[1], "shares": one.shares()}  # type: ignore[union-attr]
            if path in targets:
                targets[path].parent.mkdir(parents=True, exist_ok=True)
                one.overlay(path).save(targets[path])  # type: ignore[union-attr]
                row["overlay"] = str(targets[path])
            rows.append(row)
    report = _report(skipped, len(rows))
    if not rows:
        raise PictureError(report)
    if as_json:
        console.print_json(
            {
                "model": model,
                "method": method,
                "labels": names,
                "pictures": rows,
                "skipped": [{"path": path, "reason": reason} for path, reason in skipped],
            }
        )
        return
    _show(rows)
    console.note(report)


def _size(given: str) -> int | str:
    if given == "full":
        return given
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"--size is a number of pixels or full, not {given!r}")
    return int(given)


def _segmenter(method: str, clip: Clip, settings: dict[str, Any]) -> Segmenter:
    """A method that needs no training by its name, or one that was fitted by its folder."""
    from clipworks.methods import dense
    from clipworks.methods.dense.base import Segmenter

    if Path(method).is_dir():
        found = dense.load(method, clip, **settings)
    else:
        chosen = dense.method_named(method)
        if hasattr(chosen, "fit"):
            raise ConfigError(f"{method} has to learn first: --method takes the folder of a fitted one")
        found = chosen(clip, **settings)
    if not isinstance(found, Segmenter):
        raise ConfigError(f"{method} does not segment pictures")
    return found


def _targets(out: Path | None, paths: list[Path], photos: list[str]) -> dict[Path, Path]:
    """Where each picture's overlay goes: each name once, as people would call them."""
    if out is None:
        return {}
    if out.suffix.lower() in PICTURES and not out.is_dir():
        if len(paths) > 1 or (photos and Path(photos[0]).is_dir()):
            raise ConfigError(f"--out {out}: several pictures need a folder")
        return {paths[0]: out}
    targets: dict[Path, Path] = {}
    taken = set[str]()
    for path in paths:
        name, number = path.stem, 2
        while name.casefold() in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name.casefold())
        targets[path] = out / f"{name}.png"
    return targets


def _report(skipped: list[tuple[str, str]], kept: int) -> str:
    if not skipped:
        return ""
    if not kept and len(skipped) == 1:
        return skipped[0][1]
    reasons = "; ".join(reason for _, reason in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"skipped {len(skipped)} of {kept + len(skipped)}: {reasons}{more}"


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    table = console.make_table("picture", "label", ">share", "")
    for row in rows:
        shares = sorted(row["shares"].items(), key=lambda entry: -entry[1])
        for place, (label, share) in enumerate(shares):
            first = Text(row["path"] if place == 0 else "")
            last = place == len(shares) - 1
            table.add_row(first, Text(label), f"{share:.1%}", console.bar(share), end_section=last)
    console.show(table)
