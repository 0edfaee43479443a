from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipworks.data.source import Example
from clipworks.data.streams import Stream
from clipworks.errors import ConfigError


class Counted:
    """Pieces of given lengths, of which some records cannot be read."""

    def __init__(self, lengths: list[int], broken: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.lengths, self.broken = lengths, broken
        self.records = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, piece: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        for record in range(start, self.lengths[piece]):
            self.records += 1
            if (piece, record) not in self.broken:
                yield record, Example(f"{piece}/{record}")

    @property
    def keys(self) -> list[str]:
        return [
            f"{piece}/{record}"
            for piece, length in enumerate(self.lengths)
            for record in range(length)
            if (piece, record) not in self.broken
        ]


LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=6)
BROKEN = st.frozensets(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=6)


@given(LENGTHS, BROKEN, st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_all_readers_together_read_everything_once(
    lengths: list[int], broken: frozenset[tuple[int, int]], window: int, readers: int, seed: int
) -> None:
    stream = Stream(Counted(lengths, broken), window=window)
    keys = [
        example.key
        for reader in range(readers)
        for example, _ in stream.read(seed, reader=reader, readers=readers)
    ]
    assert sorted(keys) == sorted(Counted(lengths, broken).keys)


@given(LENGTHS.filter(any), BROKEN, st.integers(1, 9), st.integers(1, 3), st.data())
def test_going_on_from_any_position_gives_the_identical_rest(
    lengths: list[int], broken: frozenset[tuple[int, int]], window: int, readers: int, data: st.DataObject
) -> None:
    pieces = Counted(lengths, broken)
    if not pieces.keys:
        return
    reader = data.draw(st.integers(0, readers - 1))
    stream = Stream(pieces, window=window)
    walked = list(stream.read(4, None, reader, readers))
    for place, (_, position) in enumerate(walked):
        rest = list(Stream(pieces, window=window).read(4, position, reader, readers))
        assert rest == walked[place + 1 :]


def test_the_next_turn_has_another_order_and_the_position_says_which_turn() -> None:
    stream = Stream(Counted([5, 5, 5]), window=6)
    items = list(islice(stream.read(0, endless=True), 45))
    turns = [[example.key for example, _ in items[start : start + 15]] for start in (0, 15, 30)]
    assert all(sorted(turn) == sorted(turns[0]) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    assert Counter(position.turn for _, position in items) == {0: 15, 1: 15, 2: 15}
    assert list(islice(stream.read(0, items[20][1], endless=True), 24)) == items[21:]


def test_other_seeds_give_other_orders_and_the_same_seed_the_same() -> None:
    orders = [[e.key for e, _ in Stream(Counted([9, 9])).read(seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_resuming_reads_at_most_a_window_again() -> None:
    pieces = Counted([100] * 20)
    walked = list(Stream(pieces, window=50).read(0))
    pieces.records = 0
    next(Stream(pieces, window=50).read(0, walked[1777][1]))
    assert pieces.records <= 51


def test_windows_mix_neighboring_pieces() -> None:
    keys = [example.key.split("/")[0] for example, _ in Stream(Counted([10] * 10), window=40).read(0)]
    assert len(set(keys[:10])) > 2


def test_a_stream_in_order_is_in_order() -> None:
    stream = Stream(Counted([3, 2]), window=1, shuffle_pieces=False)
    assert [example.key for example, _ in stream.read(0)] == ["0/0", "0/1", "0/2", "1/0", "1/1"]


def test_an_endless_stream_of_nothing_ends_with_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing could be read"):
        next(Stream(Counted([0, 0])).read(0, endless=True))
    with pytest.raises(ConfigError, match="nothing to read"):
        Stream(Counted([]))
    with pytest.raises(ConfigError, match="at least one"):
        Stream(Counted([1]), window=0)
