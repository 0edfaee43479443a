"""The kinds of generated world, and the random streams that keep them apart.

A kind is one file of this folder with a constant `KIND`: how a record is drawn, rendered, described and
shown. Nothing else has to be told about a new one. Every kind draws from streams derived from its own
name, so that adding a kind changes no byte of another.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipworks.errors import ConfigError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST, LARGEST = 32, 256


@dataclass(frozen=True)
class Kind:
    """One kind of world.

    Attributes:
        name: the name of its file, for instance `"scenes"`.
        about: one line for people.
        config: the frozen dataclass of its knobs; `config()` is a sensible world.
        record: the frozen dataclass that states everything about one example.
        sample: `(config, seed, index) -> record`, always the same for the same three.
        render: `(record, size) -> rendered`, which has `pixels (H, W, 3) uint8` and the truth as arrays.
        describe: `(record, ...) -> str`.
        preview: `(count, seed, size) -> PIL.Image`, a labelled sheet to look at.
    """

    name: str
    about: str
    config: type
    record: type
    sample: Callable[..., Any]
    render: Callable[..., Any]
    describe: Callable[..., str]
    preview: Callable[[int, int, int], Image]


def kinds() -> tuple[str, ...]:
    """The names of all kinds, in alphabetical order."""
    package = importlib.import_module(__package__ or "clipworks.data.world")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if _kind_in(name) is not None))


def kind(name: str) -> Kind:
    """The kind of that name; only its own file is imported.

    Raises:
        ConfigError: if there is none; says the nearest names.
    """
    found = _kind_in(name) if name.isidentifier() else None
    if found is None:
        names = kinds()
        known = ", ".join(names)
        raise ConfigError(f"{name!r} is no kind of world (there are {known}){nearest(name, names)}")
    return found


def _kind_in(name: str) -> Kind | None:
    path = f"{__package__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == path:
            return None
        raise
    found = getattr(module, "KIND", None)
    return found if isinstance(found, Kind) else None


def stream(name: str, seed: int, index: int, *more: int) -> np.random.Generator:
    """The random stream of example `index` of the world `name` under `seed`.

    Streams with different names or numbers are independent; the same ones are equal in every process.

    Raises:
        ConfigError: if a number is negative.
    """
    numbers = (seed, index, *more)
    if min(numbers) < 0:
        raise ConfigError(f"{name}: seeds and indices must not be negative, got {min(numbers)}")
    digest = hashlib.sha256(repr((name, *map(int, numbers))).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def pick(rng: np.random.Generator, options: tuple[Any, ...]) -> Any:
    """One of `options`, each equally often. Much faster than `rng.choice` on a tuple."""
    return options[int(rng.random() * len(options))]


def check_size(size: int) -> None:
    """Raises: ConfigError: if `size` is not a whole number of pixels from 32 to 256."""
    if not SMALLEST <= size <= LARGEST:
        raise ConfigError(f"size {size} is outside {SMALLEST}..{LARGEST} pixels")


def check_names(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises: ConfigError: if `given` is empty or has a name that is not in `known`; says the nearest."""
    if not given:
        raise ConfigError(f"{what} is empty; name at least one of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ConfigError(f"{what}: {name!r} is unknown{nearest(name, known)}")
