"""A million vectors: how fast the ten nearest are found, and how many of them.

    python benchmarks/search.py                       # a table; most of an hour on two cores at the first run
    python benchmarks/search.py --json
    python benchmarks/search.py --rows 100000 --cases disk memory

The vectors are synthetic: clusters of a hundred or so around random centers, 512 numbers with variances that
fall as those of real features do. Questions are new points of the same clusters, compared with an exact
search.

    disk      `Index.search` on the table as it lies on disk, through its own index, with settings that it
              found itself; the answer has paths, captions and scores
    memory    the same after `Index.hold`
    faiss     IVF-PQ with a second look at the vectors, in memory; answers with numbers alone
    usearch   HNSW over half-precision vectors, in memory; answers with numbers alone

Peers run in the environment of `make peers`, each with the first of its settings that finds at least 0.95 of
the ten on questions of their own. Every case runs in a process of its own; questions are asked one at a time
on one thread, whatever a library starts besides. Vectors, exact answers, table and graph are kept in
`--folder`: an interrupted run goes on where it was, and `build_s` counts all its parts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CASES = ("disk", "memory", "faiss", "usearch")
WIDTH, BLOCK, K, ASKED, WANTED = 512, 20_000, 10, 1000, 0.95
IN_A_CLUSTER, SPREAD = 100, 0.7


# --- the vectors ---


@functools.cache
def clusters(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Centers (c, 512) for so many rows, and the map (512, 512) that gives each direction its variance."""
    draw = np.random.default_rng(0)
    directions = np.linalg.qr(draw.standard_normal((WIDTH, WIDTH)))[0]
    scale = 1 / np.sqrt(1 + np.arange(WIDTH) / 8)
    centers = draw.standard_normal((rows // IN_A_CLUSTER, WIDTH), dtype=np.float32)
    return centers, (scale[:, None] * directions).astype(np.float32)


def points(block: int, count: int, rows: int) -> np.ndarray:
    """Unit vectors (count, 512) fp32 of the clusters for so many rows; the same for the same block."""
    centers, spread = clusters(rows)
    draw = np.random.default_rng([1, block])
    latent = centers[draw.integers(0, len(centers), count)]
    latent = latent + SPREAD * draw.standard_normal((count, WIDTH), dtype=np.float32)
    found = latent @ spread
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def prepare(folder: Path, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The vectors (rows, 512) as a map of a file, questions (n, 512), and the ids (n, 10) of the nearest."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vectors.f32"
    done = file.stat().st_size // (4 * WIDTH * BLOCK) if file.exists() else 0
    with file.open("r+b" if file.exists() else "wb") as stream:
        stream.truncate(done * 4 * WIDTH * BLOCK)
        stream.seek(0, os.SEEK_END)
        for block in range(done, rows // BLOCK):
            stream.write(points(block, BLOCK, rows).tobytes())
    vectors = np.memmap(file, np.float32, "r", shape=(rows, WIDTH))
    questions = points(10**6, 2 * ASKED, rows)
    truth = folder / "truth.npy"
    if not truth.exists():
        best, ids = np.empty((len(questions), 0), np.float32), np.empty((len(questions), 0), np.int64)
        for start in range(0, rows, BLOCK):
            cosines = questions @ vectors[start : start + BLOCK].T
            near = np.argpartition(-cosines, K, axis=1)[:, :K]
            best = np.concatenate([best, np.take_along_axis(cosines, near, 1)], axis=1)
            ids = np.concatenate([ids, near + start], axis=1)
            kept = np.argsort(-best, axis=1)[:, :K]
            best, ids = np.take_along_axis(best, kept, 1), np.take_along_axis(ids, kept, 1)
        np.save(truth, ids)
    return vectors, questions, np.load(truth)


def timed(
    ask: Callable[[np.ndarray], list[int]], questions: np.ndarray, truth: np.ndarray
) -> dict[str, float]:
    """Milliseconds and recall@10, after a hundred questions that warm up.

    `cpu_ms` is what a question costs in processor time: if much less than `p50_ms`, others were running.
    """
    for question in questions[:100]:
        ask(question)
    seconds, shares, before = [], [], time.process_time()
    for question, right in zip(questions, truth, strict=True):
        start = time.perf_counter()
        found = ask(question)
        seconds.append(time.perf_counter() - start)
        shares.append(len(set(found) & set(right.tolist())) / K)
    cpu = (time.process_time() - before) / len(questions) * 1e3
    p50, p95 = (np.percentile(seconds, [50, 95]) * 1e3).tolist()
    recall = round(float(np.mean(shares)), 4)
    return {"p50_ms": round(p50, 3), "p95_ms": round(p95, 3), "cpu_ms": round(cpu, 3), "recall": recall}


def first_good(
    settings: list[Any], ask: Callable[[Any, np.ndarray], list[int]], questions: np.ndarray, truth: np.ndarray
) -> Any:
    """The first setting, from cheap to dear, that finds enough; the last one if none does."""
    for setting in settings:
        shares = [
            len(set(ask(setting, question)) & set(right.tolist())) / K
            for question, right in zip(questions[:200], truth[:200], strict=True)
        ]
        if np.mean(shares) >= WANTED:
            return setting
    return settings[-1]


class Clock:
    """Seconds that survive an interruption, in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds = float(path.read_text()) if path.exists() else 0.0
        self.start = time.monotonic()

    def tick(self) -> float:
        """Keep what has passed; the sum."""
        now = time.monotonic()
        self.seconds, self.start = self.seconds + now - self.start, now
        self.path.write_text(str(self.seconds))
        return self.seconds


# --- the cases ---


def ours(folder: Path, vectors: np.ndarray, in_memory: bool) -> tuple[Any, dict[str, Any]]:
    """The index, built or found, and what that took."""
    from clipworks.search import Index
    from clipworks.search.table import Table

    place, clock = folder / "index", Clock(folder / "index-seconds")
    about = {"model": "synthetic", "fingerprint": "0" * 64, "width": WIDTH}
    table = Table.open(str(place)) if Index.exists(place) else Table.create(str(place), WIDTH, about)
    while (done := len(table)) < len(vectors):
        block = vectors[done : done + BLOCK]
        table.append([_row(done + i) for i in range(len(block))], block)
        clock.tick()
    index = Index(table)
    if index.settings is None:
        table.compact()
        index.index_neighbors()
        clock.tick()
    settings = index.settings
    files = [file for file in place.rglob("*") if file.is_file() and file.suffix != ".usearch"]
    size = sum(file.stat().st_size for file in files)
    built: dict[str, Any] = {"build_s": round(clock.seconds, 1), "bytes": size}
    if settings is not None:
        built |= {"reported_recall": settings.recall, "probes": settings.probes, "refine": settings.refine}
    if in_memory:
        clock = Clock(folder / "held-seconds")
        made = (place / "pictures.usearch").exists()
        held = index.hold()
        seconds = clock.seconds if made else clock.tick()
        built = {"build_s": round(seconds, 1), "bytes": held.bytes, "reported_recall": held.recall}
        built |= {"breadth": held.breadth, "open_s": round(held.seconds, 1)}
    return index, built


def _row(number: int) -> dict[str, Any]:
    # A hash of 64 digits whose beginning is spread evenly, as that of a content hash is.
    return {
        "path": f"/data/pictures/{number:09d}.jpg",
        "kind": "image",
        "hash": f"{(number * 2654435761) % 2**32:08x}{number:056x}",
        "mtime_ns": number,
        "size": 100_000 + number % 1000,
        "width": 640,
        "height": 480,
        "caption": f"caption number {number} of a picture",
        "model": "synthetic",
        "revision": "0" * 16,
        "detail": 0,
    }


def measure(case: str, folder: Path, rows: int) -> dict[str, Any]:
    """One case, in this process."""
    vectors, questions, truth = prepare(folder, rows)
    asked, right = questions[:ASKED], truth[:ASKED]
    more, more_right = questions[ASKED:], truth[ASKED:]
    built: dict[str, Any]
    if case in ("disk", "memory"):
        index, built = ours(folder, vectors, case == "memory")
        found = timed(lambda q: [int(hit.path[15:24]) for hit in index.search(q, k=K)], asked, right)
        start = time.monotonic()
        hits = index.search(asked[0], k=10_000)
        found |= {"hits": len(hits), "hits_s": round(time.monotonic() - start, 3)}
    elif case == "faiss":
        import faiss

        faiss.omp_set_num_threads(int(os.environ.get("BENCH_THREADS", "1")))
        start = time.monotonic()
        index = faiss.index_factory(WIDTH, f"IVF{round(rows**0.5)},PQ64,RFlat", faiss.METRIC_INNER_PRODUCT)
        index.train(np.array(vectors[:: max(1, rows // 100_000)]))
        for first in range(0, rows, BLOCK):
            index.add(np.array(vectors[first : first + BLOCK]))
        built = {"build_s": round(time.monotonic() - start, 1)}
        built["bytes"] = rows * (4 * WIDTH + 64 + 8)
        cells = faiss.extract_index_ivf(index.base_index)

        def ask(setting: tuple[int, int], question: np.ndarray) -> list[int]:
            cells.nprobe, index.k_factor = setting
            return list(index.search(question[None], K)[1][0].tolist())

        settings = [(probes, factor) for probes in (4, 8, 16, 32, 64, 128, 256) for factor in (5, 10, 20)]
        chosen = first_good(settings, ask, more, more_right)
        built |= {"probes": chosen[0], "refine": chosen[1]}
        found = timed(lambda q: ask(chosen, q), asked, right)
    else:
        from usearch.index import Index as Graph

        start = time.monotonic()
        graph = Graph(ndim=WIDTH, metric="cos", dtype="f16", connectivity=16, expansion_add=128)
        for first in range(0, rows, BLOCK):
            part = np.array(vectors[first : first + BLOCK])
            graph.add(np.arange(first, first + len(part), dtype=np.uint64), part)
        built = {"build_s": round(time.monotonic() - start, 1), "bytes": int(graph.memory_usage)}

        def near(breadth: int, question: np.ndarray) -> list[int]:
            graph.expansion_search = breadth
            return [int(key) for key in graph.search(question, K, threads=1).keys]

        breadth = first_good([32, 64, 96, 128, 192, 256, 384, 512], near, more, more_right)
        built["breadth"] = breadth
        found = timed(lambda q: near(breadth, q), asked, right)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"case": f"{case}-{label(rows)}", "rows": rows, **found, **built, "peak_bytes": peak}


def label(rows: int) -> str:
    """`1m` for a million, `200k` for two hundred thousand."""
    return f"{rows // 10**6}m" if rows % 10**6 == 0 else f"{rows // 1000}k"


def main() -> None:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print a list of results")
    parser.add_argument("--rows", type=int, default=10**6, help=f"a multiple of {BLOCK:,}")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-search", help="what is kept")
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows < BLOCK or arguments.rows % BLOCK:
        parser.error(f"--rows must be a multiple of {BLOCK:,}, not {arguments.rows:,}")
    folder = arguments.folder / label(arguments.rows)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, folder, arguments.rows)))
        return
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT / "src")}
    results = []
    for case in arguments.cases:
        python = sys.executable if case in ("disk", "memory") else arguments.peers
        command = [python, __file__, "--measure", case, "--rows", str(arguments.rows)]
        command += ["--folder", str(arguments.folder)]
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        results.append(json.loads(said.splitlines()[-1]))
        if not arguments.json:
            row = results[-1]
            print(
                f"{row['case']:14} p50 {row['p50_ms']:8.2f} ms   p95 {row['p95_ms']:8.2f} ms   recall@10"
                f" {row['recall']:.3f}   built in {row['build_s']:8.1f} s   {row['bytes'] / 2**20:8.0f} MiB",
                flush=True,
            )
    by_case = {row["case"].split("-")[0]: row for row in results}
    for mine, peer in (("disk", "faiss"), ("memory", "usearch")):
        if mine in by_case and peer in by_case:
            by_case[mine]["ratio"] = round(by_case[peer]["p50_ms"] / by_case[mine]["p50_ms"], 3)
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
