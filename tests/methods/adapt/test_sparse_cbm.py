"""Concept bottlenecks are what their equations say, and their explanations add up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.adapt import sparse_cbm
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.sparse_cbm import ConceptMatrixSearch, SparseCBM, gumbel_loss, similarity_loss
from clipworks.parts.concepts import filter_concepts, read_concepts, world_concepts

NAMES = ["cat", "dog", "fish"]
CONCEPTS = ["fur", "fins", "a tail", "water", "whiskers"]
Y = np.arange(24) % 3


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(count: int = 24, seed: int = 0) -> Tensor:
    """Three clouds, raw (n, 16) fp64."""
    centers = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3 * (centers[np.arange(count) % 3] + 0.7 * noise)


def fitted(clip: Clip, **settings: Any) -> SparseCBM:
    given = {"concepts": CONCEPTS, "epochs": 3, "lr": 0.01, "batch_size": 8, "progress": False, **settings}
    return SparseCBM(clip, NAMES, **given).fit(features(), Y)


# --- the losses ---


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_gumbel_loss_is_the_naive_double_loop_over_the_same_noise() -> None:
    c = 3 * torch.randn(4, 6, generator=noise(1), dtype=torch.float64)
    generator, expected = noise(), {"all": 0.0, "diagonal": 0.0}
    for axis in (0, 1):
        drawn = torch.rand(4, 6, generator=generator, dtype=torch.float64)
        z = (c - (-drawn.log()).log()) / 0.7
        for b in range(4):
            for m in range(6):
                among = z[:, m] if axis == 0 else z[b]
                log = float(z[b, m]) - math.log(sum(math.exp(float(value)) for value in among))
                expected["all"] -= 0.5 * log / 24
                expected["diagonal"] -= 0.5 * log / 4 if b == m else 0.0
    assert float(gumbel_loss(c, 0.7, noise())) == pytest.approx(expected["all"], abs=1e-9)
    assert float(gumbel_loss(c, 0.7, noise(), "diagonal")) == pytest.approx(expected["diagonal"], abs=1e-9)


def test_the_gumbel_loss_is_a_penalty_on_spread() -> None:
    z = torch.randn(32, 50, generator=noise(1))
    draws = noise()
    means = [sum(float(gumbel_loss(k * z, 1.0, draws)) for _ in range(200)) / 200 for k in (0, 1, 3)]
    assert means[0] < means[1] < means[2]
    at_rest = float(gumbel_loss(z.double(), 1e6, noise()))
    assert at_rest == pytest.approx(0.5 * (math.log(32) + math.log(50)), abs=1e-9)
    assert math.isfinite(float(gumbel_loss(1e4 * z.sign(), 1.0, noise())))


def test_permuted_axes_change_no_loss_but_similarity() -> None:
    S, U, H = (torch.randn(*s, generator=noise(2), dtype=torch.float64) for s in ((8, 5), (5, 5), (3, 5)))
    order = torch.tensor([3, 0, 4, 1, 2])
    c, permuted = S @ U.T, S @ U[order].T
    torch.testing.assert_close(permuted @ H[:, order].T, c @ H.T, rtol=0, atol=1e-12)
    mean = [sum(float(gumbel_loss(x, 1.0, noise(k))) for k in range(200)) / 800 for x in (c, permuted)]
    assert mean[0] == pytest.approx(mean[1], rel=0.03)
    assert abs(float(similarity_loss(S, c) - similarity_loss(S, permuted))) > 0.01


def test_similarity_is_least_where_the_axes_are_the_concepts() -> None:
    S = torch.randn(8, 5, generator=noise(3), dtype=torch.float64) + 20
    for power in (1, 3):
        assert float(similarity_loss(S, S, power)) == pytest.approx(-1)
        assert float(similarity_loss(S, 2 * S.flip(1), power)) > -0.9


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
def test_contrastive_pairs_the_diagonal(shape: tuple[int, int]) -> None:
    c = torch.randn(*shape, generator=noise(4), dtype=torch.float64)
    expected = 0.0
    for k in range(3):
        expected -= float(c[k, k] - c[k].exp().sum().log() + c[k, k] - c[:, k].exp().sum().log()) / 6
    assert float(sparse_cbm.contrastive_loss(c)) == pytest.approx(expected)


# --- the bottleneck ---


@pytest.mark.parametrize("standardize", [False, True])
def test_the_folded_layers_are_the_three(clip: Clip, standardize: bool) -> None:
    cbm = fitted(clip, standardize=standardize)
    X = features(seed=9)
    K = clip.embed_texts(CONCEPTS).double()
    S = cbm.scale * unit(X) @ K.T
    if standardize:
        train = cbm.scale * unit(features()) @ K.T
        S = (S - train.mean(dim=0)) / train.std(dim=0)
    layers = cbm.module_.state_dict()
    y = S @ layers["cbl.weight"].double().T @ layers["head.weight"].double().T
    weights, offsets = cbm.fold()
    # The statistics are kept in fp32.
    atol = 1e-5 if standardize else 1e-10
    torch.testing.assert_close(unit(X) @ weights.T + offsets, y, rtol=1e-6, atol=atol)
    torch.testing.assert_close(cbm.logits(X), y, rtol=1e-6, atol=atol)


def test_explanations_add_up_to_the_logit(clip: Clip) -> None:
    cbm = fitted(clip)
    X = features(6, seed=9)
    logits = cbm.logits(X)
    c = cbm.concept_scores(X)
    contributions, chosen = cbm.contributions(X)
    for row, found in enumerate(cbm.explain(X, top=2)):
        assert found.label == cbm.predict(X)[row]
        assert len(found.reasons) == 2
        total = found.offset + found.others + sum(reason.contribution for reason in found.reasons)
        assert total == pytest.approx(found.logit, abs=1e-9)
        assert found.logit == pytest.approx(float(logits[row, chosen[row]]), abs=1e-9)
        m = CONCEPTS.index(found.reasons[0].concept)
        mean = cbm.concept_scores(features()).mean(dim=0)
        by_hand = (c[row, m] - mean[m]) * cbm.module_.head.weight[chosen[row], m].detach()
        assert found.reasons[0].contribution == pytest.approx(float(by_hand), abs=1e-9)
        assert abs(found.reasons[0].contribution) == pytest.approx(float(contributions[row].abs().max()))


def test_axes_mean_their_concepts_only_if_they_start_there(clip: Clip) -> None:
    kept, lost = (fitted(clip, kind="none", init=init, lr=1e-3) for init in ("identity", "uniform"))
    S, c = (clip.embed_texts(CONCEPTS).double() @ unit(features()).T, lost.concept_scores(features()).T)
    expected = [float(np.corrcoef(one, other)[0, 1]) for one, other in zip(S, c, strict=True)]
    assert lost.identity_.tolist() == pytest.approx(expected)
    assert float(kept.identity_.min()) > 0.9 > float(lost.identity_.min())
    told = [str(reason) for found in lost.explain(features()) for reason in found.reasons]
    assert any("in doubt" in one for one in told)
    assert not any("in doubt" in str(found) for found in kept.explain(features()))


@pytest.mark.parametrize("kind", ["gumbel", "contrastive", "l1", "similarity", "none"])
def test_a_first_step_is_adam_on_the_stated_loss_with_the_head_on_cross_entropy(
    clip: Clip, kind: Any
) -> None:
    start = fitted(clip, kind=kind, init="uniform", lr=1e-12, epochs=1, batch_size=24)
    learned = fitted(clip, kind=kind, init="uniform", lr=0.01, epochs=1, batch_size=24, l1=5.0)
    U, H = (
        start.module_.state_dict()[name].double().requires_grad_() for name in ("cbl.weight", "head.weight")
    )
    S = start.scale * unit(features()) @ clip.embed_texts(CONCEPTS).double().T
    entropy = F.cross_entropy(S @ U.T @ H.T, torch.from_numpy(Y))
    (of_head,) = torch.autograd.grad(entropy, H, retain_graph=True)
    torch.testing.assert_close(
        (learned.module_.head.weight - H).detach(),
        -0.01 * of_head.sign(),
        rtol=0,
        atol=1e-4,
        check_dtype=False,
    )
    if kind in ("l1", "similarity", "none"):  # the others depend on order and noise
        extra = {"l1": 5 * U.abs().sum() / 5, "similarity": similarity_loss(S, S @ U.T), "none": 0 * U.sum()}
        (of_u,) = torch.autograd.grad(entropy + extra[kind], U)
        moved = (learned.module_.cbl.weight - U).detach()
        torch.testing.assert_close(moved, -0.01 * of_u.sign(), rtol=0, atol=1e-4, check_dtype=False)


def test_both_layers_learn_the_clip_does_not_and_texts_are_read_once(clip: Clip) -> None:
    before = copy.deepcopy(clip.state_dict())
    start = fitted(clip, lr=1e-12)
    with mock.patch.object(Clip, "embed_texts", autospec=True, side_effect=Clip.embed_texts) as reads:
        cbm = fitted(clip)
    assert reads.call_count == 1
    for one, other in zip(start.module_.parameters(), cbm.module_.parameters(), strict=True):
        assert not torch.allclose(one, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.state_dict().items())


def test_with_as_many_concepts_as_dimensions_every_linear_probe_can_be_had(clip: Clip) -> None:
    cbm = fitted(clip, concepts=list(world_concepts()), kind="none")
    A = torch.randn(3, 16, generator=noise(5), dtype=torch.float64)
    K = clip.embed_texts(list(cbm.concepts_)).double()
    heads = A @ torch.linalg.pinv(K) / cbm.scale
    cbm.module_.double().load_state_dict(
        {**cbm.module_.state_dict(), "cbl.weight": torch.eye(len(K)), "head.weight": heads}
    )
    torch.testing.assert_close(cbm.fold()[0], A, rtol=1e-6, atol=1e-6)


def test_a_permuted_list_of_concepts_permutes_names_alone(clip: Clip) -> None:
    order = [3, 0, 4, 1, 2]
    one = fitted(clip, kind="none")
    other = fitted(clip, kind="none", concepts=[CONCEPTS[i] for i in order], epochs=1, lr=1e-12)
    other.module_.cbl.weight.data = one.module_.cbl.weight.data[order][:, order]
    other.module_.head.weight.data = one.module_.head.weight.data[:, order]
    other = other.calibrate(features())
    X = features(6, seed=9)
    for a, b in zip(one.explain(X), other.explain(X), strict=True):
        assert [reason.concept for reason in a.reasons] == [reason.concept for reason in b.reasons]
        assert a.logit == pytest.approx(b.logit, abs=1e-6)


def test_settings_that_cannot_work_are_refused(clip: Clip) -> None:
    for settings, said in (
        ({"kind": "gumble"}, "gumble"),
        ({"init": "eye"}, "eye"),
        ({"pairing": "none"}, "pairing"),
        ({"temperature": 0.0}, "temperature"),
        ({"concepts": None}, "concepts"),
        ({"concepts": ["fur"]}, "two concepts"),
        ({"concepts": ["fur", "fur"]}, "fur"),
    ):
        with pytest.raises(ConfigError, match=said):
            fitted(clip, **settings)
    with mock.patch.object(sparse_cbm, "MANY", 4), pytest.warns(UserWarning, match="25 weights"):
        fitted(clip)


# --- what the authors' trainer saves ---


def released(path: Path, **changes: Any) -> Path:
    """A file of theirs: order of classes as trained, a whole backbone beside U and H."""
    weights = {
        "cbl.weight": torch.randn(5, 5, generator=noise(6)),
        "head.weight": torch.randn(3, 5, generator=noise(7)),
        "backbone.logit_scale": torch.tensor(4.6),
        **changes,
    }
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    torch.save({"91.17_model_state_dict": kept}, path)
    return path


@pytest.mark.checkpoint("sparse-cbm")
def test_a_checkpoint_of_the_authors_gives_their_logits(clip: Clip, tmp_path: Path) -> None:
    path = released(tmp_path / "91.17_checkpoint_9_epoch.pth")
    names = ["fish", "cat", "dog"]
    cbm = SparseCBM.from_checkpoint(path, clip, names, CONCEPTS)
    held = torch.load(path, weights_only=True)["91.17_model_state_dict"]
    S = cbm.scale * unit(features()) @ clip.embed_texts(CONCEPTS).double().T
    y = S @ held["cbl.weight"].double().T @ held["head.weight"].double().T
    assert list(cbm.predict(features())) == [names[place] for place in y.argmax(dim=1)]
    with pytest.raises(ConfigError, match="calibrate"):
        cbm.explain(features())
    assert len(cbm.calibrate(features()).explain(features())) == 24
    again = Adapter.load(cbm.save(tmp_path / "run"), clip)
    assert np.array_equal(again.predict_proba(features()), cbm.predict_proba(features()))


@pytest.mark.checkpoint("sparse-cbm")
def test_a_checkpoint_that_does_not_fit_is_refused(clip: Clip, tmp_path: Path) -> None:
    for changes, said in (
        ({"head.weight": None}, "head.weight"),
        ({"cbl.weight": torch.ones(4, 5)}, r"\(4, 5\)"),
        ({"lora.weight": torch.ones(2)}, "lora.weight"),
    ):
        path = released(tmp_path / "odd.pth", **changes)
        with pytest.raises(CheckpointError, match=said):
            SparseCBM.from_checkpoint(path, clip, NAMES, CONCEPTS)
    torch.save(released, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        SparseCBM.from_checkpoint(tmp_path / "model.bin", clip, NAMES, CONCEPTS)


# --- concept matrix search ---


def search(clip: Clip, **settings: Any) -> ConceptMatrixSearch:
    return ConceptMatrixSearch(clip, NAMES, **{"concepts": CONCEPTS, **settings}).fit()


def with_texts(**vectors: Tensor) -> Any:
    """Replaces what a text tower says of some phrases."""
    return mock.patch.object(Clip, "embed_texts", lambda _, texts: torch.stack([vectors[t] for t in texts]))


def test_the_search_is_a_naive_loop_and_a_linear_classifier(clip: Clip) -> None:
    K = clip.embed_texts(["fur", "fins", "tail", "water", "whiskers"]).double()  # bare
    W, f = clip.embed_texts(NAMES).double(), unit(features())
    V, T = f @ K.T, W @ K.T
    V, T = V / (V.sum(dim=1, keepdim=True) + 1e-8), T / (T.sum(dim=1, keepdim=True) + 1e-8)
    cosines = torch.tensor([[float(v @ t / v.norm() / t.norm()) for t in T] for v in V], dtype=torch.float64)
    found = search(clip)
    torch.testing.assert_close(found.logits(f), found.scale * cosines, rtol=1e-9, atol=1e-9)
    cubed = search(clip, power=3).logits(f)
    expected = found.scale * unit(V**3) @ unit(T**3).T
    torch.testing.assert_close(cubed, expected, rtol=1e-9, atol=1e-9)
    assert search(clip, rule="max").logits(f).argmax(1).tolist() == [
        int(T[:, v.argmax()].argmax()) for v in V
    ]
    # The linear form, where no row sum is negative.
    positive = (f @ K.sum(dim=0) > 0) & bool((W @ K.sum(dim=0) > 0).all())
    linear = (f @ K.T @ K @ W.T / (W @ K.T).norm(dim=1)).argmax(dim=1)
    assert torch.equal(found.logits(f).argmax(dim=1)[positive], linear[positive])
    classes = found.class_features().double()
    assert torch.equal(
        ((f @ classes.T) * (W @ K.T @ K / (W @ K.T).norm(dim=1)[:, None]).norm(dim=1)).argmax(1)[positive],
        linear[positive],
    )


def test_orthonormal_concepts_give_zero_shot(clip: Clip) -> None:
    axes = dict(zip("abcdefghijklmnop", torch.eye(16), strict=True))
    names = {name: unit(torch.rand(16, generator=noise(i))) for i, name in enumerate(NAMES)}
    f = unit(features().abs())
    with with_texts(**axes, **names):
        found = search(clip, concepts=list(axes)).logits(f)
    W = torch.stack([names[name] for name in NAMES]).double()
    torch.testing.assert_close(found, search(clip).scale * f @ W.T, rtol=1e-6, atol=1e-6)


def test_order_and_copies_of_concepts_do_not_matter_to_the_search(clip: Clip) -> None:
    f = features()
    one = search(clip, center=True).logits(f)
    torch.testing.assert_close(search(clip, concepts=CONCEPTS[::-1], center=True).logits(f), one)
    vectors = {name: clip.embed_texts([name])[0] for name in ("fur", "water", *NAMES)}
    twice = {**vectors, "fur": vectors["fur"] / 2**0.5, "fleece": vectors["fur"] / 2**0.5}
    with with_texts(**vectors):
        plain = search(clip, concepts=["fur", "water"]).logits(f)
    with with_texts(**twice):
        copied = search(clip, concepts=["fur", "fleece", "water"]).logits(f)
    # Sums of rows are others, and with a sign of its own each leaves the cosine's size as it was.
    torch.testing.assert_close(copied.abs(), plain.abs(), rtol=1e-4, atol=1e-4)


def test_the_search_serves_other_names(clip: Clip) -> None:
    other = search(clip).for_classes(["bird", "an  Ox"])
    same = ConceptMatrixSearch(clip, ["bird", "ox"], concepts=CONCEPTS).fit()
    assert list(other.classes_) == ["an  Ox", "bird"]
    torch.testing.assert_close(other.logits(features()), same.logits(features()).flip(1))
    for settings in ({"rule": "mean"}, {"power": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            search(clip, **settings)


# --- lists ---


def test_concepts_come_from_a_list_a_file_or_the_world(tmp_path: Path) -> None:
    (tmp_path / "concepts.txt").write_text("fur\n\n a tail \n", encoding="utf-8")
    assert read_concepts(tmp_path / "concepts.txt") == ("fur", "a tail")
    assert read_concepts(str(tmp_path / "concepts.txt")) == read_concepts(["fur", " a tail "])
    assert read_concepts("world") == world_concepts()
    with pytest.raises(DataError, match=r"nothing\.txt"):
        read_concepts(tmp_path / "nothing.txt")


def test_the_worlds_concepts_stand_in_the_order_of_its_attributes() -> None:
    from clipworks.data.world.scenes import ATTRIBUTE_NAMES

    said = dict(zip(ATTRIBUTE_NAMES, world_concepts(), strict=True))
    assert said["color:red"] == "red" and said["style:sketch"] == "a pencil sketch"
    assert said["background:water"] == "on water"


def test_the_filter_drops_long_phrases_classes_and_the_less_typical_of_two_alike(clip: Clip) -> None:
    axes = torch.eye(16)
    vectors = {
        "cat": axes[0],
        "feline": unit(axes[0] + 0.1 * axes[1]),
        "paws": unit(axes[2] + axes[3]),
        "claws": unit(axes[2] + axes[3] + 0.3 * axes[4]),
        "night": axes[4],
        "fur": axes[5],
    }
    given = ["The cat", "feline", "paws", "claws", "night", "fur", "x" * 31]
    with with_texts(**vectors):
        # "claws" is like "night" as well, so "paws" goes.
        assert filter_concepts(clip, given, ["Cat"]) == ["claws", "night", "fur"]
        assert filter_concepts(clip, given, ["Cat"], other_cutoff=1.1, class_cutoff=1.1) == given[1:-1]
    assert filter_concepts(clip, ["a cat", "the dog"], NAMES) == []
