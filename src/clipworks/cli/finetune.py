"""`clipworks finetune`: a model further trained on one's own pictures and captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import JsonOption, PrecisionOption
from clipworks.errors import ConfigError

if TYPE_CHECKING:
    from clipworks.methods.pretrain.finetune import Tuned


def finetune(
    data: Annotated[
        str, typer.Option(metavar="PAIRS", help="Table (.csv .tsv .json .jsonl), folder, or shards.")
    ],
    init: Annotated[str, typer.Option(metavar="NAME", help="The model to start from.")] = console.SEEDLING,
    out: Annotated[
        Path, typer.Option(help="Folder of the result; an interrupted training is continued.")
    ] = Path("finetuned"),
    image: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of file names.")] = None,
    caption: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN...", help="Columns of captions, all of them counting.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="PAIRS", help="Pairs that choose the result; else some of --data.")
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="PAIRS", help="Pairs for the report alone.")] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="SET", help="Labeled pictures by which forgetting is measured; folder, Parquet."
        ),
    ] = None,
    probe_classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the probe's classes, if they are numbers.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs, at most.")] = 30,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs compared with each other.")] = 256,
    at_once: Annotated[
        int, typer.Option(min=1, help="Pairs encoded at once: memory, not the gradient, depends on it.")
    ] = 64,
    forget: Annotated[
        float, typer.Option(metavar="POINTS", help="How far the probe may fall, in percentage points.")
    ] = 1.0,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without gain that end the training.")] = 5,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the pictures.")] = True,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train also at 1e-4 without the guards, for the report.")
    ] = False,
    resume: Annotated[str, typer.Option(metavar="auto|yes|no", help="Continue what --out holds.")] = "auto",
    precision: PrecisionOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the split, the order and the views.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model on your own pairs without losing what it knew.

    A picture may have several captions. The result lies between the start and
    the trained model, where it is best on pairs held out and the probe has not
    fallen by more than --forget.

    Example: clipworks finetune --init ViT-B-32/openai --data my.csv --out mine
    """
    if resume not in ("auto", "yes", "no"):
        raise ConfigError(f"--resume must be auto, yes or no, not {resume!r}")
    if (probe is None) and probe_classes is not None:
        raise ConfigError("--probe-classes names the classes of --probe, which is not given")
    chosen = console.check_precision(precision)

    from clipworks.checkpoints.zoo import load
    from clipworks.data.pairs import open_pairs
    from clipworks.evaluate.held import labeled_probe
    from clipworks.evaluate.sets import labeled_set
    from clipworks.methods.pretrain import finetune as method

    settings = method.FineTuning(
        epochs=epochs,
        batch_size=batch_size,
        at_once=at_once,
        lr=lr,
        forget=forget / 100,
        patience=patience,
        flip=flip,
        precision=chosen,
        seed=seed,
    )
    pairs, *others = [
        None if location is None else open_pairs(location, image=image, captions=caption or ())
        for location in (data, validation, test)
    ]
    if pairs is None:
        raise ConfigError("--data names no pairs")
    if pairs.skipped.total:
        console.note(f"{data}: {len(pairs)} pictures with captions, {pairs.skipped}")
    clip = load(init)
    labeled = None
    if probe is not None:
        labeled = labeled_probe(clip, *labeled_set(probe, probe_classes), seed=seed)
    tuned = method.finetune(
        clip,
        pairs,
        out,
        settings,
        method.Measures(validation=others[0], probe=labeled, test=others[1]),
        compare=compare,
        resume={"auto": "auto", "yes": True, "no": False}[resume],  # type: ignore[arg-type]
        show="nothing" if as_json else "auto",
    )
    _say(tuned, as_json)


def _say(tuned: Tuned, as_json: bool) -> None:
    if as_json:
        result: dict[str, Any] = {
            "clip": str(tuned.folder / "clip"),
            "report": str(tuned.report),
            "share": tuned.share,
            "epochs": tuned.epochs,
            "table": tuned.table,
        }
        console.print_json(result)
        return
    columns = [name for name in tuned.table["start"] if name.endswith(("recall", "@1")) or "probe" in name]
    table = console.make_table("", *(f">{name} %" for name in columns))
    for model, row in tuned.table.items():
        table.add_row(model, *(f"{100 * row[name]:.1f}" for name in columns))
    console.show(table)
    where = (
        f"{tuned.share:.0%} of the way from the start"
        if tuned.share
        else "the start itself: nothing was better"
    )
    typer.echo(f"{tuned.epochs} epochs; the result is {where}: {tuned.folder / 'clip'}; see {tuned.report}")
