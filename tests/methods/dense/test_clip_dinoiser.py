"""Pooling, loss and background equal loops written out; teachers and the authors' file come back whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipworks.core.clip import Clip
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.dense.clip_dinoiser import CLIPDinoiser, losses, pooled, with_background
from clipworks.methods.dense.maskclip import MaskCLIP, denoised, smoothed
from clipworks.parts.localization import AffinityTeacher, Crop, MaskTeacher, StoredTargets
from clipworks.parts.schedules import Schedule


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_maps(seed: int, *shape: int) -> torch.Tensor:
    return F.normalize(drawn(seed, *shape), dim=1)


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (40, 56, 3), dtype=np.uint8) for _ in range(count)]


def test_maskclips_features_are_those_of_a_block_that_attends_to_itself_alone(clip: Clip) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower = clip.image
    with torch.no_grad():
        x = tower.run(tower.place(tower.read(pixels)), stop=-1)
        block = tower.blocks[-1]
        weight, bias = block.attention.qkv.weight, block.attention.qkv.bias
        third = len(weight) // 3
        u = block.attention.out(F.linear(block.ln_1(x), weight[2 * third :], bias[2 * third :]))
        bare = tower.projection(tower.ln_post(u))[:, 1:]
        u = u + x
        u = u + block.mlp(block.ln_2(u))
        whole = tower.projection(tower.ln_post(u))[:, 1:]
        for residual, expected in ((True, whole), (False, bare)):
            found = MaskCLIP(clip, residual=residual).places(pixels)
            assert torch.allclose(found.flatten(2).mT, expected, atol=1e-5)


def test_features_are_means_weighed_by_correlations() -> None:
    features, g = drawn(0, 2, 5, 3, 4), unit_maps(1, 2, 6, 3, 4)
    found = pooled(features, g, 0.2).flatten(2)
    flat, directions = features.flatten(2), g.flatten(2)
    for b in range(2):
        for p in range(12):
            total, weight = torch.zeros(5), 0.0
            for q in range(12):
                cosine = float(directions[b, :, p] @ directions[b, :, q])
                if cosine >= 0.2:
                    total, weight = total + cosine * flat[b, :, q], weight + cosine
            assert torch.allclose(found[b, :, p], total / (weight + 1e-6), atol=1e-5)
    assert torch.allclose(pooled(features, g, 0.2, rows=5), pooled(features, g, 0.2), atol=1e-6)
    # No weight is negative at γ = 0, so every channel stays within its range.
    free = pooled(features, g, 0.0)
    assert (free <= features.amax((2, 3), keepdim=True) + 1e-4).all()
    assert (free >= features.amin((2, 3), keepdim=True) - 1e-4).all()


def test_pooling_has_its_limits() -> None:
    features, g = drawn(0, 1, 5, 3, 4), unit_maps(1, 1, 64, 3, 4)
    assert torch.allclose(pooled(features, g, 0.99), features, atol=1e-5)  # nothing else is so near
    same = g[:, :, :1, :1].expand_as(g)
    means = features.mean((2, 3), keepdim=True).expand_as(features)
    assert torch.allclose(pooled(features, same, 0.2), means, atol=1e-5)
    constant = torch.ones_like(features)
    assert torch.allclose(pooled(constant, g, 0.2), constant, atol=1e-5)
    longer = features.clone()
    longer[:, :, 0, 0] *= 10
    moved = (pooled(longer, same, 0.2) - means)[:, :, 1:].abs()
    assert moved.max() > 0.1  # the length of a vector counts


def test_the_loss_is_a_double_loop_and_negative_correlations_get_no_gradient() -> None:
    g = unit_maps(0, 1, 4, 2, 3).requires_grad_()
    b, pairs = drawn(1, 1, 2, 3), drawn(2, 1, 6, 6) > 0
    objects = drawn(3, 1, 2, 3) > 0
    found = losses(g, b, pairs, objects)
    flat = g.detach().flatten(2)[0]
    first = np.mean(
        [
            math.log1p(math.exp(-a if pairs[0, p, q] else a))
            for p in range(6)
            for q in range(6)
            for a in [max(0.0, float(flat[:, p] @ flat[:, q]))]
        ]
    )
    second = float(F.softplus(torch.where(objects, -b, b)).mean())
    share = float(pairs.float().mean())
    assert found["loss"].item() == pytest.approx(first + second, abs=1e-5)
    floor = math.log1p(math.exp(-1)) * share + math.log(2) * (1 - share)
    assert found["pairs"].item() == pytest.approx(first - floor, abs=1e-5)
    opposite = torch.stack([torch.ones(4) / 2, -torch.ones(4) / 2], dim=1)[None, :, None]
    opposite = opposite.clone().requires_grad_()
    none = losses(opposite, torch.zeros(1, 1, 2), ~torch.eye(2, dtype=torch.bool)[None], torch.ones(1, 1, 2))
    assert none["dead"].item() == 1
    # Two blocks that correlate as the teacher says cost exactly the floor.
    blocks = torch.eye(2).repeat_interleave(3, dim=1)[None, :, None]
    alike = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()[None]
    assert losses(blocks, torch.zeros(1, 1, 6), alike, torch.ones(1, 1, 6))["pairs"].abs().item() < 1e-6


def test_the_background_wins_where_nothing_is_sure_and_no_object_is() -> None:
    likely = torch.tensor([0.995, 0.6, 0.6]).view(1, 1, 1, 3)
    likely = torch.cat([likely, 1 - likely], dim=1)
    objects = torch.tensor([False, False, True]).view(1, 1, 3)
    for background in (0, 1):
        found = with_background(likely, objects, background, 0.99)
        expected = likely.clone()
        expected[0, background, 0, 1] = 1
        assert torch.equal(found, expected)


def test_refinements_of_maskclip_equal_their_formulas() -> None:
    likely, keys = drawn(0, 1, 3, 2, 2).softmax(dim=1), drawn(1, 1, 4, 5)
    flat, directions = likely.flatten(2)[0].T, F.normalize(keys[0], dim=1)
    mixed = (directions @ directions.T @ flat).clamp(min=0)
    mixed = mixed / mixed.sum(dim=1, keepdim=True)
    assert torch.allclose(smoothed(likely, keys, 1.1).flatten(2)[0].T, mixed, atol=1e-6)
    assert torch.equal(smoothed(likely, keys, 0.0), likely)
    best = likely.amax((2, 3))[0]
    bound = float(best.sort().values[1])
    kept = (best >= bound).float().view(1, 3, 1, 1)
    expected = likely * kept / (likely * kept).sum(dim=1, keepdim=True)
    assert torch.allclose(denoised(likely, bound), expected, atol=1e-6)
    assert torch.allclose(denoised(likely, 2.0), likely)


def test_what_is_learned_follows_the_teacher_and_a_stored_teacher_says_the_same(
    clip: Clip, tmp_path: Path
) -> None:
    shown = pictures(4)
    method = CLIPDinoiser(clip, width=8, views=2, epochs=3, batch_size=2, lr=1e-3, block=1, progress=False)
    stored = method.targets(shown, AffinityTeacher())
    assert len(stored) == 8
    stored.save(tmp_path / "targets.safetensors")
    again = StoredTargets.load(tmp_path / "targets.safetensors")
    first = method.fit(shown, AffinityTeacher()).correlations(shown[0])
    second = method.fit(shown, again).correlations(shown[0])
    assert torch.equal(first, second)
    places = first.shape[0] * first.shape[1]
    flat = first.reshape(places, places)
    assert torch.allclose(flat, flat.T, atol=1e-5)
    assert torch.allclose(flat.diagonal(), torch.ones(places), atol=1e-5)
    likely = method.objects(shown[0])
    assert likely.shape == (40, 56)
    assert 0 <= float(likely.min()) <= float(likely.max()) <= 1
    with pytest.raises(DataError, match="nothing is stored"):
        CLIPDinoiser(clip, width=8, views=2, epochs=3, block=1, seed=1, progress=False).fit(shown, again)


def test_a_mask_teacher_pairs_the_cells_of_an_instance_wherever_a_crop_lies() -> None:
    mask = np.zeros((8, 16), int)
    mask[:, 4:8], mask[:4, 12:] = 1, 2
    teacher = MaskTeacher([mask])
    crops = [Crop(0, 0, (8, 16), (0, 0, 16, 8), flip) for flip in (False, True)]
    said = teacher.targets(torch.zeros(2, 3, 8, 16), (2, 4), crops)
    shown = torch.tensor([[0, 1, 0, 2], [0, 1, 0, 0]])
    for row, cells in enumerate((shown, shown.flip(1))):
        assert torch.equal(said.pairs[row], cells.flatten()[:, None] == cells.flatten())
        assert torch.equal(said.objects[row], cells != 0)
    with pytest.raises(DataError, match="picture 1 has no mask"):
        teacher.targets(torch.zeros(1, 3, 8, 16), (2, 4), [Crop(1, 0, (8, 16), (0, 0, 16, 8), False)])


@pytest.mark.checkpoint("clip-dinoiser")
def test_the_authors_file_is_read_and_any_other_refused(clip: Clip, tmp_path: Path) -> None:
    width = clip.config.image.width
    weights = {
        "obj_proj.weight": drawn(0, 8, width, 3, 3),
        "obj_proj.bias": drawn(1, 8),
        "bkg_decoder.weight": drawn(2, 1, width, 1, 1),
        "bkg_decoder.bias": drawn(3, 1),
    }
    torch.save({"epoch": 100, "model_state_dict": weights}, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="another tower"):
        read = CLIPDinoiser.from_checkpoint(tmp_path / "last.pt", clip)
    assert torch.equal(read.module_.correlate.weight, weights["obj_proj.weight"])
    assert torch.equal(read.module_.objects.bias, weights["bkg_decoder.bias"])
    for change in ({"more": drawn(4, 1)}, {"obj_proj.weight": drawn(5, 8, width + 1, 3, 3)}):
        torch.save({"model_state_dict": weights | change}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="expected"):
            CLIPDinoiser.from_checkpoint(tmp_path / "other.pt", clip)


def test_bad_settings_are_one_clear_error(clip: Clip) -> None:
    for settings in ({"gamma": 1.0}, {"views": 0}, {"block": 0}, {"block": 99}):
        with pytest.raises(ConfigError):
            CLIPDinoiser(clip, **settings).fit(pictures(2), AffinityTeacher())
    with pytest.raises(DataError, match="no pictures"):
        CLIPDinoiser(clip).fit([], AffinityTeacher())
    with pytest.raises(ConfigError, match="nothing is learned"):
        CLIPDinoiser(clip, block=1).segment(pictures(1)[0], ["a", "b"])


def fitted(clip: Clip, **settings: Any) -> CLIPDinoiser:
    quick = {"width": 8, "block": 1, "views": 1, "epochs": 1, "templates": ("a {}.",), "progress": False}
    return CLIPDinoiser(clip, **{**quick, **settings}).fit(pictures(3), AffinityTeacher())


def test_lengths_of_what_is_normed_change_nothing(clip: Clip) -> None:
    """Those of f before the objects' convolution and of g before correlations; see above for those of F."""
    module = fitted(clip).module_
    f = drawn(0, 1, 32, 3, 4)
    assert torch.allclose(module.objectness(7 * f), module.objectness(f), atol=1e-5)
    bare = F.conv2d(F.pad(f, (1, 1, 1, 1), mode="replicate"), module.correlate.weight, module.correlate.bias)
    for factor in (1, 7):
        assert torch.allclose(module.directions(f), F.normalize(factor * bare, dim=1), atol=1e-5)


def test_what_enters_the_convolutions_is_the_middle_of_a_block(clip: Clip) -> None:
    method = fitted(clip)
    shown = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    tower: Any = clip.image
    with torch.no_grad():
        features, f = method._features(shown)
        assert torch.equal(features, MaskCLIP(clip).places(shown))
        small = shown[..., :32, :32]  # the tower's own grid, so that its positions are as they are
        x = tower.run(tower.place(tower.read(small)), stop=1)
        block = tower.blocks[1]
        n = block.ln_1(x)
        values = block.attention.qkv(n).chunk(3, dim=-1)[2]
        # The last block, which f comes from here, attends to itself alone.
        expected = block.ln_2(x + block.attention.out(values))[:, 1:]
        assert torch.allclose(method._features(small)[1].flatten(2).mT, expected, atol=1e-5)
    assert f.shape == (1, 32, 8, 8)


def test_the_rule_of_the_background_knows_its_name_and_acts_for_no_other_list(clip: Clip) -> None:
    method = fitted(clip).set_params(size="full", window=64)  # the picture is a single window
    torch.nn.init.constant_(method.module_.objects.bias, -100.0)  # nothing is an object
    shown, names = pictures(1, seed=5)[0], ["wall", "sky", "car", "tree"]
    plain = method.segment(shown, names)
    unsure = plain.coarse.amax(dim=0) < 0.99
    assert unsure.any()
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        found = method.segment(shown, [names[place] for place in order], background="wall").coarse
        expected = plain.coarse[order].clone()
        expected[order.index(0)][unsure] = 1
        assert torch.allclose(found, expected, atol=1e-5)
    torch.nn.init.constant_(method.module_.objects.bias, 100.0)  # everything is one
    assert torch.equal(method.segment(shown, names, background="wall").map, plain.map)


def test_a_batch_says_what_its_pictures_say_alone_and_the_teacher_may_be_gone(clip: Clip) -> None:
    class Once(AffinityTeacher):
        calls = 0

        def targets(self, *given: Any) -> Any:
            Once.calls += 1
            return super().targets(*given)

    teacher = Once()
    quick = {"width": 8, "block": 1, "epochs": 2, "templates": ("a {}.",), "progress": False}
    method = CLIPDinoiser(clip, views="live", **quick).fit(pictures(3), teacher)
    seen, shown = Once.calls, [*pictures(2, seed=1), np.zeros((65, 97, 3), np.uint8)]
    del teacher
    together = list(method.segment_all(shown, ["sky", "car"], batch_size=3, background="sky"))
    for one, found in zip(shown, together, strict=True):
        alone = method.segment(one, ["sky", "car"], background="sky")
        assert found.map.shape == one.shape[:2]
        assert torch.allclose(alone.coarse, found.coarse, atol=1e-5)
    assert Once.calls == seen == 2


def test_the_learning_rate_falls_to_a_tenth_where_the_recipe_says() -> None:
    schedule = Schedule("adamw", 0.01, decay="drop", drop_share=5000 / 6300)
    rates = [schedule.lr(5e-5, 0, 100, step, 6300) for step in (0, 4999, 5000, 6299)]
    assert rates == pytest.approx([5e-5, 5e-5, 5e-6, 5e-6])
