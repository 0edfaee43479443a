"""PRE is CoOp's context behind an encoder with a skip connection, and a constant once it is fitted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.coop import CoOp
from clipworks.methods.adapt.pre import PRE, PromptEncoder
from clipworks.methods.adapt.zero_shot import ZeroShot

NAMES = ["cat", "dog", "polar_bear"]
Y = np.arange(12) % 3
WIDTH = 32  # of the text tower


class Nothing(nn.Module):
    """An encoder that makes zeros: what is left is CoOp."""

    def forward(self, vectors: Tensor) -> Tensor:
        return torch.zeros_like(vectors)


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def features(seed: int = 0) -> Tensor:
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))


def fitted(clip: Clip, **settings: Any) -> PRE:
    options = {"epochs": 2, "batch_size": 6, "progress": False, **settings}
    return PRE(clip, NAMES, **options).fit(features(), Y)


def lstm_by_hand(network: nn.LSTM, vectors: Tensor) -> Tensor:
    """A bidirectional LSTM of one layer over (M, w) as its equations say, gate by gate."""
    weights, halves = dict(network.named_parameters()), []
    for suffix, order in (("", range(len(vectors))), ("_reverse", reversed(range(len(vectors))))):
        h = c = torch.zeros(network.hidden_size)
        found: dict[int, Tensor] = {}
        for step in order:
            gates = weights[f"weight_ih_l0{suffix}"] @ vectors[step] + weights[f"bias_ih_l0{suffix}"]
            gates = gates + weights[f"weight_hh_l0{suffix}"] @ h + weights[f"bias_hh_l0{suffix}"]
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            found[step] = h
        halves.append(torch.stack([found[step] for step in range(len(vectors))]))
    return torch.cat(halves, dim=1)


def test_the_context_is_p_plus_a_bidirectional_lstm_of_p() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(4, WIDTH)
    for residual, gain, expected in ((True, None, 1.0), (True, 0.3, 0.3), (False, None, 1.0)):
        encoder = PromptEncoder(WIDTH, "lstm", residual, gain)
        assert isinstance(encoder.network, nn.LSTM)
        made = expected * lstm_by_hand(encoder.network, vectors) + residual * vectors
        torch.testing.assert_close(encoder(vectors), made)


def test_without_an_output_of_the_encoder_the_fit_begins_at_zero_shot(clip: Clip) -> None:
    """For words as the start; and P' is 0 without the skip."""
    encoder = PromptEncoder(WIDTH)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    words = torch.randn(4, WIDTH)
    assert torch.equal(encoder(words), words)
    encoder.residual = False
    assert not encoder(words).any()

    zero_shot = ZeroShot(clip, [name.replace("_", " ") for name in NAMES], template="a photo of a {}.").fit()
    expected = zero_shot.logits(features())
    for settings in ({"prompt_encoder": Nothing()}, {"gain": 0.0}):
        estimator = PRE(clip, NAMES, progress=False, **settings)
        estimator.classes_, estimator.texts_ = estimator._settle(None)
        estimator.module_ = estimator._prepare(None)
        with torch.no_grad():
            found = estimator._logits(features())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_without_an_output_of_the_encoder_the_fit_is_coops(clip: Clip) -> None:
    common = {"epochs": 4, "batch_size": 6, "lr": 0.5, "progress": False}
    X = torch.randn(12, 3, 16, generator=torch.Generator().manual_seed(0))
    for per_class in (False, True):
        coop = CoOp(clip, NAMES, init="a photo of a", per_class=per_class, **common).fit(X, Y)
        pre = PRE(clip, NAMES, prompt_encoder=Nothing(), per_class=per_class, **common).fit(X, Y)
        torch.testing.assert_close(pre.context_, coop.context, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(pre.logits(features()), coop.logits(features()), rtol=1e-6, atol=1e-5)


def test_the_lstm_reads_the_vectors_in_order_and_the_mlp_each_by_itself() -> None:
    torch.manual_seed(0)
    vectors, order = torch.randn(4, WIDTH), torch.tensor([2, 0, 3, 1])
    for name, by_itself in (("lstm", False), ("lstm2", False), ("mlp", True)):
        encoder = PromptEncoder(WIDTH, name).eval()
        there_and_back = encoder(vectors[order])[order.argsort()]
        assert torch.allclose(there_and_back, encoder(vectors), atol=1e-6) is by_itself


@pytest.mark.parametrize("name", ["lstm", "lstm2", "mlp"])
def test_shapes_are_kept_and_equal_classes_stay_equal(name: str) -> None:
    torch.manual_seed(0)
    encoder = PromptEncoder(WIDTH, name).eval()
    assert encoder(torch.randn(1, WIDTH)).shape == (1, WIDTH)
    several = encoder(torch.randn(4, WIDTH).repeat(3, 1, 1))
    assert several.shape == (3, 4, WIDTH)
    assert torch.equal(several[0], several[1]) and torch.equal(several[0], several[2])
    torch.testing.assert_close(encoder(torch.ones(4, WIDTH)), encoder(torch.ones(1, 4, WIDTH))[0])


def test_every_parameter_is_fitted_and_there_are_as_many_as_the_formula_says(clip: Clip) -> None:
    assert sum(p.numel() for p in PromptEncoder(512).parameters()) + 4 * 512 == 1_579_008
    estimator = PRE(clip, NAMES, progress=False, epochs=1, gain=0.5)
    estimator.fit(features(), Y)
    assert estimator.trainable_parameters == 4 * WIDTH * (3 * WIDTH // 2 + 2) + 4 * WIDTH + 1
    with torch.random.fork_rng():
        torch.manual_seed(estimator.seed)
        start = estimator._prepare(None).state_dict()
    for name, tensor in estimator.module_.state_dict().items():
        assert not torch.equal(tensor, start[name]), name


def test_the_folded_context_gives_the_logits_of_the_live_encoder(clip: Clip) -> None:
    for encoder in ("lstm", "lstm2"):
        estimator = fitted(clip, prompt_encoder=encoder)
        folded = estimator.logits(features())
        context = estimator.context_
        del estimator.context_
        estimator._cache.clear()
        torch.testing.assert_close(estimator.logits(features()), folded, rtol=0, atol=0)
        assert context.shape == (4, WIDTH) and not context.requires_grad


def test_class_vectors_are_those_of_words_with_the_context_in_their_places(clip: Clip) -> None:
    """Run one by one through the tower, without the text bank."""
    estimator, tower = fitted(clip, lr=0.5), clip.text
    found = estimator.class_features()
    for row, name in enumerate(NAMES):
        tokens = clip.tokenizer([f"a photo of a {name.replace('_', ' ')}."])  # type: ignore[misc]
        with torch.no_grad():
            content = tower.read(tokens).clone()  # type: ignore[operator]
            content[:, 1:5] = estimator.context_
            placed = tower.run(tower.place(content))  # type: ignore[operator]
            expected = unit(tower.project(placed, at=tokens.ends))[0]  # type: ignore[operator]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_a_context_of_each_class_reaches_its_class_alone(clip: Clip) -> None:
    estimator = fitted(clip, per_class=True, init=None, context_length=2)
    assert estimator.context_.shape == (3, 2, WIDTH)
    before = estimator.class_features().clone()
    estimator.context_[1, :, ::2] += 1.0  # a shift of all entries would be lost in the first norm
    estimator._cache.clear()
    changed = ~torch.isclose(estimator.class_features(), before, atol=1e-6).all(dim=1)
    assert changed.tolist() == [False, True, False]
    with pytest.raises(ConfigError, match="per_class"):
        estimator.for_classes(["ant"])


def test_only_the_context_is_saved_unless_the_encoder_is_asked_for(clip: Clip, tmp_path: Path) -> None:
    alone = fitted(clip)
    folder = alone.save(tmp_path / "alone")
    assert set(alone._learned()) == {"context_"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 4 * WIDTH + 4000
    loaded = Adapter.load(folder, clip)
    assert loaded.trainable_parameters == alone.trainable_parameters
    assert np.array_equal(loaded.predict_proba(features()), alone.predict_proba(features()))
    whole = fitted(clip, keep_encoder=True)
    again = Adapter.load(whole.save(tmp_path / "whole"), clip)
    assert isinstance(again, PRE)
    assert torch.equal(again.module_.vectors, whole.module_.vectors)
    with pytest.raises(CheckpointError, match="context_"):
        Adapter.load(folder, clip, init=None, context_length=3)


def test_the_best_epoch_is_deployed_with_patience(clip: Clip) -> None:
    estimator = PRE(clip, NAMES, epochs=4, patience=1, lr=0.5, progress=False).fit(
        features(), Y, validation=(features(1), Y)
    )
    with torch.no_grad():
        assert torch.equal(estimator.context_, estimator.module_())


def test_an_encoder_that_is_handed_in_stays_as_it_was(clip: Clip) -> None:
    given = nn.Linear(WIDTH, WIDTH)
    before = given.weight.clone()
    estimator = fitted(clip, prompt_encoder=given, lr=0.5)
    assert torch.equal(given.weight, before) and not torch.equal(
        estimator.module_.encoder.network.weight, before
    )
    with pytest.raises(ShapeError, match="encoder"):
        fitted(clip, prompt_encoder=nn.Linear(WIDTH, 3))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt_encoder": "gru"}, "lstm2"),
        ({"context_length": -1, "init": None}, "-1"),
    ],
)
def test_settings_that_cannot_work_are_named(clip: Clip, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fitted(clip, **settings)


# --- the authors' files ---


def published(path: Path, prefix: str = "MLP.lstm_head", **changes: Any) -> Path:
    """A file of the layout of the authors' code, with a saved schedule that holds its optimizer."""
    generator = torch.Generator().manual_seed(5)
    half = WIDTH // 2
    shapes = {"weight_ih_l0": (4 * half, WIDTH), "weight_hh_l0": (4 * half, half)}
    shapes |= {"bias_ih_l0": (4 * half,), "bias_hh_l0": (4 * half,)}
    weights = OrderedDict(ctx=torch.randn(4, WIDTH, generator=generator))
    for name, shape in shapes.items():
        for direction in ("", "_reverse"):
            weights[f"{prefix}.{name}{direction}"] = torch.randn(*shape, generator=generator)
    weights["token_prefix"] = torch.zeros(7, 1, WIDTH)
    weights["token_suffix"] = torch.zeros(7, 72, WIDTH)
    for name, value in changes.items():
        weights[name] = value
    optimizer = torch.optim.SGD([nn.Parameter(weights["ctx"])], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    saved = {"state_dict": weights, "epoch": 50, "optimizer": optimizer.state_dict(), "val_result": None}
    torch.save({**saved, "scheduler": {"successor": schedule, "last_epoch": 50}}, path)
    return path


@pytest.mark.checkpoint("pre")
def test_the_authors_files_fold_to_a_context_under_any_name_of_the_encoder(
    clip: Clip, tmp_path: Path
) -> None:
    for prefix in ("MLP.lstm_head", "prompt_learner.encoder_network.lstm_head"):
        path = published(tmp_path / "model.pth.tar-50", prefix)
        estimator = PRE.from_checkpoint(path, clip, NAMES)
        weights = torch.load(path, weights_only=False)["state_dict"]
        network = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True)
        network.load_state_dict({n: weights[f"{prefix}.{n}"] for n in network.state_dict()})
        expected = weights["ctx"] + lstm_by_hand(network, weights["ctx"])
        torch.testing.assert_close(estimator.context_, expected)
        assert estimator.predict(features()).shape == (12,)
        assert estimator.for_classes(["ant", "bee"]).predict_proba(features()).shape == (12, 2)
        loaded = Adapter.load(estimator.save(tmp_path / "run"), clip)
        assert np.array_equal(loaded.predict_proba(features()), estimator.predict_proba(features()))


@pytest.mark.checkpoint("pre")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ctx": torch.zeros(5, WIDTH)}, "ctx"),
        ({"odd": torch.zeros(3)}, "odd"),
        ({"other.lstm_head.bias_ih_l0": torch.zeros(64)}, "2 tensors"),
        ({"MLP.lstm_head.bias_ih_l0": torch.zeros(9)}, "bias_ih_l0"),
    ],
)
def test_files_of_another_layout_are_refused(
    clip: Clip, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = published(tmp_path / "model.pth.tar-50", **changes)
    with pytest.raises(CheckpointError, match=said):
        PRE.from_checkpoint(path, clip, NAMES)
