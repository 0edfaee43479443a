"""Engines: what computes the vectors of many pictures or texts, chosen by one argument.

    torch               the tower as it is; texts packed without padding (see `packed`)
    compile             machine code made from the tower, its weights frozen in
    onnxruntime         ONNX Runtime (extra `export`)
    openvino            OpenVINO (extra `export`)
    onnxruntime-int8    ONNX Runtime in 8 bits: not exact, and its loss is measured and said
    auto                the fastest of the exact ones, timed once for a model and a machine

Before an engine is used, its answers on a probe are compared with the tower's; one that differs by more than
1e-4 is refused. What engines have made stays in the cache (see `places`). All but torch compute on the CPU in
fp32, and take pictures of the tower's own size.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.checkpoints import onnx
from clipworks.checkpoints.onnx import TOLERANCE, Kind
from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower
from clipworks.encode.bulk import evaluating
from clipworks.encode.engines import places, timing
from clipworks.encode.engines.backends import BACKENDS, Run
from clipworks.encode.engines.loss import Loss, known_or_measured
from clipworks.encode.engines.timing import Timing
from clipworks.encode.packed import share_computed, text_features
from clipworks.errors import ClipworksError, ConfigError, ShapeError, nearest

Name = Literal["torch", "compile", "onnxruntime", "openvino", "onnxruntime-int8", "auto"]
NAMES: tuple[str, ...] = get_args(Name)
ROUNDED = ("onnxruntime-int8",)
EXACT = ("torch", "compile", "onnxruntime", "openvino")
SLACK, FEWEST = 1.25, 128  # of the texts computed together: longest to shortest, and positions at least

logger = logging.getLogger(__name__)
_made: weakref.WeakKeyDictionary[nn.Module, tuple[object, dict[str, _Made]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Made:
    """A function that stands for a tower, compared with it; and what it loses, if it rounds."""

    run: Run
    loss: Loss | None


@dataclass(frozen=True)
class Engine:
    """An engine that is ready for one tower of a Clip.

    Attributes:
        clip, kind: the model, and which of its towers.
        name: what computes; never `auto`.
        run: stands for the tower; None for the tower itself.
        loss: of an engine that rounds, else None.
        timing: what `auto` chose by, else None.
    """

    clip: Clip
    kind: Kind
    name: str
    run: Run | None = None
    loss: Loss | None = None
    timing: Timing | None = None

    def __str__(self) -> str:
        what = "pictures" if self.kind == "image" else "texts"
        text = f"engine for {what}: {self.name}"
        if self.timing is not None:
            speeds = sorted(self.timing.per_second.items(), key=lambda one: -one[1])
            text += f", chosen by speed ({', '.join(f'{name} {speed:,.1f}/s' for name, speed in speeds)})"
            text += "".join(f"; without {name}: {why}" for name, why in self.timing.left_out.items())
        return text if self.loss is None else f"{text}; {self.loss}"

    def record(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "name": self.name,
            "per_second": self.timing and self.timing.per_second,
            "left_out": self.timing and self.timing.left_out,
            "loss": self.loss and vars(self.loss),
        }

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, n, n), bytes or floats in [0, 1], to unit vectors (B, D) fp32.

        Raises:
            ShapeError: for pixels of another size than the tower's own, if the engine was named.
        """
        side = self.clip.config.image.image_size
        fits = pixels.ndim == 4 and pixels.shape[1:] == (3, side, side)
        if self.run is None or (self.timing is not None and not fits):
            return unit(self.clip.image(pixels.to(self.clip.device)))
        if not fits:
            raise ShapeError(
                f"the engine {self.name} takes pixels (B, 3, {side}, {side}), not {tuple(pixels.shape)};"
                " torch takes other sizes"
            )
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return self.run(scaled.contiguous())

    @torch.no_grad()
    def texts(self, tokens: Tokens, positions: int = 4096) -> Tensor:
        """Tokens (n, L) on the CPU to unit vectors (n, D) fp32; texts of about the same length together."""
        tower = self.clip.text
        if self.run is None and isinstance(tower, TextTower):
            return unit(text_features(tower, tokens, positions))
        order = tokens.ends.argsort(stable=True)
        found = torch.empty(len(tokens), self.clip.width, device=self.clip.device)
        for rows in _slices((tokens.ends[order] + 1).tolist(), positions):
            part = tokens[order[rows]]
            found[order[rows]] = (
                unit(tower(part.to(self.clip.device)))
                if self.run is None
                else self.run(part.ids.contiguous(), part.ends)
            )
        return found


def ready(
    clip: Clip,
    kind: Kind,
    name: str,
    *,
    rows: int = 32,
    tokens: Tokens | None = None,
    tell: Callable[[str], None] = logger.info,
) -> Engine:
    """An engine for one tower, made or found in the cache, and compared with the tower.

    Args:
        clip: its tower, of vectors (B, D), must not change while the engine is used; a changed one gets an
            engine of its own.
        kind: `image` or `text`.
        name: one of `NAMES`.
        rows: for `auto`, how many pictures or texts will come at once.
        tokens: for `auto`, texts that will come: torch computes what they begin with in common only once.
        tell: is told when something begins that may take minutes.

    Raises:
        ConfigError: for an unknown name, for an engine that cannot run here, or whose answers are wrong.
        MissingExtra: for an engine that is not installed.
    """
    check(name)
    if name == "torch":
        return Engine(clip, kind, name)
    if clip.device.type != "cpu":
        if name != "auto":
            raise ConfigError(f"the engine {name} computes on the CPU, but this Clip is on {clip.device}")
        return Engine(clip, kind, "torch")
    with evaluating(clip):
        return _auto(clip, kind, rows, tokens, tell) if name == "auto" else _named(clip, kind, name, tell)


def check(name: str, precision: str = "fp32") -> None:
    """Refuse an engine that there is not, or one that is asked for another precision than its own.

    Raises:
        ConfigError: naming those that there are.
    """
    if name not in NAMES:
        raise ConfigError(f"engine must be one of {', '.join(NAMES)}, not {name!r}{nearest(name, NAMES)}")
    if name != "torch" and precision != "fp32":
        raise ConfigError(
            f"precision {precision!r} is for the engine torch; {name} computes in its own: leave it at fp32"
        )


def _named(clip: Clip, kind: Kind, name: str, tell: Callable[[str], None]) -> Engine:
    known = _towers(clip, kind)
    if name not in known:
        if not places.folder(clip, kind).exists():
            tell(f"engine for {kind}s: making {name} for this model, which is kept in {places.cache()}")
        known[name] = _make(clip, kind, name)
        logger.info("%s", Engine(clip, kind, name, known[name].run, known[name].loss))
    return Engine(clip, kind, name, known[name].run, known[name].loss)


def _auto(clip: Clip, kind: Kind, rows: int, tokens: Tokens | None, tell: Callable[[str], None]) -> Engine:
    size = timing.size_class(rows)
    path = timing.file(clip, kind, size)
    found = timing.read(path)
    if found is None:
        tell(f"engine for {kind}s: timing what is installed, once for this model and machine")
        found = _time(clip, kind, size)
        timing.write(path, found)
        logger.info("%s", Engine(clip, kind, found.ranked()[0], timing=found))
    packed = isinstance(clip.text, TextTower) and clip.text.config.mask == "causal"
    share = share_computed(tokens) if packed and tokens is not None else 1.0
    known = _towers(clip, kind)
    for name in found.ranked(share):
        if name == "torch":
            return Engine(clip, kind, name, timing=found)
        try:
            known[name] = known.get(name) or _make(clip, kind, name)
        except ClipworksError as error:  # it could run when it was timed
            found = replace(found, left_out={**found.left_out, name: str(error)})
            continue
        return Engine(clip, kind, name, known[name].run, timing=found)
    return Engine(clip, kind, "torch", timing=found)


def _time(clip: Clip, kind: Kind, size: int) -> Timing:
    """Make all exact engines, time them in turns, and let them go."""
    engines, left_out = {"torch": Engine(clip, kind, "torch")}, {}
    for name in EXACT[1:]:
        try:
            engines[name] = Engine(clip, kind, name, _make(clip, kind, name).run)
        except ClipworksError as error:
            left_out[name] = str(error)
    calls = {name: one.images if kind == "image" else one.texts for name, one in engines.items()}
    return Timing(size, timing.measure(clip, kind, size, calls), left_out)


def _make(clip: Clip, kind: Kind, name: str) -> _Made:
    folder = places.folder(clip, kind)
    try:
        run = BACKENDS[name](clip, kind, folder)
        differences = probe(clip, kind, run)
    except ClipworksError:
        raise
    except Exception as error:  # exporters and compilers raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]
        raise ConfigError(f"the engine {name} cannot run this {kind} tower ({reason}); torch can") from error
    if name in ROUNDED:
        return _Made(run, known_or_measured(clip, kind, run, folder))
    if not differences <= TOLERANCE:
        raise ConfigError(
            f"the engine {name} gives other {kind} vectors than torch: they differ by {differences:.1e} on a"
            f" probe, more than {TOLERANCE:.0e}; use torch, or delete {folder} to have it made anew"
        )
    return _Made(run, None)


@torch.no_grad()
def probe(clip: Clip, kind: Kind, run: Run) -> float:
    """The largest difference between a function and the tower it stands for; NaN if there is one.

    Inputs are random, one and three at a time; of pictures also coarse ones, which have more contrast, and of
    texts also short ones.
    """
    generator = torch.Generator().manual_seed(1)
    batches = [onnx.examples(clip, kind, rows, generator) for rows in (1, 3)]
    if kind == "image":
        pixels = batches[1]["pixels"]
        batches.append({"pixels": F.interpolate(pixels[..., :3, :3], pixels.shape[-1]).contiguous()})
    else:
        short = max(1, batches[1]["ids"].shape[1] // 8)
        ids, ends = batches[1]["ids"][:, :short].contiguous(), batches[1]["ends"] % short
        batches.append({"ids": ids, "ends": ends})
    tower = onnx.as_function(clip, kind)
    differences = [(run(*one.values()) - tower(*one.values())).abs().max() for one in batches]
    return float(torch.stack(differences).max())


def _towers(clip: Clip, kind: Kind) -> dict[str, _Made]:
    """What was made for a tower in the state in which it is, with as many threads as there are."""
    tower = clip.image if kind == "image" else clip.text
    stamp = places.fingerprint(clip, kind), torch.get_num_threads()
    known = _made.get(tower)
    if known is None or known[0] != stamp:
        known = _made[tower] = (stamp, {})
    return known[1]


def _slices(lengths: list[int], positions: int) -> Iterator[slice]:
    """Stretches of texts that are sorted by length: little padding in each, and not too many positions."""
    start = 0
    for stop, length in enumerate(lengths):
        rows = stop - start
        wide = length > SLACK * lengths[start] and rows * lengths[start] >= FEWEST
        if rows and (wide or (rows + 1) * length > positions):
            yield slice(start, stop)
            start = stop
    if start < len(lengths):
        yield slice(start, len(lengths))
