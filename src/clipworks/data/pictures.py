"""Decoding the pictures of examples, keeping them, and putting them together as a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clipworks.core.images import Preprocessing
from clipworks.data.backgrounds import Background, compose
from clipworks.data.source import Example
from clipworks.errors import DataError


@dataclass(frozen=True, slots=True)
class Decoded:
    """An example without its encoded picture, and the decoded one.

    Attributes:
        example: its `image` is None.
        picture: (3, n, n) uint8; over black where the example has a background. None without
            preprocessing.
        transparency: (1, n, n) uint8, 255 where only the background shows; None where there is none.
    """

    example: Example
    picture: NDArray[np.uint8] | None
    transparency: NDArray[np.uint8] | None = None


def decode(example: Example, preprocessing: Preprocessing | None) -> Decoded:
    """Decode one picture at the preprocessing's size.

    Raises:
        DataError: if the example has no picture.
        PictureError: if it cannot be read.
    """
    bare = replace(example, image=None)
    if preprocessing is None:
        return Decoded(bare, None)
    if example.image is None:
        raise DataError(f"{example.key}: has no picture")
    if example.background is None:
        return Decoded(bare, preprocessing(example.image).numpy())
    black = replace(preprocessing, background=(0, 0, 0))(example.image).numpy()
    white = replace(preprocessing, background=(255, 255, 255))(example.image).numpy()
    return Decoded(bare, black, np.maximum(white, black)[:1] - black[:1])


class PictureCache:
    """Decoded pictures of a source, each decoded once.

    The system gives out the memory as it is filled: n × 3 × size × size bytes, a third more where
    pictures are transparent.
    """

    def __init__(self, count: int, size: int) -> None:
        self._pictures = np.empty((count, 3, size, size), dtype=np.uint8)
        self._transparency: NDArray[np.uint8] | None = None
        self._examples: list[Example | None] = [None] * count
        self._lock = threading.Lock()

    def get(self, index: int) -> Decoded | None:
        """The picture at a place of the source, if it is there; a view into the cache, not a copy."""
        example = self._examples[index]
        if example is None:
            return None
        clear = self._transparency if example.background is not None else None
        return Decoded(example, self._pictures[index], None if clear is None else clear[index])

    def put(self, index: int, decoded: Decoded) -> None:
        """Keep one picture."""
        if decoded.picture is None:
            return
        self._pictures[index] = decoded.picture
        if decoded.transparency is not None:
            with self._lock:
                if self._transparency is None:
                    count, _, height, width = self._pictures.shape
                    self._transparency = np.zeros((count, 1, height, width), dtype=np.uint8)
            self._transparency[index] = decoded.transparency
        self._examples[index] = decoded.example  # last: whoever sees it finds the picture


def stack(decoded: Sequence[Decoded], views: Sequence[int], size: int) -> NDArray[np.uint8]:
    """The pictures of a batch, each before the background of its view.

    Args:
        decoded: B pictures.
        views: B view numbers, for the backgrounds.
        size: n.

    Returns:
        (B, 3, n, n) uint8, contiguous.
    """
    images = np.empty((len(decoded), 3, size, size), dtype=np.uint8)
    groups: dict[tuple[Background, int], list[int]] = {}
    for place, one in enumerate(decoded):
        if one.picture is not None:
            images[place] = one.picture
        if one.transparency is not None and one.example.background is not None:
            groups.setdefault((one.example.background, views[place]), []).append(place)
    for (background, view), places in groups.items():
        clear = np.stack([decoded[place].transparency for place in places])  # type: ignore[misc]
        colors = background.colors([decoded[place].example.key for place in places], view)
        images[places] = compose(images[places], clear, colors)
    return images
