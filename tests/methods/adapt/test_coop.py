"""CoOp is the authors' padded form, step for step, and starts as the prompt of its words."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks import load
from clipworks.core.clip import Clip, unit
from clipworks.core.config import uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.adapt.coop import CoOp, Position
from clipworks.methods.adapt.zero_shot import ZeroShot

# The last one ends in punctuation, which a tokenizer joins with the full stop.
NAMES = ["dog", "hot air balloon", "kite (bird of prey)"]
M, WIDTH = 5, 16
Y = np.arange(24) % 3


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(count: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) + 2 * torch.eye(WIDTH)[Y[:count]]


def fitted(clip: Clip, names: Any = NAMES, **settings: Any) -> CoOp:
    settings = {"context_length": M, "epochs": 2, "progress": False, **settings}
    return CoOp(clip, names, **settings).fit(features(), Y)


def naive(clip: Any, names: list[str], context: Tensor, position: Position) -> Tensor:
    """As the authors have it: padded to 77, embeddings cut and joined, the end where ids are largest."""
    tokenizer, text = clip.tokenizer, clip.text
    length, half = context.shape[-2], context.shape[-2] // 2
    rows, sizes = [], [len(tokenizer.encode(name)) for name in names]
    for each in names:
        row = [49406, *tokenizer.encode(" ".join(["X"] * length) + f" {each}."), 49407]
        rows.append(row + [0] * (77 - len(row)))
    ids = torch.tensor(rows)
    words, prompts = text.embedding.weight[ids], []
    for place, size in enumerate(sizes):
        own = context if context.ndim == 2 else context[place]
        start, suffix = words[place, :1], words[place, 1 + length :]
        name, rest = suffix[:size], suffix[size:]
        order = {
            "end": [start, own, name, rest],
            "middle": [start, own[:half], name, own[half:], rest],
            "front": [start, name, own, rest],
        }
        prompts.append(torch.cat(order[position]))
    x = torch.stack(prompts) + text.positions
    for block in text.blocks:
        x = block(x, mask="causal")
    x = text.ln_final(x)[torch.arange(len(names)), ids.argmax(dim=1)]
    return F.normalize(text.projection(x), dim=-1)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("per_class", [False, True])
def test_values_and_gradients_are_those_of_the_padded_form(
    clip: Clip, position: Position, per_class: bool
) -> None:
    exact = copy.deepcopy(clip).double()
    coop = fitted(exact, position=position, per_class=per_class)
    context = coop.module_["context"]
    assert context.shape == ((3, M, 32) if per_class else (M, 32))
    X, y = unit(features()).double(), torch.from_numpy(Y)

    def gradient(classes: Tensor) -> Tensor:
        return torch.autograd.grad(F.cross_entropy(14 * X @ classes.mT, y), context)[0]

    found, expected = coop._class_features(), naive(exact, NAMES, context, position)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    one, other = gradient(found), gradient(expected)
    assert other.abs().max() > 1e-6
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_fit_is_the_authors_loop(clip: Clip) -> None:
    """One batch an epoch: SGD with momentum and decay, the warm-up rate, then the cosine."""
    epochs, lr, starts = 5, 0.05, []

    class Recorded(CoOp):
        def _prepare(self, shots: Any) -> Any:
            made: Any = super()._prepare(shots)
            starts.append(made["context"].detach().clone())
            return made

    settings: dict[str, Any] = {"context_length": M, "position": "middle", "progress": False}
    coop = Recorded(clip, NAMES, epochs=epochs, lr=lr, **settings).fit(features(), Y)
    context = torch.nn.Parameter(starts[0].clone())
    optimizer = torch.optim.SGD([context], lr=lr, momentum=0.9, weight_decay=5e-4)
    X, y, scale = unit(features()), torch.from_numpy(Y), float(clip.scale.detach().exp())
    frozen = copy.deepcopy(clip).requires_grad_(False)
    for epoch in range(epochs):
        rate = 1e-5 if epoch == 0 else lr / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(scale * X @ naive(frozen, NAMES, context, "middle").mT, y).backward()
        optimizer.step()
    assert (context.detach() - starts[0]).abs().max() > 1e-3
    torch.testing.assert_close(coop.context, context.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("per_class", [False, True])
def test_untouched_words_are_their_zero_shot_prompt(clip: Clip, per_class: bool) -> None:
    coop = fitted(clip, init="a photo of a", per_class=per_class)
    coop.module_ = coop._prepare(None)
    coop._cache.clear()
    expected = ZeroShot(clip, NAMES, template="a photo of a {}.").fit().logits(features())
    torch.testing.assert_close(coop.logits(features()), expected, rtol=0, atol=1e-5)
    if not per_class:
        assert [row[0][0] for row in coop.nearest_words()] == ["a", "photo", "of", "a"]
        assert max(row[0][1] for row in coop.nearest_words()) < 1e-2


def test_a_word_of_several_tokens_is_as_many_vectors(clip: Clip) -> None:
    coop = fitted(clip, init="a crayoned photo of a")
    assert clip.tokenizer is not None
    tokens = len(clip.tokenizer.encode("a crayoned photo of a"))
    assert tokens > 5
    assert coop.context.shape == (tokens, 32)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_with_any_tokenizer_the_texts_are_the_context_and_the_name(position: Position) -> None:
    """The seedling's own spells a word otherwise at the start of a text."""
    seedling: Any = load("seedling")
    X = torch.randn(4, seedling.width, generator=torch.Generator().manual_seed(0))
    names = ["red_circle", "kite (bird of prey)"]
    coop = CoOp(seedling, names, context_length=M, position=position, epochs=1, progress=False)
    coop.fit(X, [0, 1, 0, 1])
    tokens, vocabulary = coop._texts(), seedling.text.embedding.num_embeddings
    for ids, end, name in zip(tokens.ids, tokens.ends, ["red circle", "kite (bird of prey)"], strict=True):
        learned = ids >= vocabulary
        assert (ids[learned] - vocabulary).tolist() == list(range(M))
        assert seedling.tokenizer.decode(ids[~learned]).strip() == f"{name}."
        places = learned.nonzero()[:, 0].tolist()
        before = {"end": M, "middle": M // 2, "front": 0}[position]
        assert places[:before] == list(range(1, 1 + before))
        assert places[before:] == list(range(int(end) - 1 - (M - before), int(end) - 1))


def test_only_the_context_changes(clip: Clip) -> None:
    before = copy.deepcopy(clip.state_dict())
    coop = fitted(clip, lr=0.5, epochs=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.state_dict().items())
    assert all(parameter.grad is None for parameter in clip.parameters())
    assert coop.trainable_parameters == M * 32
    assert coop.losses_[-1] < coop.losses_[0]


def test_a_fitted_context_is_small_on_disk(tiny_clip: Callable[..., Any], tmp_path: Path) -> None:
    """16 vectors of a ViT-B's text tower and a hundred class names."""
    blocks = uniform_blocks(depth=1, width=512, heads=8)
    clip = tiny_clip(tokenizer=ClipTokenizer(), text={"width": 512, "blocks": blocks})
    names = [f"a thing of kind {number}" for number in range(100)]
    X = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    coop = CoOp(clip, names, epochs=1, batch_size=100, progress=False).fit(X, np.arange(100))
    folder = coop.save(tmp_path / "run")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 100_000


def test_other_names_are_read_with_the_same_context(clip: Clip) -> None:
    coop = fitted(clip).for_classes(["tree house", "cat"])
    with torch.no_grad():
        expected = naive(clip, list(coop.texts_.names), coop.context, "end")
    torch.testing.assert_close(coop.class_features(), expected, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="per_class=False"):
        fitted(clip, per_class=True).for_classes(["tree house", "cat"])


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_are_the_papers_for_the_number_of_shots(clip: Clip, shots: int, epochs: int) -> None:
    class Counted(CoOp):
        def _backward(self, step: Any) -> Tensor:
            self.module_["context"].grad = torch.zeros_like(self.module_["context"])
            return torch.zeros(())

    X, y = features(3).repeat(shots, 1), np.arange(3 * shots) % 3
    assert len(Counted(clip, NAMES, progress=False).fit(X, y).losses_) == epochs


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"position": "back"}, ConfigError, "'back'"),
        ({"context_length": 0}, ConfigError, "context_length=0"),
        ({"context_length": 80}, DataError, "the context has 77"),
        ({"names": ["dog", "cat", "very " * 80]}, DataError, "the context has 77"),
    ],
)
def test_what_cannot_work_is_one_clear_error(
    clip: Clip, wrong: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fitted(clip, **wrong)


# --- the authors' files ---


def released(context: Tensor, classes: int = 7) -> dict[str, Any]:
    """What their code saves, half precision and the training's objects included; texts of other classes."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.002, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    length, width = context.shape[-2:]
    return {
        "state_dict": {
            "ctx": context.half(),
            "token_prefix": torch.zeros(classes, 1, width).half(),
            "token_suffix": torch.zeros(classes, 76 - length, width).half(),
        },
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": schedule, "warmup_epoch": 1, "last_epoch": 50},
        "val_result": None,
    }


def saved(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path


@pytest.mark.checkpoint("coop")
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("per_class", [False, True])
def test_released_files_predict_by_the_names_given(
    clip: Clip, tmp_path: Path, per_class: bool, prefix: str
) -> None:
    context = torch.randn(3, M, 32, generator=torch.Generator().manual_seed(0))
    context = context.half().float() if per_class else context[0].half().float()
    contents = released(context)
    contents["state_dict"] = {prefix + name: value for name, value in contents["state_dict"].items()}
    names = ["kite", "dog", "hot air balloon"]  # in another order than that of the classes
    path = saved(tmp_path / "model.pth.tar-50", contents)
    loaded = CoOp.from_checkpoint(path, clip, names, position="front")
    with torch.no_grad():
        expected = naive(clip, names, context, "front")
    order = [names.index(name) for name in loaded.texts_.names]
    torch.testing.assert_close(loaded.class_features(), expected[order], rtol=0, atol=1e-6)
    likeliest = (unit(features()) @ expected.mT).argmax(dim=1)
    assert [names[place] for place in likeliest] == list(loaded.predict(features()))
    again = CoOp.load(loaded.save(tmp_path / "run"), clip)
    assert torch.equal(again.logits(features()), loaded.logits(features()))


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.checkpoint("coop")
def test_files_of_another_kind_are_refused(clip: Clip, tmp_path: Path) -> None:
    context = torch.zeros(M, 32)

    def refused(contents: dict[str, Any], said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            CoOp.from_checkpoint(saved(tmp_path / "model.pth.tar-1", contents), clip, NAMES)

    refused(released(torch.zeros(M, 48)), r"ctx has shape \(5, 48\)")
    refused(released(torch.zeros(2, M, 32)), r"ctx has shape \(2, 5, 32\)")
    refused(released(torch.full((M, 32), math.nan)), "not finite")
    for name in ("meta_net.linear1.bias", "something"):
        other = released(context)
        other["state_dict"][name] = torch.zeros(3)
        refused(other, name)
    without = released(context)
    del without["state_dict"]["ctx"]
    refused(without, "ctx is missing")
    refused({**released(context), "val_result": Runs(tmp_path / "was run")}, "more than tensors")
    assert not (tmp_path / "was run").exists()
