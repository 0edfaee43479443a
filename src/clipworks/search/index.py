"""Index: pictures by content, found by words or by another picture.

Building is incremental and survives being killed (see `build`). Vectors have unit length and are compared
by cosine, exactly: every row is looked at.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from clipworks.checkpoints.zoo import load
from clipworks.core.pictures import Source, find_pictures
from clipworks.encode.bulk import Encoded, encode_images
from clipworks.encode.precision import Precision
from clipworks.errors import ConfigError, DataError
from clipworks.search.build import Build, Report
from clipworks.search.table import Table, exists

if TYPE_CHECKING:
    from clipworks.core.clip import Clip


@dataclass(frozen=True)
class Hit:
    """A picture that was found: `score` is its cosine with the query, in [-1, 1]."""

    path: str
    score: float
    width: int
    height: int
    caption: str | None
    digest: str


class Index:
    """An index at a path, bound to the model it was made with.

    Attributes:
        path: the folder.
        model: the model's name, by which `clipworks.load` finds it.
    """

    def __init__(self, table: Table, clip: Clip | None = None) -> None:
        self._table = table
        self.path = table.path
        self.model: str = table.about["model"]
        self._clip: Clip | None = None
        if clip is not None:
            self.bind(clip)

    @classmethod
    def create(cls, path: str | Path, clip: Clip, model: str = "") -> Index:
        """An empty index for pictures that `clip` embeds; `model` is its name, by default that of its config.

        Raises:
            DataError: if something is at that path.
        """
        about = {"model": model or clip.config.name, "fingerprint": fingerprint(clip), "width": clip.width}
        return cls(Table.create(Path(path), clip.width, about), clip)

    @classmethod
    def open(cls, path: str | Path, clip: Clip | None = None) -> Index:
        """The index at a path. Without `clip`, its own model is loaded when it is first needed.

        Raises:
            DataError: if there is no index.
            ConfigError: if `clip` is not the model that the index was made with.
        """
        return cls(Table.open(Path(path)), clip)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether an index lies at a path."""
        return exists(Path(path))

    def __len__(self) -> int:
        return len(self._table)

    @property
    def clip(self) -> Clip:
        """The index's model.

        Raises:
            ConfigError: if what its name loads today are other weights.
        """
        if self._clip is None:
            return self.bind(load(self.model))
        return self._clip

    def bind(self, clip: Clip) -> Clip:
        """Work with this Clip from now on.

        Raises:
            ConfigError: if it is not the model that the index was made with.
        """
        expected, given = self._table.about["fingerprint"], fingerprint(clip)
        if given != expected:
            raise ConfigError(
                f"{self.path}: made with the model {self.model!r} ({expected[:8]}), but this is"
                f" {clip.config.name!r} ({given[:8]}); their vectors cannot be compared: build another index"
            )
        self._clip = clip
        return clip

    def info(self) -> dict[str, Any]:
        """Number of pictures, model, its fingerprint, vector width and bytes on disk."""
        return {
            "path": str(self.path),
            "pictures": len(self),
            "model": self.model,
            "fingerprint": self._table.about["fingerprint"],
            "width": self._table.about["width"],
            "bytes": sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()),
        }

    # ---------------------------------------------------------------------------------------- building

    def add(
        self,
        pictures: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        batch_size: int = 64,
        precision: Precision = "fp32",
        verify: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Report:
        """Bring the index up to date with a folder, or with the files that are named.

        Args:
            pictures: a folder (searched with all below it), a pattern, a file, or paths of files. For a
                folder, rows of files below it that are gone are removed; for named files nothing is.
            batch_size: pictures that go through the model at once.
            precision: as `clipworks.encode.bulk.encode_images` has it.
            verify: read every file, also those whose size and time of change are as they were.
            progress: is told after each commit how many pictures are done, of how many.

        Raises:
            DataError: if the folder does not exist, or holds no picture at all.
        """
        start = time.monotonic()
        place = Path(pictures) if isinstance(pictures, (str, os.PathLike)) else None
        found = (
            find_pictures(place) if place is not None else cast("Iterable[str | os.PathLike[str]]", pictures)
        )
        paths = list(dict.fromkeys(os.path.abspath(path) for path in found))  # noqa: PTH100  keeps symbolic links
        if not paths and place is not None:
            # An empty folder is more often a disk that is not mounted than a wish to forget everything.
            raise DataError(f"{place}: no pictures there; the index is left as it is")

        def encode(sources: list[str]) -> Encoded:
            options: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "on_error": "skip"}
            return encode_images(self.clip, sources, **options)

        with self._table.alone():
            build = Build(self._table, self.model, encode, verify=verify)
            build.update(paths, progress)
            if place is not None and place.is_dir():
                build.forget(os.path.join(os.path.abspath(place), ""))  # noqa: PTH100, PTH118  with its last slash
            build.finish()
        build.report.seconds = time.monotonic() - start
        return build.report

    def remove(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Take pictures out of the index; paths that are not in it do not matter."""
        self._table.delete([os.path.abspath(path) for path in paths])  # noqa: PTH100

    # ---------------------------------------------------------------------------------------- asking

    def query(
        self, text: str | None = None, *, picture: Source | None = None, k: int = 10, where: str | None = None
    ) -> list[Hit]:
        """The pictures nearest to a text, or to another picture; best first.

        Args:
            text: what to look for, in words that the model knows.
            picture: anything that `clipworks.core.pictures.read_picture` takes.
            k: how many at most.
            where: a condition on the columns (path, size, width, height, caption, …) in SQL, for instance
                `"width >= 1024 and path like '%/2024/%'"`; pictures that do not meet it are not ranked.

        Raises:
            ConfigError: unless exactly one of text and picture is given, or if `where` cannot be applied.
            PictureError: if the picture cannot be read.
        """
        if (text is None) == (picture is None):
            raise ConfigError("a query is a text or a picture: give one of them")
        if text is not None and not text.strip():
            raise ConfigError("the query is empty: say what to look for")
        features = self.clip.embed_images([picture]) if text is None else self.clip.embed_texts([text])
        return self.search(features[0].cpu().numpy(), k=k, where=where)

    def search(self, vector: np.ndarray, *, k: int = 10, where: str | None = None) -> list[Hit]:
        """The pictures nearest to a vector (D,) of the index's model, by cosine; see `query`.

        Raises:
            ConfigError: for k below one, a vector of another width, or a condition that cannot be applied.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        if np.shape(vector) != (self._table.about["width"],):
            width = self._table.about["width"]
            raise ConfigError(
                f"a query of this index is a vector ({width},), not one of shape {np.shape(vector)}"
            )
        return [
            Hit(
                path=row["path"],
                score=1.0 - float(row["_distance"]),
                width=row["width"],
                height=row["height"],
                caption=row["caption"],
                digest=row["hash"],
            )
            for row in self._table.nearest(vector, k, where)
        ]


def fingerprint(clip: Clip) -> str:
    """A hash that differs between any two trainings: of names, shapes, up to 64 values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), 64), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[places.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()
