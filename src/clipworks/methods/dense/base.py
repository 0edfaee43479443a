"""The contract of the family `dense`: what is where in a picture.

    found = MaskCLIP(clip).segment("street.jpg", ["road", "car", "sky"])
    found.map, found.scores, found.shares(), found.overlay("street.jpg")

A method has some of these verbs, at least one:

- `segment(image, labels, *, background=None, unknown_below=None) -> Segmentation`: a label for every pixel of
  a picture of any size, at the picture's own size. `segment_all(images, labels, …)` does so for many, whose
  windows share batches, and skips or reports what cannot be read.
- `score(images) -> Scores`: how unusual each picture and each of its pixels is, in [0, 1].
- `fit(images, masks, …) -> self` where something is learned, `save(folder)`, `load(folder, clip)`,
  `from_checkpoint(path, clip)` where the authors released weights.

What every method of the family keeps:

- **Labels** are K different names, or `ClassTexts` that bring sentences of their own. Permuting them permutes
  the scores and nothing else. `background` is the *name* of the label that stands for "none of the others";
  None means that no label does. With `unknown_below`, a pixel whose best score is lower has no label (-1).
- **Scores** are fp32 in [0, 1].
- **Size.** `size` is the shorter side to which a picture is scaled, by default twice what the tower was
  trained with; `"full"` leaves it as it is. What is larger than a `window` is seen in windows that overlap
  and fade into each other; memory is bounded by the windows and the map, whatever the picture's size.
- A picture has the same segmentation alone and among others. The same seed gives the same numbers, and no
  global generator is touched. The Clip is bit-identical after every call, in the mode it was in.
- Bad input (no labels, one twice, a mask of another size) is one clear error.

A segmenter is a dataclass over `Segmenter` with its settings as fields, and defines

    `_maps(pixels, asked) -> (B, K, h, w)`   of a window; what overlapping windows average
    `_scores(blended, asked) -> (K, h, w)`   what becomes of the average, if it is no score yet
    `_asked(texts, background)`              if the labels' vectors are not the zero-shot ones
    `cell`                                   pixels a cell of its maps is wide, if not the tower's
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipworks.core.pictures import describe, read_picture
from clipworks.data.captions import ClassTexts
from clipworks.data.templates import IMAGENET_TEMPLATES
from clipworks.engine.precision import computing, resolve
from clipworks.engine.recipe import Precision
from clipworks.errors import ConfigError, PictureError
from clipworks.evaluate.zeroshot import class_features
from clipworks.parts.dense import DenseTower, cell_of, dense_tower
from clipworks.parts.frozen import undisturbed
from clipworks.parts.method import Method
from clipworks.parts.progress import with_bar
from clipworks.parts.segmentation import Segmentation
from clipworks.parts.windows import Blend, Canvas, aligned_stride, window_starts

__all__ = ["Asked", "DenseMethod", "Scores", "Segmenter", "Unreadable"]

LONGEST = 8  # how many times the shorter side the longer one may be; beyond it a picture is squeezed


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked for: `texts` of K labels, their unit `vectors` (K, D), and which is the background.

    `source` says what the scores are, if a method has several kinds.
    """

    texts: ClassTexts
    vectors: Tensor
    background: int | None
    source: str = ""


@dataclass(frozen=True, eq=False)
class Scores:
    """How unusual n pictures are: `image` (n,) fp32 and `maps`, n of (H, W) fp32, all in [0, 1]."""

    image: Tensor
    maps: list[Tensor]


@dataclass(frozen=True)
class Unreadable:
    """A picture that `segment_all` could not read: its place among those given, and why."""

    place: int
    reason: str


@dataclass(eq=False, repr=False)
class DenseMethod(Method):
    """A Clip that looks at places; the module's docstring is the contract.

    Args:
        clip: the model; it is never changed.
        size: the shorter side to which pictures are scaled; None for `enlarged` times the tower's, `"full"`
            for none.
        window: the side of a window in pixels; None for what the tower was trained with.
        overlap: share of a window that its neighbor sees too, 0 to below 1.
        blend: `smooth` windows fade into each other, `uniform` ones are averaged.
        precision: of the towers: `fp32`, `bf16`, or `auto`.
        seed: of all randomness.
        progress: show bars; None does so on a terminal.
    """

    _: KW_ONLY
    size: int | Literal["full"] | None = None
    window: int | None = None
    overlap: float = 0.5
    blend: Blend = "smooth"
    precision: Precision = "fp32"
    seed: int = 0
    progress: bool | None = None

    # How many times the tower's own size the shorter side of a picture is by default.
    enlarged: ClassVar[int] = 2

    @property
    def tower(self) -> DenseTower:
        """The image tower.

        Raises:
            ConfigError: if it has no places.
        """
        return dense_tower(self.clip)

    @property
    def patch(self) -> int:
        """Pixels a token of the tower is wide."""
        return cell_of(self.tower)

    # --- pictures ---

    def _scaled(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """A picture as bytes (H', W', 3) at the size it is looked at, and its own height and width."""
        picture = read_picture(image)
        size = (picture.height, picture.width)
        height, width = self._scaled_size(size)
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        if (height, width) != size:
            bicubic = self.clip.preprocessing.interpolation == "bicubic"
            kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
            picture = picture.resize((width, height), kind)
        return np.asarray(picture), size

    def _scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The height and width at which a picture of this size is looked at."""
        if self.size == "full":
            return size
        usual = self.enlarged * self.clip.preprocessing.image_size
        short = usual if self.size is None else self.size
        if isinstance(short, str) or short < 1:
            raise ConfigError(f"size must be a number of pixels, 'full' or None, not {self.size!r}")
        scale = min(short / min(size), LONGEST * short / max(size))
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    @property
    def _window(self) -> int:
        given = self.clip.preprocessing.image_size if self.window is None else self.window
        return max(self.patch, given // self.patch * self.patch)

    @property
    def _precision(self) -> Literal["fp32", "bf16"]:
        return resolve(self.precision, self.clip.device)


@dataclass(eq=False, repr=False)
class Segmenter(DenseMethod):
    """What gives every pixel a label; the module's docstring is the contract.

    Args:
        templates: sentences with `{}` around a label; `ClassTexts` bring their own.
    """

    _: KW_ONLY
    templates: Sequence[str] = IMAGENET_TEMPLATES

    # Says what the scores are, if a method has several kinds.
    source: ClassVar[str] = ""

    # --- what a user calls ---

    def segment(
        self,
        image: Any,
        labels: Sequence[str] | ClassTexts | Asked | None = None,
        *,
        background: str | None = None,
        unknown_below: float | None = None,
    ) -> Segmentation:
        """A label for every pixel of a picture.

        Args:
            image: anything that `read_picture` takes.
            labels: K different names, or what `ask` made of them, which says the background too; None for
                the method's own, if it has a closed list.
            background: which of them means "none of the others".
            unknown_below: leave pixels without a label whose best score is lower, in [0, 1].

        Raises:
            PictureError: for a picture that cannot be read.
            ConfigError: without labels, for one that appears twice, or a background that is none of them.
        """
        [found] = self.segment_all(
            [image], labels, background=background, unknown_below=unknown_below, progress=False
        )
        return cast(Segmentation, found)

    def segment_all(
        self,
        images: Iterable[Any],
        labels: Sequence[str] | ClassTexts | Asked | None = None,
        *,
        background: str | None = None,
        unknown_below: float | None = None,
        batch_size: int = 8,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> Iterator[Segmentation | Unreadable]:
        """Segment many pictures, in their order, whose windows share batches.

        Args:
            images: pictures, read one after the other.
            labels, background, unknown_below: as `segment` has them.
            batch_size: windows that go through the tower at once.
            on_error: `raise` at the first picture that cannot be read, or `skip` it: an `Unreadable` comes
                in its place.
            progress: show a bar; None takes the method's setting.

        Raises:
            PictureError: for a picture that cannot be read, with `on_error="raise"`.
            ConfigError: as `segment`, or for a batch size below one.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        stride = aligned_stride(self._window, self.overlap, self.patch)
        asked = labels if isinstance(labels, Asked) else self.ask(labels, background)
        waiting: deque[_Job | Unreadable] = deque()
        windows: list[tuple[_Job, int, int]] = []
        shown = self.progress if progress is None else progress
        count = len(images) if isinstance(images, Sequence) else 0
        for number, image in enumerate(with_bar(images, count, "segmenting", shown)):
            try:
                job = self._job(image, asked, stride)
            except PictureError as error:
                if on_error == "raise":
                    raise
                waiting.append(Unreadable(number, str(error)))
                continue
            waiting.append(job)
            windows += [(job, top, left) for top in job.tops for left in job.lefts]
            while len(windows) >= batch_size:
                windows = self._look(windows, asked, batch_size)
            while waiting and _is_done(waiting[0]):
                yield self._finish(waiting.popleft(), asked, unknown_below)
        while windows:
            windows = self._look(windows, asked, batch_size)
        while waiting:
            yield self._finish(waiting.popleft(), asked, unknown_below)

    def ask(self, labels: Sequence[str] | ClassTexts | None = None, background: str | None = None) -> Asked:
        """The labels as this method reads them, to be given to `segment` in their place many times.

        Raises:
            ConfigError: as `segment`.
        """
        texts, place = self._texts(self._own_labels() if labels is None else labels, background)
        with undisturbed(self.clip), torch.no_grad():
            return self._asked(texts, place)

    # --- what a method may define ---

    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        """Bytes (B, 3, H, W) of windows to maps (B, K, H / cell, W / cell), which windows average."""
        raise NotImplementedError

    def _scores(self, blended: Tensor, asked: Asked) -> Tensor:
        """Blended maps (K, h, w) to scores in [0, 1] of the same shape."""
        return blended

    def _asked(self, texts: ClassTexts, background: int | None) -> Asked:
        """The labels' vectors; by default the zero-shot ones, the mean over all sentences."""
        return Asked(texts, class_features(self.clip, texts), background)

    def _own_labels(self) -> Sequence[str] | ClassTexts:
        """The labels that are meant where none are given, if the method has a list of its own."""
        raise ConfigError(f"{type(self).__name__} has no labels of its own: give a list of at least one name")

    @property
    def cell(self) -> int:
        """Pixels that a cell of `_maps` is wide; it divides the tower's patch."""
        return self.patch

    # --- the walk over windows ---

    def _texts(
        self, labels: Sequence[str] | ClassTexts, background: str | None
    ) -> tuple[ClassTexts, int | None]:
        if not isinstance(labels, ClassTexts):
            if isinstance(labels, str) or not labels:
                raise ConfigError(f"labels are a list of at least one name, not {labels!r}")
            if not all(isinstance(name, str) and name.strip() for name in labels):
                raise ConfigError(f"every label is a name that is not empty: {list(labels)!r}")
            labels = ClassTexts(list(labels), templates=tuple(self.templates))
        names = list(labels.names)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"the label {twice[0]!r} is given more than once")
        if background is not None and background not in names:
            raise ConfigError(f"the background {background!r} is none of the labels {names}")
        return labels, None if background is None else names.index(background)

    def _job(self, image: Any, asked: Asked, stride: int) -> _Job:
        array, size = self._scaled(image)
        (height, width), patch, window = array.shape[:2], self.patch, self._window
        padded = [-(-side // patch) * patch for side in (height, width)]
        # Black where there is no picture, so that its sides are whole numbers of patches.
        pixels = torch.zeros(3, *padded, dtype=torch.uint8)
        pixels[:, :height, :width] = torch.from_numpy(array.transpose(2, 0, 1).copy())
        cells = [side // self.cell for side in padded]
        return _Job(
            describe(image),
            pixels,
            size,
            (height / self.cell, width / self.cell),
            window_starts(padded[0], window, stride),
            window_starts(padded[1], window, stride),
            Canvas(len(asked.texts), cells[0], cells[1], self.blend),
        )

    def _look(
        self, windows: list[tuple[_Job, int, int]], asked: Asked, batch_size: int
    ) -> list[tuple[_Job, int, int]]:
        """Send the first windows of one shape through the tower; gives back the others."""
        side = self._window
        shape = [min(side, length) for length in windows[0][0].pixels.shape[1:]]
        taken = 0
        while taken < min(batch_size, len(windows)):
            if [min(side, length) for length in windows[taken][0].pixels.shape[1:]] != shape:
                break
            taken += 1
        batch = torch.stack(
            [
                job.pixels[:, top : top + shape[0], left : left + shape[1]]
                for job, top, left in windows[:taken]
            ]
        )
        device = self.clip.device
        with undisturbed(self.clip), torch.no_grad(), computing(self._precision, device):
            maps = self._maps(batch.to(device), asked)
        for (job, top, left), found in zip(windows[:taken], maps, strict=True):
            job.canvas.add(top // self.cell, left // self.cell, found)
            job.seen += 1
        return windows[taken:]

    def _finish(
        self, job: _Job | Unreadable, asked: Asked, unknown_below: float | None
    ) -> Segmentation | Unreadable:
        if isinstance(job, Unreadable):
            return job
        return Segmentation.of(
            asked.texts.names,
            self._scores(job.canvas.blended(), asked),
            job.cells,
            job.size,
            background=asked.background,
            unknown_below=unknown_below,
            source=asked.source or self.source,
        )


@dataclass(eq=False)
class _Job:
    """A picture under way: where its windows begin, and what has been seen of it."""

    name: str
    pixels: Tensor  # (3, H', W') uint8, sides multiples of the patch
    size: tuple[int, int]
    cells: tuple[float, float]  # without the padding
    tops: list[int]
    lefts: list[int]
    canvas: Canvas
    seen: int = 0

    @property
    def done(self) -> bool:
        return self.seen == len(self.tops) * len(self.lefts)


def _is_done(job: _Job | Unreadable) -> bool:
    return isinstance(job, Unreadable) or job.done
