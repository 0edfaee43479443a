"""LaCLIP's experiment: rewriters see the caption alone, edits are cheap, wordings are what they say."""

from __future__ import annotations

import pytest

from clipworks.data.randomness import Draws
from clipworks.errors import DataError
from clipworks.proofs.laclip import (
    CAPTION,
    COLORS,
    MANNERS,
    REWORDED,
    SHAPES,
    UNSEEN,
    Redescriber,
    edits_of,
    rewrites_of,
)

CAPTIONS = {f"k{i}": CAPTION.format(color=c, shape=s, ground="on grass") for i, (c, s) in enumerate(
    [("red", "circle"), ("blue", "star"), ("white", "fish")])}  # fmt: skip


def test_a_caption_gives_one_rewrite_in_each_manner() -> None:
    rewrites = rewrites_of(CAPTIONS, seed=0)
    assert rewrites.keys() == CAPTIONS.keys()
    for key, texts in rewrites.items():
        color, shape = CAPTIONS[key].split()[4:6]
        assert len(texts) == len(MANNERS) == 4
        for text in texts:
            assert "on grass" in text and "a photo of" not in text
            assert any(name in text for name in (color, *COLORS[color]))
            assert any(name in text for name in (shape, *SHAPES[shape]))
    assert rewrites == rewrites_of(CAPTIONS, seed=0) != rewrites_of(CAPTIONS, seed=1)


def test_a_text_that_is_no_caption_is_refused() -> None:
    with pytest.raises(DataError, match="no caption"):
        Redescriber("list").say("something else", Draws(0))


def test_edits_change_one_word_each() -> None:
    for key, texts in edits_of(CAPTIONS, seed=1).items():
        words = CAPTIONS[key].split()
        replaced, exchanged, dropped, inserted = (text.split() for text in texts)
        assert sum(a != b for a, b in zip(words, replaced, strict=True)) <= 1
        assert sorted(exchanged) == sorted(words)
        assert len(dropped) == len(words) - 1 and len(inserted) == len(words) + 1


def test_asked_wordings_are_those_of_rewrites_or_of_none() -> None:
    wordings = [wording for own in MANNERS.values() for wording in own]
    plain = [wording.replace(", {ground}", "").replace(" {ground}", "") for wording in wordings]
    assert not set(UNSEEN) & {*plain, *wordings, CAPTION}
    assert sum(any(asked in wording or asked in bare for wording, bare in zip(wordings, plain, strict=True))
               for asked in REWORDED) >= 3  # fmt: skip
    names = [name for words in (COLORS, SHAPES) for key, others in words.items() for name in (key, *others)]
    assert len(set(names)) == len(names)
