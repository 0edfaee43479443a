"""`clipworks pretrain`: a Clip from pictures and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def pretrain(
    plan: Annotated[Path, typer.Argument(help="YAML file: model, tokenizer, data and recipe.")],
    data: Annotated[Path, typer.Option(help="Folder that the paths in the plan start from.")] = Path(),
    out: Annotated[
        Path, typer.Option(help="Folder of the training; an interrupted one is continued.")
    ] = Path("run"),
    objective: Annotated[str | None, typer.Option(help="Objective in place of the plan's.")] = None,
    init: Annotated[str | None, typer.Option(help="Model to start from instead of fresh weights.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in place of the plan's.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs in place of the plan's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate in place of the plan's.")] = None,
    resume: Annotated[str, typer.Option(help="auto, yes or no.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a Clip from scratch, or further.

    \b
    clipworks pretrain seedling.yaml --data shelf/ --out runs/seedling
    """
    from dataclasses import replace

    from clipworks.errors import ConfigError
    from clipworks.methods.pretrain.plan import read_plan, train

    if resume not in ("auto", "yes", "no"):
        raise ConfigError(f"resume must be auto, yes or no, not {resume!r}")
    overrides = {
        key: value for key, value in (("steps", steps), ("epochs", epochs), ("lr", lr)) if value is not None
    }
    chosen = read_plan(plan, overrides)
    if objective is not None:
        chosen = replace(chosen, objective=objective)
    result = train(
        chosen,
        data,
        out,
        init=init,
        resume={"auto": "auto", "yes": True, "no": False}[resume],  # type: ignore[arg-type]
        show="nothing" if as_json else "auto",
    )
    summary = {
        "clip": str(result.folder / "clip"),
        "steps": result.step,
        "samples": result.samples,
        "loss": result.loss,
        "seconds": round(result.seconds, 1),
        **result.metrics,
    }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(
            f"{result.step} steps, {result.samples} examples in {result.seconds:.0f} s, "
            f"loss {result.loss:.3f}: {result.folder / 'clip'}"
        )
