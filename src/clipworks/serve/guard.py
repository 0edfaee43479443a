"""Guard: what every request passes before anything is done for it, and what is said of it afterwards.

It bounds the requests at once, the size of a body, the sum of all bodies and the time that a body may take,
asks for the token, counts and logs, and, when the service is closing, tells newcomers so while it finishes
what it has accepted. Written for ASGI itself, so that a refusal costs next to nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from clipworks.serve.measures import LOGGER, Measures
from clipworks.serve.settings import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAME = re.compile(rb"[\w.-]{1,64}\Z")
_PATIENT = 4  # times the largest body is read and thrown away, so that its sender hears why
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
_WATCHED = ("/healthz", "/metrics")  # answered whatever happens, and logged only when asked for
GONE = 499


class Refused(Exception):
    """A request that is answered by an error before it is looked at."""

    def __init__(self, status: int, message: str, kind: str, wait: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.wait = status, kind, wait


class Gone(Exception):
    """The client closed the connection."""


class State:
    """What the server and the guard tell each other."""

    def __init__(self) -> None:
        self.closing = False
        self.active = 0


class Guard:
    """The middleware.

    Args:
        app: what it guards.
        limits: see `Limits`.
        measures: where requests are counted.
        state: shared with the server.
        token: what `Authorization: Bearer …` must hold; None for no token.
        open_paths: paths that need no token.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        measures: Measures,
        state: State,
        token: str | None = None,
        open_paths: Iterable[str] = (),
    ) -> None:
        self.app, self.limits, self.measures, self.state = app, limits, measures, state
        self._token = None if token is None else token.encode()
        self._open = frozenset(open_paths)
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand on what is none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, headers = time.perf_counter(), dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _NAME.match(given) else uuid.uuid4().hex.encode()
        status, size, held = GONE, 0, 0
        quitting = False

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", name), *_SAFE]
                if quitting or self.state.closing:
                    extra.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        self.state.active += 1
        self.measures.active.inc()
        try:
            self._admit(scope, headers)
            try:
                body, held = await self._body(headers, receive)
            except Refused:
                quitting = True  # the rest of the body is not read
                raise
            size = len(body)
            await self.app(scope, _replay(body, receive), tell)
        except Refused as refusal:
            await _answer(tell, refusal)
        except Gone:
            pass
        except Exception:  # noqa: BLE001  a fault of ours is one answer, not the end of the service
            LOGGER.exception("failed", extra={"fields": {"id": name.decode(), "path": scope["path"]}})
            if status == GONE:
                await _answer(tell, Refused(500, "the service failed; its log says how", "server_error"))
        finally:
            self._bytes -= held
            self.state.active -= 1
            self.measures.active.dec()
            seconds = time.perf_counter() - start
            pattern = getattr(scope.get("route"), "path", "other")
            self.measures.request(_method(scope), pattern, status, seconds)
            fields = {
                "id": name.decode(),
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(seconds, 4),
                "bytes": size,
                "client": (scope.get("client") or ("",))[0],
            }
            quiet = scope["path"] in _WATCHED
            LOGGER.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if self.state.closing and path not in _WATCHED:
            raise Refused(503, "the service is closing", "unavailable", wait=5)
        if self.state.active > self.limits.requests and path not in _WATCHED:
            raise Refused(503, "too many requests at once; try again", "unavailable", wait=1)
        if self._token is None or path in self._open or scope["method"] == "OPTIONS":
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
            raise Refused(401, "a token is needed: Authorization: Bearer TOKEN", "unauthorized")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> tuple[bytes, int]:
        """The whole body, and how many bytes of the memory it holds."""
        declared = headers.get(b"content-length", b"")
        length = int(declared) if declared.isdigit() and len(declared) < 19 else 0
        if length > _PATIENT * self.limits.body or (length > self.limits.body and b"expect" in headers):
            raise self._too_large()
        parts, total, held = list[bytes](), 0, 0
        try:
            end = time.monotonic() + self.limits.seconds
            while True:
                message = await asyncio.wait_for(receive(), max(0.001, end - time.monotonic()))
                if message["type"] == "http.disconnect":
                    raise Gone
                part = message.get("body", b"")
                total += len(part)
                if total > _PATIENT * self.limits.body:
                    raise self._too_large()
                if total <= self.limits.body and length <= self.limits.body:
                    if self._bytes + len(part) > self.limits.memory:
                        raise Refused(503, "too much is being sent at once; try again", "unavailable", wait=1)
                    held += len(part)
                    self._bytes += len(part)
                    parts.append(part)
                if not message.get("more_body"):
                    break
            if total > self.limits.body:
                raise self._too_large()
        except (asyncio.TimeoutError, TimeoutError) as error:
            self._bytes -= held
            raise Refused(408, f"the body took longer than {self.limits.seconds:g} s", "timeout") from error
        except BaseException:
            self._bytes -= held
            raise
        return b"".join(parts), held

    def _too_large(self) -> Refused:
        return Refused(413, f"a body has at most {self.limits.body:,} bytes", "too_large")


def _method(scope: Scope) -> str:
    method = scope["method"]
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, refusal: Refused) -> None:
    body = json.dumps(failure(str(refusal), refusal.kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.wait is not None:
        headers.append((b"retry-after", str(refusal.wait).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def failure(message: str, kind: str) -> dict[str, Any]:
    """The body of an error, in the shape that OpenAI's has."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
