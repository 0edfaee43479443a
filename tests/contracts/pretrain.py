"""The contract of the family `pretrain`, as `methods/pretrain/base.py` states it, on every method it has.

A check is a function of an objective's maker. Each runs on every method of the register, and on objectives
that break one promise (`broken.py`), where it must fail.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.contracts import broken
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.engine.accumulate import backward_in_parts
from clipworks.engine.randomness import own_randomness, untouched_randomness
from clipworks.engine.stage import Stage, total
from clipworks.methods.pretrain.alip import Alip
from clipworks.methods.pretrain.base import Objective
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.cloob import CLOOB
from clipworks.methods.pretrain.laclip import LaClip
from clipworks.methods.pretrain.longclip import LongClip
from clipworks.methods.pretrain.m2mix import M2Mix, SingleMix
from clipworks.methods.pretrain.plan import objective_named
from clipworks.methods.pretrain.tinyclip import AffinityMimicking, InheritanceMasks
from clipworks.papers import register

Make = Callable[[], Objective]
ClipOf = Callable[[int], Any]
SOURCES = ("alt", "synthetic", "short", "long", "rewrite")


def teacher() -> Clip:
    """A frozen model for methods that imitate one, of another width than the student."""
    blocks = uniform_blocks(1, 32, 2)
    return Clip.from_config(
        Config(8, VisionConfig(16, 8, 32, blocks), TextConfig(12, 64, 32, blocks)), seed=7
    )


# Forms of a method other than the one with default options.
FORMS: dict[str, dict[str, Make]] = {
    "alip": {"batch": lambda: Alip(start="batch", fresh=True)},
    "clip": {
        "fresh": lambda: ClipObjective(fresh=True),
        "sigmoid": lambda: ClipObjective("sigmoid", fresh=True),
    },
    "cloob": {"unscaled": lambda: CLOOB(14.3, 14.3, scaled=False)},
    "laclip": {"all": lambda: LaClip("all", fresh=True)},
    "longclip": {
        "default": lambda: LongClip(components=3),  # of 32 there are too many in a batch of seven
        "plain": lambda: LongClip(components=None, keep=2, ratio=2),
        "groups": lambda: LongClip(components=1, component_group=4, short_weight=0.5),
    },
    "m2mix": {
        "m3": lambda: M2Mix(single=SingleMix()),
        "first": lambda: M2Mix(0.05, temperature=0.05, fade=False, single=SingleMix(pair_target="first")),
    },
    "tinyclip": {
        "default": lambda: AffinityMimicking(teacher()),
        "both": lambda: AffinityMimicking(teacher(), alpha=0.5),
        "masks": lambda: InheritanceMasks(AffinityMimicking(teacher()), 0.5, start=0.2),
    },
}


def methods() -> Iterator[Any]:
    """Every method of the family that is there, in each of its forms, marked with its paper."""
    for paper in register():
        if paper.family == "pretrain" and paper.status != "planned":
            name = Path(paper.method).stem.replace("_", "-")
            forms: dict[str, Make] = {"default": lambda name=name: objective_named(name)}  # type: ignore[misc]
            for form, make in (forms | FORMS.get(paper.slug, {})).items():
                yield pytest.param(make, id=f"{paper.slug}-{form}", marks=pytest.mark.contract(paper.slug))


@pytest.fixture(scope="module")
def clip_of(tiny_clip: Callable[..., Any]) -> ClipOf:
    sizes = {"image": {"image_size": 16}, "text": {"vocab_size": 64, "context_length": 12}}
    return lambda seed: tiny_clip(seed, **copy.deepcopy(sizes))


def pairs_of(n: int = 7, seed: int = 0) -> Batch:
    """Random pictures with random sentences of every length from every source."""
    generator = torch.Generator().manual_seed(seed)

    def sentences() -> Tokens:
        ends = torch.randint(2, 12, (n,), generator=generator)
        ids = torch.randint(1, 62, (n, 12), generator=generator)
        ids[:, 0] = 62
        ids = ids.masked_fill(torch.arange(12) > ends[:, None], 0).scatter(1, ends[:, None], 63)
        return Tokens(ids, ends)

    return Batch(
        images=torch.rand(n, 3, 16, 16, generator=generator),
        texts={source: sentences() for source in SOURCES},
        features={"label": torch.randint(0, 3, (n,), generator=generator)},
        keys=[f"{seed}-{i}" for i in range(n)],
    )


def rows_of(batch: Batch, order: Tensor) -> Batch:
    return Batch(
        images=None if batch.images is None else batch.images[order],
        texts={source: tokens[order] for source, tokens in batch.texts.items()},
        features={name: rows[order] for name, rows in batch.features.items()},
        keys=[batch.keys[i] for i in order.tolist()],
    )


def stage_of(make: Make, clip_of: ClipOf, seed: int = 0, precision: str = "fp32") -> Stage:
    objective = make()
    return Stage(objective.prepare(clip_of(seed)), objective, precision).train()


def encode(stage: Stage, batch: Batch, seed: int = 0) -> dict[str, Any]:
    """Features, drawn under a seed, from a stage whose counters stay as they were."""
    before = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    with own_randomness(seed):
        features: dict[str, Any] = stage(batch)
    with torch.no_grad():
        for buffer, old in before:
            buffer.copy_(old)
    return features


def permuted(features: dict[str, Any], order: Tensor, local: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: value[order] if isinstance(value, Tensor) and value.dim() and name not in local else value
        for name, value in features.items()
    }


def draws_nothing(stage: Stage, batch: Batch) -> bool:
    one, other = encode(stage, batch, 1), encode(stage, batch, 2)
    return all(not isinstance(one[name], Tensor) or torch.equal(one[name], other[name]) for name in one)


def go_back(objective: Any, terms: dict[str, Tensor]) -> None:
    own = getattr(objective, "backward", None)
    own(terms) if own is not None else total(terms).backward()


def gradients(stage: Stage) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in stage.named_parameters() if parameter.requires_grad}
    stage.zero_grad(set_to_none=True)
    return found


# --- the checks ------------------------------------------------------------------------------------------


def finite(make: Make, clip_of: ClipOf) -> None:
    """Terms are named 0-D scalars, they and the gradients are finite."""
    stage = stage_of(make, clip_of)
    terms = stage.objective.loss(encode(stage, pairs_of()))
    assert terms and all(isinstance(name, str) and term.dim() == 0 for name, term in terms.items())
    assert all(torch.isfinite(term) for term in terms.values()), terms
    go_back(stage.objective, terms)
    assert all(g is None or torch.isfinite(g).all() for g in gradients(stage).values())


def one_row_an_example(make: Make, clip_of: ClipOf) -> None:
    """Every tensor that is gathered has one row an example or is 0-D."""
    stage = stage_of(make, clip_of)
    for name, value in encode(stage, pairs_of(5)).items():
        if isinstance(value, Tensor) and value.dim() and name not in stage.objective.local:
            assert len(value) == 5, f"{name} is {tuple(value.shape)} for 5 pairs"


def gradient_for_every_parameter(make: Make, clip_of: ClipOf) -> None:
    """What is not frozen gets a gradient that is not zero."""
    stage = stage_of(make, clip_of)
    go_back(stage.objective, stage.objective.loss(encode(stage, pairs_of())))
    idle = [name for name, g in gradients(stage).items() if g is None or not g.any()]
    assert not idle, f"no gradient: {idle}"


def order_does_not_matter(make: Make, clip_of: ClipOf) -> None:
    """Neither the order of the rows in the loss nor, where nothing is drawn, that of the pairs."""
    stage, batch = stage_of(make, clip_of), pairs_of()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    features = encode(stage, batch)
    orders = [permuted(features, order, stage.objective.local)]
    if draws_nothing(stage, batch):
        orders.append(encode(stage, rows_of(batch, order)))
    for other in orders:
        expected, found = total(stage.objective.loss(features)), total(stage.objective.loss(other))
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-5), (expected, found)


def parts_give_the_same_gradients(make: Make, clip_of: ClipOf) -> None:
    """A batch cut in three has the gradients of the whole batch.

    Where random numbers are drawn the parts draw others than the whole, so the whole is put together from
    parts that were encoded with a graph.
    """
    stage, batch = stage_of(make, clip_of), pairs_of()
    parts = list(batch.split(3))
    state = copy.deepcopy(stage.state_dict())
    with own_randomness(0):
        if draws_nothing(stage, batch):
            features = stage(batch)
        else:
            encoded = [stage(part) for part in parts]
            features = {
                name: torch.stack([e[name] for e in encoded]).mean(0)
                if encoded[0][name].dim() == 0
                else torch.cat([e[name] for e in encoded])
                for name in encoded[0]
            }
        go_back(stage.objective, stage.objective.loss(features))
    whole = gradients(stage)
    stage.load_state_dict(state)
    with own_randomness(0):
        backward_in_parts(
            parts,
            stage,
            stage.objective.loss,
            lambda terms: go_back(stage.objective, terms),
            module=stage,
            local=stage.objective.local,
            unsynchronized=lambda _: nullcontext(),
        )
    for name, found in gradients(stage).items():
        expected = whole[name]
        assert (expected is None) == (found is None), name
        if expected is not None and found is not None:
            scale = float(expected.abs().max()) + 1e-6
            assert torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * scale), name


@contextmanager
def two_processes_that_must_not_talk() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective was called")

    words = ("all_", "reduce", "gather", "scatter", "broadcast", "barrier", "send", "recv", "isend", "irecv")
    names = [name for name in dir(dist) if name.startswith(words) and callable(getattr(dist, name))]
    collectives = dict.fromkeys(names, refuse)
    told = {"is_initialized": lambda: True, "get_world_size": lambda *_: 2, "get_rank": lambda *_: 0}
    with mock.patch.multiple(dist, **collectives, **told):
        yield


def no_collective(make: Make, clip_of: ClipOf) -> None:
    """In `prepare`, `features`, `loss` and `backward` no process speaks to another."""
    with two_processes_that_must_not_talk():
        stage = stage_of(make, clip_of)
        go_back(stage.objective, stage.objective.loss(encode(stage, pairs_of())))


def random_numbers_only_in_features(make: Make, clip_of: ClipOf) -> None:
    """Only torch's generator is drawn from, and only in `features`."""

    def others() -> tuple[str, str]:
        return repr(random.getstate()), repr(np.random.get_state())  # noqa: NPY002

    with untouched_randomness():
        before, torchs = others(), torch.get_rng_state()
        stage = stage_of(make, clip_of)
        assert torch.equal(torchs, torch.get_rng_state()), "prepare draws random numbers"
        features = stage(pairs_of())
        torchs = torch.get_rng_state()
        terms = stage.objective.loss(features)
        assert torch.equal(torchs, torch.get_rng_state()), "loss draws random numbers"
        go_back(stage.objective, terms)
        assert before == others(), "Python's or numpy's global generator was used"


def prepare_is_repeatable(make: Make, clip_of: ClipOf) -> None:
    """The same clip is prepared to the same model, whatever was drawn before."""
    stages = []
    for seed in (1, 2):
        with own_randomness(seed):
            stages.append(stage_of(make, clip_of))
    one, other = (stage.state_dict() for stage in stages)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def state_is_in_parameters_and_buffers(make: Make, clip_of: ClipOf) -> None:
    """A stage that takes over the state of one three steps ahead goes on exactly as that one does."""
    ahead, fresh = stage_of(make, clip_of), stage_of(make, clip_of, seed=1)
    for step in range(3):
        with own_randomness(step), torch.no_grad():
            ahead.objective.loss(ahead(pairs_of(seed=step)))
    fresh.load_state_dict(ahead.state_dict())
    losses = []
    for stage in (ahead, fresh):
        with own_randomness(9), torch.no_grad():
            losses.append(total(stage.objective.loss(stage(pairs_of(seed=9)))))
    assert torch.equal(*losses), losses


def loss_in_fp32(make: Make, clip_of: ClipOf) -> None:
    """The loss of given features is the same fp32 number under bf16 autocast as without."""
    stage = stage_of(make, clip_of, precision="bf16")
    features = encode(stage, pairs_of())
    expected = total(stage.objective.loss(features))
    with torch.autocast("cpu", torch.bfloat16):
        found = total(stage.objective.loss(features))
    assert expected.dtype == found.dtype == torch.float32
    assert torch.allclose(expected, found, rtol=1e-6), (expected, found)


CHECKS = (
    finite,
    one_row_an_example,
    gradient_for_every_parameter,
    order_does_not_matter,
    parts_give_the_same_gradients,
    no_collective,
    random_numbers_only_in_features,
    prepare_is_repeatable,
    state_is_in_parameters_and_buffers,
    loss_in_fp32,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", list(methods()))
def test_a_method_keeps_its_familys_contract(make: Make, check: Any, clip_of: ClipOf) -> None:
    check(make, clip_of)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sound_objective_passes(check: Any, clip_of: ClipOf) -> None:
    check(broken.Sound, clip_of)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (broken.NotFinite, finite),
        (broken.TooFewRows, one_row_an_example),
        (broken.ForgottenParameter, gradient_for_every_parameter),
        (broken.DetachedTexts, gradient_for_every_parameter),
        (broken.FirstRowsCountMore, order_does_not_matter),
        (broken.CenteredByTheBatch, parts_give_the_same_gradients),
        (broken.Collective, no_collective),
        (broken.PythonsGenerator, random_numbers_only_in_features),
        (broken.RandomLoss, random_numbers_only_in_features),
        (broken.RandomStart, prepare_is_repeatable),
        (broken.CountsInAnAttribute, state_is_in_parameters_and_buffers),
        (broken.HalfPrecisionLoss, loss_in_fp32),
    ],
)
def test_a_check_fails_on_what_breaks_its_promise(make: Make, check: Any, clip_of: ClipOf) -> None:
    with pytest.raises(AssertionError):
        check(make, clip_of)


def test_every_check_has_been_seen_to_fail() -> None:
    marks = test_a_check_fails_on_what_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    seen = {check for mark in marks if mark.name == "parametrize" for _, check in mark.args[1]}
    assert seen == set(CHECKS)
