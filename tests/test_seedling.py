"""The model that ships with the package: complete, small, offline, and as good as its card says."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch

import clipworks

FOLDER = Path(str(resources.files("clipworks.checkpoints") / "seedling"))


@pytest.fixture(scope="module")
def seedling() -> clipworks.Clip:
    return clipworks.load("seedling")


def test_shipped_files_are_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "README.md"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 25_000_000


def test_patch_grid_is_fine_enough_for_dense_methods(seedling: clipworks.Clip) -> None:
    assert seedling.config.image.image_size == 64
    assert seedling.config.image.grid >= 8


def test_nothing_is_fetched(seedling: clipworks.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    again = clipworks.load("seedling")
    assert torch.equal(again.embed_texts("a dog"), seedling.embed_texts("a dog"))


def test_weights_are_those_the_tokenizer_was_trained_with(seedling: clipworks.Clip) -> None:
    stated = json.loads((FOLDER / "config.json").read_text())["tokenizer"]["fingerprint"]
    assert seedling.tokenizer is not None
    assert seedling.tokenizer.fingerprint() == stated


def test_synonyms_are_nearer_than_strangers(seedling: clipworks.Clip) -> None:
    features = seedling.embed_texts(
        ["a photo of a goldfish", "a photo of a Carassius auratus", "a photo of a school bus"]
    )
    similarity = features @ features.T
    assert similarity[0, 1] > similarity[0, 2]


def test_accuracy_on_real_photographs_is_far_above_chance(seedling: clipworks.Clip, shelf: Path) -> None:
    from clipworks.data.source import Selected
    from clipworks.evaluate.sets import labeled_set
    from clipworks.evaluate.zeroshot import labeled_batches, zero_shot

    folder = shelf / "tiny-imagenet"
    source, texts = labeled_set(str(folder / "val-000.parquet"), folder / "classes.json")
    batches, _ = labeled_batches(seedling, Selected(source, range(0, len(source), 10)))
    found = zero_shot(seedling, batches, texts)
    # The card's figures are of all pictures; these are a tenth of them. Chance is 0.5 % and 2.5 %.
    assert found.top1 > 0.27
    assert found.top5 > 0.5


def test_emoji_never_seen_are_found_by_name(seedling: clipworks.Clip, shelf: Path) -> None:
    from clipworks.evaluate.sets import emoji_retrieval

    (row,) = emoji_retrieval(seedling, shelf / "noto-emoji", ["en"])
    # Chance is 7.1 %; the card has the figure.
    assert row["recall@10"] > 0.3
