"""A report as one HTML file that needs nothing beside it: tables, curves, numbers.

Plots are drawn by Matplotlib and lie in the file as PNG. The same sections give the same bytes; whoever
wants the time in it puts it there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipworks.errors import require


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; a column whose name begins with `>` is set to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of one line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """Curves in one frame; `level` is a dashed horizontal line, `log` names the logarithmic axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: str = ""
    level: float | None = None
    note: str = ""


Section = Table | Plot

_POINTS = 400  # of a curve
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 }
td, th { padding: .15rem .9rem .15rem 0; text-align: left }
thead th { border-bottom: 1px solid #999 }
.right { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% } p.note { color: #555 }
"""


def ranked(label: str, counts: NDArray[Any]) -> Curve:
    """Counts (n,) that are not 0, from the largest down, against their rank."""
    falling = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(1, len(falling)), _POINTS).astype(np.int64))[: len(falling)]
    return Curve(label, ranks.tolist(), falling[ranks - 1].tolist())


def cumulative(label: str, counts: NDArray[Any]) -> Curve:
    """The share in their sum of the smallest counts (n,), against the share of them that is summed."""
    shares = np.cumsum(np.sort(counts)) / max(1, int(counts.sum()))
    places = np.unique(np.linspace(0, len(counts) - 1, _POINTS).astype(np.int64))
    return Curve(label, ((places + 1) / len(counts)).tolist(), shares[places].tolist())


def check_plots() -> None:
    """Raises: MissingExtra: if plots cannot be drawn; to be asked before the work and not after it."""
    require("matplotlib", extra="evaluate", purpose="the data card's plots")


def html(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body.append(_table(section) if isinstance(section, Table) else _plot(section))
        if section.note:
            body.append(f'<p class="note">{escape(section.note)}</p>')
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    lines = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{lines}\n</body></html>\n'


def _table(table: Table) -> str:
    right = [' class="right"' if column.startswith(">") else "" for column in table.columns]
    names = (escape(column.removeprefix(">")) for column in table.columns)
    head = "".join(f"<th{side}>{name}</th>" for side, name in zip(right, names))
    rows = (
        "<tr>" + "".join(f"<td{side}>{_cell(cell)}</td>" for side, cell in zip(right, row)) + "</tr>"
        for row in table.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _plot(plot: Plot) -> str:
    check_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for curve in plot.curves:
        axes.plot(curve.x, curve.y, label=curve.label)
    if plot.level is not None:
        axes.axhline(plot.level, color="gray", linestyle="--", linewidth=1)
    if "x" in plot.log:
        axes.set_xscale("log")
    if "y" in plot.log:
        axes.set_yscale("log")
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    if plot.curves:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    picture = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{picture}">'
