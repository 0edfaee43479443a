"""`clipworks prove`: rerun the experiment behind a paper's claim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli.console import JsonOption, make_table, print_json, progress, show
from clipworks.errors import ConfigError


def prove(
    slug: Annotated[str | None, typer.Argument(help="A paper (see `clipworks papers`).")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="First seed: 1000 and above to publish, 0 to 99 to develop.")
    ] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, one after the other.")] = 5,
    budget: Annotated[str, typer.Option(metavar="small|full", help="Size of the experiment.")] = "small",
    data: Annotated[Path | None, typer.Option(help="Folder of real data, where a proof takes it.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results (docs/proofs of a checkout, else ./proofs).")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper that has a proof.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare a paper's method with its baseline over several seeds, and say whether the claim holds.

    What was computed before is not computed again, so an interrupted proof goes on where it was.

    Example: clipworks prove clip
    """
    from clipworks.proofs.base import proof_of, proven
    from clipworks.proofs.runner import prove as run

    if everything == (slug is not None):
        raise ConfigError("name one paper, or give --all")
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data} is not a folder")
    results = []
    for name in proven() if everything else [str(slug)]:
        proof = proof_of(name)
        with progress(name) as advance:
            results.append(
                run(
                    proof,
                    range(seed, seed + seeds),
                    budget=budget,  # type: ignore[arg-type]
                    data=data,
                    out=out,
                    advance=advance,
                )
            )
    if as_json:
        print_json(results if everything else results[0])
    else:
        _show(results)


def _show(results: list[dict[str, Any]]) -> None:
    table = make_table("paper", ">baseline", ">method", ">difference", "95 % interval", ">seeds", "verdict")
    for result in results:
        interval = result["interval"]
        table.add_row(
            result["slug"],
            f"{result['baseline']:.4g}",
            f"{result['method']:.4g}",
            f"{result['difference']:+.4g}",
            f"{interval[0]:+.4g} to {interval[1]:+.4g}" if interval else "needs two seeds",
            str(len(result["seeds"])),
            result["verdict"] + ("" if result["published"] else " (development)"),
        )
    show(table)
    for result in results:
        compared = f"{result['method_name']} against {result['baseline_name']}"
        show(f"{result['slug']}: {result['metric']}; {compared}")
