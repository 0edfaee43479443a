"""Classes come from labels or names, sorted, and what cannot be a class is said in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clipworks.data.captions import ClassTexts
from clipworks.errors import ConfigError, EstimatorInputError
from clipworks.parts.classes import places_of, settle_classes


def settle(given: Any, targets: Any, **options: Any) -> Any:
    y = None if targets is None else np.array(targets)
    return settle_classes(given, ("a {}",), y, who="It", **options)


def test_labels_name_their_classes() -> None:
    classes, texts = settle(None, ["red_fox", "ant", "ant"])
    assert classes.tolist() == ["ant", "red_fox"]
    assert texts.texts(1) == ["a red fox"]
    assert places_of(classes, np.array(["red_fox", "ant"]), 2).tolist() == [1, 0]
    assert settle(None, [7, 3])[1].names == ("3", "7")


def test_names_are_sorted_where_they_are_labels_and_counted_where_integers_are() -> None:
    texts = ClassTexts(["fox", "ant"], synonyms=[["reynard"], []], templates=("one {}",))
    classes, sorted_texts = settle(texts, ["ant", "fox"])
    assert classes.tolist() == ["ant", "fox"]
    assert sorted_texts.texts(1) == ["one fox", "one reynard"]
    for counted in (settle(texts, [0, 1]), settle(texts, None, numbers=True)):
        assert counted[0].tolist() == [0, 1]
        assert counted[1].names == ("fox", "ant")
    assert settle(["fox", "ant"], None)[0].tolist() == ["ant", "fox"]


@pytest.mark.parametrize(
    ("given", "targets", "options", "said"),
    [
        (None, ["ant", "ant"], {}, "one class: 'ant'"),
        (["ant"], None, {}, "one class: 'ant'"),
        (["ant", "fox"], ["ant", "ant"], {}, "one class: 'ant'"),
        (["ant", "fox", "cow"], ["ant", "fox"], {}, "'cow' has no picture"),
        (["ant", "fox"], ["ant", "focs"], {}, "'focs' is unknown.*did you mean fox"),
        (["ant", "fox"], [0, 2], {}, "2 is unknown"),
        (None, [0.5, 1.5], {}, "(?i)unknown label type"),
    ],
)
def test_what_cannot_be_is_said(given: Any, targets: Any, options: Any, said: str) -> None:
    with pytest.raises(EstimatorInputError, match=said) as caught:
        settle(given, targets, **options)
    assert "\n" not in str(caught.value)


def test_a_class_may_lack_examples_where_names_are_enough() -> None:
    assert settle(["ant", "fox", "cow"], ["ant", "ant"], every_class=False)[0].tolist() == [
        "ant",
        "cow",
        "fox",
    ]
    with pytest.raises(ConfigError, match="'ant' is given more than once"):
        settle(["ant", "fox", "ant"], None)
    with pytest.raises(ConfigError, match="neither"):
        settle(None, None)
