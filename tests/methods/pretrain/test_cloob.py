"""CLOOB: retrieval, InfoLOOB, the loss that they make, and the authors' files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.checkpoints.conftest import lively, openai_weights
from torch import Tensor

from clipworks.core.clip import Clip, unit
from clipworks.core.config import Config, ResNetConfig, TextConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine import Recipe, Saving, fit
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.pretrain import cloob
from clipworks.methods.pretrain.cloob import CLOOB, from_checkpoint, hopfield_retrieve, info_loob


def vectors(*shape: int, seed: int = 0, cone: float = 0.0) -> Tensor:
    """Unit vectors in fp64; with `cone` their mean cosine is about that."""
    generator = torch.Generator().manual_seed(seed)
    x = unit(torch.randn(*shape, dtype=torch.float64, generator=generator))
    axis = unit(torch.ones(shape[-1], dtype=torch.float64))
    return unit(math.sqrt(cone) * axis + math.sqrt(1 - cone) * x)


def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return CLOOB(**options).loss({"image": x, "text": y})["loss"]


# --- retrieval -------------------------------------------------------------------------------------------


def test_retrieval_is_the_naive_average_and_is_attention_without_projections() -> None:
    state, stored = vectors(5, 8), vectors(7, 8, seed=1)
    rows = []
    for xi in state:
        weights = torch.stack([(3.0 * (xi * z).sum()).exp() for z in stored])
        mean = sum(w * z for w, z in zip(weights / weights.sum(), stored, strict=True))
        rows.append(mean / mean.norm())  # type: ignore[union-attr]
    found = hopfield_retrieve(state, stored, 3.0)
    torch.testing.assert_close(found, torch.stack(rows), atol=1e-12, rtol=0)
    attention = F.scaled_dot_product_attention(state[None], stored[None], stored[None], scale=3.0)[0]
    torch.testing.assert_close(found, unit(attention), atol=1e-12, rtol=0)


def test_without_beta_every_retrieval_is_the_mean_and_the_loss_lies_on_its_plateau() -> None:
    x, y = (vectors(6, 8, seed=seed).requires_grad_() for seed in (0, 1))
    mean = unit(x.mean(dim=0)).expand(6, 8)
    torch.testing.assert_close(hopfield_retrieve(y, x, 1e-9), mean, atol=1e-8, rtol=0)
    found = loss(x, y, beta=1e-9)
    assert found.item() == pytest.approx(2 / 30 * math.log(5), abs=1e-9)
    assert all(g.abs().max() < 1e-8 for g in torch.autograd.grad(found, (x, y)))


def test_with_a_large_beta_an_image_retrieves_itself_and_a_text_its_nearest_image() -> None:
    x, y = vectors(6, 8), vectors(6, 8, seed=1)
    torch.testing.assert_close(hopfield_retrieve(x, x, 1e5), x, atol=1e-12, rtol=0)
    nearest = x[(y @ x.T).argmax(dim=1)]
    torch.testing.assert_close(hopfield_retrieve(y, x, 1e5), nearest, atol=1e-12, rtol=0)


def test_the_memory_gets_gradient_too() -> None:
    x = vectors(6, 8).requires_grad_()
    hopfield_retrieve(x.detach(), x, 8.0)[:, 0].sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 1e-3


def test_gradients_of_the_loss_are_those_of_finite_differences() -> None:
    x, y = (vectors(4, 3, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, inverse_temperature=5.0, beta=3.0), (x, y))


# --- InfoLOOB --------------------------------------------------------------------------------------------


def test_infoloob_is_a_double_loop_without_the_diagonal() -> None:
    a, b, s = vectors(6, 8), vectors(6, 8, seed=1), 30.0
    expected = 0.0
    for i in range(6):
        others = sum(math.exp(s * float(a[i] @ b[j])) for j in range(6) if j != i)
        expected += (-s * float(a[i] @ b[i]) + math.log(others)) / 6 / s
    assert info_loob(a, b, s).item() == pytest.approx(expected, abs=1e-12)
    logits = (s * a @ b.T).float()
    low = logits.clone().fill_diagonal_(-1000.0).logsumexp(dim=1) - logits.diagonal()
    assert info_loob(a.float(), b.float(), s).item() == pytest.approx(low.mean().item() / s, rel=1e-6)


def test_infoloob_is_infonce_without_its_saturation() -> None:
    a, b, s = vectors(6, 8).requires_grad_(), vectors(6, 8, seed=1), 4.0
    row = 2
    logits = s * a[row] @ b.T
    infonce = logits.logsumexp(0) - logits[row]
    p = (-infonce).exp()
    loob = torch.cat([logits[:row], logits[row + 1 :]]).logsumexp(0) - logits[row]
    assert loob.item() == pytest.approx((infonce + (1 - p).log()).item(), abs=1e-12)
    by_loob, by_infonce = (torch.autograd.grad(z, a, retain_graph=True)[0][row] for z in (loob, infonce))
    torch.testing.assert_close((1 - p.detach()) * by_loob, by_infonce, atol=1e-12, rtol=0)
    # Moving a positive by c moves the whole loss of its row by c: the denominator does not know it.
    every = info_loob(a, b, s) * s
    ours = torch.autograd.grad(every, a)[0][row] * 6
    torch.testing.assert_close(ours, by_loob, atol=1e-12, rtol=0)


def test_the_loss_falls_with_the_inverse_temperature_by_the_entropy_of_the_others() -> None:
    a, b = vectors(9, 8), vectors(9, 8, seed=1)
    s = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    info_loob(a, b, s).backward()
    logits = (7.0 * a @ b.T).fill_diagonal_(-torch.inf)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert s.grad is not None
    assert s.grad.item() == pytest.approx(-entropy.item() / 49, abs=1e-12)


def test_anchors_and_samples_are_not_exchangeable() -> None:
    a, b = vectors(6, 8), vectors(6, 8, seed=1)
    assert abs(info_loob(a, b, 30.0) - info_loob(b, a, 30.0)) > 1e-3


# --- the loss --------------------------------------------------------------------------------------------


def test_the_loss_is_both_memories_with_their_own_modality_as_anchor() -> None:
    x, y = vectors(6, 8), vectors(6, 8, seed=1)
    u_x, u_y, v_x, v_y = (hopfield_retrieve(*states, 8.0) for states in ((x, x), (y, x), (x, y), (y, y)))
    terms = CLOOB().loss({"image": x, "text": y})
    torch.testing.assert_close(terms["image"], info_loob(u_x, u_y, 30.0))
    torch.testing.assert_close(terms["text"], info_loob(v_y, v_x, 30.0))
    torch.testing.assert_close(terms["loss"], terms["image"] + terms["text"])
    torch.testing.assert_close(loss(x, y, scaled=False), 30 * terms["loss"])


def test_the_loss_knows_neither_order_nor_orientation_nor_which_modality_is_which() -> None:
    x, y = vectors(6, 8), vectors(6, 8, seed=1)
    turn = torch.linalg.qr(vectors(8, 8, seed=2)).Q
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for images, texts in ((y, x), (x[order], y[order]), (x @ turn, y @ turn)):
        torch.testing.assert_close(loss(images, texts), loss(x, y), atol=1e-12, rtol=0)


def test_a_perfect_simplex_has_the_lowest_loss_which_is_below_zero() -> None:
    n = 8
    simplex = unit(torch.eye(n, dtype=torch.float64) - 1 / n)
    expected = 2 * (-1 - 1 / (n - 1) + math.log(n - 1) / 30)
    assert loss(simplex, simplex, beta=1e5).item() == pytest.approx(expected, abs=1e-9)
    assert expected < 0


def test_tiles_give_the_loss_and_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_it() -> tuple[Tensor, ...]:
        x, y = (vectors(11, 8, seed=seed).requires_grad_() for seed in (0, 1))
        found = loss(x, y)
        return (found, *torch.autograd.grad(found, (x, y)))

    whole = all_of_it()
    monkeypatch.setattr(cloob, "TILED_FROM", 5)
    monkeypatch.setattr(cloob, "TILE", 3)
    for tiled, plain in zip(all_of_it(), whole, strict=True):
        torch.testing.assert_close(tiled, plain, atol=1e-13, rtol=0)


def test_losses_of_parts_of_a_batch_are_not_the_loss_of_the_batch() -> None:
    x, y = vectors(8, 8), vectors(8, 8, seed=1)
    parts = (loss(x[:4], y[:4]) + loss(x[4:], y[4:])) / 2
    assert abs(parts - loss(x, y)) > 1e-2


def test_equal_pairs_and_a_narrow_cone_are_finite_and_autocast_changes_nothing() -> None:
    same = vectors(1, 8).expand(6, 8)
    assert loss(same, same).item() == pytest.approx(2 / 30 * math.log(5), abs=1e-9)
    gradients = []
    for half in (False, True):
        x, y = (vectors(32, 64, seed=seed, cone=0.97).float().requires_grad_() for seed in (0, 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = loss(x, y)
        gradients.append(torch.cat(torch.autograd.grad(found, (x, y))))
    assert gradients[0].abs().max() > 0
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


def test_what_is_logged_says_what_happens() -> None:
    x, y = vectors(6, 8), vectors(6, 8, seed=1)
    terms = CLOOB(beta=1e-9).loss({"image": x, "text": y})
    assert terms["patterns"].item() == pytest.approx(6)  # everything is averaged
    assert terms["off_plateau"].item() == pytest.approx(0, abs=1e-9)
    assert terms["cosine"].item() == pytest.approx((x * y).sum(dim=1).mean().item())
    assert CLOOB(beta=1e5).loss({"image": x, "text": x})["patterns"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: loss(vectors(1, 8), vectors(1, 8)), ConfigError, "which has 1"),
        (lambda: info_loob(vectors(3, 8), vectors(4, 8), 30.0), ShapeError, r"\(3, 8\).*\(4, 8\)"),
        (lambda: hopfield_retrieve(vectors(3, 8), vectors(3, 4), 8.0), ShapeError, r"\(3, 4\)"),
        (lambda: CLOOB(inverse_temperature=0), ConfigError, "above 0"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_training_leaves_the_temperature_and_gives_a_plain_clip(
    tiny_clip: Callable[..., Any], tmp_path: Path
) -> None:
    clip = tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 8})
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.full((6,), 62), torch.arange(1, 7), torch.full((6,), 63)], dim=1)
    pictures = torch.rand(6, 3, 16, 16, generator=generator)
    batch = Batch(images=pictures, texts={"alt": Tokens(ids, torch.full((6,), 2))})
    recipe = Recipe(steps=3, warmup=1, lr=1e-3, eps=1e-8, precision="fp32")
    before = [p.clone() for p in clip.image.parameters()]
    fit(clip, CLOOB(), [batch] * 3, recipe, folder=tmp_path, saving=Saving(minutes=None), show="nothing")
    assert torch.equal(clip.scale, torch.tensor(30.0).log()) and not clip.scale.requires_grad
    assert any(not torch.equal(a, b) for a, b in zip(before, clip.image.parameters(), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(clip.image(pictures)[2:3], clip.image(pictures[2:3]))


# --- the authors' files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Clip:
    """The architecture of the released files, tiny: a ModifiedResNet and heads 64 wide."""
    text = TextConfig(12, 50, 64, uniform_blocks(2, 64, 1), "quick_gelu")
    clip = lively(Clip.from_config(Config(16, ResNetConfig(32, (1, 1, 1, 1), 4, 2), text)), 0)
    with torch.no_grad():
        clip.scale.fill_(math.log(30))
    return clip


def under_their_names(clip: Clip) -> dict[str, Tensor]:
    weights = openai_weights(clip)
    names = {name: name if name.startswith("visual.") else f"transformer.{name}" for name in weights}
    names["logit_scale"] = "logit_inv_tau"
    return {f"module.{names[name]}": tensor for name, tensor in weights.items()}


@pytest.mark.checkpoint("cloob")
def test_a_file_in_the_released_layout_loads_to_the_same_model(small: Clip, tmp_path: Path) -> None:
    weights = under_their_names(small) | {"module.logit_scale_hopfield": torch.tensor(math.log(8.0))}
    assert "module.transformer.transformer.resblocks.1.ln_1.weight" in weights
    contents = {"epoch": 28, "name": "x", "model_config_file": "RN50.json", "state_dict": weights}
    path = tmp_path / "cloob_rn50_yfcc_epoch_28.pt"
    torch.save(contents | {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, path)
    loaded = from_checkpoint(path, tokenizer=False)
    assert loaded.config.image == small.config.image and loaded.config.text == small.config.text
    assert loaded.scale.exp().item() == pytest.approx(30)
    assert loaded.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, msg=name)


@pytest.mark.checkpoint("cloob")
def test_a_file_with_openais_names_is_not_mangled(small: Clip, tmp_path: Path) -> None:
    torch.save(openai_weights(small), tmp_path / "rn50.pt")
    loaded = from_checkpoint(tmp_path / "rn50.pt", tokenizer=False)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, msg=name)


def test_a_relatives_file_is_refused_by_name(small: Clip, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in under_their_names(small).items() if "ln_final" not in name}
    torch.save({"state_dict": weights}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: ln_final\.weight is missing"):
        from_checkpoint(tmp_path / "other.pt")
