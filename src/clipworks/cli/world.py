"""`clipworks world`: looking at the generated world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clipworks.errors import ConfigError

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:  # without it, typer makes the only command the program itself
    """The generated world: pictures, words and truths made from numbers."""


@app.command()
def preview(
    what: Annotated[str, typer.Option(help="The kind: scenes, surfaces, captions …")] = "scenes",
    out: Annotated[Path, typer.Option(help="Where the sheet is written, a PNG.")] = Path("sheet.png"),
    count: Annotated[int, typer.Option(help="How many examples.")] = 24,
    seed: Annotated[int, typer.Option(help="Which world.")] = 0,
    size: Annotated[int, typer.Option(help="The side of one picture in pixels, 32 to 256.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Say where the sheet is as JSON.")] = False,
) -> None:
    """Draw a labeled sheet of examples.

    Example: clipworks world preview --what scenes --out sheet.png --count 24
    """
    from clipworks.data.world.kinds import kind

    found = kind(what)
    if not 1 <= count <= 400:
        raise ConfigError(f"--count {count} is outside 1..400")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} must end in .png")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    found.preview(count, seed, size).save(out)
    if as_json:
        typer.echo(json.dumps({"path": str(out), "kind": found.name, "count": count}))
    else:
        typer.echo(f"{out}: {count} {found.name}")
