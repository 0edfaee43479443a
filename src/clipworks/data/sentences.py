"""Which sentences of the examples go into a batch, drawn and tokenized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from clipworks.core.tokenizer import Tokens
from clipworks.data.captions import draw_text
from clipworks.data.randomness import Draws, key_number
from clipworks.data.source import Example, TextChoices
from clipworks.errors import ConfigError, DataError, nearest

Tokenizer = Callable[[list[str]], Tokens]

_TEXT = 0x7E87
_REDRAWS = 8  # how often an equal sentence is drawn again before it is accepted


@dataclass(frozen=True)
class TextChoice:
    """Which sentences of an example go into the batch.

    Attributes:
        counts: for each source of texts how many sentences of an example are drawn, without repetition
            as far as there are enough; None takes all.
        unique: draw again, a few times, when a sentence is in this process's batch already. A second
            picture with the same caption would be a negative that is none.

    Raises:
        ConfigError: if a count is not positive.
    """

    counts: Mapping[str, int | None]
    unique: bool = False

    def __post_init__(self) -> None:
        for name, count in self.counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"{count} sentences of {name!r}: give a positive number, or None for all")

    def sentences(
        self, examples: Sequence[Example], views: Sequence[int], seed: int
    ) -> dict[str, tuple[list[str], list[int]]]:
        """The sentences of a batch and the rows they belong to, by source; pure in (seed, key, view).

        Raises:
            DataError: if a source is in none of the examples.
        """
        numbers = [key_number(example.key) for example in examples]
        found: dict[str, tuple[list[str], list[int]]] = {}
        for name, count in self.counts.items():
            salt = key_number(name)
            sentences: list[str] = []
            owners: list[int] = []
            seen: set[str] = set()
            for row, example in enumerate(examples):
                choices = example.texts.get(name)
                if not choices:
                    continue
                draws = Draws(numbers[row], _TEXT, salt, seed, views[row])
                chosen = _choose(choices, count, draws, seen if self.unique else None)
                sentences += chosen
                owners += [row] * len(chosen)
            if examples and not sentences:
                known = sorted({source for example in examples for source in example.texts})
                raise DataError(
                    f"no example of the batch has a text {name!r}; there are {known}{nearest(name, known)}"
                )
            found[name] = sentences, owners
        return found

    def tokens(
        self, examples: Sequence[Example], views: Sequence[int], seed: int, tokenizer: Tokenizer
    ) -> dict[str, Tokens]:
        """`sentences`, tokenized, ids (n, L); `owner` is None where there is exactly one a row."""
        texts: dict[str, Tokens] = {}
        for name, (sentences, owners) in self.sentences(examples, views, seed).items():
            tokens = tokenizer(sentences)
            if owners == list(range(len(examples))):
                texts[name] = tokens
            else:
                texts[name] = Tokens(tokens.ids, tokens.ends, torch.tensor(owners, dtype=torch.int64))
        return texts


def _choose(choices: TextChoices, count: int | None, draws: Draws, seen: set[str] | None) -> list[str]:
    if count is None:
        return [choices] if isinstance(choices, str) else list(choices)
    if count > 1 and not isinstance(choices, str):
        order = list(range(len(choices)))
        for place in range(min(count, len(order))):  # the beginning of a Fisher-Yates shuffle
            other = place + draws.integers(len(order) - place)
            order[place], order[other] = order[other], order[place]
        return [choices[index] for index in order[:count]]
    text = draw_text(choices, draws)
    if seen is not None:
        for _ in range(_REDRAWS):
            if text not in seen:
                break
            text = draw_text(choices, draws)
        seen.add(text)
    return [text]
