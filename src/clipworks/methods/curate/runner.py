"""Running a curator over a pool of shards: several processes or Ray, resumable at any moment.

Every pass is a map over shards and a sum. A process reads a shard, and leaves one file: the tally of a
pass, or in the last phase the shard's output and its tally. All files appear whole or not at all, and their
content depends on nothing but the shard, so whoever starts the same curation again finds what is done and
does the rest; the output is the same byte for byte, whoever was killed where.

    out/<shard>                    what is kept, in the format of the pool's shard and under its name
    out/card.html, card.json       the data card
    out/.curation/plan.json        the pool's files and what each pass depends on
    out/.curation/<pass>/<n>.npz   the tally of shard n
    out/.curation/<pass>.npz       their sum
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

from clipworks.data.record_files import find_files, read_records, replacing, write_records
from clipworks.data.source import Skipped
from clipworks.errors import ConfigError, DataError, require
from clipworks.methods.curate.base import TRANSFORM, Curator, Tally
from clipworks.parts.card import Section, Table, check_plots, html

RUNNERS = ("local", "ray")
Runner = Literal["local", "ray"]
Advance = Callable[[str, int, int], None]
Go = Callable[[str, Sequence[int]], Iterator[int]]
"""Does a pass over shards, and says which one is done."""


@dataclass(frozen=True)
class Job:
    """What a process must know besides the curator: the pool's folder, its files, and where to write."""

    pool: Path
    shards: tuple[str, ...]
    out: Path

    def tally(self, stage: str, shard: int) -> Path:
        """The file with a shard's tally of a pass."""
        return self.out / ".curation" / stage / f"{shard:07d}.npz"

    def sum(self, stage: str) -> Path:
        """The file with the whole pool's tally of a pass."""
        return self.out / ".curation" / f"{stage}.npz"


@dataclass(frozen=True)
class Curation:
    """What a curation did.

    Attributes:
        out: its folder.
        shards: how many files the pool has.
        measured: the tally of each pass.
        tally: that of `transform`.
        seconds: how long this call took.
    """

    out: Path
    shards: int
    measured: dict[str, Tally]
    tally: Tally
    seconds: float


def curate(
    curator: Curator,
    pool: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    workers: int = 1,
    runner: Runner = "local",
    advance: Advance = lambda stage, done, total: None,
) -> Curation:
    """Run all passes over a pool and write what is kept, or go on with what was interrupted.

    Args:
        curator: what decides; afterwards it has learned from the pool.
        pool: folders, files, patterns and brace ranges of `.jsonl`, `.jsonl.gz`, `.parquet` and `.tar`.
        out: the folder of the result; each shard's keeps its place below the pool's folder.
        workers: processes; 1 works in this one. A script that asks for more needs the usual
            `if __name__ == "__main__":`.
        runner: `ray` spreads the shards over a Ray cluster whose machines share both folders.
        advance: told the pass, and how many shards of how many are done.

    Raises:
        ConfigError: if the folder holds a curation with other settings, or an option is unknown.
        DataError: if there is no pool, it changed since the curation began, or nothing in it can be read.
        MissingExtra: without a library that it will need.
    """
    if runner not in RUNNERS:
        raise ConfigError(f"runner {runner!r} is none of {', '.join(RUNNERS)}")
    if workers < 1:
        raise ConfigError(f"workers={workers}: at least one is needed")
    check_plots()  # missed before the work, not after it
    began = time.perf_counter()
    root, shards = find_files(pool)
    job = Job(root, tuple(shards), Path(out).resolve())
    if job.out == root or job.out in root.parents or root in job.out.parents:
        raise ConfigError(f"{out}: must lie outside of the pool {root}, and the pool outside of it")
    _check_plan(curator, job)
    spread = _ray if runner == "ray" else _local
    with spread(curator, job, min(workers, len(shards))) as go:
        measured = {stage: _pass(curator, job, stage, go, advance) for stage in (*curator.passes, TRANSFORM)}
    tally = measured.pop(TRANSFORM)
    _write_card(curator, job, measured, tally)
    return Curation(job.out, len(shards), measured, tally, time.perf_counter() - began)


def _pass(curator: Curator, job: Job, stage: str, go: Go, advance: Advance) -> Tally:
    """Do what is left of a pass, sum it up, and let the curator learn from it."""
    path, count = job.sum(stage), len(job.shards)
    if not path.is_file():
        left = [n for n in range(count) if not job.tally(stage, n).is_file()]
        advance(stage, count - len(left), count)
        for done, _ in enumerate(go(stage, left), count - len(left) + 1):
            advance(stage, done, count)
        total = Tally()
        for number in range(count):
            total.add(Tally.load(job.tally(stage, number)))
        if not total.numbers["records"]:
            place = next(iter(total.places.values()), [f"{job.pool}: its {count} files are empty"])[0]
            raise DataError(f"no record of the pool could be read: {place}")
        total.save(path)
    tally = Tally.load(path)
    if stage != TRANSFORM:
        curator.settle(stage, tally)
    return tally


def work(curator: Curator, job: Job, stage: str, shard: int) -> None:
    """One pass over one shard, left as a file."""
    name, skipped = job.shards[shard], Skipped()
    if stage == TRANSFORM:
        records = read_records(job.pool, name, skipped)
        write_records(curator.transform(records), job.out / name, job.pool / name)
        tally = curator.tally
    else:
        tally = curator.measure(read_records(job.pool, name, skipped, curator.reads), stage)
    tally.skip(skipped)
    tally.save(job.tally(stage, shard))


class Worker:
    """One process: it keeps its curator through the passes, which it follows by their sums on disk."""

    def __init__(self, curator: Curator, job: Job) -> None:
        self.curator, self.job = curator, job
        self.settled: set[str] = set()

    def work(self, stage: str, shard: int) -> int:
        """One pass over one shard."""
        for earlier in takewhile(lambda name: name != stage, self.curator.passes):
            if earlier not in self.settled:
                self.curator.settle(earlier, Tally.load(self.job.sum(earlier)))
                self.settled.add(earlier)
        work(self.curator, self.job, stage, shard)
        return shard


# ------------------------------------------------------------------------------------------ processes

_worker: Worker | None = None


@contextlib.contextmanager
def _local(curator: Curator, job: Job, workers: int) -> Iterator[Go]:
    """This process, or several that live through all passes."""
    if workers == 1:
        yield partial(_alone, curator, job)
        return
    # Spawned and not forked: Arrow and numpy may have threads, which a fork does not survive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(curator, job)) as executor:
        try:
            yield lambda stage, shards: _through(executor, stage, iter(shards), 4 * workers)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed, perhaps for want of memory; the same command goes on where it stopped, "
                "try fewer workers"
            ) from error


def _alone(curator: Curator, job: Job, stage: str, shards: Sequence[int]) -> Iterator[int]:
    for shard in shards:
        work(curator, job, stage, shard)
        yield shard


def _through(executor: ProcessPoolExecutor, stage: str, left: Iterator[int], most: int) -> Iterator[int]:
    """A few shards for each worker at a time and not all: a pool may have a million."""
    waiting: set[Future[int]] = set()
    try:
        while True:
            waiting |= {executor.submit(_step, stage, shard) for shard in islice(left, most - len(waiting))}
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for future in waiting:
            future.cancel()


def _begin(curator: Curator, job: Job) -> None:
    global _worker
    _worker = Worker(curator, job)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Killed, the parent cannot end its workers, and they would wait for work for ever.
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _step(stage: str, shard: int) -> int:
    if _worker is None:
        raise RuntimeError("a worker was asked before it was told its task")
    return _worker.work(stage, shard)


class _RayWorker(Worker):
    """One process of a Ray cluster; a row names a shard."""

    def __init__(self, curator: Curator, job: Job, stage: str) -> None:
        super().__init__(curator, job)
        self.stage = stage

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"item": self.work(self.stage, int(row["item"]))}


@contextlib.contextmanager
def _ray(curator: Curator, job: Job, workers: int) -> Iterator[Go]:
    """Ray Data; a Ray that is connected already is used as it is, else one of this machine."""
    ray = require("ray", extra="ray", purpose="the runner ray")
    data = require("ray.data", extra="ray", purpose="the runner ray")

    def go(stage: str, shards: Sequence[int]) -> Iterator[int]:
        if not shards:
            return
        rows = data.from_items(list(shards), override_num_blocks=min(len(shards), 4 * workers)).map(
            _RayWorker,
            fn_constructor_args=(curator, job, stage),
            compute=data.ActorPoolStrategy(size=min(workers, len(shards))),
        )
        for row in rows.iter_rows():
            yield int(row["item"])

    started = not ray.is_initialized()
    if started:
        # One more than there are workers, for what feeds them.
        ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    data.DataContext.get_current().enable_progress_bars = False
    try:
        yield go
    finally:
        if started:
            ray.shutdown()


# ------------------------------------------------------------------------------------- plan and card


def _check_plan(curator: Curator, job: Job) -> None:
    """Begin a plan, or make sure that the one in the folder is this one."""
    try:
        pool = [[name, (job.pool / name).stat().st_size] for name in job.shards]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    stages = {stage: curator.identity(stage) for stage in (*curator.passes, TRANSFORM)}
    plan = json.loads(json.dumps({"curator": type(curator).__name__, "pool": pool, "stages": stages}))
    path = job.out / ".curation" / "plan.json"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["pool"] != pool:
            raise DataError(
                f"{job.out}: the pool has changed since this curation began; name another folder or delete it"
            )
        for stage in old["stages"].keys() | stages.keys():
            begun = (job.out / ".curation" / stage).is_dir()
            was, now = old["stages"].get(stage), plan["stages"].get(stage)
            if begun and now is not None and (was, old["curator"]) != (now, plan["curator"]):
                changed = [name for name in now if (was or {}).get(name) != now[name]]
                raise ConfigError(
                    f"{job.out}: holds a curation with other settings ({', '.join(changed) or 'curator'}); "
                    "name another folder or delete it"
                )
    elif job.out.is_dir() and any(entry.name != ".curation" for entry in job.out.iterdir()):
        raise ConfigError(f"{job.out}: is not empty and holds no curation; name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plan, ensure_ascii=False, indent=1), encoding="utf-8")
    for stale in job.out.rglob(".*.part"):
        with contextlib.suppress(FileNotFoundError):  # a worker that outlived its parent has just ended
            stale.unlink()


def _write_card(curator: Curator, job: Job, measured: dict[str, Tally], tally: Tally) -> None:
    settings = curator.identity()
    summary = {"curator": type(curator).__name__, "settings": settings, "shards": len(job.shards)}
    summary |= {"passes": {stage: one.summary() for stage, one in measured.items()}} | tally.summary()
    read, kept = tally.numbers["records"], tally.numbers["kept"]
    rows: list[Sequence[Any]] = [("read", read, ""), ("kept", kept, f"{kept / max(1, read):.2%}")]
    rows += [
        (f"dropped: {reason}", count, f"{count / max(1, read):.2%}")
        for reason, count in sorted(tally.dropped.items())
    ]
    lost = [
        (reason, count, "; ".join(tally.places.get(reason, [])))
        for reason, count in sorted(tally.unreadable.items())
    ]
    sections: list[Section] = [
        Table("Records", ("what", ">number", ">share"), rows, f"From {len(job.shards):,} shards."),
        *curator.report(measured, tally),
        Table("Not readable", ("what", ">places", "first of them"), lost),
        Table("Settings", ("parameter", "value"), [(name, value) for name, value in settings.items()]),
    ]
    title = f"Data card: what {type(curator).__name__} kept"
    for name, text in (
        ("card.html", html(title, sections)),
        ("card.json", json.dumps(summary, ensure_ascii=False, indent=2)),
    ):
        with replacing(job.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogatepass")
