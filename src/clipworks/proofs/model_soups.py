"""Model soups: better than the best run away from home, and not only for being nearer to the start?

(Wortsman et al., ICML 2022.) The seedling with a linear probe on top is fine-tuned several times, on single
shapes of 20 classes in one style, from one start with learning rates over a factor of 30. The runs are
measured at home, in that style, and under shift, in four others:

- the start; the run that is best on held-out pictures; the mean of the runs; the mean of their logits;
- uniform soup, greedy soup, greedy in the given order, uniform without the largest learning rate;
- WiSE-FT of the best run, its share chosen on the held-out pictures, and at the distances from the start that
  the two soups have: what being nearer to the start explains;
- two runs of which each began at a start of its own (another random last block, and a probe of that),
  averaged: what a shared start is needed for.

With the full budget also one run at the best rate that is as long as all runs together, and a uniform soup of
runs at that rate which differ in their seeds alone.

Expected: the uniform soup above the best run under shift; greedy at or above it at home, by a point at most;
WiSE-FT at equal distance explains a part of it; runs of several starts fall together. The claim is refuted if
neither soup is above the best run under shift; the verdict is on the uniform one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected, Source
from clipworks.data.splits import examples_of, world_style
from clipworks.evaluate.fewshot import few_shot
from clipworks.methods.adapt.model_soups import FineTuned, average, digest, distance, greedy
from clipworks.parts.features import pixels_of
from clipworks.parts.interpolate import interpolate
from clipworks.proofs.base import Budget, Outcome, Proof
from clipworks.proofs.gda import labels_of

HOME, AWAY = "flat", ("sketch", "photo", "inverted", "watercolor")
LR, SPREAD, BATCH = 1e-4, 30.0, 16  # with larger batches the small budget would have too few steps
SHARES = (0.25, 0.5, 0.75, 1.0)
State = Mapping[str, Tensor]
Logits = Mapping[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        shots: training pictures a class, at most.
        held, test: pictures; `shift` in each of the other styles.
        runs: with a learning rate each.
        epochs: of a run.
        further: whether the arms that need further training are measured.
    """

    shots: int
    held: int
    test: int
    shift: int
    runs: int
    epochs: int
    further: bool = False


SIZES: dict[Budget, Size] = {
    "small": Size(shots=10, held=100, test=100, shift=50, runs=4, epochs=2),
    "full": Size(shots=50, held=1000, test=1000, shift=500, runs=8, epochs=6, further=True),
}


@dataclass(frozen=True)
class Labeled:
    """Pixels (n, 3, H, W), bytes, and labels (n,)."""

    pixels: Tensor
    labels: NDArray[np.int64]

    def accuracy(self, logits: Tensor) -> float:
        """In [0, 1], of logits (n, C)."""
        return float((logits.argmax(dim=1).numpy() == self.labels).mean())


@dataclass(frozen=True)
class Measure:
    """What any weights of one model are worth.

    Attributes:
        model: that the weights are put into.
        start: θ₀.
        held, tests: pictures, the latter by style.
        known: what was measured, since several arms may be the same weights.
    """

    model: FineTuned
    start: State
    held: Labeled
    tests: Mapping[str, Labeled]
    known: dict[tuple[bytes, str], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, weights: State, parts: Mapping[str, Labeled]) -> Logits:
        """(n, C) of each part."""
        name, found = digest(weights), {}
        for part, data in parts.items():
            if (name, part) not in self.known:
                self.model._restore(weights)
                logits = [self.model._logits(self.model._encode(some)) for some in data.pixels.split(128)]
                self.known[name, part] = torch.cat(logits)
            found[part] = self.known[name, part]
        return found

    def on_held(self, weights: State) -> float:
        """Accuracy on the held-out pictures."""
        return self.held.accuracy(self.logits(weights, {"held": self.held})["held"])

    def on_tests(self, weights: State) -> Logits:
        """Logits by style."""
        return self.logits(weights, self.tests)

    def accuracies(self, logits: Logits) -> dict[str, float]:
        """At home, and the mean over the other styles."""
        each = {style: data.accuracy(logits[style]) for style, data in self.tests.items()}
        return {"home": each[HOME], "shift": float(np.mean([each[style] for style in AWAY]))}

    def arm(self, weights: State) -> dict[str, float]:
        """Accuracies and ‖θ − θ₀‖."""
        return {**self.accuracies(self.on_tests(weights)), "distance": distance(weights, self.start)}


@dataclass(frozen=True)
class Runs:
    """Makes runs of one start.

    Attributes:
        clip, classes, train: what is fine-tuned to what, on what.
        epochs: of a run, unless it is told otherwise.
    """

    clip: Clip
    classes: ClassTexts
    train: Labeled
    epochs: int

    def tuned(self, lr: float, seed: int, epochs: int | None = None) -> FineTuned:
        """A run."""
        settings: dict[str, Any] = {"lr": lr, "seed": seed, "epochs": epochs or self.epochs}
        settings["batch_size"] = BATCH
        made = FineTuned(self.clip, self.classes, head="probe", progress=False, **settings)
        return made.fit(self.train.pixels, self.train.labels)

    def start(self, run: FineTuned) -> State:
        """θ₀ of a run: the frozen tower with its probe."""
        shots = run._read(self.train.pixels, self.train.labels, None)
        with torch.no_grad(), run._undisturbed():
            return {f"module_.{name}": tensor for name, tensor in run._prepare(shots).state_dict().items()}


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated."""
    return experiment(seed, SIZES[budget])


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment at any size."""
    clip = load("seedling")
    side = clip.preprocessing.image_size
    # One seed gives all styles the same classes.
    splits = {style: world_style(style, side, seed) for style in (HOME, *AWAY)}
    home = splits[HOME]
    drawn = few_shot(labels_of(home.train), size.shots, seed, on_short="all").train
    runs = Runs(clip, home.classes, labeled(clip, home.train, drawn), size.epochs)
    tests = {style: labeled(clip, splits[style].test, range(size.shift)) for style in AWAY}
    tests[HOME] = labeled(clip, home.test, range(size.test))
    rates = [float(LR * SPREAD**step) for step in np.linspace(-0.5, 0.5, size.runs)]
    models = [runs.tuned(rate, seed + number) for number, rate in enumerate(rates)]
    weights = [weights_of(model) for model in models]
    held = labeled(clip, home.validation, range(size.held))
    measure = Measure(models[0], runs.start(models[0]), held, tests)

    soup = greedy(weights, measure.on_held)
    best = soup.members[0]
    logits = [measure.on_tests(one) for one in weights]
    each = [measure.accuracies(one) for one in logits]
    ensemble = {style: torch.stack([one[style] for one in logits]).mean(dim=0) for style in tests}
    line = [interpolate(measure.start, weights[best], share) for share in SHARES]
    strangers = [weights_of(stranger(runs, seed, number)) for number in range(2)]
    found: dict[str, Any] = {
        "start": measure.arm(measure.start),
        "best": measure.arm(weights[best]),
        "mean": {name: float(np.mean([one[name] for one in each])) for name in ("home", "shift")},
        "ensemble": measure.accuracies(ensemble),
        "uniform": measure.arm(average(weights)),
        "greedy": measure.arm(soup.weights),
        "greedy_in_order": measure.arm(in_order(weights, soup.accuracies, measure)),
        "without_largest": measure.arm(average(weights[:-1])),
        "wise_ft": measure.arm(max(line, key=measure.on_held)),
        "strangers": measure.arm(average(strangers)),
        "a_stranger": measure.arm(strangers[0]),
    }
    for name in ("uniform", "greedy"):
        # The distance grows in proportion to the share.
        share = found[name]["distance"] / found["best"]["distance"]
        found[f"as_near_as_{name}"] = measure.arm(interpolate(measure.start, weights[best], share))
    if size.further:
        longer = runs.tuned(rates[best], seed + best, size.runs * size.epochs)
        seeds = [runs.tuned(rates[best], seed + 100 + number) for number in range(size.runs)]
        found["longer"] = measure.arm(weights_of(longer))
        found["seeds_only"] = measure.arm(average([weights_of(one) for one in seeds]))
    found["runs"] = [{"lr": rate, **one} for rate, one in zip(rates, each, strict=True)]
    found["held"] = {"runs": list(soup.accuracies), "greedy": measure.on_held(soup.weights)}
    found["ingredients"] = len(soup.members)
    return Outcome(baseline=found["best"]["shift"], method=found["uniform"]["shift"], details=found)


def labeled(clip: Clip, source: Source, rows: Sequence[int] | NDArray[np.int64]) -> Labeled:
    """Some pictures of a source."""
    pictures, labels = examples_of(Selected(source, rows))
    return Labeled(torch.cat(list(pixels_of(pictures, clip.preprocessing, 64))), labels)


def weights_of(model: FineTuned) -> dict[str, Tensor]:
    """A copy of what was learned, tensors of any shape, which stays when the model is given other weights."""
    return {name: tensor.clone() for name, tensor in model._learned().items()}


def stranger(runs: Runs, seed: int, number: int) -> FineTuned:
    """A run that begins with a random last block and a probe of it."""
    other, generator = load("seedling"), torch.Generator().manual_seed(1000 * seed + number)
    blocks: Any = other.image.blocks
    with torch.no_grad():
        for parameter in blocks[-1].parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=float(parameter.std()), generator=generator)
    return Runs(other, runs.classes, runs.train, runs.epochs).tuned(LR, seed + number)


def in_order(weights: Sequence[State], alone: Sequence[float], measure: Measure) -> State:
    """Greedy without sorting: the soup begins with the first run."""
    soup, members, best = weights[0], [0], alone[0]
    for place in range(1, len(weights)):
        tried = average([weights[i] for i in [*members, place]])
        found = measure.on_held(tried)
        if found > best:
            soup, members, best = tried, [*members, place], found
    return soup


PROOF = Proof(
    slug="model-soups",
    claim="The average of fine-tuned models is better than the best of them on styles none was tuned on.",
    baseline="the run that is best on held-out pictures",
    method="the uniform soup of all runs",
    metric="mean accuracy in four other styles",
    run=run,
    controls={
        "start.shift": "the fine-tuning",
        "as_near_as_uniform.shift": "all runs but the best, which is as near to the start by interpolation",
        "strangers.shift": "the shared start, and all but two runs",
    },
)
