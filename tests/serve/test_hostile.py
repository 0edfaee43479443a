"""Hostile requests are refused, quickly and in little memory, and nothing is opened for them."""

from __future__ import annotations

import base64
import gc
import json
import resource
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.serve.client import Client, encoded, picture, wait_until

from clipworks.serve import Limits

BODY = 1 << 20
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LIMITS = Limits(body=BODY, pixels=1_000_000, grace=0)

_opened: list[tuple[str, Any]] = []
_watching = threading.Event()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching.is_set():
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
            _opened.append((event, arguments[-1] if event == "socket.connect" else arguments[0]))
        elif (event == "open" and isinstance(arguments[0], str) and "passwd" in arguments[0]) or event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
        ):
            _opened.append((event, arguments[0]))


sys.addaudithook(_watch)


@pytest.fixture
def watched() -> Iterator[list[tuple[str, Any]]]:
    """What this process opened, connections to the service itself left out."""
    _opened.clear()
    _watching.set()
    yield _opened
    _watching.clear()


def png(width: int, height: int, data: bytes, *, depth: int = 8, color: int = 2) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


def bombs() -> Iterator[bytes]:
    zeros = zlib.compress(bytes(30_000_000), 9)
    for side in (1001, 5_000, 60_000, 2**31 - 1):
        yield png(side, side, zeros)
        yield png(side, 1001, zeros, depth=1, color=0)
    for kind in ("GIF", "TIFF", "BMP", "JPEG", "WEBP", "PPM"):
        yield saved(kind, (1100, 1000))[: BODY // 2]
    gif = bytearray(saved("GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield bytes(gif)
    jpeg = saved("JPEG", progressive=True)
    scan = jpeg[jpeg.index(b"\xff\xda") : jpeg.rindex(b"\xff\xd9")]
    yield jpeg[:-2] + scan[:60] * 400 + b"\xff\xd9"
    text = b"tEXt" + b"a\0" + b"b" * 400_000
    long = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    good = png(20, 20, zlib.compress(bytes(20 * 61), 9))
    yield good[:33] + long + good[33:50]
    yield b"P6 99999999 99999999 255\n" + b"x" * 100


def wrong_types() -> Iterator[bytes]:
    yield from (b"x", b"\0" * 5000, b"GIF89a", b"\xff\xd8\xff", b"BM" + bytes(60), b"RIFF\0\0\0\0WEBPVP8 ")
    yield from (
        b"%PDF-1.7\n1 0 obj",
        b"PK\x03\x04" + bytes(40),
        b"\x7fELF" + bytes(60),
        b"\x1f\x8b\x08" + bytes(30),
    )
    yield from (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file",
        b"ID3" + bytes(90),
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    entity = b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    yield from (
        svg,
        b"<?xml version='1.0'?>" + entity + svg,
        b"<html><script>alert(1)</script>",
        b"push graphic-context",
    )
    yield from (
        b"#!/bin/sh\nrm -rf /",
        b"\x1aE\xdf\xa3" + bytes(40),
        b"\0\0\0\x18ftypmp42" + bytes(40),
        b"OggS" + bytes(30),
    )
    yield from (
        b"version https://git-lfs.github.com/spec/v1",
        b"/etc/passwd",
        b"../../../../etc/passwd\0.png",
    )
    draw = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "ICO"):
        whole = saved(kind)
        yield whole[: len(whole) // 4]
        head = whole[:12]
        yield head + draw.integers(0, 256, 400, dtype=np.uint8).tobytes()


def addresses() -> Iterator[str]:
    hosts = (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "169.254.169.254",
        "10.0.0.1",
        "192.168.1.1",
        "0.0.0.0",
        "0x7f000001",
    )
    hosts += (
        "2130706433",
        "127.1",
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
        "[fd00::1]",
        "[64:ff9b::7f00:1]",
        "100.64.0.1",
    )
    hosts += ("user:pw@127.0.0.1", "127.0.0.1:22", "example.com@127.0.0.1", "[2002:7f00:1::]", "224.0.0.1")
    for host in hosts:
        yield f"http://{host}/latest/meta-data/x.png"
    yield from (
        "https://127.0.0.1/",
        "HTTP://127.0.0.1/",
        "http:///x",
        "http://",
        "http://[",
        "https://\u246027.0.0.1/x",
    )
    yield from ("file:///etc/passwd", "FILE:/etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:70/_x")
    yield from (
        "dict://127.0.0.1:11211/",
        "jar:http://127.0.0.1!/",
        "data:text/html,<b>",
        "data:image/png,abc",
    )
    yield from ("/etc/passwd", "../../etc/passwd", "\\\\127.0.0.1\\share\\x.png", "javascript:alert(1)")


def odd_json() -> Iterator[bytes]:
    yield from (b"", b"{", b"null", b"[]", b"3", b'"a"', b"\xff\xfe{", b'{"input":', b"{'input': 'a'}")
    yield from (b"[" * 200_000, b'{"input":' * 50_000, b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield from (
        b'{"input": NaN}',
        b'{"input": ' + b"9" * 100_000 + b"}",
        b'{"dimensions": 1e999, "input": "a"}',
    )
    yield from (b'{"input": "a", "dimensions": 1' + b"0" * 5000 + b"}", b'{"input": ["a", null]}')
    yield json.dumps({"input": ["a"] * 100_000}).encode()
    yield json.dumps({"input": [{"image": "A" * 900_000}]}).encode()
    yield json.dumps({"input": "a" * 500_000}).encode()
    yield json.dumps({"input": "a", **{f"key{i}": i for i in range(20_000)}}).encode()
    yield json.dumps({"input": [{"text": "a", "image": "b"}]}).encode()
    yield json.dumps({"input": {"__proto__": {"image": "x"}}}).encode()
    yield b'{"input": "' + b"a" * BODY + b'"}'


def odd_requests() -> Iterator[tuple[str, str, bytes | None, dict[str, str]]]:
    form = "multipart/form-data; boundary=edge"
    good = picture(1)
    for name in ("../../etc/passwd", "/etc/passwd", "..\\..\\x.png", "a\0.png", "..", "x/../../y.png"):
        yield "POST", "/v1/embeddings", encoded([("image", good)], name), {"content-type": form}
    for field in ("../x", "image[0]", "__proto__", "", "input\r\nX: y"):
        yield "POST", "/v1/embeddings", encoded([(field, good)]), {"content-type": form}
    many = encoded([("input", "a")] * 5000)
    yield "POST", "/v1/embeddings", many, {"content-type": form}
    yield "POST", "/v1/embeddings", encoded([("image", good)] * 1200), {"content-type": form}
    yield "POST", "/v1/embeddings", encoded([("image", "text, not a file")]), {"content-type": form}
    yield "POST", "/v1/embeddings", encoded([("input", good)]), {"content-type": form}
    yield "POST", "/v1/embeddings", encoded([("image", good)])[:-30], {"content-type": form}
    yield "POST", "/v1/embeddings", encoded([("image", good)]), {"content-type": "multipart/form-data"}
    yield "POST", "/v1/embeddings", b"--edge" * 1000, {"content-type": form}
    for kind in (
        "text/plain",
        "application/xml",
        "application/x-www-form-urlencoded",
        "",
        "application/json5",
    ):
        yield "POST", "/v1/embeddings", b'{"input": "a"}', {"content-type": kind}
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/../../app.py",
        "//etc/passwd",
        "/fewshot/..%2f..%2f",
    ):
        yield "GET", path, None, {}
    for path in ("/etc/passwd", "../../../etc/passwd", "%00", "a" * 5000):
        yield "GET", f"/thumbnail?path={path}&signature=0", None, {}
    yield "GET", "/thumbnail?path=x&signature=0&side=100000", None, {}
    where = (
        "1; drop table items",
        "width > (select 1)",
        "'",
        "a" * 3000,
        "read_csv('/etc/passwd') = 1",
        "1 = 1 union",
    )
    for condition in where:
        body = json.dumps({"text": "a", "where": condition}).encode()
        yield "POST", "/search", body, {"content-type": "application/json"}
    huge = json.dumps({"text": "a", "k": 10**9}).encode()
    yield "POST", "/search", huge, {"content-type": "application/json"}
    yield "POST", "/search", json.dumps({"text": '+"a"' * 50}).encode(), {"content-type": "application/json"}


def attacks() -> list[tuple[str, str, bytes | None, dict[str, str]]]:
    kind = {"content-type": "application/json"}
    found = list(odd_requests())
    files = [*bombs(), *wrong_types()]
    for file in files:
        image = base64.b64encode(file).decode()
        body = json.dumps({"images": [image], "labels": ["a", "b"]}).encode()
        found.append(("POST", "/classify", body, kind))
        form = encoded([("image", file)])
        found.append(("POST", "/v1/embeddings", form, {"content-type": "multipart/form-data; boundary=edge"}))
    for address in addresses():
        body = json.dumps({"input": [{"image": address}]}).encode()
        found.append(("POST", "/v1/embeddings", body, kind))
    found += [("POST", "/v1/embeddings", body, kind) for body in odd_json()]
    return found


# Starlette leaves the file of a form that ends too early to the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile")
def test_hostile_requests_are_refused_and_nothing_is_opened_for_them(
    serving: Callable[..., Any], index: Any, watched: list[tuple[str, Any]]
) -> None:
    cases = attacks()
    assert len(cases) >= 200
    with serving(LIMITS, index=index) as client:
        assert client.form("/v1/embeddings", [("image", picture(1))]).status == 200  # whatever is loaded late
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        slowest, let_in = 0.0, []
        for method, path, body, headers in cases:
            start = time.monotonic()
            answer = client.send(method, path, body, **headers)
            slowest = max(slowest, time.monotonic() - start)
            if not 400 <= answer.status < 500 or "message" not in answer.json["error"]:
                let_in.append((method, path, (body or b"")[:150], answer.status))
            assert b"Traceback" not in answer.body
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert client.form("/v1/embeddings", [("image", picture(1))]).status == 200
        outside = [one for one in watched if one[1] not in (("127.0.0.1", client.port), "127.0.0.1")]
    gc.collect()
    assert not let_in
    assert not outside
    assert grown < 250, f"{grown} MiB"
    assert slowest < 10


def test_addresses_inside_the_network_are_never_fetched_even_when_fetching_is_allowed(
    serving: Callable[..., Any], watched: list[tuple[str, Any]]
) -> None:
    with serving(LIMITS, urls=True) as client:
        for address in addresses():
            answer = client.post("/v1/embeddings", {"input": [{"image": address}]})
            assert answer.status == 400, (address, answer)
        connected = [
            target
            for event, target in watched
            if event != "socket.getaddrinfo" and target != ("127.0.0.1", client.port)
        ]
    assert not connected


def test_a_body_that_is_too_large_is_413_whether_it_says_so_or_not(serving: Callable[..., Any]) -> None:
    with serving(LIMITS) as client:
        assert (
            client.send("POST", "/classify", b"x" * (BODY + 1), content_type="application/json").status == 413
        )
        kind = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        chunk = b"%x\r\n" % (1 << 16) + b"x" * (1 << 16) + b"\r\n"
        endless = raw(
            client, f"{kind}Transfer-Encoding: chunked\r\n\r\n".encode(), [chunk] * 17 + [b"0\r\n\r\n"]
        )
        assert b" 413 " in endless.splitlines()[0]
        declared = raw(client, f"{kind}Content-Length: 99999999999999\r\n\r\n".encode(), [])
        assert b" 413 " in declared.splitlines()[0]


def test_a_body_that_never_ends_is_408_and_frees_its_room(serving: Callable[..., Any]) -> None:
    with serving(Limits(seconds=0.3, grace=0)) as client:
        head = HEAD + b"Content-Length: 99\r\n\r\n{"
        assert b" 408 " in raw(client, head, []).splitlines()[0]
        wait_until(lambda: client.state.active == 0)


def test_all_bodies_together_are_bounded(serving: Callable[..., Any]) -> None:
    with serving(Limits(body=1000, memory=1500, seconds=2, grace=0)) as client:
        head = HEAD + b"Content-Length: 1000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", client.port)) as slow:
            slow.sendall(head + b"x" * 900)
            time.sleep(0.2)
            answer = client.send("POST", "/classify", b"x" * 900, content_type="application/json")
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        time.sleep(0.2)
        assert client.send("POST", "/classify", b"x" * 900, content_type="application/json").status == 400


def raw(client: Client, head: bytes, parts: list[bytes]) -> bytes:
    """The answer to bytes as they are."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as line:
        line.sendall(head)
        for part in parts:
            line.sendall(part)
        answer = b""
        while b"\r\n\r\n" not in answer:
            got = line.recv(65536)
            if not got:
                break
            answer += got
    return answer
