"""AnomalyCLIP: defects in kinds of things never trained on, found with two sentences that name none of them.

Zhou, Pang, Tian, He and Chen, AnomalyCLIP: Object-agnostic Prompt Learning for Zero-shot Anomaly Detection,
ICLR 2024. On one set of pictures with masks of their defects the words of

    V₁ … V_M object.          W₁ … W_M damaged object.

are learned (M = 12), and P_0, P_1, …, which overwrite the first four of them before text blocks 1, 2, …; both
towers are frozen. With t_n and t_a the two sentences' unit vectors:

- f̂ is the class token after the last block, projected, of unit length; a picture's score is
  p_a of p = softmax((f̂·t_n, f̂·t_a) / 0.07);
- ẑ are the patches of a second stream of tokens along value–value attention (`parts.dense.ValuePath`) from
  block s on; S = softmax((ẑ·t_n, ẑ·t_a) / 0.07), of which S_a is stretched to the picture and smoothed;
- L = CE(p, label) + 4·[F(S) + Dice(S_a, m) + Dice(S_n, 1 − m)], m the mask, F focal with γ = 2.

As in the published code, and otherwise than in the paper's text: tokens are overwritten where it speaks of
appending them; "depth 9" are eight lists of them; f̂ skips the last norm (`global_norm`); one layer's map is
used, not four, which in the code were one and the same. What was left open there is settled here: a map comes
back at the picture's own size, and thresholds are calibrated on faultless pictures of whatever is inspected.

Learning sees every picture as a whole, squashed to a square; `methods.dense.scorer` says how large ones are
scored.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints import files
from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import Tokens
from clipworks.engine.precision import computing
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.dense.base import Scores
from clipworks.methods.dense.scorer import AT_ONCE, THRESHOLDS, Scorer, several, square, stacked
from clipworks.parts.context import text_tower
from clipworks.parts.dassl import DasslFile
from clipworks.parts.dense import dual_vectors
from clipworks.parts.descent import descend_rows
from clipworks.parts.frozen import undisturbed
from clipworks.parts.progress import with_bar
from clipworks.parts.prompts import DEVIATION, DeepPrompts, context_texts, vision_tower
from clipworks.parts.schedules import Schedule
from clipworks.parts.segmentation import read_mask

TEMPERATURE = 0.07
LOCAL_WEIGHT = 4.0  # the authors' four equal layers, which were one
IN_MEMORY = 1 << 30  # bytes of places' vectors; more lie in a file, in half precision
SIDES = (("normal", "pos"), ("abnormal", "neg"))  # as we and the authors' files call the sentences

A = TypeVar("A", bound="AnomalyCLIP")


@dataclass(frozen=True, eq=False)
class Views:
    """What the frozen tower says of n pictures.

    Attributes:
        whole: f̂ (n, D), unit length.
        places: ẑ (n, h, w, D), unit length.
        sizes: the pictures' own heights and widths.
        masks: (n, S, S) bool, where the defects are in the square that the tower saw; None without masks.
        faulty: (n,) int64, 1 for a picture with any; None without masks.
    """

    whole: Tensor
    places: Tensor
    sizes: list[tuple[int, int]]
    masks: Tensor | None = None
    faulty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.whole)


class Sentences(nn.Module):
    """What is learned, drawn from N(0, 0.02²).

    Attributes:
        contexts: V (`normal`) and W (`abnormal`), (M, w) each.
        deep: P_k (m, w), which stands before text block k + 1.
        ids, ends: the tokens of both sentences, not saved.

    Args:
        tokens: both sentences; ids from the vocabulary's size on hold the place of learned words.
        lengths: M and m.
        count: how many P_k.
        width: w.
        seed: of the draw.
    """

    ids: Tensor
    ends: Tensor

    def __init__(self, tokens: Tokens, lengths: tuple[int, int], count: int, width: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("ids", tokens.ids, persistent=False)
        self.register_buffer("ends", tokens.ends, persistent=False)
        generator = torch.Generator().manual_seed(seed)

        def drawn(length: int) -> nn.Parameter:
            return nn.Parameter(DEVIATION * torch.randn(length, width, generator=generator))

        self.contexts = nn.ParameterDict({name: drawn(lengths[0]) for name, _ in SIDES})
        self.deep = nn.ParameterList([drawn(lengths[1]) for _ in range(count)])


@dataclass(eq=False, repr=False)
class AnomalyCLIP(Scorer):
    """Scores and maps of defects; `fit` learns what a defect is, on any kind of thing.

    After `fit`, `module_` holds what was learned and `losses_` the mean loss of each epoch; `calibrate` sets
    `threshold_` and `image_threshold_`.

    Args:
        context_length: M, learned words a sentence.
        prompt_length: how many of them are overwritten in deeper blocks.
        prompt_depth: text blocks that see learned words, the first included; None for three quarters of all,
            9 of 12.
        value_from: s, where the value path begins; None for 0.21 of the blocks, 5 of 24; the number of blocks
            for no such path.
        noun, state: the words of the sentences.
        global_norm: send the class token through the tower's last norm.
        lr, epochs, batch_size: of the training.
    """

    context_length: int = 12
    prompt_length: int = 4
    prompt_depth: int | None = None
    value_from: int | None = None
    noun: str = "object"
    state: str = "damaged"
    global_norm: bool = False
    lr: float = 1e-3
    epochs: int = 15
    batch_size: int = 8

    # The authors': constant rate, no decay, no augmentation, the last epoch.
    schedule: ClassVar[Schedule] = Schedule("adam", weight_decay=0.0, decay="constant", betas=(0.5, 0.999))
    smoothing: ClassVar[float] = 4 / 518

    # --- what a user calls ---

    def fit(self: A, images: Iterable[Any], masks: Iterable[Any]) -> A:
        """Learn from pictures and the masks of their defects.

        Args:
            images: pictures, faultless and faulty ones.
            masks: for each a mask of its size, above zero where it is faulty; None for a faultless picture.

        Raises:
            DataError: if there is not a mask for each picture, one has another size than its picture, or all
                pictures are faultless or all are faulty.
            PictureError: for a picture that cannot be read.
        """
        return self.fit_views(self.view(images, masks))

    # --- pictures ---

    def view(self, images: Iterable[Any], masks: Iterable[Any] | None = None) -> Views:
        """See pictures as a whole, once, for `fit_views` and `score_views`; the tower never changes.

        Args:
            images, masks: as `fit` has them.

        Raises:
            DataError: as `fit` for masks.
        """
        pictures = list(several(images))
        given = None if masks is None else list(masks)
        if given is not None and len(given) != len(pictures):
            raise DataError(f"{len(pictures)} pictures and {len(given)} masks: every picture needs one")
        side, count, grid = self.side, len(pictures), self.side // self.patch
        whole, places = torch.empty(count, self.clip.width), _room(count, grid, grid, self.clip.width)
        seen = torch.zeros(0 if given is None else count, side, side, dtype=torch.bool)
        faulty = torch.zeros(len(seen), dtype=torch.int64)
        sizes: list[tuple[int, int]] = []
        starts = range(0, count, AT_ONCE)
        for start in with_bar(starts, len(starts), "looking", self.progress):
            rows = slice(start, start + AT_ONCE)
            arrays = []
            for number, picture in enumerate(pictures[rows], start):
                array, size = self._scaled(picture)
                arrays.append(square(array, side))
                sizes.append(size)
                if given is not None and given[number] is not None:
                    marked = read_mask(given[number], size, where=f"the mask of picture {number}") > 0
                    faulty[number] = int(marked.any())
                    seen[number] = _small(marked, side)
            with undisturbed(self.clip), torch.no_grad(), computing(self._precision, self.clip.device):
                f, z = self._vectors(stacked(arrays).to(self.clip.device))
            whole[rows], places[rows] = f.cpu(), z.to("cpu", places.dtype)
        return Views(whole, places, sizes, *(() if given is None else (seen, faulty)))

    def _vectors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """f̂ (B, D) and ẑ (B, h, w, D) of bytes (B, 3, H, W), unit length, fp32."""
        tower = vision_tower(self.clip)
        start = round(0.21 * len(tower.blocks)) if self.value_from is None else self.value_from
        whole, maps = dual_vectors(tower, pixels, start, global_norm=self.global_norm)
        return unit(whole), unit(maps.movedim(1, -1))

    # --- learning ---

    def fit_views(self: A, views: Views) -> A:
        """Learn from what `view` saw of pictures with masks.

        Raises:
            DataError: without masks, or if all pictures are faultless or all are faulty.
        """
        if views.masks is None or views.faulty is None:
            raise DataError("learning needs the masks of the pictures")
        masks, faulty = views.masks, views.faulty
        if len(faulty.unique()) < 2:
            kind = "faulty" if len(faulty) and bool(faulty[0]) else "faultless"
            raise DataError(
                f"all {len(faulty)} pictures are {kind}: learning needs faultless and faulty ones"
            )
        device = self.clip.device
        for name in ("module_", *THRESHOLDS):
            vars(self).pop(name, None)
        self.module_ = self._prepare().to(device)

        def backward(rows: Tensor, epoch: int) -> Tensor:
            f, z = views.whole[rows].to(device), views.places[rows].to(device)
            m, label = masks[rows].to(device), faulty[rows].to(device)
            loss = objective(self.text_features(), f, z, m, label)
            loss.backward()
            return loss.detach()

        with undisturbed(self.clip):
            self.losses_ = descend_rows(
                len(views),
                [{"params": list(self.module_.parameters())}],
                backward,
                self.schedule,
                lr=self.lr,
                epochs=self.epochs,
                batch_size=self.batch_size,
                seed=self.seed,
                device=device,
                precision=self._precision,
                bar=self.progress,
            )
        self.module_.requires_grad_(False)
        return self

    def _prepare(self) -> nn.Module:
        """The module that is learned, at its start."""
        tower = text_tower(self.clip)
        if not 0 < self.prompt_length <= self.context_length:
            raise ConfigError(
                f"prompt_length must be from 1 to context_length ({self.context_length}), not "
                f"{self.prompt_length}: it overwrites learned words"
            )
        blocks = len(tower.blocks)
        depth = round(0.75 * blocks) if self.prompt_depth is None else self.prompt_depth
        if depth < 1:
            raise ConfigError(f"prompt_depth must be at least 1, not {depth}")
        count = min(depth, blocks) - 1
        lengths = (self.context_length, self.prompt_length)
        return Sentences(self.texts(), lengths, count, tower.width, self.seed)

    def texts(self) -> Tokens:
        """Both sentences, ids (2, L); ids from the vocabulary's size on hold the place of learned words."""
        return context_texts(self.clip, [self.noun, f"{self.state} {self.noun}"], self.context_length, None)

    def text_features(self) -> Tensor:
        """t_n and t_a, (2, D) of unit length, differentiable in what is learned.

        Raises:
            ConfigError: before anything was learned.
        """
        if "module_" not in vars(self):
            raise ConfigError(f"this {type(self).__name__} has learned nothing: fit, load or from_checkpoint")
        learned, tower = cast(Sentences, self.module_), text_tower(self.clip)
        start = int(self.clip.tokenizer.start is not None)  # type: ignore[union-attr]
        contexts = torch.stack([learned.contexts[name] for name, _ in SIDES])
        words = tower.embedding(learned.ids.masked_fill(learned.ids >= tower.embedding.num_embeddings, 0))
        stop = start + self.context_length
        words = torch.cat([words[:, :start], contexts.to(words.dtype), words[:, stop:]], dim=1)
        deep = list(learned.deep)
        # What stands before block 0 is V and W; the hook does not read its first entry.
        hook = DeepPrompts([*deep[:1], *deep], slice(start, start + self.prompt_length))
        mask = tower.mask_for(Tokens(learned.ids, learned.ends))
        return unit(tower.project(tower.run(tower.place(words), mask=mask, around=hook), at=learned.ends))

    # --- scoring ---

    def score_views(self, views: Views) -> Scores:
        """The scores of pictures that `view` saw, as `score` gives them.

        Raises:
            ConfigError: before anything was learned.
        """
        with undisturbed(self.clip), torch.no_grad():
            sentences = self.text_features().cpu()
        seen = (self.side, self.side)
        coarse = (likely(z, sentences) for z in views.places)
        maps = [self._map(one, seen, size) for one, size in zip(coarse, views.sizes, strict=True)]
        return Scores(likely(views.whole, sentences), maps)

    @property
    def _names(self) -> tuple[str, str]:
        return "normal", self.state

    def _ready(self) -> Tensor:
        return self.text_features()

    def _judge(self, pixels: Tensor, ready: Tensor) -> tuple[Tensor, Tensor]:
        f, z = self._vectors(pixels)
        return likely(f, ready), likely(z, ready)

    # --- disk ---

    def _learned(self) -> dict[str, Tensor]:
        return self.module_.state_dict() if "module_" in vars(self) else {}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        module = self._prepare()
        try:
            module.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise CheckpointError(f"what was learned does not fit: {' '.join(str(error).split())}") from error
        self.module_ = module.to(self.clip.device).requires_grad_(False)

    @classmethod
    def from_checkpoint(cls: type[A], path: str | PathLike[str], clip: Clip, **settings: Any) -> A:
        """Read a file of the authors' code, `epoch_15.pth`; they go with ViT-L/14@336 of OpenAI.

        Lengths and depth are the file's; `size` is 518 unless it is given. Of the two folders that were
        released, `9_12_4_multiscale_visa` was trained on MVTec and `9_12_4_multiscale` on VisA.

        Raises:
            CheckpointError: if it holds something else, or was made with other words or another Clip.
        """
        file = _Released(Path(path))
        width = clip.config.text.width
        contexts = {name: file.take(f"ctx_{theirs}", 1, 1, None, width)[0, 0] for name, theirs in SIDES}
        count = file.count("compound_prompts_text.{}")
        deep = [file.take(f"compound_prompts_text.{k}", None, width) for k in range(count)]
        shapes = {
            "context_length": len(contexts["normal"]),
            "prompt_length": len(deep[0]) if deep else 1,
            "prompt_depth": count + 1,
        }
        method = cls(clip, **{"size": 518, **settings, **shapes})
        file.check(method)
        if count >= len(text_tower(clip).blocks):
            raise CheckpointError(f"{path}: has words for {count + 1} text blocks, more than this Clip has")
        tensors = {f"contexts.{name}": value for name, value in contexts.items()}
        # The authors' forward pass rounds these, and only these, to half precision.
        method._restore(tensors | {f"deep.{k}": value.half().float() for k, value in enumerate(deep)})
        return method


# --- the formulas ---


def likely(vectors: Tensor, sentences: Tensor) -> Tensor:
    """p_a of unit vectors (..., D) and sentences (2, D), normal first: (...) fp32 in [0, 1]."""
    return (vectors.float() @ sentences.float().T / TEMPERATURE).softmax(dim=-1)[..., 1]


def objective(sentences: Tensor, f: Tensor, z: Tensor, masks: Tensor, faulty: Tensor) -> Tensor:
    """L: sentences (2, D), f̂ (B, D), ẑ (B, h, w, D), masks (B, H, W) bool, faulty (B,) int64; a scalar."""
    logits = f.float() @ sentences.float().T / TEMPERATURE
    coarse = likely(z, sentences)[:, None]
    found = F.interpolate(coarse, size=masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    m = masks.float()
    local = focal(found, masks) + dice(found, m) + dice(1 - found, 1 - m)
    return F.cross_entropy(logits, faulty) + LOCAL_WEIGHT * local


def focal(found: Tensor, masks: Tensor, gamma: float = 2.0, smooth: float = 1e-5) -> Tensor:
    """F of S_a (B, H, W) and masks of the same shape, bool: the mean of −(1 − q)^γ ln q, a scalar.

    q is the probability of the pixel's own class, moved by label smoothing over two classes.
    """
    q = torch.where(masks, found, 1 - found) * (1 - 2 * smooth) + 2 * smooth
    return -((1 - q).clamp(min=0) ** gamma * q.log()).mean()


def dice(found: Tensor, masks: Tensor) -> Tensor:
    """1 − the mean over pictures of (2ΣSm + 1)/(ΣS + Σm + 1), S and m (B, H, W); a scalar.

    On an empty mask it is 1 − 1/(1 + ΣS), nearly flat: there the focal term does the work.
    """
    both, sums = (found * masks).sum(dim=(1, 2)), found.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return 1 - ((2 * both + 1) / (sums + 1)).mean()


# --- pictures and files ---


def _small(marked: np.ndarray, side: int) -> Tensor:
    """A mask (H, W) bool at the size of the square: bilinear, cut at one half."""
    picture = Image.fromarray(marked.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(picture) > 127)


def _room(*shape: int) -> Tensor:
    """An empty tensor: fp32 in memory, or in half precision in a file that ends with it."""
    if 4 * math.prod(shape) <= IN_MEMORY:
        return torch.empty(shape)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))


class _Released(DasslFile):
    """The tensors of a released file, taken out one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        held = files.read_object(path)
        found = held.get("prompt_learner") if isinstance(held, Mapping) else None
        if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
            raise CheckpointError(f"{path}: holds no prompt_learner, as AnomalyCLIP's files do")
        self.weights = dict(found)

    def check(self, method: AnomalyCLIP) -> None:
        """Compare what belongs to wording and backbone with the method's, and see that nothing is left.

        Raises:
            CheckpointError: for other words, another Clip, or names that belong to no such file.
        """
        config, tokens = method.clip.config, method.texts()
        embedding = text_tower(method.clip).embedding.weight.detach().float().cpu()
        length, stop = config.text.context_length, 1 + method.context_length
        for row, (name, theirs) in enumerate(SIDES):
            padded = F.pad(tokens.ids[row], (0, length - tokens.ids.shape[1]))
            if f"tokenized_prompts_{theirs}" in self:
                ids = self.take(f"tokenized_prompts_{theirs}", 1, 1, length)[0, 0].long()
                fixed = padded < len(embedding)
                if not torch.equal(ids[fixed], padded[fixed]):
                    raise CheckpointError(
                        f"{self.path}: its {name} sentence has other words than {method.state!r} and "
                        f"{method.noun!r} as {config.name!r} reads them"
                    )
            for part, ids in (("prefix", padded[:1]), ("suffix", padded[stop:])):
                known = f"token_{part}_{theirs}"
                if known not in self:
                    continue
                given = self.take(known, 1, 1, len(ids), embedding.shape[1])[0, 0]
                if not torch.allclose(given, embedding[ids], rtol=2e-3, atol=1e-5):
                    raise CheckpointError(
                        f"{self.path}: was trained on another Clip than {config.name!r}: its {known} differs"
                    )
        for left in self.weights:
            # Maps that the authors' code holds and never uses.
            if not left.startswith("compound_prompt_projections."):
                raise CheckpointError(f"{self.path}: {left} belongs to no AnomalyCLIP")
