"""`clipworks export`: a model in the files of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import JsonOption
from clipworks.errors import ConfigError


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name (see `clipworks models`), a file or a folder.")
    ],
    onnx: Annotated[
        Path | None, typer.Option("--onnx", metavar="OUT", help="Folder for both towers as ONNX files.")
    ] = None,
    transformers: Annotated[
        Path | None, typer.Option("--transformers", metavar="OUT", help="Folder that transformers reads.")
    ] = None,
    open_clip: Annotated[
        Path | None, typer.Option("--open-clip", metavar="OUT", help="Folder that open_clip reads.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="OUT", help="Folder that clipworks reads.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="NAME", help="The known model whose settings a bare file shares."),
    ] = None,
    activation: Annotated[
        str | None, typer.Option("--activation", metavar="NAME", help="quick_gelu or gelu, for a bare file.")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option("--statistics", metavar="NAME", help="clip or half, for a bare file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in the files of another tool.

    ONNX files are compared with the model before they count as written; --folder turns a bare
    file of weights, whose settings --like names, into a folder that needs no more options.

    Example: clipworks export seedling --onnx seedling-onnx
    """
    if not any((onnx, transformers, open_clip, folder)):
        raise ConfigError("nothing to write: give --onnx, --transformers, --open-clip or --folder")
    from clipworks.checkpoints.zoo import load

    clip = load(model, like=like, activation=activation, statistics=statistics)  # type: ignore[arg-type]
    written: dict[str, Any] = {"model": model}
    if folder is not None:
        written["folder"] = str(clip.save(folder))
    if transformers is not None:
        written["transformers"] = str(clip.save_pretrained_hf(transformers))
    if open_clip is not None:
        written["open_clip"] = str(clip.save_open_clip(open_clip))
    if onnx is not None:
        from clipworks.checkpoints.onnx import export as to_onnx

        done = to_onnx(clip, onnx)
        written["onnx"] = str(onnx)
        written["difference"] = max(done.image_difference, done.text_difference)
    if as_json:
        console.print_json(written)
        return
    for kind, place in written.items():
        if kind not in ("model", "difference"):
            typer.echo(f"{kind.replace('_', '-')}: {place}")
    if "difference" in written:
        typer.echo(f"onnxruntime and torch differ by at most {written['difference']:.1e}")
