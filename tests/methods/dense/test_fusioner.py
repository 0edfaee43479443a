"""Fusioner: what reads what, the cosine without its map, the loss, and the layout of saved files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import Clip
from clipworks.core.config import uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.dense import fusioner as module
from clipworks.methods.dense.fusioner import SENTENCES, Decoder, Fusion, Fusioner, Head, cosines, mask_loss
from clipworks.parts.dense import all_vectors

NAMES = ("sky", "road", "red car", "tree", "dog")
QUICK: dict[str, Any] = {
    "templates": ("a {}.",),
    "width": 16,
    "layers": 2,
    "heads": 2,
    "doublings": 1,
    "views": 2,
    "epochs": 2,
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Clip]) -> Clip:
    blocks = uniform_blocks(depth=2, width=32, heads=2)
    return tiny_clip(0, tokenizer=ClipTokenizer(), image={"blocks": blocks}).eval()


@pytest.fixture(scope="module")
def trained(clip: Clip) -> Fusioner:
    return fitted(clip)


def pixels(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def masks(count: int, height: int, width: int) -> list[np.ndarray]:
    thirds = 3 * np.arange(width) // width
    return [np.repeat(thirds[None], height, axis=0).astype(np.uint8) for _ in range(count)]


def fitted(clip: Clip, **changes: Any) -> Fusioner:
    method = Fusioner(clip, **{**QUICK, **changes})
    return method.fit(list(pixels(4, 40, 48)), masks(4, 40, 48), NAMES)


def tokens(count: int, seed: int, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, count, width, generator=generator), dim=-1)


def head(**changes: Any) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fusion = Fusion(12, 12, **{"width": 16, "layers": 2, "heads": 2, **changes})
        return Head(fusion, Decoder(16, 1), 0.07).eval().requires_grad_(False)


# --- what sees what ---


def test_permuted_names_permute_masks_and_a_name_twice_has_one_mask() -> None:
    network, z, t = head(), tokens(9, 0), tokens(4, 1)
    first = network(z, t, (3, 3), (10, 11))
    order = [2, 0, 3, 1]
    assert torch.allclose(network(z, t[:, order], (3, 3), (10, 11)), first[:, order], atol=1e-4)
    twice = network(z, t[:, [0, 1, 0]], (3, 3), (10, 11))
    assert torch.allclose(twice[:, 0], twice[:, 2], atol=1e-6)


def test_the_fusion_knows_no_places() -> None:
    fusion, z, t = head().fusion, tokens(9, 0), tokens(3, 1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(fusion(z[:, order], t)[0], fusion(z, t)[0][:, order], atol=1e-5)


def test_patches_and_names_meet_early_or_late() -> None:
    z, other_z, t, other_t = tokens(9, 0), tokens(9, 1), tokens(3, 2), tokens(3, 3)
    early, late = head().fusion, head(late=True).fusion
    assert torch.equal(late(z, t)[0], late(z, other_t)[0])
    assert torch.equal(late(z, t)[1], late(other_z, t)[1])
    assert not torch.allclose(early(z, t)[0], early(z, other_t)[0], atol=1e-3)
    assert not torch.allclose(early(z, t)[1], early(other_z, t)[1], atol=1e-3)
    # Without blocks neither sees even its own kind.
    none = head(layers=0).fusion
    # A product of one row rounds otherwise than one of nine.
    assert torch.allclose(none(z[:, :1], t)[0], none(z, t)[0][:, :1], atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
def test_names_that_are_not_asked_are_not_there(late: bool) -> None:
    network, z, t = head(late=late), tokens(9, 0), tokens(4, 1)
    asked = torch.tensor([[True, True, False, False], [True, True, True, True]])
    found = network(z, t, (3, 3), (8, 8), asked)
    assert torch.allclose(found[0, :2], network(z[:1], t[:1, :2], (3, 3), (8, 8))[0], atol=1e-4)
    assert torch.allclose(found[1], network(z[1:], t[1:], (3, 3), (8, 8))[0], atol=1e-4)


# --- logits ---


def test_cosines_are_those_of_the_map_that_is_never_made() -> None:
    generator = torch.Generator().manual_seed(0)
    features, names = torch.randn(2, 5, 6, 7, generator=generator), torch.randn(2, 3, 5, generator=generator)
    for size in ((24, 28), (13, 30), (6, 7), (4, 5)):
        large = F.interpolate(features, size, mode="bilinear")
        wanted = torch.einsum("bdhw,bkd->bkhw", F.normalize(large, dim=1), F.normalize(names, dim=2))
        assert torch.allclose(cosines(features, names, size), wanted, atol=1e-5)


def test_a_logit_is_a_cosine_over_tau_and_no_scale_of_the_decoder_is_felt() -> None:
    network, z, t = head(), tokens(9, 0), tokens(3, 1)
    first = network(z, t, (3, 3), (8, 8))
    assert first.dtype == torch.float32
    assert 0 < float(first.abs().max()) <= 1 / 0.07 + 1e-4
    last = network.decoder.convs[-1]
    last.weight *= 3  # type: ignore[operator]
    last.bias *= 3  # type: ignore[operator]
    assert torch.allclose(network(z, t, (3, 3), (8, 8)), first, atol=1e-4)


def test_the_loss_is_a_loop_over_pictures_names_and_pixels_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator).requires_grad_()
    targets = torch.rand(2, 3, 4, 5, generator=generator) < 0.4
    counted = torch.rand(2, 4, 5, generator=generator) < 0.7
    asked = torch.tensor([[True, True, False], [True, True, True]])
    total, known = 0.0, logits.detach()
    for b in range(2):
        losses = [
            float(F.softplus(known[b, k, y, x] * (1 - 2 * int(targets[b, k, y, x]))))
            for k, y, x in np.ndindex(3, 4, 5)
            if asked[b, k] and counted[b, y, x]
        ]
        total += sum(losses) / len(losses) / 2
    loss = mask_loss(logits, targets, counted, asked)
    assert loss.item() == pytest.approx(total, abs=1e-5)
    loss.backward()
    assert logits.grad is not None
    weighed = asked[:, :, None, None] & counted[:, None]
    assert torch.equal(logits.grad != 0, weighed)
    assert mask_loss(logits, targets, torch.zeros_like(counted), asked).item() == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.0, 1.0))
def test_one_mask_for_every_question_of_a_mosaic_is_worth_a_quarter_at_most(seed: int, share: float) -> None:
    answer = np.random.default_rng(seed).random((8, 8)) < share
    quadrant = np.arange(8)[:, None] // 4 * 2 + np.arange(8)[None] // 4
    overlaps = [(answer & (quadrant == k)).sum() / (answer | (quadrant == k)).sum() for k in range(4)]
    assert np.mean(overlaps) <= 0.25 + 1e-12


# --- learning ---


def test_a_step_asks_names_that_are_there_and_some_that_are_not(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def spy(logits: Tensor, targets: Tensor, counted: Tensor, asked: Tensor) -> Tensor:
        steps.append((targets, counted, asked))
        return mask_loss(logits, targets, counted, asked)

    monkeypatch.setattr(module, "mask_loss", spy)
    truth = masks(4, 40, 48)
    for mask in truth:
        mask[mask == 2] = 255
    Fusioner(clip, absent=1, **QUICK).fit(list(pixels(4, 40, 48)), truth, NAMES, background="sky")
    for targets, counted, asked in steps:
        for b in range(len(asked)):
            # "road" is all that is in a picture and is no background; one name besides is in none.
            full = targets[b, asked[b]].flatten(1).any(dim=1)
            assert len(full) in (1, 2)
            assert int(full.sum()) <= 1
            assert not bool((targets[b] & ~counted[b]).any())


def test_names_left_to_the_background_are_never_encoded_as_questions(clip: Clip) -> None:
    method = Fusioner(clip, **QUICK)
    there = torch.tensor([True, False, False])
    for epoch in range(20):
        chosen = method._chosen([0, 2, 4], there, 0, epoch)
        assert chosen[0] == 0
        assert set(chosen) <= {0, 2, 4}
        assert len(set(chosen)) == len(chosen)
    one = Fusioner(clip, present=1, absent=0, **QUICK)
    assert all(len(one._chosen([0, 2, 4], ~there, 0, epoch)) == 1 for epoch in range(5))
    assert len(one._chosen([0, 2, 4], torch.zeros(3, dtype=torch.bool), 0, 0)) == 1


def test_training_leaves_the_clip_alone_and_learns_columns(clip: Clip) -> None:
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    shown = pixels(6, 32, 48) // 4
    for i in range(3):
        shown[:, i, :, 16 * i : 16 * (i + 1)] += 150
    method = Fusioner(clip, **{**QUICK, "epochs": 60, "lr": 3e-3, "batch_size": 3, "colors": False})
    method.fit(list(shown), masks(6, 32, 48), NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    found = method.segment(shown[0], NAMES[:3])
    assert float((found.map.numpy() == masks(1, 32, 48)[0]).mean()) > 0.8
    assert method.losses_[-1] < method.losses_[0] / 2


def test_patches_are_the_towers_own_and_encoded_once_is_encoded_each_time(clip: Clip) -> None:
    method = Fusioner(clip, **QUICK)
    side = clip.preprocessing.image_size
    seen = pixels(2, side, side)
    with torch.no_grad():
        found, grid = method._tokens(seen)
        places = F.normalize(all_vectors(clip.image, seen)[1], dim=1)  # type: ignore[arg-type]
        assert grid == places.shape[2:]
        assert torch.allclose(found, places.flatten(2).mT, atol=1e-6)
        stored = method._views(list(pixels(2, 40, 48)), masks(2, 40, 48), 3, 255)[0]
        again = method._views(list(pixels(2, 40, 48))[:1], masks(1, 40, 48), 3, 255)[0]
    assert stored.shape[:2] == (2, 2)
    assert torch.allclose(stored[:1].float(), again.float(), atol=2e-3)


# --- answers ---


def test_single_is_each_name_asked_alone(trained: Fusioner) -> None:
    picture = pixels(1, 65, 97)[0]
    together = trained.segment(picture, NAMES).scores
    trained.set_params(names="single")
    try:
        found = trained.segment(picture, NAMES)
        alone = [trained.segment(picture, [name]).scores[0] for name in NAMES]
    finally:
        trained.set_params(names="together")
    assert found.size == (65, 97)
    assert torch.allclose(found.scores, torch.stack(alone), atol=1e-5)
    assert not torch.allclose(found.scores, together, atol=1e-3)


def test_the_background_is_where_no_name_is(trained: Fusioner) -> None:
    found = trained.segment(pixels(1, 40, 48)[0], [*NAMES, "else"], background="else")
    assert torch.equal(found.scores[-1], torch.full((40, 48), 0.5))
    assert torch.equal(found.map == 5, (found.scores[:5] < 0.5).all(dim=0))


class Rows:
    """Encoders that are no Clip: mean colors, and lengths of names."""

    patch = 8

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        means = F.avg_pool2d(images.float(), 8)
        return means.flatten(2).mT, (means.shape[2], means.shape[3])

    def vectors(self, names: Sequence[str]) -> Tensor:
        return torch.tensor([[len(name), 1.0] for name in names])


def test_any_pair_of_encoders_serves_and_is_asked_for_again(clip: Clip, tmp_path: Path) -> None:
    method = fitted(clip, visual=Rows(), text=Rows())
    fusion = method.head_.fusion
    assert (fusion.patches[1].in_features, fusion.names[1].in_features) == (3, 2)
    picture = pixels(1, 40, 48)[0]
    folder = method.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="the same encoder"):
        Fusioner.load(folder, clip)
    again = Fusioner.load(folder, clip, visual=Rows(), text=Rows())
    assert torch.equal(again.segment(picture, NAMES).scores, method.segment(picture, NAMES).scores)


# --- files ---


def test_the_published_shapes_have_48847872_numbers() -> None:
    with torch.device("meta"):
        network = Head(Fusion(768, 768, 512, 12, 8), Decoder(512, 3), 0.07)
    assert sum(parameter.numel() for parameter in network.parameters()) == 48_847_872
    assert len(set(SENTENCES)) == 32


def written(clip: Clip, path: Path, **changes: Any) -> tuple[dict[str, Any], Fusioner]:
    """A file in the published layout, whose names are the test's own, and the method it was made of."""
    made = fitted(clip, width=128, layers=1, heads=2, epochs=1, names="single")
    ours = made.head_.state_dict()
    theirs: dict[str, Any] = {"fusion.cls_emb": ours["fusion.name"]}
    for i in range(3):
        for kind in ("weight", "bias"):
            theirs[f"fusion.visual_proj.{i}.{kind}"] = ours[f"fusion.patches.{i}.{kind}"]
            if i < 2:
                theirs[f"fusion.text_proj.{i}.{kind}"] = ours[f"fusion.names.{i}.{kind}"]
            theirs[f"decoder.conv_{i}.{kind}"] = ours[f"decoder.convs.{i}.{kind}"]
    for kind in ("weight", "bias"):
        theirs[f"fusion.norm.{kind}"] = ours[f"fusion.norm.{kind}"]
        for there, here in (
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("attn.qkv", "attention.qkv"),
            ("attn.proj", "attention.out"),
            ("mlp.fc1", "mlp.fc"),
            ("mlp.fc2", "mlp.proj"),
        ):
            theirs[f"fusion.blocks.0.{there}.{kind}"] = ours[f"fusion.blocks.0.{here}.{kind}"]
    for name in ("fusion.proj_patch", "fusion.proj_classes"):
        theirs[name] = ours[name]
    assert len(theirs) == len(ours)
    theirs = {name: one for name, one in {**theirs, **changes}.items() if one is not None}
    torch.save({"model": theirs}, path)
    return theirs, made


def test_a_saved_file_loads_and_asks_one_name_at_a_time(clip: Clip, tmp_path: Path) -> None:
    _, made = written(clip, tmp_path / "file.pth")
    loaded = Fusioner.from_checkpoint(tmp_path / "file.pth", clip, templates=("a {}.",))
    assert (loaded.width, loaded.layers, loaded.heads, loaded.doublings) == (128, 1, 2, 1)
    assert loaded.names == "single"
    picture = pixels(1, 40, 48)[0]
    assert torch.equal(loaded.segment(picture, NAMES).scores, made.segment(picture, NAMES).scores)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fusion.norm.bias": None}, "is missing"),
        ({"extra": torch.zeros(1)}, "belongs to no Fusioner"),
        ({"fusion.cls_emb": torch.zeros(1, 3)}, "has shape"),
        ({"fusion.visual_proj.1.weight": None}, "holds no Fusioner"),
        ({"img_model.visual.proj": torch.zeros(1, 3)}, "another Clip"),
    ],
)
def test_files_that_do_not_belong_are_refused(
    changes: dict[str, Any], said: str, clip: Clip, tmp_path: Path
) -> None:
    written(clip, tmp_path / "file.pth", **changes)
    with pytest.raises(CheckpointError, match=said):
        Fusioner.from_checkpoint(tmp_path / "file.pth", clip)


def test_bad_input_is_one_clear_error(clip: Clip) -> None:
    shown, truth = list(pixels(2, 40, 48)), masks(2, 40, 48)
    with pytest.raises(ConfigError, match="has learned nothing"):
        Fusioner(clip, **QUICK).segment(shown[0], NAMES)
    with pytest.raises(DataError, match="1 masks"):
        Fusioner(clip, **QUICK).fit(shown, truth[:1], NAMES)
    with pytest.raises(DataError, match="counts none of 2 names"):
        Fusioner(clip, **QUICK).fit(shown, truth, NAMES[:2])
    with pytest.raises(ConfigError, match="fusion is one of"):
        Fusioner(clip, **{**QUICK, "fusion": "middle"}).fit(shown, truth, NAMES)
    patch = Fusioner(clip).patch
    with pytest.raises(ConfigError, match="a window of one patch"):
        Fusioner(clip, **{**QUICK, "window": patch}).fit(shown, truth, NAMES)
