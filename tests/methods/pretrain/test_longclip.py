"""Long-CLIP: its stretched table, its principal components and their gradient, its loss, its files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clipworks.checkpoints import layouts, rules
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine import Recipe, fit
from clipworks.errors import CheckpointError, ConfigError, DataError, ShapeError
from clipworks.methods.pretrain.longclip import (
    RECIPE,
    LongClip,
    from_checkpoint,
    primary_components,
    short_caption,
    stretch_positions,
    stretched,
)


def table_of(rows: int = 77, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def texts(n: int, length: int, seed: int = 0) -> Tokens:
    """Texts of exactly this many tokens, start and end included."""
    ids = torch.randint(1, 62, (n, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 62, 63
    return Tokens(ids, torch.full((n,), length - 1))


def batch_of(n: int, *, long: int = 20, short: int = 5, seed: int = 0) -> Batch:
    images = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    words = {"long": texts(n, long, seed), "short": texts(n, short, seed + 1)}
    return Batch(images=images, texts=words, keys=[f"{seed}-{i}" for i in range(n)])


def unit_rows(n: int, d: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows + 0.5, dim=1)


@pytest.fixture
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 12})


# --- stretching


def test_the_papers_table_keeps_twenty_rows_and_quarters_the_others() -> None:
    old = table_of()
    new = stretch_positions(old)
    assert new.shape == (248, 6)
    assert torch.equal(new[:20], old[:20])
    assert torch.equal(new[20::4], old[20:])
    torch.testing.assert_close(new[245], old[76] + (old[76] - old[75]) / 4)
    assert not torch.allclose(new[245], old[76])


@given(rows=st.integers(2, 30), keep=st.integers(0, 29), ratio=st.integers(1, 5))
def test_stretching_is_the_loop_over_its_equation(rows: int, keep: int, ratio: int) -> None:
    if keep >= rows:
        with pytest.raises(ConfigError, match=f"cannot keep {keep}"):
            stretch_positions(table_of(rows), keep, ratio)
        return
    old = table_of(rows).double()
    expected = []
    for t in range(keep + ratio * (rows - keep)):
        u = t if t < keep else keep + (t - keep) / ratio
        left = min(math.floor(u), rows - 2)
        expected.append((1 - (u - left)) * old[left] + (u - left) * old[left + 1])
    torch.testing.assert_close(stretch_positions(old, keep, ratio), torch.stack(expected))


def test_a_straight_line_becomes_two_without_a_break() -> None:
    line = torch.arange(77.0)[:, None].expand(77, 2)
    steps = stretch_positions(line)[:, 0].diff()
    torch.testing.assert_close(steps, torch.cat([torch.ones(20), torch.full((227,), 0.25)]))


def test_ratio_one_is_the_identity_and_half_precision_is_kept() -> None:
    assert torch.equal(stretch_positions(table_of(), 20, 1), table_of())
    half = table_of().bfloat16()
    assert stretch_positions(half).dtype == torch.bfloat16
    assert torch.equal(stretch_positions(half)[:20], half[:20])
    with pytest.raises(ShapeError, match=r"\(L, w\)"):
        stretch_positions(table_of()[0])


def test_short_texts_are_read_as_before_and_longer_ones_are_not(clip: Any) -> None:
    longer = stretched(clip, keep=4, ratio=4)
    assert longer.config.text.context_length == len(longer.text.positions) == 36
    with torch.no_grad():
        for length in (2, 4, 5):  # the row behind the kept ones is still an old row
            words = texts(3, length)
            torch.testing.assert_close(longer.text(words), clip.text(words), atol=1e-6, rtol=1e-6)
            padded = Tokens(torch.nn.functional.pad(words.ids, (0, 36 - length)), words.ends)
            torch.testing.assert_close(longer.text(padded), clip.text(words), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(longer.text(texts(3, 6)), clip.text(texts(3, 6)), atol=1e-4)
        assert longer.text(texts(2, 36)).isfinite().all()
    assert len(clip.text.positions) == 12 and clip.config.text.context_length == 12


def test_the_seedling_takes_longer_texts_after_it(tmp_path: Path) -> None:
    from clipworks.checkpoints.zoo import load

    clip = load("seedling")
    old = clip.tokenizer.context_length
    longer = LongClip().prepare(clip)
    story = ("a red circle on the left . " * 100).strip()
    assert longer.tokenizer([story]).ids.shape[1] == longer.tokenizer.context_length > 3 * old
    assert clip.tokenizer([story]).ids.shape[1] == old
    longer.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.embed_texts([story]), longer.embed_texts([story]))


# --- primary components


@pytest.mark.parametrize(("n", "d"), [(9, 20), (20, 9), (8, 8)])
def test_components_are_those_of_a_singular_value_decomposition(n: int, d: int) -> None:
    rows = unit_rows(n, d)
    mean = rows.mean(0)
    _, _, v = torch.linalg.svd(rows - mean, full_matrices=False)
    for k in (1, 4):
        expected = (rows - mean) @ v[:k].T @ v[:k] + mean
        torch.testing.assert_close(primary_components(rows, k), expected)


def test_all_components_are_the_vectors_themselves() -> None:
    rows = unit_rows(7, 12)
    for k in (6, 7, 30):
        torch.testing.assert_close(primary_components(rows, k), rows)
    flat = unit_rows(3, 12).repeat(4, 1)  # of rank two about its mean
    torch.testing.assert_close(primary_components(flat, 2), flat)


def test_components_turn_and_change_places_with_the_vectors() -> None:
    rows = unit_rows(10, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double())[0]
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    coarse = primary_components(rows, 3)
    torch.testing.assert_close(primary_components(rows @ rotation, 3), coarse @ rotation)
    torch.testing.assert_close(primary_components(rows[order], 3), coarse[order])


@pytest.mark.parametrize(("n", "d"), [(6, 9), (9, 6)])
def test_gradient_goes_through_the_subspace(n: int, d: int) -> None:
    rows = unit_rows(n, d).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: primary_components(x, 3), (rows,))
    weights = torch.randn(n, d, generator=torch.Generator().manual_seed(2)).double()

    def naive(x: Tensor) -> Tensor:
        mean = x.mean(0)
        _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
        v = vectors[:, -3:]
        return (x - mean) @ v @ v.T + mean

    if n > d:  # else the null space has equal eigenvalues, by whose gaps the naive gradient divides
        (expected,) = torch.autograd.grad((naive(rows) * weights).sum(), rows)
        (found,) = torch.autograd.grad((primary_components(rows, 3) * weights).sum(), rows)
        torch.testing.assert_close(found, expected)


def test_gradient_is_finite_where_singular_values_are_equal() -> None:
    cross = torch.eye(6, dtype=torch.float64)[:3]
    star = torch.cat([cross, -cross]) * torch.tensor([2.0, 2.0, 1.0]).repeat(2)[:, None]
    twice = unit_rows(4, 8).repeat(3, 1)
    equal = unit_rows(1, 8).repeat(6, 1)
    for rows, k in ((star, 2), (star, 1), (twice, 2), (twice, 5), (equal, 2)):
        for dtype in (torch.float64, torch.float32):
            leaf = rows.to(dtype).requires_grad_()
            (gradient,) = torch.autograd.grad((primary_components(leaf, k) * leaf.cos()).sum(), leaf)
            assert gradient.isfinite().all() and gradient.abs().max() < 1e3


# --- the loss


def smoothed(logits: Tensor, smoothing: float) -> float:
    """Cross-entropy of each row against its own column, as a double loop."""
    n = len(logits)
    total = 0.0
    for i in range(n):
        normalizer = sum(math.exp(float(logits[i, j])) for j in range(n))
        for j in range(n):
            target = (1 - smoothing) * (i == j) + smoothing / n
            total -= target * math.log(math.exp(float(logits[i, j])) / normalizer) / n
    return total


def test_both_terms_are_the_double_loop_of_their_equation() -> None:
    features = {name: unit_rows(9, 6, seed) for seed, name in enumerate(("image", "text", "short"))}
    features["scale"] = torch.tensor(math.log(10.0), dtype=torch.float64)
    terms = LongClip(components=3, short_weight=0.5).loss(features)
    image = features["image"]
    _, _, v = torch.linalg.svd(image - image.mean(0), full_matrices=False)
    coarse = (image - image.mean(0)) @ v[:3].T @ v[:3] + image.mean(0)
    for name, rows, columns, weight in (("long", image, "text", 1.0), ("short", coarse, "short", 0.5)):
        logits = 10 * rows @ features[columns].T
        expected = weight * (smoothed(logits, 0.1) + smoothed(logits.T, 0.1)) / 2
        assert terms[name].item() == pytest.approx(expected, rel=1e-10)


def test_without_components_equal_pairs_cost_the_logarithm_of_their_number() -> None:
    same = unit_rows(1, 6).repeat(7, 1)
    features = {"image": same, "text": same, "short": same, "scale": torch.tensor(4.6)}
    for term in LongClip(components=None).loss(features).values():
        assert term.item() == pytest.approx(math.log(7))


def test_components_that_leave_nothing_out_are_an_error() -> None:
    features = {name: unit_rows(9, 20, seed) for seed, name in enumerate(("image", "text", "short"))}
    features["scale"] = torch.tensor(1.0)
    LongClip(components=7).loss(features)
    with pytest.raises(ConfigError, match="9 examples have 8 components, so components=8"):
        LongClip(components=8).loss(features)
    with pytest.raises(ConfigError, match="groups of 33 examples have 32"):
        LongClip(component_group=33)
    with pytest.raises(ConfigError, match="at least 1"):
        LongClip(components=0)


def test_groups_go_by_keys_and_not_by_the_order_in_which_processes_bring_them(clip: Any) -> None:
    objective = LongClip(components=2, component_group=6)
    model = objective.prepare(clip)
    whole = batch_of(12)

    def rows_of(which: list[int]) -> dict[str, Any]:
        part = Batch(
            images=whole.images[which],
            texts={name: words[which] for name, words in whole.texts.items()},
            keys=[whole.keys[i] for i in which],
        )
        return objective.features(model, part)

    def loss_and_gradient(parts: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        joined = {
            name: torch.cat([part[name] for part in parts]) if parts[0][name].dim() else parts[0][name]
            for name in parts[0]
        }
        loss = torch.stack(list(objective.loss(joined).values())).sum()
        (gradient,) = torch.autograd.grad(loss, model.image.class_token)
        return loss, gradient

    one = loss_and_gradient([rows_of(list(range(12)))])
    two = loss_and_gradient([rows_of(list(range(0, 12, 2))), rows_of(list(range(1, 12, 2)))])
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    features = rows_of(list(range(12)))
    order = features["place"].argsort()
    expected = torch.empty_like(features["image"])
    for half in (order[:6], order[6:]):
        expected[half] = primary_components(features["image"][half], 2)
    torch.testing.assert_close(objective.coarse(features["image"], features["place"]), expected)


# --- training


def test_kept_rows_never_change_and_all_else_does(clip: Any, tmp_path: Path) -> None:
    objective = LongClip(components=3)
    clip = objective.prepare(clip)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    recipe = Recipe(steps=3, warmup=1, lr=1e-3, weight_decay=0.1, precision="fp32", scale_limit=None)
    result = fit(clip, objective, [batch_of(7)] * 3, recipe, folder=tmp_path, show="nothing")
    assert result.clip is clip
    positions = clip.text.positions
    assert torch.equal(positions[:4], before["text.positions"][:4])
    assert (positions[4:20] != before["text.positions"][4:20]).any(dim=1).all()
    assert torch.equal(positions[20:], before["text.positions"][20:])  # no text is that long
    moved = [name for name, tensor in clip.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"scale", "image.projection.weight", "text.blocks.0.mlp.fc.weight"} <= set(moved)


def test_weight_decay_alone_moves_no_position_and_every_other_matrix(clip: Any) -> None:
    objective = LongClip(components=3)
    clip = objective.prepare(clip)
    before = clip.text.positions.clone()
    groups = [{"weight_decay": 0.5, **group} for group in objective.groups(clip)]
    assert {p for group in groups for p in group["params"]} == set(clip.parameters())
    for parameter in clip.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix = clip.text.projection.weight.clone()
    torch.optim.AdamW(groups, lr=0.1).step()
    assert torch.equal(clip.text.positions, before)
    torch.testing.assert_close(clip.text.projection.weight, matrix * (1 - 0.05))


def test_prepare_gives_the_scale_and_does_nothing_a_second_time(clip: Any) -> None:
    objective = LongClip()
    longer = objective.prepare(clip)
    assert longer.scale.item() == pytest.approx(math.log(100)) and clip.scale.item() < 3
    assert objective.prepare(longer) is longer
    assert LongClip(scale=None).prepare(clip).scale == clip.scale
    again = LongClip(keep=4, ratio=1).prepare(longer)  # for a Clip that was stretched before
    assert torch.equal(again.text.positions, longer.text.positions)
    assert RECIPE.lr == 1e-6 and RECIPE.weight_decay == 1e-2 and RECIPE.scale_limit is None


def test_what_cannot_be_stretched_or_tuned_is_named(clip: Any, tiny_clip: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="has a bias"):
        LongClip().prepare(tiny_clip(0, sigmoid=True, text={"vocab_size": 64, "context_length": 12}))
    with pytest.raises(ConfigError, match="mask 'none'"):
        LongClip().prepare(tiny_clip(0, text={"vocab_size": 64, "context_length": 12, "mask": "none"}))
    objective = LongClip(components=2)
    model, batch = objective.prepare(clip), batch_of(4)
    with pytest.raises(DataError, match="the batch has long"):
        objective.features(model, dataclasses.replace(batch, texts={"long": batch.texts["long"]}))
    with pytest.raises(DataError, match="'long', only short"):
        objective.features(model, dataclasses.replace(batch, texts={"short": batch.texts["short"]}))


def test_the_short_caption_is_the_first_sentence() -> None:
    assert short_caption("A dog.\nIt runs. Fast.") == "A dog"
    assert short_caption("A 3.5 meter dog\nruns") == "A 3.5 meter dog runs"


# --- files


def published(clip: Any, seed: int = 3) -> dict[str, Tensor]:
    """A Clip's weights as the authors' files have them: under OpenAI's names, two tables, fp32."""
    weights = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
    generator = torch.Generator().manual_seed(seed)
    table = weights["positional_embedding"]
    weights["positional_embedding"] = torch.randn(table.shape, generator=generator)
    weights["positional_embedding_res"] = torch.randn(table.shape, generator=generator)
    return weights


@pytest.fixture
def long_openai(tiny_clip: Callable[..., Any]) -> Any:
    """A two-block Clip of OpenAI's activation whose heads are 64 wide, context 28."""
    from clipworks.core.config import BlockConfig

    blocks = (BlockConfig(1, 64, 64),) * 2
    sizes = {"width": 64, "blocks": blocks, "activation": "quick_gelu"}
    words = {"vocab_size": 49408, "context_length": 28}
    return tiny_clip(0, image=sizes | {"image_size": 16}, text=sizes | words)


@pytest.mark.checkpoint("longclip")
def test_two_tables_fold_into_the_sum_that_the_published_model_reads(
    long_openai: Any, tmp_path: Path
) -> None:
    weights = published(long_openai)
    torch.save(weights, tmp_path / "longclip-B.pt")
    loaded = from_checkpoint(tmp_path / "longclip-B.pt")
    first = (torch.arange(28) < 20).float()[:, None]
    table = weights["positional_embedding"] * first + weights["positional_embedding_res"] * (1 - first)
    assert torch.equal(loaded.text.positions, table)
    assert loaded.tokenizer is not None and loaded.tokenizer.context_length == 28
    with torch.no_grad():
        long_openai.text.positions.copy_(table)
        words = texts(3, 28)
        torch.testing.assert_close(loaded.text(words), long_openai.text(words))
        pixels = torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(loaded.image(pixels), long_openai.image(pixels))


@pytest.mark.checkpoint("longclip")
def test_a_file_with_one_table_is_compared_with_the_original(long_openai: Any, tmp_path: Path) -> None:
    original = long_openai
    longer = stretched(original)
    weights = rules.write(layouts.rules("transformers", longer.config), longer.state_dict())
    torch.save(weights, tmp_path / "copy.pt")
    with pytest.warns(UserWarning, match="positions 20 to 51 are the stretched ones"):
        from_checkpoint(tmp_path / "copy.pt", original)
    with pytest.warns(UserWarning, match="one position table"):
        from_checkpoint(tmp_path / "copy.pt")
    weights["text_model.embeddings.position_embedding.weight"][30] += (
        1  # trained: no warning, which would fail
    )
    torch.save(weights, tmp_path / "copy.pt")
    from_checkpoint(tmp_path / "copy.pt", original)


def test_files_that_are_no_long_clip_are_named(long_openai: Any, tmp_path: Path) -> None:
    weights = published(long_openai)
    weights["positional_embedding_res"] = weights["positional_embedding_res"][:20]
    torch.save(weights, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd.pt: its two position tables do not fit"):
        from_checkpoint(tmp_path / "odd.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt"):
        from_checkpoint(tmp_path / "other.pt")
