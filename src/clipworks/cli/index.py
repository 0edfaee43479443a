"""`clipworks index`: build an index of pictures, and ask it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipworks.cli import console
from clipworks.cli.console import BatchOption, DeviceOption, JsonOption, PrecisionOption
from clipworks.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipworks.search import Hit, Index, Report

DEFAULT = Path("clipworks-index")

IndexOption = Annotated[Path, typer.Option("--index", metavar="FOLDER", help="Where the index lies.")]

app = typer.Typer(
    help="Build an index of pictures, and find them by words or by another picture.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="Example: clipworks index build ~/Pictures ; clipworks index query 'a dog on a beach'",
)


@app.command(cls=console.Command)
def build(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER", help="Folders, patterns, files.")],
    index: IndexOption = DEFAULT,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Default: the index's own model; seedling for a new index.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read also files whose size and time are as they were.")
    ] = False,
    precision: PrecisionOption = "fp32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Make an index, or bring one up to date: new, changed and deleted files.

    A build that was interrupted goes on where it was. Pictures that cannot
    be read are left out and reported.

    Example: clipworks index build ~/Pictures --index ~/pictures-index
    """
    chosen = console.check_precision(precision)
    for folder in folders:
        # All of them before anything is done; whether there are pictures below is for the build to say.
        if not Path(folder).exists() and not any(mark in folder for mark in "*?["):
            raise DataError(f"{folder}: no such folder or file")

    from clipworks.search import Index, Report

    new = not Index.exists(index)
    if new:
        name = model or console.SEEDLING
        opened = Index.create(index, console.load_clip(name, device), _lasting(name))
    else:
        opened = Index.open(index)
        opened.bind(console.load_clip(model or opened.model, device))
    report = Report()
    try:
        with console.progress("indexing") as advance:
            for folder in folders:
                done = opened.add(
                    folder, batch_size=batch_size, precision=chosen, verify=verify, progress=advance
                )
                report.add(done)
    except DataError:
        if new and not len(opened):
            shutil.rmtree(index)
        raise
    _report(opened, report, as_json)


@app.command(cls=console.Command)
def query(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="What to look for.")] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="A picture to look for, instead of words.")
    ] = None,
    index: IndexOption = DEFAULT,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many pictures to find.")] = 10,
    where: Annotated[
        str | None,
        typer.Option(metavar="CONDITION", help='Only pictures that meet it, in SQL: "width >= 1024".'),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a contact sheet of the hits, such as hits.png.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the pictures nearest to words, or to another picture.

    Example: clipworks index query "a dog on a beach" --k 20 --sheet hits.png
    """
    if (text is None) == (image is None):
        raise ConfigError("give either words to look for, or --image FILE")

    from clipworks.search import Index
    from clipworks.search.sheet import contact_sheet, tiles

    opened = Index.open(index)
    opened.bind(console.load_clip(opened.model, device))
    hits = opened.query(text, picture=image, k=k, where=where)
    if sheet is not None:
        if not hits:
            raise ConfigError(f"{sheet}: not written, for nothing was found")
        save(contact_sheet([(text or f"like {image}", tiles(hits))]), sheet)
    if as_json:
        found = [vars(hit) for hit in hits]
        console.print_json({"query": text or image, "hits": found, "sheet": str(sheet) if sheet else None})
        return
    _show(hits)
    if sheet is not None:
        console.note(f"contact sheet: {sheet}")


@app.command(cls=console.Command)
def info(index: IndexOption = DEFAULT, as_json: JsonOption = False) -> None:
    """Say what an index holds and with which model it was made.

    Example: clipworks index info --index ~/pictures-index
    """
    from clipworks.search import Index

    about = Index.open(index).info()
    if as_json:
        console.print_json(about)
        return
    table = console.make_table("", "")
    table.show_header = False
    rows = {
        "index": about["path"],
        "pictures": f"{about['pictures']:,}",
        "model": f"{about['model']} ({about['fingerprint'][:12]})",
        "vector width": str(about["width"]),
        "on disk": f"{about['bytes'] / 1e6:.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.show(table)


def save(picture: Image, path: Path) -> None:
    """Write a picture in the format that its name says.

    Raises:
        ConfigError: if the name says no format, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be written ({reason}); try a name such as hits.png") from error


def _lasting(model: str) -> str:
    """A model's name as it will be found from any folder."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _report(index: Index, report: Report, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "index": str(index.path),
                "model": index.model,
                "pictures": len(index),
                "embedded": report.embedded,
                "reused": report.reused,
                "unchanged": report.unchanged,
                "removed": report.removed,
                "skipped": [{"path": path, "reason": reason} for path, reason in report.skipped],
                "seconds": round(report.seconds, 3),
            }
        )
        return
    typer.echo(
        f"{index.path}: {len(index):,} pictures; {report.embedded:,} embedded, {report.reused:,} reused,"
        f" {report.unchanged:,} unchanged, {report.removed:,} removed in {report.seconds:.1f} s"
    )
    if report.skipped:
        reasons = "; ".join(reason for _, reason in report.skipped[:3])
        more = f"; and {len(report.skipped) - 3} more" if len(report.skipped) > 3 else ""
        console.note(f"skipped {len(report.skipped)} of {report.seen}: {reasons}{more}")


def _show(hits: list[Hit]) -> None:
    from rich.text import Text

    table = console.make_table(">", ">cosine", "picture", ">size")
    for place, hit in enumerate(hits, 1):
        table.add_row(str(place), f"{hit.score:.3f}", Text(hit.path), f"{hit.width}×{hit.height}")
    if hits:
        console.show(table)
    else:
        console.note("nothing was found")
