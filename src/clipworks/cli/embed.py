"""`clipworks embed`: the vectors of all pictures of shards or folders, on one machine or a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import (
    BatchOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
)
from clipworks.errors import ConfigError

RUNNERS = ("local", "ray")


def embed(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="PLACE",
            help="Shards (.tar, .parquet; patterns, {000..099}), folders of shards or pictures.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of vectors; an interrupted run is continued.")],
    model: ModelOption = console.SEEDLING,
    format: Annotated[
        str, typer.Option("--format", metavar="parquet|lance", help="A file for each shard, or one table.")
    ] = "parquet",
    texts: Annotated[bool, typer.Option("--texts", help="Encode captions too.")] = False,
    runner: Annotated[
        str, typer.Option(metavar="|".join(RUNNERS), help="ray: spread the shards over a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes of ray; 0 is as many as there is room for.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Processor cores of each process of ray.")] = 1,
    precision: PrecisionOption = "fp32",
    engine: EngineOption = "torch",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Write the vectors of all pictures as Parquet, or as a Lance table.

    A run that was interrupted goes on where it was. Records that cannot be read are left out and reported.
    With ray, all machines must see the shards and the folder; RAY_ADDRESS names a cluster.

    Example: clipworks embed "shards/{000..099}.tar" --out vectors --runner ray --workers 8
    """
    chosen = console.check_precision(precision)
    if runner != "ray" and (workers or threads > 1):
        raise ConfigError("--workers and --threads are for --runner ray; local takes all cores as it is")
    gpu = {"auto": None, "cuda": True, "cpu": False}
    if runner == "ray" and device not in gpu:
        raise ConfigError(f"--device {device!r}: with ray it is auto, cpu or cuda (a GPU for each process)")

    from clipworks.search.embedding import Workers
    from clipworks.search.embedding import embed as run

    clip = console.load_clip(model, "cpu" if runner == "ray" else device)
    used = console.ready_engines(clip, engine, chosen, batch_size, texts)
    with console.progress("embedding") as advance:
        done = run(
            clip,
            places,
            out,
            format=format,  # type: ignore[arg-type]  # checked there
            texts=texts,
            batch_size=batch_size,
            precision=chosen,
            engine=engine,  # type: ignore[arg-type]  # checked
            runner=runner,  # type: ignore[arg-type]
            workers=Workers(workers or None, threads, gpu.get(device)),
            advance=advance,
        )
    skipped = done.skipped
    if as_json:
        result: dict[str, Any] = {
            "out": str(out),
            "shards": done.pieces,
            "reused_shards": done.reused,
            "rows": done.rows,
            "computed": done.computed,
            "skipped": skipped.counts,
            "first_skipped": skipped.first,
            "seconds": round(done.seconds, 3),
            "engines": used,
        }
        console.print_json(result)
        return
    speed = f", {done.computed / done.seconds:,.0f} a second" if done.computed else ""
    typer.echo(
        f"{out}: {done.rows:,} vectors of {done.pieces:,} pieces; {done.computed:,} of them new in"
        f" {done.seconds:.1f} s{speed}"
    )
    console.note(str(skipped) if skipped.counts else "")
