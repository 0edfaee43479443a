"""PromptKD: does a small image tower learn new classes from a tuned large one, without labels? (CVPR 2024)

Single shapes of the generated world, 20 classes, in a style that the seedling was not trained on. The large
model is the seedling, tuned by `PromptSRC` on labeled pictures of the first ten classes (base). The small one
is the seedling with half of the pixels a side, a quarter of the patches. Arms:

- the small one, zero-shot, and tuned as the large one was, with the same labels;
- the teacher, which is what can be reached;
- PromptKD on unlabeled pictures of all classes, and `base_pictures`: of base classes alone, as many steps;
- with the full budget also without prompts (`projector_alone`), without projector and with the small one's
  own class vectors (`prompts_alone`), with the untuned large one as teacher, with hard labels, and with fewer
  pictures.

Pictures of base classes are told apart among these, and so are those of the new classes. Nothing is chosen on
any test picture: the last epoch counts. The claim is refuted if on new classes PromptKD is no better than the
small one's zero-shot. What only pictures of new classes bring is the difference to `base_pictures`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected
from clipworks.data.splits import examples_of, world_style
from clipworks.evaluate.fewshot import few_shot, harmonic_mean
from clipworks.methods.adapt.base import Adapter
from clipworks.methods.adapt.promptkd import PromptKD, PromptSRC, Teacher
from clipworks.methods.adapt.zero_shot import ZeroShot
from clipworks.parts.shots import Shots, Step
from clipworks.proofs.base import Budget, Outcome, Proof

STYLE = "sketch"


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        shots: labeled pictures of each base class.
        tuning: epochs of PromptSRC.
        pictures: without labels.
        epochs: of the distillation.
        test: pictures.
        fewer: further numbers of pictures without labels.
        controls: whether all arms are measured.
    """

    shots: int
    tuning: int
    pictures: int
    epochs: int
    test: int
    fewer: tuple[int, ...] = ()
    controls: bool = False


SIZES: dict[Budget, Size] = {
    "small": Size(16, tuning=4, pictures=600, epochs=8, test=600),
    "full": Size(16, tuning=20, pictures=1000, epochs=20, test=1000, fewer=(125, 500), controls=True),
}


class ProjectorAlone(PromptKD):
    """The control without prompts."""

    slug = "projector-alone"

    def _prepare(self, shots: Shots | None) -> nn.Module:
        return nn.ModuleDict({**super()._prepare(shots), "vision": nn.ParameterList()})  # type: ignore[dict-item]


class PromptsAlone(PromptKD):
    """The control without projector, against the student's own class vectors."""

    slug = "prompts-alone"

    def _prepare(self, shots: Shots | None) -> nn.Module:
        self.text_vectors_ = Teacher(self.clip, self.texts_).vectors()
        return nn.ModuleDict({**super()._prepare(shots), "projector": nn.Identity()})  # type: ignore[dict-item]


class HardLabels(PromptKD):
    """The control that learns the teacher's first choice."""

    slug = "hard-labels"

    def _said(self, step: Step) -> Tensor:
        p = super()._said(step)
        return 1e3 * nn.functional.one_hot(p.argmax(dim=1), p.shape[1]).float()


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    large = load("seedling")
    small = smaller(large)
    splits = world_style(STYLE, large.preprocessing.image_size, seed)
    base = len(splits.classes) // 2
    test = examples_of(Selected(splits.test, range(size.test)))
    found: dict[str, Any] = {}
    scores: dict[str, Any] = {}

    def measured(name: str, estimator: Adapter) -> Adapter:
        scores[name] = scores_of(estimator, splits.classes, test[0])
        found[name] = halves(scores[name], test[1], base)
        return estimator

    pictures, labels = examples_of(splits.train)
    of_base = np.flatnonzero(labels < base)
    drawn = of_base[few_shot(labels[of_base], size.shots, seed).train]
    shown, told = [pictures[row] for row in drawn], labels[drawn]

    def tuned(clip: Clip) -> PromptSRC:
        settings: dict[str, Any] = {"epochs": size.tuning, "average_at": 0.75 * size.tuning, "batch_size": 8}
        known = splits.classes.select(range(base))
        made = PromptSRC(clip, known, lr=0.005, seed=seed, progress=False, **settings)
        return made.fit(shown, told).for_classes(splits.classes)

    def distilled(
        rows: Any, form: type[PromptKD] = PromptKD, teacher: Any = None, epochs: int = size.epochs
    ) -> PromptKD:
        source = large_tuned if teacher is None else teacher
        made = form(
            small, splits.classes, teacher=source, seed=seed, progress=False, epochs=epochs, **SMALL_SCALE
        )
        return made.fit([pictures[row] for row in rows])

    measured("zero_shot", ZeroShot(small, splits.classes).fit())
    measured("tuned", tuned(small))
    large_tuned = measured("teacher", tuned(large))
    rows = np.arange(size.pictures)
    measured("promptkd", distilled(rows))
    found["agreement"] = float((scores["promptkd"].argmax(1) == scores["teacher"].argmax(1)).mean())
    few = rows[labels[rows] < base]
    measured("base_pictures", distilled(few, epochs=round(size.epochs * len(rows) / len(few))))
    if size.controls:
        measured("projector_alone", distilled(rows, ProjectorAlone))
        measured("prompts_alone", distilled(rows, PromptsAlone))
        measured("hard_labels", distilled(rows, HardLabels))
        measured("untuned_teacher", distilled(rows, teacher=large))
    for count in size.fewer:
        epochs = round(size.epochs * len(rows) / count)
        measured(f"pictures_{count}", distilled(rows[:count], epochs=epochs))
    return Outcome(baseline=found["zero_shot"]["new"], method=found["promptkd"]["new"], details=found)


# The card's batch and learning rate for pictures of 64 pixels.
SMALL_SCALE: dict[str, Any] = {"views": 2, "batch_size": 32, "lr": 0.005, "crop": (0.5, 1.0)}


def smaller(clip: Clip) -> Clip:
    """The same weights on pictures of half the side."""
    twin = copy.deepcopy(clip)
    twin.preprocessing = replace(clip.preprocessing, image_size=clip.preprocessing.image_size // 2)
    return twin


def scores_of(estimator: Adapter, classes: ClassTexts, pictures: Any) -> Any:
    """Probabilities (n, C), columns in the order of `classes`."""
    names = list(estimator.texts_.names)
    return estimator.predict_proba(pictures)[:, [names.index(name) for name in classes.names]]


def halves(scores: Any, labels: Any, base: int) -> dict[str, float]:
    """Accuracy on pictures of base classes among these, of new classes among those, and the harmonic mean."""
    right = []
    for of_half, first, last in ((labels < base, 0, base), (labels >= base, base, None)):
        likeliest = scores[of_half][:, first:last].argmax(axis=1) + first
        right.append(float((likeliest == labels[of_half]).mean()))
    return {"base": right[0], "new": right[1], "h": harmonic_mean(*right)}


PROOF = Proof(
    slug="promptkd",
    claim="On unlabeled pictures a small image tower learns, from a large one tuned on other classes, to "
    "tell new classes apart better than it does zero-shot.",
    baseline="the small model, zero-shot",
    method="PromptKD",
    metric="accuracy on new classes",
    run=run,
    controls={"base_pictures.new": "unlabeled pictures of the new classes"},
)
