"""Fetching: public addresses alone, one resolution, bounded size, time and redirects."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from clipworks.errors import PictureError
from clipworks.serve import fetch

PUBLIC = "93.184.216.34"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *(
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "192.0.2.1",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1%eth0",
        ),
        *(
            "fd00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "2002:7f00:1::",
        ),
        *("2001:db8::1", "not an address", ""),
    ],
)
def test_an_address_inside_some_network_is_not_public(address: str) -> None:
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700::1111"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert fetch.is_public(address)


class Site(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self) -> None:
        answers: dict[str, tuple[int, dict[str, str], bytes]] = {
            "/picture?size=1": (200, {}, b"bytes of a picture"),
            "/large": (200, {}, b"x" * 5000),
            "/moved": (302, {"Location": "/picture?size=1"}, b""),
            "/inside": (302, {"Location": "http://10.0.0.1/secret"}, b""),
            "/file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/circle": (302, {"Location": "/circle"}, b""),
        }
        status, headers, body = answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """`pictures.example` seems to be a public address, and leads to a server here; who was called."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    called: list[tuple[str, int]] = []
    connect, resolve = socket.create_connection, socket.getaddrinfo
    names = {"pictures.example": [PUBLIC], "both.example": [PUBLIC, "10.0.0.1"]}

    def resolved(host: str, port: int, *more: Any, **options: Any) -> Any:
        if host in names:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in names[host]]
        return resolve(host, port, *more, **options)

    def connected(address: tuple[str, int], timeout: float) -> socket.socket:
        called.append(address)
        return connect(("127.0.0.1", server.server_address[1]), timeout=timeout)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket, "create_connection", connected)
    yield called
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_public_address_is_fetched_and_its_redirects_followed(site: list[tuple[str, int]]) -> None:
    for path in ("picture?size=1", "moved"):
        assert fetch.fetch(f"http://pictures.example/{path}", limit=1000) == b"bytes of a picture"
    # The very address that was checked is the one that is called.
    assert set(site) == {(PUBLIC, 80)}


@pytest.mark.parametrize(
    ("url", "why", "calls"),
    [
        ("http://pictures.example/inside", "public Internet", 1),
        ("http://pictures.example/file", "only http", 1),
        ("http://pictures.example/circle", "redirects", 4),
        ("http://pictures.example/large", "larger", 1),
        ("http://pictures.example/none", "404", 1),
        ("http://both.example/picture", "public Internet", 0),
        ("http://pictures.example:8080/picture", "ports", 0),
        ("http://user:word@pictures.example/picture", "credentials", 0),
        ("http://[::1/", "not an address", 0),
    ],
)
def test_what_may_not_be_fetched_is_not(site: list[tuple[str, int]], url: str, why: str, calls: int) -> None:
    with pytest.raises(PictureError, match=why) as said:
        fetch.fetch(url, limit=1000)
    assert len(site) == calls
    assert "word" not in str(said.value)


def test_a_server_that_takes_too_long_is_left(
    site: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Site, "do_GET", lambda self: threading.Event().wait(2))
    with pytest.raises(PictureError, match="too long"):
        fetch.fetch("http://pictures.example/picture", limit=1000, seconds=0.3)
