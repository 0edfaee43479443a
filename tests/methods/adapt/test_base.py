"""What the base of the family does for every method: views, training, selection, disk, messages."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.captions import ClassTexts
from clipworks.errors import CheckpointError, ConfigError, EstimatorInputError, MissingExtra
from clipworks.methods.adapt import base
from clipworks.methods.adapt.base import Adapter, ImageTower, TrainedAdapter, method_named, methods
from clipworks.methods.adapt.nearest_mean import NearestMean
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.schedules import Schedule
from clipworks.parts.shots import Shots, Step


@dataclass(eq=False, repr=False, kw_only=True)
class Head(TrainedAdapter):
    """Class vectors from those of the names; records what its steps were shown."""

    lr: float = 0.1
    epochs: int = 3
    batch_size: int = 4
    words: Any = None
    schedule: ClassVar[Schedule] = Schedule("adam", weight_decay=0.0, decay="constant")
    slug: ClassVar[str] = "head"

    def _prepare(self, shots: Shots | None) -> nn.Module:
        self.steps: list[Step] = []
        return nn.ParameterDict({"classes": super()._class_features().clone()})

    def _class_features(self) -> Tensor:
        return unit(self.module_["classes"])

    def _loss(self, step: Step) -> Tensor:
        self.steps.append(step)
        return super()._loss(step)


class PixelHead(Head):
    image_tower: ClassVar[ImageTower] = "trained"
    slug: ClassVar[str] = "pixel-head"


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def pixels(count: int = 12) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


Y = ["cat", "dog", "big_fish"] * 4


def test_every_view_is_seen_once_in_as_many_epochs(clip: Clip) -> None:
    head = Head(clip, views=3, epochs=6).fit(pixels(), Y)
    features = head.steps[0].shots.vectors
    assert features.shape == (12, 3, 16)
    seen: dict[int, list[int]] = {}
    for step in head.steps:
        for row, shown in zip(step.rows.tolist(), step.inputs, strict=True):
            (view,) = [v for v in range(3) if torch.equal(features[row, v], shown)]
            seen.setdefault(row, []).append(view)
    assert all(sorted(views[:3]) == sorted(views[3:]) == [0, 1, 2] for views in seen.values())
    assert len({tuple(views) for views in seen.values()}) > 1  # not in step with each other


def test_training_with_pictures_makes_a_new_view_in_every_epoch(clip: Clip) -> None:
    head = PixelHead(clip, views=1, epochs=3).fit(pixels(), Y)
    by_row: dict[int, list[Tensor]] = {}
    for step in head.steps:
        assert step.inputs.shape[1:] == (3, 32, 32)
        for row, shown in zip(step.rows.tolist(), step.inputs, strict=True):
            by_row.setdefault(row, []).append(shown)
    assert all(not torch.equal(a, b) for a, b, _ in by_row.values())
    again = PixelHead(clip, views=1, epochs=3).fit(pixels(), Y)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(head.steps, again.steps, strict=True))
    plain = PixelHead(clip, epochs=1).fit(pixels(), Y)
    assert all(step.inputs.dtype == torch.uint8 for step in plain.steps)


def test_a_picture_trained_method_predicts_from_pictures_alone(clip: Clip) -> None:
    head = PixelHead(clip, epochs=1).fit(pixels(), Y)
    assert head.predict(pixels()).shape == (12,)
    with pytest.raises(EstimatorInputError, match="pictures, not features"):
        head.predict(torch.zeros(2, 16))
    with pytest.raises(EstimatorInputError, match="trains with pictures"):
        PixelHead(clip).fit(torch.zeros(12, 16), Y)


def test_the_best_epoch_on_validation_is_kept(clip: Clip) -> None:
    X = pixels()
    accuracies = iter([0.2, 0.9, 0.5, 0.4, 0.3])
    kept: list[Tensor] = []

    def accuracy(self: Head, shots: Shots) -> float:
        kept.append(self.module_["classes"].detach().clone())
        return next(accuracies)

    with mock.patch.object(Head, "_accuracy", accuracy):
        head = Head(clip, epochs=20, patience=2).fit(X, Y, validation=(X, Y))
    assert len(head.losses_) == 4  # two epochs without a better one
    assert torch.equal(head.module_["classes"], kept[1])


def test_without_validation_data_a_fifth_of_each_class_is_held_out(clip: Clip) -> None:
    seen: list[int] = []

    def accuracy(self: Head, shots: Shots) -> float:
        seen.append(len(shots))
        assert shots.counts(3).tolist() == [1, 1, 1]
        return 0.0

    with mock.patch.object(Head, "_accuracy", accuracy):
        head = Head(clip, patience=5).fit(pixels(), Y)
    assert seen and set(seen) == {3}
    assert len(head.steps[0].shots) == 9
    with pytest.raises(EstimatorInputError, match="single picture"):
        Head(clip, patience=1).fit(pixels(3), Y[:3])


def test_accuracy_on_validation_is_that_of_predict(clip: Clip) -> None:
    X, measured = pixels(), []
    original = Head._accuracy

    def accuracy(self: Head, shots: Shots) -> float:
        measured.append(original(self, shots))
        return measured[-1]

    with mock.patch.object(Head, "_accuracy", accuracy):
        head = Head(clip, epochs=1, patience=1).fit(X, Y, validation=(X[:7], Y[:7]))
    assert measured == [pytest.approx(head.score(X[:7], Y[:7]))]


def test_sample_weights_act_in_proportion(clip: Clip) -> None:
    """One step over all: the gradient times the sum of the weights is linear in the weights."""

    def shift(**options: Any) -> Tensor:
        head = Head(clip, epochs=1, batch_size=12)
        with mock.patch.object(Head, "schedule", Schedule("sgd", weight_decay=0.0, decay="constant")):
            head.fit(pixels(), Y, **options)
        return head.module_["classes"].detach() - class_start

    class_start = ZeroShot(clip).fit(pixels(), Y).class_features()
    one, other = np.arange(1, 13) / 3, np.linspace(2, 0.1, 12)
    both = one.sum() * shift(sample_weight=one) + other.sum() * shift(sample_weight=other)
    assert torch.allclose(shift(sample_weight=one + other), both / (one + other).sum(), atol=1e-6)
    assert not torch.allclose(shift(sample_weight=one), shift(sample_weight=other), atol=1e-6)


@pytest.mark.parametrize(
    "weights", [np.zeros(12), np.full(12, -1.0), np.full(12, np.nan), np.ones(3), np.ones((12, 1))]
)
def test_weights_that_mean_nothing_are_refused(clip: Clip, weights: Any) -> None:
    with pytest.raises(EstimatorInputError, match=r"(?i)sample.weight"):
        NearestMean(clip).fit(pixels(), Y, sample_weight=weights)


def test_bf16_is_close_and_the_loss_fp32(clip: Clip) -> None:
    exact, rough = (Head(clip, precision=precision).fit(pixels(), Y) for precision in ("fp32", "bf16"))
    assert all(step.inputs.dtype == torch.float32 for step in rough.steps)
    assert rough.losses_ == pytest.approx(exact.losses_, rel=0.05)
    assert rough.losses_ != exact.losses_


def test_a_loss_that_explodes_is_said_to(clip: Clip) -> None:
    class Explodes(Head):
        def _loss(self, step: Step) -> Tensor:
            return super()._loss(step) * float("inf")

    with pytest.raises(ConfigError, match="lower lr"):
        Explodes(clip).fit(pixels(), Y)
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}):
        with pytest.raises(ConfigError, match="at least 1"):
            Head(clip, **wrong).fit(pixels(), Y)


def test_class_texts_bring_their_sentences_and_labels_their_names(clip: Clip) -> None:
    texts = ClassTexts(["dog", "cat"], synonyms=[["hound"], []], templates=("{} here",))
    fitted = ZeroShot(clip, texts).fit()
    assert list(fitted.classes_) == ["cat", "dog"]
    assert fitted.texts_.texts(1) == ["dog here", "hound here"]
    from_labels = ZeroShot(clip, template=("a {}", "the {}")).fit(pixels(), Y)
    assert from_labels.texts_.names == ("big fish", "cat", "dog")
    assert from_labels.texts_.texts(0) == ["a big fish", "the big fish"]
    with pytest.raises(ConfigError, match="more than once"):
        ZeroShot(clip, ["cat", "dog", "cat"]).fit()
    with pytest.raises(ConfigError, match="neither labels nor class_names"):
        ZeroShot(clip).fit()
    with pytest.raises(ConfigError, match="needs a Clip"):
        ZeroShot(None, ["a", "b"]).fit()


def test_settings_that_cannot_be_written_are_asked_for(clip: Clip, tmp_path: Path) -> None:
    with mock.patch.object(base, "methods", return_value={"head": Head}):
        head = Head(clip, words=print, epochs=1).fit(pixels(), Y)
        folder = head.save(tmp_path / "run")
        with pytest.raises(ConfigError, match="words"):
            Head.load(folder, clip)
        loaded = Adapter.load(folder, clip, words=print, progress=False)
        assert (loaded.words, loaded.epochs, loaded.progress) == (print, 1, False)
        with pytest.raises(CheckpointError, match="not a NearestMean"):
            NearestMean.load(folder, clip)
        with pytest.raises(CheckpointError, match="none was given"):
            Adapter.load(folder, words=print)


def test_a_damaged_run_is_refused(clip: Clip, tmp_path: Path) -> None:
    folder = NearestMean(clip).fit(pixels(), Y).save(tmp_path / "run")
    about = json.loads((folder / "estimator.json").read_text())
    for change in (
        {"classes": None},
        {"settings": {"no_such": 1}},
        {"method": "no-such-method"},
        {"to_give": 3},
    ):
        (folder / "estimator.json").write_text(json.dumps(about | change))
        with pytest.raises((CheckpointError, ConfigError)):
            Adapter.load(folder, clip)
    (folder / "estimator.json").write_text(json.dumps(about))
    tensors = folder / "learned.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="learned"):
        Adapter.load(folder, clip)


def test_saving_over_a_run_leaves_the_new_one(clip: Clip, tmp_path: Path) -> None:
    NearestMean(clip).fit(pixels(), Y).save(tmp_path)
    second = ZeroShot(clip).fit(pixels(), Y)
    second.save(tmp_path)
    assert isinstance(Adapter.load(tmp_path, clip), ZeroShot)


def test_methods_are_found_by_their_files(clip: Clip) -> None:
    found = methods()
    assert {"zero-shot", "linear-probe", "nearest-mean", "wise-ft"} <= set(found)
    assert found["nearest-mean"] is method_named("nearest-mean") is NearestMean
    with pytest.raises(ConfigError, match="nearest-mean"):
        method_named("nearest-men")


def test_the_representation_is_short(clip: Clip) -> None:
    assert repr(NearestMean(clip, seed=3)) == "NearestMean(clip='tiny', seed=3)"


def test_without_scikit_learn_an_estimator_says_what_to_install() -> None:
    spec = importlib.util.spec_from_file_location("base_without_sklearn", base.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"sklearn.base": None, "sklearn": None, spec.name: module}):
        spec.loader.exec_module(module)
        with pytest.raises(MissingExtra, match=r"clipworks\[adapt\]"):
            module.Adapter()


def test_a_setting_cannot_take_the_name_of_something_in_the_family() -> None:
    with pytest.raises(TypeError, match="its own encoder"):

        class Shadowing(ZeroShot):
            encoder: str = "lstm"
