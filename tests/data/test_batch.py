from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.errors import DataError


def make(size: int, owner: list[int] | None) -> Batch:
    count = size if owner is None else len(owner)
    text = Tokens(torch.arange(count)[:, None].expand(-1, 3).clone(), torch.full((count,), 2), None)
    owned = Tokens(text.ids, text.ends, None if owner is None else torch.tensor(owner, dtype=torch.int64))
    plain = Tokens(
        torch.arange(size)[:, None].expand(-1, 2).clone(), torch.ones(size, dtype=torch.int64), None
    )
    return Batch(
        images=torch.arange(size, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).clone(),
        texts={"alt": plain, "region": owned},
        features={"image": torch.arange(size).float()[:, None], "scale": torch.tensor(3.0)},
        boxes=[torch.full((row, 4), float(row)) for row in range(size)],
        keys=[f"k{row}" for row in range(size)],
    )


@given(st.data(), st.integers(1, 9))
def test_parts_of_a_batch_hold_its_rows_and_their_sentences(data: st.DataObject, size: int) -> None:
    owner = data.draw(st.lists(st.integers(0, size - 1), max_size=12).map(sorted))
    parts = data.draw(st.integers(1, size))
    batch = make(size, owner)
    pieces = list(batch.split(parts))
    assert [len(piece) for piece in pieces if abs(len(piece) - size / parts) >= 1] == []
    assert [key for piece in pieces for key in piece.keys] == batch.keys
    start, seen = 0, []
    for piece in pieces:
        rows = range(start, start + len(piece))
        assert piece.images is not None
        assert piece.images[:, 0, 0, 0].tolist() == list(rows)
        assert piece.features["image"][:, 0].tolist() == list(rows)
        assert piece.features["scale"] == 3
        assert piece.texts["alt"].ids[:, 0].tolist() == list(rows)
        assert piece.boxes is not None
        assert [len(box) for box in piece.boxes] == list(rows)
        owners = piece.texts["region"].owner
        assert owners is not None
        sentences = [ids[0] for ids in piece.texts["region"].ids.tolist()]
        seen += [(sentence, row + start) for sentence, row in zip(sentences, owners.tolist())]
        start += len(piece)
    assert seen == list(enumerate(owner))


def test_moving_keeps_everything_and_changes_nothing_in_place() -> None:
    batch = make(3, [0, 0, 2])
    moved = batch.to("meta")
    assert moved.images is not None and moved.images.device.type == "meta"
    assert moved.texts["region"].owner is not None and moved.texts["region"].owner.device.type == "meta"
    assert moved.features["scale"].device.type == "meta"
    assert moved.boxes is not None and moved.boxes[1].device.type == "meta"
    assert moved.keys == batch.keys
    assert batch.images is not None and batch.images.device.type == "cpu"


def test_rows_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(DataError, match="'images': 2"):
        Batch(images=torch.zeros(2, 3, 1, 1), keys=["a", "b", "c"])
    with pytest.raises(DataError, match="features label"):
        Batch(features={"label": torch.zeros(4)}, keys=["a"])


def test_a_batch_cannot_be_split_into_more_parts_than_rows() -> None:
    with pytest.raises(DataError, match="of 3 cannot be split into 4"):
        list(make(3, None).split(4))


def test_length_comes_from_whatever_is_there() -> None:
    assert len(Batch()) == 0
    assert len(Batch(images=torch.zeros(2, 3, 1, 1))) == 2
    assert len(Batch(features={"scale": torch.tensor(1.0), "x": torch.zeros(5, 2)})) == 5
    assert (
        len(
            Batch(
                texts={"alt": Tokens(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))}
            )
        )
        == 4
    )
