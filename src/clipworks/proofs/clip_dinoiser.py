"""CLIP-DINOiser: do learned correlations segment better than MaskCLIP? (Wysoczańska et al., ECCV 2024)

Generated scenes of two to four large things at 128 pixels, seen by the seedling in one window of 16 x 16
patches; the labels are the background and the twelve colors of things, which the seedling tells apart by
patches (shapes it does not). The metric is mIoU of all pixels. Each arm is measured in three ways: `all` with
the background as a word among others, `ruled` with the method's rule of the background besides, `things` on
the pixels of things alone, without that label; and by the boundaries' F at 2 pixels. Tower, text, window and
features F are the same, and so is, where `ruled`, the map of objects:

- `maskclip`, the baseline, which has no rule: `all`;
- `box`, F averaged over k x k patches, and `own`, over patches with cosines of the middle layer's f above γ;
  k and γ are chosen on training scenes;
- `masks`, the method: taught by the instance masks of the training scenes, which stand for DINO's
  localization here: `ruled`. `affinity`: taught by color and place, without any masks. `tuned`: as `masks`,
  with γ chosen on training scenes too, in place of the paper's;
- `oracle`, averaged over the true instances of the test scenes: a ceiling, not a method;
- two floors of `things`: the largest class everywhere, and the label of the whole picture everywhere.

Whether F is read with the last block's residual sum and MLP, as the paper does, or without is chosen for all
arms at once, by MaskCLIP on training scenes; `path` says which.

The claim is refuted if the method is not above MaskCLIP; that it needs correlations if it is not above
MaskCLIP with the rule, that these must be learned if not above `own`, and "more than smoothing" if not above
`box`, all three with the same rule.

The larger budget adds correlations of a convolution as it is initialized (`untrained`), cosines of F itself
(`cosines`), targets shuffled among pictures (`shuffled`), other γ, blocks and widths, and CamVid's street
scenes, if its folder is given, with their own classes and both teachers (masks of classes there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip
from clipworks.data.masked import open_masked
from clipworks.data.world.scenes import COLORS, Rendered, Scene, SceneConfig, render, sample
from clipworks.engine.randomness import own_randomness
from clipworks.evaluate.dense import boundary_f, confusion, mean_iou
from clipworks.methods.dense.base import Segmenter
from clipworks.methods.dense.clip_dinoiser import CLIPDinoiser, Convolutions, cut, pooled, with_background
from clipworks.methods.dense.maskclip import MaskCLIP
from clipworks.parts.dense import as_map, probabilities
from clipworks.parts.localization import AffinityTeacher, Crop, MaskTeacher, Targets, Teacher
from clipworks.parts.segmentation import Segmentation, read_mask
from clipworks.proofs.base import Budget, Outcome, Proof

SIDE = 128
LABELS = ("background", *COLORS)
SENTENCES = ("a {}.", "a {} thing.", "a {} shape.", "a {} object.", "a photo of a {} thing.")
BOXES, BOUNDS = (1, 3, 5, 7), (0.2, 0.4, 0.6, 0.8, 0.9)
WORLD = SceneConfig(sizes=("large",), count=(2, 4))
DELTA = 0.99
Arm = Callable[[Tensor, Tensor, range], Tensor]  # F (B, D, h, w), f (B, w, h, w), rows -> F'


@dataclass(frozen=True)
class Size:
    """How large the experiment is: scenes, those that choices are made on, and steps of the training."""

    train: int = 400
    chosen_on: int = 60
    test: int = 150
    epochs: int = 12
    width: int = 128
    variants: bool = False


SIZES: dict[Budget, Size] = {
    "small": Size(),
    "full": Size(train=500, test=400, epochs=20, variants=True),
}


@dataclass(frozen=True)
class Scenes:
    """n scenes as pictures, the instance of every pixel, and its label (0 for the background)."""

    pixels: list[Any]
    instances: list[Any]
    truth: list[Tensor]


def scenes(seed: int, which: range) -> Scenes:
    """Scenes of a world."""
    drawn = [sample(WORLD, seed, index) for index in which]
    shown = [render(scene, SIDE) for scene in drawn]
    truth = [_colors(scene, one) for scene, one in zip(drawn, shown, strict=True)]
    return Scenes([one.pixels for one in shown], [one.instances.astype(np.int64) for one in shown], truth)


def _colors(scene: Scene, shown: Rendered) -> Tensor:
    numbers = np.array([0] + [1 + COLORS.index(thing.color) for thing in scene.objects])
    return torch.from_numpy(numbers[shown.instances])


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed; its pictures are generated, with street scenes besides."""
    size = SIZES[budget]
    outcome = experiment(seed, size)
    if data is None or not size.variants:
        return outcome
    folder = data / "camvid" if (data / "camvid").is_dir() else data
    return Outcome(outcome.baseline, outcome.method, {**outcome.details, "camvid": streets(seed, folder)})


def experiment(seed: int, size: Size) -> Outcome:
    """The experiment on generated scenes, at any size."""
    clip = load("seedling")
    train, test = scenes(seed, range(size.train)), scenes(seed, range(size.train, size.train + size.test))
    some = range(min(size.chosen_on, size.train))
    asked = MaskCLIP(clip, templates=SENTENCES).ask(LABELS).vectors
    looks = {kept: Look(clip, train, some, asked, kept) for kept in (True, False)}
    residual = max(looks, key=lambda kept: looks[kept].everywhere(plain))
    chosen = looks[residual]
    k = max(BOXES, key=lambda k: chosen.everywhere(box(k)))
    gamma = max(BOUNDS, key=lambda bound: chosen.everywhere(own(bound)))

    def taught(teacher: Teacher, **changes: Any) -> CLIPDinoiser:
        return dinoiser(clip, seed, size, **changes).fit(train.pixels, teacher)

    masks, affinity = MaskTeacher(train.instances), AffinityTeacher()
    learned = {"masks": taught(masks), "affinity": taught(affinity)}
    method = learned["masks"]
    tuned = max(BOUNDS, key=lambda bound: chosen.everywhere(learned_arm(method, bound)))
    arms: dict[str, Arm] = {
        "maskclip": plain,
        "box": box(k),
        "own": own(gamma),
        "tuned": learned_arm(method, tuned),
        "oracle": oracle(test),
        **{name: learned_arm(one) for name, one in learned.items()},
    }
    if size.variants:
        with own_randomness(seed):
            untrained = Convolutions(clip.image.width, size.width)  # type: ignore[arg-type]
        arms["untrained"] = lambda features, f, _: pooled(features, untrained.directions(f), 0.2)
        arms["cosines"] = lambda features, f, _: pooled(features, F.normalize(features, dim=1), gamma)
        learned["shuffled"] = taught(MaskTeacher(_shuffled(train.instances, seed)))
        arms["shuffled"] = learned_arm(learned["shuffled"])
    look = Look(clip, test, range(size.test), asked, residual)
    found: dict[str, Any] = {
        name: look.measured(arm, learned.get(name, method)) for name, arm in arms.items()
    }
    found["floors"] = floors(clip, train, test)
    found["chosen"] = {"path": "residual" if residual else "bare", "k": k, "own": gamma, "tuned": tuned}
    found["training"] = {name: one.report_[-1] for name, one in learned.items()}
    if size.variants:
        count = len(clip.image.blocks)  # type: ignore[arg-type]
        changes: dict[str, dict[str, Any]] = {
            **{f"gamma {bound}": {"gamma": bound} for bound in (0.1, 0.4)},
            **{f"block {number}": {"block": number} for number in sorted({count // 2, count - 1})},
            **{f"width {width}": {"width": width} for width in (64, 256)},
        }
        for name, change in changes.items():
            other = taught(masks, **change)
            seen = Look(clip, test, range(size.test), asked, residual, other)
            found[name] = seen.measured(learned_arm(other), other)
    return Outcome(found["maskclip"]["all"], found["masks"]["ruled"], found)


def dinoiser(clip: Clip, seed: int, size: Size, **changes: Any) -> CLIPDinoiser:
    """The method as it is taught here: correlations of a block at two thirds of the tower."""
    settings: dict[str, Any] = {
        "size": SIDE,
        "window": SIDE,
        "templates": SENTENCES,
        "width": size.width,
        "block": round(2 * len(clip.image.blocks) / 3),  # type: ignore[arg-type]
        "views": 1,
        "epochs": size.epochs,
        "lr": 5e-4,
        "seed": seed,
        "progress": False,
    }
    return CLIPDinoiser(clip, **{**settings, **changes})


class Look:
    """Some scenes as the tower sees them: F and f, computed once for all arms.

    Args:
        clip: the model.
        these: scenes.
        rows: which of them.
        vectors: of the labels, the background's first.
        residual: how F is read.
        method: whose block f comes from.
    """

    def __init__(
        self,
        clip: Clip,
        these: Scenes,
        rows: range,
        vectors: Tensor,
        residual: bool,
        method: CLIPDinoiser | None = None,
    ) -> None:
        reader = method or dinoiser(clip, 0, Size())
        pixels = torch.from_numpy(np.stack([these.pixels[row] for row in rows])).permute(0, 3, 1, 2)
        with torch.no_grad():
            named = MaskCLIP(clip, residual=residual)
            seen = [(named.places(some), reader._features(some)[1]) for some in pixels.split(20)]
        self.features, self.f = (torch.cat(column) for column in zip(*seen, strict=True))
        self.truth, self.vectors = [these.truth[row] for row in rows], vectors

    @torch.no_grad()
    def likely(self, arm: Arm, vectors: Tensor) -> Tensor:
        """P of an arm, (n, K, h, w)."""
        parts = [range(start, min(start + 50, len(self.f))) for start in range(0, len(self.f), 50)]
        return torch.cat(
            [
                probabilities(
                    arm(self.features[rows.start : rows.stop], self.f[rows.start : rows.stop], rows), vectors
                )
                for rows in parts
            ]
        )

    def everywhere(self, arm: Arm) -> float:
        """mIoU of all pixels, the background as a word among others."""
        return _miou(_maps(self.likely(arm, self.vectors)), self.truth, len(LABELS))

    @torch.no_grad()
    def measured(self, arm: Arm, method: CLIPDinoiser) -> dict[str, float]:
        """mIoU in three ways and the boundaries' F, see the module's docstring.

        Args:
            arm: what makes F' of F.
            method: whose map of objects the rule takes.
        """
        likely = self.likely(arm, self.vectors)
        objects = method.module_.objectness(self.f).sigmoid() > 0.5
        ways = {"all": _maps(likely), "ruled": _maps(with_background(likely, objects, 0, DELTA))}
        things = [torch.where(one == 0, 255, one - 1) for one in self.truth]
        alone = _maps(self.likely(arm, self.vectors[1:]))
        return {
            **{name: _miou(maps, self.truth, len(LABELS)) for name, maps in ways.items()},
            "things": _miou(alone, things, len(COLORS)),
            **{f"boundaries {name}": _boundaries(maps, self.truth) for name, maps in ways.items()},
        }


def _boundaries(maps: list[Tensor], truth: list[Tensor]) -> float:
    return float(np.mean([boundary_f(found, one) for found, one in zip(maps, truth, strict=True)]))


def _maps(likely: Tensor) -> list[Tensor]:
    """Label maps at the pictures' size of P (n, K, h, w)."""
    names, cells = [str(number) for number in range(likely.shape[1])], (likely.shape[2], likely.shape[3])
    return [Segmentation.of(names, one, cells, (SIDE, SIDE)).map.long() for one in likely]


def _miou(maps: Iterable[Tensor], truth: Sequence[Any], classes: int, ignore: int | None = 255) -> float:
    pairs = zip(maps, truth, strict=True)
    return mean_iou(sum((confusion(*pair, classes, ignore) for pair in pairs), torch.zeros(1))).mean


# --- arms ---


def plain(features: Tensor, f: Tensor, rows: range) -> Tensor:
    """F (B, D, h, w) as it is."""
    return features


def box(k: int) -> Arm:
    """Averaged over k x k patches."""
    return lambda features, f, rows: F.avg_pool2d(features, k, 1, k // 2, count_include_pad=False)


def own(gamma: float) -> Arm:
    """Averaged over patches with cosines of f above a bound."""
    return lambda features, f, rows: pooled(features, F.normalize(f, dim=1), gamma)


def learned_arm(method: CLIPDinoiser, gamma: float | None = None) -> Arm:
    """The method's F', by its own γ or another."""
    bound = method.gamma if gamma is None else gamma
    return lambda features, f, rows: pooled(features, method.module_.directions(f), bound)


def oracle(these: Scenes) -> Arm:
    """Averaged over the true instances."""
    teacher = MaskTeacher(these.instances)

    def arm(features: Tensor, f: Tensor, rows: range) -> Tensor:
        grid = (features.shape[2], features.shape[3])
        crops = [Crop(row, 0, (SIDE, SIDE), (0, 0, SIDE, SIDE), False) for row in rows]
        weights = cut(teacher.targets(features, grid, crops).pairs.float(), 0)
        mixed = weights @ features.flatten(2).mT / weights.sum(dim=2, keepdim=True)
        return as_map(mixed, grid)

    return arm


def _shuffled(instances: list[Any], seed: int) -> list[Any]:
    order = np.random.default_rng(seed).permutation(len(instances))
    return [instances[row] for row in order]


def floors(clip: Clip, train: Scenes, test: Scenes) -> dict[str, float]:
    """mIoU of the color that covers most of the training scenes, and of the whole picture's label."""
    shares = torch.bincount(torch.cat([one.flatten() for one in train.truth]), minlength=len(LABELS))[1:]
    vectors = MaskCLIP(clip, templates=SENTENCES).ask(COLORS).vectors
    whole = (clip.embed_images(test.pixels) @ vectors.mT).argmax(dim=1)
    truth = [torch.where(one == 0, 255, one - 1) for one in test.truth]
    largest = [torch.full_like(one, int(shares.argmax())) for one in truth]
    named = [torch.full_like(one, int(label)) for one, label in zip(truth, whole, strict=True)]
    return {
        "largest class": _miou(largest, truth, len(COLORS)),
        "picture's label": _miou(named, truth, len(COLORS)),
    }


# --- street scenes ---


class ClassMasks(MaskTeacher):
    """Masks of classes in which everything is an object."""

    def targets(self, images: Tensor, grid: tuple[int, int], crops: Sequence[Crop]) -> Targets:
        """See `Teacher`."""
        said = super().targets(images, grid, crops)
        return Targets(said.pairs, torch.ones_like(said.objects))


def streets(seed: int, folder: Path) -> dict[str, float]:
    """mIoU on CamVid's test part."""
    clip, train, test = load("seedling"), open_masked(folder, "train"), open_masked(folder, "test")
    names, ignore = list(test.classes.names if test.classes else []), test.ignore
    truth = [torch.from_numpy(read_mask(one)) for one in test.masks]

    def measured(method: Segmenter) -> float:
        found = method.segment_all(test.images, names)
        maps = (one.map.long() for one in found if isinstance(one, Segmentation))
        return _miou(maps, truth, len(names), ignore)

    teachers: dict[str, Teacher] = {"masks": ClassMasks(train.masks), "affinity": AffinityTeacher()}
    arms: dict[str, Segmenter] = {
        "maskclip": MaskCLIP(clip, templates=SENTENCES, size=SIDE, window=SIDE),
        **{
            name: dinoiser(clip, seed, Size(epochs=10), views=4).fit(train.images, teacher)
            for name, teacher in teachers.items()
        },
    }
    return {name: measured(method) for name, method in arms.items()}


PROOF = Proof(
    slug="clip-dinoiser",
    claim="Features averaged over places whose correlations a convolution has learned to read from CLIP "
    "itself, with a learned background, segment better than MaskCLIP's as they are.",
    baseline="MaskCLIP on the same features",
    method="CLIP-DINOiser, taught by instance masks of training scenes in place of DINO",
    metric="mIoU of the background and twelve colors of things in generated scenes",
    run=run,
    controls={
        "maskclip.ruled": "the correlations: MaskCLIP with the learned background",
        "box.ruled": "that it matters which places are averaged: a box of neighbors, the same background",
        "own.ruled": "learned correlations: cosines that the middle layer has, the same background",
        "affinity.ruled": "a teacher that knows things: color and place alone",
    },
)
