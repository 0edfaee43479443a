"""Shards, tables and texts in the index: they are found, what changes follows, what is gone leaves."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb")

import clipworks.search.index as module
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.shards import write_shards
from clipworks.data.source import Example
from clipworks.errors import ConfigError, DataError, PictureError
from clipworks.search import Index, Report
from clipworks.search.items import inputs, owner, picture_at, plain_fields
from clipworks.search.sheet import Tile, contact_sheet


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


@pytest.fixture
def index(tmp_path: Path, clip: Any) -> Index:
    return Index.create(tmp_path / "index", clip)


def drawn(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def record(seed: int, **extra: Any) -> Example:
    texts = {"alt": [f"first caption {seed}", f"second caption {seed}"], "de": f"Bild {seed}"}
    return Example(f"{seed:04d}", drawn(seed), texts, label=seed % 3, extra=extra)


def write(path: Path, examples: list[Example]) -> Path:
    (written,) = write_shards(examples, path.parent, prefix=path.stem)
    return written.replace(path)


def rows(index: Index, *columns: str, where: str | None = None) -> list[tuple[Any, ...]]:
    pieces = index._table.scan(columns, where)
    return sorted(row for piece in pieces for row in zip(*piece.values(), strict=True))


def counts(report: Report) -> tuple[int, int, int, int, int]:
    return report.embedded, report.reused, report.unchanged, report.removed, len(report.skipped)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something went through the model")

    monkeypatch.setattr(module, "encode_images", refuse)
    monkeypatch.setattr(module, "encode_texts", refuse)


# ------------------------------------------------------------------------------------------------ shards


def test_a_shards_records_are_found_with_caption_label_and_fields(
    index: Index, tmp_path: Path, clip: Any
) -> None:
    shard = write(tmp_path / "a.tar", [record(i, year=2000 + i, place=f"town {i}") for i in range(6)])
    assert counts(index.add(shard)) == (6, 0, 0, 0, 0)
    (hit,) = index.query(picture=drawn(4), k=1)
    assert (hit.path, hit.caption, hit.width, hit.height) == (f"{shard}#0004", "first caption 4", 24, 20)
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert hit.fields == {"year": 2004, "place": "town 4", "label": 1}
    assert [h.fields["year"] for h in index.query("a cat", where="year > 2003 and place <> 'town 5'")] == [
        2004
    ]
    vectors = clip.embed_images([drawn(i) for i in range(6)]).numpy()
    order = np.argsort(-(vectors @ clip.embed_texts(["a cat"])[0].numpy()))
    assert [h.path[-1] for h in index.query("a cat", k=6)] == [str(i) for i in order]


def test_a_second_build_of_shards_reads_no_record_and_a_changed_shard_only_what_is_new(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write(tmp_path / "a.tar", [record(i) for i in range(5)])
    index.add(shard)
    with monkeypatch.context() as patch:
        forbid(patch)
        patch.setattr("clipworks.search.items.Record.read", lambda self: pytest.fail("a record was read"))
        assert counts(index.add(shard)) == (0, 0, 5, 0, 0)
    write(shard, [record(i) for i in (0, 1, 2, 7)])
    assert counts(index.add(shard)) == (1, 3, 0, 2, 0)
    assert [path[-4:] for (path,) in rows(index, "path")] == ["0000", "0001", "0002", "0007"]


def test_a_folder_of_shards_forgets_those_that_are_gone(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    for name in ("a", "b"):
        write(folder / f"{name}.tar", [record(i + 10 * (name == "b")) for i in range(3)])
    other = write(tmp_path / "other.tar", [record(50)])
    index.add(other)
    assert counts(index.add(folder)) == (6, 0, 0, 0, 0)
    (folder / "a.tar").unlink()
    other.unlink()
    assert counts(index.add(folder)) == (0, 0, 3, 3, 0)
    assert len(index) == 4, "what lies elsewhere is left alone"


def test_a_truncated_shard_is_reported_and_loses_nothing(index: Index, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", [record(i) for i in range(8)])
    index.add(shard)
    shard.write_bytes(shard.read_bytes()[:9000])
    report = index.add(shard)
    assert report.removed == 0
    assert any("truncated" in reason for _, reason in report.skipped)
    assert len(index) == 8


def test_rows_of_a_parquet_file_are_found_and_read_once(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": drawn(i), "path": None}, "label": i % 2, "caption": f"row {i}"} for i in range(5)
    ]
    file = tmp_path / "shelf" / "val.parquet"
    file.parent.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    assert counts(index.add(tmp_path / "shelf")) == (5, 0, 0, 0, 0)
    (hit,) = index.query(picture=drawn(3), k=1)
    assert (hit.path, hit.caption, hit.fields) == (f"{file}#3", "row 3", {"label": 1})
    forbid(monkeypatch)
    assert counts(index.add(file)) == (0, 0, 5, 0, 0)


def test_a_record_without_picture_or_with_a_damaged_one_is_skipped(index: Index, tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        members = {"0.png": drawn(0), "1.txt": b"no picture", "2.png": drawn(2)[:70], "3.png": b"text"}
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    report = index.add(shard)
    assert report.embedded == 1
    assert sorted(path[-1] for path, _ in report.skipped) == ["1", "2", "3"]
    assert all(f"a.tar#{path[-1]}" in reason for path, reason in report.skipped)


# ------------------------------------------------------------------------------------------------ tables


def table_of(folder: Path, lines: list[dict[str, Any]], name: str = "captions.csv") -> Path:
    folder.mkdir(exist_ok=True)
    table = folder / name
    if name.endswith(".jsonl"):
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    for line in lines:
        if "file_name" in line:
            (folder / line["file_name"]).write_bytes(drawn(int(line["file_name"].split(".")[0])))
    return table


@pytest.mark.parametrize("name", ["captions.csv", "metadata.jsonl"])
def test_a_tables_pictures_carry_its_captions_and_fields(index: Index, tmp_path: Path, name: str) -> None:
    lines = [
        {"file_name": f"{i}.png", "caption": f"it's number {i}", "year": 2000 + i, "zip": f"0{i}"}
        for i in range(4)
    ]
    table = table_of(tmp_path / "t", lines, name)
    assert counts(index.add(table)) == (4, 0, 0, 0, 0)
    (hit,) = index.query("a cat", where="year = 2002")
    assert (hit.path, hit.caption) == (str(tmp_path / "t" / "2.png"), "it's number 2")
    assert hit.fields == {"year": 2002, "zip": "02"}
    assert counts(index.add(table)) == (0, 0, 4, 0, 0)


def test_a_changed_caption_is_taken_over_without_the_model(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"file_name": f"{i}.png", "caption": f"number {i}", "tag": "x"} for i in range(3)]
    table = table_of(tmp_path / "t", lines)
    index.add(table)
    lines[1]["caption"], lines[2]["tag"] = "another", "y"
    table_of(tmp_path / "t", lines)
    for line in lines:  # the pictures themselves stay untouched
        os.utime(tmp_path / "t" / line["file_name"], ns=(1, 1))
    forbid(monkeypatch)
    assert index.add(table).embedded == 0
    assert rows(index, "caption", "tag") == [("another", "x"), ("number 0", "x"), ("number 2", "y")]
    # The folder's own build neither reads them again nor forgets what the table said.
    assert counts(index.add(tmp_path / "t")) == (0, 0, 3, 0, 0)
    assert counts(index.add(table)) == (0, 0, 3, 0, 0)
    table_of(tmp_path / "t", lines[:2])
    assert index.add(table).removed == 1


def test_neighboring_rows_of_a_picture_are_one_and_a_later_one_is_reported(
    index: Index, tmp_path: Path
) -> None:
    lines = [
        {"file_name": name, "caption": text}
        for name, text in [("0.png", "a"), ("0.png", "b"), ("1.png", "c"), ("0.png", "d"), ("9.png", "e")]
    ]
    table = table_of(tmp_path / "t", lines)
    (tmp_path / "t" / "9.png").unlink()
    report = index.add(table, texts=True)
    assert sorted(caption for (caption,) in rows(index, "caption", where="kind = 'text'")) == ["a", "b", "c"]
    assert len(index) == 5
    assert {Path(path).name for path, _ in report.skipped} == {"0.png", "9.png"}
    assert any("named twice" in reason for _, reason in report.skipped)


def test_a_value_of_another_type_is_left_empty_and_counted(index: Index, tmp_path: Path) -> None:
    first = [{"file_name": f"{i}.png", "caption": "a", "score": 0.5 * i, "name": f"n{i}"} for i in range(3)]
    index.add(table_of(tmp_path / "a", first, "metadata.jsonl"))
    second = [{"file_name": f"{i}.png", "caption": "b", "score": "high", "name": i} for i in range(3, 5)]
    report = index.add(table_of(tmp_path / "b", second, "metadata.jsonl"))
    assert report.emptied == {"score": 2}
    assert rows(index, "name", where="score is null") == [("3",), ("4",)]


def test_columns_of_the_index_itself_are_not_overwritten(index: Index, tmp_path: Path) -> None:
    lines = [{"file_name": "0.png", "caption": "a", "width": 7, "kind": "odd", "vector": 1, "a b-c": 5}]
    index.add(table_of(tmp_path / "t", lines, "metadata.jsonl"))
    (hit,) = index.query("a cat")
    assert (hit.width, hit.kind, hit.fields) == (24, "image", {"a_b_c": 5})


def test_fields_become_what_a_column_can_hold() -> None:
    assert plain_fields(
        {
            "a": 1,
            "b": True,
            "c": [1, {"d": "é"}],
            "d": None,
            "e": b"x",
            "": 2,
            "9": "x",
            "big": 2**60,
            "f": "",
        }
    ) == {"a": 1.0, "b": True, "c": '[1, {"d": "é"}]', "_": 2.0, "_9": "x", "big": str(2**60)}


# ------------------------------------------------------------------------------------------------ texts


def test_captions_become_items_that_are_found_among_themselves(
    index: Index, tmp_path: Path, clip: Any
) -> None:
    shard = write(tmp_path / "a.tar", [record(i) for i in range(4)])
    assert counts(index.add(shard, texts=True)) == (16, 0, 0, 0, 0)
    assert index.info()["pictures"] == 4
    assert index.info()["texts"] == 12
    assert {hit.kind for hit in index.query("a cat", k=50)} == {"image"}
    (hit,) = index.query("Bild 2", k=1, kind="text")
    assert (hit.path, hit.caption, hit.kind) == (f"{shard}#0002#de/0", "Bild 2", "text")
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert len(index.query("a cat", k=50, kind=None)) == 16
    assert len(index.query("a cat", k=50, kind="text", where="label = 0")) == 6
    # Asked for differently, the same records change nothing but this.
    assert counts(index.add(shard, texts=True)) == (0, 0, 4, 0, 0)
    assert index.add(shard).embedded == 0


def test_a_picture_with_fewer_captions_than_before_loses_the_others(index: Index, tmp_path: Path) -> None:
    lines = [{"file_name": "0.png", "caption": text} for text in ("a", "b", "c")]
    table = table_of(tmp_path / "t", lines)
    index.add(table, texts=True)
    table_of(tmp_path / "t", lines[:2])
    assert index.add(table, texts=True).removed == 1
    assert [caption for (caption,) in rows(index, "caption", where="kind = 'text'")] == ["a", "b"]
    (tmp_path / "t" / "0.png").unlink()
    index.add(table, texts=True)
    assert len(index) == 0


def test_a_table_without_pictures_is_a_table_of_texts(index: Index, tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", [{"text": f"text {i % 3}", "n": i} for i in range(5)], "t.jsonl")
    assert counts(index.add(table)) == (3, 2, 0, 0, 0)
    assert [hit.fields["n"] for hit in index.query("text 1", k=2, kind="text")] in ([1, 4], [4, 1])
    assert counts(index.add(table)) == (0, 0, 5, 0, 0)


def test_given_texts_are_items_once_and_can_be_removed(index: Index) -> None:
    assert counts(index.add_texts(["a", "b", "a"])) == (2, 0, 0, 0, 0)
    assert counts(index.add_texts(["b", "c"])) == (1, 0, 1, 0, 0)
    (hit,) = index.query("b", k=1, kind="text")
    index.remove([hit.path])
    assert sorted(caption for (caption,) in rows(index, "caption")) == ["a", "c"]


def test_text_files_beside_pictures_become_items_where_they_are_wanted(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(drawn(i))
    (folder / "1.txt").write_text("a caption\n")
    (folder / "2.txt").write_text("  ")
    report = index.add(folder, texts=True)
    assert counts(report) == (4, 0, 0, 0, 1)
    assert "holds no text" in report.skipped[0][1]
    assert rows(index, "path", "caption", where="kind = 'text'") == [(str(folder / "1.txt"), "a caption")]
    (folder / "1.txt").unlink()
    assert index.add(folder, texts=True).removed == 1


def test_the_owner_of_a_caption_is_its_picture() -> None:
    for path, picture in (
        ("/a/b.png#alt/3", "/a/b.png"),
        ("/a/s.tar#0001#de/0", "/a/s.tar#0001"),
        ("/a/s.tar#0001", "/a/s.tar#0001"),
        ("/a#b/c.png", "/a#b/c.png"),
        ("text:0f", "text:0f"),
    ):
        assert owner(path) == picture


# ----------------------------------------------------------------------------------------- what cannot be


def test_what_holds_nothing_is_an_error_that_names_it(index: Index, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("file_name,caption\n")
    with pytest.raises(DataError, match="has no rows"):
        index.add(empty)
    empty.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="neither a column of files nor one of texts"):
        index.add(empty)
    with pytest.raises(DataError, match=r"no shard matches"):
        index.add(tmp_path / "*.tar")
    with pytest.raises(DataError, match=r"s3://bucket/a.tar: shards are indexed from local files"):
        index.add("s3://bucket/a.tar")
    report = index.add(str(tmp_path / "none-{0..1}.tar"))
    assert [Path(path).name for path, _ in report.skipped] == ["none-0.tar", "none-1.tar"]
    with pytest.raises(ConfigError, match="the condition 'x > 1'"):
        index.query("a cat", where="x > 1")


def test_pictures_go_before_shards_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "f" / "a.tar", [record(0)])
    assert [Path(item.path).name for item in inputs(tmp_path / "f").items] == ["a.tar#0000"]
    (tmp_path / "f" / "p.png").write_bytes(drawn(1))
    assert [Path(item.path).name for item in inputs(tmp_path / "f").items] == ["p.png"]


def test_a_record_of_a_shard_is_shown_by_its_name_in_the_index(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [drawn(seed) for seed in range(3)]
    tar, rows = tmp_path / "a#b-000.tar", tmp_path / "val.parquet"
    with tarfile.open(tar, "w") as shard:
        for key, content in zip(["one", "two#three", "four"], pictures, strict=True):
            entry = tarfile.TarInfo(f"{key}.png")
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    parquet.write_table(
        pa.Table.from_pylist([{"image": {"bytes": one, "path": None}} for one in pictures]), rows
    )
    for file in (tar, rows):
        items = list(inputs(file).items)
        assert [picture_at(item.path) for item in items] == pictures
        assert contact_sheet([("", [Tile(item.path, "") for item in items])]).size[0] > 3 * 180
    plain = tmp_path / "c#1.png"
    plain.write_bytes(pictures[0])
    assert picture_at(str(plain)) == str(plain)
    for gone in (f"{tar}#five", f"{rows}#3", f"{rows}#x"):
        with pytest.raises(PictureError, match="not in its shard any more"):
            picture_at(gone)
    assert picture_at(str(tmp_path / "none.tar#one")) == str(tmp_path / "none.tar#one")
    # A shard that was written anew is read anew.
    parquet.write_table(pa.Table.from_pylist([{"image": {"bytes": pictures[2], "path": None}}]), rows)
    assert picture_at(f"{rows}#0") == pictures[2]
