"""Requests to a running service without a library of their own, and pictures to send."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Answer:
    """What the service said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests to a port of this machine, a connection each."""

    def __init__(self, port: int, app: Any = None, state: Any = None) -> None:
        self.port, self.app, self.state = port, app, state

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            named = {"content-type": "application/json", **named}
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.send("POST", path, body, **headers)

    def form(self, path: str, parts: list[tuple[str, str | bytes]], name: str = "x.png") -> Answer:
        """A multipart form; bytes are files."""
        return self.send(
            "POST", path, encoded(parts, name), content_type="multipart/form-data; boundary=edge"
        )


def encoded(parts: list[tuple[str, str | bytes]], name: str = "x.png") -> bytes:
    lines = b""
    for field, value in parts:
        file = isinstance(value, bytes)
        about = f'; filename="{name}"\r\nContent-Type: image/png' if file else ""
        lines += f'--edge\r\nContent-Disposition: form-data; name="{field}"{about}\r\n\r\n'.encode()
        lines += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return lines + b"--edge--\r\n"


def picture(seed: int, size: tuple[int, int] = (40, 32), kind: str = "PNG") -> bytes:
    """A file of large colored patches."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
