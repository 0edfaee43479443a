"""MetaCLIP's curation against the published algorithm, and one process against two.

    python benchmarks/curate.py [--entries 100000] [--texts 20000] [--json]

- `matching`: texts a second in which all entries of a list are found, ours against a scan of the text for
  every entry, as the paper's code does it. Both find the same on the texts that both see.
- `count`, `transform`: the two passes over records, in texts a second of one core; no peer.
- `two-workers`: the whole curation of a pool of JSONL shards on disk by two processes, against one.

Lists and captions are generated: words of Zipf's law, and pairs of them; matches a caption are as many as
with the paper's list. Rates of one process are by processor time, so that a busy machine does not show;
those of two are by the clock, and mean something only on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipworks.data.metadata import Metadata
from clipworks.methods.curate.metaclip import Matcher, MetaCLIP
from clipworks.methods.curate.runner import curate

SCANNED = 50  # texts that the scan is measured on


def words(count: int, rng: np.random.Generator) -> list[str]:
    """Different words of one to four syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        length = int(rng.integers(1, 5))
        letters = zip(rng.integers(16, size=length), rng.integers(5, size=length))
        found["".join("bcdfghklmnprstvz"[a] + "aeiou"[b] for a, b in letters)] = None
    return list(found)


def material(entries: int, texts: int, seed: int = 0) -> tuple[Metadata, list[str]]:
    """A list, a half of it words and a half pairs, and captions of 5 to 15 words."""
    rng = np.random.default_rng(seed)
    known = words(entries, rng)
    frequency = 1 / np.arange(1, entries + 1)
    frequency /= frequency.sum()
    drawn = rng.choice(entries, (3 * entries, 2), p=frequency)
    pairs = dict.fromkeys(f"{known[a]} {known[b]}" for a, b in drawn)
    listed = [*known[: entries // 2], *pairs][:entries]
    lengths = rng.integers(5, 16, size=texts)
    running = iter(rng.choice(entries, int(lengths.sum()), p=frequency).tolist())
    return Metadata(listed), [" ".join(known[next(running)] for _ in range(n)) + "." for n in lengths]


def scan(entries: list[str], text: str) -> list[int]:
    """The published algorithm: look for every entry, with its blanks, in the text."""
    spaced = f" {text} "
    for mark in ",.;:?!`":
        spaced = spaced.replace(mark, f" {mark} ")
    for blank in "\t\n\r":
        spaced = spaced.replace(blank, " ")
    return [number for number, entry in enumerate(entries) if entry in spaced]


def rate(work: Callable[[], Any], count: int, rounds: int = 3) -> float:
    """Texts a second of processor time, the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return count / best


def single(metadata: Metadata, texts: list[str]) -> list[dict[str, Any]]:
    """The cases of one process."""
    began = time.process_time()
    matcher = Matcher(metadata)
    built = time.process_time() - began
    spaced = [f" {entry} " for entry in metadata.entries]
    some = texts[:SCANNED]
    for text in some:
        if scan(spaced, text) != matcher.ids(text):
            raise SystemExit(f"the scan and the automaton differ on {text!r}")
    ours = rate(lambda: [matcher.ids(text) for text in texts], len(texts))
    peer = rate(lambda: [scan(spaced, text) for text in some], len(some))
    matches = sum(len(matcher.ids(text)) for text in texts) / len(texts)
    records = [{"key": str(i), "caption": text} for i, text in enumerate(texts)]
    curator = MetaCLIP(metadata, t=max(1, len(texts) // 100)).fit(records)
    list(curator.transform(records[:10]))
    return [
        {
            "case": "matching",
            "ours": ours,
            "peer": peer,
            "ratio": ours / peer,
            "matches": matches,
            "build": built,
        },
        {
            "case": "count",
            "ours": rate(lambda: curator.count(records), len(texts)),
            "peer": None,
            "ratio": None,
        },
        {
            "case": "transform",
            "ours": rate(lambda: list(curator.transform(records)), len(texts)),
            "peer": None,
            "ratio": None,
        },
    ]


def several(metadata: Metadata, texts: list[str], shards: int) -> dict[str, Any]:
    """The whole curation by one process and by two, in texts a second of the clock."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool"
        pool.mkdir()
        for shard in range(shards):
            lines = (
                json.dumps({"key": f"{shard}-{i}", "caption": text, "url": f"http://example.org/{i}.jpg"})
                for i, text in enumerate(texts)
            )
            (pool / f"{shard:04d}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        for workers in (1, 2):
            curator = MetaCLIP(metadata, t=max(1, shards * len(texts) // 100))
            done = curate(curator, pool, Path(folder) / f"out-{workers}", workers=workers)
            rates[workers] = shards * len(texts) / done.seconds
    return {"case": "two-workers", "ours": rates[2], "peer": rates[1], "ratio": rates[2] / rates[1]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000, help="of the list")
    parser.add_argument("--texts", type=int, default=20_000, help="in one shard")
    parser.add_argument("--shards", type=int, default=40, help="of the pool that two workers curate")
    parser.add_argument("--only", choices=("single", "two-workers"), help="a part of the cases")
    parser.add_argument("--json", action="store_true", help="print a list of records")
    options = parser.parse_args()
    metadata, texts = material(options.entries, options.texts)
    results = single(metadata, texts) if options.only != "two-workers" else []
    if options.only != "single":
        results.append(several(metadata, texts, options.shards))
    results = [{k: round(v, 2) if isinstance(v, float) else v for k, v in one.items()} for one in results]
    if options.json:
        print(json.dumps(results))
        return
    for one in results:
        ratio = f", {one['ratio']:.1f} times {one['peer']:,.0f}" if one["ratio"] else ""
        print(f"{one['case']:12s} {one['ours']:10,.0f} texts a second{ratio}")


if __name__ == "__main__":
    main()
