"""R-AMT is what its equations say: straight-through scores, gradient dropout, what Adam can reach, bits."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.core.config import Config, ResNetConfig
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError
from clipworks.methods.adapt import r_amt
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.nearest_mean import NearestMean
from clipworks.methods.adapt.r_amt import RAMT
from clipworks.parts.features import Views
from clipworks.parts.shots import Shots, Step

NAMES = ["cat", "dog", "fish"]
Y = np.arange(6) % 3


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    # torch's matrix products take another path where a weight asks for gradients, with other last bits.
    return made.requires_grad_(False)


def pictures(seed: int = 0, count: int = 6, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8))


def fitted(clip: Clip, **settings: Any) -> RAMT:
    options = {"epochs": 3, "batch_size": 3, "lr": 4e-3, "views": 0, "progress": False, **settings}
    return RAMT(clip, NAMES, **options).fit(pictures(), Y)


def at_the_start(clip: Clip, **settings: Any) -> tuple[RAMT, Step]:
    """An estimator before its first step, and the step."""
    estimator = RAMT(clip, NAMES, epochs=3, lr=4e-3, progress=False, **settings)
    estimator.classes_, estimator.texts_ = estimator._settle(None)
    estimator.fitted_on_ = "pictures"
    pixels, rows = torch.stack(pictures()), torch.arange(6)
    shots = Shots(torch.from_numpy(Y), torch.ones(6), pixels=pixels, keys=[*"abcdef"], views=Views())
    with estimator._undisturbed():
        estimator.module_ = estimator._prepare(shots)
    estimator._cache["learning"] = True
    return estimator, Step(pixels, shots.labels, shots.weights, rows, 0, shots)


def test_before_the_first_step_the_tower_is_the_original_bit_for_bit(clip: Clip) -> None:
    estimator, step = at_the_start(clip)
    with torch.no_grad():
        masked = estimator.masked_tower()(step.inputs)
        assert torch.equal(masked, clip.image(step.inputs))
    assert all(bool(mask.all()) for mask in estimator.module_.masks().values())


def test_what_is_masked_is_counted_as_in_the_papers_tower(clip: Clip) -> None:
    """With the sizes of ViT-B/16 the formula gives 28,901,376 scores, 85,524,480 with the MLPs."""
    w, L, p = 768, 12, 16
    assert L * 4 * w * w + 3 * p * p * w == 28_901_376
    w, L, p, hidden = 32, 2, 8, clip.config.image.blocks[0].mlp_width  # type: ignore[union-attr]
    for where, patch, count in (
        ("attention", True, L * 4 * w * w + 3 * p * p * w),
        ("attention", False, L * 4 * w * w),
        ("attention+mlp", True, L * (4 * w * w + 2 * w * hidden) + 3 * p * p * w),
    ):
        names = r_amt.maskable(clip.image, where, patch)  # type: ignore[arg-type]
        assert sum(clip.image.get_parameter(name).numel() for name in names) == count
        assert not [name for name in names if "bias" in name or "ln" in name]


def test_gradients_go_straight_through_and_reach_masked_entries(clip: Clip) -> None:
    """Against finite differences of the effective weight in fp64, the loss computed without the estimator."""
    twin = copy.deepcopy(clip).double()
    estimator, step = at_the_start(twin, penalty=0.0, drop=0.0)
    step.inputs = step.inputs.double() / 255
    name, names = "blocks.1.attention.out.weight", estimator.module_.names
    with torch.no_grad():
        estimator.module_.values[names.index(name)][::2] = 0.0
        masked = {n: W * estimator.module_.masks()[n] for n, W in estimator._weights().items()}

    def loss(effective: Tensor) -> float:
        features = functional_call(twin.image, masked | {name: effective}, (step.inputs,))
        texts = estimator.class_features().double()
        return float(F.cross_entropy(math.exp(float(twin.scale)) * unit(features) @ texts.T, step.labels))

    with estimator._undisturbed(), torch.enable_grad():
        estimator._backward(step)
    found = estimator.module_.values[names.index(name)].grad
    assert found is not None
    weight = twin.image.get_parameter(name).detach()
    with torch.no_grad():
        for row, column in ((0, 3), (4, 17), (5, 8), (31, 30)):
            moved = []
            for sign in (1, -1):
                effective = masked[name].clone()
                effective[row, column] += sign * 1e-4
                moved.append(loss(effective))
            expected = (moved[0] - moved[1]) / 2e-4 * float(weight[row, column])
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-3, abs=1e-8)
            assert found[row, column] != 0


def test_probabilities_are_those_of_the_worked_examples() -> None:
    g_a, g_b = torch.tensor([[0.7, 0.2, 1, -1, 1e-8], [0.3, -0.6, -1, -2, 0]])
    found = r_amt.keep_probability(g_a, g_b)
    torch.testing.assert_close(found, torch.tensor([1, 0.25, 0.5, 1, 0.75]), rtol=1e-4, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    drawn = r_amt.dropped(g_a.repeat(100_000, 1), g_b.repeat(100_000, 1), 1.0, generator)
    kept = (drawn != 0).float().mean(dim=0)
    assert torch.allclose(kept, found, atol=0.01)


def test_dropout_leaves_all_or_a_share_of_the_tasks_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    g_a, g_b = torch.randn(2, 5000, generator=generator)
    assert torch.equal(r_amt.dropped(g_a, g_b, 0.0, generator), g_a)
    for drop in (1.0, 0.3):
        found = r_amt.dropped(g_a, g_b, drop, generator)
        whole, rest = found == g_a, found == (1 - drop) * g_a
        assert bool((whole | rest).all()) and whole.any() and rest.any()
        assert bool(whole[(g_a * g_b) > 1e-3].all())  # where both agree nothing is dropped


def test_at_the_first_step_the_likeness_has_no_gradient(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, step = at_the_start(clip, penalty=0.0)
    seen: list[tuple[float, float]] = []

    def applied(_: RAMT, g_a: Tensor, g_b: Tensor) -> Tensor:
        seen.append((float(g_a.norm()), float(g_b.norm())))
        return g_a

    monkeypatch.setattr(RAMT, "_applied", applied)
    with estimator._undisturbed(), torch.enable_grad():
        estimator._backward(step)
    assert len(seen) == len(estimator.module_.names)
    assert all(g_b < 1e-4 * g_a for g_a, g_b in seen)
    # Once a weight is off it has one.
    with torch.no_grad():
        estimator.module_.values[-1][::2] = 0
    seen.clear()
    with estimator._undisturbed(), torch.enable_grad():
        estimator._backward(step)
    assert all(g_b > 1e-3 * g_a for g_a, g_b in seen)


def test_distillation_is_the_divergence_up_to_the_teachers_entropy() -> None:
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    p, q = (logits.div(2).log_softmax(dim=1) for logits in (teacher, student))
    entropy = -(p.exp() * p).sum(dim=1)
    divergence = F.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
    torch.testing.assert_close(r_amt.distillation(student, teacher, 2.0), 4 * (divergence + entropy))


def test_the_penalty_alone_switches_all_off_in_the_same_step() -> None:
    """At a constant lr of 8e-5, after about 71 steps."""
    few, whole = 64, 2304 * 768  # scores that stay alike: a few stand for the whole tensor
    scores = r_amt.Scores({"W": torch.zeros(few)}, 1e-2, 5e-3)
    optimizer = torch.optim.Adam(scores.parameters(), lr=8e-5)
    on = []
    for _ in range(75):
        (m,) = scores.values
        m.grad = (1e-4 * m / (m.norm() * (whole / few) ** 0.5)).detach()
        optimizer.step()
        on.append(int(scores.masks()["W"].sum()))
    assert set(on) == {few, 0}
    assert abs(on.index(0) + 1 - 71) <= 1


def test_the_largest_steps_are_adams_own_and_no_gradient_beats_them() -> None:
    found = r_amt.largest_steps(150)
    for step, expected in ((1, 1.0), (30, 1.30), (150, 2.7)):
        assert float(found[step - 1]) == pytest.approx(expected, abs=0.05)
    assert float(r_amt.largest_steps(20_000)[-1]) == pytest.approx(7.3, abs=0.05)
    # The gradient of the bound, g_k proportional to (0.9 / 0.999)^k, attains it.
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=0.0)
    moved = 0.0
    for k in range(30):
        parameter.grad = torch.tensor([(0.9 / 0.999) ** (29 - k)], dtype=torch.float64)
        before = parameter.item()
        optimizer.step()
        moved = abs(parameter.item() - before)
    assert moved == pytest.approx(float(found[29]), rel=1e-9)


@pytest.mark.parametrize(("pictures_", "raises"), [(32, True), (64, True), (96, True), (128, False)])
def test_fits_that_cannot_flip_a_mask_are_refused(clip: Clip, pictures_: int, raises: bool) -> None:
    """With the paper's lr and 30 epochs of batches of 32; 120 steps only warn."""
    estimator = RAMT(clip, NAMES)
    shots = Shots(torch.zeros(pictures_, dtype=torch.int64), torch.ones(pictures_))
    if raises:
        with pytest.raises(ConfigError, match="reach"):
            estimator._check_reach(shots)
        return
    with pytest.warns(UserWarning, match="reach"):
        estimator._check_reach(shots)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator._check_reach(Shots(torch.zeros(160, dtype=torch.int64), torch.ones(160)))
    assert estimator.reach_ == pytest.approx(1.24, abs=0.005)


def test_the_fitted_tower_is_the_originals_weights_times_bits(clip: Clip) -> None:
    before = copy.deepcopy(clip.state_dict())
    estimator = fitted(clip)
    assert 0 < estimator.masked_share_ < 1
    effective = {n: clip.image.get_parameter(n) * mask for n, mask in estimator.masks_.items()}
    X = torch.stack(pictures(1))
    with torch.no_grad():
        expected = functional_call(clip.image, effective, (X,))
        assert torch.equal(estimator.masked_tower()(X), expected)
    assert torch.equal(estimator.image_features(list(X)), unit(expected))
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.state_dict().items())
    shares = estimator.masked_by_tensor_
    sizes = {name: mask.numel() for name, mask in estimator.masks_.items()}
    mean = sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values())
    assert mean == pytest.approx(estimator.masked_share_)
    assert estimator.trainable_parameters == sum(sizes.values())


def test_masks_that_are_all_on_are_zero_shot_and_dropout_changes_them(clip: Clip) -> None:
    with_dropout, without = fitted(clip), fitted(clip, drop=0.0)
    assert any(not torch.equal(with_dropout.masks_[n], without.masks_[n]) for n in without.masks_)
    for mask in without.masks_.values():
        mask.fill_(True)
    without._cache.clear()
    with torch.no_grad():
        assert torch.equal(without.image_features(pictures()), unit(clip.image(torch.stack(pictures()))))


def test_a_teachers_features_of_plain_pictures_are_computed_once(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    own = Adapter._encode
    monkeypatch.setattr(Adapter, "_encode", lambda self, x: (asked.append(len(x)), own(self, x))[1])
    fitted(clip)
    assert sum(asked) == 6
    asked.clear()
    fitted(clip, views=1)
    assert sum(asked) == 18


def test_bits_are_numpys_and_saved_as_an_eighth_of_a_byte_each(clip: Clip, tmp_path: Path) -> None:
    estimator = fitted(clip)
    name, mask = next(iter(estimator.masks_.items()))
    packed = r_amt.pack(mask)
    assert packed.tolist() == np.packbits(mask.numpy().ravel()).tolist()
    assert torch.equal(r_amt.unpack(packed.tobytes(), mask.shape, name), mask)
    with pytest.raises(CheckpointError, match="bytes"):
        r_amt.unpack(packed.tobytes()[:-1], mask.shape, name)
    folder = estimator.save(tmp_path / "run")
    size = (folder / "learned.safetensors").stat().st_size
    assert size < estimator.trainable_parameters / 8 + 1500
    loaded = Adapter.load(folder, clip)
    assert isinstance(loaded, RAMT) and loaded.reach_ == estimator.reach_
    assert all(torch.equal(loaded.masks_[n], estimator.masks_[n]) for n in estimator.masks_)
    with pytest.raises(CheckpointError, match="mlp"):
        Adapter.load(folder, clip, where="attention+mlp")


def test_class_vectors_may_be_another_estimators(clip: Clip) -> None:
    with torch.no_grad():
        X = clip.image(torch.stack(pictures()))
    means = NearestMean(clip, NAMES).fit(X, Y)
    estimator = fitted(clip, text=means)
    assert torch.equal(estimator.class_features(), means.class_features())
    assert not torch.equal(estimator.class_features(), fitted(clip).class_features())


def test_the_best_epoch_is_deployed_with_patience(clip: Clip) -> None:
    estimator = RAMT(clip, NAMES, epochs=4, patience=1, batch_size=3, lr=4e-3, views=0, progress=False)
    estimator.fit(pictures(), Y, validation=(pictures(1), Y))
    assert set(estimator.masks_) == set(r_amt.maskable(clip.image))


@pytest.mark.parametrize("settings", [{"drop": 1.5}, {"init": 1e-3}, {"where": "mlp"}])
def test_settings_that_cannot_work_are_named(clip: Clip, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        fitted(clip, **settings)


# --- a ResNet ---


@pytest.fixture(scope="module")
def resnet(clip: Clip) -> Clip:
    image = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=4, heads=4)
    config = Config(image=image, text=clip.config.text, width=16, name="tiny resnet")
    return Clip.from_config(config, ClipTokenizer())


def test_a_resnets_convolutions_and_pool_are_masked_and_its_statistics_stay(resnet: Clip) -> None:
    convolutions = [m for m in resnet.image.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(r_amt.maskable(resnet.image)) == len(convolutions) + 2
    before = copy.deepcopy(resnet.state_dict())
    estimator = fitted(resnet.train())
    resnet.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in resnet.state_dict().items())
    assert 0 < estimator.masked_share_ < 1


# --- the authors' files ---


def theirs_of_a_vit(clip: Clip, mlp: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The authors' names with ours and shapes, written down by hand."""
    w, p = 32, 8
    names: dict[str, tuple[str, tuple[int, ...]]] = {"conv1.mask_real": ("patches.weight", (w, 3, p, p))}
    for i in range(2):
        ours, theirs = f"blocks.{i}", f"transformer.resblocks.{i}"
        names[f"{theirs}.attn.mask_real"] = (f"{ours}.attention.qkv.weight", (3 * w, w))
        names[f"{theirs}.attn.out_proj.mask_real"] = (f"{ours}.attention.out.weight", (w, w))
        if mlp:
            names[f"{theirs}.mlp.c_fc.mask_real"] = (f"{ours}.mlp.fc.weight", (4 * w, w))
            names[f"{theirs}.mlp.c_proj.mask_real"] = (f"{ours}.mlp.proj.weight", (w, 4 * w))
    return names


def published(path: Path, bits: dict[str, bytes]) -> Path:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 8e-5}]}
    torch.save({"state_dict": bits, "epoch": 30, "optimizer": optimizer, "val_result": None}, path)
    return path


@pytest.mark.parametrize("mlp", [False, True])
def test_the_authors_files_are_read_without_unpickling(clip: Clip, tmp_path: Path, mlp: bool) -> None:
    generator = np.random.default_rng(0)
    masks = {key: generator.random(shape) > 0.1 for key, (_, shape) in theirs_of_a_vit(clip, mlp).items()}
    path = published(tmp_path / "model.pth.tar-30", {k: np.packbits(m).tobytes() for k, m in masks.items()})
    estimator = RAMT.from_checkpoint(path, clip, NAMES)
    assert estimator.where == ("attention+mlp" if mlp else "attention")
    for key, (ours, _) in theirs_of_a_vit(clip, mlp).items():
        assert np.array_equal(estimator.masks_[ours].numpy(), masks[key])
    assert estimator.predict(pictures()).shape == (6,)


def test_a_resnets_pool_comes_in_three_parts(resnet: Clip, tmp_path: Path) -> None:
    names = r_amt.published_names(resnet, r_amt.maskable(resnet.image))
    assert {
        "conv1.mask_real",
        "conv3.mask_real",
        "layer1.0.conv1.mask_real",
        "layer4.0.downsample.0.mask_real",
    } <= set(names)
    assert [key for key in names if "attnpool" in key] == [f"attnpool.{c}_proj.mask_real" for c in "qkvc"]
    masks = {key: np.ones(shape, bool) for key, (_, shape) in names.items()}
    masks["attnpool.k_proj.mask_real"][:] = False
    path = published(tmp_path / "model.pth.tar-30", {k: np.packbits(m).tobytes() for k, m in masks.items()})
    estimator = RAMT.from_checkpoint(path, resnet, NAMES)
    q, k, v = estimator.masks_["pool.qkv.weight"].chunk(3)
    assert q.all() and not k.any() and v.all()


def test_files_that_do_not_fit_are_refused(clip: Clip, resnet: Clip, tmp_path: Path) -> None:
    names = theirs_of_a_vit(clip)
    bits = {key: bytes(math.prod(shape) // 8) for key, (_, shape) in names.items()}
    path = tmp_path / "model.pth.tar-30"
    cases: list[tuple[Clip, dict[str, Any], str]] = [
        (clip, bits | {"conv1.mask_real": b"abc"}, "3 bytes"),
        (clip, bits | {"conv2.mask_real": b"abc"}, "conv2"),
        (clip, {key: value for key, value in bits.items() if key != "conv1.mask_real"}, "missing"),
        (resnet, bits, "tiny resnet"),
        (clip, {}, "state_dict"),
    ]
    for model, held, said in cases:
        with pytest.raises(CheckpointError, match=said):
            RAMT.from_checkpoint(published(path, held), model, NAMES)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="readable"):
        RAMT.from_checkpoint(path, clip, NAMES)
