"""Captions that say the same, so that a batch does not hold them against each other.

A contrastive batch takes every other caption for wrong. Where two pictures have one caption, or captions that
differ in letter case, an article or a full stop, that is false. `caption_key` maps such captions to one
number; numbers are gathered with the rows, and equal ones are positives (`contrastive.Targets`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clipworks.core.tokenizer import Tokenizer, Tokens
from clipworks.data.batch import Batch
from clipworks.data.randomness import key_number

# Between two digits a sign is part of a number. A last article is none: "vitamin A".
_SIGNS = re.compile(r"""(?<![0-9])[.,;:!?"“”„«»…]|[.,;:!?"“”„«»…](?![0-9])""")
_ARTICLES = re.compile(r"\b(?:a|an|the)\s+(?=\w)")


def plain(text: str) -> str:
    """A caption without what does not change its meaning.

    Letter case, forms of one character (NFKC), punctuation, blanks and English articles go.

    >>> plain("A  dog, on the beach."), plain("lens of 1.5 mm"), plain("Vitamin A")
    ('dog on beach', 'lens of 1.5 mm', 'vitamin a')
    """
    text = " ".join(_SIGNS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())
    return _ARTICLES.sub("", text)


def caption_key(text: str) -> int:
    """The signed 64-bit number that all captions with the same meaning, as `plain` has it, share."""
    return key_number(plain(text)) - (1 << 63)


def token_keys(tokens: Tokens) -> Tensor:
    """A number a text, (n,) int64, from its ids (n, L) up to its end: equal texts, equal numbers."""
    ids, ends = tokens.ids, tokens.ends
    places = torch.arange(ids.shape[1], device=ids.device)
    # Products of int64 wrap around, as meant; odd factors keep all 64 bits.
    mixed = (ids + 1) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * ((2 * places + 1) * 0x9E3779B97F4A7C1 + 2)
    return mixed.masked_fill(places > ends[:, None], 0).sum(dim=1)


class CaptionKeys:
    """The keys of captions once they are tokens.

    Args:
        captions: all that can be met.
        tokenizer: the one they go through. Captions that are cut to the same tokens are the same.
    """

    def __init__(self, captions: Iterable[str], tokenizer: Tokenizer) -> None:
        self._keys: dict[int, int] = {}
        listed = list(dict.fromkeys(captions))
        for start in range(0, len(listed), 4096):
            part = listed[start : start + 4096]
            for token_key, text in zip(token_keys(tokenizer(part)).tolist(), part, strict=True):
                self._keys.setdefault(token_key, caption_key(text))

    def __call__(self, tokens: Tokens) -> Tensor:
        """Keys (n,) int64 of the n texts; one that was not announced has a key of its own."""
        found = [self._keys.get(key, key) for key in token_keys(tokens).tolist()]
        return torch.from_numpy(np.array(found, dtype=np.int64))

    def of(self, batch: Batch, source: str = "alt") -> Batch:
        """The batch with the keys of its texts of a source, one a row, as its feature `caption` (B,)."""
        return replace(batch, features={**batch.features, "caption": self(batch.texts[source])})
