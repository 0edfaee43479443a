"""Pairs come in whatever form people have them; what is missing is counted, what cannot work is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clipworks.core.tokenizer import Tokens
from clipworks.data.loader import Loader, Reading
from clipworks.data.pairs import Pairs, all_captions, open_pairs
from clipworks.data.shards import write_shards
from clipworks.data.source import Example
from clipworks.errors import ConfigError, DataError

SAID = {"a.png": ("a red one", "one in red"), "b.png": ("blue",), "c.png": ("green", "moss")}


@pytest.fixture
def pictures(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    for number, name in enumerate(SAID):
        (tmp_path / name).write_bytes(png(number))
    return tmp_path


def content(pairs: Pairs) -> dict[str, tuple[str, ...]]:
    return {Path(pairs[row].key).name: tuple(pairs[row].texts["alt"]) for row in range(len(pairs))}


def as_rows(pictures: Path) -> str:
    lines = [f"{name},{text}" for name, texts in SAID.items() for text in texts]
    (pictures / "my.csv").write_text("file,caption\n" + "\n".join(lines))
    return str(pictures / "my.csv")


def as_lists(pictures: Path) -> str:
    (pictures / "my.jsonl").write_text(
        "\n".join(json.dumps({"image": name, "captions": list(texts)}) for name, texts in SAID.items())
    )
    return str(pictures / "my.jsonl")


def as_texts(pictures: Path) -> str:
    for name, texts in SAID.items():
        (pictures / name).with_suffix(".txt").write_text("\n".join(texts))
    return str(pictures)


def as_records(pictures: Path) -> str:
    for name, texts in SAID.items():
        (pictures / name).with_suffix(".json").write_text(json.dumps({"captions": list(texts)}))
    return str(pictures)


def as_shards(pictures: Path) -> str:
    examples = [Example(name[0], pictures / name, {"alt": list(texts)}) for name, texts in SAID.items()]
    write_shards(examples, pictures / "shards", 2)
    return str(pictures / "shards" / "shard-{000000..000001}.tar")


def as_folder_of_shards(pictures: Path) -> str:
    return str(Path(as_shards(pictures)).parent)


@pytest.mark.parametrize("form", [as_rows, as_lists, as_texts, as_records, as_shards, as_folder_of_shards])
def test_every_form_gives_the_same_pictures_and_captions(pictures: Path, form: Callable[..., str]) -> None:
    pairs = open_pairs(form(pictures))
    found = content(pairs)
    if "shards" in form.__name__:
        found = {f"{key}.png": texts for key, texts in found.items()}
    assert found == SAID
    assert pairs.captions == list(SAID.values()) and pairs.skipped.total == 0
    assert all_captions(pairs) == [text for texts in SAID.values() for text in texts]


def test_a_parquet_file_is_opened(pictures: Path, png: Callable[..., bytes]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"image": [{"bytes": png(n), "path": ""} for n in range(3)], "caption": ["x", "y", ""]}
    parquet.write_table(pyarrow.table(rows), pictures / "my.parquet")
    pairs = open_pairs(pictures / "my.parquet")
    assert pairs.captions == [("x",), ("y",)] and pairs.skipped.counts == {"picture without caption": 1}


def test_several_columns_of_captions_all_count(pictures: Path) -> None:
    (pictures / "my.tsv").write_text("path\tshort\tlong\na.png\tred\ta red one\nb.png\t\tblue\n")
    pairs = open_pairs(pictures / "my.tsv", captions=("short", "long"))
    assert content(pairs) == {"a.png": ("red", "a red one"), "b.png": ("blue",)}
    with pytest.raises(DataError, match=r"'shrot'.*did you mean short"):
        open_pairs(pictures / "my.tsv", captions=("shrot",))
    with pytest.raises(DataError, match="there are texts long, short: name one"):
        open_pairs(pictures / "my.tsv")


def test_what_is_missing_is_counted_and_the_rest_is_taken(pictures: Path) -> None:
    (pictures / "my.csv").write_text("file,caption\na.png,x\nb.png,y\ngone.png,z\nc.png,\n")
    pairs = open_pairs(pictures / "my.csv")
    assert content(pairs) == {"a.png": ("x",), "b.png": ("y",)}
    assert pairs.skipped.counts == {"missing picture": 1, "picture without caption": 1}
    assert "gone.png" in str(pairs.skipped)


def test_a_table_in_the_wrong_folder_is_refused_with_counts(pictures: Path) -> None:
    (pictures / "sub").mkdir()
    (pictures / "a.png").rename(pictures / "sub" / "a.png")
    table = pictures / "sub" / "my.csv"
    table.write_text("file,caption\na.png,x\nb.png,y\nc.png,z\n")
    with pytest.raises(DataError, match=r"2 of the 3 pictures.*first is b\.png.*start from .*sub"):
        open_pairs(table)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gone.csv", None, "no such table, folder or shard"),
        ("notes.docx", "x", r"not pairs; they come as a table \(\.csv"),
        ("my.csv", "file,caption\na.png,\nb.png,  \n", "none of 2 pictures has a caption"),
        ("my.csv", "file,de\na.png,rot\n", "none of 1 pictures.*texts de: name one"),
        ("my.csv", "file,word\na.png,rot\n", "no column of texts"),
    ],
)
def test_what_cannot_work_says_why(pictures: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (pictures / name).write_text(text)
    with pytest.raises(DataError, match=says):
        open_pairs(pictures / name)


def test_columns_of_pictures_belong_to_tables(pictures: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'file'"):
        open_pairs(as_shards(pictures), image="file")
    with pytest.raises(ConfigError, match="no column 'file'"):
        open_pairs(pictures, image="file")


def test_a_damaged_sidecar_is_counted(pictures: Path) -> None:
    as_records(pictures)
    (pictures / "a.json").write_text("{")
    pairs = open_pairs(pictures)
    assert len(pairs) == 2 and pairs.skipped.counts["unreadable captions"] == 1


def test_a_split_keeps_every_pair_once_and_depends_on_keys_not_on_order(
    make_examples: Callable[..., list[Example]],
) -> None:
    from clipworks.data.source import Examples

    def opened(examples: list[Example]) -> Pairs:
        return Pairs(Examples(examples), [list(one.texts["alt"]) for one in examples])

    examples = make_examples(20)
    training, held = opened(examples).split(5, seed=1)
    keys = [{part[row].key for row in range(len(part))} for part in (training, held)]
    assert len(keys[1]) == 5 and not keys[0] & keys[1] and len(keys[0] | keys[1]) == 20
    again = opened(examples[::-1]).split(5, seed=1)[1]
    assert {again[row].key for row in range(5)} == keys[1]
    other = opened(examples).split(5, seed=2)[1]
    assert {other[row].key for row in range(5)} != keys[1]
    assert held.captions == [tuple(held[row].texts["alt"]) for row in range(5)]
    for wrong in (0, 20):
        with pytest.raises(DataError, match="cannot be held out"):
            opened(examples).split(wrong)


def test_a_loader_draws_one_of_a_pictures_captions(
    pictures: Path, spell: Callable[[list[str]], Tokens], read: Callable[[Tokens], list[str]]
) -> None:
    pairs = open_pairs(as_rows(pictures))
    seen: dict[str, set[str]] = {}
    loader = Loader(pairs, None, spell, 3, reading=Reading(workers=0))
    for epoch in range(12):
        batch = loader.batch(epoch, 0)
        for key, text in zip(batch.keys, read(batch.texts["alt"])):
            seen.setdefault(key, set()).add(text.strip())
    assert {key: set(texts) for key, texts in SAID.items()} == seen
