"""DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting. Rao et al., CVPR 2022.

A segmenter for a fixed list of K classes, trained on masks, that CLIP's language half helps. The image tower
gives four maps x₁ … x₄, a vector ḡ of the picture and vectors z of its places, all tokens projected; the text
tower gives t (K, D), not normalized, for the sentences

    [start] p₁ … p_M [name] [end],      p learned, shared by all classes, from N(0, 1) cut at ±2.

The text looks at the picture ("post-model prompting"): a small decoder D, self-attention among the classes
and cross-attention to the memory [ḡ; z], refines it, and every place is compared with what comes out,

    t̃ = t + γ ⊙ D(t, [ḡ; z]),   γ from 1e-4,        s = ẑᵀ · t̃ / ‖t̃‖   (B, K, h, w).

The score map s goes to the decoder as K more channels of the map that has z's size, and is supervised itself:

    L = CE(head(pyramid(x₁, …, [x_j; s], …))) + 0.4 · CE(s / τ),   τ = 0.07,

both at the labels' size; pixels without a class count in the mean, as 0. The text tower is frozen but carries
gradient to p; the image tower is trained at a tenth of the learning rate. Afterwards t is kept and no text
tower is needed. The head is a Semantic FPN (`parts/pyramid`).

A vision transformer's four maps are its tokens after a third, half, two thirds and all of its blocks, scaled
to strides 4, 8, 16 and 32 (for a patch of 16 or 8). A ResNet's are its stages, and [ḡ; z] its attention pool
read at every place.

Deviations. The text tower's rate is exactly zero; theirs rises to 1e-6 by its schedule's floor. The floor of
the image tower's rate is a tenth of the head's. A remainder of an odd grid is pooled by itself, theirs is
dropped. Names have any length. With `train_tower=False` the tower stays as it is and `views` crops of each
picture are encoded once: fast, and by the authors' account much worse. Windows are blended at the head's
stride as logits, and probabilities are stretched from there to the picture. Stochastic depth is left out, and
so is pre-model prompting, which their code does not have either; boxes are out of scope.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints import files, layouts, rules
from clipworks.checkpoints.rules import Rule, batch_norm, linear, rule
from clipworks.core.clip import Clip, unit
from clipworks.core.hooks import Tap
from clipworks.core.resnet import ModifiedResNet
from clipworks.core.towers import VisionTower, resize_positions
from clipworks.data.captions import ClassTexts
from clipworks.engine.precision import computing
from clipworks.engine.randomness import own_randomness
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.dense.base import Asked, Segmenter
from clipworks.parts.context import spoken, text_tower
from clipworks.parts.crops import MaskedCrop, recolored
from clipworks.parts.dense import DenseTower, as_map
from clipworks.parts.descent import descend_rows
from clipworks.parts.frozen import undisturbed
from clipworks.parts.prompts import context_texts
from clipworks.parts.pyramid import Pyramid, PyramidHead
from clipworks.parts.schedules import Schedule, steps_of_epoch
from clipworks.parts.segmentation import read_mask
from clipworks.parts.text_bank import TextBank

D = TypeVar("D", bound="DenseCLIP")
IGNORED = 255
HEADS = 4  # of the context decoder
SHARES = (1 / 3, 1 / 2, 2 / 3, 1)  # of the blocks, after which a map is taken
WARMUP, FLOOR, WEIGHT_DECAY = 1500 / 80_000, 1e-6, 1e-4
TOWER_RATE = 0.1  # of the learning rate


@dataclass(frozen=True, eq=False)
class Seen:
    """What the image tower gives: `maps` x₁ … x₄, ḡ (B, D) as `whole`, and z (B, D, h, w) as `places`."""

    maps: tuple[Tensor, ...]
    whole: Tensor
    places: Tensor

    def select(self, rows: Tensor, device: torch.device) -> Seen:
        """The pictures of rows (b,), on a device."""
        first, whole, places = (x[rows].to(device) for x in (self.maps[0], self.whole, self.places))
        return Seen((first, *(x[rows].to(device) for x in self.maps[1:])), whole, places)

    @classmethod
    def of(cls, parts: Sequence[Seen]) -> Seen:
        """Several batches as one, on the CPU."""
        maps = zip(*(part.maps for part in parts), strict=True)
        return cls(
            tuple(torch.cat([x.cpu() for x in level]) for level in maps),
            torch.cat([part.whole.cpu() for part in parts]),
            torch.cat([part.places.cpu() for part in parts]),
        )


def look(tower: DenseTower, pixels: Tensor) -> Seen:
    """Pictures (B, 3, H, W), bytes or floats in [0, 1], through an image tower."""
    content = tower.read(pixels)
    if isinstance(tower, ModifiedResNet):
        tap = Tap()
        last = tower.run(tower.place(content), around=tap)
        cells = last.flatten(2).mT
        positions = resize_positions(
            tower.positions, last.shape[2:], 1, interpolation="bilinear", antialias=False
        )
        vectors = tower.pool(torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1) + positions)
        maps = tuple(tap[i] for i in range(len(tower.blocks)))
        return Seen(maps, vectors[:, 0], as_map(vectors[:, 1:], last.shape[2:]))
    grid, leading = content.shape[1:3], int(tower.config.class_token)
    depth = len(tower.blocks)
    after = [max(0, round(share * depth) - 1) for share in SHARES]
    tap = Tap(*after)
    positions = resize_positions(tower.positions, grid, leading, interpolation="bilinear", antialias=False)
    tokens = tower.run(tower.place(content, positions=positions), around=tap)
    vectors = tower.project(tokens, at="all")
    whole = vectors[:, 0] if tower.config.pooling == "class" else tower.project(tokens)
    maps = tuple(as_map(tap[i][:, leading:], grid) for i in after)
    return Seen(maps, whole, as_map(vectors[:, leading:], grid))


class CrossAttention(nn.Module):
    """Attention of queries (B, K, w) to a memory (B, N, w); q, k and v without bias."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, K, w)."""
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, x in ((self.q, queries), (self.k, memory), (self.v, memory))
        )
        mixed = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and an MLP, each `x + f(norm(x))`; the memory is not normed again."""

    def __init__(self, width: int):
        super().__init__()
        self.self_attention, self.cross_attention = CrossAttention(width), CrossAttention(width)
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, K, w), memory (B, N, w) to (B, K, w)."""
        normed = self.norm_1(x)
        x = x + self.self_attention(normed, normed)
        x = x + self.cross_attention(self.norm_2(x), memory)
        return x + self.mlp(self.norm_3(x))


class ContextDecoder(nn.Module):
    """What the classes' vectors become by looking at a picture: Δ.

    Args:
        vector_width: D.
        width: of the decoder.
        layers: how many.
    """

    def __init__(self, vector_width: int, width: int, layers: int):
        super().__init__()
        self.memory = nn.Sequential(
            nn.LayerNorm(vector_width), nn.Linear(vector_width, width), nn.LayerNorm(width)
        )
        self.query = nn.Sequential(nn.LayerNorm(vector_width), nn.Linear(vector_width, width))
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vector_width))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, vectors: Tensor, memory: Tensor) -> Tensor:
        """t (K, D) and [ḡ; z] (B, 1 + h w, D) to Δ (B, K, D)."""
        seen = self.memory(memory)
        x = self.query(vectors).expand(len(memory), -1, -1)
        for layer in self.layers:
            x = layer(x, seen)
        return self.out(x)


class Rescale(nn.Module):
    """Four maps of a vision transformer at one size to maps at falling sizes.

    Args:
        width: of the tokens.
        up: how many times the patch's grid the first map is, 4 or 2.
    """

    def __init__(self, width: int, up: int):
        super().__init__()
        twice = (nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3))
        if up == 4:
            first: list[nn.Module] = [next(twice), nn.BatchNorm2d(width), nn.GELU(), next(twice)]
            rest: list[list[nn.Module]] = [[next(twice)], [], [_half(2)]]
        else:
            first, rest = [next(twice)], [[], [_half(2)], [_half(4)]]
        self.levels = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, width), *layers) for layers in (first, *rest)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, w, h, w') each, largest first."""
        # torch's GroupNorm crashes in the backward pass on channels-last maps that need no gradient.
        return [level(x.contiguous()) for level, x in zip(self.levels, maps, strict=True)]


def _half(by: int) -> nn.Module:
    return nn.MaxPool2d(by, ceil_mode=True)


class Network(nn.Module):
    """All that is learned besides the image tower; with `tower` its own copy of that.

    Args:
        tower: the Clip's.
        context: M and the width of the text tower's words.
        classes: K.
        decoder, layers, head: widths and depth, as the settings name them.
        trained: whether a copy of the tower belongs to it.
    """

    vectors: Tensor

    def __init__(
        self,
        tower: DenseTower,
        context: tuple[int, int],
        classes: int,
        decoder: int,
        layers: int,
        head: int,
        trained: bool,
    ):
        super().__init__()
        self.tower = copy.deepcopy(tower).requires_grad_(True) if trained else None
        self.contexts = nn.Parameter(torch.empty(context))
        nn.init.trunc_normal_(self.contexts, std=1.0, a=-2.0, b=2.0)
        self.gamma = nn.Parameter(torch.full((tower.out_width,), 1e-4))
        self.decoder = ContextDecoder(tower.out_width, decoder, layers)
        if isinstance(tower, ModifiedResNet):
            self.rescale: Rescale | None = None
            channels = [tower.width >> step for step in (3, 2, 1, 0)]
        else:
            self.rescale, channels = Rescale(tower.width, up_of(tower)), [tower.width] * 4
        self.level = level_of(tower)
        channels[self.level] += classes
        self.pyramid = Pyramid(channels, head)
        self.head = PyramidHead(head, classes)
        # t, of the trained classes, as it is after the fit.
        self.register_buffer("vectors", torch.zeros(classes, tower.out_width))

    def refined(self, seen: Seen, vectors: Tensor) -> Tensor:
        """t̃ (B, K, D) of t (K, D)."""
        memory = torch.cat([seen.whole[:, None], seen.places.flatten(2).mT], dim=1)
        return vectors + self.gamma * self.decoder(vectors, memory)

    def score_map(self, seen: Seen, vectors: Tensor) -> Tensor:
        """s (B, K, h, w) fp32 in [-1, 1]."""
        refined = self.refined(seen, vectors)
        with torch.autocast(refined.device.type, enabled=False):
            places = F.normalize(seen.places.float(), dim=1)
            return torch.einsum("bdhw,bkd->bkhw", places, unit(refined))

    def logits(self, seen: Seen, score_map: Tensor) -> Tensor:
        """The head's logits (B, K, h₁, w₁)."""
        maps = list(seen.maps) if self.rescale is None else self.rescale(seen.maps)
        maps[self.level] = torch.cat([maps[self.level], score_map.to(maps[self.level].dtype)], dim=1)
        return self.head(self.pyramid(maps))


def up_of(tower: VisionTower) -> int:
    """How many times the patches' grid the first map is.

    Raises:
        ConfigError: for a patch of an odd number of pixels.
    """
    patch = tower.config.patch_size
    if patch % 2:
        raise ConfigError(f"the maps of patches of {patch} pixels cannot be doubled to whole pixels")
    return 4 if patch >= 16 and patch % 4 == 0 else 2


def level_of(tower: DenseTower) -> int:
    """Which of the four maps has the size of z."""
    return 3 if isinstance(tower, ModifiedResNet) else {4: 2, 2: 1}[up_of(tower)]


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K, h, w), stretched to the labels' size, in fp32.

    Args:
        logits: of any size.
        labels: (B, H, W) int64; `IGNORED` is no class. Such pixels add nothing and count in the mean.
    """
    with torch.autocast(logits.device.type, enabled=False):
        stretched = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear")
        total = F.cross_entropy(stretched, labels, ignore_index=IGNORED, reduction="sum")
        return total / labels.numel()


@dataclass(eq=False, repr=False)
class DenseCLIP(Segmenter):
    """A trained segmenter for K classes; other labels are answered from the score map.

    Args:
        class_names: K names, in the order of the masks' numbers.
        context_length: M, learned vectors before a name.
        decoder_width, decoder_layers: of the context decoder.
        head_width: of pyramid and head.
        train_tower: fine-tune a copy of the image tower; without, `views` crops of each picture are encoded
            once, which keeps 4 w + D numbers a place of each crop in memory.
        crop: side of the training crops in pixels; None for the window's.
        scale: range by which pictures are scaled, beside `size`, before they are cropped.
        views: crops of each picture with `train_tower=False`.
        steps: of training, rounded up to whole epochs.
        batch_size, lr: as the paper has them.
        score_weight, temperature: of the score map's loss, 0.4, and τ.
        ignore: the number in masks that is no class, or None.
    """

    class_names: Sequence[str] | ClassTexts = ()
    _: KW_ONLY
    context_length: int = 8
    decoder_width: int = 256
    decoder_layers: int = 3
    head_width: int = 256
    train_tower: bool = True
    crop: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    views: int = 4
    steps: int = 80_000
    batch_size: int = 32
    lr: float = 1e-4
    score_weight: float = 0.4
    temperature: float = 0.07
    ignore: int | None = IGNORED

    # --- fitting ---

    def fit(self: D, images: Sequence[Any], masks: Sequence[Any]) -> D:
        """Learn from pictures with masks.

        Args:
            images: n pictures.
            masks: n label maps as `read_mask` takes them, of the pictures' sizes; numbers count
                `class_names`.

        Raises:
            DataError: for a mask of another size, a number that is no class, or no pictures.
            ConfigError: for settings that cannot be.
        """
        pixels, labels = self._read(images, masks)
        device = self.clip.device
        with undisturbed(self.clip), own_randomness(self.seed):
            network = self._network(len(self._names()[0])).to(device)
            bank = self._bank(self._names()[0])
            cached = None if self.train_tower else self._cached(pixels, labels)
            network.train()

            def backward(rows: Tensor, epoch: int) -> Tensor:
                if cached is None:
                    crops, truth = self._crops(pixels, labels, rows, epoch)
                    seen = look(network.tower, crops.to(device))  # type: ignore[arg-type]
                else:
                    places = rows * self.views + epoch % self.views
                    seen, truth = cached[0].select(places, device), cached[1][places]
                loss = self._loss(network, seen, bank(network.contexts), truth.to(device))
                loss.backward()
                return loss.detach()

            schedule = Schedule(
                "adamw", WEIGHT_DECAY, decay="power", floor=FLOOR, warmup_share=WARMUP, drop_last=True
            )
            an_epoch = steps_of_epoch(len(pixels), self.batch_size, True)
            self.losses_ = descend_rows(
                len(pixels),
                self._groups(network),
                backward,
                schedule,
                lr=self.lr,
                epochs=-(-self.steps // an_epoch),
                batch_size=self.batch_size,
                seed=self.seed,
                device=device,
                precision=self._precision,
                words="fitting DenseCLIP",
                bar=self.progress,
            )
            with torch.no_grad():
                network.vectors.copy_(bank(network.contexts))
        self.module_ = network.eval().requires_grad_(False)
        return self

    def _loss(self, network: Network, seen: Seen, vectors: Tensor, labels: Tensor) -> Tensor:
        scores = network.score_map(seen, vectors)
        loss = pixel_loss(network.logits(seen, scores), labels)
        return loss + self.score_weight * pixel_loss(scores / self.temperature, labels)

    def _groups(self, network: Network) -> list[dict[str, Any]]:
        """The tower at a tenth of the rate; no decay on the norms of the decoder's layers alone."""
        tower, norms, others = list[Tensor](), list[Tensor](), list[Tensor]()
        for name, parameter in network.named_parameters():
            if name.startswith("tower."):
                tower.append(parameter)
            else:
                (norms if ".norm_" in name else others).append(parameter)
        groups: list[dict[str, Any]] = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
        return [*groups, {"params": tower, "lr": TOWER_RATE * self.lr}] if tower else groups

    def _read(self, images: Sequence[Any], masks: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Pictures as bytes at their looked-at size, and their labels there."""
        names = self._names()[0]
        if not len(images) or len(images) != len(masks):
            raise DataError(
                f"{len(images)} pictures and {len(masks)} masks: there must be one mask a picture"
            )
        pixels, labels = [], []
        for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
            array, size = self._scaled(image)
            label = torch.from_numpy(read_mask(mask, size, where=f"mask {number}"))
            counted = label[label != self.ignore] if self.ignore is not None else label.flatten()
            if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < len(names):
                raise DataError(
                    f"mask {number}: labels run from {int(counted.min())} to {int(counted.max())}, "
                    f"not from 0 to {len(names) - 1}"
                )
            if self.ignore is not None:
                label = label.masked_fill(label == self.ignore, IGNORED)
            rows, columns = (
                ((torch.arange(new) + 0.5) * old / new).long()
                for new, old in zip(array.shape[:2], size, strict=True)
            )
            pixels.append(torch.from_numpy(array.transpose(2, 0, 1).copy()))
            labels.append(label[rows][:, columns].to(torch.int16))
        return pixels, labels

    def _crops(
        self, pixels: Sequence[Tensor], labels: Sequence[Tensor], rows: Tensor, view: int
    ) -> tuple[Tensor, Tensor]:
        """One view of some pictures: bytes (b, 3, n, n) and labels (b, n, n) int64."""
        side = max(self.patch, (self._window if self.crop is None else self.crop) // self.patch * self.patch)
        crop = MaskedCrop(side, scale=self.scale, largest_share=0.75, ignore=IGNORED)
        found, truth = [], []
        for row in rows.tolist():
            short = min(labels[row].shape)
            picture, label = replace(crop, short=short)(
                pixels[row], labels[row], seed=self.seed, index=row, view=view
            )
            found.append(recolored(picture, seed=self.seed, index=row, view=view))
            truth.append(label.long())
        return torch.stack(found), torch.stack(truth)

    def _cached(self, pixels: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Seen, Tensor]:
        """All views of all pictures, encoded; row i of view v is at i · views + v."""
        if self.views < 1:
            raise ConfigError(f"views must be at least 1, not {self.views}")
        device, parts, truths = self.clip.device, [], []
        for row in range(len(pixels)):
            views = [self._crops(pixels, labels, torch.tensor([row]), view) for view in range(self.views)]
            with torch.no_grad(), computing(self._precision, device):
                seen = look(self.tower, torch.cat([crop for crop, _ in views]).to(device))
            parts.append(seen)
            truths += [truth for _, truth in views]
        return Seen.of(parts), torch.cat(truths)

    # --- what it is made of ---

    def _names(self) -> tuple[list[str], ClassTexts]:
        """The trained classes, checked."""
        texts, _ = self._texts(self.class_names or [], None)
        return list(texts.names), texts

    def _network(self, classes: int) -> Network:
        widths = (self.decoder_width, self.head_width)
        if min(*widths, self.decoder_layers) < 1 or self.decoder_width % HEADS or self.context_length < 0:
            raise ConfigError(
                f"decoder_width must be a positive multiple of {HEADS}, decoder_layers and head_width at "
                f"least 1 and context_length at least 0, not {self.decoder_width}, {self.decoder_layers}, "
                f"{self.head_width} and {self.context_length}"
            )
        return Network(
            self.tower,
            (self.context_length, text_tower(self.clip).width),
            classes,
            self.decoder_width,
            self.decoder_layers,
            self.head_width,
            self.train_tower,
        )

    def _bank(self, names: Sequence[str]) -> TextBank:
        texts = context_texts(self.clip, spoken(names), self.context_length, None, stop="")
        return TextBank(self.clip.text, texts)

    # --- segmenting ---

    @property
    def cell(self) -> int:
        """The stride of the head's logits."""
        tower = self.tower
        return 4 if isinstance(tower, ModifiedResNet) else self.patch // up_of(tower)

    def score_maps(self, pixels: Tensor, labels: Sequence[str] | None = None) -> Tensor:
        """s of pictures of one size.

        Args:
            pixels: (B, 3, H, W), bytes or floats in [0, 1], sides multiples of the patch.
            labels: K names; None for the trained ones.

        Returns:
            (B, K, h, w) fp32 cosines, a cell a patch.
        """
        asked = self.ask(labels)
        with undisturbed(self.clip), torch.no_grad():
            seen = look(self._fitted_tower, pixels.to(self.clip.device))
            return self._fitted.score_map(seen, asked.vectors)

    def _own_labels(self) -> Sequence[str] | ClassTexts:
        return self.class_names

    def _asked(self, texts: ClassTexts, background: int | None) -> Asked:
        network, own = self._fitted, self._names()[0]
        names = list(texts.names)
        if set(names) <= set(own):
            rows = torch.tensor([own.index(name) for name in names], device=network.vectors.device)
            return Asked(texts, network.vectors[rows], background)
        # The places were trained to be told apart by the trained names; others are read all the same.
        return Asked(texts, self._bank(names)(network.contexts), background, source="score map")

    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        network, own = self._fitted, self._names()[0]
        seen = look(self._fitted_tower, pixels)
        if asked.source:
            scores = network.score_map(seen, asked.vectors) / self.temperature
            size = [side // self.cell for side in pixels.shape[2:]]
            return F.interpolate(scores, size=size, mode="bilinear")
        logits = network.logits(seen, network.score_map(seen, network.vectors))
        return logits[:, [own.index(name) for name in asked.texts.names]]

    def _scores(self, blended: Tensor, asked: Asked) -> Tensor:
        return blended.softmax(dim=0)

    @property
    def _fitted(self) -> Network:
        if not hasattr(self, "module_"):
            raise ConfigError("this DenseCLIP has not been fitted: call fit, load or from_checkpoint first")
        return self.module_

    @property
    def _fitted_tower(self) -> DenseTower:
        own = self._fitted.tower
        return self.tower if own is None else own

    # --- disk ---

    def _learned(self) -> dict[str, Tensor]:
        return dict(self._fitted.state_dict())

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        with own_randomness(self.seed):
            network = self._network(len(self._names()[0]))
        if network.tower is not None and "tower.positions" in tensors:
            _fit_positions(network.tower, tensors["tower.positions"])
        try:
            network.load_state_dict(dict(tensors))
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise CheckpointError(f"not what a DenseCLIP has learned ({said})") from error
        self.module_ = network.to(self.clip.device).eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(
        cls: type[D],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str] | None = None,
    ) -> D:
        """A segmentation file of the authors' code, set up to look at pictures as their test does.

        Their text tower, whose first positions were trained a little, gives t and is dropped. Other labels
        are read by the Clip's own.

        Args:
            path: the file; only tensors and plain values are made of it.
            clip: the Clip that it was trained from; its weights are not used but for other labels.
            class_names: None for those in the file.

        Raises:
            CheckpointError: if the file is damaged, holds other weights, or names no classes.
        """
        path = Path(path)
        held = files.read_object(path)
        weights = held.get("state_dict") if isinstance(held, Mapping) else None
        if not isinstance(weights, Mapping) or not all(isinstance(x, Tensor) for x in weights.values()):
            raise CheckpointError(f"{path}: holds no weights under state_dict")
        if class_names is None:
            meta = held.get("meta")
            class_names = meta.get("CLASSES") if isinstance(meta, Mapping) else None
            if class_names is None:
                raise CheckpointError(f"{path}: names no classes: give class_names")
        named = dict(weights)
        positions = "backbone.positional_embedding"
        if isinstance(clip.image, ModifiedResNet):
            positions = "backbone.attnpool.positional_embedding"
        asked = {
            "positions": positions,
            "text": "text_encoder.positional_embedding",
            "contexts": "contexts",
            "query": "context_decoder.text_proj.1.weight",
            "lateral": "neck.lateral_convs.0.conv.weight",
        }
        for name in asked.values():
            if name not in named:
                raise CheckpointError(f"{path}: {name} is missing: no DenseCLIP segmenter for this Clip")
        layer = "context_decoder.decoder.{}.norm1.weight"
        found = cls(
            clip,
            [str(name) for name in class_names],
            context_length=named["contexts"].shape[-2],
            decoder_width=len(named[asked["query"]]),
            decoder_layers=sum(layer.format(i) in named for i in range(len(named))),
            head_width=len(named[asked["lateral"]]),
            overlap=1 / 3,
            blend="uniform",
        )
        side = round((len(named[positions]) - 1) ** 0.5) * found.patch
        found.set_params(size=side, window=side)
        with own_randomness(0):
            network = found._network(len(found._names()[0]))
        text = copy.deepcopy(text_tower(clip))
        _fit_positions(network.tower, named[positions])
        _fit_positions(text, named[asked["text"]])
        words = {name: x for name, x in named.items() if name.startswith("text_encoder.")}
        others = {name: x for name, x in named.items() if name not in words}
        spoken_by = rules.read(_tower_rules(clip, "text"), words, _shapes(text), str(path))
        text.load_state_dict({name: x.float() for name, x in spoken_by.items()})
        learned = rules.read(_released_rules(clip, network), others, _shapes(network), str(path))
        learned = {name: x.float() if x.is_floating_point() else x for name, x in learned.items()}
        if "tower.class_token" in learned:
            # Their forward pass adds it once with the patches and once with the positions.
            learned["tower.class_token"] = 2 * learned["tower.class_token"]
        with undisturbed(clip), torch.no_grad():
            texts = context_texts(clip, spoken(found._names()[0]), found.context_length, None, stop="")
            bank = TextBank(text, texts)
            learned["vectors"] = bank(learned["contexts"].to(clip.device))
        found._restore(learned)
        return found


def _fit_positions(tower: Any, table: Tensor) -> None:
    """Room for a position table of another length."""
    if table.ndim == 2:
        tower.positions = nn.Parameter(torch.zeros(len(table), tower.width, device=tower.positions.device))


def _shapes(module: nn.Module) -> dict[str, Sequence[int]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _tower_rules(clip: Clip, part: str) -> list[Rule]:
    """Where a tower's weights stand in a released file: OpenAI's names under a prefix of their own."""
    ours, theirs, here, there = {
        "image": ("image.", "visual.", "tower.", "backbone."),
        "text": ("text.", "", "", "text_encoder."),
    }[part]
    return [
        replace(
            one,
            ours=here + one.ours.removeprefix(ours),
            theirs=tuple(there + name.removeprefix(theirs) for name in one.theirs),
        )
        for one in layouts.rules("openai", clip.config)
        if one.ours.startswith(ours)
    ]


def _released_rules(clip: Clip, network: Network) -> list[Rule]:
    """Where the weights of a `Network` stand in a released file."""
    found = [rule("contexts", change="leading", ones=1), rule("gamma"), *_tower_rules(clip, "image")]
    for ours, theirs, numbers in (("memory", "memory", 3), ("query", "text", 2), ("out", "out", 2)):
        for i in range(numbers):
            found += linear(f"decoder.{ours}.{i}", f"context_decoder.{theirs}_proj.{i}")
    for i in range(len(network.decoder.layers)):
        ours, theirs = f"decoder.layers.{i}", f"context_decoder.decoder.{i}"
        for kind in ("self", "cross"):
            attention = f"{ours}.{kind}_attention"
            found += [
                rule(f"{attention}.{part}.weight", f"{theirs}.{kind}_attn.{part}_proj.weight")
                for part in "qkv"
            ]
            found += linear(f"{attention}.out", f"{theirs}.{kind}_attn.proj")
        for n in (1, 2, 3):
            found += linear(f"{ours}.norm_{n}", f"{theirs}.norm{n}")
        for n in (0, 3):
            found += linear(f"{ours}.mlp.{n}", f"{theirs}.mlp.{n}")
    for i, level in enumerate([] if network.rescale is None else network.rescale.levels):
        for j, layer in enumerate(level.children()):
            if isinstance(layer, nn.BatchNorm2d):
                found += batch_norm(f"rescale.levels.{i}.{j}", f"backbone.fpn{i + 1}.{j}")
            elif isinstance(layer, (nn.GroupNorm, nn.ConvTranspose2d)):
                # A level that is a norm and nothing else is not numbered.
                place = f"backbone.fpn{i + 1}" + (f".{j}" if len(level) > 1 else "")  # type: ignore[arg-type]
                found += linear(f"rescale.levels.{i}.{j}", place)
    for i in range(4):
        found += linear(f"pyramid.laterals.{i}", f"neck.lateral_convs.{i}.conv")
        found += linear(f"pyramid.outputs.{i}", f"neck.fpn_convs.{i}.conv")
        for j in range(max(1, i)):
            # Between their convolutions stand steps of twice the size.
            step = f"decode_head.scale_heads.{i}.{2 * j}"
            found.append(rule(f"head.branches.{i}.{j}.0.weight", f"{step}.conv.weight"))
            found += batch_norm(f"head.branches.{i}.{j}.1", f"{step}.bn")
    return [*found, *linear("head.classify", "decode_head.conv_seg")]
