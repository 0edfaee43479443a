"""The contract of the family `retrieve`, as `methods/retrieve/base.py` states it, on every method it has.

A check is a function of a ranker's maker. Each runs on every method of the register, and on rankers that
break one promise (`broken_retrieve.py`), where it must fail.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.contracts import broken_retrieve as broken
from torch import Tensor

from clipworks.core.clip import unit
from clipworks.engine.randomness import untouched_randomness
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.retrieve.base import Ranker
from clipworks.methods.retrieve.cross_the_gap import ModalityInversion
from clipworks.papers import register

Make = Callable[[Any], Ranker]
ClipOf = Callable[[int], Any]

# Every method of the family, in the forms worth checking, small enough to be quick.
FORMS: dict[str, dict[str, Make]] = {
    "cross-the-gap": {
        "oti": lambda clip: ModalityInversion(clip, steps=4),
        "oti-several": lambda clip: ModalityInversion(clip, steps=3, tokens=3, template="a {} here", seed=5),
        "ovi": lambda clip: ModalityInversion(clip, direction="text_to_image", steps=3, tokens=4),
    }
}


def methods() -> Iterator[Any]:
    """Every method of the family that is there, in each of its forms, marked with its paper."""
    for paper in register():
        if paper.family == "retrieve" and paper.status != "planned":
            for form, make in FORMS[paper.slug].items():
                yield pytest.param(make, id=f"{paper.slug}-{form}", marks=pytest.mark.contract(paper.slug))


@pytest.fixture(scope="module")
def clip_of(tiny_clip: Callable[..., Any]) -> ClipOf:
    from clipworks.core.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer()
    return lambda seed=0: tiny_clip(seed, tokenizer=tokenizer, image={"image_size": 16})


def vectors(count: int, seed: int) -> Tensor:
    return unit(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)))


QUERIES, GALLERY = vectors(4, 1), vectors(9, 2)


def fitted(make: Make, clip_of: ClipOf) -> Ranker:
    return make(clip_of(0)).fit(GALLERY, [f"class {row % 3}" for row in range(len(GALLERY))])


def rows_of_numbers(make: Make, clip_of: ClipOf) -> None:
    """A row a query, a column a thing of the gallery, fp32 and finite; with or without a gallery given."""
    ranker = fitted(make, clip_of)
    found = ranker.similarity(QUERIES, GALLERY)
    assert found.shape == (4, 9)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert torch.equal(found, ranker.similarity(QUERIES))


def queries_do_not_see_each_other(make: Make, clip_of: ClipOf) -> None:
    """A query alone has the row that it has among others, in any order."""
    ranker = fitted(make, clip_of)
    whole = ranker.similarity(QUERIES)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(ranker.similarity(QUERIES[order]), whole[order], atol=1e-4)
    assert torch.allclose(ranker.similarity(QUERIES[1:2]), whole[1:2], atol=1e-4)


def the_gallerys_order_is_the_columns(make: Make, clip_of: ClipOf) -> None:
    """With the gallery the columns are reordered, and nothing else happens."""
    ranker, order = fitted(make, clip_of), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    whole = ranker.similarity(QUERIES, GALLERY)
    assert torch.allclose(ranker.similarity(QUERIES, GALLERY[order]), whole[:, order], atol=1e-5)


def a_ranking_is_the_similaritys(make: Make, clip_of: ClipOf) -> None:
    """The best first, equal ones in the gallery's order, cut at k; what is excluded is not there."""
    ranker = fitted(make, clip_of)
    doubled = torch.cat([GALLERY, GALLERY])
    scores = ranker.similarity(QUERIES, doubled).numpy()
    ranking = ranker.rank(QUERIES, doubled)
    expected = np.argsort(-scores, axis=1, kind="stable")
    assert np.array_equal(ranking.indices.numpy(), expected)
    assert np.array_equal(ranking.scores.numpy(), np.take_along_axis(scores, expected, 1))
    assert np.array_equal(ranker.rank(QUERIES, doubled, k=5).indices.numpy(), expected[:, :5])
    itself = torch.tensor(expected[:, 0])
    without = ranker.rank(QUERIES, doubled, exclude=itself)
    assert np.array_equal(without.indices.numpy(), expected[:, 1:])
    none = ranker.rank(QUERIES, doubled, exclude=torch.tensor([-1, -1, 3, -1])).indices
    assert np.array_equal(none[0].numpy(), expected[0])


def neighbors_vote(make: Make, clip_of: ClipOf) -> None:
    """Probabilities are shares of the nearest, predictions the largest of them."""
    ranker = fitted(make, clip_of)
    near = np.argsort(-ranker.similarity(QUERIES).numpy(), axis=1, kind="stable")[:, :3] % 3
    expected = np.stack([(near == label).mean(axis=1) for label in range(3)], axis=1)
    assert np.allclose(ranker.predict_proba(QUERIES, k=3), expected)
    assert ranker.predict(QUERIES, k=3).tolist() == [f"class {row}" for row in expected.argmax(axis=1)]
    assert ranker.score(QUERIES, ranker.predict(QUERIES)) == 1


def repeatable_and_alone(make: Make, clip_of: ClipOf) -> None:
    """The same numbers each time; no global generator is drawn from or seeded."""

    def states() -> tuple[Any, ...]:
        return repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    with untouched_randomness():
        before = states()
        first = fitted(make, clip_of).similarity(QUERIES)
        assert states() == before, "a global generator was used"
        torch.rand(3)
        assert torch.equal(first, fitted(make, clip_of).similarity(QUERIES))


def the_clip_stays(make: Make, clip_of: ClipOf) -> None:
    """Bit-identical, in the mode it was in, without gradients."""
    ranker = fitted(make, clip_of)
    clip = ranker.clip
    clip.train()
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    ranker.similarity(QUERIES)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in clip.parameters())
    assert all(module.training for module in clip.modules())


def settings_as_scikit_learn_has_them(make: Make, clip_of: ClipOf) -> None:
    """`clone` gives an unfitted ranker with the same settings and the same Clip."""
    base = pytest.importorskip("sklearn.base")
    ranker = fitted(make, clip_of)
    twin = base.clone(ranker)
    assert twin.clip is ranker.clip
    assert twin.gallery_ is None
    assert twin.get_params() == ranker.get_params()
    seed = ranker.get_params()["seed"] + 1
    assert twin.set_params(seed=seed).seed == seed != ranker.seed
    with pytest.raises(ConfigError, match="no setting 'sed'; did you mean seed"):
        twin.set_params(sed=1)


def saved_and_loaded(make: Make, clip_of: ClipOf) -> None:
    """What was saved gives the same similarities and predictions."""
    ranker = fitted(make, clip_of)
    with tempfile.TemporaryDirectory() as folder:
        loaded = type(ranker).load(ranker.save(folder), ranker.clip)
    assert torch.equal(loaded.similarity(QUERIES), ranker.similarity(QUERIES))
    if ranker.labels_ is not None:
        assert loaded.predict(QUERIES).tolist() == ranker.predict(QUERIES).tolist()


def another_clip_is_refused(make: Make, clip_of: ClipOf) -> None:
    """What was made with one Clip is not loaded into another."""
    ranker = fitted(make, clip_of)
    with tempfile.TemporaryDirectory() as folder:
        ranker.save(folder)
        refused = False
        try:
            type(ranker).load(folder, clip_of(1))
        except CheckpointError as error:
            refused = "other weights" in str(error)
    assert refused


def wrong_shapes_are_named(make: Make, clip_of: ClipOf) -> None:
    """Features of another width, one alone, labels that do not fit: an error that names the shape."""
    ranker = fitted(make, clip_of)
    for queries, gallery, said in (
        (QUERIES[:, :7], None, "(4, 7)"),
        (QUERIES[0], None, "(16,)"),
        (QUERIES, GALLERY[:, :3], "(9, 3)"),
    ):
        message = ""
        try:
            ranker.similarity(queries, gallery)
        except ShapeError as error:
            message = str(error)
        except (RuntimeError, IndexError, ValueError) as error:
            message = f"not our own error: {error!r}"
        assert message.endswith(said), message
    with pytest.raises(ShapeError, match="2 labels were given for a gallery of 9"):
        make(clip_of(0)).fit(GALLERY, [1, 2])
    with pytest.raises(ConfigError, match="nothing to rank"):
        make(clip_of(0)).similarity(QUERIES)
    with pytest.raises(ConfigError, match="k must be at least 1, not 0"):
        ranker.rank(QUERIES, k=0)


CHECKS = (
    rows_of_numbers,
    queries_do_not_see_each_other,
    the_gallerys_order_is_the_columns,
    a_ranking_is_the_similaritys,
    neighbors_vote,
    repeatable_and_alone,
    the_clip_stays,
    settings_as_scikit_learn_has_them,
    saved_and_loaded,
    another_clip_is_refused,
    wrong_shapes_are_named,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", list(methods()))
def test_a_method_keeps_its_familys_contract(make: Make, check: Any, clip_of: ClipOf) -> None:
    check(make, clip_of)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sound_ranker_passes(check: Any, clip_of: ClipOf) -> None:
    check(broken.Sound, clip_of)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (broken.HalfPrecision, rows_of_numbers),
        (broken.CenteredByTheQueries, queries_do_not_see_each_other),
        (broken.FirstOfTheGalleryCountMore, the_gallerys_order_is_the_columns),
        (broken.WorstFirst, a_ranking_is_the_similaritys),
        (broken.RanksTheQueryItself, a_ranking_is_the_similaritys),
        (broken.WorstFirst, neighbors_vote),
        (broken.GlobalNoise, repeatable_and_alone),
        (broken.ChangesTheClip, the_clip_stays),
        (broken.LeavesGradients, the_clip_stays),
        (broken.CopiesTheClip, settings_as_scikit_learn_has_them),
        (broken.ForgetsWhatItLearned, saved_and_loaded),
        (broken.TakesAnyClip, another_clip_is_refused),
        (broken.TakesAnyShape, wrong_shapes_are_named),
    ],
)
def test_a_check_fails_on_what_breaks_its_promise(make: Make, check: Any, clip_of: ClipOf) -> None:
    with pytest.raises(AssertionError):
        check(make, clip_of)


def test_every_check_has_been_seen_to_fail() -> None:
    marks = test_a_check_fails_on_what_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    seen = {check for mark in marks if mark.name == "parametrize" for _, check in mark.args[1]}
    assert seen == set(CHECKS)
