"""Bulk embedding: every record's own vectors, in order, once, whoever is killed when; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.search.test_inputs import drawn

from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.shards import write_shards
from clipworks.data.source import Example
from clipworks.errors import ConfigError, DataError, MissingExtra
from clipworks.search import embedding, pieces
from clipworks.search.embedding import Workers, embed

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
lancedb = pytest.importorskip("lancedb")

ROOT = Path(__file__).resolve().parents[2]
NO_PICTURE = b"no picture"


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


def examples(shard: int) -> list[Example]:
    """Seven records: the third has no readable picture, the fifth no caption, the sixth two."""
    texts: list[Any] = [
        "a dog",
        "ein Hund",
        "x",
        "two cats",
        None,
        ["first", "second"],
        "a long caption " * 8 + "a long caption",
    ]
    return [
        Example(
            f"{shard}{n}",
            NO_PICTURE if n == 2 else drawn(10 * shard + n),
            {} if text is None else {"alt": text},
        )
        for n, text in enumerate(texts)
    ]


def make_pool(folder: Path) -> Path:
    """Two tar files, of which the second has lost its end, and a Parquet file in two row groups."""
    folder.mkdir(parents=True)
    for shard in range(2):
        (written,) = write_shards(examples(shard), folder, prefix=f"s{shard}")
        written.rename(folder / f"s{shard}.tar")
    with tarfile.open(folder / "s1.tar") as tar:
        (last,) = [member for member in tar if member.name == "16.png"]
    content = (folder / "s1.tar").read_bytes()
    (folder / "s1.tar").write_bytes(content[: last.offset_data + last.size // 2])
    rows = [
        {"image": {"bytes": example.image, "path": None}, "caption": (example.texts.get("alt") or [None])}
        for example in examples(2)
    ]
    for row in rows:
        row["caption"] = row["caption"] if isinstance(row["caption"], str) else row["caption"][0]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "s2.parquet", row_group_size=4)
    return folder


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return make_pool(tmp_path / "pool")


def tables(folder: Path) -> Any:
    """The rows of all Parquet files, one after the other."""
    return arrow.concat_tables(parquet.read_table(path) for path in sorted(folder.glob("*.parquet")))


def lance(folder: Path) -> Any:
    return lancedb.connect(str(folder)).open_table("embeddings").to_arrow()


def vectors(table: Any, column: str = "vector") -> torch.Tensor:
    return torch.tensor(table.drop_null().column(column).to_pylist())


def test_every_record_that_can_be_read_has_its_own_vectors_in_its_order(
    clip: Any, pool: Path, tmp_path: Path
) -> None:
    done = embed(clip, pool, tmp_path / "out", texts=True, batch_size=2)
    rows = tables(tmp_path / "out")
    expected = [e for shard in range(3) for n, e in enumerate(examples(shard)) if n != 2]
    expected = [e for e in expected if e.key != "16"]  # the shard that has lost its end
    assert rows.column("shard").to_pylist() == ["s0"] * 6 + ["s1"] * 5 + ["s2"] * 6
    of_tar = [e.key for e in expected if not e.key.startswith("2")]
    assert rows.column("key").to_pylist() == [*of_tar, *(f"s2/{n}" for n in (0, 1, 3, 4, 5, 6))]
    said = [e.texts.get("alt") for e in expected]
    first = [text if text is None or isinstance(text, str) else text[0] for text in said]
    assert rows.column("caption").to_pylist() == first
    alone = torch.cat([clip.embed_images([e.image]) for e in expected])
    assert (torch.tensor(rows.column("vector").to_pylist()) - alone).abs().max() < 1e-6
    assert rows.column("text_vector").null_count == 3
    texts = torch.cat([clip.embed_texts([text]) for text in first if text is not None])
    assert (vectors(rows, "text_vector") - texts).abs().max() < 1e-6
    assert (done.rows, done.computed, done.pieces, done.reused) == (17, 17, 3, 0)
    assert done.skipped.counts == {"unreadable picture": 3, "truncated shard": 1}
    assert f"{pool / 's0.tar'}: 02" in done.skipped.first["unreadable picture"][0]


def test_a_lance_table_has_the_rows_of_the_parquet_files(clip: Any, pool: Path, tmp_path: Path) -> None:
    for kind in ("parquet", "lance"):
        embed(clip, pool, tmp_path / kind, texts=True, format=kind)  # type: ignore[arg-type]
    assert lance(tmp_path / "lance").equals(tables(tmp_path / "parquet"))
    assert not list((tmp_path / "lance").rglob("*.parquet"))


def test_how_many_records_are_held_at_once_changes_no_row(
    clip: Any, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(clip, pool, tmp_path / "whole")
    for name, limit in (("_ROWS", 3), ("_BYTES", 1)):
        monkeypatch.setattr(embedding, name, limit)
        embed(clip, pool, tmp_path / name)
        whole, parts = tables(tmp_path / "whole"), tables(tmp_path / name)
        assert whole.drop(["vector"]).equals(parts.drop(["vector"]))
        assert (vectors(whole) - vectors(parts)).abs().max() < 1e-6


def test_pictures_of_a_folder_are_embedded_with_the_captions_beside_them(
    clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PICTURES", 2)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.png", "more/c.png")):
        (folder / name).write_bytes(drawn(n))
    (folder / "b.txt").write_text("a caption\n")
    done = embed(clip, folder, tmp_path / "out")
    rows = tables(tmp_path / "out").to_pylist()
    assert [(row["shard"], row["key"], row["caption"]) for row in rows] == [
        ("photos-00000", "a.png", None),
        ("photos-00000", "b.png", "a caption"),
        ("photos-00001", "more/c.png", None),
    ]
    assert done.pieces == 2
    (folder / "more/c.png").write_bytes(drawn(7))
    assert embed(clip, folder, tmp_path / "out").reused == 1


@pytest.mark.parametrize("kind", ["parquet", "lance"])
def test_what_is_done_is_not_done_again_unless_it_changed_or_could_not_be_read(
    clip: Any, pool: Path, tmp_path: Path, kind: Any
) -> None:
    read = {"parquet": tables, "lance": lance}[kind]
    first = embed(clip, pool, tmp_path / "out", format=kind)
    before = read(tmp_path / "out")
    again = embed(clip, pool, tmp_path / "out", format=kind)
    assert (again.reused, again.computed, again.rows) == (2, 5, 17)  # the shard that lost its end
    assert again.skipped.counts == first.skipped.counts and again.skipped.first == first.skipped.first
    order = [("shard", "ascending"), ("key", "ascending")]
    assert read(tmp_path / "out").sort_by(order).equals(before.sort_by(order))
    (written,) = write_shards(examples(1), pool, prefix="new")
    written.replace(pool / "s1.tar")
    repaired = embed(clip, pool, tmp_path / "out", format=kind)
    assert (repaired.reused, repaired.computed, repaired.rows) == (2, 6, 18)
    assert repaired.skipped.counts == {"unreadable picture": 3}
    assert len(set(read(tmp_path / "out").column("key").to_pylist())) == 18 == len(read(tmp_path / "out"))
    assert embed(clip, pool, tmp_path / "out", format=kind).reused == 3


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
import lancedb
import pyarrow
from tests.conftest import tiny_clip
from tests.search import test_embedding as here

out, kind = Path(sys.argv[1]), sys.argv[2]
clip = tiny_clip.__wrapped__()()
shards = sys.argv[3:]

def apart(do):
    # In a process of its own, for threads of Arrow and Lance do not survive a fork.
    child = os.fork()
    if child == 0:
        do()
        sys.stdout.flush()
        os._exit(0)
    return os.waitpid(child, 0)[1]

def run(folder):
    here.embed(clip, shards, out / folder, format=kind)

def watched(at):
    # Counts the steps that leave something behind, and dies before or after one of them.
    count = [0]
    def step(do):
        def doing(*arguments, **options):
            count[0] += 1
            if at == 2 * count[0] - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            given = do(*arguments, **options)
            if at == 2 * count[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return given
        return doing
    unlink = Path.unlink
    leaving = step(unlink)
    Path.replace = step(Path.replace)
    Path.unlink = lambda path, **options: (leaving if path.exists() else unlink)(path, **options)
    table = lancedb.table.LanceTable
    table.add, table.delete = step(table.add), step(table.delete)
    return count

def whole():
    count = watched(0)
    run("whole")
    (out / "steps").write_text(str(count[0]))

def die(at):
    watched(at)
    run("killed")

def check():
    run("killed")
    read = here.tables if kind == "parquet" else here.lance
    assert read(out / "killed").equals(read(out / "whole"))
    assert not list((out / "killed").rglob("*.part"))

assert apart(whole) == 0
steps = int((out / "steps").read_text())
for at in range(1, 2 * steps + 1):
    assert apart(lambda: die(at)) == signal.SIGKILL, at
    assert apart(check) == 0, at
    shutil.rmtree(out / "killed")
print(steps)
"""


@pytest.mark.parametrize("kind", ["parquet", "lance"])
def test_a_run_that_is_killed_at_any_moment_goes_on_and_nothing_is_lost_or_doubled(
    pool: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "out").mkdir()
    code = KILLED.format(path=[str(ROOT), str(ROOT / "src")])
    shards = [str(pool / "s0.tar"), str(pool / "s2.parquet")]
    arguments = [sys.executable, "-c", code, str(tmp_path / "out"), kind, *shards]
    done = subprocess.run(arguments, capture_output=True, text=True, env=dict(os.environ), timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5  # the plan; rows and a receipt for each of two shards


def test_a_folder_of_other_vectors_or_of_something_else_is_refused(
    clip: Any, tiny_clip: Callable[..., Any], pool: Path, tmp_path: Path
) -> None:
    embed(clip, pool, tmp_path / "out")
    for model, options, named in (
        (tiny_clip(seed=1), {}, r"\(model\)"),
        (clip, {"texts": True}, r"\(texts\)"),
        (clip, {"format": "lance"}, r"\(format\)"),
        (clip, {"precision": "bf16"}, r"\(precision\)"),
    ):
        with pytest.raises(ConfigError, match=f"other settings {named}; name another folder"):
            embed(model, pool, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not empty and holds no vectors"):
        embed(clip, pool, pool)


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        (["no.tar"], {}, "no.tar: no such file"),
        (["notes.md"], {}, "neither a folder nor a shard"),
        (["empty"], {}, "neither a shard .* nor a picture in it"),
        (["pool/s0.tar", "pool/s0.tar"], {}, "two pieces are named 'pool-s0'"),
        (["https://host/a.parquet"], {}, "copy or mount"),
        ([], {}, "nothing to embed"),
        (["pool"], {"format": "csv"}, "parquet, lance .* not 'csv'"),
        (["pool"], {"workers": Workers(count=0)}, "at least 1"),
        (["pool"], {"batch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_embedded_is_said_before_anything_is_written(
    clip: Any,
    pool: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: Sequence[str],
    options: Any,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.md").write_text("words")
    with pytest.raises((ConfigError, DataError), match=said):
        embed(clip, sources, "out", **options)
    assert not Path("out").exists()


def test_shards_of_one_name_are_told_apart_by_their_folders(clip: Any, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_pool(tmp_path / folder)
    found = pieces.find_pieces([tmp_path / "a" / "s0.tar", tmp_path / "b" / "s{0,1}.tar"])
    assert [piece.name for piece in found] == ["a-s0", "b-s0", "s1"]


def test_a_pool_of_which_nothing_can_be_read_is_an_error_that_says_why(clip: Any, tmp_path: Path) -> None:
    broken = [replace(example, image=NO_PICTURE) for example in examples(0)]
    write_shards(broken, tmp_path / "pool")
    with pytest.raises(DataError, match="no picture could be read; skipped 7: 7 unreadable picture"):
        embed(clip, tmp_path / "pool", tmp_path / "out")


def test_without_ray_its_runner_says_which_extra_brings_it(
    clip: Any, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r'the runner ray needs ray, .*pip install "clipworks\[ray\]"'):
        embed(clip, pool, tmp_path / "out", runner="ray")
    assert not (tmp_path / "out").exists()


def test_a_receipt_says_what_became_of_its_piece(clip: Any, pool: Path, tmp_path: Path) -> None:
    embed(clip, pool / "s1.tar", tmp_path / "out")
    said = json.loads((tmp_path / "out" / ".embedding" / "s1.json").read_text())
    assert said["rows"] == 5 and said["skipped"] == {"unreadable picture": 1, "truncated shard": 1}
    assert said["source"] == str(pool / "s1.tar")
