"""AMU-Tuning is what its equations say: closed forms, invariances, and autograd on the plain loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.core.images import fit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, EstimatorInputError
from clipworks.methods.adapt import amu_tuning as amu
from clipworks.methods.adapt.amu_tuning import AMUTuning, confidence, standardize
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.features import FeatureStore

NAMES = ["blue thing", "green thing", "red thing"]
Y = np.arange(24) % 3
WIDTH = 16


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(count: int = 24, views: int = 1, seed: int = 0, width: int = WIDTH + 10) -> Tensor:
    """Three overlapping clouds, raw (n, V, 26): [z | a]."""
    centers = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(count, views, width, generator=torch.Generator().manual_seed(seed))
    return 3 * (centers[np.arange(count) % 3][:, None] + noise)


def pictures(count: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 128, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    for row in range(count):
        made[row, 2 - row % 3] += 120
    return list(made)


def logits_of(count: int, classes: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)


def tuner(clip: Clip, **settings: Any) -> AMUTuning:
    return AMUTuning(clip, NAMES, progress=False, **{"auxiliary": Pooled(), "epochs": 3, **settings})


class Pooled(nn.Module):
    """An auxiliary of ten features with statistics that must not move."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.layer = nn.utils.skip_init(nn.Linear, 3 * 16, 10)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
        self.seen: list[Tensor] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels)
        features: Tensor = self.layer(F.avg_pool2d(self.norm(pixels), 8).flatten(1))
        return features


# --- the bias ---


def test_rows_are_standardized_and_blind_to_scale_and_shift_of_the_head() -> None:
    a, W = logits_of(12, 10), logits_of(7, 10, seed=1)
    s, inverse = standardize(a @ W.mT)
    torch.testing.assert_close(s.mean(dim=1), torch.zeros(12).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(s.std(dim=1), torch.ones(12).double())
    torch.testing.assert_close(inverse[:, 0], 1 / (a @ W.mT).std(dim=1))
    v = logits_of(1, 10, seed=2)
    torch.testing.assert_close(standardize(a @ (3.7 * W + v).mT)[0], s, rtol=1e-12, atol=1e-12)
    equal, none = standardize(torch.full((2, 7), 0.1))
    assert not equal.any() and not none.any()


def plain_loss(W: Tensor, a: Tensor, f0: Tensor, y: Tensor, alpha: float, branch: float) -> Tensor:
    """The paper's loss, picture by picture."""
    losses = []
    for row in range(len(a)):
        r = W @ a[row]
        s = (r - r.mean()) / r.std()
        kappa = confidence(f0[row : row + 1])[0]
        fused = F.cross_entropy((f0[row] + alpha * kappa * s)[None], y[row : row + 1])
        losses.append(branch * fused + (1 - branch) * F.cross_entropy(s[None], y[row : row + 1]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("branch", [0.0, 0.35, 1.0])
def test_the_written_gradient_is_autograds(branch: float) -> None:
    a, f0, y = logits_of(12, 10), logits_of(12, 7, seed=3, scale=2), torch.arange(12) % 7
    W = logits_of(7, 10, seed=1).requires_grad_()
    plain_loss(W, a, f0, y, 1.3, branch).backward()
    bias, inverse = standardize(a @ W.detach().mT)
    found = {}
    for alpha in (1.3, 4.0):
        strength = alpha * confidence(f0)
        back = amu.gradient(bias, inverse, f0, strength, F.one_hot(y, 7).double(), branch)
        found[alpha] = back.mT @ a / 12
    assert W.grad is not None
    torch.testing.assert_close(found[1.3], W.grad, rtol=1e-10, atol=1e-12)
    # What the standardization implies: no gradient along W, none common to all classes.
    assert abs((W.grad * W).sum()) < 1e-12 and W.grad.sum(dim=0).abs().max() < 1e-12
    assert torch.equal(found[1.3], found[4.0]) == (branch == 0)


# --- the uncertainty ---


@pytest.mark.parametrize("classes", [5, 10, 1000])
def test_kurtosis_of_a_sure_answer_is_the_closed_form(classes: int) -> None:
    sure = torch.full((1, classes), -1e4, dtype=torch.float64)
    sure[0, 2] = 0
    moment = classes * (1 - 1 / classes) ** 4 + (classes - 1) / classes**3
    # Deviations over C − 1, the mean over C: the published form.
    moment *= ((classes - 1) / classes) ** 2 * (classes / (classes - 1)) ** 2
    assert float(confidence(sure, power=1.0, scale=1.0)) == pytest.approx(1 / moment, rel=1e-9)
    assert float(confidence(sure)) == pytest.approx((classes / 4 / moment) ** 0.4, rel=1e-9)


def test_kurtosis_sees_the_shape_of_p_alone() -> None:
    p = logits_of(6, 10, scale=2).softmax(dim=1)
    expected = confidence(p.log())
    for epsilon in (0.5, 1e-6):
        diluted = (1 - epsilon) / 10 + epsilon * p
        torch.testing.assert_close(confidence(diluted.log()), expected, rtol=1e-7, atol=0)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(confidence(p.log()[:, order]), expected)
    for classes, moment in ((2, 1 / 4), (3, 2 / 3)):
        found = confidence(logits_of(5, classes), power=1.0, scale=1.0)
        torch.testing.assert_close(found, torch.full_like(found, 1 / moment))
    thousand = logits_of(4, 1000)
    torch.testing.assert_close(confidence(thousand), confidence(thousand, scale=250.0))


def test_every_kind_is_its_formula_and_finite_where_it_is_not_defined() -> None:
    f0 = logits_of(6, 7, scale=3)
    p = f0.softmax(dim=1)
    top = p.sort(dim=1, descending=True).values
    entropy = -(p * p.log2()).sum(dim=1) / math.log2(7)
    energy = 2 * (((p - top[:, :1]) / 2).exp().sum(dim=1).log() + top[:, 0])
    expected = {
        "none": torch.ones(6).double(),
        "entropy": (0.4 * entropy).exp(),
        "max": top[:, 0] ** -0.4,
        "max-min": (top[:, 0] - top[:, -1]) ** -0.4,
        "top5": (top[:, 0] - top[:, 4]) ** -0.4,
        "energy": energy**-0.4,
        "var": p.std(dim=1),
    }
    kinds: list[Any] = [*expected]
    for kind in kinds:
        torch.testing.assert_close(confidence(f0, kind)[:, 0], expected[kind])
    for kind in [*kinds, "moment"]:
        for hard in (torch.zeros(1, 7), torch.tensor([[0.0, *[-1e4] * 6]])):
            assert confidence(hard, kind).isfinite().all(), kind
    assert float(confidence(torch.zeros(1, 7))) == 1
    with pytest.raises(ConfigError, match="five classes"):
        confidence(f0[:, :4], "top5")


# --- the estimator ---


def test_without_weight_it_is_zero_shot_bit_for_bit(clip: Clip) -> None:
    X = features()
    found = tuner(clip, alpha=0).fit(X, Y).logits(X[:, 0])
    assert torch.equal(found, ZeroShot(clip, NAMES).fit().logits(X[:, 0, :WIDTH]))


def test_it_starts_at_the_class_means_of_what_the_views_average_to(clip: Clip) -> None:
    X, y = features(count=7, views=3), np.array([0, 0, 0, 0, 1, 2, 2])
    weights = np.array([1, 2, 1, 1, 1, 1, 3])
    a = unit(X[..., WIDTH:].mean(dim=1))
    expected = torch.stack(
        [
            (a[y == c] * torch.tensor(weights[y == c])[:, None]).sum(0) / weights[y == c].sum()
            for c in range(3)
        ]
    )
    fitted = tuner(clip, lr=1e-12, epochs=1).fit(X, y, sample_weight=weights)
    torch.testing.assert_close(fitted.head_, expected, rtol=0, atol=1e-6)
    random = tuner(clip, lr=1e-12, epochs=1, init="random").fit(X, y).head_
    assert random.abs().max() <= 10**-0.5 and (random - expected).abs().max() > 0.1


def test_with_one_picture_a_class_the_bias_is_the_nearest_neighbors(clip: Clip) -> None:
    X = features(count=3)
    fitted = tuner(clip, lr=1e-12).fit(X, [0, 1, 2])
    test = features(seed=4)[:, 0, WIDTH:]
    nearest = (unit(test) @ unit(X[:, 0, WIDTH:]).mT).argmax(dim=1)
    assert torch.equal(fitted.bias_logits(test).argmax(dim=1), nearest)
    assert fitted.epochs_ == 1


def test_the_fit_is_torchs_adamw_on_the_plain_loss(clip: Clip) -> None:
    X = features().double()
    fitted = tuner(clip, alpha=0.7, epochs=4, batch_size=5).fit(X, Y)
    a, y = unit(X[:, 0, WIDTH:]), torch.from_numpy(Y)
    f0 = ZeroShot(clip, NAMES).fit().logits(X[:, 0, :WIDTH]).double()
    W = nn.Parameter(torch.stack([a[y == c].mean(dim=0) for c in range(3)]))
    optimizer = torch.optim.AdamW([W], lr=1e-3, weight_decay=0.01, eps=1e-4)
    number, steps = 0, 4 * 5
    for epoch in range(4):
        for rows in amu.rows_of_epoch(24, 5, 0, epoch, False):
            optimizer.param_groups[0]["lr"] = 0.5e-3 * (1 + math.cos(math.pi * number / steps))
            optimizer.zero_grad()
            plain_loss(W, a[rows], f0[rows], y[rows], 0.7, 0.35).backward()
            optimizer.step()
            number += 1
    torch.testing.assert_close(fitted.head_.double(), W.detach(), rtol=1e-6, atol=1e-6)


def test_heads_of_several_alphas_are_those_of_each(clip: Clip) -> None:
    X, held = features(), features(seed=7, count=30)
    y = np.arange(30) % 3
    grid = tuner(clip)
    searched = grid.fit(X, Y, validation=(held, y))
    best: tuple[float, int, float] = (-1.0, 0, 0.0)
    middle = 0.5 * math.sqrt(1000 / 3)
    for alpha in [middle * factor for factor in (0.25, 0.5, 1, 2, 4)]:
        one = tuner(clip, alpha=alpha).fit(X, Y, validation=(held, y))
        accuracy = one.score(held[:, 0], y)
        if accuracy > best[0]:
            best = (accuracy, one.epochs_, alpha)
            head = one.head_
    assert (searched.score(held[:, 0], y), searched.epochs_, searched.alpha_) == pytest.approx(best)
    torch.testing.assert_close(searched.head_, head, rtol=1e-4, atol=1e-5)
    assert tuner(clip).fit(X, Y).alpha_ == pytest.approx(middle)


def test_each_view_is_seen_once_before_any_is_seen_again(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    X = features(count=6, views=3)
    marks = unit(X[..., WIDTH:]).flatten(0, 1)
    seen: list[Tensor] = []
    plain = amu.standardize

    def spy(raw: Tensor) -> Any:
        seen.append(raw.flatten(1))
        return plain(raw)

    monkeypatch.setattr(amu, "standardize", spy)
    head = tuner(clip, lr=1e-30, epochs=3, batch_size=2).fit(X, np.arange(6) % 3).head_
    raw = torch.cat(seen)
    assert len(raw) == 18
    found = torch.cdist(raw, marks @ head.mT).argmin(dim=1)
    assert sorted(found.tolist()) == list(range(18))
    assert [sorted((found[6 * e : 6 * e + 6] // 3).tolist()) for e in range(3)] == [list(range(6))] * 3


# --- the two encoders ---


def test_both_encoders_see_the_same_view_and_neither_changes(clip: Clip) -> None:
    auxiliary = Pooled().train()
    before = {name: tensor.clone() for name, tensor in auxiliary.state_dict().items()}
    seen = []
    handle = clip.image.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    fitted = tuner(clip, auxiliary=auxiliary, views=2).fit(pictures(), np.arange(6) % 3)
    handle.remove()
    assert len(seen) == len(auxiliary.seen) == 2
    for one, other in zip(seen, auxiliary.seen, strict=True):
        assert torch.equal(one.float() / (255 if one.dtype == torch.uint8 else 1), other)
    assert not torch.equal(seen[0], seen[1])
    assert auxiliary.training
    assert all(torch.equal(before[name], tensor) for name, tensor in auxiliary.state_dict().items())
    assert fitted.head_.shape == (3, 10) and fitted.trainable_parameters == 30


def test_anything_that_makes_features_of_pixels_is_an_auxiliary(
    clip: Clip, tiny_clip: Callable[..., Any]
) -> None:
    X, y = pictures(), np.arange(6) % 3
    other: Clip = tiny_clip(1, image={"image_size": 48}, tokenizer=ClipTokenizer())
    pixels = torch.stack(X).float() / 255
    with torch.no_grad():
        expected = {
            "patches": clip.image.run(clip.image.place(clip.image.read(pixels)))[:, 1:].mean(dim=1),
            "clip": other.image(fit(pixels, 48)),
            "function": pixels.mean(dim=(2, 3)),
        }
    given: dict[str, Any] = {"patches": "patches", "clip": other, "function": lambda x: x.mean(dim=(2, 3))}
    for name, auxiliary in given.items():
        fitted = tuner(clip, auxiliary=auxiliary, views=0).fit(X, y)
        both = fitted._encoded(X, amu_views())[:, 0]
        torch.testing.assert_close(both[:, WIDTH:], expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[:, :WIDTH], clip.image(pixels).detach(), rtol=1e-4, atol=1e-5)
        again = tuner(clip, auxiliary=auxiliary).fit(both, y)
        assert np.allclose(again.predict_proba(both), fitted.predict_proba(X), atol=1e-4)
    with pytest.raises(ConfigError, match=r"\(B, D_a\)"):
        tuner(clip, auxiliary=lambda x: x).fit(X, y)


def amu_views() -> Any:
    from clipworks.parts.features import Views

    return Views()


def test_a_store_and_a_file_tell_auxiliaries_apart(clip: Clip, tmp_path: Path) -> None:
    X, y, store = pictures(), np.arange(6) % 3, FeatureStore(tmp_path / "store")
    fitted = {seed: tuner(clip, auxiliary=Pooled(seed), store=store).fit(X, y) for seed in (0, 1)}
    alone = tuner(clip, auxiliary=Pooled(1)).fit(X, y)
    assert np.array_equal(fitted[1].predict_proba(X), alone.predict_proba(X))
    assert not np.array_equal(fitted[0].predict_proba(X), alone.predict_proba(X))
    with pytest.raises(ConfigError, match=r"nn\.Module"):
        tuner(clip, auxiliary=lambda x: x.mean(dim=(2, 3)), store=store).fit(X, y)
    folder = fitted[0].save(tmp_path / "run")
    loaded = Adapter.load(folder, clip, auxiliary=Pooled(0))
    assert np.array_equal(loaded.predict_proba(X), fitted[0].predict_proba(X))
    with pytest.raises(CheckpointError, match="another auxiliary"):
        Adapter.load(folder, clip, auxiliary=Pooled(1))
    with pytest.raises(ConfigError, match="auxiliary"):
        Adapter.load(folder, clip)


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -1}, {"alpha": "best"}, {"branch_weight": 1.5}, {"uncertainty": "margin"},
        {"init": "zeros"}, {"epochs": 0}, {"lr": 0.0}, {"auxiliary": "dino"},
    ],
)  # fmt: skip
def test_settings_without_meaning_are_named(clip: Clip, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        tuner(clip, **wrong).fit(features(), Y)


def test_features_without_their_auxiliary_part_are_refused(clip: Clip) -> None:
    with pytest.raises(EstimatorInputError, match="auxiliary='own'"):
        tuner(clip).fit(features()[..., :WIDTH], Y)
    with pytest.raises(EstimatorInputError, match="CLIP's alone"):
        tuner(clip, auxiliary="own").fit(features(), Y)
    with pytest.raises(ConfigError, match=r"'green thing'.*counts"):
        tuner(clip).fit(features(count=3), NAMES, sample_weight=[1, 0, 1])


# --- released files ---


@pytest.mark.checkpoint("amu-tuning")
def test_the_three_layouts_of_a_released_head_load_alike(clip: Clip, tmp_path: Path) -> None:
    W, path = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), tmp_path / "head.pt"
    layouts = [{"fc.weight": W}, {"state_dict": {"fc.weight": W}}, W, nn.Parameter(W)]
    loaded = []
    for layout in layouts:
        torch.save(layout, path)
        loaded.append(AMUTuning.from_checkpoint(path, clip, NAMES, auxiliary=Pooled(), alpha=0.5))
    found = [one.predict_proba(pictures()) for one in loaded]
    assert all(torch.equal(one.head_, W) for one in loaded)
    assert all(np.array_equal(found[0], one) for one in found)
    assert loaded[0].uncertainty == "none"
    wrong = [
        (W.mT.contiguous(), r"\(3, 10\)"),
        ({"fc.weight": W, "fc.bias": torch.zeros(3)}, "fc.bias"),
        ({"fc.weight": W[:2]}, r"\(3, 10\)"),
        ({"fc.weight": W * math.nan}, "not finite"),
        (nn.Linear(2, 2), "more than tensors"),
    ]
    for layout, said in wrong:
        torch.save(layout, path)
        with pytest.raises(CheckpointError, match=said):
            AMUTuning.from_checkpoint(path, clip, NAMES, auxiliary=Pooled(), alpha=0.5)
    with pytest.raises(CheckpointError, match="no such file"):
        AMUTuning.from_checkpoint(tmp_path / "none.pt", clip, NAMES, alpha=0.5)


def test_what_a_released_head_does_not_say_is_chosen_on_pictures(clip: Clip, tmp_path: Path) -> None:
    X, y, path = pictures(12, seed=5), np.arange(12) % 3, tmp_path / "head.pt"
    fitted = tuner(clip, epochs=20).fit(X, y)
    torch.save({"fc.weight": fitted.head_}, path)
    with pytest.raises(ConfigError, match="does not say"):
        AMUTuning.from_checkpoint(path, clip, NAMES, auxiliary=Pooled())
    loaded = AMUTuning.from_checkpoint(path, clip, NAMES, auxiliary=Pooled(), validation=(X, y))
    assert len(loaded.released_accuracies_) == 8
    assert loaded.score(X, y) == max(loaded.released_accuracies_.values())
    again = Adapter.load(loaded.save(tmp_path / "run"), clip, auxiliary=Pooled())
    assert np.array_equal(again.predict_proba(X), loaded.predict_proba(X))
