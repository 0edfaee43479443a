"""Teachers of where things are: which places show the same thing, and which show an object at all.

A teacher says so for crops of pictures at the places of a grid, N = h w of them:

    teacher.targets(images (B, 3, H, W) in [0, 1], (h, w), crops) -> pairs (B, N, N), objects (B, h, w)

Four are here: `DinoTeacher` (networks in local folders that learned from pictures alone: DINO, Caron et al.,
ICCV 2021, and FOUND, Siméoni et al., CVPR 2023), `StoredTargets` (what a teacher said before, in a file),
`MaskTeacher` (instance masks, so a supervised one) and `AffinityTeacher` (color and place, no learning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints import files
from clipworks.checkpoints.own import write_safetensors
from clipworks.core.pictures import read_picture
from clipworks.data.randomness import Draws
from clipworks.errors import CheckpointError, ConfigError, DataError, require
from clipworks.parts.encoders import IMAGENET_MEAN, IMAGENET_STD
from clipworks.parts.segmentation import read_mask

_SALT = 0xC20B
POINTS = 8  # of a mask that are looked at along each side of a cell


class Targets(NamedTuple):
    """What a teacher says of B crops: `pairs` (B, N, N) and `objects` (B, h, w), both bool."""

    pairs: Tensor
    objects: Tensor


@dataclass(frozen=True)
class Crop:
    """Where a crop comes from, for teachers that know the pictures.

    Attributes:
        row: of the picture among those given.
        view: which crop of it this is.
        size: height and width of the picture.
        box: left, top, right, bottom in pixels of the picture, which need not be whole.
        flipped: mirrored left to right after cutting.
    """

    row: int
    view: int
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    flipped: bool


def crop_views(
    image: Any, row: int, views: range, *, short: int, side: int, seed: int
) -> tuple[Tensor, list[Crop]]:
    """Random square crops of a picture, flipped half of the time, brightness ± 0.5.

    Crops are functions of the seed, the row and the view. Each is cut in the picture's own pixels and scaled
    once, to what the scaled picture would show there.

    Args:
        image: as `read_picture` takes it.
        row: of the picture among others.
        views: which crops.
        short: the shorter side to which the picture is scaled, at least `side`.
        side: of the crops, S.
        seed: of everything random.

    Returns:
        (V, 3, S, S) in [0, 1], and what they are.
    """
    picture = read_picture(image).convert("RGB")
    width, height = picture.size
    found, crops = [], []
    for view in views:
        draws, reach = Draws(seed, row, view, _SALT), side * min(width, height) / short
        left, top = draws.random() * (width - reach), draws.random() * (height - reach)
        box = (left, top, min(width, left + reach), min(height, top + reach))
        crop = Crop(row, view, (height, width), box, draws.random() < 0.5)
        part = picture.resize((side, side), Image.Resampling.BILINEAR, box)
        pixels = torch.from_numpy(np.array(part).transpose(2, 0, 1)).float() / 255
        pixels = (pixels * (0.5 + draws.random())).clamp(max=1)
        found.append(pixels.flip(2) if crop.flipped else pixels)
        crops.append(crop)
    return torch.stack(found), crops


class Teacher(Protocol):
    """Says where things are."""

    def targets(self, images: Tensor, grid: tuple[int, int], crops: Sequence[Crop]) -> Targets:
        """What is where in crops (B, 3, H, W) in [0, 1], at the places of a grid (h, w)."""
        ...


class AffinityTeacher:
    """Color and place: two cells are a pair if their mean colors and their places are near.

        D = exp(-|Δcolor|² / 2σ_c² - |Δplace|² / 2σ_p²) ≥ ½,

    colors and places in [0, 1]; an object is what few cells of the rim have the color of.

    Args:
        color, place: σ_c and σ_p.
        rim: the share of the rim's cells of a cell's color below which it is an object.
    """

    def __init__(self, color: float = 0.1, place: float = 0.3, rim: float = 0.1) -> None:
        if not (color > 0 and place > 0 and 0 < rim <= 1):
            raise ConfigError(
                f"color and place must be above 0 and rim in 0 to 1, not {color}, {place}, {rim}"
            )
        self.color, self.place, self.rim = color, place, rim

    def targets(self, images: Tensor, grid: tuple[int, int], crops: Sequence[Crop] = ()) -> Targets:
        """Of crops (B, 3, H, W); see `Teacher`."""
        colors = F.adaptive_avg_pool2d(images.float(), grid).flatten(2).mT
        lines = [(torch.arange(side, device=images.device) + 0.5) / side for side in grid]
        places = torch.cartesian_prod(*lines)
        unlike = (torch.cdist(colors, colors) / self.color).square()
        far = (torch.cdist(places, places) / self.place).square()
        inside = torch.zeros(grid, dtype=torch.bool, device=images.device)
        inside[1:-1, 1:-1] = True
        alike = (unlike <= 2 * np.log(2))[:, :, ~inside.flatten()].float().mean(dim=2)
        return Targets(unlike + far <= 2 * np.log(2), (alike < self.rim).unflatten(1, grid))


class MaskTeacher:
    """Instance masks: a cell is what most of it shows, and two cells of one instance are a pair.

    Args:
        masks: one a picture, in their order, as `read_mask` takes them; the background is an instance too.
        background: the number of the background; every other one is an object.
    """

    def __init__(self, masks: Sequence[Any], background: int = 0) -> None:
        self.masks, self.background = masks, background

    def targets(self, images: Tensor, grid: tuple[int, int], crops: Sequence[Crop]) -> Targets:
        """Of crops (B, 3, H, W); see `Teacher`.

        Raises:
            DataError: for a picture without a mask, or with one of another size.
        """
        shown = torch.stack([self._cells(crop, grid) for crop in crops]).to(images.device)
        flat = shown.flatten(1)
        return Targets(flat[:, :, None] == flat[:, None], shown != self.background)

    def _cells(self, crop: Crop, grid: tuple[int, int]) -> Tensor:
        if crop.row >= len(self.masks):
            raise DataError(f"picture {crop.row} has no mask: there are {len(self.masks)}")
        mask = read_mask(self.masks[crop.row], crop.size, where=f"the mask of picture {crop.row}")
        left, top, right, bottom = crop.box
        rows, columns = (
            (first + (np.arange(cells * POINTS) + 0.5) / (cells * POINTS) * (last - first)).astype(int)
            for first, last, cells in ((top, bottom, grid[0]), (left, right, grid[1]))
        )
        points = torch.from_numpy(mask[rows.clip(0, len(mask) - 1)][:, columns.clip(0, mask.shape[1] - 1)])
        points = points.flip(1) if crop.flipped else points
        cells = points.unflatten(1, (grid[1], POINTS)).unflatten(0, (grid[0], POINTS)).transpose(1, 2)
        return cells.flatten(2).mode(dim=2).values


class StoredTargets:
    """What a teacher said of some crops, pairs as bits: N²/8 bytes a crop.

    A file of it serves a training on the same pictures in the same order with the same crops, on a machine
    that does not have the teacher.
    """

    def __init__(self) -> None:
        self.grid: tuple[int, int] | None = None
        self._places: dict[Crop, int] = {}
        self._pairs: list[Tensor] = []
        self._objects: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, crops: Sequence[Crop], said: Targets) -> None:
        """Keep what was said of B crops.

        Raises:
            DataError: if it does not fit the crops, or has another grid than what is kept.
        """
        grid = (said.objects.shape[-2], said.objects.shape[-1])
        places = grid[0] * grid[1]
        if said.pairs.shape != (len(crops), places, places) or len(said.objects) != len(crops):
            raise DataError(
                f"a teacher gave pairs {tuple(said.pairs.shape)} and objects {tuple(said.objects.shape)} "
                f"for {len(crops)} crops"
            )
        if self.grid not in (None, grid):
            raise DataError(f"targets on a grid of {grid} beside those of {self.grid}")
        self.grid = grid
        packed = np.packbits(said.pairs.flatten(1).numpy(force=True).astype(bool), axis=1)
        for crop, pairs, objects in zip(crops, torch.from_numpy(packed), said.objects.cpu(), strict=True):
            self._places[crop] = len(self._pairs)
            self._pairs.append(pairs)
            self._objects.append(objects.bool())

    def targets(self, images: Tensor, grid: tuple[int, int], crops: Sequence[Crop]) -> Targets:
        """Of crops (B, 3, H, W); see `Teacher`.

        Raises:
            DataError: for crops that it knows nothing of.
        """
        if tuple(grid) != self.grid:
            raise DataError(f"targets are stored for a grid of {self.grid}, not {tuple(grid)}")
        for crop in crops:
            if crop not in self._places:
                raise DataError(
                    f"nothing is stored for crop {crop.view} of picture {crop.row}: use the same pictures in "
                    "the same order, and the size, window, views and seed that the targets were stored with"
                )
        rows = [self._places[crop] for crop in crops]
        count = grid[0] * grid[1]
        bits = np.unpackbits(torch.stack([self._pairs[row] for row in rows]).numpy(), axis=1)
        pairs = torch.from_numpy(bits[:, : count * count].astype(bool)).unflatten(1, (count, count))
        objects = torch.stack([self._objects[row] for row in rows])
        return Targets(pairs.to(images.device), objects.to(images.device))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write everything to a safetensors file.

        Raises:
            DataError: if nothing is kept.
        """
        if not self._places:
            raise DataError("there are no targets to write")
        about = [[c.row, c.view, *c.size, *c.box, c.flipped] for c in self._places]
        tensors = {
            "pairs": torch.stack([self._pairs[row] for row in self._places.values()]),
            "objects": torch.stack([self._objects[row] for row in self._places.values()]),
            "crops": torch.tensor(about, dtype=torch.float64),
        }
        write_safetensors(tensors, Path(path), "clipworks")
        return Path(path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> StoredTargets:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is missing, damaged or holds something else.
        """
        tensors = files.read_safetensors(Path(path))
        try:
            pairs, objects, about = (tensors.pop(name) for name in ("pairs", "objects", "crops"))
            count, height, width = objects.shape
            fits = pairs.shape == (count, -(-((height * width) ** 2) // 8)) and about.shape == (count, 9)
            if tensors or not fits or (pairs.dtype, objects.dtype) != (torch.uint8, torch.bool):
                raise ValueError("its tensors do not fit each other")
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not a file of stored targets ({error})") from error
        stored = cls()
        stored.grid = (height, width)
        for row, view, tall, wide, left, top, right, bottom, flipped in about.tolist():
            crop = Crop(
                int(row), int(view), (int(tall), int(wide)), (left, top, right, bottom), bool(flipped)
            )
            stored._places[crop] = len(stored._places)
        stored._pairs, stored._objects = list(pairs), list(objects)
        return stored


class LastProjection(nn.Module):
    """What the last attention of a vision transformer of `transformers` reads of its places.

    Args:
        folder: of the model, as `save_pretrained` writes it; nothing is fetched.
        which: its values or its keys.

    Raises:
        CheckpointError: if there is no such model.
        MissingExtra: without transformers.
    """

    NAMES: Mapping[str, tuple[str, ...]] = {"values": ("v_proj", "value"), "keys": ("k_proj", "key")}
    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | PathLike[str], which: Literal["values", "keys"]) -> None:
        super().__init__()
        transformers = require("transformers", extra="dense", purpose="a DINO teacher")
        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(f"{folder}: no folder of a model: there is no config.json")
        try:
            self.model, about = transformers.ViTModel.from_pretrained(
                str(folder), add_pooling_layer=False, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{folder}: not a vision transformer ({_line(error)})") from error
        if about["missing_keys"]:  # they would be random
            raise CheckpointError(
                f"{folder}: lacks {sorted(about['missing_keys'])[0]} of a vision transformer"
            )
        self.model.float().eval().requires_grad_(False)
        self.patch = int(self.model.config.patch_size)
        named = [one for name, one in self.model.named_modules() if name.split(".")[-1] in self.NAMES[which]]
        self._listened = named[-1]
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to the projections (B, d, h, w), heads joined, at a grid's places."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        heard: list[Tensor] = []
        handle = self._listened.register_forward_hook(lambda module, given, made: heard.append(made))
        try:
            self.model((images - self.mean) / self.std, interpolate_pos_encoding=True)
        finally:
            handle.remove()
        return heard[-1][:, 1:].mT.unflatten(2, grid)


class DinoTeacher:
    """Pairs from DINO and objects from FOUND, both of which have learned from pictures alone.

    Pairs: cosines D of the values of DINO's last attention, y = 1[D ≥ 0.2]. Objects: the keys of the last
    attention of a finer DINO, through FOUND's 1x1 convolution and a sigmoid, stretched to the grid, above ½.

    Args:
        pairs: folder of a DINO in the format of transformers; ViT-B/16 in the paper.
        objects: folder of the DINO that the decoder was trained on; ViT-S/8 in the paper.
        decoder: FOUND's file, `{"decoder": {"weight" (1, d, 1, 1), "bias" (1)}}`.
        bound: of D.
        device: where both run.

    Raises:
        CheckpointError: for files that are missing, damaged or do not fit each other.
        MissingExtra: without transformers.
    """

    def __init__(
        self,
        pairs: str | PathLike[str],
        objects: str | PathLike[str],
        decoder: str | PathLike[str],
        *,
        bound: float = 0.2,
        device: str | torch.device = "cpu",
    ) -> None:
        self.pairs = LastProjection(pairs, "values").to(device)
        self.objects = LastProjection(objects, "keys").to(device)
        self.decoder = _decoder(Path(decoder), int(self.objects.model.config.hidden_size)).to(device)
        self.bound = bound

    @torch.no_grad()
    def targets(self, images: Tensor, grid: tuple[int, int], crops: Sequence[Crop] = ()) -> Targets:
        """Of crops (B, 3, H, W); see `Teacher`."""
        images = images.to(self.pairs.mean.device).float()
        values = F.normalize(self.pairs(images, grid).flatten(2), dim=1)
        scale = self.pairs.patch / self.objects.patch  # how much finer the second network looks
        finer = (max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale)))
        likely = self.decoder(self.objects(images, finer)).sigmoid()
        likely = F.interpolate(likely, grid, mode="bilinear", align_corners=False)
        return Targets(values.mT @ values >= self.bound, likely[:, 0] > 0.5)


def _decoder(path: Path, width: int) -> nn.Conv2d:
    content = files.read_object(path)
    weights = content.get("decoder") if isinstance(content, dict) else None
    shapes = {"weight": (1, width, 1, 1), "bias": (1,)}
    found = {name: tuple(one.shape) for name, one in weights.items()} if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or found != shapes:
        raise CheckpointError(f"{path}: expected a decoder of {shapes}, found {found}")
    decoder = nn.Conv2d(width, 1, 1)
    decoder.load_state_dict(weights)
    return decoder.float().eval().requires_grad_(False)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
