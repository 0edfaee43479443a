from __future__ import annotations

import gc
import io
import json
import pickle
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipworks.data.shards import ShardPieces, TarShards, expand_braces, locate, split_name, write_shards
from clipworks.data.source import Example, Skipped
from clipworks.data.streams import Stream
from clipworks.errors import DataError

MakeExamples = Callable[..., list[Example]]


def read_all(pieces: ShardPieces) -> list[Example]:
    return [example for piece in range(len(pieces)) for _, example in pieces.read(piece)]


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


# Names ---------------------------------------------------------------------------------------


@given(st.integers(0, 1200), st.integers(0, 60), st.integers(1, 4), st.sampled_from(["", "x-", "a/b."]))
def test_a_brace_range_is_the_padded_numbers(first: int, more: int, width: int, prefix: str) -> None:
    last = first + more
    low, high = f"{first:0{width}d}", f"{last:0{width}d}"
    padded = any(len(end) > 1 and end[0] == "0" for end in (low, high))
    expected = [
        f"{number:0{max(len(low), len(high)) if padded else 1}d}" for number in range(first, last + 1)
    ]
    assert expand_braces(f"{prefix}{{{low}..{high}}}.tar") == [f"{prefix}{number}.tar" for number in expected]


PLAIN = st.text(st.sampled_from("ab.-_/0"), max_size=4)
GROUPS = st.one_of(
    st.lists(PLAIN, min_size=2, max_size=3),
    st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda ends: f"{ends[0]}..{ends[1]}"),
)


@given(st.lists(st.tuples(PLAIN, GROUPS), max_size=3), PLAIN)
def test_braces_expand_as_the_braceexpand_library_does(parts: list[tuple[str, object]], tail: str) -> None:
    library = pytest.importorskip("braceexpand")
    pattern = tail
    for plain, group in parts:
        pattern = plain + "{" + (group if isinstance(group, str) else ",".join(group)) + "}" + pattern  # type: ignore[arg-type]
    assert expand_braces(pattern) == list(library.braceexpand(pattern))


def test_braces_count_down_step_and_stand_for_themselves() -> None:
    assert expand_braces("{03..01}") == ["03", "02", "01"]
    assert expand_braces("{0..8..4}") == ["0", "4", "8"]
    assert expand_braces("a{b}c{}") == ["a{b}c{}"]
    assert expand_braces("{b}{1..2}") == ["{b}1", "{b}2"]
    with pytest.raises(DataError, match="more than"):
        expand_braces("{0..99999999999}")
    with pytest.raises(DataError, match="more than"):
        expand_braces("{1..9999}{1..9999}")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c/0001.seg.png", ("a/b.c/0001", "seg.png")),
        ("0001.JPG", ("0001", "jpg")),
        ("./0001.jpg", ("0001", "jpg")),
        ("a/.hidden", None),
        ("noextension", None),
        ("__meta__.json", None),
        ("x.", None),
    ],
)
def test_member_names_split_at_the_first_dot_of_their_last_part(
    name: str, parts: tuple[str, str] | None
) -> None:
    assert split_name(name) == parts


def test_shards_are_found_by_brace_pattern_folder_and_list(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"s-{number:03d}.tar").touch()
    names = [str(tmp_path / f"s-{number:03d}.tar") for number in range(3)]
    assert locate(tmp_path) == names
    assert locate(str(tmp_path / "s-*.tar")) == names
    assert locate([tmp_path / "s-{000..002}.tar"]) == names
    assert locate("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]
    for nothing in (str(tmp_path / "x*.tar"), [], tmp_path.parent / "nowhere*"):
        with pytest.raises(DataError):
            locate(nothing)


# Reading and writing -----------------------------------------------------------------------------


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(
    st.lists(
        st.tuples(
            st.binary(max_size=40),
            st.dictionaries(
                st.sampled_from(["alt", "short", "fr"]), TEXTS | st.lists(TEXTS, min_size=1, max_size=3)
            ),
            st.none() | st.integers(0, 99),
            st.dictionaries(st.sampled_from(["width", "seg.bin"]), st.integers(0, 9), max_size=1),
        ),
        min_size=1,
        max_size=7,
    ),
    st.integers(1, 4),
)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[tuple[bytes, dict, int | None, dict]],
    per_shard: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    examples = [
        Example(f"d/{number}", b"\xff\xd8" + image, texts, label, extra=extra)
        for number, (image, texts, label, extra) in enumerate(records)
    ]
    paths = write_shards(examples, folder, per_shard)
    assert len(paths) == -(-len(examples) // per_shard)
    for source in (TarShards(folder), read_all(ShardPieces(folder))):
        assert [source[index] for index in range(len(source))] == examples


@pytest.mark.filterwarnings("ignore")  # webdataset leaves files open
def test_shards_are_read_as_webdataset_reads_them(tmp_path: Path, make_examples: MakeExamples) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shards(make_examples(10, classes=3), tmp_path, 4)
    paths = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    ours = read_all(ShardPieces(tmp_path))
    assert [(one["__key__"], one["png"], int(one["cls"])) for one in theirs] == [
        (one.key, one.image, one.label) for one in ours
    ]
    gc.collect()


def test_a_set_written_by_webdataset_is_read(tmp_path: Path, png: Callable[..., bytes]) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(3):
            writer.write(
                {
                    "__key__": f"k{number}",
                    "png": png(number),
                    "txt": f"text {number}",
                    "json": {"width": number},
                }
            )
    source = TarShards(tmp_path / "a.tar")
    assert [source[index].texts["alt"] for index in range(3)] == ["text 0", "text 1", "text 2"]
    assert source[2].extra["width"] == 2 and source[2].image == png(2)
    assert source.labels is None


def test_texts_are_taken_from_the_fields_that_are_named(tmp_path: Path) -> None:
    record = json.dumps({"synthetic_caption": "s", "caption": "c", "url": "u"}).encode()
    tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.json", record), ("1.long.txt", b"l\n")])
    plain = TarShards(tmp_path / "a.tar")[0]
    assert plain.texts == {"alt": "c"} and plain.extra["url"] == "u"
    named = TarShards(tmp_path / "a.tar", texts={"synthetic": "synthetic_caption", "region": "long.txt"})[0]
    assert named.texts == {"synthetic": "s", "region": "l"}


def test_the_first_picture_is_the_picture_and_other_members_are_kept(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("1.png", b"mask"), ("1.jpg", b"photo"), ("1.seg.png", b"seg"), ("2.cls", b"7")])
    source = TarShards(tmp_path / "a.tar")
    assert source[0].image == b"photo" and dict(source[0].extra) == {"png": b"mask", "seg.png": b"seg"}
    assert source[1].image is None and source[1].label == 7


def test_labels_are_known_without_pictures(tmp_path: Path, make_examples: MakeExamples) -> None:
    write_shards(make_examples(7, classes=3), tmp_path, 4)
    labels = TarShards(tmp_path).labels
    assert labels is not None
    np.testing.assert_array_equal(labels, np.arange(7) % 3)


def test_a_source_can_be_sent_to_another_process(tmp_path: Path, make_examples: MakeExamples) -> None:
    write_shards(make_examples(3, classes=2), tmp_path)
    source = TarShards(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[index] for index in range(3)] == [source[index] for index in range(3)]
    assert copy.skipped.total == 0


def test_a_failed_writing_leaves_no_shard(tmp_path: Path, make_examples: MakeExamples) -> None:
    def failing() -> object:
        yield from make_examples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), tmp_path, 3)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]
    assert len(TarShards(tmp_path)) == 3


@pytest.mark.parametrize("keys", [["a.b"], [""], ["a", "a"], [".x"], ["a/.b"]])
def test_keys_that_would_not_be_read_again_are_refused(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(DataError, match=r"key|twice"):
        write_shards([Example(key, b"x") for key in keys], tmp_path)
    assert not list(tmp_path.glob("*"))


# Damage --------------------------------------------------------------------------------------


def test_whatever_the_place_where_a_tar_ends_the_complete_examples_before_it_are_read(
    tmp_path: Path, make_examples: MakeExamples
) -> None:
    whole = write_shards(make_examples(4), tmp_path / "whole")[0].read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        ends = [member.offset_data + member.size for member in file.getmembers()]
    mark = -(-ends[-1] // 512) * 512 + 512  # behind the first block of zeros, the tar file is whole
    for length in [0, 1, 511, 512, 600, *range(700, mark, 317), *ends, ends[-1] - 1, mark - 1]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        # An example is complete with its picture and its json; with its picture alone it is still one.
        members = sum(end <= length for end in ends)
        pieces = ShardPieces(path)
        assert [example.key for example in read_all(pieces)] == [
            f"e{number}" for number in range(-(-members // 2))
        ]
        assert pieces.skipped.total == 1, length
        if members:
            source = TarShards(path)
            assert len(source) == -(-members // 2)
            assert source.skipped.counts == pieces.skipped.counts
        with pytest.raises(DataError, match=r"cut\.tar"):
            read_all(ShardPieces(path, strict=True))


def test_a_damaged_header_in_the_middle_is_counted_not_taken_for_the_end(
    tmp_path: Path, make_examples: MakeExamples
) -> None:
    path = write_shards(make_examples(6), tmp_path)[0]
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        header = file.getmembers()[6].offset
    content[header : header + 512] = b"\xa5" * 512
    path.write_bytes(content)
    source = TarShards(path)
    assert len(source) == 3
    assert source.skipped.counts == {"damaged shard": 1}


def test_missing_shards_and_corrupt_records_are_counted_exactly(
    tmp_path: Path, make_examples: MakeExamples
) -> None:
    write_shards(make_examples(40), tmp_path, 10)
    broken = {3, 17, 25, 39}
    members = []
    for example in make_examples(40, prefix="x"):
        number = int(example.key[1:])
        members += [
            (f"{example.key}.png", example.image),
            (f"{example.key}.json", b"{" if number in broken else b"{}"),
        ]
    tar(tmp_path / "shard-000004.tar", members)
    (tmp_path / "shard-000005.tar").write_bytes(b"this is no tar" * 100)
    pattern = str(tmp_path / "shard-{000000..000007}.tar")
    pieces = ShardPieces(pattern)
    keys = [example.key for example, _ in Stream(pieces, window=7).read(0)]
    expected = {f"e{number}" for number in range(40)} | {
        f"x{number}" for number in range(40) if number not in broken
    }
    assert set(keys) == expected and len(keys) == len(expected)
    assert pieces.skipped.counts == {"unreadable record": 4, "missing shard": 2, "unreadable shard": 1}
    list(Stream(pieces, window=7).read(1))
    assert pieces.skipped.total == 7  # the same places are not counted again
    assert len(pieces.skipped.first["unreadable record"]) == 4 and "x3" in str(pieces.skipped.first)
    source = TarShards(pattern)
    assert len(source) == 80 and source.skipped.counts == {"missing shard": 2, "unreadable shard": 1}
    with pytest.raises(DataError, match="x3"):
        source[43]
    with pytest.raises(DataError, match=r"000006.*missing"):
        TarShards(tmp_path / "shard-000006.tar", strict=True)
    with pytest.raises(DataError, match="no example"):
        TarShards(tmp_path / "shard-000006.tar")


def test_shards_behind_a_command_are_read_like_local_ones(
    tmp_path: Path, make_examples: MakeExamples
) -> None:
    pytest.importorskip("webdataset")
    path = write_shards(make_examples(5), tmp_path)[0]
    pieces = ShardPieces(f"pipe:cat {shlex.quote(str(path))}")
    assert read_all(pieces) == read_all(ShardPieces(path))
    assert not pieces.skipped.total
    cut = ShardPieces(f"pipe:head -c 3000 {shlex.quote(str(path))}")
    assert 0 < len(read_all(cut)) < 5
    assert cut.skipped.counts == {"truncated shard": 1}
    with pytest.raises(DataError, match="Stream"):
        TarShards("https://host/a.tar")


def test_a_report_adds_up_places_once() -> None:
    one, other = Skipped(examples=2), Skipped()
    for place in ("a", "b", "c", "a"):
        one.add("broken", place, "why")
    other.add("broken", "a", "why")
    other.add("missing", "a")
    assert one.counts == {"broken": 3} and len(one.first["broken"]) == 2
    one.update(other)
    assert one.counts == {"broken": 3, "missing": 1} and one.total == 4
    assert str(one) == "skipped 4: 3 broken (a: why); 1 missing (a)"
    assert str(Skipped()) == "nothing skipped"
