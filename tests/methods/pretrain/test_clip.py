"""CLIP's objective: its equation, its initial numbers, and that it learns to pair."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine import Recipe, fit
from clipworks.errors import DataError
from clipworks.methods.pretrain.clip import RECIPE, SMALL_RECIPE, ClipObjective


@pytest.fixture
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 8})


def batch_of(n: int, seed: int = 0) -> Batch:
    """Pictures of one color each, and texts that name the color's number."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.rand(n, 3, 1, 1, generator=generator)
    ids = torch.stack([torch.full((n,), 62), torch.arange(1, n + 1), torch.full((n,), 63)], dim=1)
    return Batch(
        images=colors.expand(n, 3, 16, 16).contiguous(),
        texts={"alt": Tokens(ids, torch.full((n,), 2), None)},
        keys=[str(i) for i in range(n)],
    )


def loss(objective: ClipObjective, clip: Any, batch: Batch) -> torch.Tensor:
    return objective.loss(objective.features(clip, batch))["contrastive"]


def test_softmax_form_is_the_papers_pseudocode(clip: Any) -> None:
    batch = batch_of(6)
    images, texts = clip.image(batch.images), clip.text(batch.texts["alt"])
    images, texts = images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)
    logits = (images @ texts.T * math.exp(clip.scale.item())).detach()
    expected = 0.0
    for scores in (logits, logits.T):
        for i in range(6):
            expected -= float(torch.log(scores[i, i].exp() / scores[i].exp().sum())) / 12
    assert loss(ClipObjective(), clip, batch).item() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_form_is_the_double_loop_of_its_equation(clip: Any) -> None:
    objective = ClipObjective("sigmoid", fresh=True)
    clip, batch = objective.prepare(clip), batch_of(5)
    with torch.no_grad():
        clip.bias.fill_(-3.0)
    images, texts = clip(batch.images, batch.texts["alt"])
    expected = torch.zeros(())
    for i in range(5):
        for j in range(5):
            z = 1 if i == j else -1
            logit = clip.scale.exp() * (images[i] * texts[j]).sum() + clip.bias
            expected = expected - torch.log(1 / (1 + torch.exp(-z * logit))) / 5
    ours = loss(objective, clip, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    parameters = list(clip.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_equal_pairs_cost_the_logarithm_of_their_number(clip: Any) -> None:
    batch = batch_of(7)
    assert batch.images is not None
    tokens = Tokens(batch.texts["alt"].ids[:1].repeat(7, 1), batch.texts["alt"].ends, None)
    same = dataclasses.replace(batch, images=batch.images[:1].repeat(7, 1, 1, 1), texts={"alt": tokens})
    assert loss(ClipObjective(), clip, same).item() == pytest.approx(math.log(7), abs=1e-5)


def test_only_fresh_models_get_the_initial_scale_and_bias(clip: Any) -> None:
    with torch.no_grad():
        clip.scale.fill_(1.0)
    assert ClipObjective().prepare(clip).scale.item() == 1.0 and clip.bias is None
    assert ClipObjective(fresh=True).prepare(clip).scale.item() == pytest.approx(math.log(1 / 0.07))
    sigmoid = ClipObjective("sigmoid", fresh=True).prepare(clip)
    assert sigmoid.scale.item() == pytest.approx(math.log(10)) and sigmoid.bias.item() == -10
    assert sigmoid.config.sigmoid


def test_recipes_are_those_of_the_paper() -> None:
    assert (RECIPE.lr, RECIPE.warmup, RECIPE.weight_decay, RECIPE.epochs) == (5e-4, 2000, 0.2, 32)
    assert (RECIPE.betas, RECIPE.eps, RECIPE.schedule) == ((0.9, 0.98), 1e-6, "cosine")
    assert RECIPE.scale_limit == pytest.approx(math.log(100)) and SMALL_RECIPE.betas == RECIPE.betas


def test_a_batch_without_the_texts_it_needs_is_named(clip: Any) -> None:
    batch = batch_of(3)
    with pytest.raises(DataError, match="'short', only alt"):
        ClipObjective(source="short").features(clip, batch)
    with pytest.raises(DataError, match="no pictures"):
        ClipObjective().features(clip, dataclasses.replace(batch, images=None))
    owned = Tokens(batch.texts["alt"].ids, batch.texts["alt"].ends, torch.tensor([0, 0, 2]))
    with pytest.raises(DataError, match="several texts"):
        ClipObjective().features(clip, dataclasses.replace(batch, texts={"alt": owned}))


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_a_short_training_pairs_every_picture_with_its_text(clip: Any, tmp_path: Path, form: Any) -> None:
    batch = batch_of(12)
    recipe = Recipe(steps=100, warmup=5, lr=5e-3, precision="fp32")
    result = fit(clip, ClipObjective(form, fresh=True), [batch], recipe, folder=tmp_path, show="nothing")
    with torch.no_grad():
        images, texts = result.clip(batch.images, batch.texts["alt"])
    assert ((images @ texts.T).argmax(1) == torch.arange(12)).float().mean() > 0.9
