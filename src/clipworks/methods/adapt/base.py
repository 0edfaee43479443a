"""The contract of the family `adapt`: a Clip fitted to somebody's own classes, as a scikit-learn estimator.

    coop = CoOp(clip).fit(pictures, labels)       # paths, PIL, arrays, tensors, lists of them; or features
    coop.predict(["photo.jpg"])
    coop.save("run")
    coop = Adapter.load("run", clip)

What every method of the family keeps:

- **Verbs.** `fit(X, y, *, sample_weight=None, validation=None)`, `predict`, `predict_proba` (n, C), `score`;
  `image_features(X) -> (n, D)` and `class_features(image_features=None) -> (C, D)`, or (B, C, D) where a
  class looks different for every picture, both of unit length, as the adapted model has them;
  `logits(features)` of features (B, D) of the adapted image tower, raw or of unit length, (B, C).
  scikit-learn's `clone`, `GridSearchCV` and `Pipeline` work.
- **Classes.** `class_names` is None (the labels in `y` are the names), a list, or `ClassTexts`; integers in
  `y` then count its entries, strings are looked up in it. `classes_` is sorted, `texts_` in the same order.
- **Input.** A table of features (n, D) needs no picture and, if the method reads no text, no Clip. `fit` also
  takes features of several views, (n, V, D). What cannot be used raises `EstimatorInputError` and says why.
- **The image tower** is `frozen` (the method works on features, from a store if it has one, and never
  encodes a picture twice), `trained` (it needs pictures) or `either` (trained if it is given pictures). The
  Clip that was given is bit-identical after every `fit`: what is learned lives in the estimator. `clone`
  shares the Clip.
- **Randomness** comes from `seed` alone and touches no global generator. The same data in the same order and
  the same seed give the same estimator.
- **Disk.** `save(folder)` writes what was learned and the settings, nothing of the Clip; `load` refuses
  another Clip. Settings that are no plain values (a teacher, a callable) are given to `load` again.

A method is a dataclass over `Adapter` or `TrainedAdapter` with its settings as fields, and defines

    training-free  `_fit(shots, validation)`: keeps tensors as attributes whose names end in `_`
    trained        `_prepare(shots) -> nn.Module`: what is learned, kept as `module_` (`shots` is None where
                   it is made to be loaded into); if needed `_loss(step)`, `_backward(step)`, `_parameters()`
    both           those of `_encode(pixels)`, `_class_features()`, `_logits(features)` that it changes; all
                   of them differentiable

This file is long because all that a user calls and all that a method may define stands in it.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, fields, replace
from inspect import isroutine
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.data.captions import PHOTO_TEMPLATE, ClassTexts
from clipworks.engine.precision import computing, resolve
from clipworks.engine.randomness import own_randomness
from clipworks.engine.recipe import Precision
from clipworks.errors import CheckpointError, ConfigError, EstimatorInputError, nearest, require
from clipworks.evaluate.zeroshot import class_features
from clipworks.parts import fitted
from clipworks.parts.classes import places_of, settle_classes
from clipworks.parts.descent import descend, hold_out
from clipworks.parts.features import (
    FeatureStore,
    Views,
    content,
    encode_views,
    fingerprint,
    listed,
    pixels_of,
)
from clipworks.parts.frozen import undisturbed
from clipworks.parts.progress import with_bar
from clipworks.parts.schedules import DASSL, Schedule
from clipworks.parts.shots import Shots, Step, are_features, as_table, view_features, weights_of

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError:  # the module can be imported, but no estimator can be made

    class BaseEstimator:  # type: ignore[no-redef]
        """Stands in for scikit-learn's, and says that it is missing."""

        def __new__(cls, *_: Any, **__: Any) -> Any:
            """Raises MissingExtra."""
            require("sklearn.base", extra="adapt", purpose=cls.__name__)

    class ClassifierMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's."""


__all__ = ["Adapter", "TrainedAdapter", "method_named", "methods", "print_of", "slug_of"]

A = TypeVar("A", bound="Adapter")
T = TypeVar("T", bound="TrainedAdapter")
ImageTower = Literal["frozen", "trained", "either"]
BATCH = 64  # pictures encoded at once
NO_CLIP_SCALE = 100.0  # of logits where there is no Clip to say it; the released models' own


@dataclass(eq=False, repr=False)
class Adapter(ClassifierMixin, BaseEstimator):
    """A Clip adapted to some classes; the module's docstring is the contract.

    Args:
        clip: the model; it is never changed. None will do for features where no text is read.
        class_names: None, names, or `ClassTexts`.
        template: a sentence with `{}`, or several; `ClassTexts` bring their own.
        views: how many random views of each picture are encoded for `fit`; 0 is the plain picture.
        crop: least and largest share of the area that a random view keeps.
        store: where features are kept, a `FeatureStore` or its folder; None encodes anew in every `fit`.
        precision: of the towers: `fp32`, `bf16`, or `auto`.
        seed: of all randomness.
        progress: show bars; None does so on a terminal.
    """

    clip: Clip | None = None
    class_names: Sequence[str] | ClassTexts | None = None
    _: KW_ONLY
    template: str | Sequence[str] = PHOTO_TEMPLATE
    views: int = 0
    crop: tuple[float, float] = (0.5, 1.0)
    store: FeatureStore | str | PathLike[str] | None = None
    precision: Precision = "fp32"
    seed: int = 0
    progress: bool | None = None

    # Does the method leave the image tower as it is?
    image_tower: ClassVar[ImageTower] = "frozen"
    # Does it need the class names in words, and so a Clip?
    reads_text: ClassVar[bool] = True
    # Does `fit` take labels: it must (True), it may (None), it must not (False)?
    labels_needed: ClassVar[bool | None] = True
    # Does each class need an example?
    every_class: ClassVar[bool] = True
    # Does what was learned serve other class names, through `for_classes`?
    retargets: ClassVar[bool] = False
    # Settings that `clone` hands on as they are.
    shared: ClassVar[tuple[str, ...]] = ("clip", "store")
    # Settings that only `fit` needs, which `load` does not ask for.
    only_to_fit: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in vars(cls).get("__annotations__", {}):
            inherited = [vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)]
            if any(isinstance(one, property) or isroutine(one) for one in inherited):
                # A setting `encoder`, say, would be taken for the name of the tower in the store.
                raise TypeError(f"{cls.__name__}: the family has its own {name}; call the setting otherwise")

    # --- what a user calls ---

    def fit(
        self: A,
        X: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        validation: tuple[Any, Any] | None = None,
    ) -> A:
        """Fit to n labeled pictures or features.

        Args:
            X: pictures, features (n, D), or features of several views (n, V, D).
            y: n labels, strings or integers; see the contract on `class_names`.
            sample_weight: (n,) how much each counts.
            validation: further pictures or features with labels, for what a method chooses by accuracy.

        Raises:
            EstimatorInputError: if data and labels cannot be used.
            ConfigError: if settings cannot work, or there is no Clip where one is needed.
        """
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)
        self._cache.clear()
        if self.reads_text and self.clip is None:
            raise ConfigError(f"{type(self).__name__} reads class names and needs a Clip: give clip=…")
        shots = self._read(X, y, sample_weight)
        held = None if validation is None else self._read_more(*validation)
        with self._undisturbed(), own_randomness(self.seed):
            self._fit(shots, held)
        self._cache.clear()
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The likeliest class of each picture or row of features, (n,) of the labels that `fit` was given."""
        likeliest = self._scores(X).argmax(dim=1).numpy()
        return cast(NDArray[Any], self.classes_[likeliest])

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities (n, C), columns in the order of `classes_`; rows sum to one."""
        return self._scores(X).double().softmax(dim=1).numpy()

    def image_features(self, X: Any) -> Tensor:
        """Unit vectors (n, D) of pictures, as the adapted image tower gives them; of features, themselves."""
        return unit(self._vectors(X))

    def class_features(self, image_features: Tensor | None = None) -> Tensor:
        """Unit vectors (C, D) of the classes, or (B, C, D) where they depend on `image_features` (B, D)."""
        self._check_fitted()
        if self._learning:
            return self._class_features()
        with torch.no_grad(), self._undisturbed():
            return self._once("class features", self._class_features)

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, D) of the adapted image tower, raw or of unit length, to logits (B, C)."""
        self._check_fitted()
        with torch.no_grad(), self._undisturbed():
            return self._logits(features.to(self._device))

    def for_classes(self: A, class_names: Sequence[str] | ClassTexts) -> A:
        """The fitted estimator for other class names; what was learned is shared.

        Raises:
            ConfigError: if what was learned belongs to its classes.
        """
        self._check_fitted()
        if not self.retargets:
            raise ConfigError(f"what {type(self).__name__} learned belongs to its classes; fit it to others")
        twin = copy.copy(self)
        twin.class_names = class_names
        twin.classes_, twin.texts_ = twin._settle(None, numbers=self.classes_.dtype.kind in "iu")
        return twin

    @property
    def trainable_parameters(self) -> int:
        """How many numbers were fitted; 0 for a training-free method."""
        return 0

    # --- what a method may define ---

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        """Learn; what is kept are attributes whose names end in `_`."""
        raise NotImplementedError

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), bytes or floats in [0, 1], to raw features (B, D)."""
        features: Tensor = self._model.image(pixels)
        return features

    def _class_features(self) -> Tensor:
        """Unit vectors (C, D) of the classes; by default CLIP's own, the mean over all their sentences."""
        return self._once("zero-shot", lambda: class_features(self._model, self.texts_))

    def _logits(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C); by default scaled cosines with the classes' vectors."""
        vectors = unit(features)
        classes = self.class_features(vectors).to(vectors.dtype)
        if classes.ndim == 3:
            cosines = (classes @ vectors[:, :, None])[:, :, 0]
        else:
            cosines = vectors @ classes.mT
        bias = None if self.clip is None else self.clip.bias
        return self.scale * cosines if bias is None else self.scale * cosines + float(bias)

    @property
    def scale(self) -> float:
        """s, by which cosines become logits: the Clip's own, frozen."""
        return NO_CLIP_SCALE if self.clip is None else math.exp(float(self.clip.scale.detach()))

    @property
    def encoder(self) -> str:
        """A name for what `_encode` computes, by which a store tells features of different models apart."""
        clip = self._model
        return fingerprint(clip.image, clip.config.image, clip.preprocessing, self._precision)

    # --- reading ---

    def _read(self, X: Any, y: Any, sample_weight: Any) -> Shots:
        """Data and labels of `fit`; settles `classes_`, `texts_`, `n_features_in_` and `fitted_on_`."""
        name = type(self).__name__
        if y is None and self.labels_needed:
            raise EstimatorInputError(f"{name} requires y to be passed, but the target y is None")
        if y is not None and self.labels_needed is False:
            raise ConfigError(f"{name} learns without labels; leave y out and give class_names")
        several = view_features(X)
        pictures = several is None and not are_features(X)
        self.fitted_on_ = "pictures" if pictures else "features"
        features: Tensor | None = None
        if pictures:
            images = self._several(X)
            targets, count = None if y is None else self._targets(y, len(images)), len(images)
        elif self.image_tower == "trained":
            raise EstimatorInputError(f"{name} trains with pictures, and was given features")
        else:
            features, targets = self._features(X if several is None else several, y, reset=True)
            count = len(features)
        weights, mean = weights_of(sample_weight, count)
        present = None if targets is None else targets[weights.numpy() > 0]
        self.classes_, self.texts_ = self._settle(targets, present)
        labels = places_of(self.classes_, targets, count)
        if features is not None:
            return Shots(labels, weights, features, mean_weight=mean)
        views = Views(self.views, (self.crop[0], self.crop[1]), seed=self.seed)
        shots = replace(self._from_pictures(images, labels, weights, views), mean_weight=mean)
        self.n_features_in_ = self._model.width if shots.features is None else shots.features.shape[-1]
        return shots

    def _read_more(self, X: Any, y: Any) -> Shots:
        """Validation data: plain views, with labels among `classes_`."""
        several = view_features(X)
        if several is not None or are_features(X):
            features, targets = self._features(X if several is None else several, y, reset=False)
            count = len(features)
            return Shots(places_of(self.classes_, targets, count), torch.ones(count), features)
        images = self._several(X)
        labels = places_of(self.classes_, self._targets(y, len(images)), len(images))
        return self._from_pictures(images, labels, torch.ones(len(images)), Views())

    def _from_pictures(self, images: list[Any], labels: Tensor, weights: Tensor, views: Views) -> Shots:
        if self.image_tower == "frozen":
            return Shots(labels, weights, self._encoded(images, views), views=views)
        pixels = torch.cat(list(pixels_of(images, self._model.preprocessing, BATCH)))
        keys = [content(one).hex() for one in images]
        return Shots(labels, weights, pixels=pixels, keys=keys, views=views)

    def _encoded(self, images: list[Any], views: Views) -> Tensor:
        """Raw features (n, V, D) of pictures, from the store where it has them."""
        clip, store = self._model, self._store

        def encode(pixels: Tensor) -> Tensor:
            with computing(self._precision, clip.device):
                return self._encode(pixels.to(clip.device))

        with self._undisturbed():
            return encode_views(
                images,
                encode,
                clip.preprocessing,
                views,
                store=store,
                space="" if store is None else self.encoder,
                batch_size=BATCH,
                bar=lambda batches, total: with_bar(batches, total, "encoding pictures", self.progress),
            )

    def _vectors(self, X: Any) -> Tensor:
        """Raw features (n, D), on the CPU, of what `predict` is given."""
        self._check_fitted()
        retrained = self.image_tower != "frozen" and self.fitted_on_ == "pictures"
        if are_features(X):
            if retrained:
                raise EstimatorInputError(
                    f"{type(self).__name__} changed the image tower: it predicts from pictures, not features"
                )
            return self._features(X, None, reset=False)[0][:, 0]
        images = self._several(X)
        if not retrained:
            return self._encoded(images, Views())[:, 0]
        batches = pixels_of(images, self._model.preprocessing, BATCH)
        batches = with_bar(batches, len(images), "encoding pictures", self.progress)
        with torch.no_grad(), self._undisturbed(), computing(self._precision, self._device):
            return torch.cat([self._encode(pixels.to(self._device)).float().cpu() for pixels in batches])

    @torch.no_grad()
    def _scores(self, X: Any) -> Tensor:
        """Logits (n, C) on the CPU."""
        features = self._vectors(X)
        with self._undisturbed():
            return torch.cat([self._logits(part.to(self._device)).cpu() for part in features.split(4096)])

    def _several(self, X: Any) -> list[Any]:
        images = listed(X)
        if not images:
            raise EstimatorInputError(f"{type(self).__name__} was given no pictures: the list is empty")
        return images

    def _features(self, X: Any, y: Any, *, reset: bool) -> tuple[Tensor, NDArray[Any] | None]:
        """Features (n, V, D), fp32 or fp64, and labels (n,), as scikit-learn checks them."""
        from sklearn.utils.validation import validate_data

        several = isinstance(X, Tensor) and X.ndim == 3
        table, dtypes = as_table(X.flatten(0, 1) if several else X), [np.float64, np.float32]
        targets = as_table(y)
        try:
            if several or y is None:
                table = validate_data(self, table, dtype=dtypes, reset=reset)
            else:
                table, targets = validate_data(self, table, targets, dtype=dtypes, reset=reset)
        except ValueError as error:
            raise EstimatorInputError(" ".join(str(error).partition("\n\n")[0].split("\n"))) from error
        # Arrays that may not be written to (memory-mapped ones) are copied.
        features = torch.from_numpy(table if table.flags.writeable else table.copy())
        if not several:
            return features[:, None], targets
        targets = None if y is None else self._targets(y, len(X))
        return features.unflatten(0, tuple(X.shape[:2])), targets

    def _targets(self, y: Any, count: int) -> NDArray[Any]:
        """Labels (n,) of n pictures."""
        from sklearn.utils import column_or_1d

        try:
            targets: NDArray[Any] = column_or_1d(as_table(y), warn=True)
        except ValueError as error:
            raise EstimatorInputError(str(error)) from error
        if len(targets) != count:
            which = "labels without picture" if len(targets) > count else "pictures without label"
            raise EstimatorInputError(f"{count} pictures and {len(targets)} labels: there are {which}")
        return targets

    def _settle(
        self,
        targets: NDArray[Any] | None,
        present: NDArray[Any] | None = None,
        *,
        numbers: bool = False,
    ) -> tuple[NDArray[Any], ClassTexts]:
        return settle_classes(
            self.class_names,
            (self.template,) if isinstance(self.template, str) else tuple(self.template),
            targets,
            who=type(self).__name__,
            every_class=self.every_class,
            present=present,
            numbers=numbers,
        )

    # --- state ---

    @property
    def _model(self) -> Clip:
        if self.clip is None:
            raise ConfigError(f"{type(self).__name__} was given pictures and needs a Clip: give clip=…")
        return self.clip

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.clip is None else self.clip.device

    @property
    def _precision(self) -> Literal["fp32", "bf16"]:
        return resolve(self.precision, self._device)

    @property
    def _store(self) -> FeatureStore | None:
        if self.store is None or isinstance(self.store, FeatureStore):
            return self.store
        folder = self.store
        store: FeatureStore = self._once(f"store {folder}", lambda: FeatureStore(folder))
        return store

    @property
    def _cache(self) -> dict[str, Any]:
        """What is computed once from the fitted state; emptied when that changes, never copied or saved."""
        cache: dict[str, Any] = self.__dict__.setdefault("_kept", {})
        return cache

    @property
    def _learning(self) -> bool:
        return "learning" in self._cache

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def _check_fitted(self) -> None:
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self, "classes_")

    def _undisturbed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.clip is None else undisturbed(self.clip)

    def __repr__(self, **_: Any) -> str:
        default = {item.name: item.default for item in fields(self)}
        shown = [
            f"{name}={value.config.name if isinstance(value, Clip) else value!r}"
            for name, value in self.get_params(deep=False).items()
            if value is not default[name]
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_kept"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.labels_needed is True
        return tags

    def __sklearn_clone__(self: A) -> A:
        """An unfitted estimator with the same settings; the Clip and the store are shared, not copied."""
        from sklearn.base import clone

        settings = {
            name: value if name in self.shared else clone(value, safe=False)
            for name, value in self.get_params(deep=False).items()
        }
        twin = type(self)(**settings)
        if hasattr(self, "_metadata_request"):
            twin._metadata_request = copy.deepcopy(self._metadata_request)
        return twin

    # --- disk ---

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write what was learned and the settings to a folder; see `parts/fitted`."""
        self._check_fitted()
        settings = {k: v for k, v in self.get_params(deep=False).items() if k != "clip"}
        held, others = fitted.split_plain(settings)
        state = {name: value for name, value in vars(self).items() if name.endswith("_")}
        about = {
            "method": slug_of(type(self)),
            "settings": held,
            "to_give": [name for name in others if name not in ("store", *self.only_to_fit)],
            "classes": self.classes_.tolist(),
            "values": fitted.split_plain({k: v for k, v in state.items() if k != "classes_"})[0],
            "clip": None
            if self.clip is None
            else {"name": self.clip.config.name, "fingerprint": fingerprint(self.clip)},
        }
        fitted.write(Path(folder), about, self._learned())
        return Path(folder)

    @classmethod
    def load(cls: type[A], folder: str | PathLike[str], clip: Clip | None = None, **settings: Any) -> A:
        """Read what `save` wrote.

        Args:
            folder: where it is.
            clip: the Clip that was adapted.
            settings: those that could not be written, or others for prediction (`store`, `progress` …).

        Raises:
            CheckpointError: if files are missing or damaged, or it was fitted to another Clip.
            ConfigError: for a setting that has to be given.
        """
        about, tensors = fitted.read(Path(folder))
        try:
            method = method_named(str(about["method"]))
            if not issubclass(method, cls):
                raise CheckpointError(f"{folder}: holds a {method.__name__}, not a {cls.__name__}")
            lacking = [name for name in about["to_give"] if name not in settings]
            if lacking:
                raise ConfigError(f"{folder}: {lacking[0]} could not be saved; give it to load")
            known = about["clip"]
            if known is not None and (clip is None or fingerprint(clip) != known["fingerprint"]):
                raise CheckpointError(
                    f"{folder}: was fitted to the Clip {known['name']!r}, and "
                    + ("none was given" if clip is None else "the weights of this one are others")
                )
            given = {name: fitted.unplain(value) for name, value in about["settings"].items()}
            loaded = method(clip, **{**given, **settings})
            loaded.classes_ = np.array(list(about["classes"]))
            for name, value in about["values"].items():
                setattr(loaded, name, fitted.unplain(value))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: not the description of an estimator ({error})") from error
        loaded._restore(tensors)
        return loaded

    def _learned(self) -> dict[str, Tensor]:
        """What is saved: tensors and modules among the attributes whose names end in `_`."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if name.endswith("_") and isinstance(value, Tensor):
                found[name] = value
            elif name.endswith("_") and isinstance(value, nn.Module):
                found |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
        return found

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `_learned`."""
        for name, tensor in tensors.items():
            if "." not in name:
                setattr(self, name, tensor.to(self._device))


@dataclass(eq=False, repr=False, kw_only=True)
class TrainedAdapter(Adapter):
    """An adapter that gradient descent fits, on features or on pictures.

    Args:
        lr: the highest learning rate.
        epochs: passes over the examples.
        batch_size: examples a step.
        patience: None deploys the last epoch. A number deploys the epoch that is best on the validation data,
            and stops after so many without a better one; without such data a fifth of each class is held out.
    """

    lr: float = 0.002
    epochs: int = 50
    batch_size: int = 32
    patience: int | None = None

    schedule: ClassVar[Schedule] = DASSL

    # --- what a method may define ---

    def _prepare(self, shots: Shots | None) -> nn.Module:
        """What is learned, at its start; where it is made to be loaded into, `shots` is None."""
        raise NotImplementedError

    def _parameters(self) -> list[dict[str, Any]]:
        """Groups for the optimizer; by default all parameters of `module_`."""
        return [{"params": [p for p in self.module_.parameters() if p.requires_grad]}]

    def _loss(self, step: Step) -> Tensor:
        """0-D, fp32; by default the weighted cross-entropy of the logits."""
        logits = self._logits(self._seen(step.inputs)).float()
        return (F.cross_entropy(logits, step.labels, reduction="none") * step.weights).mean()

    def _backward(self, step: Step) -> Tensor:
        """Leave gradients in the parameters; returns the loss, detached."""
        loss = self._loss(step)
        loss.backward()
        return loss.detach()

    def _epochs(self, shots: Shots) -> int:
        """How many epochs; by default the setting."""
        return self.epochs

    # --- the fit ---

    @property
    def trainable_parameters(self) -> int:
        """How many numbers were fitted."""
        self._check_fitted()
        return sum(p.numel() for group in self._parameters() for p in group["params"])

    def _seen(self, inputs: Tensor) -> Tensor:
        """Features (b, D) of a step's inputs: themselves, or what the tower makes of pixels."""
        return self._encode(inputs) if inputs.ndim == 4 else inputs

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        if self.patience is not None and validation is None:
            shots, validation = hold_out(shots, self.seed)
        self.module_: Any = self._prepare(shots).to(self._device)
        best: dict[str, Any] = {"accuracy": -1.0, "epoch": 0, "learned": None}

        def stop(epoch: int) -> bool:
            if self.patience is None or validation is None:
                return False
            accuracy = self._accuracy(validation)
            if accuracy > best["accuracy"]:
                best.update(accuracy=accuracy, epoch=epoch, learned=copy.deepcopy(self._learned()))
            return epoch - best["epoch"] >= self.patience

        self._cache["learning"] = True
        self.losses_ = descend(
            shots,
            self._parameters(),
            self._backward,
            self.schedule,
            lr=self.lr,
            epochs=self._epochs(shots),
            batch_size=self.batch_size,
            seed=self.seed,
            device=self._device,
            precision=self._precision,
            stop=stop,
            words=f"fitting {type(self).__name__}",
            bar=self.progress,
        )
        self._cache.clear()
        if best["learned"] is not None:
            self._restore(best["learned"])

    @torch.no_grad()
    def _accuracy(self, shots: Shots) -> float:
        """Share of examples, plain views, that are classified right as things are."""
        kept, self.__dict__["_kept"] = self._cache, {}
        right = 0
        for rows in torch.arange(len(shots)).split(256):
            logits = self._logits(self._seen(shots.plain(rows).to(self._device)))
            right += int((logits.argmax(dim=1).cpu() == shots.labels[rows]).sum())
        self.__dict__["_kept"] = kept
        return right / len(shots)

    def _learned_elsewhere(self: T, learned: Mapping[str, Tensor]) -> T:
        """This estimator as if fitted to its `class_names`, with the weights of `module_` from elsewhere.

        Raises:
            CheckpointError: if the weights do not fit.
        """
        self.classes_, self.texts_ = self._settle(None)
        self.fitted_on_, self.n_features_in_ = "pictures", self._model.width
        self._restore({f"module_.{name}": tensor for name, tensor in learned.items()})
        return self

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        super()._restore(tensors)
        if "module_" not in vars(self):
            with torch.no_grad(), self._undisturbed(), own_randomness(self.seed):
                self.module_ = self._prepare(None).to(self._device)
        own = {name.removeprefix("module_."): t for name, t in tensors.items() if name.startswith("module_.")}
        try:
            self.module_.load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"what was learned does not fit {type(self).__name__}: {reason}") from error
        self._cache.clear()


def print_of(source: Clip | Adapter) -> str:
    """32 hexadecimal digits over all that a Clip or a fitted estimator is made of."""
    if isinstance(source, Clip):
        return fingerprint(source)
    learned, holder = source._learned(), nn.Module()
    for number, tensor in enumerate(learned.values()):
        holder.register_buffer(f"t{number}", tensor.detach())
    return fingerprint(holder, sorted(learned), fingerprint(source._model))


def slug_of(method: type[Adapter]) -> str:
    """The name of a method: its class's attribute `slug`, or its file's name."""
    own: str | None = method.__dict__.get("slug")
    return own or method.__module__.rsplit(".", 1)[-1].replace("_", "-")


def methods() -> dict[str, type[Adapter]]:
    """All methods of the family by name: the first class of each file by the file's, others by their own."""
    found: dict[str, type[Adapter]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in ("__init__", "base", "comparison"):
            continue
        module = importlib.import_module(f"clipworks.methods.adapt.{path.stem}")
        for thing in vars(module).values():
            if isinstance(thing, type) and issubclass(thing, Adapter) and thing.__module__ == module.__name__:
                found.setdefault(slug_of(thing), thing)
    return found


def method_named(name: str) -> type[Adapter]:
    """The method of that name.

    Raises:
        ConfigError: if there is none, with the nearest names.
    """
    found = methods()
    if name not in found:
        raise ConfigError(f"no method {name!r}{nearest(name, found)}; there are {', '.join(sorted(found))}")
    return found[name]
