"""`clipworks serve`: the HTTP service and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import DeviceOption, JsonOption
from clipworks.errors import ConfigError, DataError, require

TOKEN = "CLIPWORKS_TOKEN"
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="A name (see `clipworks models`), a file or folder. Default: the index's; else seedling.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="An index to search: a folder, or s3://…")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Hold the index's vectors in memory, as a graph (usearch).")
    ] = False,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Ask clients for the token in this file, or in ${TOKEN}."),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN...", help="Let pages of these sites use the service: https://here.org"),
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures from public addresses; never private ones.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Inputs that go through the model at once.")] = 32,
    wait: Annotated[float, typer.Option(min=0, help="Milliseconds an input waits for company.")] = 2.0,
    queue: Annotated[int, typer.Option(min=1, help="Inputs held at once; beyond it, 429.")] = 2048,
    max_megabytes: Annotated[float, typer.Option(help="Of one request; beyond it, 413.")] = 16.0,
    max_megapixels: Annotated[float, typer.Option(help="Of one picture; beyond it, 400.")] = 50.0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Serve a model over HTTP, with a page for people.

    Embeddings in OpenAI's shape, classification, few-shot classification,
    and search if there is an index. SIGTERM or Ctrl-C finishes what was
    accepted. The log goes to stderr, a line of JSON for each request.

    Example: clipworks serve --index clipworks-index --port 8000
    """
    require("fastapi", extra="serve", purpose="the service")
    token = read_token(token_file)

    from clipworks.serve.app import create_app
    from clipworks.serve.guard import State
    from clipworks.serve.measures import log_to_stderr
    from clipworks.serve.server import listen, run
    from clipworks.serve.settings import Limits

    limits = Limits(
        batch=batch,
        wait=wait / 1000,
        queue=queue,
        inputs=min(Limits.inputs, queue),
        body=int(max_megabytes * 2**20),
        pixels=int(max_megapixels * 10**6),
    )
    opened: Any = None
    if index is not None:
        from clipworks.search import Index

        opened = Index.open(index)
    name = model or (console.SEEDLING if opened is None else opened.model)
    clip = console.load_clip(name, device)
    if opened is not None:
        opened.bind(clip)
        if memory:
            opened.hold()
    state = State()
    app = create_app(
        clip,
        name=name,
        index=opened,
        limits=limits,
        token=token,
        origins=cors or (),
        urls=allow_urls,
        state=state,
    )
    listener = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    if token is None and host not in LOCAL:
        console.note(
            f"note: everybody who reaches {host} may use this service; --token-file asks for a token"
        )
    log_to_stderr()

    def ready() -> None:
        if as_json:
            console.print_json({"url": address, "model": name, "index": index, "token": token is not None})
        else:
            typer.echo(f"{name} at {address}; Ctrl-C ends it")

    run(app, listener, state, limits=limits, ready=ready)


def read_token(file: Path | None) -> str | None:
    """The token of a file or of the environment; None without one.

    Raises:
        DataError: if the file cannot be read.
        ConfigError: if the token is empty.
    """
    import os

    if file is None:
        if TOKEN not in os.environ:
            return None
        token = os.environ[TOKEN].strip()
    else:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{file}: no token there ({getattr(error, 'strerror', None) or error})"
            ) from error
    if not token:
        raise ConfigError(
            f"{file or TOKEN}: the token is empty; write one, such as `openssl rand -hex 16` gives"
        )
    return token
