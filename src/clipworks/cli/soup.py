"""`clipworks soup`: several fine-tunings of one model averaged into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import DeviceOption, JsonOption, ModelOption, PrecisionOption
from clipworks.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from clipworks.core.clip import Clip


def soup(
    weights: Annotated[
        list[Path], typer.Argument(metavar="WEIGHTS", help="Files of weights, fine-tuned from one start.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="Labeled pictures that nothing was trained on, which choose among the files: a folder with "
            "a folder a class, or Parquet. Without it all are averaged.",
        ),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the classes, if --data has numbers.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the soup goes.")] = Path(
        "soup.safetensors"
    ),
    model: ModelOption = console.SEEDLING,
    strict: Annotated[
        bool, typer.Option("--strict/--ties", help="A file must raise the accuracy, or may leave it.")
    ] = True,
    precision: PrecisionOption = "fp32",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Average fine-tuned weights into one model, as good at one model's cost.

    With --data the soup is greedy: from the best file down, each is averaged
    in if zero-shot accuracy rises. --model is the Clip that the weights fit.

    Example: clipworks soup a.safetensors b.safetensors --data held/
    """
    chosen = console.check_precision(precision)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out is a .safetensors file, not {out}")
    if data is None and classes is not None:
        raise ConfigError("--classes names the classes of --data, which is not given")

    from clipworks.methods.adapt.model_soups import soup_of

    accuracy = None if data is None else _accuracy(console.load_clip(model, device), data, classes, chosen)
    made = soup_of(weights, out, accuracy, strict=strict)
    members = [str(weights[place]) for place in made.members]
    if as_json:
        alone = dict(zip(map(str, weights), made.accuracies, strict=False))
        trials = [{"file": str(weights[i]), "accuracy": a, "kept": kept} for i, a, kept in made.history]
        console.print_json({"out": str(out), "members": members, "accuracies": alone, "trials": trials})
        return
    if made.history:
        table = console.make_table("file", ">alone %", ">with it %", "kept")
        for place, found, kept in made.history:
            row = (100 * made.accuracies[place], 100 * found)
            table.add_row(str(weights[place]), *(f"{one:.1f}" for one in row), "yes" if kept else "no")
        console.show(table)
    typer.echo(f"{out}: the average of {len(members)} of {len(weights)} files")


def _accuracy(
    clip: Clip, data: str, classes: Path | None, precision: Any
) -> Callable[[Mapping[str, Tensor]], float]:
    from clipworks.evaluate.sets import labeled_set
    from clipworks.evaluate.zeroshot import labeled_batches, zero_shot

    source, texts = labeled_set(data, classes)
    batches = list(labeled_batches(clip, source)[0])

    def accuracy(weights: Mapping[str, Tensor]) -> float:
        try:
            clip.load_state_dict(dict(weights))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"the weights are not those of --model: {reason}") from error
        return zero_shot(clip, batches, texts, precision=precision).top1

    return accuracy
