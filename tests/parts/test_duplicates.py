"""Captions that say the same share a key, others do not, and keys survive the tokenizer."""

from __future__ import annotations

import itertools

import pytest
import torch

from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.data.batch import Batch
from clipworks.parts.duplicates import CaptionKeys, caption_key, token_keys

SAME = [
    ["A dog on the beach.", "a dog on a beach", "dog on beach", "  The DOG, on  the beach!"],
    ["ﬁsh", "fish", "Fish."],
    ["lens of 1.5 mm", "a lens of 1.5 mm."],
    ["Vitamin A"],
    ["vitamin"],
    ["lens of 15 mm"],
    ["C++ book"],
    ["C book"],
    ["a dog on a couch"],
]


def test_captions_share_a_key_exactly_where_they_say_the_same() -> None:
    keyed = [(group, caption_key(text)) for group, texts in enumerate(SAME) for text in texts]
    for (one, a), (other, b) in itertools.combinations(keyed, 2):
        assert (a == b) == (one == other)
    assert all(-(2**63) <= key < 2**63 for _, key in keyed)


def test_token_keys_are_equal_for_equal_texts_only_whatever_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (3000, 6), generator=generator)
    ends = torch.randint(0, 6, (3000,), generator=generator)
    keys = token_keys(Tokens(ids, ends)).tolist()
    texts = [tuple(row[: end + 1]) for row, end in zip(ids.tolist(), ends.tolist())]
    assert len(set(keys)) == len(set(texts)) == len(set(zip(keys, texts)))
    longer = torch.cat([ids, torch.randint(0, 50, (3000, 4), generator=generator)], dim=1)
    assert token_keys(Tokens(longer, ends)).tolist() == keys


def test_token_keys_depend_on_the_order_of_the_words() -> None:
    rows = torch.tensor(list(itertools.permutations([3, 5, 7, 11, 13])))
    keys = token_keys(Tokens(rows, torch.full((len(rows),), 4)))
    assert len(keys.unique()) == len(rows)


def test_a_batch_gets_the_keys_of_its_captions() -> None:
    tokenizer = ClipTokenizer(context_length=16)
    captions = [text for texts in SAME for text in texts]
    keys = CaptionKeys(captions, tokenizer)
    batch = keys.of(Batch(texts={"alt": tokenizer(captions)}, keys=[str(n) for n in range(len(captions))]))
    assert batch.features["caption"].tolist() == [caption_key(text) for text in captions]
    unknown = tokenizer(["never announced", "nor this", "never announced"])
    first, second, third = keys(unknown).tolist()
    assert first == third != second


@pytest.mark.parametrize("length", [6, 16])
def test_captions_cut_to_the_same_tokens_are_the_same(length: int) -> None:
    tokenizer = ClipTokenizer(context_length=length)
    texts = ["one two three four five six seven", "one two three four five six eight"]
    first, second = CaptionKeys(texts, tokenizer)(tokenizer(texts)).tolist()
    assert (first == second) == (length == 6)
