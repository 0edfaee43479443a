"""Model soups: averaging weights of fine-tuned models. Wortsman et al., ICML 2022.

Fine-tune one start θ₀ several times with different settings; instead of keeping the best run θ_i, average:

    uniform   θ = 1/k·Σ_i θ_i
    greedy    runs in the order of their held-out accuracy A; the soup is the first, and each next run is
              averaged in with equal weight if A rises, else left out
    learned   θ_p = Σ_i softmax(α_p)_i θ_{i,p} for each named tensor p (or one α for all), logits times β;
              α and β minimize the cross-entropy on the held-out set

A model is the image tower f with a head y = W·f̂ + b on its unit vectors, without a logit scale: at the start
W = s·T with the class vectors T and CLIP's scale s (the paper's 100), or a linear probe of the frozen tower
(the released runs). Everything is trained end to end. Given features, soups are made of heads alone.

Sums are fp64 and cast once, in the order of the runs' contents: equal runs give themselves back bit for bit,
and the order in which runs are given does not matter. Weights are read from disk tensor by tensor, so that
memory holds the average and the model that it is measured in, whatever the number of runs; greedy reads the
runs of a soup again for each trial instead of keeping a sum. Integer buffers must agree. Statistics of batch
normalization stay as they were at the start in runs of `FineTuned`; those of runs that went on measuring them
do not average well, of which there is a warning, and `recalibrate` measures them anew.

The recipe is the authors' script (AdamW, decay 0.1, cosine by step, gradient norm 1, plain pictures). Its 500
warm-up steps are a tenth of all steps here, as few shots have fewer than 500. Runs of `ModelSoup` differ in
learning rate and order; the paper's also in augmentation, decay and length, which `soup_of` takes as well.
"""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from clipworks.checkpoints import layouts, rules
from clipworks.checkpoints.files import read
from clipworks.checkpoints.own import write_safetensors
from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.engine.randomness import own_randomness
from clipworks.errors import CheckpointError, ConfigError, require
from clipworks.methods.adapt.base import ImageTower, TrainedAdapter
from clipworks.parts import fitted
from clipworks.parts.descent import hold_out
from clipworks.parts.features import pixels_of
from clipworks.parts.schedules import Schedule
from clipworks.parts.shots import Shots

State = Mapping[str, Tensor]
Kind = Literal["greedy", "uniform"]
F = TypeVar("F", bound="FineTuned")
S = TypeVar("S", bound="ModelSoup")

PROBE_C = 31.6  # of unit vectors: 0.316 of CLIP's example, whose features are about 10 long


class Stored(Mapping[str, Tensor]):
    """The weights of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(path, framework="pt")
            self._names = list(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_weights(path: str | PathLike[str]) -> State:
    """The weights of a file; of safetensors each is read when it is asked for, others are mapped.

    Raises:
        CheckpointError: if it is no file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return Stored(path) if path.suffix == ".safetensors" else read(path).weights


def digest(weights: State) -> bytes:
    """16 bytes that stand for all names and numbers of some weights."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def average(ingredients: Sequence[State]) -> dict[str, Tensor]:
    """1/k·Σ_i θ_i of k state dicts, tensors of any shape, bit for bit the same in whatever order they come.

    Raises:
        ConfigError: if there are none.
        CheckpointError: for weights that have no average, naming the tensor.
    """
    check(ingredients)
    return _mean(sorted(ingredients, key=digest))


def _mean(ingredients: Sequence[State]) -> dict[str, Tensor]:
    """The average, summed in this order."""
    return {name: _combined(name, ingredients, [1.0] * len(ingredients)) for name in ingredients[0]}


def _combined(name: str, ingredients: Sequence[State], weights: Sequence[float]) -> Tensor:
    """Σ_i w_i θ_i / Σ_i w_i of one tensor; of one that holds no floats, what all of them have."""
    first = ingredients[0][name]
    if not first.is_floating_point():
        if any(not torch.equal(first, other[name]) for other in ingredients[1:]):
            raise CheckpointError(f"{name} holds whole numbers that differ, which have no average")
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.float64)
    for weight, ingredient in zip(weights, ingredients, strict=True):
        total.add_(ingredient[name].to(total), alpha=weight)
    if not total.isfinite().all():
        raise CheckpointError(f"{name} holds values that are not finite in one of the ingredients")
    return (total / sum(weights)).to(first.dtype)


def check(ingredients: Sequence[State]) -> None:
    """Whether weights have the same names, shapes and types.

    Raises:
        ConfigError: if there are none.
        CheckpointError: naming the first tensor that differs.
    """
    if not ingredients:
        raise ConfigError("a soup needs at least one ingredient")
    first = ingredients[0]
    for number, other in enumerate(ingredients[1:], start=2):
        odd = sorted(first.keys() ^ other.keys())
        if odd:
            raise CheckpointError(
                f"{odd[0]} is in ingredient 1 or {number} alone: these are different models"
            )
        for name in first:
            one, two = first[name], other[name]
            if one.shape != two.shape or one.is_floating_point() != two.is_floating_point():
                raise CheckpointError(
                    f"{name} is {tuple(one.shape)} {one.dtype} in ingredient 1 and {tuple(two.shape)} "
                    f"{two.dtype} in ingredient {number}: these are different models"
                )


@dataclass(frozen=True)
class Soup:
    """An average of weights, and how it came about.

    Attributes:
        weights: θ.
        members: places of the ingredients in it, in the order in which they were added.
        accuracies: A of each ingredient; empty if nothing was measured.
        history: (place, A with it, whether it was kept) of each trial of greedy, the first alone.
    """

    weights: dict[str, Tensor]
    members: tuple[int, ...]
    accuracies: tuple[float, ...] = ()
    history: tuple[tuple[int, float, bool], ...] = ()


def uniform(ingredients: Sequence[State]) -> Soup:
    """The average of all."""
    return Soup(average(ingredients), tuple(range(len(ingredients))))


def greedy(ingredients: Sequence[State], accuracy: Callable[[State], float], strict: bool = True) -> Soup:
    """The average of those that raise the held-out accuracy, tried from the best down.

    Args:
        ingredients: k state dicts of one start.
        accuracy: A of weights; called 2k − 1 times.
        strict: an ingredient must raise A, as in the authors' code; else it may leave it, as in the paper.

    Raises:
        ConfigError: if there are none.
        CheckpointError: for weights that have no average.
    """
    check(ingredients)
    digests = [digest(one) for one in ingredients]
    alone = [accuracy(one) for one in ingredients]
    order = sorted(range(len(ingredients)), key=lambda place: (-alone[place], digests[place]))

    def mean(places: Sequence[int]) -> dict[str, Tensor]:
        return _mean([ingredients[place] for place in sorted(places, key=lambda place: digests[place])])

    members, best = [order[0]], alone[order[0]]
    history = [(order[0], best, True)]
    for place in order[1:]:
        found = accuracy(mean([*members, place]))
        kept = found > best or (found == best and not strict)
        history.append((place, found, kept))
        if kept:
            members, best = [*members, place], found
    return Soup(mean(members), tuple(members), tuple(alone), tuple(history))


def learned(
    ingredients: Sequence[State],
    loss: Callable[[dict[str, Tensor], Tensor, Any], Tensor],
    batches: Callable[[int], Iterable[Any]],
    *,
    lr: float = 0.05,
    epochs: int = 5,
    by_tensor: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A soup whose shares gradient descent finds; the authors advise greedy, which costs less.

    Memory holds one set of weights with its gradient and one tensor of one ingredient:
    ∂L/∂softmax(α_p)_i = ⟨∂L/∂θ_p, θ_{i,p}⟩ is formed tensor by tensor.

    Args:
        ingredients: k state dicts of one start.
        loss: of weights (that want gradients), β (0-D) and a batch, 0-D.
        batches: those of an epoch.
        lr, epochs: AdamW without decay.
        by_tensor: an α for each tensor, or one for all.

    Returns:
        The weights, and the shares (k,) of each tensor of floats.
    """
    check(ingredients)
    names = [name for name in ingredients[0] if ingredients[0][name].is_floating_point()]
    others = {name: _combined(name, ingredients, []) for name in ingredients[0] if name not in names}
    rows = {name: row if by_tensor else 0 for row, name in enumerate(names)}
    alpha = torch.zeros(len(names) if by_tensor else 1, len(ingredients), dtype=torch.float64)
    alpha, beta = nn.Parameter(alpha), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([alpha, beta], lr=lr, weight_decay=0.0)

    def soup() -> dict[str, Tensor]:
        shares = alpha.detach().softmax(dim=1).tolist()
        return {name: _combined(name, ingredients, shares[rows[name]]) for name in names}

    for epoch in range(epochs):
        for batch in batches(epoch):
            weights = {name: tensor.requires_grad_() for name, tensor in soup().items()}
            optimizer.zero_grad()
            loss({**others, **weights}, beta, batch).backward()
            back = torch.zeros_like(alpha)
            for name, tensor in weights.items():
                if tensor.grad is not None:
                    along = [
                        (tensor.grad.double() * one[name].to(tensor).double()).sum() for one in ingredients
                    ]
                    back[rows[name]] += torch.stack(along).cpu()
            alpha.softmax(dim=1).backward(back)
            optimizer.step()
    shares = alpha.detach().softmax(dim=1)
    return {**others, **soup()}, {name: shares[rows[name]] for name in names}


def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the statistics of batch normalization anew, in place: means over the batches of each batch's.

    Args:
        module: a tower with averaged weights.
        batches: what it reads, (B, 3, H, W) each, from what the runs were trained on.
    """
    update_bn(batches, module)


def _warn_of_statistics(ingredients: Sequence[State]) -> None:
    first, *others = ingredients
    for name in first:
        if name.endswith("running_var") and any(not torch.equal(first[name], one[name]) for one in others):
            warnings.warn(
                f"{name} differs between the ingredients: averaged statistics of batch normalization do not "
                "fit averaged weights; measure them anew with recalibrate",
                stacklevel=4,
            )
            return


def distance(one: State, other: State) -> float:
    """‖θ − θ'‖ over all tensors of floats."""
    squares = (
        float((one[name].double() - other[name].to(one[name]).double()).square().sum())
        for name in one
        if one[name].is_floating_point()
    )
    return math.sqrt(sum(squares))


def soup_of(
    paths: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    accuracy: Callable[[State], float] | None = None,
    *,
    strict: bool = True,
) -> Soup:
    """A soup of checkpoints on disk, any models of one start with the same names of weights.

        clip = clipworks.load("run-1/clip")

        def accuracy(weights):                      # on pictures that nothing was trained on
            clip.load_state_dict(dict(weights))
            return zero_shot(clip, batches(), classes).top1

        soup_of([f"run-{i}/clip/model.safetensors" for i in range(1, 9)], "soup.safetensors", accuracy)

    Args:
        paths: files of weights.
        out: the safetensors file that is written.
        accuracy: of weights on held-out data, for a greedy soup; None makes a uniform one.
        strict: see `greedy`.

    Raises:
        CheckpointError: for a file that cannot be read, or weights that have no average, naming the tensor.
    """
    ingredients = [open_weights(path) for path in paths]
    soup = uniform(ingredients) if accuracy is None else greedy(ingredients, accuracy, strict)
    _warn_of_statistics([ingredients[place] for place in soup.members])
    write_safetensors(soup.weights, Path(out), "clipworks")
    return soup


@dataclass(eq=False, repr=False, kw_only=True)
class FineTuned(TrainedAdapter):
    """The image tower and a head over its classes, fine-tuned end to end: what soups are made of.

    Args:
        head: starts from the `text` of the classes, or from a linear `probe` of the frozen tower.
    """

    head: Literal["text", "probe"] = "text"
    lr: float = 2e-5
    epochs: int = 8
    batch_size: int = 64

    slug: ClassVar[str] = "fine-tuned"
    image_tower: ClassVar[ImageTower] = "either"
    schedule: ClassVar[Schedule] = Schedule(
        "adamw", weight_decay=0.1, decay="step", warmup_share=0.1, clip_norm=1.0
    )

    def _prepare(self, shots: Shots | None) -> nn.Module:
        if self.head not in ("text", "probe"):
            raise ConfigError(f"head must be 'text' or 'probe', not {self.head!r}")
        texts = super()._class_features()
        head = nn.utils.skip_init(nn.Linear, texts.shape[1], texts.shape[0], device=texts.device)
        bias = self.clip.bias if self.clip is not None else None
        with torch.no_grad():
            head.weight.copy_(self.scale * texts)
            head.bias.fill_(0.0 if bias is None else float(bias))
            if self.head == "probe" and shots is not None:
                for parameter, value in zip((head.weight, head.bias), self._probed(shots), strict=True):
                    parameter.copy_(value)
        parts: dict[str, nn.Module] = {"head": head}
        if self.fitted_on_ == "pictures":
            parts["image"] = copy.deepcopy(self._model.image).requires_grad_(True)
        made = nn.ModuleDict(parts).eval()
        if shots is not None:
            self.start_ = digest(made.state_dict()).hex()
        return made

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        super()._fit(shots, validation)
        self.pictures_ = list(shots.keys)

    def _probed(self, shots: Shots) -> tuple[Tensor, Tensor]:
        """W (C, D) and b (C,) of logistic regression on the frozen tower's unit vectors."""
        linear = require("sklearn.linear_model", extra="adapt", purpose="a probe")
        rows = torch.arange(len(shots)).split(64)
        encode = super()._encode
        seen = [shots.plain(some).to(self._device) for some in rows]
        vectors = unit(torch.cat([encode(one) if one.ndim == 4 else one for one in seen])).cpu()
        probe = linear.LogisticRegression(C=PROBE_C, max_iter=1000)
        probe.fit(vectors.double().numpy(), shots.labels.numpy(), shots.weights.double().numpy())
        weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
        # Of two classes scikit-learn keeps the difference.
        return (
            (weight, bias)
            if len(weight) > 1
            else (
                torch.cat([-weight, weight]) / 2,
                torch.cat([-bias, bias]) / 2,
            )
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        if self.fitted_on_ == "features":
            return super()._encode(pixels)
        features: Tensor = self.module_["image"](pixels)
        return features

    def class_features(self, image_features: Tensor | None = None) -> Tensor:
        """The rows of the head (C, D), made unit."""
        self._check_fitted()
        return unit(self.module_["head"].weight.detach())

    def _logits(self, features: Tensor) -> Tensor:
        head, vectors = self.module_["head"], unit(features)
        return torch.addmm(head.bias.to(vectors), vectors, head.weight.to(vectors).mT)

    @classmethod
    def from_checkpoint(
        cls: type[F],
        path: str | PathLike[str],
        clip: Clip,
        class_names: Sequence[str] | ClassTexts,
        **settings: Any,
    ) -> F:
        """One of the authors' fine-tuned models, `model_7.pt`: a bare state dict without text blocks.

        Args:
            path: the file.
            clip: the model it was fine-tuned from, OpenAI's ViT-B/32 for the 72; what the file holds of the
                text tower was never trained and must be this one's.
            class_names: in the order of the head's rows.
            settings: of the estimator.

        Raises:
            CheckpointError: if it holds something else, or was fine-tuned from another Clip.
        """
        made = cls(clip, class_names, **settings)
        made.classes_, made.texts_ = made._settle(None, numbers=True)
        made.fitted_on_, made.n_features_in_ = "pictures", clip.width
        made._restore({f"module_.{name}": tensor for name, tensor in _released(path, clip).items()})
        return made


def _released(path: str | PathLike[str], clip: Clip) -> dict[str, Tensor]:
    """`head.` and `image.` weights of a released file."""
    theirs = {name.removeprefix("model."): tensor for name, tensor in read(Path(path)).weights.items()}
    own, shapes = clip.state_dict(), {name: tensor.shape for name, tensor in clip.state_dict().items()}
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        key = f"classification_head.{kind}"
        if key not in theirs:
            raise CheckpointError(f"{path}: {key} is missing; no fine-tuned classifier of the authors' code")
        found[f"head.{kind}"] = theirs.pop(key)
    there = [one for one in layouts.rules("openai", clip.config) if not one.ours.startswith("text.blocks.")]
    weights = rules.read(there, theirs, shapes, str(path))
    for name, tensor in weights.items():
        if name.startswith("image."):
            found[name] = tensor
        elif not torch.allclose(tensor.float(), own[name].cpu().float(), atol=1e-3):
            raise CheckpointError(f"{path}: {name} is not the Clip's: it was fine-tuned from another one")
    return found


@dataclass(eq=False, repr=False, kw_only=True)
class ModelSoup(FineTuned):
    """Several fine-tunings of one start, averaged.

    After `fit`, `members_` are the places of the runs in the soup, `accuracies_` the held-out accuracy of
    each run, `history_` the trials, and `distance_` is ‖θ − θ₀‖. A greedy soup measures on the validation
    data; without such a fifth of each class is held out.

    Args:
        kind: `greedy`, or `uniform`, which measures nothing.
        runs: k; their learning rates lie evenly, on a logarithmic scale, around `lr`.
        spread: the largest learning rate over the smallest.
        strict: see `greedy`.
    """

    kind: Kind = "greedy"
    runs: int = 4
    spread: float = 30.0
    strict: bool = True

    slug: ClassVar[str] = "model-soups"

    @property
    def rates(self) -> list[float]:
        """The learning rate of each run."""
        steps = [
            number / max(1, self.runs - 1) - 0.5 if self.runs > 1 else 0.0 for number in range(self.runs)
        ]
        return [self.lr * self.spread**step for step in steps]

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        if self.kind not in ("greedy", "uniform"):
            raise ConfigError(f"kind must be 'greedy' or 'uniform', not {self.kind!r}")
        if self.runs < 1 or not self.spread >= 1:
            raise ConfigError(f"runs and spread must be at least 1, not {self.runs} and {self.spread}")
        if self.kind == "greedy" and validation is None:
            shots, validation = hold_out(shots, self.seed)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.safetensors" for number in range(self.runs)]
            for number, (path, rate) in enumerate(zip(paths, self.rates, strict=True)):
                run = copy.copy(self)
                run.__dict__["_kept"] = {}
                run.lr, run.seed, run.patience = rate, self.seed + number, None
                with own_randomness(run.seed):
                    TrainedAdapter._fit(run, shots, None)
                write_safetensors(run._learned(), path, "clipworks")
            self.losses_, self.start_ = run.losses_, run.start_
            held = validation if self.kind == "greedy" else None
            self._stir([open_weights(path) for path in paths], shots, held)

    def _stir(self, ingredients: Sequence[State], shots: Shots | None, held: Shots | None) -> None:
        """Average `module_.…` weights, greedily if there is something to measure on, and keep the result."""

        def measured(held: Shots) -> Callable[[State], float]:
            def accuracy(weights: State) -> float:
                self._restore(weights)
                return self._accuracy(held)

            return accuracy

        soup = uniform(ingredients) if held is None else greedy(ingredients, measured(held), self.strict)
        _warn_of_statistics([ingredients[place] for place in soup.members])
        self._restore(soup.weights)
        self.members_, self.accuracies_, self.history_ = soup.members, soup.accuracies, soup.history
        if shots is not None:
            start = {f"module_.{name}": value for name, value in self._prepare(shots).state_dict().items()}
            self.distance_ = distance(soup.weights, start)

    def recalibrate(self: S, images: Sequence[Any]) -> S:
        """Measure the statistics of batch normalization anew on training pictures, in batches of 64.

        Raises:
            ConfigError: for a soup of heads, which have none.
        """
        self._check_fitted()
        if self.fitted_on_ != "pictures":
            raise ConfigError("there is nothing to recalibrate: only the head was fitted, on features")
        batches = pixels_of(list(images), self._model.preprocessing, 64)
        recalibrate(self.module_["image"], (batch.to(self._device) for batch in batches))
        self._cache.clear()
        return self

    @classmethod
    def from_runs(
        cls: type[S],
        folders: Sequence[str | PathLike[str]],
        clip: Clip,
        validation: tuple[Any, Any] | None = None,
        *,
        force: bool = False,
        **settings: Any,
    ) -> S:
        """A soup of runs of `FineTuned` that were saved, of any settings.

        Args:
            folders: what `save` wrote.
            clip: the Clip of all of them.
            validation: pictures or features with labels that no run was fitted on; None makes a uniform soup.
            force: take runs with different starts, which as a rule have no good average.
            settings: of the soup: `strict`.

        Warns:
            UserWarning: if a run was fitted on a picture of the validation data.

        Raises:
            CheckpointError: if a run is of another Clip, of other classes, or began at another start.
        """
        if not folders:
            raise ConfigError("a soup needs at least one run")
        runs = [fitted.read(Path(folder))[0] for folder in folders]
        first = FineTuned.load(folders[0], clip)
        for folder, about in zip(folders, runs, strict=True):
            adapted = about.get("clip") or {}
            if adapted.get("fingerprint") != (runs[0].get("clip") or {}).get("fingerprint"):
                raise CheckpointError(f"{folder}: was fitted to another Clip than {folders[0]}")
            values, others = (one.get("values", {}) for one in (about, runs[0]))
            if about.get("classes") != runs[0].get("classes") or values.get("texts_") != others.get("texts_"):
                raise CheckpointError(f"{folder}: has other classes than {folders[0]}")
            if values.get("start_") != first.start_ and not force:
                raise CheckpointError(
                    f"{folder}: began at another start than {folders[0]}; runs of different starts have no "
                    "good average (force=True averages them all the same)"
                )
        kind: Kind = "uniform" if validation is None else "greedy"
        own = {name: value for name, value in first.get_params(deep=False).items() if name != "clip"}
        made = cls(clip, **{**own, "kind": kind, "runs": len(folders), **settings})
        for name in ("classes_", "texts_", "fitted_on_", "n_features_in_", "start_"):
            setattr(made, name, getattr(first, name))
        made.losses_ = first.losses_
        held = None if validation is None else made._read_more(*validation)
        for folder, about in zip(folders, runs, strict=True):
            seen = about.get("values", {}).get("pictures_", ())
            if known := {*seen} & {*(held.keys if held is not None else ())}:
                warnings.warn(
                    f"{folder} was fitted on {len(known)} of the validation pictures: others must choose",
                    stacklevel=2,
                )
        with made._undisturbed():
            made._stir([open_weights(Path(folder) / fitted.LEARNED) for folder in folders], None, held)
        return made
