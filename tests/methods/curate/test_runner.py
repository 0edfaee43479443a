"""The runner: the same bytes however it is run, killed and resumed; and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ahocorasick")
pytest.importorskip("matplotlib")

from clipworks.data.metadata import Metadata
from clipworks.data.record_files import write_records
from clipworks.errors import ConfigError, DataError
from clipworks.methods.curate import runner
from clipworks.methods.curate.base import Tally
from clipworks.methods.curate.metaclip import MetaCLIP

ENTRIES = ("cat", "dog", "New York", "York", "sun", "犬")
WORDS = ("a", "photo", "of", "cat", "dog", "dog", "sun", "New", "York", "犬", "house", "blue")


def curator(**options: Any) -> MetaCLIP:
    return MetaCLIP(Metadata(ENTRIES), **({"keep": 0.4} | options))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Shards of every format, 40 records each, with one damaged line."""
    rng = random.Random(0)

    def records(shard: str) -> list[dict[str, Any]]:
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(80)]
        return [
            {"key": f"{shard}-{i}", "caption": texts[i], "captions": texts[40 + i : 41 + i]}
            for i in range(40)
        ]

    folder = tmp_path / "pool"
    for name in ("a.jsonl", "b/b.jsonl.gz", "c.tar", "e.jsonl"):
        extra = {"jpg": b"\xff\xd8picture"} if name.endswith("tar") else {}
        write_records([record | extra for record in records(name[0])], folder / name, folder)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(records("d")), folder / "d.parquet")
    with (folder / "e.jsonl").open("a") as file:
        file.write("{broken\n")
    return folder


def page_without_pictures(title: str, sections: Any) -> str:
    """In place of the page with plots, which take longer than all the rest."""
    return f"{title} {sections}"


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "html", page_without_pictures)


def content(folder: Path) -> dict[str, str]:
    """A checksum of every file that a user sees, and the names of all others."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): ""
        if ".curation" in path.parts
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_every_record_is_kept_as_a_single_stream_would_keep_it_and_all_are_accounted_for(
    pool: Path, tmp_path: Path
) -> None:
    done = runner.curate(curator(), pool, tmp_path / "out")
    assert done.tally.numbers["records"] == 200
    assert done.tally.numbers["kept"] + sum(done.tally.dropped.values()) == 200
    assert done.tally.unreadable == {"unreadable record": 1}
    from clipworks.data.record_files import find_files, read_records
    from clipworks.data.source import Skipped

    def everything(folder: Path) -> list[dict[str, Any]]:
        root, names = find_files(folder)
        return [r for name in names for r in read_records(root, name, Skipped())]

    alone = curator().fit(everything(pool))
    plain = ("key", "caption", "captions")
    expected = [tuple(r.get(f) for f in plain) for r in alone.transform(everything(pool))]
    assert [tuple(r.get(f) for f in plain) for r in everything(tmp_path / "out")] == expected
    assert 20 < len(expected) < 150
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["kept"] == len(expected) and card["passes"]["count"]["texts"] == alone_texts(everything(pool))
    page = (tmp_path / "out" / "card.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "e.jsonl: line 41" in page and "New York" in page


def alone_texts(records: list[dict[str, Any]]) -> int:
    return sum(len({r["caption"], *r["captions"]}) for r in records)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from tests.methods.curate import test_runner as here

pool, folder = Path(sys.argv[1]), Path(sys.argv[2])
here.runner.html = here.page_without_pictures
replace, done = Path.replace, []

def counted(self, target):
    done.append(target)
    return replace(self, target)

def dying(at, before):
    left = [at]
    def replace_and_die(self, target):
        left[0] -= 1
        if left[0] == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(self, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace_and_die

Path.replace = counted
here.runner.curate(here.curator(), pool, folder / "whole")
Path.replace = replace
for point in range(2 * len(done)):
    child = os.fork()
    if child == 0:
        Path.replace = dying(point // 2 + 1, point % 2 == 0)
        here.runner.curate(here.curator(), pool, folder / "killed")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, point
    here.runner.curate(here.curator(), pool, folder / "killed")
    assert here.content(folder / "killed") == here.content(folder / "whole"), (point, done[point // 2])
    shutil.rmtree(folder / "killed")
print(*(path.relative_to(folder / "whole") for path in done))
"""


def test_killed_at_any_file_and_resumed_it_ends_in_the_same_bytes(pool: Path, tmp_path: Path) -> None:
    """SIGKILL before and after each file of each phase is put in its place."""
    for name in ("d.parquet", "e.jsonl", "a.jsonl"):
        (pool / name).unlink()
    script = KILLED.format(path=[entry for entry in sys.path if entry])
    found = subprocess.run(
        [sys.executable, "-c", script, str(pool), str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    files = found.stdout.split()
    for stage in ("count", "sample", "transform"):
        assert {f".curation/{stage}/0000001.npz", f".curation/{stage}.npz"} <= set(files)
    assert {"c.tar", "b/b.jsonl.gz", "card.html", "card.json", ".curation/plan.json"} <= set(files)


ROOT = Path(__file__).resolve().parents[3]
TWO = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from tests.methods.curate import test_runner as here

def say(stage, done, total):
    print(stage, done, flush=True)

if __name__ == "__main__":
    here.runner.curate(here.curator(), sys.argv[1], sys.argv[2], workers=2, advance=say)
"""


def test_two_processes_give_the_same_bytes_as_one_even_if_their_parent_is_killed(
    pool: Path, tmp_path: Path
) -> None:
    runner.curate(curator(), pool, tmp_path / "one")
    script = tmp_path / "two.py"
    script.write_text(TWO.format(path=[entry for entry in sys.path if entry]))
    command = [sys.executable, str(script), str(pool), str(tmp_path / "two")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            if line.startswith("transform 1"):
                os.kill(parent.pid, signal.SIGKILL)
                break
        parent.stdout.close()
    deadline = time.monotonic() + 60
    while _alive(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(parent.pid), "the workers outlive their parent"
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ray_gives_the_same_bytes_as_one_process(pool: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    runner.curate(curator(), pool, tmp_path / "one")
    code = (
        f"import sys; sys.path[:0] = {[entry for entry in sys.path if entry]!r}\n"
        "from tests.methods.curate import test_runner as here\n"
        "here.runner.curate(here.curator(), sys.argv[1], sys.argv[2], workers=2, runner='ray')\n"
    )
    arguments = [sys.executable, "-c", code, str(pool), str(tmp_path / "ray")]
    found = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert content(tmp_path / "ray") == content(tmp_path / "one")


@pytest.mark.usefixtures("without_pictures")
def test_another_t_may_follow_while_nothing_is_drawn_and_not_afterwards(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no t keeps"):
        runner.curate(curator(keep=0.999), pool, out)
    counted: list[str] = []
    measure = MetaCLIP.measure
    monkeypatch.setattr(MetaCLIP, "measure", lambda self, r, s: counted.append(s) or measure(self, r, s))
    runner.curate(curator(keep=None, t=10), pool, out)
    assert not counted
    with pytest.raises(ConfigError, match=r"other settings \(t\)"):
        runner.curate(curator(keep=None, t=11), pool, out)
    with pytest.raises(ConfigError, match="other settings"):
        runner.curate(MetaCLIP(Metadata(["cat"]), t=10), pool, out)
    assert runner.curate(curator(keep=None, t=10), pool, out).tally.numbers["records"] == 200


@pytest.mark.usefixtures("without_pictures")
def test_a_pool_that_changed_a_full_folder_and_a_folder_inside_are_refused(
    pool: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="outside of the pool"):
        runner.curate(curator(), pool, pool / "kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        runner.curate(curator(), pool, tmp_path / "full")
    runner.curate(curator(), pool, tmp_path / "out")
    with (pool / "a.jsonl").open("a") as file:
        file.write('{"key": "new", "caption": "dog"}\n')
    with pytest.raises(DataError, match="pool has changed"):
        runner.curate(curator(), pool, tmp_path / "out")
    for options, message in (({"workers": 0}, "workers=0"), ({"runner": "slurm"}, "runner 'slurm'")):
        with pytest.raises(ConfigError, match=message):
            runner.curate(curator(), pool, tmp_path / "other", **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_pictures")
def test_a_pool_in_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"no record of the pool could be read: .*a\.jsonl: line 1"):
        runner.curate(curator(), tmp_path / "pool", tmp_path / "out")


def test_tallies_survive_a_file_sparse_and_dense(tmp_path: Path) -> None:
    import numpy as np

    tally = Tally()
    tally.numbers["records"] = 5
    tally.dropped["no match"] += 2
    tally.unreadable["x"] += 1
    tally.places["x"] = ["here: ü"]
    tally.sum_of("sparse", 1000)[[3, 999]] = [7, 2**60]
    tally.sum_of("dense", 4)[:] = [1, 2, 0, 4]
    tally.lists["ids"] = [np.array([1, 2], np.int32), np.array([], np.int32), np.array([3], np.int32)]
    tally.save(tmp_path / "t.npz")
    twice = Tally.load(tmp_path / "t.npz").add(Tally.load(tmp_path / "t.npz"))
    assert twice.summary() == {
        "records": 10, "dropped": {"no match": 4}, "unreadable": {"x": 2},
        "places": {"x": ["here: ü", "here: ü"]},
    }  # fmt: skip
    assert twice.sums["sparse"][999] == 2**61 and twice.sums["sparse"].dtype == np.uint64
    assert twice.sums["dense"].tolist() == [2, 4, 0, 8]
    assert twice.list_of("ids", np.int32).tolist() == [1, 2, 3, 1, 2, 3]
