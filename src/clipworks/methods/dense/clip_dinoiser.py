"""CLIP-DINOiser: teaching CLIP a few DINO tricks. Wysoczańska et al., ECCV 2024.

MaskCLIP names every patch, but noisily. Here a patch's feature is averaged over the patches of the same
thing; which those are, a convolution reads from a middle layer of the same CLIP, taught by the
correlations of DINO's patches. No DINO is left at inference: one pass of CLIP. With F (B, D, h, w) MaskCLIP's
features, not of unit length, and f what enters the MLP of block n - 3, class token dropped,

    g = conv3x3(f), unit at each place,   A = gᵀ g (N, N),   A < γ → 0,
    F'_p = Σ_q A_pq F_q / (Σ_q A_pq + 1e-6),   P = softmax_c(100·F̂'·t_c).

A is symmetric with diagonal 1, its weights stay cosines, and long vectors of F count more. Negative weights
are zero at any γ (the published code keeps them at γ = 0). For lists with a background,

    b = conv1x1(f / |f|), object where σ(b) > ½;   where max_c P < δ and no object, P_background = 1,

on the maps of a window; "background" competes in the softmax as any other label. (The published code writes
to class 0, wherever the background stands.)

Training, everything else frozen: a teacher says which places of a crop are a pair, y (N, N), and which show
an object, o (h, w); `parts/localization` has DINO with FOUND, and others.

    L = BCE(max(A, 0), y) + BCE(b, o),   both with logits, plain means.

The cosine itself is the logit: a positive pair costs at least ln(1 + 1/e) = 0.313, a negative one at least
ln 2, so the first term has the floor 0.313π + 0.693(1 - π), π the share of positive pairs. The clamp stops
gradients: positive pairs with A < 0 get none; their share is in `report_`.

Recipe: AdamW, decay 0.01, lr 5e-5 and 1e-2 (of the 1x1), a tenth of it from step 5,000 of 6,300 on; 100
epochs of 1,000 pictures in batches of 16; short side 448, crops of 448, flips, brightness ± 0.5. Deviation:
a picture has a fixed number of crops (`views`), so that f and the targets are computed once; `"live"` draws
new ones in every epoch, as the published code does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints import files
from clipworks.core.clip import Clip
from clipworks.core.hooks import compose
from clipworks.core.towers import VisionTower
from clipworks.engine.randomness import own_randomness
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.dense.base import Asked, Segmenter
from clipworks.parts.dense import KeepNormed, LastValues, all_vectors, as_map, probabilities
from clipworks.parts.descent import descend_rows
from clipworks.parts.features import listed
from clipworks.parts.frozen import undisturbed
from clipworks.parts.localization import Crop, StoredTargets, Teacher, crop_views
from clipworks.parts.progress import with_bar
from clipworks.parts.schedules import Schedule
from clipworks.parts.windows import stretch

D = TypeVar("D", bound="CLIPDinoiser")
RELEASED_FOR = "ViT-B-16/laion2b_s34b_b88k"  # what the authors' file belongs to, which it does not say
WEIGHTS = 1 << 24  # entries of A that are in memory at the same time when features are pooled


class Convolutions(nn.Module):
    """What is learned: g and b of f (B, w, h, w')."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.correlate = nn.Conv2d(width, out, 3, padding=1, padding_mode="replicate")
        self.objects = nn.Conv2d(width, 1, 1)

    def directions(self, f: Tensor) -> Tensor:
        """f (B, w, h, w') to g (B, G, h, w'), unit at each place."""
        return F.normalize(self.correlate(f), dim=1)

    def objectness(self, f: Tensor) -> Tensor:
        """f (B, w, h, w') to b (B, h, w')."""
        return self.objects(F.normalize(f, dim=1))[:, 0]


@dataclass(eq=False, repr=False, kw_only=True)
class CLIPDinoiser(Segmenter):
    """MaskCLIP whose features are averaged over patches of the same thing.

    The window is by default twice what the tower was trained with, as the crops of its training are.

    Args:
        clip: as the first argument; a vision transformer.
        residual: as in MaskCLIP: keep the residual sum and the MLP of the last block in F.
        width: channels of g.
        block: the block whose normed tokens are read, from the end if negative.
        gamma: γ, correlations below it are zero.
        delta: δ, surer places are no background.
        views: crops a picture, whose features stay in memory: 2·w + N/8 bytes a patch; or `live`.
        epochs, batch_size: of the training.
        lr, lr_objects: learning rates of the two convolutions.
        weight_decay: of both.

    Attributes:
        module_: what was learned.
        report_: for each epoch the means of `pairs` (the first term above its floor), `objects` (the
            second), `positive` (π) and `dead` (the share of positive pairs without a gradient).
    """

    residual: bool = True
    width: int = 256
    block: int = -3
    gamma: float = 0.2
    delta: float = 0.99
    views: int | Literal["live"] = 4
    epochs: int = 100
    batch_size: int = 16
    lr: float = 5e-5
    lr_objects: float = 1e-2
    weight_decay: float = 0.01

    # --- inference ---

    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        module = self._fitted
        features, f = self._features(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            g = self._directions(features, f)
            likely = probabilities(pooled(features, g, self.gamma), asked.vectors)
            if asked.background is None:
                return likely
            objects = module.objectness(f).sigmoid() > 0.5
            return with_background(likely, objects, asked.background, self.delta)

    def _directions(self, features: Tensor, f: Tensor) -> Tensor:
        """g (B, G, h, w), unit at each place, from F and f."""
        return self._fitted.directions(f)

    def correlations(self, image: Any) -> Tensor:
        """A of a picture seen in one piece, thresholded at γ: (h, w, h, w) fp32, patch by patch.

        Patches may hang over the right and lower edge. That is (h w)² numbers: mind large pictures.
        """
        f, _, _ = self._whole(image)
        g = self._fitted.directions(f)[0]
        found = cut(torch.einsum("chw,cij->hwij", g, g), self.gamma)
        return found.cpu()

    def objects(self, image: Any) -> Tensor:
        """How likely each pixel of a picture, seen in one piece, shows an object: (H, W) fp32 in [0, 1]."""
        f, cells, size = self._whole(image)
        return stretch(self._fitted.objectness(f).sigmoid().cpu(), cells, size)[0]

    @torch.no_grad()
    def _whole(self, image: Any) -> tuple[Tensor, tuple[float, float], tuple[int, int]]:
        """f of a picture, how many cells it covers, and its size."""
        array, size = self._scaled(image)
        height, width = array.shape[:2]
        pixels = torch.from_numpy(array.transpose(2, 0, 1).copy())[None]
        pixels = F.pad(pixels, (0, -width % self.patch, 0, -height % self.patch)).to(self.clip.device)
        with undisturbed(self.clip):
            return self._features(pixels)[1], (height / self.patch, width / self.patch), size

    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) to F (B, D, h, w) and f (B, w, h, w), fp32."""
        tower = self._transformer
        last = len(tower.blocks) - 1
        kept = KeepNormed(self._block)
        _, features = all_vectors(tower, pixels, around=compose(kept, LastValues(last, self.residual)))
        places = kept.tokens[:, int(tower.config.class_token) :]
        return features.float(), as_map(places, features.shape[2:]).float()

    @property
    def _window(self) -> int:
        given = 2 * self.clip.preprocessing.image_size if self.window is None else self.window
        return max(self.patch, given // self.patch * self.patch)

    @property
    def _transformer(self) -> VisionTower:
        if not isinstance(self.tower, VisionTower):
            raise ConfigError("CLIP-DINOiser reads blocks of a vision transformer; for a ResNet: MaskCLIP")
        return self.tower

    @property
    def _block(self) -> int:
        """The number of the block that f comes from."""
        count = len(self._transformer.blocks)
        number = self.block + count if self.block < 0 else self.block
        if not 0 < number < count:
            raise ConfigError(
                f"block {self.block} of {count}: it must have one before it; a tower needs four for -3"
            )
        return number

    @property
    def _fitted(self) -> Convolutions:
        module = getattr(self, "module_", None)
        if module is None:
            raise ConfigError("nothing is learned yet: call fit, or make it with load or from_checkpoint")
        found: Convolutions = module
        return found

    # --- training ---

    def fit(self: D, images: Any, teacher: Teacher) -> D:
        """Teach both convolutions; images need no labels.

        Args:
            images: pictures of any size, as `read_picture` takes them.
            teacher: says where things are; it is not needed afterwards.

        Raises:
            ConfigError: for settings that cannot work.
            DataError: without pictures, or if the teacher does not know them.
            PictureError: for a picture that cannot be read.
        """
        pictures, device = self._pictures(images), self.clip.device
        with own_randomness(self.seed):
            module = Convolutions(self._transformer.width, self.width).to(device)
        look = _Live(self, pictures, teacher) if self.views == "live" else _Kept(self, pictures, teacher)
        seen: list[dict[str, Tensor]] = []
        self.report_: list[dict[str, float]] = []

        def step(rows: Tensor, epoch: int) -> Tensor:
            f, pairs, objects = look(rows, epoch)
            parts = losses(module.directions(f), module.objectness(f), pairs, objects)
            loss = parts.pop("loss")
            loss.backward()
            seen.append({name: part.detach() for name, part in parts.items()})
            return loss.detach()

        def epoch_ends(epoch: int) -> bool:
            self.report_.append(
                {name: float(torch.stack([s[name] for s in seen]).mean()) for name in seen[0]}
            )
            seen.clear()
            return False

        descend_rows(
            len(pictures),
            [
                {"params": module.correlate.parameters()},
                {"params": module.objects.parameters(), "lr": self.lr_objects},
            ],
            step,
            Schedule("adamw", self.weight_decay, decay="drop", drop_share=5000 / 6300),
            lr=self.lr,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            device=device,
            stop=epoch_ends,
            words="learning correlations",
            bar=self.progress,
        )
        self.module_ = module.requires_grad_(False).eval()
        return self

    def targets(self, images: Any, teacher: Teacher) -> StoredTargets:
        """What a teacher says of the crops that `fit` takes of these pictures, to be saved for another time.

        Raises:
            ConfigError: with live views, of which there is no end.
        """
        if self.views == "live":
            raise ConfigError('views="live" never end: targets are stored for a number of views')
        stored, pictures = StoredTargets(), self._pictures(images)
        for pixels, crops in self._crops(pictures):
            stored.add(crops, teacher.targets(pixels, self._grid, crops))
        return stored

    def _pictures(self, images: Any) -> list[Any]:
        if not 0 <= self.gamma < 1 or not 0 <= self.delta <= 1:
            raise ConfigError(
                f"gamma must be in 0 to below 1 and delta in 0 to 1, not {self.gamma}, {self.delta}"
            )
        if self.views != "live" and (not isinstance(self.views, int) or self.views < 1):
            raise ConfigError(f"views must be a number of crops or 'live', not {self.views!r}")
        pictures = listed(images)
        if not pictures:
            raise DataError("there are no pictures to learn from")
        return pictures

    @property
    def _short(self) -> int:
        """The shorter side to which pictures are scaled before a crop is taken."""
        return self._window if self.size == "full" else min(self._scaled_size((1, 1)))

    @property
    def _grid(self) -> tuple[int, int]:
        cells = max(1, min(self._window, self._short) // self.patch)
        return cells, cells

    def _crops(self, pictures: Sequence[Any]) -> Iterator[tuple[Tensor, list[Crop]]]:
        """All crops of the pictures, in batches of about the batch size, views of a picture together."""
        count = self._count
        at_once = max(1, self.batch_size // count)
        starts = range(0, len(pictures), at_once)
        for start in with_bar(starts, len(starts), "looking at crops", self.progress):
            rows = range(start, min(start + at_once, len(pictures)))
            cut_out = [self._crop(pictures, row, range(count)) for row in rows]
            pixels = torch.cat([each for each, _ in cut_out])
            yield pixels.to(self.clip.device), [crop for _, crops in cut_out for crop in crops]

    @property
    def _count(self) -> int:
        """How many crops of a picture the training sees."""
        return self.epochs if self.views == "live" else min(self.views, self.epochs)

    def _crop(self, pictures: Sequence[Any], row: int, views: range) -> tuple[Tensor, list[Crop]]:
        side = self._grid[0] * self.patch
        return crop_views(pictures[row], row, views, short=self._short, side=side, seed=self.seed)

    @torch.no_grad()
    def _seen(self, pixels: Tensor) -> Tensor:
        """f of crops."""
        with undisturbed(self.clip):
            return self._features(pixels)[1]

    # --- disk ---

    def _learned(self) -> dict[str, Tensor]:
        return dict(self._fitted.state_dict())

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        module = Convolutions(self._transformer.width, self.width)
        expected = {name: tuple(one.shape) for name, one in module.state_dict().items()}
        if expected != {name: tuple(one.shape) for name, one in tensors.items()}:
            raise CheckpointError(
                f"expected the convolutions {expected}, found "
                f"{ {name: tuple(one.shape) for name, one in tensors.items()} }"
            )
        module.load_state_dict(dict(tensors))
        self.module_ = module.float().to(self.clip.device).requires_grad_(False).eval()

    def _facts(self) -> dict[str, Any]:
        return {"report": getattr(self, "report_", [])}

    def _restore_facts(self, about: Mapping[str, Any]) -> None:
        self.report_ = about["report"]

    @classmethod
    def from_checkpoint(cls: type[D], path: str | PathLike[str], clip: Clip) -> D:
        """The convolutions of the authors' `last.pt`, which belong to OpenCLIP's ViT-B-16 of LAION-2B.

        The file does not say so, and other towers have the same shapes: a Clip of another name is warned of.

        Raises:
            CheckpointError: if the file is damaged, or holds other weights than these four.
        """
        ours = {"obj_proj": "correlate", "bkg_decoder": "objects"}
        names = {f"{t}.{kind}": f"{o}.{kind}" for t, o in ours.items() for kind in ("weight", "bias")}
        weights = files.read(Path(path)).weights
        if weights.keys() != names.keys():
            raise CheckpointError(
                f"{path}: expected exactly {', '.join(sorted(names))}, found {', '.join(sorted(weights))}"
            )
        loaded = cls(clip, width=len(weights["obj_proj.bias"]))
        try:
            loaded._restore({names[name]: weight for name, weight in weights.items()})
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if clip.config.name != RELEASED_FOR:
            warnings.warn(
                f"{path} was trained with {RELEASED_FOR}, and this Clip is {clip.config.name!r}: with "
                "another tower its correlations mean nothing",
                stacklevel=2,
            )
        return loaded


def cut(correlations: Tensor, gamma: float) -> Tensor:
    """Correlations of any shape, those below γ, and negative ones, zero."""
    return correlations * (correlations >= gamma) * (correlations > 0)


def pooled(features: Tensor, g: Tensor, gamma: float, rows: int | None = None) -> Tensor:
    """F': features averaged over places that correlate.

    Args:
        features: F, (B, D, h, w).
        g: (B, G, h, w), unit at each place.
        gamma: correlations below it are zero.
        rows: rows of A that are in memory at once; None chooses.

    Returns:
        (B, D, h, w).
    """
    flat, directions = features.flatten(2).mT, g.flatten(2)
    rows = rows or max(1, WEIGHTS // (len(g) * directions.shape[2]))
    parts = []
    for some in directions.split(rows, dim=2):
        weights = cut(some.mT @ directions, gamma)
        parts.append(weights @ flat / (weights.sum(dim=2, keepdim=True) + 1e-6))
    return as_map(torch.cat(parts, dim=1), features.shape[2:])


def with_background(likely: Tensor, objects: Tensor, background: int, delta: float) -> Tensor:
    """P (B, K, h, w) with 1 for the background where nothing is sure and objects (B, h, w) show none."""
    empty = (likely.amax(dim=1) < delta) & ~objects
    likely = likely.clone()
    likely[:, background][empty] = 1
    return likely


def losses(g: Tensor, b: Tensor, pairs: Tensor, objects: Tensor) -> dict[str, Tensor]:
    """The loss of B crops, and what there is to know of it.

    Args:
        g: (B, G, h, w), unit at each place.
        b: (B, h, w).
        pairs: y, (B, N, N) bool.
        objects: o, (B, h, w) bool.

    Returns:
        0-D tensors: `loss`; its terms `pairs`, less the floor, and `objects`; `positive`, π; and `dead`, the
        share of the positive pairs whose correlation is negative.
    """
    flat, y = g.flatten(2), pairs.float()
    a = flat.mT @ flat
    first = F.binary_cross_entropy_with_logits(a.clamp(min=0), y)
    second = F.binary_cross_entropy_with_logits(b, objects.float())
    share = y.mean()
    floor = math.log1p(math.exp(-1)) * share + math.log(2) * (1 - share)
    dead = ((a < 0) * y).sum() / y.sum().clamp(min=1)
    return {
        "loss": first + second,
        "pairs": first - floor,
        "objects": second,
        "positive": share,
        "dead": dead,
    }


class _Live:
    """f and targets of new crops in every epoch."""

    def __init__(self, method: CLIPDinoiser, pictures: list[Any], teacher: Teacher) -> None:
        self.method, self.pictures, self.teacher = method, pictures, teacher

    def __call__(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows (b,): f (b, w, h, w), y (b, N, N) and o (b, h, w)."""
        method = self.method
        found = [method._crop(self.pictures, row, range(epoch, epoch + 1)) for row in rows.tolist()]
        pixels = torch.cat([each for each, _ in found]).to(method.clip.device)
        said = self.teacher.targets(pixels, method._grid, [crop for _, crops in found for crop in crops])
        return method._seen(pixels), said.pairs.to(pixels.device), said.objects.to(pixels.device)


class _Kept:
    """f, in half precision, and targets of a number of crops a picture, computed once."""

    def __init__(self, method: CLIPDinoiser, pictures: list[Any], teacher: Teacher) -> None:
        self.stored, self.grid, self.count = StoredTargets(), method._grid, method._count
        self.device = method.clip.device
        seen, self.crops = [], []
        for pixels, crops in method._crops(pictures):
            seen.append(method._seen(pixels).half().cpu())
            self.stored.add(crops, teacher.targets(pixels, self.grid, crops))
            self.crops += crops
        self.f = torch.cat(seen)

    def __call__(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `_Live`."""
        places = rows * self.count + epoch % self.count
        f = self.f[places].float().to(self.device)
        said = self.stored.targets(f, self.grid, [self.crops[place] for place in places.tolist()])
        return f, said.pairs, said.objects
