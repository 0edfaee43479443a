"""Examples read from front to back: shuffled, shared among processes, and resumable at any example.

For what has no random access or does not fit into memory. The pieces (shards, row groups) come in a new
order in every turn; each process reads its own; the examples of consecutive pieces are shuffled in
windows. A window is filled, permuted and emptied, rather than kept full as a reservoir: the position
then consists of five numbers, and resuming re-reads at most one window, where a reservoir would have
to be saved with its content.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from clipworks.data.randomness import fold, permutation
from clipworks.data.source import Example
from clipworks.errors import ConfigError

_PIECES, _WINDOW = 0x91EC, 0x3149


class Pieces(Protocol):
    """Something that consists of pieces, each of which is read from front to back."""

    def __len__(self) -> int:
        """How many pieces there are."""
        ...

    def read(self, piece: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        """The examples of one piece from record `start` on, with their number within the piece.

        What cannot be read is counted and left out; the numbers of the others do not depend on it.
        """
        ...


class Position(NamedTuple):
    """Where a reader of a stream is.

    Attributes:
        turn: how many times everything has been read.
        window: how many windows of this turn are behind.
        piece: which of the reader's pieces, in this turn's order, the current window begins in.
        record: with which record of that piece.
        emitted: how many examples of the current window have been given out.
    """

    turn: int
    window: int
    piece: int
    record: int
    emitted: int


class Stream:
    """A shuffled, endless reading of pieces.

    Args:
        pieces: what is read.
        window: how many examples are shuffled together; 1 keeps the order within the pieces.
        examples: how long an epoch is, over all processes. Needed with several processes, whose shares
            are never exactly equal: each goes on into its next turn when its share ends. None: an
            epoch is one turn.
        shuffle_pieces: whether the order of the pieces changes in every turn.

    With fewer pieces than readers, every reader reads all pieces and takes each n-th record.
    """

    def __init__(
        self, pieces: Pieces, *, window: int = 2048, examples: int | None = None, shuffle_pieces: bool = True
    ) -> None:
        if window < 1:
            raise ConfigError(f"a window holds at least one example, not {window}")
        if not len(pieces):
            raise ConfigError("there is nothing to read")
        self.pieces, self.window, self.examples = pieces, window, examples
        self._shuffle_pieces = shuffle_pieces

    def read(
        self,
        seed: int,
        start: Position | None = None,
        reader: int = 0,
        readers: int = 1,
        *,
        endless: bool = False,
    ) -> Iterator[tuple[Example, Position]]:
        """Examples with the position after each, from `start` to the end of its turn, or without end.

        Args:
            seed: other seed, other order.
            start: where to go on; None is the beginning.
            reader: which of several readers (processes times workers) this is.
            readers: how many there are. Together they read every example of a turn exactly once.
            endless: begin the next turn when one is over.
        """
        position = start or Position(0, 0, 0, 0, 0)
        while True:
            emitted = False
            for item in self._turn(seed, position, reader, readers):
                emitted = True
                yield item
            if not endless:
                return
            if not emitted and position == Position(position.turn, 0, 0, 0, 0):
                raise ConfigError("nothing could be read in a whole turn")
            position = Position(position.turn + 1, 0, 0, 0, 0)

    def _turn(
        self, seed: int, start: Position, reader: int, readers: int
    ) -> Iterator[tuple[Example, Position]]:
        count = len(self.pieces)
        order = list(range(count))
        if self._shuffle_pieces:
            order = permutation(count, _PIECES, seed, start.turn).tolist()
        by_record = count < readers
        mine = order if by_record else order[reader::readers]
        window: list[Example] = []
        number, first, skip = start.window, (start.piece, start.record), start.emitted
        after = first
        for place in range(start.piece, len(mine)):
            for record, example in self.pieces.read(mine[place], start.record if place == start.piece else 0):
                if by_record and record % readers != reader:
                    continue
                window.append(example)
                after = (place, record + 1)
                if len(window) == self.window:
                    yield from self._emit(window, seed, Position(start.turn, number, *first, skip), after)
                    number, first, skip, window = number + 1, after, 0, []
        if window:
            yield from self._emit(window, seed, Position(start.turn, number, *first, skip), after)

    def _emit(
        self, window: list[Example], seed: int, position: Position, after: tuple[int, int]
    ) -> Iterator[tuple[Example, Position]]:
        order = list(range(len(window)))
        if self.window > 1:
            order = permutation(len(window), _WINDOW, fold(seed, position.turn, position.window)).tolist()
        for emitted in range(position.emitted, len(window)):
            if emitted + 1 == len(window):
                position = Position(position.turn, position.window + 1, *after, 0)
            else:
                position = position._replace(emitted=emitted + 1)
            yield window[order[emitted]], position
