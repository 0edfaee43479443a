"""Records go through JSONL, Parquet and tar files unharmed; what is damaged is counted and left out."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from clipworks.data.record_files import Located, find_files, read_records, write_records
from clipworks.data.source import Skipped
from clipworks.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"key": "a", "caption": "a dog", "captions": ["x", "y"], "n": 3},
    {"key": "b", "caption": "ein Hund 🐕", "captions": [], "n": None},
    {"key": "c", "caption": "\ud800", "captions": ["z"], "n": 5},
]


def read(
    root: Path, name: str, fields: tuple[str, ...] | None = None
) -> tuple[list[dict[str, Any]], Skipped]:
    skipped = Skipped()
    return list(read_records(root, name, skipped, fields)), skipped


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_json_lines_come_back_as_they_were_and_repeat_byte_for_byte(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        write_records(ROWS, tmp_path / folder / name, tmp_path / "unused")
    assert read(tmp_path / "one", name)[0] == ROWS
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [name]


def test_parquet_keeps_its_columns_and_reads_only_those_asked_for(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": b"\xff\xd8", "path": None}
    rows = [{"caption": f"text {i}", "image": image, "n": i} for i in range(600)]
    schema = arrow.schema(
        {
            "caption": arrow.string(),
            "image": arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}),
            "n": arrow.int8(),
        }.items()
    ).with_metadata({"note": "kept"})
    rows = [row | {"n": row["n"] % 100} for row in rows]
    parquet.write_table(arrow.Table.from_pylist(rows, schema), tmp_path / "s.parquet", row_group_size=250)
    found, skipped = read(tmp_path, "s.parquet")
    assert [record.pop("key") for record in found] == [f"s/{i}" for i in range(600)]
    assert found == rows and not skipped.counts
    assert read(tmp_path, "s.parquet", ("caption",))[0][599] == {"key": "s/599", "caption": "text 599"}
    assert read(tmp_path, "s.parquet", ("missing",))[0][599] == {"key": "s/599"}

    changed = [{"key": "k", "image": image, "n": 1}]
    write_records(changed, tmp_path / "out" / "s.parquet", tmp_path / "s.parquet")
    written = parquet.read_schema(tmp_path / "out" / "s.parquet")
    assert written == schema.append(arrow.field("key", arrow.string())) and b"note" in written.metadata
    assert read(tmp_path / "out", "s.parquet")[0] == [changed[0] | {"caption": None}]
    with pytest.raises(DataError, match="no column 'new'"):
        write_records([{"key": "k", "new": 1}], tmp_path / "out" / "t.parquet", tmp_path / "s.parquet")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.parquet"]


def test_members_of_a_tar_are_copied_unread_and_its_json_gives_fields(tmp_path: Path) -> None:
    members = {
        "x/1.jpg": b"\xff\xd8 one", "x/1.json": b'{"caption": "a dog", "key": "other", "n": 1}',
        "x/1.seg.png": b"png", "2.jpg": b"\xff\xd8 two", "2.txt": b"zwei\n",
    }  # fmt: skip
    tar(tmp_path / "s.tar", members)
    found, _ = read(tmp_path, "s.tar")
    assert [(record["key"], record.get("caption"), record.get("txt")) for record in found] == [
        ("x/1", "a dog", None),
        ("2", None, "zwei"),
    ]
    assert isinstance(found[0]["jpg"], Located) and bytes(found[0]["jpg"]) == members["x/1.jpg"]
    for folder in ("one", "two"):
        write_records(found, tmp_path / folder / "s.tar", tmp_path / "s.tar")
    assert (tmp_path / "one" / "s.tar").read_bytes() == (tmp_path / "two" / "s.tar").read_bytes()
    with tarfile.open(tmp_path / "one" / "s.tar") as file:
        written = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
    fields = json.loads(written.pop("x/1.json"))
    assert fields == {"key": "x/1", "caption": "a dog", "n": 1}
    assert written == {
        "x/1.jpg": members["x/1.jpg"], "x/1.seg.png": b"png", "2.jpg": members["2.jpg"], "2.txt": b"zwei",
    }  # fmt: skip


def test_a_record_without_a_key_gets_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "s.jsonl").write_text('{"key": null}\n\n{"key": 7}\n{}\n')
    assert [record["key"] for record in read(tmp_path, "a/s.jsonl")[0]] == ["a/s/0", 7, "a/s/3"]


def test_what_is_damaged_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(b'{"key": "a"}\n{"key": \n[1]\n\xff\xfe\n{"key": "b"}\n')
    found, skipped = read(tmp_path, "s.jsonl")
    assert [record["key"] for record in found] == ["a", "b"]
    assert skipped.counts == {"unreadable record": 3}

    packed = gzip.compress(b"".join(b'{"key": "%d"}\n' % i for i in range(9000)))
    (tmp_path / "s.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    found, skipped = read(tmp_path, "s.jsonl.gz")
    assert 0 < len(found) < 9000 and skipped.counts == {"unreadable shard": 1}

    tar(
        tmp_path / "s.tar",
        {"1.json": b"{", "2.json": b"[]", "3.json": b'{"jpg": 1}', "3.jpg": b"x", "4.txt": b"y"},
    )
    found, skipped = read(tmp_path, "s.tar")
    assert [record["key"] for record in found] == ["4"] and skipped.counts == {"unreadable record": 3}
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:4000])
    assert read(tmp_path, "cut.tar")[1].counts["truncated shard"] == 1

    (tmp_path / "s.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert read(tmp_path, "s.parquet")[1].counts == {"unreadable shard": 1}
    for name in ("m.jsonl", "m.tar", "m.parquet"):
        assert read(tmp_path, name)[1].counts == {"missing shard": 1}


def test_files_are_found_by_folder_pattern_and_range_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/2.tar", "b/1.jsonl", "a.parquet", ".hidden/x.tar", "b/.1.jsonl.9.part", "card.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    everything = ["a.parquet", "b/1.jsonl", "b/2.tar"]
    assert find_files(tmp_path) == (tmp_path.resolve(), everything)
    assert find_files([tmp_path / "b" / "*", tmp_path / "a.parquet", tmp_path / "b/1.jsonl"])[1] == everything
    (tmp_path / "b" / "3.tar").touch()
    assert find_files(f"{tmp_path}/b/{{2..3}}.tar") == (
        (tmp_path / "b").resolve(),
        ["2.tar", "3.tar"],
    )
    for wrong, message in (
        (tmp_path / "card.json", "is none of"),
        (tmp_path / "no.tar", "no such file"),
        (f"{tmp_path}/*.tar", "no file of"),
        ("s3://bucket/x.tar", "not a local file"),
        ([], "no file of records"),
    ):
        with pytest.raises(DataError, match=message):
            find_files(wrong)
