"""`clipworks index`: build an index of pictures and texts, and ask it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import BatchOption, DeviceOption, EngineOption, JsonOption, PrecisionOption
from clipworks.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipworks.search import Hit, Index, Report
    from clipworks.search.neighbors import Settings

DEFAULT = "clipworks-index"
KINDS = ("image", "text", "both")

IndexOption = Annotated[
    str, typer.Option("--index", metavar="FOLDER", help="Where the index lies: a folder, or s3://…")
]
WhereOption = Annotated[
    str | None, typer.Option(metavar="CONDITION", help='Only what meets it, in SQL: "width >= 1024".')
]
MemoryOption = Annotated[
    bool, typer.Option("--memory", help="Hold the pictures' vectors in memory, as a graph (usearch).")
]

app = typer.Typer(
    help="Build an index of pictures and texts, and find them by words or by another picture.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="Example: clipworks index build ~/Pictures ; clipworks index query 'a dog on a beach'",
)


@app.command(cls=console.Command)
def build(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="PLACE", help="Folders, patterns, pictures, shards (.tar …), tables (.csv …)."
        ),
    ],
    index: IndexOption = DEFAULT,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Default: the index's own model; seedling for a new index.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        bool, typer.Option("--texts", help="Make captions items too, which can be found themselves.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read also files whose size and time are as they were.")
    ] = False,
    precision: PrecisionOption = "fp32",
    engine: EngineOption = "torch",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Make an index, or bring one up to date: what is new, changed or gone.

    A build that was interrupted goes on where it was. Pictures that cannot
    be read are left out and reported. From 50,000 items on, the vectors are
    indexed too, and how much that finds is measured.

    Example: clipworks index build ~/Pictures captions.csv --index ~/pictures-index
    """
    chosen = console.check_precision(precision)
    for place in places:
        # All of them before anything is done; whether there is anything below is for the build to say.
        if not Path(place).exists() and not any(mark in place for mark in "*?[{"):
            raise DataError(f"{place}: no such folder or file")

    from clipworks.search import Index, Report

    new = not Index.exists(index)
    if new:
        name = model or console.SEEDLING
        clip = console.load_clip(name, device)
        used = console.ready_engines(clip, engine, chosen, batch_size, texts)  # before anything is written
        opened = Index.create(index, clip, _lasting(name))
    else:
        opened = Index.open(index)
        clip = opened.bind(console.load_clip(model or opened.model, device))
        used = console.ready_engines(clip, engine, chosen, batch_size, texts)
    report = Report()
    try:
        with console.progress("indexing") as advance:
            for place in places:
                done = opened.add(
                    place,
                    texts=texts,
                    batch_size=batch_size,
                    precision=chosen,
                    engine=engine,  # type: ignore[arg-type]  # checked
                    verify=verify,
                    progress=advance,
                )
                report.add(done)
    except DataError:
        if new and not len(opened) and "://" not in index:
            shutil.rmtree(index)
        raise
    _report(opened, report, used, as_json)


@app.command(cls=console.Command)
def query(
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="""What to look for: words, or '"a beach" - "people"'."""),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="FILE", help="A picture to look for, alone or with words."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--queries", metavar="FILE", help="Many queries, one a line; prints JSON lines."),
    ] = None,
    index: IndexOption = DEFAULT,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many to find.")] = 10,
    where: WhereOption = None,
    kind: Annotated[
        str, typer.Option(metavar="|".join(KINDS), help="Whether pictures or texts are looked for.")
    ] = "image",
    inverted: Annotated[
        bool,
        typer.Option(
            "--inverted",
            help="Turn a picture that looks for pictures into a text first, a text that looks for texts into "
            "a picture (Cross the Gap); takes seconds.",
        ),
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a contact sheet of the hits, such as hits.png.")
    ] = None,
    memory: MemoryOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find what is nearest to words, to a picture, or to both.

    Example: clipworks index query "a dog on a beach" --k 20 --sheet hits.png
    """
    if (file is None) == (text is None and image is None):
        raise ConfigError("give words to look for, --image FILE, or both; or --queries FILE alone")
    if kind not in KINDS:
        raise ConfigError(f"--kind must be image, text or both, not {kind!r}")
    if file is not None and (inverted or sheet is not None):
        raise ConfigError("--inverted and --sheet are for one query, not for --queries")
    questions = [] if file is None else _lines(file)

    from clipworks.search import Index
    from clipworks.search.sheet import contact_sheet, tiles

    opened = Index.open(index)
    opened.bind(console.load_clip(opened.model, device))
    if memory:
        opened.hold()
    wanted: Any = None if kind == "both" else kind
    if file is not None:
        answers = opened.query_many(questions, k=k, where=where, kind=wanted)
        for question, hits in zip(questions, answers, strict=True):
            answer = {"query": question, "hits": [vars(hit) for hit in hits]}
            typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    hits = opened.query(text, picture=image, k=k, where=where, kind=wanted, inverted=inverted)
    if sheet is not None:
        pictures = [hit for hit in hits if hit.kind == "image"]
        if not pictures:
            raise ConfigError(f"{sheet}: not written, for no picture was found")
        save(contact_sheet([(text or f"like {image}", tiles(pictures))]), sheet)
    if as_json:
        listed = [vars(hit) for hit in hits]
        console.print_json({"query": text or image, "hits": listed, "sheet": str(sheet) if sheet else None})
        return
    _show(hits)
    if sheet is not None:
        console.note(f"contact sheet: {sheet}")


@app.command(cls=console.Command)
def duplicates(
    index: IndexOption = DEFAULT,
    threshold: Annotated[float, typer.Option(help="The least cosine of a pair, at most 1.")] = 0.97,
    where: WhereOption = None,
    memory: MemoryOption = False,
    as_json: JsonOption = False,
) -> None:
    """List groups of pictures that are nearly the same.

    Every picture is compared with every other, which takes long from 100,000
    on; --memory compares each with its nearest alone.

    Example: clipworks index duplicates --threshold 0.95
    """
    from clipworks.search import Index

    opened = Index.open(index)
    if memory:
        opened.hold()
    with console.progress("comparing") as advance:
        groups = opened.near_duplicates(threshold, where, advance)
    if as_json:
        console.print_json({"threshold": threshold, "groups": groups})
        return
    for group in groups:
        typer.echo("\n".join(group) + "\n")
    console.note(f"{len(groups)} groups of {sum(map(len, groups))} pictures in all")


@app.command(cls=console.Command)
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write, such as index.parquet.")],
    index: IndexOption = DEFAULT,
    where: WhereOption = None,
    vectors: Annotated[bool, typer.Option(help="Write the vectors too.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Write the index as one Parquet file.

    Example: clipworks index export cars.parquet --where "caption like '%car%'"
    """
    from clipworks.search import Index

    rows = Index.open(index).export(file, where, vectors=vectors)
    if as_json:
        console.print_json({"file": str(file), "rows": rows})
        return
    typer.echo(f"{file}: {rows:,} rows")


@app.command(cls=console.Command)
def info(index: IndexOption = DEFAULT, as_json: JsonOption = False) -> None:
    """Say what an index holds, with which model it was made, and how much a search finds.

    Example: clipworks index info --index ~/pictures-index
    """
    from clipworks.search import Index

    opened = Index.open(index)
    about = opened.info()
    if as_json:
        console.print_json(about)
        return
    table = console.make_table("", "")
    table.show_header = False
    rows = {
        "index": about["path"],
        "pictures": f"{about['pictures']:,}",
        "texts": f"{about['texts']:,}",
        "model": f"{about['model']} ({about['fingerprint'][:12]})",
        "vector width": str(about["width"]),
        "fields": ", ".join(about["fields"]) or "none",
        "on disk": "remote" if about["bytes"] is None else f"{about['bytes'] / 1e6:.1f} MB",
        "search": _said(opened.settings),
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


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return [line.strip() for line in lines if line.strip()]


def _said(settings: Settings | None) -> str:
    if settings is None:
        return "exact: every row is compared"
    texts = "" if settings.recall_texts is None else f", {settings.recall_texts:.3f} for texts"
    return (
        f"IVF-RQ, {settings.probes} of {settings.partitions} cells; measured recall@10"
        f" {settings.recall_rows:.3f} for pictures{texts}"
    )


def _report(index: Index, report: Report, engines: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "index": index.location,
                "model": index.model,
                "items": len(index),
                "embedded": report.embedded,
                "reused": report.reused,
                "unchanged": report.unchanged,
                "removed": report.removed,
                "skipped": [{"path": path, "reason": reason} for path, reason in report.skipped],
                "emptied": report.emptied,
                "seconds": round(report.seconds, 3),
                "engines": engines,
            }
        )
        return
    typer.echo(
        f"{index.location}: {len(index):,} items; {report.embedded:,} embedded, {report.reused:,} reused,"
        f" {report.unchanged:,} unchanged, {report.removed:,} removed in {report.seconds:.1f} s"
    )
    if report.skipped:
        reasons = "; ".join(reason for _, reason in report.skipped[:3])
        more = f"; and {len(report.skipped) - 3} more" if len(report.skipped) > 3 else ""
        console.note(f"skipped {len(report.skipped)} of {report.seen}: {reasons}{more}")
    for name, count in report.emptied.items():
        console.note(f"field {name}: left empty {count} times, for the values were of another type")


def _show(hits: Sequence[Hit]) -> None:
    from rich.text import Text

    pictures = all(hit.kind == "image" for hit in hits)
    table = console.make_table(">", ">cosine", "picture" if pictures else "found", ">size")
    for place, hit in enumerate(hits, 1):
        size = f"{hit.width}×{hit.height}" if hit.kind == "image" else "text"
        name = hit.path if hit.kind == "image" else hit.caption or hit.path
        table.add_row(str(place), f"{hit.score:.3f}", Text(name), size)
    if hits:
        console.show(table)
    else:
        console.note("nothing was found")
