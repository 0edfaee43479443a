"""Neighbors: the rows nearest to a vector; exactly, or through an index that says how much it misses.

Few rows are compared one by one, which is exact. From `ENOUGH` on Lance's IVF-RQ pays: rows are parted into
cells around centers, only the cells nearest to a query are looked at, there by one bit of each number after a
random rotation (Gao and Long, RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound,
SIGMOD 2024), and the best candidates are compared once more by their vectors. How many cells and how many
candidates is not guessed: on a sample of the table's own rows, and of texts, whose vectors lie elsewhere than
those of pictures, the answers are compared with the exact ones, and the cheapest setting is kept that finds
at least `WANTED` of the ten nearest.

In a folder, Lance is asked for the candidates' ids alone, and their vectors and columns come from a mapped
file (see `mapped`); elsewhere, and where that file is of another version, Lance does all of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipworks.search.table import SHOWN, Table, condition, run

ENOUGH = 50_000
"""Rows from which an index is built; below it looking at every row takes less than about 20 ms."""
GROWTH = 1.5
"""An index is built anew when the table has grown by this factor; until then new rows are added to it."""
FEWEST = 256
"""Rows below which there is nothing to part into cells."""
WANTED, K = 0.96, 10
_PROBES = (4, 8, 16, 32, 64, 128, 256)
_REFINE = (5, 10, 20, 40)
_SAMPLE = 128
_TOGETHER = 32  # questions under way at once
_BLOCK = 8192
_NAME = "neighbors"


@dataclass(frozen=True)
class Settings:
    """How the index is asked, and what it was measured to find.

    Attributes:
        partitions: cells.
        probes: cells that are looked at.
        refine: candidates compared by their vectors, for each hit wanted.
        rows: of the table when the index was built.
        recall: the share of the exact ten nearest that it finds, the lesser of the two that follow.
        recall_rows: for vectors of the table, themselves left out.
        recall_texts: for vectors of texts; None if it was built without the model.
        sample: how many questions that was measured with.
        seconds: how long building and measuring took.
    """

    partitions: int
    probes: int
    refine: int
    rows: int
    recall: float
    recall_rows: float
    recall_texts: float | None
    sample: int
    seconds: float


def settings_of(table: Table) -> Settings | None:
    """Those of a table's index; None if it has none, or lost it."""
    kept = table.setting(_NAME)
    if kept is None or not any("vector" in index.columns for index in run(table.lance.list_indices())):
        return None
    return Settings(**kept)


def pays(table: Table, settings: Settings | None) -> bool:
    """Whether an index should be built now."""
    rows = len(table)
    return rows >= ENOUGH and (settings is None or rows >= GROWTH * settings.rows)


def build(table: Table, texts: np.ndarray | None = None) -> Settings:
    """Index the vectors, lay their copy beside them, and find out how to ask.

    Args:
        table: with at least 256 rows.
        texts: (n, D) unit vectors of texts.
    """
    from lancedb.index import Bitmap, IvfRq

    start = time.monotonic()
    rows = len(table)
    partitions = max(1, round(rows**0.5))
    # Sampled k-means: more rows or rounds move the centers, not the recall.
    config = IvfRq(distance_type="cosine", num_partitions=partitions, max_iterations=20, sample_rate=64)
    run(table.lance.create_index("vector", config=config, replace=True))
    if table.has_texts:  # pictures and texts are told apart in every query
        run(table.lance.create_index("kind", config=Bitmap(), replace=True))
    table.map()
    own = sample(table)
    found = _tune(table, partitions, own, texts)
    settings = Settings(**found, rows=rows, seconds=round(time.monotonic() - start, 1))
    table.keep(_NAME, asdict(settings))
    return settings


def sample(table: Table, count: int | None = None, where: str | None = None) -> np.ndarray:
    """About so many vectors (n, D) of the table, the same ones each time: those whose hash begins low."""
    share = (_SAMPLE if count is None else count) / max(1, len(table))
    low = f"hash < '{min(int(share * 16**8), 16**8 - 1):08x}'"
    chosen = low if where is None else f"{low} AND {where}"
    pieces = [matrix(batch) for batch in table.batches(("vector",), chosen)]
    return np.concatenate(pieces) if pieces else np.empty((0, int(table.about["width"])), np.float32)


def _tune(table: Table, partitions: int, own: np.ndarray, texts: np.ndarray | None) -> dict[str, Any]:
    """The first of the settings, from cheap to dear, that finds enough; the last one if none does."""
    questions = own if texts is None else np.concatenate([own, texts])
    # A row finds itself, whatever the index does: one more is asked for, and it is not counted.
    truth, _ = exact(table, questions, K + 1)
    outcome: dict[str, Any] = {}
    for probes in [count for count in _PROBES if count < partitions] + [partitions]:
        previous = -1.0
        for refine in _REFINE:
            trial = Settings(partitions, probes, refine, len(table), 0, 0, None, 0, 0)
            answers = nearest_many(table, questions, K + 1, settings=trial, columns=())
            recalls = np.array(
                [
                    _recall([row["_rowid"] for row in answer], right, skip=place < len(own))
                    for place, (answer, right) in enumerate(zip(answers, truth, strict=True))
                ]
            )
            rows = float(recalls[: len(own)].mean()) if len(own) else 1.0
            words = float(recalls[len(own) :].mean()) if texts is not None else None
            outcome = {
                "partitions": partitions,
                "probes": probes,
                "refine": refine,
                "recall": min(rows, 1.0 if words is None else words),
                "recall_rows": rows,
                "recall_texts": words,
                "sample": len(questions),
            }
            if outcome["recall"] >= WANTED:
                return outcome
            if outcome["recall"] < previous + 0.005:
                break  # what is missing lies in other cells
            previous = outcome["recall"]
    return outcome


def _recall(found: list[int], right: np.ndarray, skip: bool) -> float:
    expected = right[1:] if skip else right[:K]
    return len(set(expected.tolist()) & set(found[: K + skip])) / max(1, len(expected))


def nearest(
    table: Table,
    vector: np.ndarray,
    k: int,
    where: str | None = None,
    *,
    settings: Settings | None = None,
    columns: Sequence[str] = SHOWN,
) -> list[dict[str, Any]]:
    """The k rows with the largest cosine to a vector (D,), best first.

    Each has the named columns, `_distance`, which is 1 - cosine, and `_rowid`. Without settings, exact.

    Raises:
        ConfigError: if `where` is not a condition on the columns.
    """
    return nearest_many(table, np.asarray(vector)[None], k, where, settings=settings, columns=columns)[0]


def nearest_many(
    table: Table,
    vectors: np.ndarray,
    k: int,
    where: str | None = None,
    *,
    settings: Settings | None = None,
    columns: Sequence[str] = SHOWN,
) -> list[list[dict[str, Any]]]:
    """`nearest` of each of several vectors (q, D), some of them at once.

    Raises:
        ConfigError: if `where` is not a condition on the columns.
    """
    vectors = _unit(vectors)
    answers: list[list[dict[str, Any]]] = []
    for start in range(0, len(vectors), _TOGETHER):
        part = vectors[start : start + _TOGETHER]
        found = None if settings is None else _through_copy(table, part, k, where, settings, columns)
        if found is None:
            queries = [_query(table, vector, k, where, settings, columns) for vector in part]
            found = [answer.to_pylist() for answer in _answers(queries, where)]
        answers += found
    return answers


def _through_copy(
    table: Table, vectors: np.ndarray, k: int, where: str | None, settings: Settings, columns: Sequence[str]
) -> list[list[dict[str, Any]]] | None:
    """`nearest_many` by the copy of the rows; None if there is none of what Lance answered with."""
    copy = table.mapped
    if copy is None:
        return None
    queries = [_query(table, vector, k, where, settings) for vector in vectors]
    answers = []
    for vector, found in zip(vectors, _answers(queries, where), strict=True):
        ids = found.column("_rowid").to_numpy().astype(np.int64)
        places = copy.places(ids)
        if places is None:
            return None
        cosines = copy.vectors(places) @ vector if len(places) else np.empty(0, np.float32)
        best = np.argsort(-cosines, kind="stable")[:k]
        rows = copy.rows(places[best], columns)
        for row, number, cosine in zip(rows, ids[best].tolist(), cosines[best].tolist(), strict=True):
            row["_rowid"], row["_distance"] = number, 1 - cosine
        answers.append(rows)
    return answers


def _query(
    table: Table,
    vector: np.ndarray,
    k: int,
    where: str | None,
    settings: Settings | None,
    columns: Sequence[str] | None = None,
) -> Any:
    """The question to Lance for k rows with these columns; without columns, for the ids of the candidates."""
    query = table.lance.query().nearest_to(vector).column("vector").distance_type("cosine")
    query = query.select([*(columns or ()), "_distance"]).with_row_id()
    if settings is None:
        query = query.bypass_vector_index().limit(k)
    else:
        # Cells enough for k rows twice over, and no more vectors read for thousands of hits than for few.
        crowd = max(1, settings.rows // settings.partitions)
        probes = min(settings.partitions, settings.probes + 2 * k // crowd)
        query = query.nprobes(probes)
        if where is not None:
            query = query.maximum_nprobes(settings.partitions)
        refine = max(1, -(-settings.refine * K // k))
        query = query.limit(refine * k) if columns is None else query.limit(k).refine_factor(refine)
        if table.is_indexed:
            query = query.fast_search()  # there are no rows beside the index to be looked at
    return query if where is None else query.where(where)


def _answers(queries: Sequence[Any], where: str | None) -> list[Any]:
    """Arrow tables, one a query."""

    async def ask() -> list[Any]:
        return list(await asyncio.gather(*(query.to_arrow() for query in queries)))

    with condition(where):
        return run(ask())


def exact(
    table: Table, vectors: np.ndarray, k: int, where: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For several vectors (q, D), in one pass over the table: row ids (q, m) and cosines, best first.

    m is k, or how many rows there are if there are fewer. In memory is one piece of the table at a time.
    """
    vectors = _unit(vectors)
    best = np.empty((len(vectors), 0), dtype=np.float32)
    ids = np.empty((len(vectors), 0), dtype=np.int64)
    for batch in table.batches(("vector",), where, _BLOCK, row_ids=True):
        rows = batch.column("_rowid").to_numpy().astype(np.int64)
        best = np.concatenate([best, vectors @ matrix(batch).T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(rows, (len(vectors), len(rows)))], axis=1)
        if best.shape[1] > k:
            kept = np.argpartition(-best, k - 1, axis=1)[:, :k]
            best, ids = np.take_along_axis(best, kept, 1), np.take_along_axis(ids, kept, 1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(best, order, 1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny))


def matrix(batch: Any) -> np.ndarray:
    """The vectors (n, D) of an Arrow batch or table."""
    column = batch.column("vector")
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1) for chunk in chunks]
    if not parts:
        return np.empty((0, column.type.list_size), dtype=np.float32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def rows_of(table: Table, ids: np.ndarray, columns: Sequence[str] = SHOWN) -> list[Mapping[str, Any]]:
    """The named columns of rows by their ids (n,), in the order asked for."""
    wanted = list(dict.fromkeys(int(number) for number in ids))
    query = table.lance.take_row_ids(wanted).select(list(columns)).with_row_id()
    found = run(query.to_arrow()).to_pylist()
    by_id = {row.pop("_rowid"): row for row in found}
    return [by_id[int(number)] for number in ids]
