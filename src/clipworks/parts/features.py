"""Raw image features, each computed once: encoding pictures and their views, and the store that keeps them.

A feature belongs to a picture's *content*, to the encoder that made it and to the view it was made of. All
three are in its key, so a picture that is renamed, copied or drawn into another few-shot set is never encoded
again, and a changed weight, resolution or crop never meets features of before.

On disk a store is a folder of immutable pairs of files, memory-mapped when they are read:

    <encoder>/<name>.features.npy   (k, D) float32
    <encoder>/<name>.keys.npy       (k, 16) uint8, put there last: a pair exists once its keys do

Every file is written beside its place and renamed into it, and no file is ever changed. So any number of
processes may write at once (the worst that happens is that both bring the same feature), and one that is
killed at any moment leaves at most a file that nobody reads.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from clipworks.core.images import Preprocessing, prepare_stream
from clipworks.core.pictures import describe
from clipworks.data.augment import RandomView
from clipworks.errors import ConfigError, PictureError, ShapeError

Encode = Callable[[Tensor], Tensor]

KEY = 16  # bytes of a key
_BLOCK = 1024  # features that are written as one pair
_ABANDONED = 86_400  # seconds after which a half-written file is taken away
_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Views:
    """Which views of a picture are encoded.

    Attributes:
        count: how many random views; 0 stands for the plain picture.
        crop, flip, seed: as `RandomView` takes them; a view depends on them, on the picture's content and on
            its number, and on nothing else.
    """

    count: int = 0
    crop: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"views must be 0 (the plain picture) or more, not {self.count}")

    def __len__(self) -> int:
        return max(1, self.count)

    def name(self, number: int) -> str:
        """What the view is called in keys."""
        if not self.count:
            return "plain"
        return f"crop {self.crop[0]:g} {self.crop[1]:g} flip {int(self.flip)} seed {self.seed} view {number}"

    def make(self, pixels: Tensor, keys: Sequence[str], number: int | Tensor) -> Tensor:
        """View `number` (one for all, or (B,)) of pixels (B, 3, n, n), bytes or floats in [0, 1]; floats.

        Plain pixels are given back as they are.
        """
        if not self.count:
            return pixels
        return RandomView(pixels.shape[-1], crop=self.crop, flip=self.flip, seed=self.seed)(
            pixels, keys, number
        )


class FeatureStore:
    """Features on disk, found by key; see the head of this module.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._spaces: dict[str, _Space] = {}

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_spaces": {}}

    def find(self, space: str, keys: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """What is known of some features.

        Args:
            space: the encoder's fingerprint.
            keys: (k, 16).

        Returns:
            Which are there, (k,), and those, (m, D) float32, in the order of the keys.
        """
        known = self._space(space)
        found = known.places(keys)
        if (found < 0).any() and known.refresh():
            found = known.places(keys)
        return found >= 0, known.rows(found[found >= 0])

    def add(self, space: str, keys: NDArray[np.uint8], features: NDArray[np.float32]) -> None:
        """Keep features (k, D) under keys (k, 16); they are there for every process when this returns.

        Raises:
            ShapeError: if there is not one key a feature.
        """
        if keys.shape != (len(features), KEY) or features.ndim != 2:
            raise ShapeError(
                f"features (k, D) go with keys (k, {KEY}), not {features.shape} with {keys.shape}"
            )
        if len(keys):
            self._space(space).write(keys, features)

    def count(self, space: str) -> int:
        """How many features of an encoder there are."""
        known = self._space(space)
        known.refresh()
        return len(known.sorted)

    def _space(self, name: str) -> _Space:
        if name not in self._spaces:
            self._spaces[name] = _Space(self.folder / name)
        return self._spaces[name]


class _Space:
    """The features of one encoder: mapped files, and one sorted index over their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for partial in folder.glob("*.partial"):
            if time.time() - partial.stat().st_mtime > _ABANDONED:
                partial.unlink(missing_ok=True)
        self.files: list[NDArray[np.float32]] = []
        self.seen: set[str] = set()
        self.sorted = np.empty(0, f"S{KEY}")
        self.order = np.empty((0, 2), np.int64)  # file and row of each key of `sorted`
        self.refresh()

    def refresh(self) -> bool:
        """Take in what other processes have written since; whether there was anything."""
        new_keys, new_places = [self.sorted], [self.order]
        for path in sorted(self.folder.glob("*.keys.npy")):
            name = path.name.removesuffix(".keys.npy")
            if name in self.seen:
                continue
            self.seen.add(name)
            try:
                keys = np.load(path)
                features = np.load(path.with_name(f"{name}.features.npy"), mmap_mode="r")
            except (OSError, ValueError, EOFError):
                continue  # damaged by something else than us; its pictures are encoded again
            if keys.shape != (len(features), KEY):
                continue
            new_keys.append(_as_strings(keys))
            new_places.append(np.stack([np.full(len(keys), len(self.files)), np.arange(len(keys))], axis=1))
            self.files.append(features)
        if len(new_keys) == 1:
            return False
        keys, first = np.unique(np.concatenate(new_keys), return_index=True)
        self.sorted, self.order = keys, np.concatenate(new_places)[first]
        return True

    def places(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Where in `order` each key is, (k,), -1 for what is not there."""
        strings = _as_strings(keys)
        if not len(self.sorted):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self.sorted, strings), len(self.sorted) - 1)
        return np.where(self.sorted[at] == strings, at, -1)

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features at some places, copied out of the mapped files."""
        if not len(places):
            return np.empty((0, 0), np.float32)
        where = self.order[places]
        rows = np.empty((len(places), self.files[int(where[0, 0])].shape[1]), np.float32)
        for file in np.unique(where[:, 0]):
            mine = where[:, 0] == file
            rows[mine] = self.files[int(file)][where[mine, 1]]
        return rows

    def write(self, keys: NDArray[np.uint8], features: NDArray[np.float32]) -> None:
        name = uuid.uuid4().hex
        for kind, values in (("features", np.asarray(features, np.float32)), ("keys", keys)):
            path = self.folder / f"{name}.{kind}.npy"
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, np.ascontiguousarray(values))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)


def _as_strings(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(keys, np.uint8).view(f"S{KEY}").reshape(len(keys))


def content(picture: Any) -> bytes:
    """16 bytes that stand for what a picture shows: of a file its bytes, else its pixels, mode and size.

    Raises:
        PictureError: for a file that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=KEY)
    if isinstance(picture, (str, os.PathLike)):
        try:
            with Path(picture).open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
        except OSError as error:
            raise PictureError(f"{describe(picture)}: cannot be read ({error.strerror})") from error
    elif isinstance(picture, (bytes, bytearray, memoryview)):
        digest.update(picture)
    elif isinstance(picture, Image.Image):
        palette = picture.getpalette() if picture.mode in ("P", "PA") else None
        digest.update(f"{picture.mode} {picture.size} {palette} {picture.info.get('transparency')}".encode())
        digest.update(picture.tobytes())
    elif isinstance(picture, (np.ndarray, Tensor)):
        array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
        digest.update(f"{type(picture).__name__} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    elif hasattr(picture, "read"):
        start = picture.tell()
        digest.update(picture.read())
        picture.seek(start)
    else:
        raise PictureError(f"{describe(picture)}: not a picture but {type(picture).__name__}")
    return digest.digest()


def keys_of(contents: Sequence[bytes], view: str) -> NDArray[np.uint8]:
    """The keys (n, 16) of one view of pictures with these contents."""
    salt = hashlib.blake2b(view.encode(), digest_size=KEY).digest()
    rows = [hashlib.blake2b(one, digest_size=KEY, key=salt).digest() for one in contents]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(contents), KEY)


def fingerprint(module: nn.Module, *about: object) -> str:
    """32 hexadecimal digits over every byte of a module's weights, its class and whatever else matters.

    Computed once for each state of the weights.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stamp = tuple((name, t.data_ptr(), t._version) for name, t in tensors.items())
    known = _fingerprints.get(module)
    if known is None or known[0] != stamp:
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        known = _fingerprints[module] = (stamp, digest.hexdigest())
    text = " ".join([known[1], type(module).__name__, *map(repr, about)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def listed(images: Any) -> list[Any]:
    """Pictures one by one: of one picture, of several of any kind, or of pixels (n, 3, H, W) the rows."""
    if isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image)) or hasattr(images, "read"):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3:
        return [images]
    return list(images)


def pixels_of(images: Sequence[Any], preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
    """Pictures as pixels (B, 3, n, n), bytes; tensors that have that size already are taken as they are.

    Raises:
        PictureError: for a picture that cannot be read, naming it.
    """
    size = preprocessing.image_size
    if images and all(isinstance(one, Tensor) and one.shape == (3, size, size) for one in images):
        for start in range(0, len(images), batch_size):
            yield torch.stack(list(images[start : start + batch_size]))
        return
    for prepared in prepare_stream(images, preprocessing, batch_size=batch_size):
        yield prepared.pixels


@torch.no_grad()
def encode_views(
    images: Sequence[Any],
    encode: Encode,
    preprocessing: Preprocessing,
    views: Views = Views(),
    *,
    store: FeatureStore | None = None,
    space: str = "",
    batch_size: int = 64,
    bar: Callable[[Iterable[Tensor], int], Iterable[Tensor]] | None = None,
) -> Tensor:
    """The raw features of some views of pictures, each picture decoded and encoded at most once.

    Args:
        images: n pictures; equal ones are encoded once.
        encode: pixels (B, 3, n, n) in [0, 1] or bytes to vectors (B, D).
        preprocessing: pictures to pixels.
        views: which views.
        store: what is there is taken from it, what is not is added; every 1,024 features are safe on disk.
        space: fingerprint of `encode` and `preprocessing`, for the store.
        batch_size: pictures encoded at once.
        bar: wraps the batches, given how many pictures there are to encode.

    Returns:
        (n, V, D) float32 on the CPU, as `encode` gives them.

    Raises:
        PictureError: for a picture that cannot be read.
    """
    if not images:
        raise ShapeError("no pictures to encode")
    contents = [content(one) for one in images]
    # Equal pictures share a place.
    place: dict[bytes, int] = {}
    at = np.array([place.setdefault(one, len(place)) for one in contents], np.int64)
    first = np.unique(at, return_index=True)[1]
    unique = list(place)
    names = [views.name(number) for number in range(len(views))]
    keys = [keys_of(unique, name) for name in names]

    known = np.zeros((len(unique), len(views)), bool)
    stored: list[NDArray[np.float32]] = []
    for number in range(len(views) if store is not None else 0):
        there, found = store.find(space, keys[number])  # type: ignore[union-attr]
        known[:, number] = there
        stored.append(found)
    missing = np.flatnonzero(~known.all(axis=1))
    features: Tensor | None = None
    waiting: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []

    def keep(least: int) -> None:
        if store is not None and sum(len(rows) for _, rows in waiting) >= least:
            store.add(space, *(np.concatenate(parts) for parts in zip(*waiting, strict=True)))
            waiting.clear()

    batches: Iterable[Tensor] = pixels_of(
        [images[first[index]] for index in missing], preprocessing, batch_size
    )
    if bar is not None and len(missing):
        batches = bar(batches, len(missing))
    done = 0
    for pixels in batches if len(missing) else ():
        rows = missing[done : done + len(pixels)]
        done += len(pixels)
        for number in range(len(views)):
            wanted = np.flatnonzero(~known[rows, number])
            if not len(wanted):
                continue
            some = rows[wanted]
            made = views.make(pixels[wanted], [unique[index].hex() for index in some], number)
            vectors = encode(made).float().cpu()
            if features is None:
                features = torch.empty(len(unique), len(views), vectors.shape[1])
            features[some, number] = vectors
            waiting.append((keys[number][some], vectors.numpy()))
        keep(_BLOCK)
    if waiting:
        keep(1)
    for number, found in enumerate(stored):
        if len(found):
            if features is None:
                features = torch.empty(len(unique), len(views), found.shape[1])
            features[known[:, number], number] = torch.from_numpy(found)
    if features is None:
        raise ShapeError("no features were made")
    return features[torch.from_numpy(at)] if len(unique) < len(images) else features
