"""What methods that learn the words around class names ask of a Clip."""

from __future__ import annotations

from collections.abc import Sequence

from clipworks.core.clip import Clip
from clipworks.core.towers import TextTower
from clipworks.errors import ConfigError


def text_tower(clip: Clip) -> TextTower:
    """The text tower, if words can be learned in it.

    Raises:
        ConfigError: if it is another library's.
    """
    if not isinstance(clip.text, TextTower):
        raise ConfigError(f"learned words need a text tower of ours, not a {type(clip.text).__name__}")
    return clip.text


def token_count(clip: Clip, words: str) -> int:
    """How many tokens words have, start and end not counted.

    Raises:
        ConfigError: if the Clip has no tokenizer.
    """
    if clip.tokenizer is None:
        raise ConfigError(f"the Clip {clip.config.name!r} has no tokenizer to read {words!r} with")
    return len(clip.tokenizer.encode(words))


def spoken(names: Sequence[str]) -> list[str]:
    """Class names as CoOp and its followers say them: an underscore is a blank."""
    return [name.replace("_", " ") for name in names]
