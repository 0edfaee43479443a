"""CoCoOp is a loop over pictures with a context each, and CoOp where the meta-net is silent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.core.config import uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.errors import CheckpointError, ConfigError
from clipworks.methods.adapt.cocoop import CoCoOp
from clipworks.methods.adapt.coop import CoOp

NAMES = ["dog", "hot air balloon", "kite (bird of prey)"]
WIDTH = 32
Y = np.arange(12) % 3


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer(), width=WIDTH)
    return made


def features(count: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) + 2 * torch.eye(WIDTH)[np.arange(count) % 3]


def fitted(clip: Clip, **settings: Any) -> CoCoOp:
    settings = {"epochs": 2, "batch_size": 5, "progress": False, **settings}
    return CoCoOp(clip, NAMES, **settings).fit(features(), Y)


def naive(clip: Clip, cocoop: CoCoOp, picture: Tensor) -> Tensor:
    """Class vectors (C, D) for one picture (D,), text by text, full length, the meta-net written out."""
    net, text, tokenizer = cocoop.module_.meta_net, clip.text, clip.tokenizer
    assert tokenizer is not None
    hidden = (net.linear1.weight @ (picture / picture.norm()) + net.linear1.bias).clamp(min=0)
    context = cocoop.module_.context + net.linear2.weight @ hidden + net.linear2.bias
    found = []
    for name in NAMES:
        tokens = tokenizer(f"a photo of a {name}.")
        words = text.embedding(tokens.ids)[0]  # type: ignore[operator]
        x = torch.cat([words[:1], context, words[5:]])[None]
        x = text.run(text.place(x), mask="causal")  # type: ignore[operator]
        found.append(text.project(x, at=tokens.ends)[0])  # type: ignore[operator]
    return F.normalize(torch.stack(found), dim=-1)


def test_values_and_gradients_are_those_of_a_loop_over_pictures(clip: Clip) -> None:
    exact = copy.deepcopy(clip).double().requires_grad_(False)
    cocoop, X = fitted(exact), features(4, seed=1).double()
    learned = list(cocoop.module_.parameters())
    weights = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = cocoop._shifted(X)
    expected = torch.stack([naive(exact, cocoop, picture) for picture in X])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (expected[0] - expected[1]).abs().max() > 1e-6
    one, other = (torch.autograd.grad((given * weights).sum(), learned) for given in (found, expected))
    for ours, theirs in zip(one, other, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_with_a_silent_meta_net_it_is_coop(clip: Clip) -> None:
    cocoop = fitted(clip)
    with torch.no_grad():
        cocoop.module_.meta_net.linear2.weight.zero_()
        cocoop.module_.meta_net.linear2.bias.zero_()
    coop = CoOp(clip, NAMES, init="a photo of a", epochs=1, progress=False).fit(features(), Y)
    with torch.no_grad():
        coop.module_["context"].copy_(cocoop.module_.context)
    coop._cache.clear()
    torch.testing.assert_close(cocoop.logits(features()), coop.logits(features()), rtol=0, atol=1e-5)
    torch.testing.assert_close(cocoop.class_features(), coop.class_features(), rtol=0, atol=1e-6)


def test_no_picture_sees_another(clip: Clip) -> None:
    cocoop, X = fitted(clip, lr=0.1), features(5, seed=3)
    order = torch.tensor([0, 3, 2, 1, 4])
    found = cocoop.logits(X)
    torch.testing.assert_close(cocoop.logits(X[order]), found[order], rtol=0, atol=1e-5)
    alone = torch.cat([cocoop.logits(row[None]) for row in X])
    torch.testing.assert_close(alone, found, rtol=0, atol=1e-5)


def test_how_many_texts_are_computed_at_once_changes_nothing(clip: Clip) -> None:
    cocoop, X = fitted(clip, lr=0.1), features(7)
    expected = cocoop.logits(X)
    for text_chunk in (1, 6, 10_000):
        torch.testing.assert_close(
            cocoop.set_params(text_chunk=text_chunk).logits(X), expected, rtol=0, atol=1e-5
        )
    with pytest.raises(ConfigError, match="text_chunk"):
        fitted(clip, text_chunk=0)


def test_a_context_is_computed_once_for_all_classes(clip: Clip) -> None:
    """Of 4 pictures × 3 classes: the start once, four contexts, and each name with what ends it."""
    tokens: Tokens = clip.tokenizer([f"a photo of a {name}." for name in NAMES])  # type: ignore[misc]
    own = int((tokens.ends - 4).sum())
    assert fitted(clip)._bank(4).positions == 1 + 4 * (4 + own)


def test_parameters_are_as_many_as_the_paper_counts(tiny_clip: Callable[..., Any]) -> None:
    blocks = uniform_blocks(depth=1, width=512, heads=8)
    clip = tiny_clip(tokenizer=ClipTokenizer(), width=512, text={"width": 512, "blocks": blocks})
    X = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    cocoop = CoCoOp(clip, ["cat", "dog"], epochs=1, progress=False).fit(X, [0, 1])
    assert cocoop.trainable_parameters == 35_360


def test_the_authors_files_are_read(clip: Clip, tmp_path: Path) -> None:
    cocoop = fitted(clip, lr=0.1)
    learned = {
        "ctx": cocoop.module_.context.detach(),
        **{f"meta_net.{name}": tensor for name, tensor in cocoop.module_.meta_net.state_dict().items()},
        "token_prefix": torch.zeros(9, 1, 32),
        "token_suffix": torch.zeros(9, 72, 32),
    }
    path = tmp_path / "model.pth.tar-10"
    torch.save({"state_dict": learned, "epoch": 10}, path)
    loaded = CoCoOp.from_checkpoint(path, clip, NAMES)
    order = [NAMES.index(name) for name in loaded.texts_.names]
    torch.testing.assert_close(
        loaded.logits(features()), cocoop.logits(features())[:, order], rtol=0, atol=1e-5
    )
    assert unit(features()).shape[1] == loaded.n_features_in_
    torch.save({"state_dict": {**learned, "meta_net.linear1.bias": torch.zeros(3)}}, path)
    with pytest.raises(CheckpointError, match=r"linear1.bias has shape \(3,\)"):
        CoCoOp.from_checkpoint(path, clip, NAMES)
