"""The service under load: what it answers in a second beside what its model can do, and what it loses.

    python benchmarks/serve.py                              # a table; about fifteen minutes
    python benchmarks/serve.py --json
    python benchmarks/serve.py --seconds 20 --clients 16    # a shorter one

A server process holds one model, by default a ViT-B/32 with random weights, and answers `--clients`
connections that each send the next request when the last one is answered: texts and pictures (JPEG of 256
pixels) by turns, each of its own, for `--seconds`. In that process, before and after the load, the encoder
is timed on the same mix of prepared inputs: in full batches, and one by one. Then the same server runs with
batching off, for a third of the time. At the end SIGTERM comes under load.

    raw_full, raw_single   inputs a second of the encoder alone, in full batches and one by one
    on, off                inputs a second of the service with batching and without; `p50_ms`, `p95_ms`
    share                  on / raw_full
    kept                   (on / off) / (raw_full / raw_single): how much of what batching gains is kept
    wrong, lost            answers that differ from a direct call by more than 1e-5; requests without answer
    memory_mb              resident memory of the server in each tenth of the load
    term                   requests of the last load: answered, told to come again, lost; and the exit code

Client and server share the machine's cores; the client sends bytes that were prepared.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DIFFERENT = 256  # inputs of each kind
TOLERANCE = 1e-5


# --- the server's process ---


def serve(model: str, batch: int, name: str) -> None:
    """Time the encoder, answer until SIGTERM, time it again; figures go to stdout as JSON lines."""
    import torch

    from clipworks.core.tokenizer import Tokens
    from clipworks.encode.bulk import encode_images, encode_texts, tokenize
    from clipworks.serve import Limits, create_app
    from clipworks.serve.guard import State
    from clipworks.serve.server import listen, run

    clip, limits, state = load(model), Limits(batch=batch), State()
    texts, pictures = inputs()
    count = min(DIFFERENT, 4 * batch)
    tokens = tokenize(clip, texts[:count])
    pixels = torch.stack([clip.preprocessing(picture, fast=True) for picture in pictures[:count]])

    def raw(size: int, some: int) -> float:
        """Inputs a second, half of them texts."""
        start = time.perf_counter()
        for first in range(0, some, size):
            rows = [tokens[row] for row in range(first, first + size)]
            encode_texts(clip, Tokens.cat(rows))
            encode_images(clip, pixels[first : first + size], batch_size=size)
        return 2 * some / (time.perf_counter() - start)

    def timed() -> dict[str, float]:
        if batch == 1:
            return {}
        raw(batch, batch)
        full = max(raw(batch, count) for _ in range(2))
        return {"raw_full": full, "raw_single": max(raw(1, batch) for _ in range(2))}

    before = timed()
    app = create_app(clip, name=name, limits=limits, state=state)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    run(app, listener, state, limits=limits, ready=lambda: tell({"port": port, **before}))
    tell(timed())


def tell(figures: dict[str, Any]) -> None:
    """One line to the process that measures."""
    print(json.dumps(figures), flush=True)


def load(model: str) -> Any:
    """A model by its name; `ViT-B-32` is one with random weights."""
    import clipworks

    if model != "ViT-B-32":
        return clipworks.load(model)
    from clipworks.checkpoints.known import ARCHITECTURES
    from clipworks.core.clip import Clip
    from clipworks.core.tokenizer import ClipTokenizer

    return Clip.from_config(ARCHITECTURES[model], ClipTokenizer(), seed=0)


def inputs() -> tuple[list[str], list[bytes]]:
    """Different texts of 6 to 16 tokens, and different pictures as JPEG files."""
    from PIL import Image

    draw = np.random.default_rng(0)
    words = [
        "a",
        "red",
        "bus",
        "dog",
        "street",
        "old",
        "house",
        "runs",
        "on",
        "the",
        "beach",
        "in",
        "front",
        "of",
        "two",
        "trees",
        "and",
        "some",
        "people",
    ]
    texts = [" ".join(draw.choice(words, draw.integers(4, 14))) + f" {number}" for number in range(DIFFERENT)]
    pictures = []
    for _ in range(DIFFERENT):
        small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    return texts, pictures


# --- the clients' process ---


class Load:
    """Clients that ask one after the other, and what became of it."""

    def __init__(self, port: int, requests: list[bytes], expected: np.ndarray) -> None:
        self.port, self.requests, self.expected = port, requests, expected
        self.seconds: list[float] = []
        self.wrong = self.lost = self.later = 0
        self.stopping = False
        self._next = 0

    async def run(
        self, clients: int, seconds: float, server: int, term_after: float | None = None
    ) -> dict[str, Any]:
        """All clients for some seconds; `term_after` sends SIGTERM to the server and waits for its end."""
        start, memory = time.perf_counter(), list[float]()
        tasks = [asyncio.create_task(self._client(start + seconds)) for _ in range(clients)]
        if term_after is not None:
            await asyncio.sleep(term_after)
            self.stopping = True
            os.kill(server, signal.SIGTERM)
        else:
            for part in range(10):
                await asyncio.sleep(max(0, start + seconds * (part + 1) / 10 - time.perf_counter() - 0.05))
                memory.append(resident(server))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - start
        found = np.array(self.seconds) * 1000
        p50, p95 = np.percentile(found, [50, 95]) if len(found) else (0.0, 0.0)
        return {
            "answered": len(found),
            "rate": len(found) / took,
            "p50_ms": round(float(p50), 1),
            "p95_ms": round(float(p95), 1),
            "wrong": self.wrong,
            "lost": self.lost,
            "later": self.later,
            "memory_mb": [round(one) for one in memory],
        }

    async def _client(self, end: float) -> None:
        reader: asyncio.StreamReader | None = None
        while time.perf_counter() < end:
            place = self._next % len(self.requests)
            self._next += 1
            sent = False
            try:
                if reader is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                sent, start = True, time.perf_counter()
                writer.write(self.requests[place])
                status, body, stays = await self._answer(reader)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                if self.stopping and not sent:
                    return  # the port is closed: this one was never accepted
                self.lost += 1
                return
            if status == 200:
                self.seconds.append(time.perf_counter() - start)
                self._check(place, body)
            else:
                self.later += 1
            if not stays:
                writer.close()
                reader = None
                if self.stopping:
                    return

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split(b" ", 2)[1]), await reader.readexactly(length), b"connection: close" not in head

    def _check(self, place: int, body: bytes) -> None:
        at = body.index(b'"embedding":"') + 13
        vector = np.frombuffer(base64.b64decode(body[at : body.index(b'"', at)]), "<f4")
        if not np.abs(vector - self.expected[place]).max() <= TOLERANCE:
            self.wrong += 1


def resident(process: int) -> float:
    """MiB of memory that a process holds."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def prepare(model: str) -> tuple[list[bytes], np.ndarray]:
    """Whole requests, texts and pictures by turns, and the vectors (n, D) of direct calls."""
    texts, pictures = inputs()
    clip = load(model)
    expected = np.empty((2 * DIFFERENT, clip.width), np.float32)
    # One by one, as a direct call has it.
    expected[0::2] = np.concatenate([clip.embed_texts([text]).numpy() for text in texts])
    expected[1::2] = np.concatenate([clip.embed_images([picture]).numpy() for picture in pictures])
    requests = []
    for text, picture in zip(texts, pictures, strict=True):
        for one in (text, {"image": base64.b64encode(picture).decode()}):
            body = json.dumps({"input": [one], "encoding_format": "base64"}).encode()
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return requests, expected


class Server:
    """The server's process."""

    def __init__(self, model: str, batch: int) -> None:
        command = [sys.executable, __file__, "--serve", model, "--batch", str(batch)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.figures: dict[str, Any] = json.loads(self._line())

    def end(self) -> int:
        """Wait for it to end; its exit code. Figures are the better ones of before and after."""
        after = json.loads(self._line())
        self.figures |= {name: max(self.figures[name], value) for name, value in after.items()}
        return self.process.wait()

    def _line(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit("the server ended; what it said is above")
        return line


def measure(model: str, clients: int, seconds: float, batch: int) -> dict[str, Any]:
    """Load with batching, SIGTERM under load, load without batching."""
    requests, expected = prepare(model)
    server = Server(model, batch)
    pid, port = server.process.pid, server.figures["port"]
    asyncio.run(Load(port, requests, expected).run(clients, min(5, seconds), pid))
    on = asyncio.run(Load(port, requests, expected).run(clients, seconds, pid))
    last = Load(port, requests, expected)
    term = asyncio.run(last.run(clients, 60, pid, term_after=min(3, seconds)))
    term["exit_code"] = server.end()
    single = Server(model, 1)
    load_off = Load(single.figures["port"], requests, expected)
    off = asyncio.run(load_off.run(clients, max(5, seconds / 3), single.process.pid))
    single.process.send_signal(signal.SIGTERM)
    single.end()
    raw = {name: server.figures[name] for name in ("raw_full", "raw_single")}
    return {
        "case": f"serve-{model}",
        "clients": clients,
        "seconds": seconds,
        **{name: round(value, 1) for name, value in raw.items()},
        "on": round(on["rate"], 1),
        "off": round(off["rate"], 1),
        "share": round(on["rate"] / raw["raw_full"], 3),
        "kept": round((on["rate"] / off["rate"]) / (raw["raw_full"] / raw["raw_single"]), 3),
        "ratio": round(on["rate"] / off["rate"], 3),
        **{
            name: on[name] for name in ("answered", "p50_ms", "p95_ms", "wrong", "lost", "later", "memory_mb")
        },
        "off_wrong": off["wrong"],
        "off_lost": off["lost"],
        "term": {name: term[name] for name in ("answered", "later", "wrong", "lost", "exit_code")},
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print a list of results")
    parser.add_argument("--model", default="ViT-B-32", help="ViT-B-32 (random weights) or a name")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--batch", type=int, default=32, choices=[1, 8, 16, 32, 64])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.batch, "bench")
        return
    row = measure(arguments.model, arguments.clients, arguments.seconds, arguments.batch)
    if arguments.json:
        print(json.dumps([row], indent=1))
        return
    for name, value in row.items():
        print(f"{name:12} {value}")


if __name__ == "__main__":
    main()
