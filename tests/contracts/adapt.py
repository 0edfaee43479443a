"""The contract of the family `adapt`, as `methods/adapt/base.py` states it, on every method it has.

A check is a function of an estimator's maker. Each runs on every class of the family's files, marked with its
paper where the register knows it, and on estimators that break one promise (`broken_adapt.py`), where it must
fail. `FORMS` says what a method needs besides a Clip, or has besides its default form.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from tests.contracts import broken_adapt as broken
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, EstimatorInputError
from clipworks.methods.adapt import base
from clipworks.methods.adapt.base import Adapter, TrainedAdapter
from clipworks.papers import register
from clipworks.parts.features import FeatureStore

Make = Callable[..., Adapter]
NAMES = ("blue thing", "green thing", "red thing")
SIZE = 32
CONCEPTS = ("blue", "green", "red", "thing")

# A method's forms by name; each is a function of the Clip that gives settings. "default" is none.
FORMS: dict[str, dict[str, Callable[[Clip], dict[str, Any]]]] = {
    "concept-matrix-search": {
        "default": lambda _: {"concepts": CONCEPTS},
        "max": lambda _: {"concepts": CONCEPTS, "rule": "max", "center": True},
    },
    "promptkd": {
        "default": lambda clip: {"teacher": clip},
        "live": lambda clip: {"teacher": clip, "views": 0, "normalize": "numel"},
    },
    "promptsrc": {"default": lambda _: {"average_at": 2.0}},
    "sparse-cbm": {
        "default": lambda _: {"concepts": CONCEPTS},
        **{
            kind: lambda _, kind=kind: {"concepts": CONCEPTS, "kind": kind, "standardize": True}
            for kind in ("contrastive", "l1", "similarity")
        },
    },
    # The features that the suite makes up are CLIP's alone.
    "amu-tuning": {"default": lambda _: {"auxiliary": "own"}},
    "clip-adapter": {"auto": lambda _: {"ratio": "auto"}},
    "coop": {"middle": lambda _: {"position": "middle"}},
    "linear-probe": {"searched": lambda _: {"C": "auto"}},
    "wise-ft": {"tuned": lambda _: {"alpha": 1.0}},
    # At the paper's rate no mask can change in the few steps of these fits.
    "r-amt": {"default": lambda _: {"lr": 5e-3}, "without-dropout": lambda _: {"lr": 5e-3, "drop": 0.0}},
    "pre": {"mlp-saved-whole": lambda _: {"prompt_encoder": "mlp", "gain": 0.0, "keep_encoder": True}},
}
# Settings that make a fit fast; what they decide is not what a contract is about.
FAST = {"epochs": 2, "batch_size": 5, "views": 2}


def maker(method: type[Adapter], form: Callable[[Clip], dict[str, Any]]) -> Make:
    def make(clip: Clip, **settings: Any) -> Adapter:
        known = method._get_param_names()
        fast = {
            name: value
            for name, value in FAST.items()
            if name in known and issubclass(method, TrainedAdapter)
        }
        return method(clip, **{**fast, "progress": False, **form(clip), **settings})

    return make


def methods() -> Iterator[Any]:
    """Every class of the family, in each of its forms, marked with its paper."""
    papers = {
        Path(paper.method).stem: paper.slug
        for paper in register()
        if paper.family == "adapt" and paper.method
    }
    for slug, method in base.methods().items():
        file = method.__module__.rsplit(".", 1)[-1]
        marks = [pytest.mark.contract(papers[file])] if file in papers else []
        for form, settings in ({"default": lambda _: {}} | FORMS.get(slug, {})).items():
            yield pytest.param(maker(method, settings), id=f"{slug}-{form}", marks=marks)


@pytest.fixture(scope="module")
def clip_of(tiny_clip: Callable[..., Any]) -> Callable[[int], Clip]:
    tokenizer = ClipTokenizer()
    return lambda seed=0: tiny_clip(seed, tokenizer=tokenizer)


ClipOf = Callable[[int], Clip]


def pictures(count: int = 12, seed: int = 0) -> list[Tensor]:
    """Noisy pictures (3, 32, 32), bytes, of three colors in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        picture = torch.randint(0, 128, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        picture[2 - i % 3] += 120
        made.append(picture)
    return made


def labels(count: int = 12) -> list[str]:
    return [NAMES[i % 3] for i in range(count)]


def trained_with_pictures(estimator: Adapter) -> bool:
    return estimator.image_tower == "trained"


def features(clip: Clip, images: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return clip.image(torch.stack(images))


def data_for(estimator: Adapter, seed: int = 0) -> Any:
    """What this estimator is fitted on: features, or pictures where it trains with them."""
    images = pictures(seed=seed)
    assert estimator.clip is not None
    return images if trained_with_pictures(estimator) else features(estimator.clip, images)


def fitted(estimator: Adapter, X: Any = None, y: Any = None, **options: Any) -> Adapter:
    X = data_for(estimator) if X is None else X
    if estimator.labels_needed is False:
        return estimator.set_params(class_names=list(NAMES)).fit(X, **options)
    return estimator.fit(X, labels(len(X)) if y is None else y, **options)


def probabilities(estimator: Adapter, X: Any = None) -> Any:
    return estimator.predict_proba(data_for(estimator, seed=1) if X is None else X)


# --- the checks ---


def classifies(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """Probabilities are those of `classes_`, finite, sum to one, and agree with `predict`."""
    estimator = fitted(make(clip_of(0)))
    X = data_for(estimator, seed=1)
    found = estimator.predict_proba(X)
    assert list(estimator.classes_) == sorted(NAMES)
    assert found.shape == (12, 3) and np.isfinite(found).all()
    assert np.allclose(found.sum(axis=1), 1)
    assert (estimator.predict(X) == estimator.classes_[found.argmax(axis=1)]).all()
    assert 0 <= estimator.score(X, labels()) <= 1
    if trained_with_pictures(estimator) or estimator.fitted_on_ == "features":
        one = pictures(1, seed=1)[0]
        assert estimator.predict(one if estimator.fitted_on_ == "pictures" else [one]).shape == (1,)


def clip_is_bit_identical(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """Neither weights, nor gradients, nor modes of the Clip are others after `fit` and `predict`."""
    clip = clip_of(0).train()
    before = copy.deepcopy(clip.state_dict())
    asking = [parameter.requires_grad for parameter in clip.parameters()]
    estimator = fitted(make(clip))
    probabilities(estimator)
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.state_dict().items())
    assert asking == [parameter.requires_grad for parameter in clip.parameters()]
    assert all(parameter.grad is None for parameter in clip.parameters())
    assert all(module.training for module in clip.modules())


def pictures_and_their_features_are_one(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """A method that leaves the image tower alone learns and predicts the same from features."""
    if make(clip_of(0)).image_tower != "frozen":
        return
    images, views = pictures(), {"views": 0}
    from_pictures = fitted(make(clip_of(0), **views), images)
    clip = from_pictures.clip
    assert clip is not None
    from_features = fitted(make(clip, **views), features(clip, images))
    one, other = from_pictures.predict_proba(images), from_features.predict_proba(features(clip, images))
    # What a method draws by picture it may not draw by row; nothing else may differ.
    assert np.allclose(one, other, atol=1e-4), abs(one - other).max()


def same_seed_same_estimator(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """A fit is repeated bit for bit."""
    clip = clip_of(0)
    one, other = (probabilities(fitted(make(clip))) for _ in range(2))
    assert np.array_equal(one, other)


def global_generators_are_untouched(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """Python's, numpy's and torch's."""

    def states() -> tuple[Any, ...]:
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    estimator = fitted(make(clip_of(0)))
    estimator.predict(data_for(estimator))
    assert states() == before


def clone_shares_the_clip(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """And nothing that was learned."""
    estimator = fitted(make(clip_of(0)))
    twin = clone(estimator)
    assert twin.clip is estimator.clip
    assert not [name for name in vars(twin) if name.endswith("_")]
    assert twin.get_params(deep=False).keys() == estimator.get_params(deep=False).keys()


def settings_are_kept(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """`get_params` gives what the constructor and `set_params` were given."""
    estimator = make(clip_of(0), seed=3)
    assert estimator.get_params()["seed"] == 3
    assert estimator.set_params(seed=4, template="{}!").get_params()["seed"] == 4
    assert estimator.template == "{}!"


def saving_keeps_everything_learned(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """What is loaded predicts the same."""
    estimator = fitted(make(clip_of(0)))
    X = data_for(estimator, seed=1)
    known = {base.slug_of(type(estimator)): type(estimator)}
    _, others = base.fitted.split_plain(estimator.get_params(deep=False))
    given = {name: getattr(estimator, name) for name in others if name not in ("clip", "store")}
    with mock.patch.object(base, "methods", return_value=known):
        loaded = Adapter.load(estimator.save(tmp_path / "run"), estimator.clip, **given)
    assert np.array_equal(loaded.predict_proba(X), estimator.predict_proba(X))
    assert (loaded.predict(X) == estimator.predict(X)).all()
    assert loaded.texts_ == estimator.texts_


def only_what_was_learned_is_saved(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """No file holds a tensor of the Clip, and the size is that of what was learned."""
    estimator = fitted(make(clip_of(0)))
    folder = estimator.save(tmp_path / "run")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    learned = sum(tensor.numel() * tensor.element_size() for tensor in estimator._learned().values())
    assert size < 1.1 * learned + 20_000, (size, learned)


def another_clip_is_refused(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """What was fitted to one Clip is not loaded into another."""
    estimator = fitted(make(clip_of(0)))
    folder = estimator.save(tmp_path / "run")
    with (
        mock.patch.object(base, "methods", return_value={base.slug_of(type(estimator)): type(estimator)}),
        pytest.raises((CheckpointError, ConfigError)),
    ):
        type(estimator).load(folder, clip_of(1))


def logits_are_those_of_the_features(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """`softmax(logits(image_features(X)))` is `predict_proba(X)`, at any length of the features."""
    estimator = fitted(make(clip_of(0)))
    X = data_for(estimator, seed=1)
    for scale in (1.0, 7.0):
        found = estimator.logits(scale * estimator.image_features(X)).double().softmax(dim=1)
        assert np.allclose(found.numpy(), estimator.predict_proba(X), atol=1e-4)


def class_features_have_unit_length(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """(C, D), or (B, C, D) for pictures; and so have pictures' (n, D)."""
    estimator = fitted(make(clip_of(0)))
    images = estimator.image_features(data_for(estimator))
    classes = estimator.class_features(images)
    assert classes.shape in ((3, images.shape[1]), (12, 3, images.shape[1])), classes.shape
    for vectors in (images, classes):
        lengths = vectors.norm(dim=-1)
        assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)
    assert not classes.requires_grad


def integers_count_the_names(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """Labels as integers with `class_names` are the same classes as the names themselves."""
    clip = clip_of(0)
    by_name = fitted(make(clip))
    if by_name.labels_needed is False:
        return
    order = ["red thing", "blue thing", "green thing"]
    numbers = [order.index(label) for label in labels()]
    by_number = fitted(make(clip, class_names=order), y=numbers)
    X = data_for(by_name, seed=1)
    assert [order[place] for place in by_number.predict(X)] == list(by_name.predict(X))
    assert by_number.texts_.names == tuple(order)


def bad_input_is_one_clear_error(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """One class, an unknown label, a class or a label without picture, nothing, NaN: one line each."""
    clip = clip_of(0)
    X = data_for(make(clip))
    estimator = make(clip)
    cases: list[tuple[Any, Any, Any, str]] = [([], [], None, "no pictures")]
    if estimator.labels_needed is True:
        cases += [
            (X, ["cat"] * 12, None, "one class|two classes|class"),
            (X, ["a dag", *labels()[1:]], ["a dog", *NAMES], "a dag"),
            (X, labels(), [*NAMES, "a dog"], "a dog"),
            (X, labels(11), None, "11"),
            (X, None, None, "requires y"),
        ]
    if not trained_with_pictures(estimator):
        bad = torch.stack(list(X)).clone()
        bad[3, 1] = float("nan")
        cases.append((bad, labels(), None, "NaN"))
    for X_, y, names, said in cases:
        if estimator.labels_needed is False:
            y, names = None, list(NAMES)
        with pytest.raises((EstimatorInputError, ConfigError), match=said) as caught:
            make(clip, class_names=names).fit(X_, y)
        if not isinstance(caught.value, ConfigError):
            assert "\n" not in str(caught.value)


def equal_weights_are_no_weights(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """Weights of 3 for all are weights of 1 for all where only their proportions matter, and 1 is none."""
    clip = clip_of(0)
    none = probabilities(fitted(make(clip)))
    ones = probabilities(fitted(make(clip), sample_weight=np.ones(12)))
    assert np.array_equal(none, ones)
    if isinstance(make(clip), TrainedAdapter):
        threes = probabilities(fitted(make(clip), sample_weight=np.full(12, 3.0)))
        assert np.allclose(none, threes, atol=1e-6)


def no_picture_is_encoded_twice(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """With a store, a second fit on the same pictures runs no image tower."""
    clip = clip_of(0)
    if make(clip).image_tower != "frozen":
        return
    images, store = pictures(), FeatureStore(tmp_path / "store")
    first = fitted(make(clip, store=store), images)
    expected = first.predict_proba(images)
    with mock.patch.object(type(clip.image), "forward", side_effect=AssertionError("encoded again")):
        again = fitted(make(clip, store=FeatureStore(tmp_path / "store")), images)
        found = again.predict_proba(images)
    assert np.array_equal(found, expected)


def other_names_are_served_or_refused(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """`for_classes` permutes columns with the names, or says that it cannot."""
    estimator = fitted(make(clip_of(0)))
    X = data_for(estimator, seed=1)
    if not estimator.retargets:
        with pytest.raises(ConfigError):
            estimator.for_classes(["a dog", "a cat"])
        return
    same = estimator.for_classes(list(NAMES))
    before = estimator.predict_proba(X)
    other = estimator.for_classes(["a cat", "a dog"])
    assert other.predict_proba(X).shape == (12, 2)
    assert list(other.classes_) == ["a cat", "a dog"]
    assert same.predict_proba(X).shape == before.shape
    assert np.array_equal(estimator.predict_proba(X), before)


def a_search_over_settings_works(make: Make, clip_of: ClipOf, tmp_path: Path) -> None:
    """scikit-learn's grid search fits clones on parts of the data."""
    estimator = make(clip_of(0))
    if estimator.labels_needed is False:
        return
    X = data_for(estimator)
    search = GridSearchCV(estimator, {"seed": [0, 1]}, cv=2, error_score="raise")
    search.fit(X if isinstance(X, list) else X.numpy(), labels())
    assert search.best_estimator_.clip is estimator.clip


CHECKS = (
    classifies,
    clip_is_bit_identical,
    pictures_and_their_features_are_one,
    same_seed_same_estimator,
    global_generators_are_untouched,
    clone_shares_the_clip,
    settings_are_kept,
    saving_keeps_everything_learned,
    only_what_was_learned_is_saved,
    another_clip_is_refused,
    logits_are_those_of_the_features,
    class_features_have_unit_length,
    integers_count_the_names,
    bad_input_is_one_clear_error,
    equal_weights_are_no_weights,
    no_picture_is_encoded_twice,
    other_names_are_served_or_refused,
    a_search_over_settings_works,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", list(methods()))
def test_a_method_keeps_its_familys_contract(make: Make, check: Any, clip_of: ClipOf, tmp_path: Path) -> None:
    check(make, clip_of, tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sound_estimator_passes(check: Any, clip_of: ClipOf, tmp_path: Path) -> None:
    check(maker(broken.Sound, lambda _: {}), clip_of, tmp_path)


@pytest.mark.parametrize(
    ("method", "check"),
    [
        (broken.NotASum, classifies),
        (broken.LabelsInTheirOwnOrder, classifies),
        (broken.WritesToTheClip, clip_is_bit_identical),
        (broken.OtherOnPictures, pictures_and_their_features_are_one),
        (broken.DrawsWithoutItsSeed, same_seed_same_estimator),
        (broken.LeavesARandomState, global_generators_are_untouched),
        (broken.CopiesTheClip, clone_shares_the_clip),
        (broken.ForgetsASetting, settings_are_kept),
        (broken.SavesHalf, saving_keeps_everything_learned),
        (broken.SavesTheClip, only_what_was_learned_is_saved),
        (broken.TakesAnyClip, another_clip_is_refused),
        (broken.OtherLogits, logits_are_those_of_the_features),
        (broken.LongVectors, class_features_have_unit_length),
        (broken.LabelsInTheirOwnOrder, integers_count_the_names),
        (broken.IgnoresNaN, bad_input_is_one_clear_error),
        (broken.CountsWeights, equal_weights_are_no_weights),
        (broken.EncodesAgain, no_picture_is_encoded_twice),
        (broken.OldClasses, other_names_are_served_or_refused),
        (broken.AsksForMore, a_search_over_settings_works),
    ],
)
def test_a_check_fails_on_what_breaks_its_promise(
    method: type[Adapter], check: Any, clip_of: ClipOf, tmp_path: Path
) -> None:
    # pytest.raises that was not satisfied raises pytest's own Failed.
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(maker(method, lambda _: {}), clip_of, tmp_path)


def test_every_check_has_been_seen_to_fail() -> None:
    marks = test_a_check_fails_on_what_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    seen = {check for mark in marks if mark.name == "parametrize" for _, check in mark.args[1]}
    assert seen == set(CHECKS)
