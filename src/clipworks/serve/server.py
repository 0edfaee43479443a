"""Running the service: uvicorn, and an end that loses nothing.

On SIGTERM or Ctrl-C newcomers are told 503 and to close their connection for a moment, so that none of them
meets a closed port with a request on the way; what was accepted is finished; then the process ends with 0. A
second signal ends it at once.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clipworks.errors import ConfigError, require
from clipworks.serve.guard import State
from clipworks.serve.measures import LOGGER
from clipworks.serve.settings import USUAL, Limits

if TYPE_CHECKING:
    from fastapi import FastAPI


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Raises:
        ConfigError: if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error


def run(
    app: FastAPI,
    listener: socket.socket,
    state: State,
    *,
    limits: Limits = USUAL,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal ends it.

    Args:
        app: what `create_app` made with the same `state`.
        listener: what `listen` gave; closed at the end.
        state: shared with the app.
        limits: how long the end may take.
        ready: called once requests are accepted.
    """
    make_server(app, state, limits, ready).run(sockets=[listener])


def make_server(app: FastAPI, state: State, limits: Limits, ready: Callable[[], None] = lambda: None) -> Any:
    """A `uvicorn.Server` that ends as this module says."""
    uvicorn = require("uvicorn", extra="serve", purpose="the service")

    class Server(uvicorn.Server):  # type: ignore[name-defined, misc]
        asked = 0.0

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready()

        def handle_exit(self, sig: int, frame: Any) -> None:
            if state.closing:
                self.should_exit = self.force_exit = True
                return
            state.closing, self.asked = True, time.monotonic()

        async def on_tick(self, counter: int) -> bool:
            if await super().on_tick(counter):
                return True
            if not state.closing:
                return False
            since = time.monotonic() - self.asked
            if state.active and since < limits.patience:
                return False
            if state.active:
                LOGGER.error("gave up", extra={"fields": {"requests": state.active}})
            return since >= limits.grace

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return Server(config)
