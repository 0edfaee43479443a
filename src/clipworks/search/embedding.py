"""Pictures, and their captions, to tables of vectors: in one process, or spread by Ray over a cluster.

The work is a map over pieces (shards, see `pieces`). Whoever does a piece writes one Parquet file and then a
receipt, each there whole or not at all. What they hold depends on the piece alone and not on who did it, and
so the same call started again does what has no receipt, and local and Ray give the same rows.

    out/<piece>.parquet               the rows of a piece; or, as a Lance table,
    out/embeddings.lance              the rows of all pieces, in the order of the pieces
    out/.embedding/plan.json          what the vectors depend on
    out/.embedding/<piece>.json       the receipt: rows, and what was skipped
    out/.embedding/<piece>.parquet    rows on their way into the Lance table

Columns are `shard` (the piece's name), `key`, `caption` (the first; or null), `vector` (D,) fp32 of unit
length and, where captions are encoded too, `text_vector` (D,) or null. Rows stand in the order of the piece's
records; records that cannot be read are left out and counted.

On equal machines with equal numbers of threads vectors are bit for bit the same. A matrix product that
another processor, or another number of threads, sums in another order differs by less than 1e-6.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from clipworks.data.record_files import replacing
from clipworks.data.source import Example, Skipped
from clipworks.encode.bulk import encode_images, encode_texts
from clipworks.encode.precision import Precision
from clipworks.errors import ClipworksError, ConfigError, DataError, require
from clipworks.parts.features import fingerprint
from clipworks.search.pieces import Piece, find_pieces, is_whole
from clipworks.search.table import quoted

if TYPE_CHECKING:
    from clipworks.core.clip import Clip
    from clipworks.encode.engines import Name

Format = Literal["parquet", "lance"]
Runner = Literal["local", "ray"]
FORMATS, RUNNERS = ("parquet", "lance"), ("local", "ray")
TABLE = "embeddings"
_OURS = ".embedding"
_ROWS, _BYTES = 1024, 1 << 28  # of records that are held at once, with their encoded pictures
Go = Callable[[Sequence[Piece]], Iterator["Receipt"]]


@dataclass(frozen=True)
class Workers:
    """How Ray spreads the work.

    Attributes:
        count: processes; None for as many as the cluster has room for.
        threads: processor cores of each.
        gpu: whether each has a GPU; None where the cluster has any.
    """

    count: int | None = None
    threads: int = 1
    gpu: bool | None = None


@dataclass(frozen=True)
class Job:
    """What whoever does a piece must know, besides the model.

    Attributes:
        out: the folder of results.
        format: `parquet` or `lance`.
        texts: encode captions too.
        batch_size, precision, engine: as `encode_images` has them.
    """

    out: Path
    format: Format = "parquet"
    texts: bool = False
    batch_size: int = 64
    precision: Precision = "fp32"
    engine: Name = "torch"

    def rows(self, piece: Piece) -> Path:
        """The Parquet file of a piece's rows."""
        return (self.out if self.format == "parquet" else self.out / _OURS) / f"{piece.name}.parquet"

    def receipt(self, piece: Piece) -> Path:
        """The file that says that a piece is done."""
        return self.out / _OURS / f"{piece.name}.json"


@dataclass(frozen=True)
class Receipt:
    """What became of one piece.

    Attributes:
        name, source, stamp: of the piece.
        rows: how many vectors of pictures.
        skipped: by reason, how many records or files were left out; `first` of them by reason.
    """

    name: str
    source: str
    stamp: str | None
    rows: int
    skipped: dict[str, int]
    first: dict[str, list[str]]


@dataclass(frozen=True)
class Embedded:
    """What a call to `embed` has done.

    Attributes:
        out: the folder.
        pieces: how many there are, of which `reused` were done before.
        rows: of all pieces.
        computed: rows of this call.
        skipped: what was left out of all pieces, whenever they were done.
        seconds: how long this call took.
    """

    out: Path
    pieces: int
    reused: int
    rows: int
    computed: int
    seconds: float
    skipped: Skipped = field(default_factory=Skipped)


def embed(
    clip: Clip,
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    format: Format = "parquet",
    texts: bool = False,
    batch_size: int = 64,
    precision: Precision = "fp32",
    engine: Name = "torch",
    runner: Runner = "local",
    workers: Workers = Workers(),
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Write the vectors of all pictures of some shards or folders, or go on with what was interrupted.

    Args:
        clip: the model; Ray takes it to its workers as it is.
        sources: `.tar` and `.parquet` shards (paths, patterns, brace ranges, folders; tar files also behind
            `https://…` or `pipe:…`), or folders of pictures.
        out: the folder of results, which only one call at a time writes to.
        format: a Parquet file for each piece, or one Lance table.
        texts: encode each record's first caption too.
        batch_size, precision, engine: as `encode_images` has them; each worker of Ray makes its engine ready.
        runner: `ray` spreads the pieces over a Ray cluster whose machines share sources and folder.
        workers: of Ray.
        advance: told how many pieces of how many are done.

    Raises:
        ConfigError: if the folder holds other vectors, or an option is unknown.
        DataError: if there is nothing to embed, or nothing of it can be read.
        MissingExtra: without a library that it will need.
    """
    if format not in FORMATS or runner not in RUNNERS:
        raise ConfigError(
            f"format is one of {', '.join(FORMATS)} and runner of {', '.join(RUNNERS)}, not {format!r} and"
            f" {runner!r}"
        )
    if batch_size < 1 or workers.threads < 1 or (workers.count is not None and workers.count < 1):
        raise ConfigError(f"batch_size, workers and threads are at least 1, not {batch_size} and {workers}")
    _arrow()  # missed before the work, not after it
    began = time.perf_counter()
    job = Job(Path(out).resolve(), format, texts, batch_size, precision, engine)
    pieces = find_pieces(sources)
    spread = _local(clip, job) if runner == "local" else _ray(clip, job, workers, len(pieces))
    with spread as go:
        _check_plan(clip, job)
        receipts = {piece.name: receipt for piece in pieces if (receipt := _finished(job, piece))}
        left = [piece for piece in pieces if piece.name not in receipts]
        reused, computed = len(receipts), 0
        table = _Table(clip, job, pieces, left) if format == "lance" else None
        advance(reused, len(pieces))
        if table is not None:
            table.take(receipts)
        for receipt in go(left):
            receipts[receipt.name] = receipt
            computed += receipt.rows
            if table is not None:
                table.take(receipts)
            advance(len(receipts), len(pieces))
    skipped = Skipped()
    for piece in pieces:
        _add(skipped, receipts[piece.name])
    rows = sum(receipts[piece.name].rows for piece in pieces)
    if not rows:
        raise DataError(f"{pieces[0].source}: no picture could be read; {skipped}")
    return Embedded(job.out, len(pieces), reused, rows, computed, time.perf_counter() - began, skipped)


def work(clip: Clip, job: Job, piece: Piece, threads: int | None = None) -> Receipt:
    """Embed one piece, and leave its rows and its receipt; `threads` read pictures, None is one a core."""
    _, parquet = _arrow()
    skipped, rows = Skipped(), 0
    stamp = piece.stamp()  # before reading: what changes meanwhile is done again next time
    schema = _schema(clip, job)
    with replacing(job.rows(piece)) as temporary, parquet.ParquetWriter(temporary, schema) as file:
        for examples in _portions(piece, skipped):
            portion = _rows(clip, job, piece, examples, skipped, threads, schema)
            file.write_table(portion)
            rows += len(portion)
    receipt = Receipt(piece.name, piece.source, stamp, rows, skipped.counts, skipped.first)
    with replacing(job.receipt(piece)) as temporary:
        temporary.write_text(json.dumps(asdict(receipt), indent=1), encoding="utf-8")
    return receipt


def _rows(
    clip: Clip,
    job: Job,
    piece: Piece,
    examples: Sequence[Example],
    skipped: Skipped,
    threads: int | None,
    schema: Any,
) -> Any:
    """The table of some records, without those whose picture cannot be read."""
    pa, _ = _arrow()
    settings: dict[str, Any] = {"precision": job.precision, "engine": job.engine}
    pictures = [example.image for example in examples]
    encoded = encode_images(
        clip, pictures, **settings, batch_size=job.batch_size, workers=threads, on_error="skip"
    )
    for place, reason in encoded.errors:
        skipped.add("unreadable picture", f"{piece.source}: {examples[place].key}", reason)
    kept = [examples[place] for place in encoded.kept]
    captions = [_caption(example) for example in kept]
    columns = {
        "shard": pa.array([_clean(piece.name)] * len(kept), pa.string()),
        "key": pa.array([_clean(example.key) for example in kept], pa.string()),
        "caption": pa.array([caption and _clean(caption) for caption in captions], pa.string()),
        "vector": _vectors(encoded.features),
    }
    if job.texts:
        said = [row for row, caption in enumerate(captions) if caption is not None]
        vectors = torch.zeros(len(kept), clip.width)
        features = encode_texts(clip, [captions[row] or "" for row in said], **settings)
        vectors[torch.tensor(said, dtype=torch.int64)] = features.cpu()
        columns["text_vector"] = _vectors(vectors, [caption is None for caption in captions])
    return pa.table(columns, schema=schema)


def _vectors(vectors: torch.Tensor, missing: Sequence[bool] | None = None) -> Any:
    pa, _ = _arrow()
    flat = pa.array(vectors.float().cpu().numpy().reshape(-1), pa.float32())
    mask = None if missing is None else pa.array(missing, pa.bool_())
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.float32(), vectors.shape[1]), mask=mask)


def _schema(clip: Clip, job: Job) -> Any:
    pa, _ = _arrow()
    vector = pa.list_(pa.float32(), clip.width)
    columns = [*((name, pa.string()) for name in ("shard", "key", "caption")), ("vector", vector)]
    return pa.schema(columns + ([("text_vector", vector)] if job.texts else []))


def _portions(piece: Piece, skipped: Skipped) -> Iterator[list[Example]]:
    """Records with a picture, no more at once than the memory bears."""
    portion: list[Example] = []
    size = 0
    for example in piece.examples(skipped):
        if example.image is None:
            skipped.add("record without picture", f"{piece.source}: {example.key}")
            continue
        portion.append(example)
        size += len(example.image) if isinstance(example.image, bytes) else 0
        if len(portion) == _ROWS or size >= _BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _caption(example: Example) -> str | None:
    """The first of the texts that came with the picture, else the first of any."""
    for text in (example.texts.get("alt"), *example.texts.values()):
        if text:
            return text if isinstance(text, str) else text[0]
    return None


def _clean(text: str) -> str:
    """A text as a column can hold it: half a surrogate pair, which a file name may have, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


# ------------------------------------------------------------------------------------------------- runners


@contextlib.contextmanager
def _local(clip: Clip, job: Job) -> Iterator[Go]:
    yield lambda pieces: (work(clip, job, piece) for piece in pieces)


class _RayWorker:
    """A process of a Ray cluster, which gets the model once; it turns places of pieces into receipts."""

    def __init__(self, given: Any, job: Job, workers: Workers) -> None:
        ray = require("ray", extra="ray", purpose="the runner ray")
        torch.set_num_threads(workers.threads)
        clip, self.pieces = ray.get(given)
        self.clip = clip.to("cuda" if workers.gpu else "cpu")
        self.job, self.threads = job, workers.threads

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            receipt = work(self.clip, self.job, self.pieces[row["item"]], self.threads)
        except (ClipworksError, OSError) as error:  # the input's or the disk's fault: one line, as locally
            return {"receipt": "", "wrong": str(error)}
        # As a text, for another machine may see the file that says the same a little later.
        return {"receipt": json.dumps(asdict(receipt)), "wrong": ""}


@contextlib.contextmanager
def _ray(clip: Clip, job: Job, workers: Workers, pieces: int) -> Iterator[Go]:
    """Ray Data; a Ray that is connected already is used as it is, else RAY_ADDRESS, else this machine."""
    ray = require("ray", extra="ray", purpose="the runner ray")
    data = require("ray.data", extra="ray", purpose="the runner ray")

    def go(left: Sequence[Piece]) -> Iterator[Receipt]:
        if not left:
            return
        gpus = workers.gpu if workers.gpu is not None else ray.cluster_resources().get("GPU", 0) >= 1
        told = replace(workers, gpu=bool(gpus))
        room = ray.cluster_resources().get("GPU", 0) if gpus else (cores() - 1) // workers.threads
        count = min(len(left), workers.count or max(1, int(room)))
        # Kept here while the actors live, which get it anew when one is restarted.
        given = ray.put((clip, list(left)))
        rows = data.from_items(list(range(len(left))), override_num_blocks=min(len(left), 4 * count)).map(
            _RayWorker,
            fn_constructor_args=(given, job, told),
            compute=data.ActorPoolStrategy(size=count),
            num_cpus=workers.threads,
            **({"num_gpus": 1} if gpus else {}),
        )
        for row in rows.iter_rows():
            if row["wrong"]:
                raise DataError(row["wrong"])
            yield Receipt(**json.loads(row["receipt"]))

    def cores() -> int:
        return int(ray.cluster_resources().get("CPU", 1))

    started = not ray.is_initialized()
    if started:
        connecting = "RAY_ADDRESS" in os.environ
        count = workers.count or max(1, (os.cpu_count() or 1) // workers.threads)
        # One more than the workers take, for what feeds them.
        room = {} if connecting else {"num_cpus": min(count, pieces) * workers.threads + 1}
        ray.init(**room, include_dashboard=False, log_to_driver=False, logging_level="error")
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plan and its progress: nobody asked
    data.DataContext.get_current().enable_progress_bars = False
    try:
        yield go
    finally:
        if started:
            ray.shutdown()


# ---------------------------------------------------------------------------------- plan, receipts, table


def _check_plan(clip: Clip, job: Job) -> None:
    """Begin a plan, or make sure that the one in the folder is this one."""
    plan: dict[str, Any] = {
        "model": fingerprint(clip),
        "width": clip.width,
        "preprocessing": clip.preprocessing.to_dict(),
        "precision": "int8" if job.engine.endswith("int8") else job.precision,
        "texts": job.texts,
        "format": job.format,
    }
    path = job.out / _OURS / "plan.json"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in plan if old.get(name) != plan[name]]
        if changed:
            raise ConfigError(
                f"{job.out}: holds vectors with other settings ({', '.join(changed)}); name another folder"
            )
    elif job.out.is_dir() and any(entry.name != _OURS for entry in job.out.iterdir()):
        raise ConfigError(f"{job.out}: is not empty and holds no vectors; name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    for stale in (*job.out.glob(".*.part"), *path.parent.glob(".*.part")):
        stale.unlink(missing_ok=True)


def _finished(job: Job, piece: Piece) -> Receipt | None:
    """The receipt of a piece that is done; one that changed, or could not be read to its end, is not."""
    try:
        receipt = Receipt(**json.loads(job.receipt(piece).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    there = job.rows(piece).is_file() if job.format == "parquet" else (job.out / f"{TABLE}.lance").is_dir()
    same = (receipt.source, receipt.stamp) == (piece.source, piece.stamp())
    return receipt if there and same and is_whole(receipt.skipped) else None


def _add(skipped: Skipped, receipt: Receipt) -> None:
    """Count what one piece left out."""
    for reason, count in receipt.skipped.items():
        skipped.counts[reason] = skipped.counts.get(reason, 0) + count
        first = skipped.first.setdefault(reason, [])
        first += receipt.first[reason][: 5 - len(first)]


class _Table:
    """The Lance table, which takes the pieces' rows in the order of the pieces.

    A piece's rows come in by one commit and its file goes afterwards. So of a file that an earlier call left
    behind the table knows whether it has its rows; what is done again is taken out first.
    """

    def __init__(self, clip: Clip, job: Job, pieces: Sequence[Piece], left: Sequence[Piece]) -> None:
        lancedb = require("lancedb", extra="search", purpose="writing a Lance table")
        self.job, self.pieces, self.place = job, pieces, 0
        self.schema = _schema(clip, job)
        made = lancedb.connect(str(job.out))
        self.table = made.create_table(TABLE, schema=self.schema, exist_ok=True)
        self.earlier = {piece.name for piece in pieces} - {piece.name for piece in left}
        if self.table.count_rows():
            for piece in left:
                self.table.delete(f"shard = {quoted(piece.name)}")

    def take(self, receipts: dict[str, Receipt]) -> None:
        """Take the rows of all pieces that are done and have no unfinished one before them."""
        ready: list[Piece] = []
        while self.place < len(self.pieces) and self.pieces[self.place].name in receipts:
            ready.append(self.pieces[self.place])
            self.place += 1
        waiting = [p for p in ready if p.name not in self.earlier or self.job.rows(p).is_file()]
        new = [piece for piece in waiting if not self._has(piece)]
        pa, parquet = _arrow()
        if any(receipts[piece.name].rows for piece in new):
            batches = (
                batch for piece in new for batch in parquet.ParquetFile(self.job.rows(piece)).iter_batches()
            )
            self.table.add(pa.RecordBatchReader.from_batches(self.schema, batches))
        for piece in waiting:
            self.job.rows(piece).unlink()

    def _has(self, piece: Piece) -> bool:
        if piece.name not in self.earlier:
            return False
        return bool(self.table.count_rows(f"shard = {quoted(piece.name)}"))


def _arrow() -> tuple[Any, Any]:
    return (
        require("pyarrow", extra="train", purpose="writing vectors"),
        require("pyarrow.parquet", extra="train", purpose="writing vectors"),
    )
