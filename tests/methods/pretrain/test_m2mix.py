"""m²-Mix and m³-Mix: the great circle, the losses against naive ones, fading, and the authors' files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoints.conftest import lively, openai_weights
from torch import Tensor

from clipworks.core.clip import Clip, unit
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine import Recipe, Saving, fit
from clipworks.engine.identity import identity_of
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.m2mix import (
    M2Mix,
    SingleMix,
    from_checkpoint,
    geodesic_mix,
    m2_loss,
    single_losses,
)

SCALE = torch.tensor(12.0, dtype=torch.float64)


def vectors(n: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(n, 8, dtype=torch.float64, generator=generator))


def row_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of the rows' cross-entropies, term by term; a target of mass 2 counts twice."""
    total = logits.new_zeros(())
    for row, target in zip(logits, targets, strict=True):
        log_p = torch.stack([x - row.exp().sum().log() for x in row])
        total = total - sum(t * p for t, p in zip(target, log_p, strict=True)) / len(logits)
    return total


def both_ways(logits: Tensor, targets: Tensor) -> Tensor:
    return (row_loss(logits, targets) + row_loss(logits.T, targets.T)) / 2


def features(v: Tensor, t: Tensor, **changed: Any) -> dict[str, Any]:
    """What `M2Mix.features` would give, with the loader's own order and λ = 0.3 everywhere."""
    n = len(v)
    given: dict[str, Any] = {
        "image": v,
        "text": t,
        "scale": SCALE.log(),
        "caption": torch.arange(n),
        "order": torch.linspace(0, 1, n),
        "mix": torch.full((n, 4), 0.3, dtype=v.dtype),
        "epoch": torch.zeros(()),
    }
    return given | changed


def singles(v: Tensor, t: Tensor, weight: float, target: Any = "both", keys: Tensor | None = None) -> Any:
    partner = torch.arange(len(v)).flip(0)
    keys = torch.arange(len(v)) if keys is None else keys
    return single_losses(v, t, SCALE, torch.full((3,), weight, dtype=v.dtype), partner, keys, target)


# --- the great circle ------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.integers(0, 50))
def test_a_mixture_lies_on_the_great_circle_at_its_share_of_the_angle(weight: float, seed: int) -> None:
    a, b = vectors(3, seed), vectors(3, seed + 100)
    theta = (a * b).sum(dim=1).arccos()
    mixed = geodesic_mix(a, b, weight)
    torch.testing.assert_close(mixed.norm(dim=1), torch.ones(3, dtype=a.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed, geodesic_mix(b, a, 1 - weight), atol=1e-12, rtol=0)
    for end, share in ((a, 1 - weight), (b, weight)):
        torch.testing.assert_close((mixed * end).sum(dim=1), (share * theta).cos(), atol=1e-12, rtol=0)
    torch.testing.assert_close(geodesic_mix(a, b, 1.0), a, atol=1e-12, rtol=0)
    torch.testing.assert_close(geodesic_mix(a, b, 0.0), b, atol=1e-12, rtol=0)
    torch.testing.assert_close(geodesic_mix(a, b, 0.5), unit(a + b), atol=1e-12, rtol=0)


def test_a_chord_runs_on_the_same_arc_at_another_speed() -> None:
    a, b = vectors(1), vectors(1, seed=1)
    chord = unit(0.3 * a + 0.7 * b)
    theta, angle = (a * b).sum().arccos(), (chord * a).sum().arccos()
    torch.testing.assert_close(chord, geodesic_mix(a, b, 1 - angle / theta), atol=1e-9, rtol=0)
    assert abs(angle / theta - 0.7) > 1e-3


def test_equal_and_opposite_vectors_give_finite_mixtures_and_gradients() -> None:
    a = vectors(3).float().requires_grad_()
    torch.testing.assert_close(geodesic_mix(a, a.detach().clone(), 0.3), a, atol=1e-6, rtol=0)
    for other in (a.detach().clone(), -a.detach()):
        mixed = geodesic_mix(a, other, 0.3)
        assert torch.isfinite(mixed).all()
        assert torch.isfinite(torch.autograd.grad(mixed.sum(), a)[0]).all()


def test_half_precision_is_mixed_in_fp32() -> None:
    a, b = vectors(4).half(), vectors(4, seed=1).half()
    mixed = geodesic_mix(a, b, 0.3)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, geodesic_mix(a.float(), b.float(), 0.3))


def test_gradients_are_those_of_finite_differences() -> None:
    v, t = vectors(3).requires_grad_(), vectors(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, t: geodesic_mix(v, t, 0.3), (v, t))
    assert torch.autograd.gradcheck(lambda v, t: m2_loss(v, t, geodesic_mix(v, t, 0.3), 0.3), (v, t))


# --- m2 --------------------------------------------------------------------------------------------------


def test_m2_is_the_double_loop_and_the_sum_of_two_means() -> None:
    v, t = vectors(), vectors(seed=1)
    n = geodesic_mix(v, t, 0.3)
    expected = 0.0
    for anchors in (v, t):
        for i in range(6):
            row = [float(v[i] @ t[i] if i == j else anchors[i] @ n[j]) / 0.07 for j in range(6)]
            expected += (math.log(sum(map(math.exp, row))) - row[i]) / 6
    assert m2_loss(v, t, n, 0.07).item() == pytest.approx(expected, abs=1e-12)


def test_a_negative_is_one_part_image_and_one_part_text() -> None:
    v, t, weight = vectors(), vectors(seed=1), 0.3
    theta = (v * t).sum(dim=1).arccos()
    k, other = (weight * theta).sin() / theta.sin(), ((1 - weight) * theta).sin() / theta.sin()
    torch.testing.assert_close(
        v @ geodesic_mix(v, t, weight).T, k * (v @ v.T) + other * (v @ t.T), atol=1e-12, rtol=0
    )


def test_at_the_ends_one_direction_is_clip_and_the_other_stays_within_a_modality() -> None:
    v, t, own = vectors(), vectors(seed=1), torch.arange(6)
    diagonal = torch.eye(6, dtype=torch.bool)
    across = v @ t.T / 0.07
    for weight, clip_rows, anchors in ((0.0, across, t), (1.0, across.T, v)):
        within = torch.where(diagonal, across, anchors @ anchors.T / 0.07)
        expected = F.cross_entropy(clip_rows, own) + F.cross_entropy(within, own)
        found = m2_loss(v, t, geodesic_mix(v, t, weight), 0.07)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_what_is_left_out_is_no_negative_and_may_be_anything() -> None:
    v, t = vectors(), vectors(seed=1)
    n = geodesic_mix(v, t, 0.3)
    keys = torch.tensor([0, 1, 2, 3, 1, 5])
    found = m2_loss(v, t, n, 0.07, keys[:, None] == keys)
    expected = 0.0
    for anchors in (v, t):
        for i in range(6):
            kept = [j for j in range(6) if j == i or keys[j] != keys[i]]
            row = {j: float(v[i] @ t[i] if i == j else anchors[i] @ n[j]) / 0.07 for j in kept}
            expected += (math.log(sum(map(math.exp, row.values()))) - row[i]) / 6
    assert found.item() == pytest.approx(expected, abs=1e-12)


# --- m3 --------------------------------------------------------------------------------------------------


def test_single_mixes_are_soft_cross_entropies_of_mixed_rows() -> None:
    v, t, weight = vectors(), vectors(seed=1), 0.3
    eye = torch.eye(6, dtype=v.dtype)
    soft, hard = weight * eye + (1 - weight) * eye.flip(1), eye + eye.flip(1)
    mixed = [geodesic_mix(x, x.flip(0), weight) for x in (v, t)]
    found = singles(v, t, weight)
    torch.testing.assert_close(found["image_mix"], both_ways(SCALE * mixed[0] @ t.T, soft))
    torch.testing.assert_close(found["text_mix"], both_ways(SCALE * v @ mixed[1].T, soft))
    logits = SCALE * mixed[0] @ mixed[1].T
    torch.testing.assert_close(found["pair_mix"], both_ways(logits, hard))
    torch.testing.assert_close(singles(v, t, weight, "first")["pair_mix"], both_ways(logits, eye))


def test_at_the_ends_single_mixes_are_clip_and_between_at_least_their_entropy() -> None:
    v, t = vectors(), vectors(seed=1)
    plain = both_ways(SCALE * v @ t.T, torch.eye(6, dtype=v.dtype))
    for weight in (0.0, 1.0):
        found = singles(v, t, weight, "first")
        for loss in found.values():
            torch.testing.assert_close(loss, plain, atol=1e-9, rtol=0)
    for weight in (0.2, 0.5):
        entropy = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
        found = singles(t, t, weight)
        assert min(found["image_mix"], found["text_mix"]) >= entropy


def test_halfway_a_pair_and_its_partner_are_the_same_row() -> None:
    v = vectors()
    mixed = geodesic_mix(v, v.flip(0), 0.5)
    torch.testing.assert_close(mixed, mixed.flip(0), atol=1e-12, rtol=0)


def test_odd_batches_and_equal_captions_in_mirrored_places_are_finite() -> None:
    v, t = vectors(5).float(), vectors(5, seed=1).float()
    t[4] = t[0]
    v.requires_grad_()
    t.requires_grad_()
    keys = torch.tensor([0, 1, 2, 3, 0])
    for target in ("both", "first"):
        objective = M2Mix(single=SingleMix(pair_target=target))  # type: ignore[arg-type]
        given = features(v, t, caption=keys, scale=SCALE.log().float(), mix=torch.full((5, 4), 0.3))
        total = sum(objective.loss(given).values())
        assert isinstance(total, Tensor) and torch.isfinite(total)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, (v, t)))
    # The middle one is mixed with itself, and both its targets are its own.
    odd_v, odd_t = vectors(5), vectors(5, seed=1)
    eye = torch.eye(5, dtype=odd_v.dtype)
    mixed = geodesic_mix(odd_v, odd_v.flip(0), 0.3)
    expected = both_ways(SCALE * mixed @ odd_t.T, 0.3 * eye + 0.7 * eye.flip(1))
    torch.testing.assert_close(singles(odd_v, odd_t, 0.3)["image_mix"], expected, atol=1e-5, rtol=0)


def test_a_mixture_is_not_held_against_what_says_the_same_as_one_of_its_members() -> None:
    v, t, weight = vectors(), vectors(seed=1), 0.3
    keys = torch.tensor([0, 1, 2, 0, 4, 5])  # 3 says what 0 says; partners are 0 and 5, 2 and 3
    mixed = geodesic_mix(v, v.flip(0), weight)
    logits = SCALE * mixed @ t.T
    left_out = [(0, 3), (5, 3), (2, 0), (3, 0)]
    for i, j in left_out:
        logits[i, j] = -1e9
    eye = torch.eye(6, dtype=v.dtype)
    soft = weight * eye + (1 - weight) * eye.flip(1)
    expected = 0.0
    for scores, targets in ((logits, soft), (logits.T, soft.T)):
        log_p = scores.log_softmax(dim=1)
        expected += -float((targets * log_p).sum()) / 12
    assert singles(v, t, weight, keys=keys)["image_mix"].item() == pytest.approx(expected, abs=1e-9)


# --- the objective ---------------------------------------------------------------------------------------


def test_weights_and_fading_are_those_of_the_equation() -> None:
    v, t = vectors(), vectors(seed=1)
    single = SingleMix(weight=0.05, pair_weight=0.1)
    plain = both_ways(SCALE * v @ t.T, torch.eye(6, dtype=v.dtype))
    m2 = m2_loss(v, t, geodesic_mix(v, t, 0.3), 0.07)
    own = singles(v, t, 0.3)
    for fade, epoch, share in ((True, 0, 1.0), (True, 8, 1 / 9), (False, 8, 1.0)):
        objective = M2Mix(0.02, fade=fade, single=single)
        found = objective.loss(features(v, t, epoch=torch.tensor(float(epoch))))
        torch.testing.assert_close(found["contrastive"], plain)
        torch.testing.assert_close(found["m2"], share * 0.02 * m2)
        for name, weight in (("image_mix", 0.05), ("text_mix", 0.05), ("pair_mix", 0.1)):
            torch.testing.assert_close(found[name], share * weight * own[name])


def test_the_first_row_in_the_random_order_decides_and_partners_are_its_reverse() -> None:
    v, t = vectors(), vectors(seed=1)
    order = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.2])  # rows 1, 5, 3, 0, 4, 2
    mix = torch.linspace(0.1, 0.8, 24, dtype=v.dtype).reshape(6, 4)
    found = M2Mix(1.0, fade=False, single=SingleMix(1.0)).loss(features(v, t, order=order, mix=mix))
    torch.testing.assert_close(found["m2"], m2_loss(v, t, geodesic_mix(v, t, mix[1, 0]), 0.07))
    partner = torch.tensor([3, 2, 1, 0, 5, 4])
    expected = single_losses(v, t, SCALE, mix[1, 1:], partner, torch.arange(6), "both")
    torch.testing.assert_close(found["image_mix"], expected["image_mix"])


def test_without_weight_it_is_plain_fine_tuning() -> None:
    v, t = vectors().requires_grad_(), vectors(seed=1).requires_grad_()
    given = features(v, t)
    found = [
        torch.autograd.grad(sum(objective.loss(given).values()), (v, t))
        for objective in (M2Mix(0.0), M2Mix(0.0, single=SingleMix(weight=0.0, pair_weight=0.0)))
    ]
    plain = torch.autograd.grad(ClipObjective().loss(given)["contrastive"], (v, t))
    for one, other, expected in zip(*found, plain, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, atol=1e-13, rtol=1e-12)


def test_lambda_is_drawn_from_its_beta_distribution(tiny_clip: Callable[..., Any]) -> None:
    clip = small_of(tiny_clip)
    batch = pairs(60)
    objective = M2Mix(beta=0.5, single=SingleMix(beta=0.2))
    torch_state = torch.get_rng_state()
    try:
        drawn = torch.cat([objective.features(clip, batch)["mix"] for _ in range(20)])
    finally:
        torch.set_rng_state(torch_state)
    near_an_end = ((drawn < 0.1) | (drawn > 0.9)).double().mean(dim=0)
    for share, expected in zip(near_an_end, (0.41, 0.67, 0.67, 0.67), strict=True):
        assert share == pytest.approx(expected, abs=0.06)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)


def small_of(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 8})


def pairs(n: int) -> Batch:
    generator = torch.Generator().manual_seed(n)
    ids = torch.stack([torch.full((n,), 62), torch.arange(1, n + 1), torch.full((n,), 63)], dim=1)
    pictures = torch.rand(n, 3, 16, 16, generator=generator)
    return Batch(images=pictures, texts={"alt": Tokens(ids, torch.full((n,), 2))})


def test_the_engine_tells_the_epoch_and_the_temperature_stays(
    tiny_clip: Callable[..., Any], tmp_path: Path
) -> None:
    seen: list[float] = []

    class Watched(M2Mix):
        def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
            found = super().features(clip, batch)
            seen.append(float(found["epoch"]))
            return found

    recipe = Recipe(epochs=3, warmup=1, lr=1e-3, precision="fp32")
    clip = small_of(tiny_clip)
    objective = Watched(temperature=0.05)
    batches = [pairs(6), pairs(6)]
    fit(clip, objective, batches, recipe, folder=tmp_path, saving=Saving(minutes=None), show="nothing")
    assert seen == [0, 0, 1, 1, 2, 2]
    assert torch.equal(clip.scale, torch.tensor(-math.log(0.05))) and not clip.scale.requires_grad


def test_a_training_is_not_resumed_with_other_mixtures() -> None:
    recipe = Recipe(steps=1)
    said = [identity_of(recipe, 1, M2Mix(single=single)) for single in (None, SingleMix(), SingleMix(0.1))]
    assert said[0] != said[1] != said[2] and said[1] == identity_of(recipe, 1, M2Mix(single=SingleMix()))


def test_equal_captions_are_found_in_the_tokens(tiny_clip: Callable[..., Any]) -> None:
    batch = pairs(5)
    batch.texts["alt"].ids[3] = batch.texts["alt"].ids[1]
    keys = M2Mix().features(small_of(tiny_clip), batch)["caption"]
    assert keys[3] == keys[1] and len(keys.unique()) == 4


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: M2Mix(-1.0), ConfigError, "weight must not be negative"),
        (lambda: M2Mix(temperature=0.0), ConfigError, "above 0"),
        (lambda: SingleMix(pair_target="all"), ConfigError, "'all' is neither both nor first"),
        (lambda: geodesic_mix(vectors(3), vectors(4), 0.5), ShapeError, r"\(3, 8\) and \(4, 8\)"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# --- the authors' files ----------------------------------------------------------------------------------


def test_a_saved_file_loads_without_what_is_not_of_clip(tmp_path: Path) -> None:
    blocks = uniform_blocks(2, 64, 1)
    image = VisionConfig(32, 8, 64, blocks, "quick_gelu")
    clip = lively(Clip.from_config(Config(16, image, TextConfig(12, 50, 64, blocks, "quick_gelu"))), 0)
    extra = {
        "prompts_weights": torch.zeros(0, 512),
        "text_bias": torch.zeros(512),
        "logit_scale2": torch.tensor(2.0),
        "text_projection_mix": torch.full((4, 4), math.nan),
    }
    torch.save({"model_state_dict": openai_weights(clip) | extra}, tmp_path / "tuned.pt")
    loaded = from_checkpoint(tmp_path / "tuned.pt", tokenizer=False)
    for name, tensor in clip.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, msg=name)
    torch.save({"model_state_dict": extra}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is missing, so this is no CLIP"):
        from_checkpoint(tmp_path / "other.pt")
