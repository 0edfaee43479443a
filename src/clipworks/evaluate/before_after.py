"""A page that shows what a training changed: numbers, curves, and queries before and after as pictures."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipworks.errors import require
from clipworks.evaluate.held import HeldPairs
from clipworks.evaluate.retrieval import ranks

_SHOWN = 5  # pictures of an answer
_SIDE = 128  # of a thumbnail, in pixels
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222 }
body { max-width: 1000px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% }
h3 { margin: 1.4em 0 0; font-size: 1em }
.note { color: #666; margin: .2em 0 }
.answers { display: flex; gap: 6px; margin: .3em 0 }
.answers b { width: 4.5em; font-weight: 400; color: #666 }
.answers img { width: 110px; height: 110px; border: 3px solid #fff }
.answers img.own { border-color: #1e9646 }
"""


@dataclass(frozen=True)
class Change:
    """One query before and after.

    Attributes:
        text: the query.
        own: the pictures that belong to it.
        before, after: rank of the best of them, from 1.
        answers_before, answers_after: the first pictures of the ranking, places in the gallery.
    """

    text: str
    own: tuple[int, ...]
    before: int
    after: int
    answers_before: tuple[int, ...]
    answers_after: tuple[int, ...]


def changes(held: HeldPairs, before: Tensor, after: Tensor, count: int = 8) -> list[Change]:
    """Queries whose answers changed most: two thirds of them for the better, the rest for the worse.

    Args:
        held: captions and pictures.
        before: cosines (m, n) of the m captions with the n pictures.
        after: the same of the other model.
        count: how many there are at most.

    Returns:
        First those that got better, then those that got worse, the largest changes of log-rank first; of a
        kind that is rarer, fewer. None of a kind ask for the same picture.
    """
    was, now = ranks(before, held.matches), ranks(after, held.matches)
    gain = was.double().log() - now.double().log()
    order = gain.argsort(descending=True, stable=True).tolist()
    rising, falling = -(-2 * count // 3), count // 3
    better = _apart([row for row in order if gain[row] > 0], held, rising)
    worse = _apart([row for row in reversed(order) if gain[row] < 0], held, falling)
    first = min(_SHOWN, before.shape[1])
    return [
        Change(
            held.texts[row],
            _own(held, row),
            int(was[row]),
            int(now[row]),
            tuple(before[row].topk(first).indices.tolist()),
            tuple(after[row].topk(first).indices.tolist()),
        )
        for row in [*better, *worse]
    ]


def _own(held: HeldPairs, row: int) -> tuple[int, ...]:
    return tuple(held.matches[row].nonzero().flatten().tolist())


def _apart(rows: Sequence[int], held: HeldPairs, most: int) -> list[int]:
    """The first `most` captions that share no picture."""
    chosen: list[int] = []
    taken: set[int] = set()
    for row in rows:
        own = set(_own(held, row))
        if len(chosen) < most and not own & taken:
            chosen.append(row)
            taken |= own
    return chosen


@dataclass(frozen=True)
class Curves:
    """What happened during a training and on the line between start and result.

    Attributes:
        loss: pairs (step, loss).
        metrics: rows of numbers by name, one an evaluation, each with `step`.
        line: rows `share`, and numbers by name.
        chosen: the share that was taken; None where there is no line.
        least: what the last name of `metrics` was not to fall below; None for no bound.
    """

    loss: Sequence[tuple[float, float]]
    metrics: Sequence[Mapping[str, float]]
    line: Sequence[Mapping[str, float]] = field(default_factory=tuple)
    chosen: float | None = None
    least: float | None = None


def draw_curves(curves: Curves, names: Sequence[str], path: Path) -> None:
    """Draw loss, the named metrics beside it, and the line, as one PNG.

    Raises:
        MissingExtra: without matplotlib.
    """
    require("matplotlib", extra="train", purpose="the plot of a fine-tuning")
    from matplotlib.figure import Figure

    count = 2 + bool(curves.line)
    figure = Figure(figsize=(4.2 * count, 3.4), layout="constrained")
    axes = figure.subplots(1, count)
    axes[0].plot(*zip(*curves.loss), linewidth=0.9) if curves.loss else None
    axes[0].set(title="training loss", xlabel="step")
    for place, name in enumerate(names):
        steps, values = (
            zip(*((row["step"], row[name]) for row in curves.metrics)) if curves.metrics else ((), ())
        )
        axes[1].plot(steps, [100 * value for value in values], marker=".", label=name, color=f"C{place}")
        if curves.line:
            shares = [row["share"] for row in curves.line]
            axes[2].plot(
                shares, [100 * row[name] for row in curves.line], marker=".", label=name, color=f"C{place}"
            )
    axes[1].set(title="held out, every epoch (%)", xlabel="step")
    if curves.line:
        axes[2].set(title="between start (0) and best epoch (1)", xlabel="share")
        if curves.chosen is not None:
            axes[2].axvline(curves.chosen, color="0.4", linestyle=":", label="taken")
    for one in axes[1:]:
        if curves.least is not None:
            one.axhline(100 * curves.least, color=f"C{len(names) - 1}", linewidth=0.7, linestyle="--")
        one.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=110)


def write_report(
    folder: Path,
    title: str,
    notes: Sequence[str],
    table: Mapping[str, Mapping[str, float]],
    plot: Path | None,
    shown: Sequence[Change],
    pixels: Tensor,
) -> Path:
    """Write `report.html`, one file that needs no other.

    Args:
        folder: where to.
        title: heading.
        notes: sentences below it.
        table: models by name, their numbers in [0, 1] by name.
        plot: a PNG that is taken in.
        shown: queries before and after.
        pixels: (n, 3, s, s) uint8, the gallery.
    """
    escape = html.escape
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *columns])
    rows = "".join(
        f"<tr><td>{escape(model)}</td>"
        + "".join(f"<td>{_percent(row.get(name, math.nan))}</td>" for name in columns)
        + "</tr>"
        for model, row in table.items()
    )
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        f"<table><tr>{head}</tr>{rows}</table>",
    ]
    if plot is not None:
        parts.append(f'<img alt="curves" src="{_inline(plot.read_bytes())}">')
    for heading, wanted in (("Better now", True), ("Worse now", False)):
        kind = [one for one in shown if (one.after < one.before) == wanted]
        if kind:
            parts.append(
                f"<h2>{heading}</h2><p class=note>Held-out captions, the first pictures found for each;"
                " its own picture is framed.</p>"
            )
        parts += [_shown(one, pixels) for one in kind]
    path = folder / "report.html"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _shown(one: Change, pixels: Tensor) -> str:
    def answers(name: str, places: Sequence[int]) -> str:
        pictures = "".join(
            f'<img {"class=own " if place in one.own else ""}alt="" src="{_thumbnail(pixels[place])}">'
            for place in places
        )
        return f"<div class=answers><b>{name}</b>{pictures}</div>"

    return (
        f"<h3>{html.escape(one.text)}</h3><p class=note>rank {one.before} before, {one.after} after</p>"
        + answers("before", one.answers_before)
        + answers("after", one.answers_after)
    )


def _thumbnail(pixels: Tensor) -> str:
    picture = Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    if picture.width > _SIDE:
        picture = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return _inline(stream.getvalue())


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f} %"
