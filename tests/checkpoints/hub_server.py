"""A hub for tests: serves folders by the protocol by which huggingface_hub asks for files.

GET  /api/models/{repo}[/revision/{rev}]   what a repository has, and its commit
HEAD /{repo}/resolve/{rev}/{file}          X-Repo-Commit, ETag, sizes
GET  /{repo}/resolve/{rev}/{file}          the bytes, also from the middle (Range)
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Hub:
    """Repositories by `owner/name`, each with revisions by name, each a folder.

    Attributes:
        asked: the requests so far, `"GET /owner/name/resolve/main/config.json"`.
        break_after: the number of bytes after which the next download of a file is cut off.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.asked: list[str] = []
        self.break_after: int | None = None
        self.ranges: list[str] = []

    def add(self, repository: str, folder: Path, revision: str = "main") -> None:
        self.repositories.setdefault(repository, {})[revision] = folder

    def find(self, repository: str, revision: str) -> tuple[Path, str] | None:
        """The folder and the commit of a revision, which may be given as a commit."""
        for name, folder in self.repositories.get(repository, {}).items():
            commit = hashlib.sha1(f"{repository}@{name}".encode()).hexdigest()
            if revision in (name, commit):
                return folder, commit
        return None


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """The hub's address while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path).partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if info:
                self.information(info[1], info[2] or "main")
            elif file:
                self.file(file[1], file[2], file[3], body)
            else:
                self.send(404, b"")

        def information(self, repository: str, revision: str) -> None:
            found = hub.find(repository, revision)
            if found is None:
                return self.refuse(repository)
            folder, commit = found
            names = [
                {"rfilename": one.relative_to(folder).as_posix()}
                for one in folder.rglob("*")
                if one.is_file()
            ]
            values = {
                "id": repository,
                "sha": commit,
                "siblings": names,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            self.send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})
            return None

        def file(self, repository: str, revision: str, name: str, body: bool) -> None:
            found = hub.find(repository, revision)
            if found is None:
                return self.refuse(repository)
            folder, commit = found
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if not (folder / name).is_file():
                return self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            data = (folder / name).read_bytes()
            headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            asked = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            if asked:
                hub.ranges.append(asked[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            rest = data[start:]
            if body and hub.break_after is not None and len(rest) > hub.break_after:
                cut, hub.break_after = hub.break_after, None
                self.send(200, rest[:cut], headers | {"Content-Length": str(len(rest))})
                self.close_connection = True
                return None
            return self.send(
                206 if asked else 200, rest if body else b"", headers | {"Content-Length": str(len(rest))}
            )

        def refuse(self, repository: str) -> None:
            there = repository in hub.repositories
            code = "RevisionNotFound" if there else "RepoNotFound"
            self.send(404 if there else 401, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            headers = {"Content-Length": str(len(data)), **(headers or {})}
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
