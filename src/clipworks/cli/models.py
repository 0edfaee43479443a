"""`clipworks models`: which models there are, and where their weights come from."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clipworks.cli import console
from clipworks.cli.console import JsonOption

if TYPE_CHECKING:
    from collections.abc import Sequence


def models(as_json: JsonOption = False) -> None:
    """List the models that can be loaded by name.

    Besides these names, --model takes a folder that `Clip.save` wrote, and
    checkpoint files of other tools.

    Example: clipworks models --json
    """
    from clipworks.checkpoints import zoo

    records = [asdict(model) for model in zoo.models()]
    if as_json:
        console.print_json(records)
    else:
        _show(records)


def _show(records: Sequence[dict[str, Any]]) -> None:
    from rich.text import Text

    columns = list(records[0]) if records else []
    numbers = {name for name in columns if any(isinstance(record[name], int) for record in records)}
    table = console.make_table(*(f">{name}" if name in numbers else name for name in columns))
    for record in records:
        table.add_row(*(Text(_cell(record[name])) for name in columns))
    console.show(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else str(value)
