"""Settings and disk of methods that are no scikit-learn estimators: what their families share.

A method is a dataclass over `Method` whose fields are its settings, the Clip among them; what it learned are
attributes that are no settings. `save(folder)` writes both, and nothing of the Clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.errors import CheckpointError, ConfigError, nearest
from clipworks.parts import fitted
from clipworks.parts.features import fingerprint

M = TypeVar("M", bound="Method")


@dataclass(eq=False, repr=False)
class Method:
    """Something made of a Clip and settings.

    Args:
        clip: the model; it is never changed.
    """

    clip: Clip

    # --- what a method may define ---

    def _learned(self) -> dict[str, Tensor]:
        """The tensors that are saved."""
        return {}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `_learned`; what it does not know is a CheckpointError or a KeyError."""

    def _facts(self) -> dict[str, Any]:
        """What is saved besides settings and tensors, as JSON has it."""
        return {}

    def _restore_facts(self, about: Mapping[str, Any]) -> None:
        """The inverse of `_facts`."""

    # --- what a family may add to it ---

    def _tensors(self) -> dict[str, Tensor]:
        return self._learned()

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self._restore(tensors)

    # --- settings ---

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings by name, as scikit-learn asks for them."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def set_params(self: M, **settings: Any) -> M:
        """Change settings by name.

        Raises:
            ConfigError: for a name that is none of them.
        """
        known = self.get_params()
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(f"{type(self).__name__} has no setting {name!r}{nearest(name, known)}")
            setattr(self, name, value)
        return self

    def __sklearn_clone__(self: M) -> M:
        """The same without what was learned, with the same settings; it shares the Clip."""
        return type(self)(**self.get_params())

    # --- disk ---

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the settings and what was learned to a folder, nothing of the Clip."""
        settings = {name: value for name, value in self.get_params().items() if name != "clip"}
        about = {
            "method": type(self).__name__,
            "settings": fitted.split_plain(settings)[0],
            **self._facts(),
            "clip": {"name": self.clip.config.name, "fingerprint": fingerprint(self.clip)},
        }
        fitted.write(Path(folder), about, self._tensors())
        return Path(folder)

    @classmethod
    def load(cls: type[M], folder: str | PathLike[str], clip: Clip, **settings: Any) -> M:
        """Read what `save` wrote; `settings` replace those that were saved.

        Raises:
            CheckpointError: if files are missing or damaged, or belong to another method or Clip.
        """
        about, tensors = fitted.read(Path(folder))
        try:
            if about["method"] != cls.__name__:
                raise CheckpointError(f"{folder}: holds a {about['method']}, not a {cls.__name__}")
            if about["clip"]["fingerprint"] != fingerprint(clip):
                raise CheckpointError(
                    f"{folder}: was made with the Clip {about['clip']['name']!r}; this one has other weights"
                )
            given = {name: fitted.unplain(value) for name, value in about["settings"].items()}
            loaded = cls(clip, **{**given, **settings})
            loaded._restore_facts(about)
            loaded._take(tensors)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: not the description of a {cls.__name__} ({error})") from error
        return loaded
