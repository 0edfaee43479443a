"""MaPLe is what its equations say: vision prompts made of text prompts, and gradients that flow back through.

The towers' side of it, prompts in every block against a plain loop, is in `tests/parts/test_prompts.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.checkpoints import layouts, rules
from clipworks.core.clip import Clip, unit
from clipworks.core.config import uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.engine.randomness import own_randomness
from clipworks.errors import CheckpointError, ConfigError
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.ivlp import IndependentPrompts, LanguagePrompts
from clipworks.methods.adapt.maple import CoupledPrompts, MaPLe
from clipworks.methods.adapt.vpt import VisionPrompts
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.prompts import context_words, prompted_images, random_prompts
from clipworks.parts.text_bank import TextBank

NAMES = ["cat", "dog", "fish"]
TEXT, VISION, BLOCKS = 32, 48, 3
FAST: dict[str, Any] = {"epochs": 2, "batch_size": 4, "progress": False}
LEARNERS = (MaPLe, IndependentPrompts, VisionPrompts, LanguagePrompts)


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    """Towers of different widths."""
    blocks = uniform_blocks(depth=BLOCKS, width=TEXT, heads=2)
    image = {"width": VISION, "blocks": uniform_blocks(depth=BLOCKS, width=VISION, heads=2)}
    made: Clip = tiny_clip(tokenizer=ClipTokenizer(), image=image, text={"blocks": blocks})
    return made


def pictures(count: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(count)]


def labels(count: int = 12) -> list[str]:
    return [NAMES[i % 3] for i in range(count)]


def fitted(clip: Clip, method: type[Any] = MaPLe, **settings: Any) -> Any:
    return method(clip, NAMES, **{**FAST, **settings}).fit(pictures(), labels())


# --- coupling ---


def loss_with_texts_detached(estimator: Any) -> Tensor:
    """Cross-entropy of a batch whose class vectors send no gradient."""
    features = unit(estimator._encode(torch.stack(pictures())))
    logits = estimator.scale * features @ estimator._class_features().detach().mT
    return F.cross_entropy(logits, torch.arange(12) % 3)


def learned(estimator: Any) -> Any:
    """The module of an estimator as while it learns: its prompts are not folded."""
    estimator._cache["learning"] = True
    return estimator.module_


def test_pictures_alone_send_their_gradient_through_the_maps_to_the_text_prompts(clip: Clip) -> None:
    estimator = fitted(clip)
    module = learned(estimator)
    folded = [prompt.detach().requires_grad_() for prompt in module.vision_prompts()]
    with mock.patch.object(CoupledPrompts, "vision_prompts", return_value=folded):
        to_vision = torch.autograd.grad(loss_with_texts_detached(estimator), folded)
    to_text = torch.autograd.grad(loss_with_texts_detached(estimator), list(module.prompts))
    for of_text, of_vision, to in zip(to_text, to_vision, module.maps, strict=True):
        assert of_text.abs().max() > 0
        torch.testing.assert_close(of_text, of_vision @ to.weight, rtol=1e-4, atol=1e-7)


def test_independent_text_prompts_learn_nothing_from_pictures_alone(clip: Clip) -> None:
    estimator = fitted(clip, IndependentPrompts)
    module = learned(estimator)
    loss = loss_with_texts_detached(estimator)
    of_text = torch.autograd.grad(loss, list(module["text"]), allow_unused=True, retain_graph=True)
    assert of_text == (None,) * BLOCKS
    assert all(one.abs().max() > 0 for one in torch.autograd.grad(loss, list(module["vision"])))


def test_the_deeper_maps_start_alike_and_train_apart(clip: Clip) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = CoupledPrompts(random_prompts(3, 2, TEXT), VISION).maps
    first, second, third = start
    assert torch.equal(second.weight, third.weight)
    assert torch.equal(second.bias, third.bias)
    assert second.weight is not third.weight
    assert not torch.equal(first.weight, second.weight)
    _, second, third = fitted(clip, epochs=3, lr=0.1).module_.maps
    assert not torch.equal(second.weight, third.weight)


def test_logits_are_those_of_the_formula_with_live_maps(clip: Clip) -> None:
    estimator = fitted(clip, epochs=3, lr=0.1)
    module, X = estimator.module_, torch.stack(pictures(5, seed=1))
    with torch.no_grad():
        prompts = [P @ F_i.weight.mT + F_i.bias for P, F_i in zip(module.prompts, module.maps, strict=True)]
        images = unit(prompted_images(clip.image, X, prompts))  # type: ignore[arg-type]
        expected = clip.scale.exp() * images @ estimator.class_features().mT
    found = torch.from_numpy(estimator.predict_proba(list(X)))
    torch.testing.assert_close(found, expected.double().softmax(dim=1), rtol=0, atol=1e-6)


def test_prompts_are_learned_in_fp32_whatever_the_towers_compute_in(clip: Clip) -> None:
    module = fitted(clip).module_
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = module.vision_prompts()
    for one, other in zip(coarse, module.vision_prompts(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # bf16 would be off by 4e-3


# --- all four methods ---


def start(clip: Clip, method: type[Any], **settings: Any) -> Any:
    """An estimator at its start."""
    estimator = method(clip, NAMES, **settings)
    with own_randomness(0):
        module = estimator._prepare(None)
    return estimator._learned_elsewhere(module.state_dict())


@pytest.mark.parametrize("method", [MaPLe, IndependentPrompts, LanguagePrompts])
def test_shallow_prompts_start_from_the_zero_shot_sentence(clip: Clip, method: type[Any]) -> None:
    depth = {"text_depth": 1} if method is IndependentPrompts else {"depth": 1}
    found = start(clip, method, **depth).class_features()
    zero_shot = ZeroShot(clip, NAMES).fit(pictures(), labels()).class_features()
    torch.testing.assert_close(found, zero_shot, rtol=0, atol=1e-6)


def test_vision_prompts_leave_the_texts_at_zero_shot(clip: Clip) -> None:
    zero_shot = ZeroShot(clip, NAMES).fit(pictures(), labels())
    assert torch.equal(fitted(clip, VisionPrompts).class_features(), zero_shot.class_features())


def test_language_prompts_leave_the_pictures_as_they_are(clip: Clip) -> None:
    zero_shot = ZeroShot(clip, NAMES).fit(pictures(), labels())
    ours = fitted(clip, LanguagePrompts)
    assert torch.equal(ours.image_features(pictures()), zero_shot.image_features(pictures()))


@pytest.mark.parametrize("method", LEARNERS)
def test_every_prompt_is_learned_and_nothing_of_the_clip(clip: Clip, method: type[Any]) -> None:
    before = copy.deepcopy(clip.state_dict())
    first, last = fitted(clip, method, epochs=1).module_, fitted(clip, method, epochs=3, lr=0.1).module_
    for (name, one), other in zip(first.named_parameters(), last.parameters(), strict=True):
        assert not torch.equal(one, other), name
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.state_dict().items())
    assert all(parameter.grad is None for parameter in clip.parameters())


@pytest.mark.parametrize("method", LEARNERS)
def test_the_loss_falls(clip: Clip, method: type[Any]) -> None:
    losses = fitted(clip, method, epochs=12, lr=0.02, views=0).losses_
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", [MaPLe, IndependentPrompts, LanguagePrompts])
def test_class_texts_are_encoded_once_a_step_and_not_at_all_for_further_pictures(
    clip: Clip, method: type[Any]
) -> None:
    runs = []
    whole = TextBank.__call__

    def counted(*given: Any, **named: Any) -> Tensor:
        runs.append(1)
        return whole(*given, **named)

    with mock.patch.object(TextBank, "__call__", counted):
        estimator = fitted(clip, method, epochs=2, batch_size=4)
        assert len(runs) == 2 * 3
        estimator.predict(pictures(9))
        estimator.predict(pictures(9, seed=1))
    assert len(runs) == 2 * 3 + 1


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [
        (MaPLe, {"depth": 2}, 2 * 2 * TEXT + 2 * (TEXT * VISION + VISION)),
        (MaPLe, {"depth": 9, "prompt_length": 3}, 3 * 3 * TEXT + 3 * (TEXT * VISION + VISION)),
        (IndependentPrompts, {"text_depth": 2, "vision_depth": 9}, 2 * 2 * TEXT + 3 * 2 * VISION),
        (VisionPrompts, {"depth": 1}, 8 * VISION),
        (LanguagePrompts, {}, 3 * 4 * TEXT),
    ],
)
def test_no_more_is_learned_than_the_paper_counts(
    clip: Clip, method: type[Any], settings: dict[str, Any], count: int
) -> None:
    assert fitted(clip, method, **settings).trainable_parameters == count


def test_other_classes_are_read_with_the_prompts_that_were_learned(clip: Clip) -> None:
    estimator = fitted(clip, epochs=3, lr=0.1)
    there = estimator.for_classes(["kite", "cat"])
    row = estimator.texts_.names.index("cat")
    both = there.class_features()[there.texts_.names.index("cat")]
    torch.testing.assert_close(both, estimator.class_features()[row], rtol=0, atol=1e-6)
    assert torch.equal(there.image_features(pictures(2)), estimator.image_features(pictures(2)))


@pytest.mark.parametrize("method", LEARNERS)
def test_settings_that_cannot_work_are_refused(clip: Clip, method: type[Any]) -> None:
    for name in ("depth", "text_depth", "vision_depth", "length", "prompt_length", "text_length"):
        if name in method._get_param_names():
            with pytest.raises(ConfigError, match="at least 1"):
                fitted(clip, method, **{name: 0})
    if "context" in method._get_param_names():
        with pytest.raises(ConfigError, match="learned words cannot start from 'photo'"):
            fitted(clip, method, context="photo")


# --- released files ---


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen(clip: Clip) -> dict[str, Tensor]:
    """A Clip's weights as Dassl's models name them; they do not hold the words' embeddings."""
    theirs = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
    del theirs["token_embedding.weight"]
    named = {}
    for name, tensor in theirs.items():
        tower = "image_encoder." if name.startswith("visual.") else "text_encoder."
        own = name if name == "logit_scale" else tower + name.removeprefix("visual.")
        named[own] = tensor.half()
    return named


def maple_weights(depth: int, length: int = 2) -> dict[str, Tensor]:
    found = {
        "ctx": numbers(length, TEXT, seed=0).half(),
        "token_prefix": torch.zeros(5, 1, TEXT).half(),
        "token_suffix": torch.zeros(5, 76 - length, TEXT).half(),
        "proj.weight": numbers(VISION, TEXT, seed=1).half(),
        "proj.bias": numbers(VISION, seed=2).half(),
    }
    for k in range(depth - 1):
        found[f"compound_prompts_text.{k}"] = numbers(length, TEXT, seed=10 + k)
        found[f"compound_prompt_projections.{k}.weight"] = numbers(VISION, TEXT, seed=20 + k)
        found[f"compound_prompt_projections.{k}.bias"] = numbers(VISION, seed=30 + k)
    return {f"prompt_learner.{name}": tensor for name, tensor in found.items()}


def written(path: Path, weights: dict[str, Tensor], **more: Any) -> Path:
    """A file as Dassl saves it: the schedule holds the optimizer, as objects."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.0035, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    state = {"successor": schedule, "last_epoch": 5}
    torch.save(
        {
            "state_dict": weights,
            "epoch": 5,
            "optimizer": optimizer.state_dict(),
            "scheduler": state,
            "val_result": None,
            **more,
        },
        path,
    )
    return path


@pytest.mark.checkpoint("maple")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_released_file_is_read_at_its_own_depth(clip: Clip, tmp_path: Path, depth: int) -> None:
    weights = maple_weights(depth)
    path = written(tmp_path / "model.pth.tar-5", {**frozen(clip), **weights})
    loaded = MaPLe.from_checkpoint(path, clip, ["dog", "kite"])
    assert (loaded.depth, loaded.prompt_length) == (depth, 2)
    module = loaded.module_
    assert torch.equal(module.prompts[0], weights["prompt_learner.ctx"].float())
    assert torch.equal(module.maps[0].weight, weights["prompt_learner.proj.weight"].float())
    for k in range(depth - 1):
        assert torch.equal(module.prompts[k + 1], weights[f"prompt_learner.compound_prompts_text.{k}"])
        bias = weights[f"prompt_learner.compound_prompt_projections.{k}.bias"]
        assert torch.equal(module.maps[k + 1].bias, bias)
    again = Adapter.load(loaded.save(tmp_path / "run"), clip)
    found = loaded.predict_proba(pictures(4))
    assert (again.predict_proba(pictures(4)) == found).all()
    assert set(loaded.predict(pictures(4))) <= {"dog", "kite"}


@pytest.mark.checkpoint("maple")
def test_files_of_the_baselines_are_read_too(clip: Clip, tmp_path: Path) -> None:
    vision = {"image_encoder.VPT": numbers(4, VISION, seed=1).half()}
    vision["image_encoder.transformer.resblocks.1.VPT_shallow"] = numbers(4, VISION, seed=2)
    text = {
        "prompt_learner.ctx": numbers(3, TEXT, seed=3).half(),
        "prompt_learner.token_prefix": torch.zeros(5, 1, TEXT).half(),
        "prompt_learner.token_suffix": torch.zeros(5, 73, TEXT).half(),
    }
    text["text_encoder.transformer.resblocks.1.VPT_shallow"] = numbers(3, TEXT, seed=4)
    text["text_encoder.transformer.resblocks.2.VPT_shallow"] = numbers(3, TEXT, seed=5)
    path = tmp_path / "model.pth.tar-5"

    vpt = VisionPrompts.from_checkpoint(written(path, {**frozen(clip), **vision}), clip, NAMES)
    assert (vpt.depth, vpt.length) == (2, 4)
    language = LanguagePrompts.from_checkpoint(written(path, {**frozen(clip), **text}), clip, NAMES)
    assert (language.depth, language.length) == (3, 3)
    ivlp = IndependentPrompts.from_checkpoint(written(path, {**frozen(clip), **vision, **text}), clip, NAMES)
    assert (ivlp.text_depth, ivlp.vision_depth, ivlp.text_length, ivlp.vision_length) == (3, 2, 3, 4)

    X = pictures(3)
    assert torch.equal(ivlp.image_features(X), vpt.image_features(X))
    assert torch.equal(ivlp.class_features(), language.class_features())
    assert torch.equal(ivlp.module_["text"][2], text["text_encoder.transformer.resblocks.2.VPT_shallow"])
    with pytest.raises(CheckpointError, match="VPT"):  # one holds more than the method asked for has
        LanguagePrompts.from_checkpoint(path, clip, NAMES)


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.checkpoint("maple")
def test_other_files_are_refused(clip: Clip, tiny_clip: Callable[..., Any], tmp_path: Path) -> None:
    path, good = tmp_path / "model.pth.tar-5", {**frozen(clip), **maple_weights(2)}

    def refused(weights: dict[str, Tensor], said: str, **more: Any) -> None:
        with pytest.raises(CheckpointError, match=said):
            MaPLe.from_checkpoint(written(path, weights, **more), clip, NAMES)

    def without(name: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in good.items() if key != f"prompt_learner.{name}"}

    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.image.blocks[1].mlp.fc.weight.add_(0.01)  # type: ignore[union-attr,operator,index]
    refused({**frozen(other), **maple_weights(2)}, "another Clip than 'tiny'")
    refused({**good, "prompt_learner.ctx": torch.zeros(2, 64)}, r"ctx has shape \(2, 64\)")
    refused({**good, "prompt_learner.proj.bias": torch.zeros(VISION + 1)}, "proj.bias has shape")
    refused(without("ctx"), "ctx is missing")
    refused(without("compound_prompt_projections.0.bias"), "projections.0.bias is missing")
    refused({**good, "prompt_learner.meta_net.bias": torch.zeros(3)}, "belongs neither")
    refused({**frozen(clip), **maple_weights(BLOCKS + 1)}, "does not fit")
    refused(good, "more than tensors", val_result=Runs(tmp_path / "was run"))
    assert not (tmp_path / "was run").exists()
    with pytest.raises(CheckpointError, match="no such file"):
        MaPLe.from_checkpoint(tmp_path / "absent", clip, NAMES)


def test_the_first_prompt_starts_from_the_words_of_the_context(clip: Clip) -> None:
    found = start(clip, MaPLe, prompt_length=3).module_.prompts[0]
    assert torch.equal(found, context_words(clip, "a photo of a", 3))
