"""Evaluation sets as a user names them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from clipworks.errors import ConfigError, DataError
from clipworks.evaluate.sets import class_slice, labeled_set

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def parquet(tmp_path: Path) -> tuple[Path, Path]:
    from pyarrow import parquet as pq

    rows = []
    for label in (0, 1, 2, 3, 1):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * label, 0, 0)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": label})
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val-000.parquet")
    names = [{"index": i, "name": n, "names": [n, n * 2]} for i, n in enumerate("abcd")]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    return tmp_path / "val-000.parquet", tmp_path / "classes.json"


def test_slices_and_lists_name_classes() -> None:
    assert class_slice("9::10", 200) == list(range(9, 200, 10))
    assert class_slice("3,5", 10) == [3, 5]
    assert class_slice("", 10) == []
    for bad in ("a", "1;2", "::x"):
        with pytest.raises(ConfigError):
            class_slice(bad, 10)
    with pytest.raises(ConfigError, match="class 12 is not one of 10"):
        class_slice("3,12", 10)


def test_classes_left_out_are_gone_and_labels_count_anew(parquet: tuple[Path, Path]) -> None:
    source, texts = labeled_set(str(parquet[0]), parquet[1], only="1:", without="2")
    assert texts.names == ("b", "d")
    assert [source[i].label for i in range(len(source))] == [0, 1, 0]
    assert source.labels is not None and source.labels.tolist() == [0, 1, 0]


def test_synonyms_are_used_unless_told_otherwise(parquet: tuple[Path, Path]) -> None:
    _, with_all = labeled_set(str(parquet[0]), parquet[1], templates="photo")
    _, with_one = labeled_set(str(parquet[0]), parquet[1], templates="photo", synonyms=False)
    assert len(with_all.texts(0)) == 2 and len(with_one.texts(0)) == 1


def test_bad_input_is_one_clear_error(parquet: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--classes"):
        labeled_set(str(parquet[0]), None)
    with pytest.raises(ConfigError, match="did you mean simple"):
        labeled_set(str(parquet[0]), parquet[1], templates="simpel")
    with pytest.raises(DataError, match="no class is left"):
        labeled_set(str(parquet[0]), parquet[1], without="0:")
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    with pytest.raises(DataError, match="names 2 classes"):
        labeled_set(str(parquet[0]), short)
