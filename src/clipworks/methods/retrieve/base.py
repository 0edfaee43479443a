"""The contract of the family `retrieve`: what ranks a gallery for a query.

Queries and galleries are unit vectors (n, D) and (m, D) of the Clip that the ranker is given, so that what
was encoded once (a feature store, a search index) need not be encoded again. A method has

- `fit(gallery, labels=None) -> self`: learns what there is to learn, and keeps the gallery, so that the verbs
  below can be called without one;
- `similarity(queries, gallery=None) -> (n, m)`: fp32 and finite, more is nearer;
- `rank(queries, gallery=None, k=None, exclude=None) -> Ranking`: the best k of each row of the similarity,
  equal ones in the order of the gallery, without what is excluded.

With labels of the gallery a ranker also classifies by its nearest neighbors: `predict`, `predict_proba`,
`score`.

Every method of the family keeps these: a query's row does not depend on the queries beside it; with the
gallery's order the columns change theirs and nothing else; the same queries and the same seed give the same
numbers, and no global generator is touched; the Clip stays bit-identical and gets no gradients; `get_params`
and `set_params` are those of scikit-learn, whose `clone` shares the Clip; `save(folder)` writes settings and
what was learned, and `load(folder, clip)` gives a ranker of the same similarities and refuses another Clip;
features of a wrong shape are refused by an error that names it.

A method is a dataclass over `Ranker` with its settings as fields, and defines `_similarity`, and `_learned`
and `_restore` if it learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clipworks.errors import ConfigError, ShapeError
from clipworks.parts.method import Method

R = TypeVar("R", bound="Ranker")


@dataclass(frozen=True)
class Ranking:
    """The best of a gallery for each query, best first.

    Attributes:
        indices: (n, k) int64, rows of the gallery.
        scores: (n, k) fp32.
    """

    indices: Tensor
    scores: Tensor


@dataclass(eq=False, repr=False)
class Ranker(Method):
    """What ranks a gallery; the module's docstring is the contract.

    Args:
        clip: the model; it is never changed.
    """

    gallery_: Tensor | None = field(default=None, init=False)
    labels_: NDArray[Any] | None = field(default=None, init=False)

    # --- what a user calls ---

    def fit(self: R, gallery: Tensor, labels: Sequence[Any] | NDArray[Any] | None = None) -> R:
        """Keep a gallery (m, D), unit length, with m labels if it shall classify.

        Raises:
            ShapeError: for features of another shape, or not one label for each.
        """
        self.gallery_ = self._checked(gallery, "the gallery")
        if labels is not None and len(labels) != len(gallery):
            raise ShapeError(f"{len(labels)} labels were given for a gallery of {len(gallery)}")
        self.labels_ = None if labels is None else np.asarray(labels)
        return self

    def similarity(self, queries: Tensor, gallery: Tensor | None = None) -> Tensor:
        """Queries (n, D) and a gallery (m, D), both of unit length, to (n, m) fp32; more is nearer.

        Raises:
            ShapeError: for features of another shape.
            ConfigError: without a gallery, here or in `fit`.
        """
        return self._similarity(self._checked(queries, "the queries"), self._gallery(gallery)).float()

    def rank(
        self,
        queries: Tensor,
        gallery: Tensor | None = None,
        k: int | None = None,
        exclude: Tensor | None = None,
    ) -> Ranking:
        """The best k for each of the queries (n, D), best first.

        Args:
            queries: unit length.
            gallery: (m, D), unit length; None for that of `fit`.
            k: how many; None for all that are not excluded.
            exclude: (n,) int64, for each query a row of the gallery that does not count, itself for instance;
                -1 for none.

        Raises:
            ShapeError: for features or rows of another shape.
            ConfigError: without a gallery, or for k below one.
        """
        scores = self.similarity(queries, gallery)
        count = scores.shape[1]
        if k is not None and k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        if exclude is not None:
            if exclude.shape != (len(scores),):
                raise ShapeError(
                    f"exclude must be ({len(scores)},), a row for each query, not {tuple(exclude.shape)}"
                )
            exclude = exclude.to(scores.device)
            rows = (exclude >= 0).nonzero()[:, 0]
            scores = scores.index_put((rows, exclude[rows]), scores.new_tensor(float("-inf")))
            count -= int(len(rows) == len(scores))
        ordered = scores.sort(dim=1, descending=True, stable=True)
        kept = min(count, k or count)
        return Ranking(ordered.indices[:, :kept], ordered.values[:, :kept])

    def predict_proba(self, queries: Tensor, k: int = 1) -> NDArray[np.float64]:
        """Of queries (n, D): the share (n, C) of each of `classes_` among their k nearest.

        Raises:
            ConfigError: if `fit` was given no labels.
        """
        if self.labels_ is None:
            raise ConfigError("a gallery without labels classifies nothing: give labels to fit")
        near = self.labels_[self.rank(queries, k=k).indices.cpu().numpy()]
        return (near[:, :, None] == self.classes_).mean(axis=1)

    def predict(self, queries: Tensor, k: int = 1) -> NDArray[Any]:
        """Of queries (n, D): the most frequent label (n,) among their k nearest, of equal ones the first."""
        return np.asarray(self.classes_[self.predict_proba(queries, k).argmax(axis=1)])

    def score(self, queries: Tensor, labels: Sequence[Any] | NDArray[Any], k: int = 1) -> float:
        """The share of queries (n, D) whose label is predicted."""
        return float((self.predict(queries, k) == np.asarray(labels)).mean())

    @property
    def classes_(self) -> NDArray[Any]:
        """The gallery's labels, each once, in order."""
        return np.unique(np.asarray([] if self.labels_ is None else self.labels_))

    # --- what a method may define ---

    def _similarity(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Checked queries (n, D) and gallery (m, D) to (n, m)."""
        raise NotImplementedError

    # --- disk ---

    def _tensors(self) -> dict[str, Tensor]:
        return self._learned() | ({} if self.gallery_ is None else {"gallery": self.gallery_})

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.gallery_ = tensors.pop("gallery", None)
        self._restore(tensors)

    def _facts(self) -> dict[str, Any]:
        return {"labels": None if self.labels_ is None else self.labels_.tolist()}

    def _restore_facts(self, about: Mapping[str, Any]) -> None:
        self.labels_ = None if about["labels"] is None else np.asarray(about["labels"])

    # --- checks ---

    def _gallery(self, gallery: Tensor | None) -> Tensor:
        if gallery is not None:
            return self._checked(gallery, "the gallery")
        if self.gallery_ is None:
            raise ConfigError("there is nothing to rank: give a gallery, here or to fit")
        return self.gallery_

    def _checked(self, features: Tensor, what: str) -> Tensor:
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.clip.width:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ShapeError(f"{what} must be features (n, {self.clip.width}) of this Clip, not {shape}")
        return features.detach().to(self.clip.device)
