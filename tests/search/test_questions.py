"""Questions in words: what is wanted, what is not, how much; and what cannot be read says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipworks.core.clip import unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import ConfigError
from clipworks.search import questions
from clipworks.search.questions import Term, parse, vector


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


@pytest.mark.parametrize(
    ("question", "terms"),
    [
        ("a beach", [("a beach", 1)]),
        ('the "sea"', [('the "sea"', 1)]),
        ("it's 3 * 4 - 2", [("it's 3 * 4 - 2", 1)]),
        ('"a beach"', [("a beach", 1)]),
        ('"a beach" - "people"', [("a beach", 1), ("people", -0.5)]),
        ('"a" + 0.5*"b"-2 * "c"', [("a", 1), ("b", 0.5), ("c", -2)]),
        ('-"people" + "a beach"', [("people", -0.5), ("a beach", 1)]),
        ('.25*"a" − "b"', [("a", 0.25), ("b", -0.5)]),
    ],
)
def test_a_question_is_read_as_it_is_meant(question: str, terms: list[tuple[str, float]]) -> None:
    assert [(term.content, term.weight) for term in parse(question)] == terms


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), min_size=1).filter(
                str.strip
            ),
            st.integers(1, 999),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_is_written_is_read_again(terms: list[tuple[str, int, bool]]) -> None:
    written = " ".join(f'{"-" if minus else "+"} {weight / 100}*"{text}"' for text, weight, minus in terms)
    expected = [(text, -weight / 100 if minus else weight / 100) for text, weight, minus in terms]
    assert [(term.content, term.weight) for term in parse(written)] == expected


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("", "the query is empty"),
        ("  ", "the query is empty"),
        ('"a" "b"', "cannot be read from '\"b\"' on"),
        ('"a" - b', "cannot be read from '- b' on"),
        ('"a" - "b', "cannot be read from '- \"b' on"),
        ('"a" - " "', "has an empty text in it"),
    ],
)
def test_what_cannot_be_read_says_where(question: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(question)
    assert said in str(refused.value)


def test_the_vector_is_the_weighted_sum_at_unit_length(clip: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    noise = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((32, 32)).save(path)
    found = vector(clip, [Term("a beach"), Term("people", -0.3), Term(path, 0.7, is_picture=True)])
    beach, people = clip.embed_texts(["a beach", "people"])
    expected = unit(beach - 0.3 * people + 0.7 * clip.embed_images([path])[0])
    assert torch.allclose(found, expected, atol=1e-6)


def test_what_cancels_or_is_nothing_is_refused(clip: Any) -> None:
    with pytest.raises(ConfigError, match="cancel"):
        vector(clip, parse('"a beach" - 1*"a beach"'))
    with pytest.raises(ConfigError, match="give one of them"):
        vector(clip, [])


def test_inversion_is_for_questions_of_one_kind(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import clipworks.methods.retrieve.cross_the_gap as method

    monkeypatch.setitem(method.STEPS, "image_to_text", 3)
    monkeypatch.setitem(method.STEPS, "text_to_image", 3)
    picture, text = [Term("p.png", is_picture=True)], [Term("a cat")]
    question = unit(torch.arange(16.0))
    for terms, kind, direction in ((picture, "image", "image_to_text"), (text, "text", "text_to_image")):
        expected = method.ModalityInversion(clip, direction=direction).transform(question[None])[0]
        assert torch.allclose(questions.invert(clip, terms, question, kind), expected)
    for terms, kind in ((text, "image"), (picture, "text"), (picture + text, "image"), (text, None)):
        with pytest.raises(ConfigError, match="inversion is for pictures that look for pictures"):
            questions.invert(clip, terms, question, kind)
