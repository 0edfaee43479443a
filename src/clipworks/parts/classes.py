"""From labels and class names to the classes of an estimator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipworks.data.captions import ClassTexts
from clipworks.errors import ConfigError, EstimatorInputError, nearest


def settle_classes(
    given: Sequence[str] | ClassTexts | None,
    templates: Sequence[str],
    targets: NDArray[Any] | None,
    *,
    who: str,
    every_class: bool = True,
    present: NDArray[Any] | None = None,
    numbers: bool = False,
) -> tuple[NDArray[Any], ClassTexts]:
    """The classes of an estimator and what is said about each, in one sorted order.

    Args:
        given: None takes the classes from the labels, an underscore in a label becoming a blank in its name;
            names and texts are the classes whatever the labels are.
        templates: for names that are given or taken without templates.
        targets: (n,) labels, strings or whatever sorts. Integers count `given` from 0. None: there are none.
        who: the estimator, for messages.
        every_class: whether each class needs an example.
        present: the labels that count, where some have no weight.
        numbers: without labels, let integers count the names instead of the names being the labels.

    Returns:
        Labels (C,), sorted, and their texts.

    Raises:
        EstimatorInputError: for one class, an unknown label, a class without example, labels of no class.
        ConfigError: without labels and names, or for a name that is given twice.
    """
    from sklearn.utils.multiclass import check_classification_targets

    if targets is not None:
        try:
            with warnings.catch_warnings():
                # One example of each of many classes is no regression.
                warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
                check_classification_targets(targets)
        except ValueError as error:
            raise EstimatorInputError(str(error)) from error
    if given is None:
        if targets is None:
            raise ConfigError(f"{who} was given neither labels nor class_names")
        classes = np.unique(targets)
        texts = ClassTexts([str(label).replace("_", " ") for label in classes], templates=templates)
    else:
        texts = given if isinstance(given, ClassTexts) else ClassTexts(given, templates=templates)
        names = list(texts.names)
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise ConfigError(f"the class name {twice!r} is given more than once")
        if numbers if targets is None else targets.dtype.kind in "iu":
            classes = np.arange(len(names))
        else:
            classes = np.array(sorted(names))
            texts = texts.select(sorted(names))
    present = targets if present is None else present
    seen = classes if present is None or not every_class else np.unique(present)
    if len(classes) < 2 or len(seen) < 2:
        only = f"one class: {seen[0].item()!r}" if len(seen) else "none"
        raise EstimatorInputError(f"{who} needs examples of at least two classes, and was given {only}")
    if given is not None and targets is not None:
        check_labels(classes, targets)
        empty = np.setdiff1d(classes, targets)
        if every_class and len(empty):
            name = texts.names[int(np.searchsorted(classes, empty[0]))]
            raise EstimatorInputError(f"the class {name!r} has no picture; {who} needs one of each class")
    return classes, texts


def check_labels(classes: NDArray[Any], targets: NDArray[Any]) -> None:
    """Raises EstimatorInputError for a label that is none of the classes, with the nearest ones."""
    unknown = np.setdiff1d(targets, classes)
    if len(unknown):
        label = unknown[0].item()
        close = nearest(str(label), [str(known) for known in classes])
        raise EstimatorInputError(
            f"the label {label!r} is unknown: it is none of the {len(classes)} classes{close}"
        )


def places_of(classes: NDArray[Any], targets: NDArray[Any] | None, count: int) -> Tensor:
    """Labels (n,) as places in the sorted classes, (n,) int64; without labels `count` zeros.

    Raises:
        EstimatorInputError: for a label that is none of the classes.
    """
    if targets is None:
        return torch.zeros(count, dtype=torch.int64)
    check_labels(classes, targets)
    return torch.from_numpy(np.searchsorted(classes, targets).astype(np.int64))
