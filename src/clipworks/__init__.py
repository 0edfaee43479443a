"""clipworks: one CLIP, and the papers that stand on it.

    import clipworks
    clip = clipworks.load("seedling")
    clip.classify("photo.jpg", ["a cat", "a dog"]).top(1)

Names are resolved when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipworks.checkpoints.zoo import load as load
    from clipworks.core.clip import Classification as Classification
    from clipworks.core.clip import Clip as Clip
    from clipworks.core.config import Config as Config
    from clipworks.core.tokenizer import Tokens as Tokens
    from clipworks.core.towers import Tap as Tap
    from clipworks.core.towers import compose as compose
    from clipworks.core.towers import variant as variant
    from clipworks.errors import ClipworksError as ClipworksError

__version__ = "0.1.0"

_HOMES = {
    "load": "clipworks.checkpoints.zoo",
    "Clip": "clipworks.core.clip",
    "Classification": "clipworks.core.clip",
    "Config": "clipworks.core.config",
    "Tokens": "clipworks.core.tokenizer",
    "Tap": "clipworks.core.towers",
    "compose": "clipworks.core.towers",
    "variant": "clipworks.core.towers",
    "ClipworksError": "clipworks.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipworks' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
