"""Cross the Gap: modality inversion against CLIP's intra-modal misalignment. Mistretta et al., ICLR 2025.

CLIP was trained to compare pictures with texts, never pictures with pictures. So before two pictures are
compared, the query is turned into the other modality. Nothing is learned but R vectors for each query.

Optimization-based textual inversion (OTI), for a picture with unit feature ψ: the vectors v (R, w_t) stand
for the words £ in "a photo of £ … £", and are sought such that the text tower says what the image tower says:

    v* = argmin_v 1 - cos(φ(v), ψ)         φ(v): the sentence's feature

Optimization-based visual inversion (OVI), for a text with unit feature φ: the vectors u (R, w_v) take the
places of the N patch embeddings, stretched in runs along the raster, place j gets u[⌊j R / N⌋]:

    u* = argmin_u 1 - cos(ψ(u), φ)         ψ(u): the picture's feature

Both start from N(0, 0.02²) and take a fixed number of AdamW steps; the last vectors count. The gallery is
ranked by cos(φ(v*), ψ_g), or cos(ψ(u*), φ_g): only queries are inverted. With c = cos(φ(v*), ψ),

    φ(v*) = c ψ + √(1 - c²) e,   so   score = c (intra-modal score) + √(1 - c²) e·ψ_g

and whatever is gained lies in e, how the other tower deviates: with c → 1 the intra-modal ranking comes back.

Here, unlike in the published code, the loss is summed over the batch and not its mean, and the noise comes
from seed and item: an item's result depends on nothing else (for the numbers of the code at batch B, take
`eps` = 1e-8 B). Under a causal mask what stands before v never changes and is computed once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clipworks.checkpoints.files import read_safetensors
from clipworks.checkpoints.own import write_safetensors
from clipworks.core.attention import Attention, Mask
from clipworks.core.clip import Clip, unit
from clipworks.core.hooks import BlockCall
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower, VisionTower
from clipworks.data.randomness import fold, key_number
from clipworks.encode.bulk import evaluating, tokenize
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.retrieve.base import Ranker
from clipworks.parts.features import fingerprint
from clipworks.parts.progress import with_bar

Direction = Literal["image_to_text", "text_to_image"]
STEPS: dict[Direction, int] = {"image_to_text": 150, "text_to_image": 1000}
NOISE = 0.02
FILLERS = ("x", "y", *"abcdefgh", "the", "red", "dog", "cat", "one", "in")
BETAS = (0.9, 0.999)
Speak = Callable[[Tensor], Tensor]
"""Pseudo-tokens (B, R, w) to features (B, D), not normalized, differentiably."""


@dataclass(eq=False, repr=False)
class ModalityInversion(Ranker):
    """Queries inverted into the other modality, then ranked by cosine.

    Args:
        clip: the model; both towers stay frozen.
        direction: `image_to_text` for features of pictures (OTI), `text_to_image` for those of texts (OVI).
        tokens: R. The paper takes 1 for OTI, and for OVI 1 to 4, the larger the patch grid.
        steps: of AdamW; None for the paper's 150 (OTI) and 1000 (OVI).
        lr, weight_decay, eps: of AdamW.
        template: the sentence of OTI, with one `{}`.
        batch_size: queries inverted at once; changes nothing but speed.
        store: a file that keeps what was inverted, and saves it from being inverted again; an interrupted run
            goes on from it.
        seed: of the noise.
        progress: show a bar; None does so on a terminal.

    Attributes:
        tokens_: (n, R, w) fp32, what the last `transform` ended with.
        cosine_: (n,) fp32, c of each.
        seconds_: what it took for each query that was inverted anew.
    """

    _: KW_ONLY
    direction: Direction = "image_to_text"
    tokens: int = 1
    steps: int | None = None
    lr: float = 0.02
    weight_decay: float = 0.01
    eps: float = 1e-8
    template: str = "a photo of {}"
    batch_size: int = 64
    store: str | PathLike[str] | None = None
    seed: int = 0
    progress: bool | None = None
    tokens_: Tensor | None = field(default=None, init=False)
    cosine_: Tensor | None = field(default=None, init=False)
    seconds_: float = field(default=0.0, init=False)

    def transform(self, features: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """Unit features (n, D) of one modality to unit features (n, D) of the other, fp32.

        Args:
            features: of pictures or of texts, as `direction` has it.
            keys: names of the items, from which their noise is drawn and under which they are stored; by
                default drawn from the features themselves.

        Raises:
            ShapeError: for features of another shape, or not one key for each.
            ConfigError: for settings or a tower that cannot be inverted through.
            CheckpointError: if `store` was made with other settings or another tower.
        """
        targets = self._checked(features, "what is inverted")
        names, noise = self._names(targets, keys)
        speak, width = self._speaker()
        if not len(targets):
            return targets.float()
        kept = _Store(self.store, self._about())
        missing = [row for row, name in enumerate(names) if name not in kept]
        parts = torch.tensor(missing, dtype=torch.int64).split(self.batch_size) if missing else ()
        start = time.monotonic()
        with evaluating(self.clip):
            for rows in with_bar(parts, len(missing), f"inverting ({self.direction})", self.progress):
                start_tokens = self._noise([noise[row] for row in rows.tolist()], width)
                found = self._invert(speak, targets[rows.to(targets.device)], start_tokens)
                kept.add([names[row] for row in rows.tolist()], found)
            self.seconds_ = (time.monotonic() - start) / max(1, len(missing))
            self.tokens_ = kept[names].to(self.clip.device)
            with torch.no_grad():
                pieces = [speak(part) for part in self.tokens_.to(self._dtype).split(self.batch_size)]
        crossed = unit(torch.cat(pieces))
        self.cosine_ = (crossed * unit(targets)).sum(dim=1).float()
        return crossed.float()

    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        return self.transform(queries) @ unit(gallery).float().T

    # --- the inversion ---

    def _invert(self, speak: Speak, targets: Tensor, start: Tensor) -> Tensor:
        """Targets (B, D) and noise (B, R, w) to pseudo-tokens (B, R, w) fp32."""
        targets = unit(targets)
        tokens = start.to(self.clip.device, self._dtype).requires_grad_()
        optimizer = torch.optim.AdamW(
            [tokens], self.lr, betas=BETAS, eps=self.eps, weight_decay=self.weight_decay
        )
        for _ in range(self._steps):
            with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
                features = speak(tokens)
            # Summed, so that no item's step depends on how many others there are.
            loss = (1 - (unit(features) * targets).sum(dim=1)).sum()
            # Asked for by name: the towers' weights get no gradient, and none is computed for them.
            (tokens.grad,) = torch.autograd.grad(loss, [tokens])
            optimizer.step()
        return tokens.detach().float()

    def _noise(self, names: Sequence[str], width: int) -> Tensor:
        """(B, R, w) fp32, each item's own."""
        rows = []
        for name in names:
            generator = torch.Generator().manual_seed(fold(self.seed, key_number(name)) >> 1)
            rows.append(NOISE * torch.randn(self.tokens, width, generator=generator))
        return torch.stack(rows)

    def _speaker(self) -> tuple[Speak, int]:
        """How the other tower is spoken through, and the width of its tokens.

        Raises:
            ConfigError: for settings or a tower that do not allow it.
        """
        if self.tokens < 1 or self.batch_size < 1 or (self.steps is not None and self.steps < 1):
            raise ConfigError(
                f"tokens, steps and batch_size must be at least 1, not {self.tokens}, {self.steps} and"
                f" {self.batch_size}"
            )
        if self.direction == "image_to_text":
            sentence = Sentence(self.clip, self.template, self.tokens)
            return sentence, sentence.tower.width
        if self.direction == "text_to_image":
            if not isinstance(self.clip.image, VisionTower):
                raise ConfigError(
                    "visual inversion replaces patch embeddings, and this image tower"
                    f" ({type(self.clip.image).__name__}) has none: take a vision transformer"
                )
            return Picture(self.clip.image), self.clip.image.width
        raise ConfigError(f"direction {self.direction!r} is none of {', '.join(STEPS)}")

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.clip.scale.dtype == torch.float64 else torch.float32

    def _names(self, targets: Tensor, keys: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Under what each item is stored, which names its feature too, and from what its noise is drawn."""
        features = [row.tobytes().hex() for row in targets.float().cpu().numpy()]
        if keys is None:
            return features, features
        if len(keys) != len(features):
            raise ShapeError(f"{len(keys)} keys were given for {len(features)} features")
        return [f"{key} {row}" for key, row in zip(keys, features, strict=True)], list(keys)

    def _about(self) -> dict[str, object]:
        names = ("direction", "tokens", "lr", "weight_decay", "eps", "template", "seed")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"steps": self._steps, "clip": fingerprint(self.clip)}

    @property
    def _steps(self) -> int:
        return STEPS[self.direction] if self.steps is None else self.steps


class Sentence:
    """Pseudo-words (B, R, w) to the features (B, D) of the sentence in which they stand.

    Args:
        clip: its text tower and tokenizer.
        template: a sentence with one `{}`.
        tokens: R.

    Attributes:
        places: (R,) int64, where they stand.
        end: where the sentence is read.
    """

    def __init__(self, clip: Clip, template: str, tokens: int) -> None:
        if not isinstance(clip.text, TextTower):
            raise ConfigError("textual inversion needs a text tower whose word vectors can be replaced")
        if template.count("{}") != 1:
            raise ConfigError(f"the template {template!r} must have one {{}} for what is inverted")
        self.tower = tower = clip.text
        said, places = _slots(clip, template, tokens)
        self.places = places.to(clip.device)
        self.end = int(said.ends[0])
        self.causal = tower.config.mask == "causal"
        # Nothing behind the end is seen under a causal mask.
        ids = said.ids[:1, : self.end + 1] if self.causal else said.ids[:1]
        whole = Tokens(ids, said.ends[:1]).to(clip.device)
        with torch.no_grad():
            self.content = tower.read(whole)
        self.mask: Mask = tower.mask_for(whole)
        self.cached = int(places[0]) if self.causal else 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        if self.cached:
            with torch.no_grad():
                tower.run(tower.place(self.content[:, : self.cached]), around=self._remember)

    def __call__(self, words: Tensor) -> Tensor:
        """(B, R, w) to (B, D), not normalized."""
        content = self.content[:, self.cached :].expand(len(words), -1, -1)
        content = content.index_copy(1, self.places - self.cached, words.to(content.dtype))
        positions = torch.arange(content.shape[1], device=content.device) + self.cached
        tokens = self.tower.place(content, positions=positions)
        around = self._continue if self.cached else None
        tokens = self.tower.run(tokens, mask=self.mask, around=around)
        return self.tower.project(tokens[:, self.end - self.cached][:, None])

    def _remember(self, i: int, block: BlockCall, tokens: Tensor) -> Tensor:
        """A hook: run the block on the words before the pseudo-words, and keep their keys and values."""

        def attend(attention: Attention, x: Tensor, mask: Mask) -> Tensor:
            q, k, v = attention.qkv(x).chunk(3, dim=-1)
            self.keys.append(k)
            self.values.append(v)
            return attention.out(attention.mix(q, k, v, mask))

        return block(tokens, attend=attend)

    def _continue(self, i: int, block: BlockCall, tokens: Tensor) -> Tensor:
        """A hook: run the block on what follows, which also attends to what was kept."""

        def attend(attention: Attention, x: Tensor, mask: Mask) -> Tensor:
            q, k, v = attention.qkv(x).chunk(3, dim=-1)
            k = torch.cat([self.keys[i].expand(len(x), -1, -1).to(k.dtype), k], dim=1)
            v = torch.cat([self.values[i].expand(len(x), -1, -1).to(v.dtype), v], dim=1)
            return attention.out(attention.mix(q, k, v, mask))

        return block(tokens, attend=attend)


def _slots(clip: Clip, template: str, tokens: int) -> tuple[Tokens, Tensor]:
    """The tokens of the sentence with other words in the places of the pseudo-words, and those places (R,).

    They are where two sentences differ that are equal but for R times one word or another, each a token in
    this tokenizer; words that are cut up would put them further back.

    Raises:
        ConfigError: if they do not fit.
    """
    said = tokenize(clip, [template.replace("{}", " ".join([word] * tokens)) for word in FILLERS])
    found: tuple[int, int, Tensor] | None = None
    for row, other in combinations((said.ends == said.ends.min()).nonzero()[:, 0].tolist(), 2):
        places = (said.ids[row] != said.ids[other]).nonzero()[:, 0]
        if len(places) == tokens and (found is None or int(places[-1]) < found[0]):
            found = int(places[-1]), row, places
    if found is None:
        raise ConfigError(
            f"{tokens} words in {template!r} do not fit the context, or this tokenizer cuts them up"
        )
    return said[torch.tensor([found[1]])], found[2]


class Picture:
    """Pseudo-patches (B, R, w) to the features (B, D) of the picture that they fill."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        self.side = tower.config.grid

    def __call__(self, patches: Tensor) -> Tensor:
        """(B, R, w) to (B, D), not normalized.

        Raises:
            ConfigError: for more pseudo-patches than the picture has places.
        """
        count, places = patches.shape[1], self.side**2
        if count > places:
            raise ConfigError(f"{count} pseudo-patches do not fit a picture of {places}")
        runs = torch.arange(places, device=patches.device) * count // places
        content = patches[:, runs].unflatten(1, (self.side, self.side))
        dtype = self.tower.positions.dtype
        return self.tower.project(self.tower.run(self.tower.place(content.to(dtype))))


class _Store:
    """Pseudo-tokens by name, in memory and, if there is a path, in a file that is whole or not there."""

    def __init__(self, path: str | PathLike[str] | None, about: Mapping[str, object]) -> None:
        self._path = None if path is None else Path(path)
        self._about = json.dumps(about, sort_keys=True)
        self._rows: dict[int, Tensor] = {}
        if self._path is not None and self._path.is_file():
            tensors = read_safetensors(self._path)
            try:
                made = bytes(tensors["about"].tolist()).decode()
                rows = zip(tensors["keys"].tolist(), tensors["tokens"], strict=True)
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"{path}: not a file of pseudo-tokens") from error
            if made != self._about:
                raise CheckpointError(f"{path}: made with {made}, not with {self._about}; name another file")
            self._rows = dict(rows)

    def __contains__(self, name: str) -> bool:
        return _signed(name) in self._rows

    def __getitem__(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self._rows[_signed(name)] for name in names])

    def add(self, names: Sequence[str], tokens: Tensor) -> None:
        self._rows.update(zip(map(_signed, names), tokens.cpu(), strict=True))
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {
                "keys": torch.tensor(list(self._rows)),
                "tokens": torch.stack(list(self._rows.values())),
                "about": torch.tensor(list(self._about.encode()), dtype=torch.uint8),
            }
            write_safetensors(tensors, self._path, "clipworks")


def _signed(name: str) -> int:
    """63 bits of a name, as a tensor can hold them."""
    return key_number(name) >> 1
