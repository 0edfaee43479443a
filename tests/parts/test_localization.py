"""Teachers of where things are: DINO and FOUND from local folders, stored targets, color and place, crops."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.parts.localization import (
    AffinityTeacher,
    Crop,
    DinoTeacher,
    StoredTargets,
    Targets,
    crop_views,
)

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
CROP = Crop(0, 0, (8, 16), (0.0, 0.0, 16.0, 8.0), False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small vision transformers as transformers writes them, patches of 16 and 8, and a decoder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("teachers")
    for name, patch, width in (("dino", 16, 16), ("finer", 8, 12)):
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=patch,
        )
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(patch)
            model = transformers.ViTModel(config, add_pooling_layer=False)
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(folder / name)
    decoder = {"weight": drawn(1, 1, 12, 1, 1), "bias": drawn(2, 1) / 10}
    torch.save({"decoder": decoder}, folder / "decoder.pt")
    return folder


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projected(folder: Path, pixels: Tensor, which: str) -> Tensor:
    """Values or keys (B, N, d) of the last attention, by hand from its own weights and hidden states."""
    import transformers

    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        made = model(
            (pixels - MEAN) / STD, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
        weights = model.state_dict()
        last = [name for name in weights if any(f".{part}.weight" in name for part in which.split())][-1]
        bias = weights[last.replace(".weight", ".bias")]
        norm = [one for name, one in model.named_modules() if name.endswith("layernorm_before")][-1]
        return F.linear(norm(made[-2]), weights[last], bias)[:, 1:]


def test_dino_pairs_values_and_found_reads_keys(folders: Path) -> None:
    teacher = DinoTeacher(folders / "dino", folders / "finer", folders / "decoder.pt")
    pixels = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    said = teacher.targets(pixels, (3, 4))
    values = F.normalize(projected(folders / "dino", pixels, "v_proj value"), dim=2)
    cosines = values @ values.mT
    sure = (cosines - 0.2).abs() > 1e-4
    assert torch.equal(said.pairs[sure], (cosines >= 0.2)[sure])
    assert 0.05 < said.pairs.float().mean() < 0.99
    keys = projected(folders / "finer", pixels, "k_proj key")
    decoder = torch.load(folders / "decoder.pt")["decoder"]
    likely = (keys @ decoder["weight"].flatten() + decoder["bias"]).sigmoid().view(2, 6, 8)
    means = likely.unflatten(2, (4, 2)).unflatten(1, (3, 2)).mean(dim=(2, 4))
    sure = (means - 0.5).abs() > 1e-4
    assert torch.equal(said.objects[sure], (means > 0.5)[sure])
    assert said.objects.any()
    assert not said.objects.all()


def test_dino_is_frozen_and_serves_grids_of_other_patches(folders: Path) -> None:
    teacher = DinoTeacher(folders / "dino", folders / "finer", folders / "decoder.pt")
    before = {name: tensor.clone() for name, tensor in teacher.pairs.state_dict().items()}
    said = teacher.targets(torch.rand(1, 3, 42, 42), (3, 3))  # patches of 14
    assert said.pairs.shape == (1, 9, 9)
    assert said.objects.shape == (1, 3, 3)
    assert not said.pairs.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.pairs.parameters())
    for name, tensor in teacher.pairs.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_wrong_files_of_a_teacher_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no"):
        DinoTeacher(tmp_path, folders / "finer", folders / "decoder.pt")
    with pytest.raises(CheckpointError, match="expected a decoder"):
        DinoTeacher(folders / "dino", folders / "dino", folders / "decoder.pt")  # another width
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="expected a decoder"):
        DinoTeacher(folders / "dino", folders / "finer", tmp_path / "other.pt")


def test_a_network_that_lacks_a_weight_is_refused_and_not_filled_at_random(
    folders: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders / "dino", tmp_path / "dino"))
    weights = load_file(folder / "model.safetensors")
    lost = sorted(name for name in weights if "layernorm_before" in name)[-1]
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layernorm_before"):
        DinoTeacher(folder, folders / "finer", folders / "decoder.pt")


def test_color_and_place_pair_what_looks_alike_and_is_near() -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, 0, 8:24, 8:24] = 1  # a red square on black, 4 of 16 cells
    said = AffinityTeacher(color=0.1, place=10).targets(pixels, (4, 4))
    red = F.adaptive_avg_pool2d(pixels, 4)[0, 0] > 0.5
    assert torch.equal(said.objects[0], red)
    assert torch.equal(said.pairs[0], red.flatten()[:, None] == red.flatten())
    near = AffinityTeacher(color=0.1, place=0.3).targets(torch.zeros(1, 3, 32, 32), (4, 4)).pairs[0]
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)) / 4
    distance = (places[:, None] - places).square().sum(dim=2)
    assert torch.equal(near, torch.exp(-distance / (2 * 0.3**2)) >= 0.5)
    assert not AffinityTeacher().targets(torch.zeros(1, 3, 8, 8), (1, 1)).objects.any()
    with pytest.raises(ConfigError, match="must be above 0"):
        AffinityTeacher(color=0)


def test_stored_targets_come_back_bit_by_bit(tmp_path: Path) -> None:
    stored, said = StoredTargets(), []
    crops = [Crop(row, view, (9, 7), (0.1, 0.0, 6.3, 6.2), bool(view)) for row in (0, 1) for view in (0, 1)]
    for seed, crop in enumerate(crops):
        said.append(Targets(drawn(seed, 1, 15, 15) > 0, drawn(seed + 9, 1, 3, 5) > 0))
        stored.add([crop], said[-1])
    again = StoredTargets.load(stored.save(tmp_path / "targets.safetensors"))
    for order in ([0, 1, 2, 3], [3, 1]):
        found = again.targets(torch.zeros(1), (3, 5), [crops[place] for place in order])
        assert torch.equal(found.pairs, torch.cat([said[place].pairs for place in order]))
        assert torch.equal(found.objects, torch.cat([said[place].objects for place in order]))
    assert (tmp_path / "targets.safetensors").stat().st_size < 2000
    with pytest.raises(DataError, match="nothing is stored for crop 2"):
        again.targets(torch.zeros(1), (3, 5), [Crop(0, 2, (9, 7), (0.1, 0.0, 6.3, 6.2), False)])
    with pytest.raises(DataError, match="for a grid of"):
        again.targets(torch.zeros(1), (5, 3), crops[:1])
    with pytest.raises(DataError, match="for 2 crops"):
        stored.add(crops[:2], said[0])
    with pytest.raises(DataError, match="no targets to write"):
        StoredTargets().save(tmp_path / "none.safetensors")


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"pairs": torch.zeros(2, 3, dtype=torch.uint8)}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "missing.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            StoredTargets.load(tmp_path / name)


def test_a_crop_shows_what_its_box_says() -> None:
    """A picture whose colors are its coordinates: a crop's brightness apart, they are those of its box."""
    height, width = 60, 90
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width)[None] * 2
    picture[..., 1] = np.arange(height)[:, None] * 2
    picture[..., 2] = 100
    pixels, crops = crop_views(picture, 3, range(6), short=48, side=40, seed=1)
    assert pixels.shape == (6, 3, 40, 40)
    assert {crop.flipped for crop in crops} == {True, False}
    for shown, crop in zip(pixels, crops, strict=True):
        left, top, right, bottom = crop.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert right - left == pytest.approx(50)  # 40 of a picture scaled from 60 to 48
        shown = (shown.flip(2) if crop.flipped else shown) * 100 / (shown[2] * 255).mean()
        shown = shown * 255
        assert shown[0].mean() / 2 == pytest.approx((left + right) / 2 - 0.5, abs=1)
        assert shown[1].mean() / 2 == pytest.approx((top + bottom) / 2 - 0.5, abs=1)


def test_crops_are_functions_of_seed_row_and_view(untouched_rng: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    settings = {"short": 32, "side": 16}
    pixels, crops = crop_views(picture, 0, range(4), seed=0, **settings)
    again, _ = crop_views(picture, 0, range(2, 4), seed=0, **settings)
    assert torch.equal(pixels[2:], again)
    others = [
        crop_views(picture, row, range(1), seed=seed, **settings)[1][0] for row, seed in ((1, 0), (0, 1))
    ]
    assert len({crop.box for crop in [*crops, *others]}) == 6
