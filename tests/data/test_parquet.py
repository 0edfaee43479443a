from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipworks.data.parquet import ParquetExamples
from clipworks.data.streams import Stream
from clipworks.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, columns: dict[str, Any], rows_in_group: int = 4) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_in_group)
    return path


@pytest.fixture
def hub(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    """Two files in the hub's layout, 10 and 7 rows in groups of 4."""
    for name, start, count in [("train-000", 0, 10), ("train-001", 10, 7)]:
        numbers = range(start, start + count)
        write(
            tmp_path / f"{name}.parquet",
            {
                "image": [{"bytes": png(number), "path": f"{number}.png"} for number in numbers],
                "label": pa.array([number % 3 for number in numbers], pa.int16()),
            },
        )
    return tmp_path


def test_rows_are_examples_in_order_with_keys_of_file_and_row(hub: Path, png: Callable[..., bytes]) -> None:
    source = ParquetExamples(hub)
    assert len(source) == 17
    examples = [source[index] for index in range(17)]
    assert [example.image for example in examples] == [png(number) for number in range(17)]
    assert [example.label for example in examples] == [number % 3 for number in range(17)]
    assert [examples[index].key for index in (0, 9, 10, 16)] == [
        "train-000/0",
        "train-000/9",
        "train-001/0",
        "train-001/6",
    ]
    np.testing.assert_array_equal(source.labels, np.arange(17) % 3)
    for outside in (-1, 17):
        with pytest.raises(IndexError):
            source[outside]


@given(order=st.permutations(range(17)), memory=st.sampled_from([0, 700, 1 << 30]))
def test_any_order_gives_the_same_rows_whatever_is_kept(
    hub_once: ParquetExamples, order: list[int], memory: int
) -> None:
    hub_once._memory = memory
    for index in order:
        image = hub_once[index].image
        assert isinstance(image, bytes) and image == hub_once_images[index]


hub_once_images: list[bytes] = []


@pytest.fixture(scope="module")
def hub_once(tmp_path_factory: pytest.TempPathFactory, png: Callable[..., bytes]) -> ParquetExamples:
    hub_once_images[:] = [png(number) for number in range(17)]
    path = write(tmp_path_factory.mktemp("hub") / "a.parquet", {"image": hub_once_images})
    return ParquetExamples(path)


def test_a_stream_reads_the_same_examples_as_random_access(hub: Path) -> None:
    source = ParquetExamples([hub / "train-000.parquet", hub / "train-001.parquet"])
    streamed = [example for example, _ in Stream(source.pieces, window=1, shuffle_pieces=False).read(0)]
    assert streamed == [source[index] for index in range(17)]
    assert [record for record, _ in source.pieces.read(0, 2)] == [2, 3]


def test_other_layouts_are_read(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "b.png").write_bytes(png(1))
    struct = [{"bytes": None, "path": "pictures/b.png"}, {"bytes": png(2), "path": None}]
    texts = [["two", "captions"], []]
    source = ParquetExamples(
        write(tmp_path / "a.parquet", {"img": struct, "captions": texts, "fr": ["un", ""]})
    )
    assert source[0].image == tmp_path / "pictures" / "b.png"
    assert source[0].texts == {"alt": ["two", "captions"], "fr": "un"}
    assert source[1].image == png(2) and source[1].texts == {} and source.labels is None
    named = ParquetExamples(tmp_path / "a.parquet", image="img", texts={"short": "fr"})
    assert named[0].texts == {"short": "un"} and named[1].texts == {}
    words = ParquetExamples(write(tmp_path / "b.parquet", {"text": ["x", "y"]}))
    assert words[1].image is None and words[1].texts == {"alt": "y"}


def test_a_picture_is_not_taken_from_outside_of_the_folder(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "set").mkdir()
    rows = [
        {"bytes": None, "path": path} for path in ("../secret.png", str(tmp_path / "secret.png"), "none.png")
    ]
    source = ParquetExamples(write(tmp_path / "set" / "a.parquet", {"image": rows}))
    for index in range(3):
        with pytest.raises(DataError, match=f"a/{index}: has no picture"):
            source[index]


def test_memory_stays_bounded_while_a_large_file_is_streamed(tmp_path: Path) -> None:
    blob = np.random.default_rng(0).bytes(1 << 14)
    rows = [{"bytes": blob[number % 97 :], "path": None} for number in range(3000)]  # 49 MB in one group
    pq.write_table(
        pa.table({"image": rows}), tmp_path / "a.parquet", row_group_size=3000, use_dictionary=False
    )
    del rows
    source = ParquetExamples(tmp_path / "a.parquet")
    before = peak = pa.total_allocated_bytes()
    for _ in source.pieces.read(0):
        peak = max(peak, pa.total_allocated_bytes())
    assert peak - before < 24 << 20


def test_kept_groups_stay_below_the_limit(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet", {"image": [bytes([number]) * 10_000 for number in range(40)]}, rows_in_group=5
    )
    source = ParquetExamples(tmp_path / "a.parquet", memory=120_000)
    for index in [*range(40), *range(39, -1, -3)]:
        assert source[index].image == bytes([index]) * 10_000
        assert sum(group.nbytes for group in source._kept.values()) <= 120_000


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        (
            {"image": [b"x"], "caption": ["c"]},
            {"texts": {"alt": "captoin"}},
            "'captoin'.*did you mean caption",
        ),
        ({"image": [b"x"]}, {"label": "label"}, "no column 'label'"),
        ({"image": ["text"], "label": [1]}, {"image": "image"}, "not pictures"),
        ({"image": [b"x"], "label": ["cat"]}, {"label": "label"}, "labels are integers.*string"),
        ({"image": [b"x"], "n": [1]}, {"texts": {"alt": "n"}}, "not text"),
        ({"a": [1], "b": [2]}, {}, r"neither pictures.*\['a', 'b'\]"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=says):
        ParquetExamples(tmp_path / "a.parquet", **options)


def test_files_that_cannot_be_read_are_counted(hub: Path) -> None:
    (hub / "train-002.parquet").write_bytes((hub / "train-001.parquet").read_bytes()[:-9])
    (hub / "train-003.parquet").write_bytes(b"")
    source = ParquetExamples([hub, hub / "train-009.parquet"])
    assert len(source) == 17
    assert source.skipped.counts == {"unreadable file": 2, "missing file": 1}
    with pytest.raises(DataError, match="train-002"):
        ParquetExamples(hub, strict=True)
    with pytest.raises(DataError, match="train-003"):
        ParquetExamples(hub / "train-003.parquet")
    for nothing in (hub / "x-*.parquet", hub.parent / "nowhere.parquet", []):
        with pytest.raises(DataError):
            ParquetExamples(nothing)
    write(hub / "train-004.parquet", {"other": [1]})
    with pytest.raises(DataError, match=r"train-004.*'other'"):
        ParquetExamples(hub)


def test_damage_inside_a_file_costs_its_rows_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [bytes([number]) * 4000 for number in range(12)]
    pq.write_table(
        pa.table({"image": rows}), path, row_group_size=4, use_dictionary=False, compression="none"
    )
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 16] = b"\xff" * 16
    path.write_bytes(content)
    source = ParquetExamples(path)
    streamed = [
        example.image[0] for example, _ in Stream(source.pieces, window=1, shuffle_pieces=False).read(0)
    ]
    assert streamed == [0, 1, 2, 3, 8, 9, 10, 11]
    assert source.skipped.counts == {"unreadable row group": 1}
    with pytest.raises(DataError, match="row group 1"):
        source[5]


def test_rows_without_picture_are_counted_when_streamed(tmp_path: Path) -> None:
    source = ParquetExamples(write(tmp_path / "a.parquet", {"image": [b"a", None, b"c", b"d", None]}))
    assert [
        example.image for example, _ in Stream(source.pieces, window=1, shuffle_pieces=False).read(0)
    ] == [
        b"a",
        b"c",
        b"d",
    ]
    assert source.skipped.counts == {"unreadable record": 2}


def test_a_source_can_be_sent_to_another_process(hub: Path) -> None:
    source = ParquetExamples(hub)
    source.skipped.add("missing file", "x")
    _ = source[3]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[16] == source[16] and copy.skipped.counts == {"missing file": 1}


def test_labels_with_gaps_are_refused(tmp_path: Path) -> None:
    source = ParquetExamples(write(tmp_path / "a.parquet", {"label": [1, None]}))
    with pytest.raises(DataError, match="1 rows have no label"):
        _ = source.labels
