"""DenseCLIP: what the text adds, what the head is given, what training changes, what released files say."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints import rules
from clipworks.core.clip import Clip
from clipworks.core.config import ResNetConfig, uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.dense.denseclip import (
    DenseCLIP,
    Network,
    _released_rules,
    _tower_rules,
    look,
    pixel_loss,
)
from clipworks.parts.schedules import Schedule

NAMES = ("sky", "road", "red car")
QUICK: dict[str, Any] = {
    "decoder_width": 16,
    "decoder_layers": 2,
    "head_width": 8,
    "steps": 3,
    "batch_size": 2,
    "views": 2,
}


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Clip]) -> Clip:
    blocks = uniform_blocks(depth=4, width=32, heads=2)
    return tiny_clip(0, tokenizer=ClipTokenizer(), image={"blocks": blocks}).eval()


@pytest.fixture(scope="module")
def large(tiny_clip: Callable[..., Clip]) -> Clip:
    """Patches of 16 pixels."""
    return tiny_clip(1, tokenizer=ClipTokenizer(), image={"image_size": 64, "patch_size": 16}).eval()


@pytest.fixture(scope="module")
def resnet(tiny_clip: Callable[..., Clip]) -> Clip:
    built = tiny_clip(0, tokenizer=ClipTokenizer())
    config = ResNetConfig(image_size=64, width=8, layers=(1, 1, 1, 1), heads=4)
    from dataclasses import replace

    return Clip.from_config(replace(built.config, image=config), ClipTokenizer(), seed=2).eval()


def pixels(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def masks(count: int, height: int, width: int) -> list[np.ndarray]:
    thirds = 3 * np.arange(width) // width
    return [np.repeat(thirds[None], height, axis=0).astype(np.uint8) for _ in range(count)]


def fitted(clip: Clip, names: Any = NAMES, **settings: Any) -> DenseCLIP:
    method = DenseCLIP(clip, names, **{**QUICK, **settings})
    return method.fit(list(pixels(4, 40, 48)), masks(4, 40, 48))


def test_without_gamma_the_texts_are_what_they_were_and_its_start_is_hardly_felt(clip: Clip) -> None:
    method = fitted(clip)
    network = method.module_
    seen = look(network.tower, pixels(2, 64, 64))
    t = network.vectors
    started = network.score_map(seen, t)
    network.gamma.fill_(1e-4)
    begun = network.score_map(seen, t)
    network.gamma.zero_()
    assert torch.equal(network.refined(seen, t), t.expand(2, -1, -1))
    plain = network.score_map(seen, t)
    assert float((begun - plain).abs().max()) < 1e-3
    assert started.shape == plain.shape == (2, 3, 8, 8)


def test_the_decoder_looks_at_the_picture_and_at_no_order(clip: Clip) -> None:
    network = fitted(clip).module_
    seen = look(network.tower, pixels(2, 64, 64))
    memory = torch.cat([seen.whole[:, None], seen.places.flatten(2).mT], dim=1)
    delta = network.decoder(network.vectors, memory)
    assert not torch.allclose(delta[0], delta[1], atol=1e-5)
    mixed = memory[:, torch.randperm(memory.shape[1], generator=torch.Generator().manual_seed(1))]
    assert torch.allclose(network.decoder(network.vectors, mixed), delta, atol=1e-5)
    order = [2, 0, 1]
    assert torch.allclose(network.decoder(network.vectors[order], memory), delta[:, order], atol=1e-5)


def test_a_score_is_the_cosine_of_a_place_and_a_text(clip: Clip) -> None:
    method = fitted(clip)
    picture = pixels(1, 64, 72)
    seen = look(method.module_.tower, picture)
    refined = method.module_.refined(seen, method.module_.vectors)[0]
    found = method.score_maps(picture)
    z = seen.places[0, :, 5, 3]
    for k in range(3):
        by_hand = float(z @ refined[k]) / math.sqrt(float(z @ z) * float(refined[k] @ refined[k]))
        assert float(found[0, k, 5, 3]) == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("kind", ["clip", "large", "resnet"])
def test_all_tokens_hold_the_towers_own_vector_and_four_maps(kind: str, request: Any) -> None:
    one: Clip = request.getfixturevalue(kind)
    side = one.preprocessing.image_size
    shown = pixels(2, side, side).float() / 255
    seen = look(one.image, shown)  # type: ignore[arg-type]
    assert torch.allclose(seen.whole, one.image(shown), atol=1e-5)
    assert len(seen.maps) == 4


@pytest.mark.parametrize(
    ("kind", "level", "channels", "cell"),
    [("clip", 1, [32] * 4, 4), ("large", 2, [32] * 4, 4), ("resnet", 3, [32, 64, 128, 256], 4)],
)
def test_scores_go_in_where_the_places_are(
    kind: str, level: int, channels: list[int], cell: int, request: Any
) -> None:
    method = fitted(request.getfixturevalue(kind))
    network: Network = method.module_
    laterals = [layer.in_channels for layer in network.pyramid.laterals]  # type: ignore[union-attr]
    assert laterals == [count + 3 * (i == level) for i, count in enumerate(channels)]
    assert method.cell == cell
    # At that level the map has the places' size, and the first one is `cell` pixels fine.
    seen = look(network.tower, pixels(1, 64, 96))  # type: ignore[arg-type]
    maps = list(seen.maps) if network.rescale is None else network.rescale(seen.maps)
    assert maps[level].shape[2:] == seen.places.shape[2:]
    assert maps[0].shape[2:] == (64 // cell, 96 // cell)
    assert method.segment(pixels(1, 65, 97)[0]).map.shape == (65, 97)


def test_a_name_alone_is_its_plain_text_and_may_be_long(clip: Clip) -> None:
    names = ("sky", "fire extinguisher cabinet wall mount")
    method = DenseCLIP(clip, names, context_length=0)
    with torch.no_grad():
        found = F.normalize(method._bank(names)(torch.zeros(0, 32)), dim=1)
    assert torch.allclose(found, clip.embed_texts(list(names)), atol=1e-5)
    ends = [int(chunk) for chunk in ClipTokenizer()([f"{'X ' * 8}{name}" for name in names]).ends]
    assert ends == [8 + 2, 8 + 1 + len(ClipTokenizer().encode(names[1]))]
    assert DenseCLIP(clip, names, **QUICK)._bank(names)(torch.randn(8, 32)).shape == (2, 16)


def test_contexts_start_wide(clip: Clip) -> None:
    method = DenseCLIP(clip, NAMES, **{**QUICK, "context_length": 400})
    contexts = method._network(3).contexts.detach()
    assert float(contexts.std()) == pytest.approx(0.88, abs=0.02)
    assert float(contexts.abs().max()) <= 2


def test_training_leaves_the_clip_alone_and_moves_its_own_tower(clip: Clip) -> None:
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    method = fitted(clip)
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    assert not torch.equal(method.module_.tower.blocks[0].mlp.fc.weight, clip.image.blocks[0].mlp.fc.weight)
    assert fitted(clip, train_tower=False).module_.tower is None


def test_a_group_without_a_rate_stays_without_one_above_the_floor() -> None:
    schedule = Schedule("adamw", decay="power", floor=1e-6)
    parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    optimizer = schedule.make([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.0}], 1e-4)
    assert [group["share"] for group in optimizer.param_groups] == [1.0, 0.0]
    assert schedule.lr(1e-4, 0, 1, 0, 100) == pytest.approx(1e-4)
    assert schedule.lr(1e-4, 0, 1, 50, 100) == pytest.approx(99e-6 * 0.5**0.9 + 1e-6)
    assert schedule.lr(1e-4, 0, 1, 100, 100) == pytest.approx(1e-6)


def test_the_loss_is_a_loop_over_pixels_in_which_ignored_ones_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    labels = torch.randint(0, 3, (2, 4, 5), generator=generator)
    labels[0, 1:3] = 255
    total = 0.0
    for b, y, x in np.ndindex(2, 4, 5):
        if labels[b, y, x] != 255:
            scores = logits[b, :, y, x].double()
            total += float(scores.logsumexp(0) - scores[labels[b, y, x]])
    assert float(pixel_loss(logits, labels)) == pytest.approx(total / 40, abs=1e-5)
    assert float(pixel_loss(logits, torch.full_like(labels, 255))) == 0


def test_encoded_once_is_encoded_each_time(clip: Clip) -> None:
    method = DenseCLIP(clip, NAMES, **QUICK)
    read, labels = method._read(list(pixels(2, 40, 48)), masks(2, 40, 48))
    with torch.no_grad():
        seen, truth = method._cached(read, labels)
        crops, live = method._crops(read, labels, torch.tensor([0, 1]), view=1)
        again = look(clip.image, crops)  # type: ignore[arg-type]
    rows = torch.tensor([0, 1]) * method.views + 1
    assert torch.equal(truth[rows], live)
    assert torch.allclose(seen.places[rows], again.places, atol=1e-5)
    assert all(torch.allclose(x[rows], y, atol=1e-5) for x, y in zip(seen.maps, again.maps, strict=True))


def test_training_learns_what_the_columns_are(clip: Clip) -> None:
    shown = pixels(6, 32, 48) // 4
    for i in range(3):
        shown[:, i, :, 16 * i : 16 * (i + 1)] += 150
    method = DenseCLIP(clip, NAMES, **{**QUICK, "steps": 60, "lr": 3e-3, "scale": (1.0, 1.0), "crop": 32})
    method.fit(list(shown), masks(6, 32, 48))
    found = method.segment(shown[0])
    assert (found.labels, found.source) == (NAMES, "")
    assert float((found.map.numpy() == masks(1, 32, 48)[0]).mean()) > 0.8


def test_other_labels_are_answered_from_the_score_map(clip: Clip) -> None:
    method = fitted(clip)
    picture = pixels(1, 40, 48)[0]
    other = method.segment(picture, ["grass", "sky"])
    assert other.source == "score map"
    assert torch.allclose(other.scores.sum(dim=0), torch.ones(40, 48), atol=1e-5)
    assert method.segment(picture, ["road", "sky"]).source == ""


# --- the authors' files ---


def written(clip: Clip, path: Path, **changes: Any) -> tuple[dict[str, Tensor], DenseCLIP]:
    """A file of the authors' layout, made from a random network, and the method it was made of."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        method = DenseCLIP(clip, NAMES, **{**QUICK, "context_length": 8})
        network = method._network(3)
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    theirs = rules.write(_released_rules(clip, network), network.state_dict())
    theirs |= rules.write(_tower_rules(clip, "text"), clip.text.state_dict())
    theirs["text_encoder.positional_embedding"] = theirs["text_encoder.positional_embedding"][:13].clone()
    theirs |= changes
    theirs = {name: tensor for name, tensor in theirs.items() if tensor is not None}
    torch.save({"meta": {"CLASSES": NAMES, "PALETTE": [[0, 0, 0]] * 3}, "state_dict": theirs}, path)
    method.module_ = network.eval()
    return theirs, method


@pytest.mark.checkpoint("denseclip")
@pytest.mark.parametrize("kind", ["large", "resnet"])
def test_a_released_file_loads_with_their_names(kind: str, tmp_path: Path, request: Any) -> None:
    clip: Clip = request.getfixturevalue(kind)
    theirs, made = written(clip, tmp_path / "file.pth")
    named = (
        "contexts gamma context_decoder.memory_proj.2.bias "
        "context_decoder.decoder.1.cross_attn.q_proj.weight "
        "context_decoder.decoder.0.self_attn.proj.bias context_decoder.decoder.0.norm3.weight "
        "context_decoder.decoder.0.mlp.3.weight neck.lateral_convs.3.conv.bias neck.fpn_convs.0.conv.weight "
        "decode_head.scale_heads.3.4.bn.running_var decode_head.scale_heads.0.0.conv.weight "
        "decode_head.conv_seg.bias text_encoder.text_projection"
    )
    shapes = {name: tuple(theirs[name].shape) for name in named.split()}
    assert shapes["contexts"] == (1, 8, 32)
    loaded = DenseCLIP.from_checkpoint(tmp_path / "file.pth", clip)
    assert loaded.class_names == list(NAMES)
    assert (loaded.size, loaded.window, loaded.head_width, loaded.decoder_layers) == (64, 64, 8, 2)
    for name, tensor in made.module_.state_dict().items():
        if name not in ("vectors", "tower.class_token"):
            assert torch.equal(loaded.module_.state_dict()[name], tensor), name
    with torch.no_grad():
        vectors = made._bank(NAMES)(made.module_.contexts)
    assert torch.allclose(loaded.module_.vectors, vectors, atol=1e-5)
    if kind == "large":
        for name in (
            "backbone.fpn1.4.weight",
            "backbone.fpn2.1.bias",
            "backbone.fpn3.weight",
            "backbone.fpn4.0.bias",
        ):
            assert name in theirs
    again = DenseCLIP.load(loaded.save(tmp_path / "run"), clip)
    picture = pixels(1, 65, 97)[0]
    assert torch.equal(again.segment(picture).scores, loaded.segment(picture).scores)


@pytest.mark.checkpoint("denseclip")
def test_the_class_embedding_is_added_twice_as_they_do(large: Clip, tmp_path: Path) -> None:
    table = torch.randn(26, 32, generator=torch.Generator().manual_seed(0))  # another grid: 5 x 5
    theirs, _ = written(large, tmp_path / "file.pth", **{"backbone.positional_embedding": table})
    loaded = DenseCLIP.from_checkpoint(tmp_path / "file.pth", large)
    assert (loaded.size, loaded.window) == (80, 80)
    tower = loaded.module_.tower
    content = tower.read(pixels(1, 80, 80))
    first = torch.nn.functional.layer_norm(
        theirs["backbone.class_embedding"] * 2 + table[0],
        (32,),
        theirs["backbone.ln_pre.weight"],
        theirs["backbone.ln_pre.bias"],
    )
    assert torch.allclose(tower.place(content)[0, 0], first, atol=1e-5)
    other = DenseCLIP.load(loaded.save(tmp_path / "run"), large)
    assert torch.equal(other.module_.tower.positions, table)


@pytest.mark.checkpoint("denseclip")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"neck.fpn_convs.1.conv.bias": None}, "missing"),
        ({"extra.weight": torch.zeros(1)}, "too many"),
        ({"gamma": torch.zeros(3)}, "gamma has shape"),
        ({"contexts": None}, "contexts is missing"),
    ],
)
def test_files_that_do_not_belong_are_refused(changes: Any, said: str, large: Clip, tmp_path: Path) -> None:
    written(large, tmp_path / "file.pth", **changes)
    with pytest.raises(CheckpointError, match=said):
        DenseCLIP.from_checkpoint(tmp_path / "file.pth", large)


def test_bad_input_is_one_clear_error(clip: Clip) -> None:
    shown = list(pixels(2, 40, 48))
    with pytest.raises(DataError, match="1 masks"):
        DenseCLIP(clip, NAMES, **QUICK).fit(shown, masks(1, 40, 48))
    with pytest.raises(DataError, match="from 0 to 7, not from 0 to 2"):
        DenseCLIP(clip, NAMES, **QUICK).fit(shown, [7 * (mask > 1) for mask in masks(2, 40, 48)])
    with pytest.raises(ConfigError, match="not been fitted"):
        DenseCLIP(clip, NAMES).segment(shown[0])
    with pytest.raises(ConfigError, match="multiple of 4"):
        DenseCLIP(clip, NAMES, **{**QUICK, "decoder_width": 6}).fit(shown, masks(2, 40, 48))
