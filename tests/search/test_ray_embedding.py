"""Embedding by Ray with two workers: row for row what one process writes, and as resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("lancedb")
if sys.platform == "win32":
    pytest.skip("Ray for Windows is not tested", allow_module_level=True)

from tests.search.test_embedding import ROOT, lance, make_pool, tables

# In a process of its own: Ray starts threads and servers, and warns of things that are its own affair.
CODE = """
import sys, json
from pathlib import Path
sys.path[:0] = {path!r}
import torch
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import DataError
from clipworks.search.embedding import Workers, embed
from tests.conftest import tiny_clip
import ray

torch.set_num_threads(1)
folder = Path(sys.argv[1])
clip = tiny_clip.__wrapped__()(tokenizer=ClipTokenizer())
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")

class Stopped(Exception):
    pass

def stop(done, total):
    if done == 2:
        raise Stopped

said = {{}}
for kind in ("parquet", "lance"):
    options = dict(format=kind, texts=True, batch_size=4)
    one = embed(clip, folder / "pool", folder / f"one-{{kind}}", **options)
    options |= dict(runner="ray", workers=Workers(2))
    if kind == "lance":  # interrupted, and then gone on with
        try:
            embed(clip, folder / "pool", folder / f"ray-{{kind}}", advance=stop, **options)
        except Stopped:
            said["stopped"] = True
    two = embed(clip, folder / "pool", folder / f"ray-{{kind}}", **options)
    report = lambda done: [done.rows, done.pieces, done.skipped.counts, done.skipped.first]
    said[kind] = [report(one), report(two), two.reused]
assert ray.is_initialized()  # a Ray that was there is left as it was
try:
    embed(clip, folder / "pool", folder / "bad", precision="nonsense", runner="ray", workers=Workers(2))
except DataError as error:
    said["bad"] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("ray.data")
    folder = tmp_path_factory.mktemp("ray")
    make_pool(folder / "pool")
    code = CODE.format(path=[str(ROOT), str(ROOT / "src")])
    # Ray makes its workers nicer than everybody else, who would have to wait for them here.
    environment = {**os.environ, "RAY_worker_niceness": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    arguments = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_two_workers_write_row_for_row_and_bit_for_bit_what_one_process_writes(ran: Any) -> None:
    folder, _ = ran
    one = tables(folder / "one-parquet")
    assert len(one) == 17 and one.equals(tables(folder / "ray-parquet"))
    assert lance(folder / "one-lance").equals(one)
    for path in (folder / "one-parquet").glob("*.parquet"):
        assert path.read_bytes() == (folder / "ray-parquet" / path.name).read_bytes()


def test_they_report_what_cannot_be_read_as_one_process_does(ran: Any) -> None:
    _, said = ran
    for kind in ("parquet", "lance"):
        one, two, _ = said[kind]
        assert one == two and one[2] == {"unreadable picture": 3, "truncated shard": 1}


def test_what_they_had_done_when_they_were_stopped_is_not_done_again(ran: Any) -> None:
    folder, said = ran
    assert said["stopped"] and said["parquet"][2] == 0 and said["lance"][2] >= 1
    order = [("shard", "ascending"), ("key", "ascending")]
    assert lance(folder / "ray-lance").sort_by(order).equals(tables(folder / "one-parquet").sort_by(order))
    assert not list((folder / "ray-lance").rglob("*.parquet"))


def test_what_goes_wrong_in_a_worker_is_one_line(ran: Any) -> None:
    assert ran[1]["bad"] == "precision must be fp32, bf16 or auto, not 'nonsense'"
