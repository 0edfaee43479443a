"""ALIP: both gates against a naive loop, their limits, where no gradient goes, and the running means."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.checkpoints import layouts, rules
from clipworks.checkpoints.known import ARCHITECTURES, parameters
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine.accumulate import backward_in_parts
from clipworks.engine.stage import Stage
from clipworks.errors import ConfigError, DataError
from clipworks.methods.pretrain.alip import MEANS, Alip, from_checkpoint
from clipworks.parts.contrastive import contrastive_loss


def rows(n: int = 7, width: int = 5, seed: int = 0, spread: float = 0.7) -> dict[str, Tensor]:
    """Unit vectors in fp64 that need a gradient; texts and captions are near their picture."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randn(n, width, generator=generator, dtype=torch.float64)

    image = drawn()
    found = {"image": image, "text": image + spread * drawn(), "caption": image + spread * drawn()}
    leaves = {name: F.normalize(x, dim=1).requires_grad_() for name, x in found.items()}
    return leaves | {"scale": torch.tensor(1.3, dtype=torch.float64, requires_grad=True)}


def objective(means: tuple[float, float, float] = (0.6, 0.5, 0.7), **options: Any) -> Alip:
    alip = Alip(**options).double()
    for name, mean in zip(MEANS, means, strict=True):
        getattr(alip, name).fill_(mean)
    return alip


def gradients(loss: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(features.values()), allow_unused=True))


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_loss_is_the_double_loop_of_the_equations() -> None:
    features, alip = rows(), objective()
    v, r, c = (features[name].detach() for name in ("image", "text", "caption"))
    n, a = len(v), math.exp(1.3)
    m_rc = 0.99 * 0.6 + 0.01 * sum(float(r[i] @ c[i]) for i in range(n)) / n
    m_rv = 0.99 * 0.5 + 0.01 * sum(float(r[i] @ v[i]) for i in range(n)) / n
    m_cv = 0.99 * 0.7 + 0.01 * sum(float(c[i] @ v[i]) for i in range(n)) / n
    expected = 0.0
    suspects = 0
    for t, m in ((r, m_rv), (c, m_cv)):
        for i in range(n):
            u = math.exp(2 * (float(r[i] @ c[i]) - m_rc))
            p = math.exp(2 * (float(t[i] @ v[i]) - m)) if u < 1 else 1.0
            suspects += u < 1
            row = sum(math.exp(a * float(v[i] @ t[j])) for j in range(n))
            column = sum(math.exp(a * float(v[j] @ t[i])) for j in range(n))
            own = a * float(v[i] @ t[i])
            expected += min(1.0, u) * p * 0.5 * (math.log(row) - own + math.log(column) - own) / n
    assert 0 < suspects < 2 * n  # both sides of the gate are met
    assert float(alip.loss(features)["loss"].detach()) == pytest.approx(expected, rel=1e-12)


def test_gates_of_no_steepness_leave_two_losses_of_clip() -> None:
    features = rows()
    ours = objective(gamma_sample=0, gamma_pair=0).loss(features)["loss"]
    scale = features["scale"].exp()
    plain = sum(contrastive_loss(features["image"], features[name], scale) for name in ("text", "caption"))
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    same(gradients(ours, features), gradients(plain, features))


def test_a_caption_that_is_the_text_gives_twice_the_loss_of_clip() -> None:
    features = rows(spread=3.0)
    features["caption"] = features["text"]
    alip = objective((0.9, 0.9, 0.9))
    terms = alip.loss(features)
    plain = contrastive_loss(features["image"], features["text"], features["scale"].exp())
    torch.testing.assert_close(terms["loss"], 2 * plain, rtol=1e-12, atol=0)
    assert float(terms["sample_weight"]) == float(terms["text_weight"]) == 1.0


def test_means_start_at_one_and_forget_it_by_a_hundredth_a_step() -> None:
    features = rows()
    agreement = float((features["text"] * features["caption"]).sum(1).mean().detach())
    alip = Alip().double()
    for _ in range(40):
        alip.backward(alip.loss(rows()))
    assert float(alip.mean_text_caption) == pytest.approx(agreement + 0.99**40 * (1 - agreement), rel=1e-12)
    assert int(alip.steps) == 40


def test_first_step_weighs_unrelated_texts_as_the_transient_says() -> None:
    base = torch.eye(6, dtype=torch.float64)
    features = {"image": base[:2], "text": base[2:4], "caption": base[4:]}
    gates = Alip().double().gates(**features)
    for weight in (gates.sample, gates.text, gates.caption):
        torch.testing.assert_close(weight, torch.full((2,), math.exp(-1.98), dtype=torch.float64))


def test_a_start_from_the_batch_has_the_corrected_average() -> None:
    alip, agreements = Alip(start="batch").double(), []
    average = 0.0
    for step in range(1, 6):
        features = rows(seed=step)
        agreements.append(float((features["text"] * features["image"]).sum(1).mean().detach()))
        average = 0.99 * average + 0.01 * agreements[-1]
        alip.backward(alip.loss(features))
        assert float(alip.mean_text_image) == pytest.approx(average / (1 - 0.99**step), rel=1e-9)
    assert agreements[0] != pytest.approx(agreements[1])


def test_weights_are_positive_and_only_suspects_exceed_one() -> None:
    features = rows(200, seed=3)
    gates = objective((0.6, 0.2, 0.2)).gates(features["image"], features["text"], features["caption"])
    trusted = gates.sample == 1
    assert ((gates.sample > 0) & (gates.sample <= 1)).all() and 0 < int(trusted.sum()) < 200
    for pair in (gates.text, gates.caption):
        assert (pair > 0).all() and (pair[trusted] == 1).all() and (pair[~trusted] != 1).all()
    assert (gates.sample * gates.text > 1).any()


def test_no_gradient_goes_through_the_gates() -> None:
    features, alip = rows(), objective()
    gates = alip.gates(features["image"], features["text"], features["caption"])
    frozen = torch.zeros((), dtype=torch.float64)
    for name, pair in (("text", gates.text), ("caption", gates.caption)):
        logits = features["scale"].exp() * features["image"] @ features[name].T
        own = torch.arange(len(logits))
        each = F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(
            logits.T, own, reduction="none"
        )
        frozen = frozen + (gates.sample * pair * each).mean() / 2
    ours = gradients(alip.loss(features)["loss"], features)
    same(ours, gradients(frozen, features))

    step = 1e-6  # of the whole, gates included
    moved = {name: x.detach().clone() for name, x in features.items()}
    moved["text"][0, 0] += step
    difference = (alip.loss(moved)["loss"] - alip.loss(features)["loss"]) / step
    assert (difference - ours[1][0, 0]).abs() > 1e-3 * difference.abs()


def test_order_moves_the_weights_along_and_keeps_the_loss() -> None:
    features, alip = rows(), objective()
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    moved = {name: x[order] if x.dim() else x for name, x in features.items()}
    torch.testing.assert_close(alip.loss(moved)["loss"], alip.loss(features)["loss"], rtol=1e-12, atol=1e-13)
    one, other = (alip.gates(f["image"], f["text"], f["caption"]) for f in (features, moved))
    torch.testing.assert_close(one.caption[order], other.caption)


def test_a_sample_without_weight_stays_a_negative() -> None:
    features = rows()
    weights = torch.ones(7, dtype=torch.float64)
    weights[2] = 0
    loss = weights.mean() * contrastive_loss(
        features["image"], features["text"], features["scale"].exp(), weights=weights
    )
    gradient = gradients(loss, features)[1]
    assert gradient[2].abs().max() > 1e-3  # the text is pushed away from the other pictures


def test_the_two_kinds_of_text_do_not_share_a_softmax() -> None:
    features = rows()
    ours = objective(gamma_sample=0, gamma_pair=0).loss(features)["loss"]
    logits = (
        features["scale"].exp() * features["image"] @ torch.cat([features["text"], features["caption"]]).T
    )
    own = torch.arange(7)
    joint = (F.cross_entropy(logits, own) + F.cross_entropy(logits, own + 7)) / 2
    columns = sum(F.cross_entropy(part.T, own) for part in logits.split(7, dim=1)) / 2
    assert (ours - joint - columns).abs() > 0.1


def test_a_loss_that_is_not_taken_leaves_the_means() -> None:
    alip = objective()
    first, second = (float(alip.loss(rows())["loss"].detach()) for _ in range(2))
    assert first == second and float(alip.mean_text_caption) == 0.6 and int(alip.steps) == 0


@pytest.fixture
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 12})


def batch_of(n: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def sentences(length: int) -> Tokens:
        ids = torch.randint(1, 62, (n, length), generator=generator)
        ids[:, -1] = 63
        return Tokens(ids, torch.full((n,), length - 1))

    texts = {"alt": sentences(8), "synthetic": sentences(5)}
    return Batch(torch.rand(n, 3, 16, 16, generator=generator), texts, keys=[str(i) for i in range(n)])


def test_one_pass_over_both_texts_equals_two(clip: Any) -> None:
    batch = batch_of()
    features = Alip().features(clip, batch)
    for name, source in (("text", "alt"), ("caption", "synthetic")):
        torch.testing.assert_close(features[name], clip(batch.images, batch.texts[source])[1])


def test_a_batch_in_parts_moves_the_means_once_and_as_the_whole(clip: Any) -> None:
    whole, parts = (Stage(clip, Alip(start="batch"), "fp32") for _ in range(2))
    batch = batch_of()
    whole.objective.backward(whole.objective.loss(whole(batch)))
    backward_in_parts(
        list(batch.split(3)),
        parts,
        parts.objective.loss,
        parts.objective.backward,
        module=parts,
        unsynchronized=lambda _: torch.enable_grad(),
    )
    assert int(parts.objective.steps) == 1
    for name in MEANS:
        torch.testing.assert_close(getattr(whole.objective, name), getattr(parts.objective, name))


def test_saved_means_go_on_bit_for_bit(clip: Any) -> None:
    def walk(alip: Alip, steps: range) -> list[float]:
        losses = []
        for step in steps:
            terms = alip.loss(alip.features(clip, batch_of(seed=step)))
            alip.backward(terms)
            losses.append(float(terms["loss"].detach()))
        return losses

    for start in ("one", "batch"):
        straight, first, second = (Alip(start=start) for _ in range(3))  # type: ignore[arg-type]
        expected = walk(straight, range(6))
        walk(first, range(3))
        second.load_state_dict(first.state_dict())
        assert walk(second, range(3, 6)) == expected[3:]


def test_pictures_without_a_caption_are_counted(clip: Any) -> None:
    batch = batch_of()
    tokens = batch.texts["synthetic"]
    batch.texts["synthetic"] = Tokens(tokens.ids[:4], tokens.ends[:4], torch.tensor([0, 1, 2, 4]))
    with pytest.raises(DataError, match="2 of 6 pictures"):
        Alip().features(clip, batch)
    del batch.texts["synthetic"]
    with pytest.raises(DataError, match="'synthetic'"):
        Alip().features(clip, batch)


@pytest.mark.parametrize(
    "options", [{"gamma_pair": -1}, {"momentum": 1.0}, {"start": "zero"}], ids=lambda o: next(iter(o))
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Alip(**options)


def released(clip: Any) -> dict[str, Tensor]:
    """A model's weights as the authors' training saves them."""
    weights = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
    return {f"module.{name}": tensor.clone() for name, tensor in weights.items()}


def test_released_file_has_the_tensors_of_vit_b_32() -> None:
    config = ARCHITECTURES["ViT-B-32"]
    names = [name for rule in layouts.rules("openai", config) for name in rule.theirs]
    assert len(names) == 302 and parameters(config) == 151_277_313


@pytest.mark.checkpoint("alip")
def test_released_file_is_read_with_the_exact_gelu(clip: Any, tmp_path: Path) -> None:
    path = tmp_path / "ALIP_YFCC15M_B32.pt"
    torch.save(released(clip), path)
    loaded = from_checkpoint(path, heads=(2, 2), tokenizer=False)
    assert loaded.config.image.activation == loaded.config.text.activation == "gelu"
    assert loaded.config.preprocessing.interpolation == "bicubic"
    batch = batch_of()
    for ours, theirs in zip(
        loaded(batch.images, batch.texts["alt"]), clip(batch.images, batch.texts["alt"]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(from_checkpoint(path, clip).text.positions, loaded.text.positions)
