"""Places in a picture: what is where, and what is unusual; `base` states the contract.

`methods()` and `method_named` find methods by name, `load` reads what any of them saved.
"""

from __future__ import annotations

import importlib
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipworks.core.clip import Clip
    from clipworks.methods.dense.base import DenseMethod

# Files of the folder that hold no method.
_OTHERS = ("__init__", "base", "comparison", "scorer")


def methods() -> dict[str, type[DenseMethod]]:
    """All methods of the family by name, which is that of their file: `maskclip`, `clip-dinoiser` …"""
    from clipworks.methods.dense.base import DenseMethod

    found: dict[str, type[DenseMethod]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in _OTHERS:
            continue
        module = importlib.import_module(f"clipworks.methods.dense.{path.stem}")
        for thing in vars(module).values():
            own = isinstance(thing, type) and thing.__module__ == module.__name__
            if own and issubclass(thing, DenseMethod):
                # Of several classes the last is the method, those before it are what it builds on.
                found[path.stem.replace("_", "-")] = thing
    return found


def method_named(name: str) -> type[DenseMethod]:
    """The method of that name.

    Raises:
        ConfigError: if there is none, with the nearest names.
    """
    from clipworks.errors import ConfigError, nearest

    found = methods()
    if name not in found:
        raise ConfigError(f"no method {name!r}{nearest(name, found)}; there are {', '.join(sorted(found))}")
    return found[name]


def load(folder: str | PathLike[str], clip: Clip, **settings: Any) -> DenseMethod:
    """What `save` of any method of the family wrote.

    Raises:
        CheckpointError: if it is none of them, is damaged, or belongs to another Clip.
    """
    from clipworks.errors import CheckpointError
    from clipworks.parts import fitted

    about, _ = fitted.read(Path(folder))
    saved = about.get("method")
    for method in methods().values():
        if method.__name__ == saved:
            return method.load(folder, clip, **settings)
    raise CheckpointError(f"{folder}: holds {saved!r}, which is no method for places in a picture")
