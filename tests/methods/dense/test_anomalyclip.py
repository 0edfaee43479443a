"""AnomalyCLIP: the value path, the loss, what is overwritten where, maps of any size, and released files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import Clip
from clipworks.core.config import uniform_blocks
from clipworks.core.hooks import Tap, compose
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.dense.anomalyclip import AnomalyCLIP, dice, focal, likely, objective
from clipworks.methods.dense.base import Scores, Unreadable
from clipworks.parts.dense import ValuePath, dual_vectors
from clipworks.parts.heat import heat, overlay, smoothed


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    blocks = uniform_blocks(depth=4, width=32, heads=2)
    made: Clip = tiny_clip(tokenizer=ClipTokenizer(), image={"blocks": blocks}, text={"blocks": blocks})
    return made.requires_grad_(False)


def pictures(count: int, height: int = 40, width: int = 48) -> tuple[list[Tensor], list[Tensor]]:
    """Noise whose every other picture has a white square, and masks of these."""
    images, masks = [], []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(60, 120, (3, height, width), generator=generator, dtype=torch.uint8)
        mask = torch.zeros(height, width, dtype=torch.uint8)
        if seed % 2:
            mask[10:26, 12:30] = 1
            image[:, mask > 0] = 255
        images.append(image)
        masks.append(mask)
    return images, masks


@pytest.fixture(scope="module")
def fitted(clip: Clip) -> AnomalyCLIP:
    return AnomalyCLIP(clip, epochs=2, progress=False).fit(*pictures(8))


def test_the_value_path_leaves_the_tower_and_is_its_closed_sum(clip: Clip) -> None:
    tower, pixels = clip.image, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path, tap = ValuePath(1), Tap()
    placed = tower.place(tower.read(pixels))
    y = tower.run(placed, around=compose(path, tap))
    assert torch.equal(tower.run(placed, around=ValuePath(1)), tower.run(placed))
    assert torch.allclose(y, tower.run(placed))
    z, entering = tap[0].double(), tap[0]
    for i in range(1, len(tower.blocks)):
        block = tower.blocks[i]
        attention = block.attention
        values = attention.split(attention.qkv(block.ln_1(entering)).chunk(3, -1)[2]).double()
        mixed = torch.zeros_like(values)
        for query in range(values.shape[2]):
            scores = (values * values[:, :, query : query + 1]).sum(-1) / math.sqrt(attention.head_width)
            mixed[:, :, query] = (scores.softmax(-1)[..., None] * values).sum(2)
        out = attention.out
        z = z + mixed.transpose(1, 2).flatten(2) @ out.weight.double().T + out.bias.double()
        entering = tap[i]
    assert torch.allclose(path.tokens.double(), z, atol=1e-5)


def test_without_a_value_path_z_is_y(clip: Clip) -> None:
    tower, pixels = clip.image, torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = ValuePath(len(tower.blocks))
    assert torch.equal(tower.run(tower.place(tower.read(pixels)), around=path), path.tokens)


def test_a_single_tokens_value_attention_is_its_output_projection(clip: Clip) -> None:
    tower, token = clip.image, torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    path = ValuePath(0)
    tower.run(token, stop=1, around=path)
    block = tower.blocks[0]
    values = block.attention.qkv(block.ln_1(token)).chunk(3, -1)[2]
    assert torch.allclose(path.tokens, token + block.attention.out(values), atol=1e-6)


def test_the_streams_differ_after_every_block(clip: Clip) -> None:
    found = []
    path = ValuePath(0)

    def after(i: int, block: Any, tokens: Tensor) -> Tensor:
        tokens = path(i, block, tokens)
        found.append(path.tokens)
        return tokens

    clip.image.run(torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)), around=after)
    assert all(
        not torch.allclose(found[i], found[j]) for i in range(len(found)) for j in range(i + 1, len(found))
    )


def test_the_class_token_skips_the_last_norm_or_is_the_towers_own(clip: Clip) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = dual_vectors(clip.image, pixels, 1, global_norm=True)[0]
    assert torch.allclose(own, clip.image(pixels), atol=1e-5)
    assert not torch.allclose(dual_vectors(clip.image, pixels, 1)[0], own, atol=1e-3)
    with pytest.raises(ConfigError, match="block 0 to 4"):
        dual_vectors(clip.image, pixels, 5)


def test_the_focal_loss_is_cross_entropy_at_gamma_zero_and_dice_has_its_closed_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(3, 6, 7, generator=generator)
    masks = torch.rand(3, 6, 7, generator=generator) > 0.5
    plain = F.binary_cross_entropy(found, masks.float())
    assert torch.allclose(focal(found, masks, gamma=0.0, smooth=0.0), plain, atol=1e-6)
    assert float(dice(masks.float(), masks.float())) == pytest.approx(0, abs=1e-6)
    empty = dice(found[:1], torch.zeros(1, 6, 7))
    assert float(empty) == pytest.approx(1 - 1 / (1 + float(found[0].sum())), abs=1e-6)
    one, m = found[0].double().numpy(), masks[0].numpy()
    naive = 1 - (2 * (one * m).sum() + 1) / (one.sum() + m.sum() + 1)
    assert float(dice(found[:1], masks[:1].float())) == pytest.approx(naive, abs=1e-6)


def test_the_loss_is_its_naive_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    t, f = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (2, 3))
    z = F.normalize(torch.randn(3, 4, 4, 8, generator=generator), dim=-1)
    masks, faulty = torch.rand(3, 16, 16, generator=generator) > 0.7, torch.tensor([0, 1, 1])
    S = (z @ t.T / 0.07).softmax(-1).movedim(-1, 1)
    S_n, S_a = F.interpolate(S, (16, 16), mode="bilinear").unbind(1)
    assert torch.allclose(S_n + S_a, torch.ones_like(S_a), atol=1e-6)
    p = torch.where(masks, S_a, S_n) * (1 - 2e-5) + 2e-5
    local = (-((1 - p) ** 2) * p.log()).mean()
    for s, m in ((S_a, masks.float()), (S_n, 1 - masks.float())):
        per = (2 * (s * m).sum((1, 2)) + 1) / (s.sum((1, 2)) + m.sum((1, 2)) + 1)
        local = local + 1 - per.mean()
    expected = F.cross_entropy(f @ t.T / 0.07, faulty) + 4 * local
    assert torch.allclose(objective(t, f, z, masks, faulty), expected, atol=1e-5)
    assert torch.allclose(likely(z, t), 1 - likely(z, t.flip(0)), atol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_smoothing_is_scipys_gaussian_with_its_borders(sigma: float) -> None:
    values = torch.rand(9, 31, generator=torch.Generator().manual_seed(0))
    expected = ndimage.gaussian_filter(values.double().numpy(), sigma)
    assert np.allclose(smoothed(values, sigma).numpy(), expected, atol=1e-6)


def test_colors_have_a_fixed_range_and_an_overlay_its_pictures_size() -> None:
    values = torch.linspace(0.2, 0.4, 30).repeat(20, 1)
    assert np.array_equal(heat(values)[:, :15], heat(values[:, :15]))
    shown = overlay(np.zeros((20, 30, 3), np.uint8), values, threshold=0.3)
    assert shown.height == 20
    assert shown.width > 30


def test_texts_are_cut_at_places_15_and_16_and_equal_the_full_context(fitted: AnomalyCLIP) -> None:
    tokens = fitted.texts()
    assert tokens.ends.tolist() == [15, 16]
    assert tokens.ids.shape == (2, 17)
    learned = fitted.module_
    short = fitted.text_features()
    kept = learned.ids
    try:
        learned.ids = F.pad(kept, (0, 60))
        assert torch.allclose(fitted.text_features(), short, atol=1e-6)
    finally:
        learned.ids = kept


def test_only_the_first_places_of_deep_blocks_are_overwritten(
    fitted: AnomalyCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    for i, block in enumerate(fitted.clip.text.blocks):
        forward = block.forward

        def spied(tokens: Tensor, *rest: Any, i: int = i, forward: Any = forward, **more: Any) -> Tensor:
            before[i] = tokens
            after[i] = forward(tokens, *rest, **more)
            return after[i]

        monkeypatch.setattr(block, "forward", spied)
    fitted.text_features()
    assert len(fitted.module_.deep) == 2  # depth 3 of 4 blocks
    for i in range(1, 4):
        changed = (before[i] != after[i - 1]).any(-1).any(0)
        expected = [1, 2, 3, 4] if i <= 2 else []
        assert changed.nonzero()[:, 0].tolist() == expected
        if expected:
            assert torch.equal(before[i][0, 1:5], fitted.module_.deep[i - 1])


def test_only_the_words_are_learned_and_the_clip_stays(clip: Clip, untouched_rng: None) -> None:
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    method = AnomalyCLIP(clip, epochs=1, progress=False).fit(*pictures(4))
    count = sum(parameter.numel() for parameter in method.module_.parameters())
    assert count == 2 * 12 * 32 + 2 * 4 * 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())


def test_fitting_finds_the_defect_it_was_shown(clip: Clip) -> None:
    images, masks = pictures(12)
    method = AnomalyCLIP(clip, epochs=10, lr=1e-2, progress=False).fit(images, masks)
    assert method.losses_[-1] < method.losses_[0]
    maps = method.score(images).maps
    inside = np.mean([float(maps[i][masks[i] > 0].mean()) for i in range(1, 12, 2)])
    outside = np.mean([float(maps[i][masks[i] == 0].mean()) for i in range(12)])
    assert inside > outside + 0.1


def test_cached_and_live_scores_agree_and_sizes_do_not_disturb_each_other(fitted: AnomalyCLIP) -> None:
    images, _ = pictures(3)
    live, cached = fitted.score(images), fitted.score_views(fitted.view(images))
    assert torch.allclose(live.image, cached.image, atol=1e-6)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(live.maps, cached.maps, strict=True))
    other = AnomalyCLIP(fitted.clip, size=32)
    other.module_ = fitted.module_
    other.score(images)
    again = fitted.score(images)
    assert torch.equal(again.image, live.image)


def test_large_pictures_have_windows_for_the_map_and_the_whole_for_the_score(fitted: AnomalyCLIP) -> None:
    large = AnomalyCLIP(fitted.clip, size="full", window=32)
    large.module_ = fitted.module_
    image = pictures(2, 75, 130)[0][1]
    found = large.score([image])
    assert found.maps[0].shape == (75, 130)
    whole = AnomalyCLIP(fitted.clip, size=32)
    whole.module_ = fitted.module_
    # Squashed in one step or in two.
    assert torch.allclose(found.image, whole.score([image]).image, atol=0.05)


def test_calibration_leaves_faultless_pictures_unmarked_and_the_threshold_is_a_half(
    fitted: AnomalyCLIP,
) -> None:
    images = pictures(8)[0][::2]
    fitted.calibrate(images, quantile=1.0)
    try:
        for image in images:
            assert fitted.segment(image).shares()["damaged"] == 0
        fitted.threshold_ = float(fitted.score(images[:1]).maps[0].median())
        found, [values] = fitted.segment(images[0]), fitted.score(images[:1]).maps
        assert float(((found.map == 1) == (values > fitted.threshold_)).float().mean()) > 0.999
    finally:
        del fitted.threshold_, fitted.image_threshold_
    with pytest.raises(ConfigError, match="quantile"):
        fitted.calibrate(images, quantile=2)
    with pytest.raises(ConfigError, match="two names"):
        fitted.segment(images[0], ["one"])


def test_bad_input_is_one_clear_error(clip: Clip, fitted: AnomalyCLIP, tmp_path: Path) -> None:
    images, masks = pictures(4)
    fresh = AnomalyCLIP(clip)
    with pytest.raises(ConfigError, match="learned nothing"):
        fresh.score(images)
    with pytest.raises(DataError, match="every picture needs one"):
        fresh.fit(images, masks[:2])
    with pytest.raises(DataError, match="the mask of picture 0"):
        fresh.fit(images, [mask[:5] for mask in masks])
    with pytest.raises(DataError, match="faultless"):
        fresh.fit(images[::2], masks[::2])
    with pytest.raises(ConfigError, match="prompt_length"):
        AnomalyCLIP(clip, prompt_length=13).fit(images, masks)
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    first, bad, last = fitted.score_all([images[0], broken, images[1]], on_error="skip")
    assert isinstance(bad, Unreadable)
    assert bad.place == 1
    assert isinstance(first, Scores)
    assert isinstance(last, Scores)


def released(clip: Clip, **changes: Any) -> dict[str, Tensor]:
    """A file's content as the authors write it, for this Clip."""
    generator = torch.Generator().manual_seed(0)
    width, embedding = clip.config.text.width, clip.text.embedding.weight.detach()
    found = {f"ctx_{side}": torch.randn(1, 1, 12, width, generator=generator) for side in ("pos", "neg")}
    for k in range(2):
        found[f"compound_prompts_text.{k}"] = torch.randn(4, width, generator=generator)
        found[f"compound_prompt_projections.{k}.weight"] = torch.zeros(40, width)
        found[f"compound_prompt_projections.{k}.bias"] = torch.zeros(40)
    endings = {"pos": [14115, 269, 49407], "neg": [13568, 14115, 269, 49407]}
    for side, ending in endings.items():
        ids = torch.tensor([49406, *[343] * 12, *ending])
        ids = F.pad(ids, (0, 77 - len(ids)))
        found[f"tokenized_prompts_{side}"] = ids.int()[None, None]
        found[f"token_prefix_{side}"] = embedding[ids[:1]][None, None]
        found[f"token_suffix_{side}"] = embedding[ids[13:]][None, None]
    return found | changes


@pytest.mark.checkpoint("anomalyclip")
def test_a_released_file_becomes_the_sentences(clip: Clip, tmp_path: Path) -> None:
    content = released(clip)
    torch.save({"prompt_learner": content}, tmp_path / "epoch_15.pth")
    method = AnomalyCLIP.from_checkpoint(tmp_path / "epoch_15.pth", clip, size=64)
    assert (method.context_length, method.prompt_length, method.prompt_depth) == (12, 4, 3)
    assert torch.equal(method.module_.contexts["normal"], content["ctx_pos"][0, 0])
    assert torch.equal(method.module_.contexts["abnormal"], content["ctx_neg"][0, 0])
    rounded = content["compound_prompts_text.1"].half().float()
    assert torch.equal(method.module_.deep[1], rounded)
    loaded = AnomalyCLIP.load(method.save(tmp_path / "run"), clip)
    assert torch.equal(loaded.text_features(), method.text_features())


@pytest.mark.checkpoint("anomalyclip")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ctx_pos": torch.zeros(1, 1, 12, 31)}, "shape"),
        ({"token_prefix_pos": torch.ones(1, 1, 1, 32)}, "another Clip"),
        ({"tokenized_prompts_neg": torch.full((1, 1, 77), 7, dtype=torch.int32)}, "other words"),
        ({"surprise": torch.zeros(1)}, "surprise"),
    ],
)
def test_another_file_is_refused(clip: Clip, tmp_path: Path, changes: dict[str, Tensor], said: str) -> None:
    torch.save({"prompt_learner": released(clip, **changes)}, tmp_path / "epoch_15.pth")
    with pytest.raises(CheckpointError, match=said):
        AnomalyCLIP.from_checkpoint(tmp_path / "epoch_15.pth", clip)
