"""Zero-shot accuracy: against counting by hand, with ties, and class vectors against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.captions import ClassTexts
from clipworks.errors import DataError
from clipworks.evaluate.zeroshot import accuracy, class_features, zero_shot, zero_shot_features


@given(st.integers(1, 8), st.integers(2, 9), st.integers(0, 1000))
def test_accuracy_equals_counting_by_hand(count: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (count, classes), generator=generator).float()
    labels = torch.randint(0, classes, (count,), generator=generator)
    first, five = accuracy(logits, labels)
    for row in range(count):
        others = [logits[row, c] for c in range(classes) if c != labels[row]]
        not_below = sum(bool(other >= logits[row, labels[row]]) for other in others)
        assert bool(first[row]) == (not_below == 0)
        assert bool(five[row]) == (not_below < 5)


def test_equal_scores_do_not_count_as_found() -> None:
    first, five = accuracy(torch.zeros(1, 10), torch.tensor([3]))
    assert not first.any() and not five.any()


def test_accuracy_of_each_class_and_of_an_absent_one() -> None:
    eye = torch.eye(3)
    top1, _, per_class = zero_shot_features(eye[[0, 0, 1]], torch.tensor([0, 1, 1]), eye)
    assert top1 == pytest.approx(2 / 3)
    assert per_class[:2].tolist() == [1.0, 0.5] and math.isnan(per_class[2])


def test_label_without_class_is_refused() -> None:
    with pytest.raises(DataError, match="there are 2 classes"):
        zero_shot_features(torch.eye(3), torch.tensor([0, 1, 2]), torch.eye(3)[:2])


def test_class_vectors_are_means_over_all_sentences(tiny_clip) -> None:  # type: ignore[no-untyped-def]
    clip = tiny_clip(tokenizer=ClipTokenizer())
    texts = ClassTexts(["dog", "ox"], [["hound"], []], templates=("a {}.", "the {}."))
    head = class_features(clip, texts)
    for index in range(2):
        vectors = torch.cat([clip.embed_texts(text) for text in texts.texts(index)])
        mean = vectors.sum(0) / len(vectors)
        assert torch.allclose(head[index], mean / mean.norm(), atol=1e-6)


def test_zero_shot_of_pictures_equals_the_single_steps(tiny_clip) -> None:  # type: ignore[no-untyped-def]
    clip = tiny_clip(tokenizer=ClipTokenizer())
    texts = ClassTexts(["dog", "cat", "ox"])
    pixels = torch.randint(
        0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = zero_shot(clip, [(pixels[:4], labels[:4]), (pixels[4:], labels[4:])], texts)
    with torch.no_grad():
        images = torch.nn.functional.normalize(clip.image(pixels), dim=-1)
    best = (images @ class_features(clip, texts).T).argmax(1)
    assert found.samples == 7
    assert found.top1 == pytest.approx(float((best == labels).float().mean()))
    with pytest.raises(DataError, match="no pictures"):
        zero_shot(clip, [], texts)
