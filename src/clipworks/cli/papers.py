"""`clipworks papers`: the register, with what works and what the proofs said."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from clipworks.errors import ConfigError, nearest
from clipworks.papers import FAMILIES, STATUSES, Paper, register

_STYLES = {
    "works": "green", "partial": "yellow", "planned": "dim",
    "holds": "green", "does not hold": "red", "undecided": "yellow",
}  # fmt: skip


def papers(
    family: Annotated[str | None, typer.Option(help=f"Only this family: {', '.join(FAMILIES)}.")] = None,
    status: Annotated[str | None, typer.Option(help=f"Only these: {', '.join(STATUSES)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of records for machines.")] = False,
) -> None:
    """List the papers, by family: which work, whose checkpoints load, what their proofs said.

    Example: clipworks papers --family adapt --status works
    """
    _known("family", family, FAMILIES)
    _known("status", status, STATUSES)
    chosen = [
        paper
        for paper in register()
        if (family is None or paper.family == family) and (status is None or paper.status == status)
    ]
    if as_json:
        typer.echo(json.dumps([paper.to_dict() for paper in chosen], indent=2, ensure_ascii=False))
        return
    _show(chosen, Console())


def _show(chosen: list[Paper], console: Console) -> None:
    for name in FAMILIES:
        members = [paper for paper in chosen if paper.family == name]
        if not members:
            continue
        table = Table(
            title=f"{name}: {_counts(members)}", title_justify="left", title_style="bold", expand=True
        )
        table.add_column("slug", no_wrap=True)
        table.add_column("title", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("venue", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("weights", no_wrap=True)
        table.add_column("proof", no_wrap=True)
        for paper in members:
            proof = paper.proof
            weights = "released" if paper.checkpoint == "released" else "–"
            verdict = _styled(proof.verdict) if proof else "–"
            table.add_row(paper.slug, paper.title, paper.venue, _styled(paper.status), weights, verdict)
        console.print(table)
    console.print(f"{len(chosen)} papers: {_counts(chosen)}" if chosen else "no paper fits")


def _counts(members: list[Paper]) -> str:
    counts = Counter(paper.status for paper in members)
    return ", ".join(f"{counts[status]} {status}" for status in reversed(STATUSES) if counts[status])


def _styled(word: str) -> str:
    return f"[{_STYLES[word]}]{word}[/]"


def _known(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        close = nearest(value, allowed) or f"; choose from {', '.join(allowed)}"
        raise ConfigError(f"--{option} {value!r} is unknown{close}")
