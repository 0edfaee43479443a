"""Fine-tuning: its loss, what its guards keep, what equal captions do to a batch, and a whole run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.contracts import pretrain as contract
from torch import Tensor
from torch.nn import functional as F

import clipworks
from clipworks.core.clip import unit
from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.data.batch import Batch
from clipworks.data.pairs import open_pairs
from clipworks.engine import Recipe, fit
from clipworks.engine.checkpoints import tensors_once
from clipworks.errors import ConfigError, DataError
from clipworks.methods.pretrain import finetune as method
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.finetune import FineTune, FineTuning, Measures
from clipworks.methods.pretrain.plan import objective_named
from clipworks.parts.duplicates import CaptionKeys

SAME = 100


@pytest.fixture
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 12})


@pytest.fixture
def clip_of(tiny_clip: Callable[..., Any]) -> Callable[[int], Any]:
    return lambda seed: tiny_clip(
        seed, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 12}
    )


def features(images: Tensor, texts: Tensor, keys: Tensor | None, bias: float | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"image": images, "text": texts, "scale": torch.tensor(np.log(20.0))}
    if keys is not None:
        found["caption"] = keys
    return found if bias is None else found | {"bias": torch.tensor(bias)}


def rows(n: int, seed: int, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(n, width, generator=generator, dtype=torch.float64))


def gradients(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of the loss, with respect to the rows of pictures and texts."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("image", "text")}
    FineTune().loss({**given, **leaves})["contrastive"].backward()
    return leaves["image"].grad, leaves["text"].grad  # type: ignore[return-value]


# --- the objective ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_the_objective_keeps_its_familys_contract(check: Any, clip_of: Any) -> None:
    check(lambda: objective_named("finetune"), clip_of)


@pytest.mark.parametrize("bias", [None, -3.0])
def test_different_captions_leave_the_loss_that_of_clip(bias: float | None) -> None:
    given = features(rows(9, 0), rows(9, 1), torch.arange(9), bias)
    plain = ClipObjective("softmax" if bias is None else "sigmoid").loss(given)["contrastive"]
    torch.testing.assert_close(FineTune().loss(given)["contrastive"], plain)


def test_equal_captions_share_the_target_as_in_a_loop() -> None:
    keys = torch.tensor([5, 7, 5, 9, 7, 5])
    given = features(rows(6, 0), rows(6, 1), keys)
    logits = 20.0 * given["image"] @ given["text"].T
    expected = 0.0
    for scores in (logits, logits.T):
        for i in range(6):
            positive = [j for j in range(6) if keys[j] == keys[i]]
            expected -= float(scores[i].log_softmax(0)[positive].mean()) / 12
    assert float(FineTune().loss(given)["contrastive"]) == pytest.approx(expected, rel=1e-6)


def test_scale_and_bias_stay_and_rates_fall_towards_the_input(clip: Any) -> None:
    objective = FineTune(FineTuning(layer_decay=0.5))
    prepared = objective.prepare(clip.half())
    assert all(p.dtype == torch.float32 for p in prepared.parameters())
    assert not prepared.scale.requires_grad and prepared.image.projection.weight.requires_grad
    assert sorted({group["lr_scale"] for group in objective.groups(prepared)}) == [0.125, 0.25, 0.5, 1.0]
    assert FineTune(FineTuning(frozen_scale=False)).prepare(clip).scale.requires_grad


def test_the_first_step_of_a_training_is_as_long_as_the_level_allows(clip: Any, tmp_path: Path) -> None:
    """AdamW's first step moves what has a clear gradient by the learning rate, whatever the gradient."""
    before = {name: tensor.clone() for name, tensor in tensors_once(clip).items()}
    objective = FineTune(FineTuning(layer_decay=0.5, weight_decay=0.0))
    recipe = Recipe(steps=1, lr=1e-3, warmup=0, eps=1e-12, precision="fp32", scale_limit=None)
    fit(clip, objective, [contract.pairs_of()], recipe, folder=tmp_path, show="nothing")
    expected = {
        "image.projection.weight": 1.0,
        "image.blocks.1.mlp": 0.5,
        "text.blocks.0.ln_1": 0.25,
        "scale": 0.0,
    }
    for start, share in expected.items():
        moved = [
            float((t - before[name]).abs().max())
            for name, t in tensors_once(clip).items()
            if name.startswith(start)
        ]
        assert max(moved) == pytest.approx(1e-3 * share, rel=1e-2, abs=1e-9), start


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_of_batch_norms_stay_where_they_are_frozen(frozen: bool) -> None:
    from clipworks.core.clip import Clip
    from clipworks.core.config import Config, ResNetConfig, TextConfig, uniform_blocks

    blocks = uniform_blocks(depth=1, width=32, heads=2)
    config = Config(
        image=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4),
        text=TextConfig(context_length=8, vocab_size=64, width=32, blocks=blocks),
        width=16,
        name="tiny",
    )
    clip = Clip.from_config(config).train()
    before = {name: buffer.clone() for name, buffer in clip.named_buffers()}
    ids = torch.randint(1, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = Batch(images=torch.rand(4, 3, 32, 32), texts={"alt": Tokens(ids, torch.full((4,), 5))})
    FineTune(FineTuning(frozen_statistics=frozen)).features(clip, batch)
    same = all(torch.equal(buffer, before[name]) for name, buffer in clip.named_buffers())
    assert same == frozen


# --- a hundred captions that say the same ----------------------------------------------------------------


def hundred(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """100 different pictures of one thing with one text vector, 28 with others; keys."""
    images = unit(rows(1, seed) + 0.3 * rows(SAME, seed + 1))
    images, texts = (
        torch.cat([images, rows(28, seed + 2)]),
        torch.cat([rows(1, seed).expand(SAME, -1), rows(28, seed + 3)]),
    )
    return images, texts, torch.cat([torch.zeros(SAME), torch.arange(1, 29)]).long()


def test_captions_that_say_the_same_are_pulled_apart_by_infonce_and_not_by_ours() -> None:
    images, texts, keys = hundred()
    own, plain = (gradients(features(images, texts, k))[1][:SAME] for k in (keys, None))
    apart = [(one - one.mean(0)).norm(dim=1).max() / one.norm(dim=1).mean() for one in (own, plain)]
    assert apart[0] < 1e-9 and apart[1] > 0.5


def test_literally_equal_captions_cost_infonce_a_constant_only() -> None:
    """Where the vectors of equal captions are equal, the softmax form moves the weights alike with and
    without shared targets: what 99 false negatives push, the tower's one output for that text sums away.
    """
    images, texts, keys = hundred()
    (own_i, own_t), (plain_i, plain_t) = (gradients(features(images, texts, k)) for k in (keys, None))
    torch.testing.assert_close(own_i, plain_i)
    torch.testing.assert_close(own_t[:SAME].sum(0), plain_t[:SAME].sum(0))


def test_the_sigmoid_form_is_pushed_from_every_pair_that_says_the_same_unless_it_is_told() -> None:
    """Perfect vectors: each picture is its text, different texts are opposite. Ours wants hardly anything
    changed; the plain form pushes the hundred pictures off what they show, 99 times as hard as it pulls.
    """
    direction = F.one_hot(torch.tensor([0]), 8).double()
    images = torch.cat([direction.expand(SAME, -1), -direction.expand(28, -1)])
    keys = torch.cat([torch.zeros(SAME), torch.ones(28)]).long()
    pull = [-gradients(features(images, images, k, 0.0))[0][0] @ direction[0] for k in (keys, None)]
    assert pull[0] > 0 > pull[1] and abs(pull[0]) < 1e-6 < abs(pull[1])


@pytest.mark.parametrize("told", [True, False])
def test_after_training_a_hundred_captions_that_say_the_same_name_the_same(told: bool) -> None:
    """Text vectors, each its own, trained against fixed pictures: 100 of one thing, 28 of others.

    Told that they say the same, the 100 end as one vector; plain InfoNCE gives each a vector of its own, bent
    towards the noise of the one picture it came with.
    """
    images, texts, keys = hundred()
    texts = (texts + 0.1 * rows(len(texts), 9)).requires_grad_()
    optimizer = torch.optim.Adam([texts], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        given = features(images, unit(texts), keys if told else None)
        FineTune().loss(given)["contrastive"].backward()
        optimizer.step()
    found = unit(texts.detach())
    right = (found[SAME:] @ images.T).argmax(1) == torch.arange(SAME, SAME + 28)
    assert right.all()
    least = float((found[:SAME] @ found[:SAME].T).min())
    assert least > 0.999 if told else least < 0.9, least


@pytest.mark.parametrize("told", [True, False])
def test_a_sigmoid_model_keeps_a_hundred_pictures_with_what_they_show(
    tiny_clip: Callable[..., Any], told: bool
) -> None:
    """100 red pictures, "red thing" said in many ways, beside 28 other pairs; a model with SigLIP's loss.

    Untold, the cosine of red pictures that were not trained on with what they show ends far below 1.
    """
    tokenizer = ClipTokenizer(context_length=16)
    config = {"image": {"image_size": 16}, "text": {"context_length": 16}, "sigmoid": True}
    clip = tiny_clip(0, tokenizer=tokenizer, **config)
    ways = [f"{article}red thing{end}" for article in ("a ", "the ", "") for end in ("", ".", "!", "...")]
    generator = torch.Generator().manual_seed(1)
    red = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    pictures = (red + 0.1 * torch.randn(SAME + 20, 3, 16, 16, generator=generator)).clamp(0, 1)
    others = torch.rand(28, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16)
    captions = [ways[i % len(ways)] for i in range(SAME)] + [f"number {i}" for i in range(28)]
    batch = Batch(images=torch.cat([pictures[:SAME], others]), texts={"alt": tokenizer(captions)})
    batch = CaptionKeys(captions, tokenizer).of(batch)
    assert batch.features["caption"].unique().numel() == 29
    objective = FineTune(FineTuning(same_captions=told, frozen_scale=False))
    clip = objective.prepare(clip).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        objective.loss(objective.features(clip, batch))["contrastive"].backward()
        optimizer.step()
    cosine = float((clip.embed_images(pictures[SAME:]) @ clip.embed_texts(ways).T).mean())
    assert cosine > 0.95 if told else cosine < 0.7, cosine


# --- a whole run -----------------------------------------------------------------------------------------

NAMES = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "yellow": (220, 210, 40)}
QUICK = FineTuning(
    epochs=6, batch_size=24, at_once=12, lr=3e-3, patience=3, precision="fp32", flip=False, crop=0.8
)


@pytest.fixture(scope="module")
def start(tiny_clip: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = tiny_clip(
        0, image={"image_size": 16}, text={"context_length": 16}, tokenizer=ClipTokenizer(context_length=16)
    )
    return clip.save(tmp_path_factory.mktemp("start") / "clip")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of two colors each, with two captions."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines = ["file,caption"]
    for number in range(40):
        left, right = rng.choice(list(NAMES), 2, replace=False)
        pixels = np.zeros((20, 20, 3))
        pixels[:, :10], pixels[:, 10:] = NAMES[left], NAMES[right]
        pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines += [f"{number}.png,{left} and {right}", f"{number}.png,a {left} side beside a {right} one"]
    (folder / "my.csv").write_text("\n".join(lines))
    return folder / "my.csv"


def test_a_run_learns_the_pairs_and_leaves_a_model_a_page_and_its_numbers(
    start: Path, table: Path, tmp_path: Path
) -> None:
    clip = clipworks.load(start)
    scale = clip.scale.detach().clone()
    tuned = method.finetune(clip, open_pairs(table), tmp_path, QUICK, compare=True, show="nothing")
    numbers = tuned.table
    assert list(numbers) == ["start", "plain training", "best epoch", "tuned"]
    assert numbers["tuned"]["validation recall"] >= numbers["start"]["validation recall"]
    assert numbers["best epoch"]["validation recall"] > numbers["start"]["validation recall"]
    assert numbers["start"]["probe agreement"] == 1.0
    lost = 1 - numbers["tuned"]["probe agreement"]
    assert lost <= QUICK.forget * method.LEEWAY["agreement"] + 1e-9
    assert [point.share for point in tuned.line] == list(method.SHARES) and tuned.share in method.SHARES
    assert tuned.line[0].new == pytest.approx(numbers["start"]["validation recall"])
    assert tuned.line[-1].new == pytest.approx(numbers["best epoch"]["validation recall"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["table"] == numbers and result["share"] == tuned.share
    assert "plain training" in tuned.report.read_text() and (tmp_path / "curves.png").is_file()
    loaded = clipworks.load(tmp_path / "clip")
    assert torch.equal(loaded.scale, scale) and torch.equal(clip.scale, scale)
    torch.testing.assert_close(
        loaded.embed_texts(["red and blue"]), tuned.clip.embed_texts(["red and blue"]), rtol=2e-2, atol=2e-3
    )


def test_a_run_started_again_trains_nothing_and_gives_the_same(
    start: Path, table: Path, tmp_path: Path
) -> None:
    quick = dataclasses.replace(QUICK, epochs=3)
    runs = []
    for _ in range(2):
        clip = clipworks.load(start)
        tuned = method.finetune(clip, open_pairs(table), tmp_path, quick, show="nothing")
        runs.append((tuned.table, tensors_once(tuned.clip)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    with pytest.raises(ConfigError, match=r"lr was 0\.003 and is 0\.1"):
        method.finetune(
            clipworks.load(start),
            open_pairs(table),
            tmp_path,
            dataclasses.replace(quick, lr=0.1),
            show="nothing",
        )


def test_parts_of_a_batch_train_what_the_whole_batch_trains(start: Path, table: Path, tmp_path: Path) -> None:
    # With momentum-free size of steps AdamW would enlarge rounding; one epoch is two steps.
    found = []
    for at_once in (24, 5):
        settings = dataclasses.replace(QUICK, epochs=1, at_once=at_once, forget=None, lr=1e-4)
        clip = clipworks.load(start)
        method.finetune(clip, open_pairs(table), tmp_path / str(at_once), settings, show="nothing")
        found.append(clip.embed_texts(["red and blue", "green"]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_training_that_only_destroys_gives_back_the_start(start: Path, table: Path, tmp_path: Path) -> None:
    clip = clipworks.load(start)
    before = {name: tensor.clone() for name, tensor in tensors_once(clip.float()).items()}
    ruin = dataclasses.replace(QUICK, epochs=2, lr=10.0, weight_decay=0.0, patience=1, forget=0.0)
    tuned = method.finetune(clip, open_pairs(table), tmp_path, ruin, show="nothing")
    assert tuned.share == 0 and "the start itself" in tuned.report.read_text()
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_once(clip).items())


def test_given_measures_are_used(start: Path, table: Path, tmp_path: Path) -> None:
    pairs = open_pairs(table)
    training, test = pairs.split(10)
    training, validation = training.split(10)
    measures = Measures(validation=validation, test=test, further=(lambda _: {"mine": 0.5},))
    settings = dataclasses.replace(QUICK, epochs=1)
    tuned = method.finetune(clipworks.load(start), training, tmp_path, settings, measures, show="nothing")
    assert tuned.table["tuned"]["mine"] == 0.5 and "test recall" in tuned.table["tuned"]
    assert len(method.split(training, validation, settings)[0]) == len(training) == 20


def test_what_cannot_work_is_said_before_anything_is_trained(
    start: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = open_pairs(table).select(range(9))
    with pytest.raises(DataError, match="9 pairs are too few to hold 8 out"):
        method.finetune(clipworks.load(start), few, tmp_path, QUICK, show="nothing")
    for wrong in ({"lr": -1.0}, {"patience": 0}, {"forget": 2.0}, {"epochs": 0}, {"held_out": 1.0}):
        with pytest.raises(ConfigError):
            FineTuning(**wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        method.finetune(clipworks.load(start), open_pairs(table), tmp_path, QUICK, show="nothing")
