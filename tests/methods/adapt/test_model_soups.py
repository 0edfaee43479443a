"""Soups are exact averages, chosen as a naive loop chooses, and made of runs of one start."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipworks.checkpoints import layouts, rules
from clipworks.core.clip import Clip, unit
from clipworks.core.config import StemStage
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError
from clipworks.methods.adapt import model_soups as soups
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.model_soups import FineTuned, ModelSoup

NAMES = ["blue thing", "green thing", "red thing"]
Y = np.arange(18) % 3


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(seed: int = 0, count: int = 18) -> Tensor:
    """Three overlapping clouds, raw (n, 16)."""
    centers = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return centers[np.arange(count) % 3] + 1.5 * noise


def pictures(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 128, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    for row in range(count):
        made[row, 2 - row % 3] += 120
    return list(made)


def states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(5, 3, generator=generator, dtype=dtype) * 10 ** (-3 * row)
            for row, name in enumerate("ab")
        }
        made.append({**weights, "steps": torch.tensor(7)})
    return made


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("count", [1, 3, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_copies_give_themselves_back_bit_for_bit(count: int, dtype: torch.dtype) -> None:
    (one,) = states(1, dtype)
    assert same(soups.average([one] * count), one)


def test_the_order_of_ingredients_does_not_matter_and_the_average_is_exact() -> None:
    ingredients = states(7)
    found = soups.average(ingredients)
    assert same(found, soups.average(ingredients[::-1]))
    assert same(found, soups.average(ingredients[3:] + ingredients[:3]))
    for name in "ab":
        exact = np.array(
            [
                [math.fsum(float(one[name][i, j]) for one in ingredients) / 7 for j in range(3)]
                for i in range(5)
            ]
        )
        assert np.array_equal(found[name].numpy(), exact.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": torch.zeros(5, 4)}, r"^a is \(5, 3\)"),
        ({"a": torch.zeros(5, 3, dtype=torch.int64)}, r"^a is"),
        ({"c": torch.zeros(1)}, r"^c is in ingredient"),
        ({"b": torch.full((5, 3), math.nan)}, r"^b holds values that are not finite"),
        ({"steps": torch.tensor(8)}, r"^steps holds whole numbers"),
    ],
)
def test_weights_without_an_average_are_refused_by_name(change: dict[str, Tensor], said: str) -> None:
    one, two = states(2)
    with pytest.raises(CheckpointError, match=said):
        soups.average([one, {**two, **change}])
    with pytest.raises(ConfigError, match="at least one"):
        soups.average([])


def naive_greedy(ingredients: list[Any], accuracy: Any, strict: bool) -> tuple[list[int], float]:
    alone = [accuracy(one) for one in ingredients]
    order = np.argsort([-value for value in alone], kind="stable").tolist()
    members, best = [order[0]], alone[order[0]]
    for place in order[1:]:
        mean = {n: torch.stack([ingredients[i][n] for i in [*members, place]]).mean(dim=0) for n in "ab"}
        found = accuracy(mean)
        if found > best or (found == best and not strict):
            members, best = [*members, place], found
    return members, best


@pytest.mark.parametrize("strict", [True, False])
def test_greedy_is_the_naive_loop(strict: bool) -> None:
    ingredients, chosen = states(5), set()
    for seed in range(12):
        target = torch.randn(5, 3, generator=torch.Generator().manual_seed(100 + seed))

        def accuracy(weights: Any, target: Tensor = target) -> float:
            return round(float(-(weights["a"] - target).square().sum()), 1)

        soup = soups.greedy(ingredients, accuracy, strict)
        members, best = naive_greedy(ingredients, accuracy, strict)
        assert list(soup.members) == members
        assert accuracy(soup.weights) == best >= max(soup.accuracies)
        assert same(soup.weights, soups.average([ingredients[place] for place in members]))
        assert len(soup.history) == 5
        chosen.add(len(members))
    assert len(chosen) > 1


def test_a_tie_is_left_out_by_the_strict_rule_alone() -> None:
    ingredients = states(2)
    assert soups.greedy(ingredients, lambda _: 0.5).members == (
        min((0, 1), key=lambda i: soups.digest(ingredients[i])),
    )
    assert len(soups.greedy(ingredients, lambda _: 0.5, strict=False).members) == 2
    assert same(soups.greedy(ingredients[:1], lambda _: 0.0).weights, ingredients[0])


def head_loss(weights: dict[str, Tensor], beta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    X, y = batch
    logits = beta * (X.to(weights["a"]) @ weights["a"].mT) + weights["b"].sum()
    return nn.functional.cross_entropy(logits, y)


def test_learned_shares_follow_the_gradient_of_the_plain_form() -> None:
    ingredients = states(3, torch.float64)
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    batch = (X, torch.arange(20) % 5)
    weights, shares = soups.learned(ingredients, head_loss, lambda _: [], epochs=1)
    assert all(torch.equal(share, torch.full((3,), 1 / 3, dtype=torch.float64)) for share in shares.values())
    torch.testing.assert_close(weights, soups.average(ingredients), rtol=1e-12, atol=1e-12)

    alpha, beta = torch.zeros(2, 3, dtype=torch.float64).requires_grad_(), torch.ones(()).requires_grad_()
    optimizer = torch.optim.AdamW([alpha, beta], lr=0.05, weight_decay=0.0)
    for _ in range(15):
        mixed = {
            name: torch.einsum(
                "k,kij->ij", alpha[row].softmax(0), torch.stack([o[name] for o in ingredients])
            )
            for row, name in enumerate("ab")
        }
        optimizer.zero_grad()
        head_loss(mixed, beta, batch).backward()
        optimizer.step()
    weights, shares = soups.learned(ingredients, head_loss, lambda _: [batch] * 3, epochs=5)
    torch.testing.assert_close(shares["a"], alpha[0].softmax(0).detach(), rtol=1e-9, atol=1e-9)
    assert (shares["a"] - 1 / 3).abs().max() > 0.05
    together = soups.learned(ingredients, head_loss, lambda _: [batch], by_tensor=False)[1]
    assert torch.equal(together["a"], together["b"])


def test_a_soup_of_files_reads_safetensors_tensor_by_tensor(tmp_path: Path) -> None:
    ingredients, paths = states(3), []
    for number, one in enumerate(ingredients):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(one, paths[-1])
    assert same(dict(soups.open_weights(paths[0])), ingredients[0])
    soups.soup_of(paths, tmp_path / "soup.safetensors")
    assert same(load_file(tmp_path / "soup.safetensors"), soups.average(ingredients))
    soup = soups.soup_of(paths, tmp_path / "greedy.safetensors", lambda w: float(w["a"][0, 0]))
    assert soup.members == (int(np.argmax([float(one["a"][0, 0]) for one in ingredients])),)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="broken"):
        soups.soup_of([tmp_path / "broken.safetensors"], tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        soups.open_weights(tmp_path / "none.safetensors")


def test_untrained_the_head_is_zero_shot_and_has_no_scale_left(clip: Clip) -> None:
    X = features()
    tuned = FineTuned(clip, NAMES, lr=1e-12, epochs=1, progress=False).fit(X, Y)
    expected = tuned.scale * unit(X) @ clip.embed_texts([f"a photo of a {name}." for name in NAMES]).mT
    torch.testing.assert_close(tuned.logits(X), expected, rtol=0, atol=1e-4)
    assert {name for name, _ in tuned.module_.named_parameters()} == {"head.weight", "head.bias"}


def test_a_probed_start_is_scikit_learns(clip: Clip) -> None:
    from sklearn.linear_model import LogisticRegression

    for names in (NAMES, NAMES[:2]):
        X = features()
        y = Y % len(names)
        tuned = FineTuned(clip, names, head="probe", lr=1e-12, epochs=1, progress=False).fit(X, y)
        peer = LogisticRegression(C=soups.PROBE_C, max_iter=1000).fit(unit(X).double().numpy(), y)
        expected = peer.predict_proba(unit(X).double().numpy())
        assert np.allclose(tuned.predict_proba(X), expected, atol=1e-4)


def test_a_uniform_soup_is_the_average_of_its_runs(clip: Clip) -> None:
    X = features()
    soup = ModelSoup(clip, NAMES, kind="uniform", runs=3, lr=1e-2, epochs=2, progress=False).fit(X, Y)
    runs = [
        FineTuned(clip, NAMES, lr=rate, seed=seed, epochs=2, progress=False).fit(X, Y)
        for seed, rate in enumerate(soup.rates)
    ]
    assert soup.rates == pytest.approx([1e-2 / 30**0.5, 1e-2, 1e-2 * 30**0.5])
    assert same(soup.module_.state_dict(), soups.average([run.module_.state_dict() for run in runs]))
    assert soup.members_ == (0, 1, 2) and soup.distance_ > 0
    assert soup.lr == 1e-2 and soup.seed == 0


def test_a_greedy_soup_is_not_below_its_best_run_on_what_chose_it(clip: Clip) -> None:
    X, held = features(), features(seed=3, count=60)
    y = np.arange(60) % 3
    soup = ModelSoup(clip, NAMES, runs=4, lr=1e-1, epochs=3, progress=False)
    soup.fit(X, Y, validation=(held, y))
    assert soup.score(held, y) == max(a for _, a, kept in soup.history_ if kept) >= max(soup.accuracies_)
    assert len(set(soup.accuracies_)) > 1


def test_towers_are_averaged_and_the_clip_stays(clip: Clip) -> None:
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    soup = ModelSoup(clip, NAMES, kind="uniform", runs=2, lr=1e-3, epochs=1, progress=False)
    soup.fit(pictures(), np.arange(6) % 3)
    assert same(before, clip.state_dict())
    moved = soups.distance(soup.module_["image"].state_dict(), clip.image.state_dict())
    assert 0 < moved < soup.distance_


def test_saved_runs_of_one_start_make_a_soup(clip: Clip, tmp_path: Path) -> None:
    X, held = features(), features(seed=3)
    runs = []
    for number, lr in enumerate((1e-3, 1e-1)):
        run = FineTuned(clip, NAMES, lr=lr, epochs=2, progress=False).fit(X, Y)
        runs.append(run.save(tmp_path / str(number)))
    soup = ModelSoup.from_runs(runs, clip)
    both = [load_file(run / "learned.safetensors") for run in runs]
    assert same(soup._learned(), soups.average(both))
    chosen = ModelSoup.from_runs(runs, clip, (held, Y))
    assert len(chosen.history_) == 2
    loaded = Adapter.load(chosen.save(tmp_path / "soup"), clip)
    assert np.array_equal(loaded.predict_proba(held), chosen.predict_proba(held))

    probed = FineTuned(clip, NAMES, head="probe", epochs=1, progress=False).fit(X, Y).save(tmp_path / "probe")
    with pytest.raises(CheckpointError, match="another start"):
        ModelSoup.from_runs([*runs, probed], clip)
    assert ModelSoup.from_runs([*runs, probed], clip, force=True).members_ == (0, 1, 2)
    other = (
        FineTuned(clip, ["a cat", *NAMES[1:]], epochs=1, progress=False).fit(X, Y).save(tmp_path / "other")
    )
    with pytest.raises(CheckpointError, match="other classes"):
        ModelSoup.from_runs([*runs, other], clip)


def test_a_validation_picture_that_was_trained_on_raises_a_warning(clip: Clip, tmp_path: Path) -> None:
    images, y = pictures(12), np.arange(12) % 3
    settings: dict[str, Any] = {"epochs": 1, "progress": False}
    runs = [
        FineTuned(clip, NAMES, seed=seed, **settings).fit(images[:6], y[:6]).save(tmp_path / str(seed))
        for seed in (0, 1)
    ]
    with pytest.warns(UserWarning, match="fitted on 2 of the validation"):
        ModelSoup.from_runs(runs, clip, (images[4:], y[4:]))
    ModelSoup.from_runs(runs, clip, (images[6:], y[6:]))  # warnings are errors


def test_statistics_that_differ_raise_a_warning_and_are_measured_anew(
    tiny_clip: Callable[..., Any], tmp_path: Path
) -> None:
    stem = (StemStage(8), StemStage(16), StemStage(32))
    clip = tiny_clip(tokenizer=ClipTokenizer(), image={"stem": stem})
    images, y = pictures(), np.arange(6) % 3
    settings: dict[str, Any] = {"lr": 1e-3, "epochs": 1, "progress": False}
    plain = ModelSoup(clip, NAMES, kind="uniform", runs=2, **settings).fit(images, y)  # nothing to warn of
    layers = [m for m in plain.module_["image"].modules() if isinstance(m, nn.BatchNorm2d)]
    assert layers and not any(layer.running_mean.any() for layer in layers)  # type: ignore[union-attr]

    runs = []
    for number in range(2):
        run = FineTuned(clip, NAMES, seed=number, **settings).fit(images, y)
        for layer in run.module_["image"].modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var.add_(number)  # type: ignore[union-attr]
        runs.append(run.save(tmp_path / str(number)))
    with pytest.warns(UserWarning, match="running_var differs"):
        soup = ModelSoup.from_runs(runs, clip)

    seen: list[Tensor] = []
    first = next(m for m in soup.module_["image"].modules() if isinstance(m, nn.BatchNorm2d))
    hook = first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    before = {name: tensor.clone() for name, tensor in soup.module_.state_dict().items()}
    soup.recalibrate(images)
    hook.remove()
    assert first.running_var is not None and first.running_mean is not None and not first.training
    torch.testing.assert_close(first.running_mean, seen[0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(first.running_var, seen[0].var(dim=(0, 2, 3)))
    changed = {name for name, t in soup.module_.state_dict().items() if not torch.equal(t, before[name])}
    assert changed and all("running" in name or "tracked" in name for name in changed)
    with pytest.raises(ConfigError, match="nothing to recalibrate"):
        ModelSoup(clip, NAMES, kind="uniform", runs=2, **settings).fit(features(), Y).recalibrate(images)


@pytest.mark.parametrize("wrong", [{"kind": "best"}, {"runs": 0}, {"spread": 0.5}, {"head": "random"}])
def test_settings_without_meaning_are_named(clip: Clip, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ModelSoup(clip, NAMES, **{"epochs": 1, "progress": False, **wrong}).fit(features(), Y)


def released(clip: Clip, generator: torch.Generator) -> dict[str, Tensor]:
    """A file as the authors' code writes it: no text blocks, a tuned tower, a head."""
    theirs = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
    theirs = {f"model.{name}": t for name, t in theirs.items() if not name.startswith("transformer.")}
    for name in theirs:
        if name.startswith("model.visual."):
            noise = torch.randn(theirs[name].shape, generator=generator)
            theirs[name] = theirs[name] + 0.1 * noise
    head = {
        "weight": torch.randn(3, clip.width, generator=generator),
        "bias": torch.randn(3, generator=generator),
    }
    return {**theirs, **{f"classification_head.{name}": t for name, t in head.items()}}


@pytest.mark.checkpoint("model-soups")
def test_a_released_model_loads_without_text_blocks(clip: Clip, tmp_path: Path) -> None:
    weights, path = released(clip, torch.Generator().manual_seed(0)), tmp_path / "model_7.pt"
    torch.save(weights, path)
    tuned = FineTuned.from_checkpoint(path, clip, NAMES)
    head = tuned.module_["head"]
    assert torch.equal(head.weight.detach(), weights["classification_head.weight"])
    proj = tuned.module_["image"].projection.weight.detach()
    assert torch.equal(proj.mT, weights["model.visual.proj"])
    vectors = unit(tuned.module_["image"](torch.stack(pictures())))
    expected = (vectors @ head.weight.mT + head.bias).softmax(dim=1).detach()
    assert np.allclose(tuned.predict_proba(pictures()), expected, atol=1e-5)

    for change, said in (
        ({"model.text_projection": weights["model.text_projection"] + 1}, "another one"),
        ({"model.extra": torch.zeros(1)}, "extra"),
        ({"classification_head.weight": torch.zeros(4, clip.width)}, "head"),
    ):
        torch.save({**weights, **change}, path)
        with pytest.raises(CheckpointError, match=said):
            FineTuned.from_checkpoint(path, clip, NAMES)
    torch.save({name: t for name, t in weights.items() if "classification" not in name}, path)
    with pytest.raises(CheckpointError, match="classification_head"):
        FineTuned.from_checkpoint(path, clip, NAMES)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="more than tensors"):
        FineTuned.from_checkpoint(path, clip, NAMES)
