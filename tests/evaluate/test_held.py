"""Held-out pairs and probes: their numbers are those of a count by hand, and their pictures are read once."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Example, Examples
from clipworks.errors import DataError
from clipworks.evaluate.held import (
    EVERYDAY,
    Gauges,
    HeldPairs,
    Probe,
    agreement_probe,
    labeled_probe,
    pixels_of,
)

CAPTIONS = [["a red thing", "red"], ["Blue."], ["the green one", "a BLUE"], ["red", "yellow"]]


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


def picture(seed: int) -> bytes:
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(patches).resize((40, 40)).save(buffer, format="PNG")
    return buffer.getvalue()


def source(broken: bool = False) -> Examples:
    examples = [
        Example(str(n), picture(n), {"alt": texts if len(texts) > 1 else texts[0]}, n % 3)
        for n, texts in enumerate(CAPTIONS)
    ]
    if broken:
        examples[1] = replace(examples[1], image=b"no picture")
    return Examples(examples)


def test_captions_that_say_the_same_match_all_their_pictures(clip: Any) -> None:
    held = HeldPairs.of(clip, source(), workers=0)
    assert held.texts == ("a red thing", "red", "Blue.", "the green one", "a BLUE", "yellow")
    assert held.matches.int().tolist() == [
        [1, 0, 0, 0],
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 0, 1, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 1],
    ]


def test_recall_is_a_count_over_sorted_lists(clip: Any) -> None:
    held = HeldPairs.of(clip, source(), workers=0)
    cosines = held.similarity(clip)
    images = clip.embed_images([picture(n) for n in range(4)])
    torch.testing.assert_close(cosines, clip.embed_texts(list(held.texts)) @ images.T, rtol=1e-5, atol=1e-6)
    found = held.measure(clip)
    for name, scores, matches in (
        ("text_to_image", cosines, held.matches),
        ("image_to_text", cosines.T, held.matches.T),
    ):
        for k in (1, 5, 10):
            hits = [
                bool(matches[row][scores[row].argsort(descending=True)[:k]].any())
                for row in range(len(scores))
            ]
            assert found[f"{name}@{k}"] == pytest.approx(sum(hits) / len(hits))
    assert found["recall"] == pytest.approx(sum(value for name, value in found.items() if "@" in name) / 6)


def test_pictures_that_cannot_be_read_are_left_out_with_their_captions(clip: Any) -> None:
    held = HeldPairs.of(clip, source(broken=True), workers=0)
    assert len(held.pixels) == 3 and "Blue." not in held.texts and held.matches.shape == (5, 3)
    with pytest.raises(DataError, match="no picture can be read: skipped 1"):
        pixels_of(clip, Examples([Example("x", b"none", {"alt": "x"})]), workers=0)


def test_a_labeled_probe_is_zero_shot_accuracy_on_a_seeded_part(clip: Any) -> None:
    classes = ClassTexts(["red", "green", "blue"])
    whole = labeled_probe(clip, source(), classes, workers=0)
    images = clip.embed_images([picture(n) for n in range(4)])
    texts = clip.class_features(["red", "green", "blue"])
    right = ((images @ texts.T).argmax(1) == torch.tensor([0, 1, 2, 0])).float().mean()
    assert whole.measure(clip) == pytest.approx(float(right))
    parts = [labeled_probe(clip, source(), classes, most=2, seed=seed, workers=0) for seed in (0, 0, 1, 2, 3)]
    assert all(len(part.pixels) == 2 for part in parts) and torch.equal(parts[0].pixels, parts[1].pixels)
    assert any(not torch.equal(parts[0].pixels, part.pixels) for part in parts)
    with pytest.raises(DataError, match="pictures with labels"):
        labeled_probe(clip, Examples([Example("x", picture(0))]), classes)


def test_the_start_agrees_with_itself_and_another_model_less(
    clip: Any, tiny_clip: Callable[..., Any]
) -> None:
    pixels, _, _ = pixels_of(clip, source(), workers=0)
    probe = agreement_probe(clip, pixels, EVERYDAY[:20], views=3)
    assert probe.kind == "agreement" and len(probe.pixels) == 8 and probe.pixels.dtype == torch.uint8
    assert probe.measure(clip) == 1.0
    other = tiny_clip(5, tokenizer=clip.tokenizer)
    assert probe.measure(other) < 1.0
    assert len(agreement_probe(clip, pixels, EVERYDAY[:20], most=3).pixels) == 3
    with pytest.raises(DataError, match="at least one picture"):
        agreement_probe(clip, pixels[:0])


def test_agreement_is_asked_where_the_model_is_surest(clip: Any) -> None:
    pixels, _, _ = pixels_of(clip, source(), workers=0)
    probe = agreement_probe(clip, pixels, EVERYDAY[:20], views=0)
    texts = clip.class_features(list(EVERYDAY[:20]))
    first, second = (clip.embed_images(pixels) @ texts.T).topk(2, dim=1).values.unbind(dim=1)
    surest = (first - second).topk(2).indices.sort().values
    assert torch.equal(probe.pixels, pixels[surest])


def test_gauges_name_what_they_measure(clip: Any) -> None:
    held = HeldPairs.of(clip, source(), workers=0)
    probe = Probe(held.pixels, torch.tensor([0, 1, 2, 0]), ClassTexts(["red", "green", "blue"]))
    gauges = Gauges(held, probe, held, (lambda _: {"mine": 0.25},))
    row = gauges.everything(clip)
    assert row["mine"] == 0.25 and row["validation recall"] == row["test recall"]
    assert row["probe accuracy"] == gauges.every_epoch(clip)["accuracy"] == probe.measure(clip)
    assert Gauges(held, probe).shown is held


def test_everyday_names_are_many_and_none_is_twice() -> None:
    assert len(set(EVERYDAY)) == len(EVERYDAY) > 150
