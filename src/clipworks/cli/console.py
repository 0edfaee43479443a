"""What the commands share: options of one meaning, tables and bars for people, JSON for machines.

Results go to stdout, everything else (bars, notes, what was skipped) to stderr, so that stdout of a command
with `--json` is JSON and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from typer.core import TyperCommand

from clipworks.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from clipworks.core.clip import Clip

SEEDLING = "seedling"
PRECISIONS = ("fp32", "bf16", "auto")

ModelOption = Annotated[
    str, typer.Option("--model", metavar="NAME", help="A name (see `clipworks models`), a file or a folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
PrecisionOption = Annotated[
    str,
    typer.Option("--precision", metavar="|".join(PRECISIONS), help="auto: bf16 where it pays and agrees."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 …; auto: a GPU if there is one.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="torch, compile, onnxruntime, openvino, onnxruntime-int8; auto: the fastest exact one here.",
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Pictures encoded at once.")]


class Command(TyperCommand):
    """A command in which an option whose metavar ends in `...` takes every value that follows it.

    `--labels "a cat" "a dog"` is read as `--labels "a cat" --labels "a dog"`; the next option, or a bare
    `--`, ends the list.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat such options before each of their values, then parse as usual."""
        greedy = {
            spelling
            for parameter in self.params
            if (getattr(parameter, "metavar", None) or "").endswith("...")
            for spelling in parameter.opts
            if spelling.startswith("-")
        }
        return super().parse_args(ctx, repeated(args, greedy))


def repeated(args: Sequence[str], greedy: set[str]) -> list[str]:
    """Arguments in which each option of `greedy` stands before each of the values that follow it.

    >>> repeated(["x.jpg", "--labels", "cat", "dog", "--top", "2"], {"--labels"})
    ['x.jpg', '--labels', 'cat', '--labels', 'dog', '--top', '2']
    """
    result: list[str] = []
    option, values = "", 0
    for place, argument in enumerate(args):
        if argument == "--":
            return [*result, *args[place:]]
        name = argument.partition("=")[0]
        if name in greedy:
            option, values = name, int("=" in argument)
            result.append(argument)
        elif argument.startswith("-") and argument != "-":
            option = ""
            result.append(argument)
        else:
            if option and values:
                result.append(option)
            result.append(argument)
            values += 1
    return result


def print_json(value: Any) -> None:
    """Write a value to stdout as indented JSON and nothing else."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8, or a terminal that is not
        text = json.dumps(value, indent=2, allow_nan=False)
    typer.echo(text)


def note(text: str) -> None:
    """One line to a person, on stderr; an empty text says nothing."""
    if text:
        typer.echo(" ".join(text.splitlines()), err=True)


def make_table(*columns: str, title: str = "") -> Table:
    """A table of the house's look; a column whose name begins with `>` is set to the right.

    Cells are shown as they are: wrap words of the user in `rich.text.Text`, so that brackets stay brackets.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False
    )
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def show(*things: Any) -> None:
    """Print tables and lines of markup to stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    for thing in things:
        console.print(thing)


def bar(share: float, width: int = 20) -> str:
    """A share in [0, 1] as a bar of `width` characters."""
    return "█" * round(share * width)


class Advance(Protocol):
    """Tells a bar how far the work is."""

    def __call__(self, done: int, total: int | None = None) -> None: ...


@contextmanager
def progress(description: str) -> Iterator[Advance]:
    """A bar on stderr while the block runs, if stderr is a terminal; it is gone afterwards."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total=None: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(description, total=None)

        def advance(done: int, total: int | None = None) -> None:
            shown.update(task, completed=done, total=total)

        yield advance


def check_precision(precision: str) -> Any:
    """Raises: ConfigError: if it is not one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ConfigError(
            f"--precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, not {precision!r}"
        )
    return precision


def ready_engines(
    clip: Clip, name: str, precision: str, batch_size: int, texts: bool
) -> dict[str, dict[str, Any]]:
    """Make the engines of `--engine` ready, and say to a person which they are; the same for machines.

    Raises:
        ConfigError: for an engine that cannot be used here, or another precision than fp32 for one.
        MissingExtra: for an engine that is not installed.
    """
    if name == "torch":
        return {}
    from clipworks.encode import engines

    engines.check(name, precision)
    found = {}
    for kind in ("image", "text") if texts else ("image",):
        engine = engines.ready(clip, kind, name, rows=batch_size, tell=note)  # type: ignore[arg-type]
        note(str(engine))
        found[kind] = engine.record()
    return found


def load_clip(model: str, device: str = "auto") -> Clip:
    """The model of `--model` on the device of `--device`.

    Raises:
        ModelNotFound, CheckpointError: as `clipworks.load`.
        ConfigError: for a device that is not there.
    """
    import torch

    from clipworks.checkpoints.zoo import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--device {device!r} cannot be used: {reason}") from error
    return load(model).to(place)
