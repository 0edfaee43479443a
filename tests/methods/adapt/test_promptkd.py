"""Distillation is what its equations say, needs no labels, and leaves everything but the student alone."""

from __future__ import annotations

import copy
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
from clipworks.core.config import uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError
from clipworks.methods.adapt import promptkd
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.promptkd import PromptKD, PromptSRC, Teacher, distillation
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.prompts import random_prompts
from clipworks.parts.shots import Shots, Step

NAMES = ["cat", "dog", "fish"]


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


@pytest.fixture(scope="module")
def large(tiny_clip: Callable[..., Any]) -> Clip:
    """A teacher that is wider, sees more pixels and has another scale."""
    blocks = uniform_blocks(depth=2, width=32, heads=2)
    made: Clip = tiny_clip(
        7, tokenizer=ClipTokenizer(), width=24, image={"image_size": 48, "patch_size": 16, "blocks": blocks}
    )
    with torch.no_grad():
        made.scale.fill_(math.log(30.0))
    return made


def pictures(count: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(count)]


def student(clip: Clip, teacher: Any, **settings: Any) -> PromptKD:
    given = {"epochs": 2, "batch_size": 4, "views": 2, "vision_length": 2, "progress": False, **settings}
    return PromptKD(clip, NAMES, teacher=teacher, **given)


# --- the loss ---


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_a_naive_double_loop(temperature: float) -> None:
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    for b in range(5):
        P, Q = ([math.exp(float(x) / temperature) for x in row[b]] for row in (p, q))
        kl = sum(x / sum(P) * math.log((x / sum(P)) / (y / sum(Q))) for x, y in zip(P, Q, strict=True))
        assert float(distillation(p, q, temperature)[b]) == pytest.approx(temperature**2 * kl)
    assert float(distillation(p, q, temperature).min()) >= 0


def test_every_class_twice_leaves_a_pictures_loss_and_halves_the_authors(clip: Clip, large: Clip) -> None:
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twice = distillation(p.repeat(1, 2), q.repeat(1, 2))
    torch.testing.assert_close(twice, distillation(p, q))
    by_picture, by_number = (
        student(clip, large, normalize=how, epochs=1, lr=1e-12).fit(pictures())
        for how in ("picture", "numel")
    )
    assert by_picture.losses_[0] == pytest.approx(3 * by_number.losses_[0], rel=1e-5)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(clip: Clip) -> None:
    p = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(distillation(p.detach(), p).mean(), p)
    loss = distillation(p, p).detach().abs().max()
    assert float(loss) < 1e-10 > float(gradient.abs().max())
    kd = student(clip, clip, views=0, epochs=1).fit(pictures())
    kd.module_ = nn.ModuleDict({"vision": nn.ParameterList(), "projector": nn.Identity()})
    pixels, ones = torch.stack(pictures(4)), torch.ones(4)
    shots = Shots(torch.zeros(4, dtype=torch.int64), ones, pixels=pixels, keys=list("abcd"))
    with torch.no_grad():
        loss = kd._loss(Step(pixels, shots.labels, ones, torch.arange(4), 0, shots))
    assert abs(float(loss)) < 1e-5


def test_a_steps_loss_is_that_of_both_models_on_the_same_view(clip: Clip, large: Clip) -> None:
    kd = student(clip, large, temperature=2.0, kd_weight=3.0, views=0, epochs=1).fit(pictures())
    pixels = torch.stack(pictures(4)).float() / 255
    weights = torch.tensor([0.5, 1.0, 1.5, 1.0])
    shots = Shots(torch.zeros(4, dtype=torch.int64), weights, pixels=pixels, keys=list("abcd"))
    step = Step(pixels, shots.labels, weights, torch.arange(4), 0, shots)
    with torch.no_grad():
        found = kd._loss(step)
        T = large.class_features([f"a photo of a {name}." for name in NAMES], templates=("{}",))
        bigger = F.interpolate(pixels, (48, 48), mode="bicubic", antialias=True).clamp(0, 1)
        p = 30 * unit(large.image(bigger)) @ T.mT
        q = math.exp(float(clip.scale)) * unit(kd._encode(pixels)) @ T.mT
        P, Q = (p / 2).log_softmax(1), (q / 2).log_softmax(1)
        expected = 3 * 4 * (weights * (P.exp() * (P - Q)).sum(dim=1)).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


# --- what learns and what does not ---


def test_labels_are_refused_and_make_no_difference(clip: Clip, large: Clip) -> None:
    with pytest.raises(ConfigError, match="without labels"):
        student(clip, large).fit(pictures(), ["cat"] * 12)
    with pytest.raises(ConfigError, match="validation"):
        student(clip, large).fit(pictures(), validation=(pictures(), ["cat"] * 12))


def test_prompts_and_projector_learn_and_nothing_else_does(clip: Clip, large: Clip) -> None:
    before = [copy.deepcopy(one.state_dict()) for one in (clip, large)]
    start, learned = (student(clip, large, lr=lr).fit(pictures()) for lr in (1e-12, 0.05))
    for one, state in zip((clip, large), before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in one.state_dict().items())
    assert torch.equal(start.text_vectors_, learned.text_vectors_)
    assert not learned.text_vectors_.requires_grad
    moved = {name for name, _ in learned.module_.named_parameters()}
    assert moved == {f"vision.{i}" for i in range(2)} | {
        f"projector.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")
    }
    for name, parameter in learned.module_.named_parameters():
        assert not torch.allclose(parameter, start.module_.get_parameter(name)), name


def test_the_paper_has_about_a_million_numbers_to_learn() -> None:
    prompts, g = random_prompts(9, 4, 768), promptkd.projector(512, 768)
    assert sum(p.numel() for p in prompts) == 27_648
    assert sum(p.numel() for p in [*prompts, *g.parameters()]) == 1_013_760
    assert len([*prompts, *g.parameters()]) == 15


def test_the_student_comes_nearer_to_its_teacher(clip: Clip, large: Clip) -> None:
    kd = student(clip, large, epochs=30, lr=0.02, views=0, batch_size=12).fit(pictures())
    assert kd.losses_[-1] < 0.5 * kd.losses_[0]
    teacher = ZeroShot(large, NAMES).fit().predict(pictures())
    assert (kd.predict(pictures()) == teacher).mean() > 0.8


def test_the_teacher_is_asked_once_a_view(clip: Clip, large: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = Teacher.logits
    monkeypatch.setattr(
        Teacher, "logits", lambda self, pixels, T: asked.append(len(pixels)) or ask(self, pixels, T)
    )
    cached = student(clip, large, epochs=6, views=2).fit(pictures())
    assert sum(asked) == 24
    asked.clear()
    always = student(clip, large, epochs=6, views=6).fit(pictures())
    assert sum(asked) == 72
    assert cached.losses_[:2] == pytest.approx(always.losses_[:2], rel=1e-4)


def test_patience_goes_by_the_distance_to_the_teacher(clip: Clip, large: Clip) -> None:
    held = pictures(6, 3)
    kd = student(clip, clip, patience=1, epochs=4).fit(pictures(), validation=(held, None))
    with torch.no_grad():
        p = kd._teacher.logits(torch.stack(held), kd.text_vectors_)
        kl = float(distillation(p, kd.logits(kd.image_features(held))).mean())
    assert kd._accuracy(kd._read_more(held, None)) == pytest.approx(math.exp(-kl), rel=1e-4)


# --- prediction ---


def test_a_picture_alone_is_that_picture_in_a_batch(clip: Clip, large: Clip) -> None:
    kd = student(clip, large).fit(pictures())
    together, alone = kd.predict_proba(pictures()), [kd.predict_proba([one])[0] for one in pictures()]
    assert np.allclose(together, alone, atol=1e-6)


def test_base_and_new_are_columns_of_all_and_order_permutes_them(clip: Clip, large: Clip) -> None:
    kd = student(clip, large).fit(pictures())
    features = kd.image_features(pictures())
    every = kd.logits(features)
    torch.testing.assert_close(kd.for_classes(["fish", "cat"]).logits(features), every[:, [0, 2]])
    new = kd.for_classes(["bird", "dog"])
    torch.testing.assert_close(new.logits(features)[:, 1], every[:, 1])
    expected = ZeroShot(large, ["bird", "dog"]).fit().class_features()
    torch.testing.assert_close(new.class_features(), expected)


def test_new_names_need_the_very_teacher(clip: Clip, large: Clip, tmp_path: Path) -> None:
    kd = student(clip, large).fit(pictures())
    loaded = Adapter.load(kd.save(tmp_path / "run"), clip)
    assert np.array_equal(loaded.predict_proba(pictures()), kd.predict_proba(pictures()))
    assert list(loaded.for_classes(["dog", "cat"]).classes_) == ["cat", "dog"]
    with pytest.raises(ConfigError, match="bird"):
        loaded.for_classes(["bird", "dog"])
    with pytest.raises(ConfigError, match="has changed"):
        loaded.set_params(teacher=clip).for_classes(["bird", "dog"])


def test_an_adapted_clip_teaches_with_its_own_logits(clip: Clip) -> None:
    y = np.array(["fish", "dog", "cat"] * 4)
    probe = LinearProbe(clip, progress=False).fit(pictures(), y)
    teacher = Teacher(probe, ZeroShot(clip, ["fish", "cat"]).fit().texts_)
    pixels = torch.stack(pictures())
    found = teacher.logits(pixels, teacher.vectors())
    expected = probe.logits(probe.image_features(pictures()))[:, [0, 2]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.vectors(), probe.class_features()[[0, 2]])
    with pytest.raises(ConfigError, match="bird"):
        Teacher(probe, ZeroShot(clip, ["bird", "cat"]).fit().texts_)
    assert student(clip, probe).fit(pictures()).score(pictures(), y) >= 0


def test_settings_that_cannot_work_are_refused(clip: Clip, large: Clip) -> None:
    for settings, said in (
        ({"normalize": "sum"}, "sum"),
        ({"temperature": 0.0}, "temperature"),
        ({"kd_weight": -1.0}, "kd_weight"),
        ({"batch_size": 1}, "two pictures"),
        ({"teacher": None}, "NoneType"),
    ):
        with pytest.raises(ConfigError, match=said):
            student(clip, large).set_params(**settings).fit(pictures())
    with pytest.raises(ConfigError, match="two pictures"):
        student(clip, large).fit(pictures(1))


# --- the authors' teacher ---


def test_its_loss_is_that_of_the_equations(clip: Clip) -> None:
    src = PromptSRC(clip, NAMES, length=2, epochs=2, average_at=2.0, batch_size=4, progress=False)
    src.fit(pictures(), ["fish", "dog", "cat"] * 4)
    pixels, labels, weights = torch.stack(pictures(4)), torch.tensor([0, 1, 2, 0]), torch.ones(4)
    shots = Shots(labels, weights, pixels=pixels, keys=list("abcd"))
    with torch.no_grad():
        found = src._loss(Step(pixels, labels, weights, torch.arange(4), 0, shots))
        f0, f, t = unit(clip.image(pixels)), unit(src._encode(pixels)), src.class_features()
        raw = [
            torch.stack(
                [clip.text(clip.tokenizer([one.replace("{}", name)])) for one in promptkd.IMAGENET_TEMPLATES]
            ).mean(dim=0)
            for name in NAMES
        ]
        t0 = unit(torch.cat(raw))
        p, q = (src.scale * f0 @ t0.mT).softmax(1), (src.scale * f @ t.mT).softmax(1)
        expected = (
            F.nll_loss(q.log(), labels)
            + 25 * (t - t0).abs().mean()
            + 10 * (f - f0).abs().mean()
            + (p * (p / q).log()).sum() / (4 * 3)
        )
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_the_average_is_gaussian_over_epochs() -> None:
    average, layer = promptkd.EpochAverage(20, 15, 1), nn.Linear(1, 1, bias=False)
    assert sum(average.weights) == pytest.approx(1)
    assert np.argmax(average.weights) + 1 == 15
    assert average.weights[13] / average.weights[14] == pytest.approx(math.exp(-0.5))
    for epoch in range(1, 21):
        nn.init.constant_(layer.weight, epoch)
        average.add(layer)
    assert float(average.state["weight"]) == pytest.approx(15, abs=1e-4)
    with pytest.raises(ConfigError, match="no epoch"):
        promptkd.EpochAverage(3, 150, 1)


def test_what_is_deployed_is_the_average_of_the_epochs(clip: Clip) -> None:
    y = ["fish", "dog", "cat"] * 4
    settings: dict[str, Any] = {
        "length": 2,
        "batch_size": 4,
        "lr": 0.1,
        "average_over": 1e-3,
        "progress": False,
    }
    # All of the weight is on epoch 3, so later epochs are of no account.
    one = PromptSRC(clip, NAMES, epochs=4, average_at=3.0, **settings).fit(pictures(), y)
    other = PromptSRC(clip, NAMES, epochs=4, average_at=4.0, **settings).fit(pictures(), y)
    assert not torch.equal(one.module_["vision"][0], other.module_["vision"][0])
    assert one.losses_ == other.losses_


# --- released files ---


def teacher_file(path: Path, clip: Clip, depth: int = 2, **changes: Any) -> Path:
    """A file of the authors' first stage: prompts, embeddings of classes, second and frozen towers."""
    draw = torch.Generator().manual_seed(depth)
    deep = "{}.transformer.resblocks.{}.VPT_shallow"
    weights: dict[str, Any] = {
        "prompt_learner.ctx": torch.randn(4, 32, generator=draw),
        "prompt_learner.token_prefix": torch.randn(3, 1, 32, generator=draw),
        "prompt_learner.token_suffix": torch.randn(3, 72, 32, generator=draw),
        "prompt_learner.token_prefix2": torch.randn(3, 1, 32, generator=draw),
        "prompt_learner.ZS_image_encoder.conv1.weight": torch.zeros(1),
        "image_encoder.VPT": torch.randn(4, 32, generator=draw),
        "image_encoder.conv1.weight": clip.image.patches.weight.detach().half(),  # type: ignore[union-attr]
        "logit_scale": clip.scale.detach().half(),
    }
    for i in range(1, depth):
        for tower in ("text_encoder", "image_encoder"):
            weights[deep.format(tower, i)] = torch.randn(4, 32, generator=draw)
    weights = {name: value for name, value in {**weights, **changes}.items() if value is not None}
    torch.save({"state_dict": weights, "epoch": 20}, path)
    return path


def student_file(path: Path, **changes: Any) -> Path:
    """A file of the second stage, its projector being 1 × 1 convolutions; the teacher is 24 wide."""
    draw = torch.Generator().manual_seed(5)
    inner = "VPT_image_trans.conv1."
    weights: dict[str, Any] = {
        "image_encoder.VPT": torch.randn(4, 32, generator=draw),
        "image_encoder.transformer.resblocks.1.VPT_shallow": torch.randn(4, 32, generator=draw),
        f"{inner}0.weight": torch.randn(24, 16, 1, 1, generator=draw).half(),
        f"{inner}0.bias": torch.randn(24, generator=draw).half(),
        f"{inner}1.weight": torch.rand(24, generator=draw),
        f"{inner}1.bias": torch.randn(24, generator=draw),
        f"{inner}1.running_mean": torch.randn(24, generator=draw),
        f"{inner}1.running_var": torch.rand(24, generator=draw) + 0.5,
        f"{inner}1.num_batches_tracked": torch.tensor(40),
        f"{inner}3.weight": torch.randn(24, 24, 1, 1, generator=draw).half(),
        f"{inner}3.bias": torch.randn(24, generator=draw).half(),
    }
    weights = {name: value for name, value in {**weights, **changes}.items() if value is not None}
    torch.save({"state_dict": weights, "epoch": 20}, path)
    return path


@pytest.mark.checkpoint("promptkd")
def test_a_released_teacher_has_its_own_prompts_and_depth(clip: Clip, tmp_path: Path) -> None:
    for depth in (1, 2):
        path = teacher_file(tmp_path / "model-best.pth.tar", clip, depth)
        held = torch.load(path, weights_only=True)["state_dict"]
        src = PromptSRC.from_checkpoint(path, clip, ["fish", "cat"])
        assert (src.depth, src.length) == (depth, 4)
        assert torch.equal(src.module_["text"][0], held["prompt_learner.ctx"])
        assert torch.equal(src.module_["vision"][-1], list(held.values())[-1 if depth > 1 else 5])
        again = PromptSRC.from_checkpoint(path, clip, ["cat", "fish"])
        assert torch.equal(src.class_features(), again.class_features())
        assert src.predict(pictures()).tolist() == again.predict(pictures()).tolist()


@pytest.mark.checkpoint("promptkd")
def test_a_released_student_is_projected_by_its_convolutions(clip: Clip, large: Clip, tmp_path: Path) -> None:
    path = student_file(tmp_path / "model.pth.tar-20")
    held = torch.load(path, weights_only=True)["state_dict"]
    kd = PromptKD.from_checkpoint(path, clip, NAMES, large)
    pixels = torch.stack(pictures()).float() / 255
    inner = {
        name.removeprefix("VPT_image_trans.conv1."): t.float() for name, t in held.items() if "conv1" in name
    }
    with torch.no_grad():
        prompts = [held["image_encoder.VPT"], held["image_encoder.transformer.resblocks.1.VPT_shallow"]]
        f = promptkd.prompted_images(promptkd.vision_tower(clip), pixels, prompts)[:, :, None, None]
        h = F.conv2d(f, inner["0.weight"], inner["0.bias"])
        h = F.batch_norm(
            h, inner["1.running_mean"], inner["1.running_var"], inner["1.weight"], inner["1.bias"]
        )
        expected = unit(F.conv2d(h.relu(), inner["3.weight"], inner["3.bias"])[:, :, 0, 0])
    torch.testing.assert_close(kd.image_features(pictures()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kd.class_features(), ZeroShot(large, NAMES).fit().class_features())
    again = Adapter.load(kd.save(tmp_path / "run"), clip)
    assert np.array_equal(again.predict_proba(pictures()), kd.predict_proba(pictures()))


@pytest.mark.checkpoint("promptkd")
def test_a_released_file_that_does_not_fit_is_refused(clip: Clip, large: Clip, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth.tar"
    for changes, said in (
        ({"prompt_learner.ctx": None}, "prompt_learner.ctx is missing"),
        ({"image_encoder.VPT": torch.zeros(4, 31)}, "VPT has shape"),
        ({"image_encoder.VPT": torch.zeros(2, 32)}, "VPT_shallow has shape"),
        ({"text_encoder.transformer.resblocks.1.VPT_shallow": None}, "as many in both"),
        ({"adapter.weight": torch.zeros(1)}, "adapter.weight"),
        ({"image_encoder.conv1.weight": torch.zeros(32, 3, 8, 8)}, "another Clip"),
    ):
        with pytest.raises(CheckpointError, match=said):
            PromptSRC.from_checkpoint(teacher_file(path, clip, **changes), clip, NAMES)
    for changes, said in (
        ({"VPT_image_trans.conv1.3.weight": None}, "conv1.3.weight is missing"),
        ({"VPT_image_trans.conv1.0.weight": torch.zeros(24, 17, 1, 1)}, "conv1.0.weight has shape"),
        ({"VPT_image_trans.conv2.weight": torch.zeros(1)}, "conv2.weight"),
    ):
        with pytest.raises(CheckpointError, match=said):
            PromptKD.from_checkpoint(student_file(path, **changes), clip, NAMES, large)
