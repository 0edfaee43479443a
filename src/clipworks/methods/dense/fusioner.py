"""Fusioner: masks for names never trained on, from two frozen encoders that need not belong together.

Ma, Yang, Wang, Zhang and Xie, Open-vocabulary Semantic Segmentation with Frozen Vision-Language Models,
BMVC 2022. A transformer lets N patches z (N, D) and K names t (K, D_t), all of unit length, attend to one
another; patches are then up-sampled, and the cosine of a pixel with a name is that name's mask:

    patches  LN(D) → Linear → LN(d)        names  LN(D_t) → Linear, + e      e one vector for all names
    [patches; names] → L pre-norm blocks, everything sees everything → LN → patches P, names Q
    as a map (d, h, h): [3x3 → instance norm → ReLU → twice the size] x doublings, 3x3 → instance norm → ReLU,
    1x1, up to the picture's pixels
    logit of pixel and name = cosine / τ,   τ = 0.07;   the name is there where σ > ½, that is, cosine > 0

(`fusion="early"`). With `"late"` patches and names do not see each other, so that they meet in the cosine
only; with `"none"` there are no blocks. Learned are fusion and decoder, by binary cross-entropy: the mean
over names and pixels that count, and over pictures. z is by default what the image tower makes of every
patch, projected; t the mean over 32 sentences. Any pair of encoders serves: `visual` and `text`.

The logit is computed without the map of d numbers a pixel. Bilinear up-sampling R F Cᵀ is linear, so the
dot product is that of the small maps, up-sampled; and a pixel's squared length is a quadratic form of the
squares S of the small map's vectors and of the products H, V, X of neighbors (beside, below, diagonal):

    |·|² = R² S C²ᵀ + R² H Ĉᵀ + R̂ V C²ᵀ + R̂ X Ĉᵀ,   R² elementwise, R̂ twice the product of adjacent columns

Names. The published code trains and tests with one name a picture that is in it. Ours asks all names that
are in a crop and `absent` ones that are not, whose masks are empty, and answers all names together; an
answer then depends on the list. With `names="single"` each is asked alone: the right way for a model that
was trained with one (`present=1, absent=0`).

Recipe: AdamW, 0 → 1e-3 over a fiftieth of the steps, then a cosine to 0; the decay of the fusion's matrices
rises from 0.01 to 0.4, other parameters have none. Crops of half to all of the picture's area, flips and
other colors. Deviations: the decoder has the same cosine (theirs is constant); gradients are clipped at
norm 1; each picture has a fixed number of views, encoded once (theirs are drawn without end, and are also
turned and bent); the number of epochs is ours; pixels are normalized as the tower was trained (theirs have
about half its deviation: `pixels="fusioner"`). Large pictures are scaled as in training and seen in windows
of the trained size; theirs sees windows of the picture at its own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints import files, layouts, rules
from clipworks.core.attention import Block
from clipworks.core.clip import Clip, unit
from clipworks.core.config import uniform_blocks
from clipworks.core.pictures import read_picture
from clipworks.data.captions import ClassTexts
from clipworks.data.randomness import permutation
from clipworks.engine.randomness import own_randomness
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.evaluate.zeroshot import class_features
from clipworks.methods.dense.base import Asked, Segmenter
from clipworks.parts.crops import MaskedCrop, recolored
from clipworks.parts.dense import all_vectors
from clipworks.parts.descent import descend_rows
from clipworks.parts.frozen import undisturbed
from clipworks.parts.progress import with_bar
from clipworks.parts.schedules import Schedule
from clipworks.parts.segmentation import read_mask

FusionKind = Literal["early", "late", "none"]
NamesKind = Literal["together", "single"]
PixelsKind = Literal["clip", "fusioner"]
T = TypeVar("T", bound="Fusioner")

SENTENCES = (
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a cropped photo of a {}.",
    *(
        f"This is a {kind}photo of a {size}{{}}"
        for kind in ("", "masked ", "cropped ")
        for size in ("", "small ", "medium ", "large ")
    ),
    "A photo of a {} in the scene",
    "a bad photo of the {} in the scene",
    "a photo of the large {} in the scene",
    "a photo of the small {} in the scene",
    "a cropped photo of a {} in the scene",
    "a photo of a masked {} in the scene",
    *(
        f"{start} {masked}{{}} in the scene"
        for masked in ("", "masked ")
        for start in ("There is a", "There is the", "This is a", "This is the", "This is one")
    ),
)
SCHEDULE = Schedule(
    "adamw", weight_decay=0.01, last_weight_decay=0.4, decay="step", warmup_share=10 / 510, clip_norm=1.0
)
# What the published code takes for mean and deviation of pixels.
OTHER_MEAN, OTHER_STD = (0.455, 0.430, 0.396), (0.118, 0.119, 0.134)
ZOOM = (1.0, 2**0.5)  # crops are the whole shorter side to half of the area
AT_ONCE = 64  # crops that are encoded together
# Names of weights in the published code's files, and ours.
OURS = {
    "fusion.cls_emb": "fusion.name",
    "fusion.visual_proj.": "fusion.patches.",
    "fusion.text_proj.": "fusion.names.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attention.qkv.",
    ".attn.proj.": ".attention.out.",
    ".mlp.fc1.": ".mlp.fc.",
    ".mlp.fc2.": ".mlp.proj.",
    "decoder.conv_": "decoder.convs.",
}


class Visual(Protocol):
    """A frozen encoder of pictures."""

    patch: int
    """Pixels that a token is wide."""

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bytes (B, 3, H, W), sides multiples of `patch`, to tokens (B, N, D) and their grid, row by row."""
        ...


class Text(Protocol):
    """A frozen encoder of names."""

    def vectors(self, names: Sequence[str]) -> Tensor:
        """K names to (K, D_t)."""
        ...


class Patches:
    """A Clip's patches, all blocks as they are, after the last norm and projection, of unit length."""

    def __init__(self, clip: Clip, patch: int, pixels: PixelsKind = "clip") -> None:
        self.clip, self.patch, self.pixels = clip, patch, pixels

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bytes (B, 3, H, W) to tokens (B, N, D) and their grid, as `Visual` has it."""
        tower: Any = self.clip.image
        if self.pixels == "fusioner":
            mean, std = (
                torch.tensor(one, device=images.device)[:, None, None] for one in (OTHER_MEAN, OTHER_STD)
            )
            images = (images.float() / 255 - mean) / std * tower.std + tower.mean
        places = all_vectors(tower, images)[1]
        return unit(places.flatten(2).mT), (places.shape[2], places.shape[3])


class Fusion(nn.Module):
    """Patches and names that attend to one another.

    Args:
        patch_width, name_width: D and D_t.
        width, layers, heads: d, and the blocks; without layers there is no attention.
        late: patches and names see their own kind only.
    """

    def __init__(
        self, patch_width: int, name_width: int, width: int, layers: int, heads: int, late: bool = False
    ) -> None:
        super().__init__()
        self.late = late
        self.patches = nn.Sequential(
            nn.LayerNorm(patch_width), nn.Linear(patch_width, width), nn.LayerNorm(width)
        )
        self.names = nn.Sequential(nn.LayerNorm(name_width), nn.Linear(name_width, width))
        self.name = nn.Parameter(torch.randn(1, width))
        blocks = uniform_blocks(layers, width, heads)
        self.blocks = nn.ModuleList(Block(width, block, "gelu", 1e-5) for block in blocks)
        self.norm = nn.LayerNorm(width)
        self.proj_patch = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.proj_classes = nn.Parameter(width**-0.5 * torch.randn(width, width))

    def forward(self, patches: Tensor, names: Tensor, asked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches (B, N, D) and names (B, K, D_t) to (B, N, d) and (B, K, d).

        Args:
            patches, names: of unit length.
            asked: (B, K) bool, which of the names there are, if not all; the others are seen by none.
        """
        x, y = self.patches(patches), self.names(names) + self.name
        if self.late:
            x, y = self._blocks(x), self._blocks(y, asked)
        else:
            both = None if asked is None else torch.cat([asked.new_ones(x.shape[:2]), asked], dim=1)
            x, y = self._blocks(torch.cat([x, y], dim=1), both).split([x.shape[1], y.shape[1]], dim=1)
        return self.norm(x) @ self.proj_patch, self.norm(y) @ self.proj_classes

    def _blocks(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        if not tokens.shape[1]:
            return tokens
        mask = None if seen is None else seen[:, None, None]
        # Where a picture has no name at all, its padding may see itself.
        mask = mask if mask is None else mask | ~mask.any(dim=-1, keepdim=True)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return tokens


class Decoder(nn.Module):
    """A map of patches (B, d, h, w) to one of 2^doublings times its sides."""

    def __init__(self, width: int, doublings: int) -> None:
        super().__init__()
        three = [nn.Conv2d(width, width, 3, padding=1) for _ in range(doublings + 1)]
        self.convs = nn.ModuleList([*three, nn.Conv2d(width, width, 1)])

    def forward(self, features: Tensor) -> Tensor:
        """(B, d, h, w), more than one place, to (B, d, 2^doublings h, 2^doublings w)."""
        *doubled, before, last = self.convs
        for conv in doubled:
            features = F.relu(F.instance_norm(conv(features)))
            features = F.interpolate(features, scale_factor=2, mode="bilinear")
        return last(F.relu(F.instance_norm(before(features))))


class Head(nn.Module):
    """Fusion, decoder and cosine: all that is learned."""

    def __init__(self, fusion: Fusion, decoder: Decoder, temperature: float) -> None:
        super().__init__()
        self.fusion, self.decoder, self.temperature = fusion, decoder, temperature

    def forward(
        self,
        patches: Tensor,
        names: Tensor,
        grid: tuple[int, int],
        size: tuple[int, int],
        asked: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, h w, D) on a grid (h, w) and names (B, K, D_t) to logits (B, K, H, W) fp32 of a size."""
        seen, named = self.fusion(patches, names, asked)
        return cosines(self.decoder(seen.mT.unflatten(2, grid)), named, size) / self.temperature


def cosines(features: Tensor, names: Tensor, size: tuple[int, int]) -> Tensor:
    """The cosine of each pixel of an up-sampled map with each name.

    Args:
        features: (B, d, h, w), which are up-sampled bilinearly, corners not aligned.
        names: (B, K, d).
        size: H and W.

    Returns:
        (B, K, H, W) fp32 in [-1, 1].
    """
    with torch.autocast(features.device.type, enabled=False):
        features, names = features.float(), unit(names)
        rows, columns = (_stretching(*both, features) for both in zip(features.shape[2:], size, strict=True))
        dots = rows @ torch.einsum("bdhw,bkd->bkhw", features, names) @ columns.mT
        own, beside = (features * features).sum(1), (features[..., 1:] * features[..., :-1]).sum(1)
        below, above = features[:, :, 1:], features[:, :, :-1]
        down = (below * above).sum(1)
        cross = (above[..., :-1] * below[..., 1:] + above[..., 1:] * below[..., :-1]).sum(1) / 2
        rows_2, columns_2 = rows.square(), columns.square()
        rows_11, columns_11 = (2 * one[:, 1:] * one[:, :-1] for one in (rows, columns))
        squares = (rows_2 @ own + rows_11 @ down) @ columns_2.mT
        squares = squares + (rows_2 @ beside + rows_11 @ cross) @ columns_11.mT
        return (dots * squares.clamp(min=1e-12).rsqrt()[:, None]).clamp(-1, 1)


def _stretching(length: int, size: int, like: Tensor) -> Tensor:
    """Bilinear interpolation along a side as a matrix (size, length)."""
    ones = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.interpolate(ones[None], size, mode="linear")[0].mT


def mask_loss(logits: Tensor, targets: Tensor, counted: Tensor, asked: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over names and pixels that count of each picture, then over pictures.

    Args:
        logits: (B, K, H, W).
        targets: the same, bool.
        counted: (B, H, W) bool, which pixels count; a picture without any has a loss of 0.
        asked: (B, K) bool, which names there are.
    """
    weights = (asked[:, :, None, None] & counted[:, None]).float()
    entropy = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), weights, reduction="none")
    return (entropy.sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp(min=1)).mean()


@dataclass(eq=False, repr=False, kw_only=True)
class Fusioner(Segmenter):
    """A segmenter that learns from masks of some names and answers any.

    A name's score is σ(logit), and above ½ the name is there; that of a label given as `background` is ½, so
    it has the pixels where no name is. The paper has a `size` and windows of what the tower was trained with.

    Args:
        visual, text: other frozen encoders than the Clip's; they are not saved: give them to `load` again.
        width, layers, heads: of the fusion.
        doublings: how often the decoder doubles the map's sides.
        fusion: `early`, `late`, or `none`.
        temperature: τ.
        present: at most so many of the names that are in a crop are asked in a step; None asks all.
        absent: how many names that are not in it are asked besides.
        names: answer all names `together`, or each by itself (`single`), which takes K passes.
        epochs, batch_size, lr: of the training.
        views: how many crops of each picture are encoded; every epoch shows another one.
        colors: change the light and the colors of crops.
        pixels: normalize pixels as the Clip does, or as the published code (`fusioner`).
    """

    templates: Sequence[str] = SENTENCES
    overlap: float = 1 / 3
    visual: Visual | None = None
    text: Text | None = None
    width: int = 512
    layers: int = 12
    heads: int = 8
    doublings: int = 3
    fusion: FusionKind = "early"
    temperature: float = 0.07
    present: int | None = None
    absent: int = 3
    names: NamesKind = "together"
    epochs: int = 50
    batch_size: int = 32
    lr: float = 1e-3
    views: int = 4
    colors: bool = True
    pixels: PixelsKind = "clip"

    enlarged: ClassVar[int] = 1

    # --- learning ---

    def fit(
        self: T,
        images: Sequence[Any],
        masks: Sequence[Any],
        class_names: Sequence[str] | ClassTexts,
        *,
        background: str | None = None,
        ignore: int = 255,
    ) -> T:
        """Learn from pictures with masks.

        Args:
            images: n pictures, for `read_picture`.
            masks: n label maps of the pictures' sizes, for `read_mask`, whose numbers count the names.
            class_names: C different names.
            background: which of them means "none of the others". It is never asked; its pixels lie outside
                the masks of all others. What must stay unseen belongs there, or to `ignore`.
            ignore: pixels with this number do not count.

        Raises:
            DataError: for pictures and masks that do not fit together, or a number that no name has.
            ConfigError: for settings that cannot work, or names as `segment` refuses them.
        """
        self._check()
        texts, place = self._texts(class_names, background)
        names = [number for number in range(len(texts)) if number != place]
        if not names:
            raise ConfigError(f"there is no name to learn besides the background {background!r}")
        if len(images) != len(masks) or not len(images):
            raise DataError(
                f"{len(images)} pictures and {len(masks)} masks: there must be one mask a picture"
            )
        device, size = self.clip.device, (self._window, self._window)
        with undisturbed(self.clip), torch.no_grad():
            vectors = self._vectors(texts)
            patches, grid, numbers = self._views(images, masks, len(texts), ignore)
        there = torch.stack([(numbers == name).flatten(2).any(dim=2) for name in names], dim=2)
        head = self._head(patches.shape[-1], vectors.shape[-1]).to(device).train()

        def step(rows: Tensor, epoch: int) -> Tensor:
            view = epoch % self.views
            chosen = [self._chosen(names, there[row, view], int(row), epoch) for row in rows]
            most = max(map(len, chosen))
            index = torch.tensor([one + [one[0]] * (most - len(one)) for one in chosen], device=device)
            asked = torch.tensor([[i < len(one) for i in range(most)] for one in chosen], device=device)
            truth = numbers[rows, view].to(device)
            all_asked = bool(asked.all())
            logits = head(
                patches[rows, view].to(device).float(),
                vectors[index],
                grid,
                size,
                None if all_asked else asked,
            )
            loss = mask_loss(logits, truth[:, None] == index[:, :, None, None], truth != ignore, asked)
            loss.backward()
            return loss.detach()

        self.losses_ = descend_rows(
            len(images),
            _groups(head),
            step,
            SCHEDULE,
            lr=self.lr,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            device=device,
            precision=self._precision,
            bar=self.progress,
        )
        self.head_, self.trained_on_ = head.eval().requires_grad_(False), tuple(texts.names[i] for i in names)
        return self

    def _views(
        self, images: Sequence[Any], masks: Sequence[Any], classes: int, ignore: int
    ) -> tuple[Tensor, tuple[int, int], Tensor]:
        """Tokens (n, V, N, D) fp16 of V crops a picture, their grid, and the masks (n, V, s, s) int16."""
        window = self._window
        if window == self.patch:
            raise ConfigError(
                f"a window of one patch ({window} pixels) has nothing to be normed over: set window"
            )
        waiting: list[Tensor] = []
        tokens, numbers = [], []
        grid = (0, 0)
        for i, image in enumerate(with_bar(images, len(images), "encoding", self.progress)):
            picture = torch.from_numpy(np.array(read_picture(image).convert("RGB"))).permute(2, 0, 1)
            mask = torch.from_numpy(
                read_mask(masks[i], (picture.shape[1], picture.shape[2]), where=f"mask {i}")
            )
            wrong = mask[(mask != ignore) & ((mask < 0) | (mask >= classes))]
            if len(wrong):
                raise DataError(
                    f"mask {i}: {int(wrong[0])} counts none of {classes} names, nor is it {ignore} (ignore)"
                )
            short = min(self._scaled_size((picture.shape[1], picture.shape[2])))
            crop = MaskedCrop(window, short, scale=ZOOM, ignore=ignore)
            for view in range(self.views):
                pixels, kept = crop(picture, mask, seed=self.seed, index=i, view=view)
                if self.colors:
                    pixels = recolored(pixels, seed=self.seed, index=i, view=view)
                waiting.append(pixels)
                numbers.append(kept.to(torch.int16))
            if len(waiting) >= AT_ONCE or i + 1 == len(images):
                found, grid = self._tokens(torch.stack(waiting).to(self.clip.device))
                tokens.append(found.half().cpu())
                waiting = []
        shape = (len(images), self.views)
        return torch.cat(tokens).unflatten(0, shape), grid, torch.stack(numbers).unflatten(0, shape)

    def _chosen(self, names: Sequence[int], there: Tensor, row: int, epoch: int) -> list[int]:
        """The names that a crop is asked for: those that are in it, and some that are not."""
        order = permutation(len(names), self.seed, row, epoch)
        inside = [names[i] for i in order if there[i]][: self.present]
        outside = [names[i] for i in order if not there[i]]
        return inside + outside[: self.absent if inside else max(1, self.absent)]

    def _head(self, patch_width: int, name_width: int) -> Head:
        layers = 0 if self.fusion == "none" else self.layers
        with own_randomness(self.seed):
            fusion = Fusion(
                patch_width, name_width, self.width, layers, self.heads, late=self.fusion == "late"
            )
            return Head(fusion, Decoder(self.width, self.doublings), self.temperature)

    def _check(self) -> None:
        for name, kinds in (("fusion", FusionKind), ("names", NamesKind), ("pixels", PixelsKind)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(
                    f"{name} is one of {', '.join(get_args(kinds))}, not {getattr(self, name)!r}"
                )
        least = {"width": 1, "heads": 1, "layers": 0, "doublings": 0, "views": 1, "absent": 0, "present": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"{name} must be at least {bound}, not {value}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, not {self.temperature}")

    # --- answering ---

    @property
    def patch(self) -> int:
        """Pixels a token is wide."""
        return super().patch if self.visual is None else self.visual.patch

    @property
    def cell(self) -> int:
        """Cosines are those of pixels."""
        return 1

    def _asked(self, texts: ClassTexts, background: int | None) -> Asked:
        self._check()
        if "head_" not in vars(self):
            raise ConfigError(
                "this Fusioner has learned nothing yet: fit, load or from_checkpoint comes first"
            )
        return Asked(texts, self._vectors(texts), background)

    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        height, width = pixels.shape[2:]
        if height == width == self.patch:  # a single place would be normed to nothing: black beside it
            pixels = F.pad(pixels, (0, self.patch, 0, self.patch))
        patches, grid = self._tokens(pixels)
        named = [i for i in range(len(asked.texts)) if i != asked.background]
        vectors = asked.vectors[named].expand(len(pixels), -1, -1)
        groups = vectors.split(1, dim=1) if self.names == "single" else (vectors,)
        size = (pixels.shape[2], pixels.shape[3])
        found = torch.cat([self.head_(patches, group, grid, size) for group in groups], dim=1)
        logits = found.new_zeros(len(pixels), len(asked.texts), height, width)  # the background's stay at 0
        logits[:, named] = found[:, :, :height, :width]
        return logits

    def _scores(self, blended: Tensor, asked: Asked) -> Tensor:
        return blended.sigmoid()

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        visual = self.visual or Patches(self.clip, self.patch, self.pixels)
        tokens, grid = visual.tokens(pixels)
        return unit(tokens), grid

    def _vectors(self, texts: ClassTexts) -> Tensor:
        if self.text is None:
            return class_features(self.clip, texts)
        return unit(self.text.vectors(texts.names)).to(self.clip.device)

    # --- disk ---

    def _learned(self) -> dict[str, Tensor]:
        return dict(self.head_.state_dict()) if "head_" in vars(self) else {}

    def _facts(self) -> dict[str, Any]:
        if "head_" not in vars(self):
            return {}
        fusion = self.head_.fusion
        return {
            "widths": [fusion.patches[1].in_features, fusion.names[1].in_features],
            "encoders": {name: _kind(getattr(self, name)) for name in ("visual", "text")},
            "trained_on": list(self.trained_on_),
        }

    def _restore_facts(self, about: Mapping[str, Any]) -> None:
        if "widths" not in about:
            return
        for name, kind in about["encoders"].items():
            if _kind(getattr(self, name)) != kind:
                raise CheckpointError(
                    f"was trained with {name}={kind or None}, not {_kind(getattr(self, name)) or None}: give "
                    "load the same encoder"
                )
        self.trained_on_ = tuple(about["trained_on"])
        self.head_ = self._head(*about["widths"]).to(self.clip.device).eval().requires_grad_(False)

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        if "head_" in vars(self):
            _fill(self.head_, tensors, "learned.safetensors")

    @classmethod
    def from_checkpoint(cls: type[T], path: str | PathLike[str], clip: Clip, **settings: Any) -> T:
        """The model of a file in the layout that the published code's test reads; it asks one name at a time.

        Args:
            path: `{"model": state dict}`; only tensors are made of it. Weights of towers in it must be the
                Clip's, where their names tell which they are.
            clip: the Clip that it was trained with.
            settings: of the method, such as `pixels="fusioner"` for a model trained with the published code.

        Raises:
            CheckpointError: if the file is damaged, lacks a weight, has another one, or one of another shape.
        """
        path = Path(path)
        weights = {name.removeprefix("module."): w for name, w in files.read(path).weights.items()}
        towers = {name: w for name, w in weights.items() if name.startswith(("img_model.", "text_model."))}
        _compare(towers, clip, path)
        own = {_renamed(name): w for name, w in weights.items() if name not in towers}
        try:
            width, patch_width = own["fusion.patches.1.weight"].shape
            name_width = own["fusion.names.1.weight"].shape[1]
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: holds no Fusioner ({error})") from error
        found: dict[str, Any] = {
            "width": width,
            "layers": _count(own, "fusion.blocks.{}.ln_1.weight"),
            "heads": max(1, width // 64),
            "doublings": max(0, _count(own, "decoder.convs.{}.weight") - 2),
            "names": "single",
            "present": 1,
            "absent": 0,
        }
        loaded = cls(clip=clip, **{**found, **settings})
        for name, own_width in (("visual", patch_width), ("text", name_width)):
            if getattr(loaded, name) is None and own_width != clip.width:
                raise CheckpointError(
                    f"{path}: was trained on {name} vectors of {own_width} numbers, not of {clip.width}"
                )
        loaded._check()
        loaded.head_ = loaded._head(patch_width, name_width).to(clip.device).eval().requires_grad_(False)
        _fill(loaded.head_, own, path)
        loaded.trained_on_ = ()
        return loaded


def _groups(head: Head) -> list[dict[str, Any]]:
    """Matrices of the fusion decay, e, P and Q among them; biases, norms and the decoder do not."""
    norms = {id(p) for one in head.modules() if isinstance(one, nn.LayerNorm) for p in one.parameters()}
    kept = [
        parameter
        for name, parameter in head.named_parameters()
        if name.startswith("decoder.") or name.endswith(".bias") or id(parameter) in norms
    ]
    others = {id(parameter) for parameter in kept}
    decaying = [parameter for parameter in head.parameters() if id(parameter) not in others]
    return [{"params": decaying}, {"params": kept, "weight_decay": 0.0}]


def _kind(encoder: Any) -> str:
    return "" if encoder is None else type(encoder).__name__


def _renamed(name: str) -> str:
    for theirs, ours in OURS.items():
        name = name.replace(theirs, ours)
    return name


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    number = 0
    while pattern.format(number) in weights:
        number += 1
    return number


def _fill(head: Head, weights: Mapping[str, Tensor], path: Any) -> None:
    """Load weights of any float type, all of them and no others."""
    wanted = head.state_dict()
    for name in [*wanted, *weights]:
        if name not in weights or name not in wanted:
            what = "is missing" if name in wanted else "belongs to no Fusioner"
            raise CheckpointError(f"{path}: {name} {what}")
        if weights[name].shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
            )
    head.load_state_dict(dict(weights))


def _compare(towers: Mapping[str, Tensor], clip: Clip, path: Path) -> None:
    """Refuse frozen towers that are not this Clip's, as far as names and half precision tell."""
    if not towers:
        return
    ours = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
    for name, weight in towers.items():
        bare = name.partition(".")[2].removeprefix("model.")
        known = next((one for one in (bare, f"visual.{bare}") if one in ours), None)
        if known is None:
            continue
        mine = ours[known].cpu().half()
        if mine.shape != weight.shape or not torch.allclose(mine, weight.half(), rtol=2e-3, atol=1e-5):
            raise CheckpointError(
                f"{path}: was trained on another Clip than {clip.config.name!r}: its {name} differs"
            )
