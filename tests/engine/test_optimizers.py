"""Muon: which weights it takes, what its step is, and that it resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipworks.engine import Callback, Recipe, Saving, State, fit
from clipworks.engine.groups import parameter_groups
from clipworks.engine.optimizers import Together, hidden_matrices, optimizer_of

MUON = Recipe(epochs=3, warmup=2, lr=3e-3, weight_decay=0.1, precision="fp32", optimizer="muon", seed=1)


def optimizer_for(module: nn.Module, recipe: Recipe = MUON) -> torch.optim.Optimizer:
    return optimizer_of(recipe, parameter_groups(module, weight_decay=recipe.weight_decay), module)


def with_gradients(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return module


def owners(optimizer: Any, module: nn.Module) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        type(part).__name__: {names[id(p)] for group in part.param_groups for p in group["params"]}
        for part in getattr(optimizer, "parts", [optimizer])
    }


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(small: Any) -> None:
    clip = small()
    taken = owners(optimizer_for(clip), clip)
    expected = {
        f"{tower}.blocks.{number}.{layer}.weight"
        for tower in ("image", "text")
        for number in range(2)
        for layer in ("attention.qkv", "attention.out", "mlp.fc", "mlp.proj")
    }
    assert taken["Muon"] == expected
    assert taken["AdamW"] == {name for name, _ in clip.named_parameters()} - expected
    for name in ("image.patches.weight", "text.embedding.weight", "image.projection.weight", "scale"):
        assert name in taken["AdamW"]


def test_a_head_outside_of_the_blocks_and_frozen_blocks_are_not_muons(small: Any, dropping: Any) -> None:
    module = nn.ModuleDict({"clip": small(), "objective": dropping()})
    module["clip"].text.requires_grad_(False)
    taken = owners(optimizer_for(module), module)
    assert "objective.head.weight" in taken["AdamW"]
    assert all(name.startswith("clip.image.blocks.") for name in taken["Muon"])


def test_without_hidden_matrices_it_is_adamw_alone() -> None:
    head = nn.Linear(4, 4)
    assert not hidden_matrices(head)
    assert type(optimizer_for(head)) is torch.optim.AdamW


class Blocks(nn.Module):
    """Hidden matrices, wide and tall, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(24, 24), nn.Linear(48, 16, bias=False)])
        self.blocks.append(nn.Linear(16, 64, bias=False))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_step_is_the_nearest_semi_orthogonal_matrix_at_the_size_of_adamw(number: int) -> None:
    recipe = replace(MUON, lr=0.01, weight_decay=0.0)
    module = with_gradients(Blocks())
    layer: Any = module.blocks[number]
    before, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
    optimizer_for(module, recipe).step()
    step = (before - layer.weight.detach()) / recipe.lr
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)  # momentum of a first step: the gradient
    nearest = (u @ v) * 0.2 * max(gradient.shape) ** 0.5
    # Newton-Schulz in bf16 leaves singular values near 1, between about 0.7 and 1.2.
    found = torch.linalg.svdvals(step / (0.2 * max(gradient.shape) ** 0.5))
    assert found.min() > 0.6 and found.max() < 1.3
    assert torch.nn.functional.cosine_similarity(step.flatten(), nearest.flatten(), dim=0) > 0.97
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)  # as Moonlight's eq. 4 wants


def test_other_weights_take_the_step_of_adamw() -> None:
    module, twin = with_gradients(Blocks()), with_gradients(Blocks())
    bias, other = module.blocks[0].bias, twin.blocks[0].bias
    with torch.no_grad():
        other.copy_(bias)
    optimizer_for(module).step()
    torch.optim.AdamW([other], lr=MUON.lr, betas=MUON.betas, eps=MUON.eps, weight_decay=0.0).step()
    torch.testing.assert_close(bias, other, atol=1e-7, rtol=1e-6)


def test_decay_and_rate_reach_both_parts() -> None:
    module = with_gradients(Blocks())
    optimizer = optimizer_for(module)
    assert isinstance(optimizer, Together)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    decays = {g["weight_decay"] for g in optimizer.param_groups}
    assert decays == {0.0, MUON.weight_decay}


def test_state_goes_round(small: Any) -> None:
    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int) -> None:
        for number in range(first, first + count):
            with_gradients(module, number)
            optimizer.step()

    whole, cut = small(), small()
    one, other = optimizer_for(whole), optimizer_for(cut)
    steps(whole, one, 5, 0)
    steps(cut, other, 2, 0)
    fresh = optimizer_for(cut)
    fresh.load_state_dict(other.state_dict())
    steps(cut, fresh, 3, 2)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_training_with_muon_resumes_bit_for_bit(
    small: Any, batches: Any, dropping: Any, tmp_path: Path
) -> None:
    class StopAt(Callback):
        def on_step(self, state: State) -> None:
            if state.step == 7:
                raise ZeroDivisionError

    def train(folder: Path, *callbacks: Callback) -> dict[str, Tensor]:
        result = fit(
            small(), dropping(), batches(), MUON,
            folder=folder, callbacks=callbacks, saving=Saving(steps=2), show="nothing",
        )  # fmt: skip
        return result.clip.state_dict()

    expected = train(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", StopAt())
    found = train(tmp_path / "cut")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_muon_learns(small: Any, batches: Any, dropping: Any, tmp_path: Path) -> None:
    losses: list[float] = []

    class Keep(Callback):
        def on_step(self, state: State) -> None:
            losses.append(state.loss)

    recipe = replace(MUON, epochs=15)
    fit(
        small(), dropping(share=0.0), batches(), recipe,
        folder=tmp_path, callbacks=[Keep()], show="nothing",
    )  # fmt: skip
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
