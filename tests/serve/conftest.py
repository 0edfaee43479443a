"""A running service around the smallest CLIP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.serve.client import Client, picture


@pytest.fixture(scope="session")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    from clipworks.core.tokenizer import ClipTokenizer

    return tiny_clip(tokenizer=ClipTokenizer())


@pytest.fixture(scope="session")
def serving(clip: Any) -> Callable[..., Any]:
    """A context in which a service runs: `with serving(limits=…) as client`."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    from clipworks.serve import Limits, create_app
    from clipworks.serve.guard import State
    from clipworks.serve.server import listen, make_server

    quick = Limits(grace=0)

    @contextmanager
    def serve(limits: Limits = quick, **options: Any) -> Iterator[Client]:
        state, ready = State(), threading.Event()
        app = create_app(options.pop("clip", clip), state=state, limits=limits, **options)
        listener = listen("127.0.0.1", 0)
        client = Client(listener.getsockname()[1], app, state)
        server = make_server(app, state, limits, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert ready.wait(30)
        try:
            yield client
        finally:
            if not state.closing:
                server.handle_exit(15, None)
            thread.join(60)
            assert not thread.is_alive()

    return serve


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    for seed in range(8):
        (place / f"{seed}.png").write_bytes(picture(seed, (40 + seed, 32)))
    return place


@pytest.fixture(scope="session")
def index(folder: Path, clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("lancedb")
    from clipworks.search import Index

    made = Index.create(tmp_path_factory.mktemp("index") / "index", clip)
    made.add(folder)
    made.add_texts(["a red square", "a blue square"])
    return made


@pytest.fixture(scope="module")
def client(serving: Callable[..., Any], index: Any) -> Iterator[Any]:
    """A service with an index, as most tests use it."""
    with serving(index=index, name="tiny") as found:
        yield found
