"""`clipworks bench`: how good a model is on a set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import Command, DeviceOption, JsonOption, ModelOption, PrecisionOption
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


@app.command()
def world(
    model: ModelOption = console.SEEDLING,
    language: Annotated[list[str] | None, typer.Option(metavar="CODE...", help="en de fr zh.")] = None,
    count: Annotated[int, typer.Option(min=10, help="Scenes for each question.")] = 1000,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Name attributes of generated scenes, and tell their captions from swapped ones.

    Example: clipworks bench world --model seedling --language en de
    """
    from clipworks.data.world.words import check_language
    from clipworks.evaluate.world import report

    languages = tuple(language or ("en",))
    for code in languages:
        check_language(code)
    clip = console.load_clip(model, device)
    rows = []
    with console.progress("asking") as advance:
        for row in report(clip, languages, count):
            rows.append({"model": model, **row})
            advance(len(rows), 6 * len(languages) + 2)
    if as_json:
        console.print_json(rows)
        return
    table = console.make_table("what", "language", ">accuracy", ">chance", title=f"The world, {model}")
    for row in rows:
        table.add_row(row["what"], row["language"], f"{row['accuracy']:.1%}", f"{row['chance']:.1%}")
    console.show(table)


@app.command(cls=Command)
def adapt(
    methods: Annotated[
        list[str],
        typer.Option(metavar="METHOD...", help="zero-shot linear-probe coop gda …; `all` is every one."),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A folder with train/ and test/, or with a folder a class; Parquet; a set of CoOp's; "
            "world:STYLE for generated pictures."
        ),
    ],
    shots: Annotated[
        list[int] | None, typer.Option(metavar="SHOTS...", help="Labeled pictures a class; 1 2 4 8 16.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many draws, seeds 1, 2, 3 …")] = 3,
    base_to_new: Annotated[
        bool, typer.Option("--base-to-new", help="Fit to half of the classes, measure on both halves.")
    ] = False,
    test_pictures: Annotated[
        int | None, typer.Option(min=1, help="Measure on so many test pictures, the same for all.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of runs, features, table and plot; it is gone on with.")
    ] = Path("comparison"),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE...", help="Settings: coop.epochs=20."),
    ] = None,
    model: ModelOption = console.SEEDLING,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare methods that adapt a Clip: same shots, same seeds, same features.

    Runs that are there already are not computed again. Table, JSON, CSV and a plot are left in --out, of all
    runs of that folder on the same data and model, those of earlier calls too.

    Example: clipworks bench adapt --methods zero-shot linear-probe --data shots/ --shots 1 4 16
    """
    from clipworks.cli.fit import load_teacher, read_settings
    from clipworks.data.splits import halved, open_splits
    from clipworks.methods.adapt import comparison
    from clipworks.methods.adapt.base import method_named
    from clipworks.methods.adapt.base import methods as all_methods

    names = sorted(all_methods()) if methods == ["all"] else list(methods)
    chosen: dict[str, dict[str, Any]] = {}
    for one in settings or []:
        name, dot, setting = one.partition(".")
        if not dot:
            raise ConfigError(f"--set takes METHOD.NAME=VALUE, not {one!r}")
        chosen.setdefault(name, {}).update(read_settings(method_named(name), [setting]))
    chosen = {name: load_teacher(given, device) for name, given in chosen.items()}
    clip = console.load_clip(model, device)
    left_out: dict[str, str] | None = {} if methods == ["all"] else None
    splits = halved(open_splits(data, size=clip.preprocessing.image_size))
    with console.progress("comparing") as advance:
        runs = comparison.compare(
            clip,
            comparison.gather(data, splits, test_pictures),
            names,
            shots or [1, 2, 4, 8, 16],
            range(1, seeds + 1),
            out,
            settings=chosen,
            halves=base_to_new,
            left_out=left_out,
            advance=lambda done, total: advance(done, total),
        )
    for name, reason in sorted((left_out or {}).items()):
        console.note(f"left out: {name} ({reason})")
    runs = comparison.beside(runs, out)
    rows = comparison.summarize(runs)
    written = comparison.write(rows, runs, out)
    if as_json:
        console.print_json(rows)
        return
    measures = ("base", "new", "harmonic") if base_to_new else ("accuracy",)
    table = console.make_table(
        "method",
        ">shots",
        *(f">{measure}" for measure in measures),
        ">parameters",
        ">encode, s",
        ">fit, s",
        title=f"{data}, {model}, mean ± deviation over seeds",
    )
    table.columns[0].no_wrap = True
    for row in rows:
        spread = {name: f" ± {row[f'{name}_deviation']:.1%}" if row["seeds"] > 1 else "" for name in measures}
        cells = [f"{row[name]:.1%}{spread[name]}" for name in measures]
        table.add_row(
            row["method"],
            str(row["shots"] or "none"),
            *cells,
            f"{row['parameters']:,}",
            f"{row['encode_seconds']:.1f}",
            f"{row['fit_seconds']:.2f}",
        )
    console.show(table)
    console.note(f"written: {', '.join(str(path) for path in written)}")


@app.command(cls=Command)
def dense(
    methods: Annotated[
        list[str], typer.Option(metavar="METHOD...", help="maskclip clip-dinoiser fusioner denseclip …")
    ],
    data: Annotated[
        Path,
        typer.Option(help="Folder: train-*.tar, test-*.tar and classes.json, or images/ and masks/."),
    ],
    overlays: Annotated[
        int, typer.Option(min=0, help="Write so many test pictures, the truth beside what each method found.")
    ] = 0,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="So many pictures of each part, evenly spread; all by default.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of runs, fitted methods, plot and overlays; it is gone on with.")
    ] = Path("segmenters"),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE...", help="Settings: fusioner.epochs=5."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all methods.")] = 0,
    model: ModelOption = console.SEEDLING,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare methods that label pixels: mean IoU on a set's test part, beside two trivial answers.

    Methods that learn are fitted to the train part and saved in --out. Runs that are there are not computed
    again. A plot and the runs as JSON are left in --out.

    Example: clipworks bench dense --methods maskclip fusioner --data camvid --overlays 6
    """
    from dataclasses import fields

    from rich.text import Text

    from clipworks.cli.fit import read_values
    from clipworks.data.masked import open_masked
    from clipworks.methods.dense import comparison, method_named

    chosen: dict[str, dict[str, Any]] = {}
    for one in settings or []:
        name, dot, setting = one.partition(".")
        if not dot:
            raise ConfigError(f"--set takes METHOD.NAME=VALUE, not {one!r}")
        known = [field.name for field in fields(method_named(name)) if field.name != "clip"]
        chosen.setdefault(name, {}).update(read_values(name, known, [setting]))
    train, test = (open_masked(data, part).spread(pictures) for part in ("train", "test"))
    clip = console.load_clip(model, device)
    with console.progress("segmenting") as advance:
        runs = comparison.compare(
            clip,
            train,
            test,
            list(methods),
            out,
            name=data.name,
            seed=seed,
            settings=chosen,
            overlays=overlays,
            advance=lambda done, total: advance(done, total),
        )
    written = comparison.write(runs, out)
    if as_json:
        console.print_json(runs)
        return
    title = f"{data}, {model}, {len(test)} test pictures"
    columns = ("method", ">mean IoU", ">pixels right", ">fit, s", ">segment, s")
    table = console.make_table(*columns, title=title)
    for run in runs:
        table.add_row(
            Text(run["method"]),
            f"{run['mean_iou']:.1%}",
            f"{run['pixel_accuracy']:.1%}",
            f"{run['fit_seconds']:.1f}",
            f"{run['segment_seconds']:.1f}",
        )
    each = console.make_table("class", *(f">{run['method']}" for run in runs), title="IoU of each class")
    for label in runs[0]["per_class"]:
        values = [run["per_class"][label] for run in runs]
        each.add_row(Text(label), *("" if value is None else f"{value:.1%}" for value in values))
    console.show(table, each)
    console.note(f"written: {', '.join(str(path) for path in written)}")
