"""`clipworks bench`: how good a model is on a set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import DeviceOption, JsonOption, ModelOption, PrecisionOption
from clipworks.errors import ConfigError, DataError

app = typer.Typer(no_args_is_help=True, help="Measure a model on a set.")


@app.command()
def zeroshot(
    data: Annotated[
        str, typer.Option(help="Parquet files (a file or a pattern), or a folder of class folders.")
    ],
    classes: Annotated[
        Path | None,
        typer.Option(help="Class names: JSON, or text with a name a line; folders name their own."),
    ] = None,
    model: ModelOption = console.SEEDLING,
    only: Annotated[str, typer.Option(help="Only these classes, among themselves: 9::10 or 3,5,7.")] = "",
    without: Annotated[str, typer.Option(help="Without these classes: 9::10 or 3,5,7.")] = "",
    templates: Annotated[
        str, typer.Option(help="photo (one), simple (7), imagenet (80), or a text file.")
    ] = "simple",
    synonyms: Annotated[bool, typer.Option(help="Average all names of a class, not the first alone.")] = True,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Classify a labeled set by the names of its classes.

    Example: clipworks bench zeroshot --data val-000.parquet --classes classes.json
    """
    from clipworks.evaluate.sets import labeled_set
    from clipworks.evaluate.zeroshot import labeled_batches, zero_shot

    console.check_precision(precision)
    source, texts = labeled_set(
        data, classes, only=only, without=without, templates=templates, synonyms=synonyms
    )
    clip = console.load_clip(model, device)
    with console.progress("classifying") as advance:
        batches, loader = labeled_batches(clip, source)

        def counted() -> Any:
            done = 0
            for pixels, labels in batches:
                yield pixels.to(clip.device), labels
                done += len(labels)
                advance(done, len(source))

        found = zero_shot(clip, counted(), texts, precision=precision)  # type: ignore[arg-type]
    if loader.skipped.total:
        console.note(str(loader.skipped))
    result = {
        "model": model,
        "top1": found.top1,
        "top5": found.top5,
        "samples": found.samples,
        "classes": len(texts),
        "skipped": loader.skipped.total,
        "seconds": found.seconds,
    }
    if as_json:
        console.print_json(result)
        return
    table = console.make_table("measure", ">value", title=f"Zero-shot, {model}, {len(texts)} classes")
    table.add_row("top-1", f"{found.top1:.2%}")
    table.add_row("top-5", f"{found.top5:.2%}")
    table.add_row("pictures", str(found.samples))
    table.add_row("seconds", f"{found.seconds:.1f}")
    console.show(table)


@app.command()
def retrieval(
    data: Annotated[Path, typer.Option(help="Folder: emoji with annotations.json, or shards with captions.")],
    model: ModelOption = console.SEEDLING,
    split: Annotated[
        str, typer.Option(help="Which shards; for emoji, `test` is the tenth held out.")
    ] = "test",
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE...", help="For emoji: en de fr es zh; all by default.")
    ] = None,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find pictures by their texts and texts by their pictures.

    Example: clipworks bench retrieval --data noto-emoji --language en de
    """
    from clipworks.evaluate.sets import caption_retrieval, emoji_retrieval

    console.check_precision(precision)
    if not data.is_dir():
        raise DataError(f"{data}: no such folder")
    clip = console.load_clip(model, device)
    if (data / "annotations.json").is_file():
        rows = emoji_retrieval(clip, data, language or None, held_out=split != "train", precision=precision)  # type: ignore[arg-type]
    elif language:
        raise ConfigError("--language is for emoji; these shards have one kind of captions")
    else:
        rows = caption_retrieval(clip, data, split, precision=precision)  # type: ignore[arg-type]
    if as_json:
        console.print_json([{"model": model, **row} for row in rows])
        return
    measures = [key for key in rows[0] if "recall" in key]
    table = console.make_table(
        "texts", ">pictures", *(f">{key.replace('_', ' ')}" for key in measures), title=model
    )
    for row in rows:
        table.add_row(str(row["texts"]), str(row["pictures"]), *(f"{row[key]:.1%}" for key in measures))
    console.show(table)
