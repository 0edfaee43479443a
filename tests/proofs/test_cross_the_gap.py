"""The proof of Cross the Gap: its controls are what they claim to be, and its experiment repeats itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipworks.core.clip import unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import DataError
from clipworks.proofs import cross_the_gap as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

TINY = proof.Size(classes=6, queries=2, gallery=8, both=3)
SEED = 0
assert SEED < FIRST_EVALUATION_SEED


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


def test_the_noise_is_as_far_as_it_says_in_a_direction_of_its_own() -> None:
    features = unit(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)))
    c = torch.linspace(-1, 1, 50)
    found = proof._as_far(features, c, 3)
    assert torch.allclose(found.norm(dim=1), torch.ones(50), atol=1e-5)
    assert torch.allclose((found * features).sum(dim=1), c, atol=1e-5)
    assert torch.equal(found, proof._as_far(features, c, 3))
    assert not torch.allclose(found[10:40], proof._as_far(features, c, 4)[10:40], atol=0.1)


def test_queries_and_gallery_are_different_scenes_and_words_name_no_class(clip: Any) -> None:
    asked = proof.scenes(clip, SEED, TINY)
    assert len(asked.queries) == 6
    assert len(asked.gallery) == 24
    assert (asked.queries @ asked.gallery.T).max() < 1 - 1e-6
    assert len(asked.names) == 9
    assert not any(name in word.split() for name in asked.names for word in asked.words)
    assert asked.styles is not None
    assert [len(part) for part in asked.styles] == [6, 24]


def test_the_subspace_is_the_one_that_other_classes_choose(clip: Any) -> None:
    asked = proof.scenes(clip, SEED, TINY)
    texts = unit(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)))
    leading = proof._leading(texts, asked)
    assert leading.shape[1] in proof.WIDTHS
    assert torch.allclose(leading.T @ leading, torch.eye(leading.shape[1]), atol=1e-5)


def test_the_experiment_measures_every_arm_and_repeats_itself(
    clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof.ModalityInversion, "_steps", 3)
    size = replace(TINY, curves=((2, 1), (2, 3)), captions=4, training=2, pairs=9)
    outcome = proof.experiment(clip, SEED, size)
    arms = {"image", "oti", "noise", "centered", "text_pca", "soft_words", "style_image", "style_oti"}
    few = {"few_image", "few_oti", "few_image_to_oti", "few_oti_to_oti"}
    flips = {"zero_shot_image", "zero_shot_oti", "zero_shot_noise"}
    others = {"oti_steps_2_tokens_3", "captions_text", "captions_ovi", "captions_centered"}
    remedies = {
        f"{name}_{found}"
        for name in ("start", "apart", "together", "intra")
        for found in ("gap", "image", "oti")
    }
    assert arms | few | flips | others | remedies <= outcome.details.keys()
    assert outcome.details["start_image"] == outcome.baseline
    assert all(0 <= value <= 2 for name, value in outcome.details.items() if name.endswith("_gap"))
    assert outcome.baseline == outcome.details["image"]
    assert outcome.method == outcome.details["oti"]
    assert all(
        0 <= value <= 1
        for name, value in outcome.details.items()
        if "width" not in name and "_gap" not in name
    )
    assert proof.experiment(clip, SEED, size) == outcome


def test_without_photographs_it_says_so(clip: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder of Tiny-ImageNet"):
        proof.experiment(clip, SEED, TINY, tmp_path)


def test_photographs_are_of_the_classes_drawn_and_words_of_the_others(clip: Any, shelf: Path) -> None:
    pytest.importorskip("pyarrow")
    asked = proof.photographs(clip, SEED, TINY, shelf)
    assert len(asked.names) == 6
    assert len(asked.words) == 194
    assert set(asked.names).isdisjoint(asked.words)
    assert torch.bincount(asked.query_labels).tolist() == [2] * 6
    assert torch.bincount(asked.gallery_labels).tolist() == [8] * 6
    assert (asked.queries @ asked.gallery.T).max() < 1 - 1e-6
