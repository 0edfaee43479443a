from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clipworks.data.folders import CaptionedFolder, ImageFolder, open_folder, read_table
from clipworks.errors import DataError


@pytest.fixture
def pictures(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    for number in (10, 2, 1):
        (tmp_path / f"img{number}.png").write_bytes(png(number))
    return tmp_path


def test_subfolders_are_classes_in_a_stable_order(tmp_path: Path, png: Callable[..., bytes]) -> None:
    for name in ("dog/b.png", "cat/10.jpg", "cat/9.png", "cat/deep/1.png", ".cache/x.png", "dog/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    source = ImageFolder(tmp_path)
    assert source.class_names == ["cat", "dog"]
    examples = [source[index] for index in range(len(source))]
    assert [example.key for example in examples] == ["cat/9.png", "cat/10.jpg", "cat/deep/1.png", "dog/b.png"]
    assert [example.label for example in examples] == [0, 0, 0, 1]
    assert source.labels is not None and source.labels.tolist() == [0, 0, 0, 1]
    assert examples[0].image == tmp_path / "cat" / "9.png"
    assert isinstance(open_folder(tmp_path), ImageFolder)


def test_folders_that_are_no_set_are_refused(tmp_path: Path, png: Callable[..., bytes]) -> None:
    with pytest.raises(DataError, match="no such folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="empty"):
        ImageFolder(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(DataError, match="no subfolders"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="label without image"):
        ImageFolder(tmp_path)


TABLES = {
    "captions.csv": 'file_name,caption\nimg1.png,"one, two"\nimg2.png,zwei\nimg1.png,uno\n',
    "pairs.tsv": "caption\tpath\none, two\timg1.png\nzwei\timg2.png\nuno\timg1.png\n",
    "metadata.jsonl": '{"image": "img1.png", "captions": ["one, two", "uno"]}\n\n'
    '{"image": "img2.png", "captions": "zwei"}\n',
    "annotations.json": json.dumps(
        [{"file": "img1.png", "alt": ["one, two", "uno"]}, {"file": "img2.png", "alt": "zwei"}]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_captions_come_from_every_kind_of_table(pictures: Path, name: str) -> None:
    (pictures / name).write_text("\ufeff" + TABLES[name], encoding="utf-8")
    for location in (pictures, pictures / name):
        source = CaptionedFolder(location)
        assert [(source[index].key, source[index].texts["alt"]) for index in range(len(source))] == [
            ("img1.png", ["one, two", "uno"]),
            ("img2.png", "zwei"),
        ]
    assert isinstance(open_folder(pictures), CaptionedFolder)


def test_captions_beside_pictures(pictures: Path) -> None:
    (pictures / "img1.txt").write_text("one\n\n two \n")
    (pictures / "img10.txt").write_text("ten")
    source = open_folder(pictures)
    assert [(source[index].key, source[index].texts["alt"]) for index in range(len(source))] == [
        ("img1.png", ["one", "two"]),
        ("img10.png", "ten"),
    ]
    assert isinstance(source, CaptionedFolder)
    assert source.skipped.counts == {"picture without text": 1}


def test_named_columns_labels_and_languages(pictures: Path) -> None:
    (pictures / "t.csv").write_text("where,long,label,de\nimg1.png,lang,cat,Katze\nimg2.png,lang2,ant,\n")
    source = CaptionedFolder(pictures / "t.csv", image="where", texts={"synthetic": "long", "de": "de"})
    assert source.class_names == ["ant", "cat"]
    assert [source[index].label for index in (0, 1)] == [1, 0]
    assert source[0].texts == {"synthetic": "lang", "de": "Katze"} and source[1].texts == {
        "synthetic": "lang2"
    }
    (pictures / "t.csv").write_text("file,label\nimg1.png,3\nimg2.png,1\n")
    source = CaptionedFolder(pictures / "t.csv")
    assert source.class_names is None and source.labels is not None and source.labels.tolist() == [3, 1]


def test_missing_pictures_are_counted_or_raised(pictures: Path) -> None:
    (pictures / "captions.csv").write_text("file,caption\nimg1.png,a\ngone.png,b\n,c\n")
    source = CaptionedFolder(pictures)
    assert len(source) == 1
    assert source.skipped.counts == {"missing picture": 1, "row without file name": 1}
    with pytest.raises(DataError, match=r"gone\.png"):
        CaptionedFolder(pictures, strict=True)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "file,captoin\nimg1.png,x\n", r"no column of texts.*captoin"),
        ("t.csv", "caption,n\nx,1\n", r"no column of file names"),
        ("t.csv", "file,caption\n", "no rows"),
        ("t.csv", "file,caption\nimg1.png,a,b\n", "line 2"),
        ("t.csv", "file,caption\nimg1.png\n", "line 2"),
        ("t.jsonl", '{"file": "img1.png", "caption": 3}\n', r"row 1.*int"),
        ("t.jsonl", "{\n", "cannot be read as jsonl"),
        ("t.jsonl", "[1]\n", "line 1"),
        ("t.json", "3", "holds a int"),
        ("t.csv", "file,label\nimg1.png,-2\n", "row 1"),
        ("t.xlsx", "", r"\.csv, \.tsv"),
        ("t.csv", b"\xff\xfe", "cannot be read"),
        ("t.csv", "file,caption\nnowhere.png,x\n", "no picture with a text"),
    ],
)
def test_tables_that_do_not_fit_say_where(pictures: Path, name: str, content: str | bytes, says: str) -> None:
    (pictures / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=says):
        CaptionedFolder(pictures / name)


def test_unknown_columns_name_the_nearest(pictures: Path) -> None:
    (pictures / "t.csv").write_text("file,caption\nimg1.png,x\n")
    with pytest.raises(DataError, match="did you mean caption"):
        CaptionedFolder(pictures / "t.csv", texts={"alt": "captoin"})
    with pytest.raises(DataError, match="did you mean file"):
        CaptionedFolder(pictures / "t.csv", image="fil")
    (pictures / "captions.csv").write_text("file,caption\nimg1.png,x\n")
    (pictures / "pairs.csv").write_text("file,caption\nimg1.png,x\n")
    with pytest.raises(DataError, match="several tables"):
        CaptionedFolder(pictures)
    with pytest.raises(DataError, match="no such table"):
        list(read_table(pictures / "gone.csv"))
