"""TinyCLIP: its loss, both ways of inheriting, the masks and their budget, its stages and its files."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipworks.checkpoints import layouts, rules
from clipworks.core.clip import Clip
from clipworks.core.config import BlockConfig, Config, ResNetConfig, StemStage, TextConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine import Recipe, fit
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.pretrain.tinyclip import (
    FOLDED_RECIPE,
    MASK_RECIPE,
    RECIPE,
    AffinityMimicking,
    InheritanceMasks,
    affinity_loss,
    automatic_stages,
    drawn,
    from_checkpoint,
    full_size,
    inherit,
    kept_layers,
    open_probability,
    settled,
)
from clipworks.parts.pruning import gated

SMALL = {"image": {"image_size": 16}, "text": {"vocab_size": 64, "context_length": 12}}


@pytest.fixture
def make(tiny_clip: Callable[..., Any]) -> Callable[..., Any]:
    return lambda seed=0, **changes: tiny_clip(seed, **(copy.deepcopy(SMALL) | changes))


def batch_of(n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 62, (n, 7), generator=generator)
    ids[:, 0], ids[:, -1] = 62, 63
    return Batch(
        images=torch.rand(n, 3, 16, 16, generator=generator),
        texts={"alt": Tokens(ids, torch.full((n,), 6))},
        keys=[str(i) for i in range(n)],
    )


def unit_rows(n: int, d: int, seed: int) -> Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def vectors(clip: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return clip(batch.images, batch.texts["alt"])


# --- affinity mimicking


def test_the_loss_is_the_double_loop_of_its_equation() -> None:
    i, t = unit_rows(5, 6, 0), unit_rows(5, 6, 1)
    j, u = unit_rows(5, 9, 2), unit_rows(5, 9, 3)  # another joint width
    s, a = 7 * i @ t.T, 7 * j @ u.T
    expected = entropy = 0.0
    for x, y in ((s, a), (s.T, a.T)):
        for r in range(5):
            for c in range(5):
                q = math.exp(y[r, c]) / sum(math.exp(v) for v in y[r])
                p = math.exp(x[r, c]) / sum(math.exp(v) for v in x[r])
                expected -= q * math.log(p) / 10
                entropy -= q * math.log(q) / 10
    soft, least = affinity_loss(i, t, j, u, 7.0)
    assert soft.item() == pytest.approx(expected, rel=1e-12) and least.item() == pytest.approx(
        entropy, rel=1e-12
    )
    assert soft > least


def test_its_minimum_is_the_teachers_entropy_where_the_gradient_vanishes() -> None:
    i, t = unit_rows(6, 5, 0).requires_grad_(), unit_rows(6, 5, 1).requires_grad_()
    soft, least = affinity_loss(i, t, i.detach(), t.detach())
    assert soft.item() == pytest.approx(least.item(), abs=1e-12)
    assert all(gradient.abs().max() < 1e-10 for gradient in torch.autograd.grad(soft, (i, t)))


def test_no_pairs_enter_the_loss() -> None:
    rows = {"image": unit_rows(6, 5, 0), "text": unit_rows(6, 5, 1)}
    rows |= {"teacher_image": unit_rows(6, 4, 2), "teacher_text": unit_rows(6, 4, 3)}
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    moved = rows | {name: rows[name][order] for name in ("image", "teacher_image")}
    for alpha, same in ((1.0, True), (0.5, False)):
        objective = AffinityMimicking(alpha=alpha)
        one, other = objective.loss(rows)["loss"], objective.loss(moved)["loss"]
        assert torch.allclose(one, other, atol=1e-10) == same


def test_without_mimicking_it_is_the_loss_of_clip(make: Any) -> None:
    teacher, student, batch = make(1), make(0), batch_of(5)
    objective = AffinityMimicking(teacher, alpha=0)
    student = objective.prepare(student)
    images, texts = student(batch.images, batch.texts["alt"])
    logits = 50 * images @ texts.T
    own = torch.arange(5)
    expected = torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(
        logits.T, own
    )
    torch.testing.assert_close(objective.loss(objective.features(student, batch))["loss"], expected / 2)


def test_training_leaves_scale_and_teacher_as_they_are_and_nears_the_teacher(
    make: Any, tmp_path: Path
) -> None:
    teacher, batch = make(1), batch_of(12)
    before = copy.deepcopy(teacher.state_dict())
    recipe = Recipe(steps=40, warmup=2, lr=3e-3, precision="fp32")
    objective = AffinityMimicking(teacher)
    first = objective.loss(objective.features(objective.prepare(make(0)), batch))["divergence"]
    result = fit(make(0), objective, [batch], recipe, folder=tmp_path, show="nothing")
    assert result.clip.scale.item() == pytest.approx(math.log(50))
    assert objective.loss(objective.features(result.clip, batch))["divergence"] < first / 2
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in objective.state_dict())


def test_a_teacher_for_larger_pictures_gets_larger_pictures(make: Any) -> None:
    teacher, batch = make(1, image={"image_size": 32}), batch_of(3)
    objective = AffinityMimicking(teacher)
    found = objective.features(objective.prepare(make(0)), batch)["teacher_image"]
    from clipworks.core.images import fit as fit_pixels

    with torch.no_grad():
        expected = torch.nn.functional.normalize(teacher.image(fit_pixels(batch.images, 32)), dim=1)
    torch.testing.assert_close(found, expected)


def test_what_cannot_be_mimicked_is_named(make: Any) -> None:
    teacher = make(1)
    with pytest.raises(ConfigError, match="the teacher itself"):
        AffinityMimicking(teacher).prepare(teacher)
    with pytest.raises(ConfigError, match="has a bias"):
        AffinityMimicking(teacher).prepare(make(0, sigmoid=True))
    with pytest.raises(ConfigError, match="alpha 2"):
        AffinityMimicking(teacher, alpha=2)
    with pytest.raises(DataError, match="no feature 'teacher_image'"):
        AffinityMimicking().features(make(0), batch_of(3))


def test_recipes_are_those_of_the_scripts() -> None:
    assert (RECIPE.lr, RECIPE.weight_decay, RECIPE.betas, RECIPE.clip_gradient) == (
        1e-4,
        0.2,
        (0.9, 0.98),
        5.0,
    )
    assert MASK_RECIPE.steps == MASK_RECIPE.warmup == 3000 and FOLDED_RECIPE.warmup == 0


# --- inheriting by hand


def test_a_student_of_the_teachers_size_inherits_it_bit_for_bit(make: Any) -> None:
    teacher = make(1)
    twin = inherit(teacher, (2, 32), (2, 32))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in teacher.state_dict().items())
    batch, objective = batch_of(6), AffinityMimicking(teacher)
    terms = objective.loss(objective.features(objective.prepare(twin), batch))
    assert abs(terms["divergence"].item()) < 1e-6


def test_blocks_are_those_of_the_published_rule() -> None:
    assert kept_layers(12, 6) == [0, 2, 4, 6, 8, 10] and kept_layers(12, 3) == [0, 4, 8]
    assert kept_layers(12, 9) == list(range(9)) and kept_layers(9, 6) == list(range(6))
    assert kept_layers(12, 9, "even")[-1] == 11 and len(set(kept_layers(12, 9, "even"))) == 9
    assert kept_layers(5, 1, "even") == [0]
    with pytest.raises(ConfigError, match="student of 13 blocks"):
        kept_layers(12, 13)


def test_sliced_attention_is_that_of_the_first_heads_on_the_first_channels(make: Any) -> None:
    teacher = make(1, image={"image_size": 16, "width": 64, "blocks": uniform_blocks(4, 64, heads=4)})
    student = inherit(teacher, (2, 32), (2, 32))
    assert student.config.image.blocks == (BlockConfig(2, 16, 128),) * 2
    for i, theirs in ((0, 0), (1, 2)):
        full, small = teacher.image.blocks[theirs].attention, student.image.blocks[i].attention
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        mixed = []
        for head in range(2):
            q, k, v = (
                x @ full.qkv.weight[64 * part + 16 * head :][:16, :32].T
                + full.qkv.bias[64 * part + 16 * head :][:16]
                for part in range(3)
            )
            mixed.append((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        expected = torch.cat(mixed, -1) @ full.out.weight[:32, :32].T + full.out.bias[:32]
        torch.testing.assert_close(small(x), expected)


def test_the_last_channels_of_the_teacher_leave_no_trace(make: Any) -> None:
    stem = (StemStage(8), StemStage(16, 1), StemStage(32))
    teacher = make(1, image={"image_size": 16, "stem": stem})
    noisy = copy.deepcopy(teacher)
    with torch.no_grad():
        noisy.text.embedding.weight[:, 16:] += 1
        noisy.image.patches.out.weight[16:] += 1
        noisy.image.blocks[0].mlp.fc.weight[64:] += 1
        noisy.image.blocks[1].mlp.fc.weight += 1
        noisy.image.patches.stages[1].running_mean[4:] += 1
    one, other = (inherit(clip, (1, 16), (2, 16)) for clip in (teacher, noisy))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert vectors(one, batch_of(2))[0].isfinite().all()


def test_a_resnet_inherits_stage_by_stage() -> None:
    text = TextConfig(12, 64, 32, uniform_blocks(2, 32, 2))
    teacher = Clip.from_config(Config(16, ResNetConfig(32, (2, 4, 2, 2), 16, 8), text))
    student = inherit(teacher, ((1, 2, 2, 1), 8), (1, 16))
    assert student.config.image.heads == 4
    name = "conv_3.weight"
    theirs, ours = (
        teacher.image.blocks[1][2].get_parameter(name),
        student.image.blocks[1][1].get_parameter(name),
    )
    assert torch.equal(ours, theirs[: len(ours), : ours.shape[1]])
    assert student.image(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    with pytest.raises(ConfigError, match="four numbers"):
        inherit(teacher, (3, 8), (1, 16))


def test_students_that_are_larger_or_split_a_head_are_named(make: Any) -> None:
    with pytest.raises(ConfigError, match="image: a student of width 48"):
        inherit(make(), (2, 48), (2, 32))
    with pytest.raises(ConfigError, match="text: width 24 of 32 leaves no whole number of 2 heads"):
        inherit(make(), (2, 32), (2, 24))
    with pytest.raises(ConfigError, match="student of 3 blocks"):
        inherit(make(), (3, 32), (2, 32))


# --- masks


def test_probabilities_and_sizes_are_the_means_of_draws(make: Any) -> None:
    torch.manual_seed(0)
    for log_alpha in (-4.6, -1.0, 0.5):
        parameter = torch.full((100_000,), log_alpha)
        p = open_probability(parameter)[0].item()
        assert (drawn(parameter) > 0).float().mean().item() == pytest.approx(
            p, abs=3 * (p * (1 - p) / 1e5) ** 0.5
        )
    assert open_probability(torch.tensor([4.605, -4.605])).tolist() == pytest.approx([0.998, 0.047], abs=5e-4)
    assert (drawn(torch.full((100_000,), 4.605)) == 1).float().mean().item() == pytest.approx(0.953, abs=3e-3)

    masks = InheritanceMasks(AffinityMimicking(), 0.5)
    masks.prepare(make())
    with torch.no_grad():
        for parameter in masks.image.parameters():
            parameter.uniform_(-3, 1)
    counts = torch.tensor([size_of(masks.image.gates(lambda x: (drawn(x) > 0).float())) for _ in range(3000)])
    error = 3 * counts.std().item() / 3000**0.5
    assert masks.image.size().item() == pytest.approx(counts.mean().item(), abs=error)


def size_of(gates: Any, head_width: int = 16) -> float:
    """Weights that are left, as the equation of the expected size counts them."""
    w = len(gates.hidden)
    total = 0.0
    for heads, units in zip(gates.heads, gates.units, strict=True):
        total += (4 * head_width + 4 * head_width / w) * heads.sum().item() + 2 * units.sum().item()
    return gates.hidden.sum().item() * total


def test_sizes_of_ordinary_towers_are_the_published_numbers() -> None:
    assert full_size(TextConfig(77, 49408, 512, uniform_blocks(12, 512))) == 37_804_032
    assert full_size(TextConfig(77, 49408, 768, uniform_blocks(12, 768))) == 85_017_600


def test_open_masks_save_five_of_twelve_w_and_nine(tiny_clip: Callable[..., Any]) -> None:
    clip = tiny_clip(0)
    masks = InheritanceMasks(AffinityMimicking(), 0.5)
    masks.prepare(clip)
    with torch.no_grad():
        for parameter in (*masks.image.parameters(), *masks.text.parameters()):
            parameter.fill_(100.0)
    assert masks.expected_sparsity().item() == pytest.approx(5 / (12 * 32 + 9), rel=1e-4)


def test_masks_of_one_change_nothing_and_settled_ones_start_near_one(make: Any) -> None:
    clip, batch = make(2), batch_of(4)
    masks = InheritanceMasks(AffinityMimicking(), 0.5)
    masks.prepare(clip)
    under = gated(clip, masks.gates(torch.ones_like))
    for one, other in zip(vectors(under, batch), vectors(clip, batch), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert settled(torch.full((32,), 10.0)).min() > 0.99999


def test_as_many_masks_settle_at_zero_as_are_expected_to() -> None:
    assert (settled(torch.full((768,), math.log(100))) == 0).sum() == 2
    log_alpha = torch.tensor([-4.0, 3.0, -3.0, 4.0])
    assert (settled(log_alpha) == 0).tolist() == [True, False, True, False]
    assert settled(log_alpha)[1].item() == pytest.approx(1 / (1 + math.exp(-3.6)))


def test_sparsity_under_the_budget_costs_and_only_then(make: Any) -> None:
    objective = InheritanceMasks(AffinityMimicking(make(1)), 0.6, start=0.2, ramp=10)
    clip, batch = objective.prepare(make(0)), batch_of(6)
    with torch.no_grad():
        objective.steps.fill_(5)
    terms = objective.loss(objective.features(clip, batch))
    gap = 0.4 - objective.expected_sparsity().item()
    assert terms["penalty"].item() == pytest.approx(10 * gap + 10 * gap**2, rel=1e-5)
    terms["loss"].backward()
    assert objective.linear.grad.item() == pytest.approx(-gap, rel=1e-5)  # descent raises it
    assert objective.quadratic.grad.item() == pytest.approx(-(gap**2), rel=1e-5)
    with torch.no_grad():
        for parameter in (*objective.image.parameters(), *objective.text.parameters()):
            parameter.fill_(-1.5)
    objective.zero_grad()
    terms = objective.loss(objective.features(clip, batch))
    assert terms["penalty"] == 0 and objective.expected_sparsity() > 0.6
    terms["loss"].backward()
    assert objective.linear.grad == 0


def learned(make: Any, tmp_path: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """Masks after a short training, with the student they were learned on and its teacher."""
    teacher = make(1)
    objective = InheritanceMasks(AffinityMimicking(teacher), 0.5, ramp=20, lr=1.0, **changes)
    recipe = Recipe(steps=40, warmup=40, lr=1e-4, precision="fp32")
    result = fit(copy.deepcopy(teacher), objective, [batch_of(8)], recipe, folder=tmp_path, show="nothing")
    return objective, result.clip, teacher


def test_trained_masks_reach_their_budget_and_fold_into_a_smaller_plain_clip(
    make: Any, tmp_path: Path
) -> None:
    objective, clip, teacher = learned(make, tmp_path)
    values = torch.cat([p.flatten() for p in (*objective.image.parameters(), *objective.text.parameters())])
    assert values.abs().max() <= math.log(100) + 1 and objective.steps == 40
    assert objective.linear > 10 and objective.expected_sparsity() > 0.45
    folded, batch = objective.finish(clip), batch_of(5, seed=9)
    left = sum(full_size(getattr(folded.config, tower)) for tower in ("image", "text"))
    assert 0.3 < left / sum(full_size(getattr(teacher.config, tower)) for tower in ("image", "text")) < 0.6
    under = gated(clip, objective.gates(settled))
    for one, other in zip(vectors(folded, batch), vectors(under, batch), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert type(folded) is Clip and folded.save(tmp_path / "folded").is_dir()


def test_masks_and_factors_do_not_wait_for_the_warm_up_of_the_weights(make: Any, tmp_path: Path) -> None:
    teacher = make(1)
    objective = InheritanceMasks(AffinityMimicking(teacher), 0.5, start=0.2, lr=0.5)
    recipe = Recipe(steps=1, warmup=1000, lr=1e-3, precision="fp32")
    fit(copy.deepcopy(teacher), objective, [batch_of(4)], recipe, folder=tmp_path, show="nothing")
    assert objective.linear.item() == pytest.approx(10.5, rel=1e-4)  # AdamW's first step is its rate


def test_stages_end_in_one_resumable_training(make: Any, tmp_path: Path) -> None:
    teacher = make(1)
    recipe = Recipe(steps=12, warmup=1, lr=1e-3, precision="fp32")

    def run() -> Any:
        stages = automatic_stages(teacher, (0.3, 0.6), full=teacher.config, ramp=5, lr=1.0)
        return fit(
            copy.deepcopy(teacher), stages, [batch_of(8)], recipe, folder=tmp_path, show="nothing"
        ).clip

    once = run()
    left = sum(full_size(getattr(once.config, tower)) for tower in ("image", "text"))
    assert left < 0.6 * sum(full_size(getattr(teacher.config, tower)) for tower in ("image", "text"))
    again = run()  # every stage is done: the same model from the checkpoints
    assert again.config == once.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in once.state_dict().items())


def test_manual_stages_inherit_one_from_the_other(make: Any, tmp_path: Path) -> None:
    teacher = make(1, text=SMALL["text"] | {"blocks": uniform_blocks(4, 32, 2)})
    stages = [
        AffinityMimicking(teacher, begin=partial(inherit, image=(2, 32), text=(3, 32))),
        AffinityMimicking(teacher, begin=partial(inherit, image=(1, 16), text=(1, 16))),
    ]
    recipe = Recipe(steps=2, warmup=1, lr=1e-3, precision="fp32")
    small = fit(copy.deepcopy(teacher), stages, [batch_of(6)], recipe, folder=tmp_path, show="nothing").clip
    assert len(small.config.text.blocks) == 1 and small.config.image.width == 16


def test_impossible_budgets_are_named() -> None:
    with pytest.raises(ConfigError, match=r"from 0.5 to 0.2"):
        InheritanceMasks(AffinityMimicking(), 0.2, start=0.5)


# --- files


def published(clip: Any, style: str) -> dict[str, Any]:
    """A Clip's weights under one of the three kinds of names that the authors' files have."""
    weights = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
    if style == "older":
        return {f"module.{name}": value for name, value in weights.items()}
    parts: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "logit_scale":
            parts["_logit_scale.logit_scale"] = value
            continue
        part = "image" if name.startswith("visual.") else "text"
        parts[f"_{part}_encoder.module.{name}"] = value
        if style == "auto":
            parts[f"{part}_encoder_without_ddp.{name}"] = value.clone()
    if style == "auto":
        parts["_image_encoder.module.l0_module.hidden_loga"] = torch.zeros(4)
    return parts


@pytest.fixture
def pruned(tiny_clip: Callable[..., Any]) -> Any:
    """A Clip of irregular blocks with heads of 64, one of them without attention."""
    image = (BlockConfig(1, 64, 40), BlockConfig(0, 64, 24))
    text = (BlockConfig(0, 64, 8), BlockConfig(2, 64, 33))
    words = {"vocab_size": 49408, "context_length": 12}
    return tiny_clip(
        4, image={"image_size": 16, "width": 50, "blocks": image}, text=words | {"width": 39, "blocks": text}
    )


@pytest.mark.checkpoint("tinyclip")
@pytest.mark.parametrize("style", ["older", "newer", "auto"])
def test_files_with_each_kind_of_names_load(pruned: Any, tmp_path: Path, style: str) -> None:
    with torch.no_grad():
        pruned.scale.fill_(math.log(50))
        pruned.image.blocks[1].attention.out.bias.zero_()
        pruned.text.blocks[0].attention.out.bias.zero_()
    weights = published(pruned, style)
    # What the authors leave out of a block without heads.
    bare = [name for name in weights if ("visual" in name and "resblocks.1" in name) or
            ("visual" not in name and "resblocks.0" in name)]  # fmt: skip
    weights = {n: v for n, v in weights.items() if n not in bare or (".attn." not in n and ".ln_1." not in n)}
    torch.save({"state_dict": weights, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "tiny.pt")
    loaded, batch = from_checkpoint(tmp_path / "tiny.pt"), batch_of(3)
    assert loaded.config.image.blocks == pruned.config.image.blocks
    assert loaded.config.text.blocks == pruned.config.text.blocks
    assert loaded.config.image.activation == loaded.config.text.activation == "gelu"
    assert loaded.scale.item() == pytest.approx(math.log(50)) and loaded.tokenizer is not None
    for one, other in zip(vectors(loaded, batch), vectors(pruned, batch), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.checkpoint("tinyclip")
def test_a_resnet_file_loads(tmp_path: Path) -> None:
    text = TextConfig(12, 49408, 64, (BlockConfig(1, 64, 256),))
    clip = Clip.from_config(Config(16, ResNetConfig(32, (1, 1, 1, 1), 8, 4), text))
    torch.save({"state_dict": published(clip, "newer")}, tmp_path / "resnet.pt")
    loaded = from_checkpoint(tmp_path / "resnet.pt")
    assert loaded.config.image == clip.config.image
    batch = dataclasses.replace(batch_of(2), images=torch.rand(2, 3, 32, 32))
    for one, other in zip(vectors(loaded, batch), vectors(clip, batch), strict=True):
        torch.testing.assert_close(one, other)


def test_files_that_contradict_themselves_are_refused(pruned: Any, tmp_path: Path) -> None:
    weights = published(pruned, "auto")
    weights["text_encoder_without_ddp.ln_final.bias"] += 1
    torch.save({"state_dict": weights}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"ln_final.bias differs from the other copy"):
        from_checkpoint(tmp_path / "two.pt")
    weights = published(pruned, "older")
    del weights["module.transformer.resblocks.1.mlp.c_fc.weight"]
    torch.save({"state_dict": weights}, tmp_path / "gap.pt")
    with pytest.raises(CheckpointError, match=r"gap.pt.*resblocks.1.mlp.c_fc.weight"):
        from_checkpoint(tmp_path / "gap.pt")
