"""The errors a user can meet, as one tree.

    ClipworksError            anything below; the command line prints it as one line, exit code 2
    ├── CheckpointError       a file of weights that is missing, damaged, unsafe or contradicts itself
    ├── ModelNotFound         a model name that nothing answers to; says the nearest names
    ├── PictureError          a picture that cannot be read, or is too large to be read safely
    ├── DataError             examples, labels or shards that do not fit together
    │   └── EstimatorInputError   what an estimator cannot fit or predict from; also a ValueError
    ├── ConfigError           an option or a combination of options that cannot work
    ├── ShapeError            a tensor whose shape or dtype is not what the function takes
    └── MissingExtra          an optional library that is not installed; says which extra brings it

A message is one line: what was wrong, with the offending value and place, and what to do.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class ClipworksError(Exception):
    """Base of every error that is the input's fault and not a bug."""


class CheckpointError(ClipworksError):
    """Weights that cannot be loaded as they are."""


class ModelNotFound(ClipworksError):
    """A model name that nothing answers to."""


class PictureError(ClipworksError):
    """A picture that cannot be read."""


class DataError(ClipworksError):
    """Examples, labels or shards that do not fit together."""


class EstimatorInputError(DataError, ValueError):
    """Features, pictures or labels that an estimator cannot use; a ValueError, as scikit-learn expects."""


class ConfigError(ClipworksError, ValueError):
    """An option, or a combination of options, that cannot work."""


class ShapeError(ClipworksError, ValueError):
    """A tensor of the wrong shape or dtype."""


class MissingExtra(ClipworksError, ImportError):
    """An optional library that is not installed."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional library or say in one line how to get it.

    Args:
        module: dotted name, for instance `"lancedb"`.
        extra: the extra of this package that installs it.
        purpose: what needs it, as the subject of a sentence: `"the picture index"`.

    Raises:
        MissingExtra: if the library, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise MissingExtra(
            f'{purpose} needs {missing}, which is not installed: pip install "clipworks[{extra}]"',
            name=missing,
        ) from error


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The nearest of `names`, ready for the end of a message; empty when nothing is near."""
    folded = {candidate.casefold(): candidate for candidate in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=0.4)
    return f"; did you mean {' or '.join(folded[match] for match in close)}?" if close else ""
