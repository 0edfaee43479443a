"""AnomalyCLIP: do two learned sentences that name no object carry over to surfaces never trained on?

Zhou et al., ICLR 2024. Half of the world's textures, half of their pictures damaged, are trained on; the
other half is the test, and one kind of damage occurs in the test alone. All arms see the same pictures, once,
at 128 pixels, and those that learn take the same steps. Which textures and which damage are held out, and all
initial values, follow the seed.

- plain: "a photo of a normal object", "a photo of a damaged object";
- ensemble: seven and five states in CLIP's simple templates, both with the value path;
- AnomalyCLIP, and without its value path;
- free: two free vectors in place of the text tower, by the same loss;
- odd: one minus the cosine of a patch with the mean patch of its picture, without training.

Expected: AnomalyCLIP above the ensemble in pixel AUROC; without the value path below it; free vectors near
it, perhaps equal at this scale; odd patches strong on regular textures. The claim is refuted if AnomalyCLIP
is not above the ensemble, that of the sentences if it is below the free vectors. With `--data`, a folder that
holds `magnetic-tile` or is such a set, all arms are also measured on its photographs, never trained on.

The larger budget also has arms that name a kind of object ("surface"), without deep words, and with masks
permuted among the pictures of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip, unit
from clipworks.core.pictures import read_picture
from clipworks.data.masked import open_masked
from clipworks.data.templates import SIMPLE_TEMPLATES
from clipworks.data.world.dataset import WorldSurfaces
from clipworks.data.world.surfaces import DEFECTS, FAMILIES, SurfaceConfig
from clipworks.evaluate.dense import average_precision, image_auroc, per_region_overlap, pixel_auroc
from clipworks.methods.dense.anomalyclip import AnomalyCLIP, Views
from clipworks.methods.dense.base import Scores
from clipworks.parts.segmentation import read_mask
from clipworks.proofs.base import Budget, Outcome, Proof

PLAIN = ("a photo of a normal object", "a photo of a damaged object")
NORMAL = (
    *("{}", "flawless {}", "perfect {}", "unblemished {}"),
    *("{} without flaw", "{} without defect", "{} without damage"),
)
DAMAGED = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        train, test: pictures.
        side: of them, in pixels.
        epochs: of what learns.
        variants: measure the further arms.
    """

    train: int = 400
    test: int = 200
    side: int = 128
    epochs: int = 15
    variants: bool = False


SIZES: dict[Budget, Size] = {"small": Size(), "full": Size(test=400, variants=True)}


@dataclass(frozen=True)
class Pictures:
    """Pictures and their masks, n of each."""

    images: list[Any]
    masks: list[Any]


class FreeVectors(AnomalyCLIP):
    """Two free vectors in place of the sentences."""

    def _prepare(self) -> nn.Module:
        module = nn.Module()
        generator = torch.Generator().manual_seed(self.seed)
        module.vectors = nn.Parameter(torch.randn(2, self.clip.width, generator=generator))
        return module

    def text_features(self) -> Tensor:
        """Both vectors, (2, D) of unit length."""
        return unit(cast(Tensor, self.module_.vectors))


class Fixed(AnomalyCLIP):
    """Sentences that are given, (2, D) of unit length, and never learned."""

    vectors: Tensor

    def text_features(self) -> Tensor:
        """Both sentences, (2, D) of unit length."""
        return self.vectors


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed."""
    size = SIZES[budget]
    train, test = surfaces(seed, size)
    targets = {"unseen": test}
    if data is not None:
        targets["magnetic_tile"] = tiles(data)
    found = experiment(load("seedling"), train, targets, seed, size)
    return Outcome(
        found["ensemble"]["unseen"]["pixel_auroc"], found["anomalyclip"]["unseen"]["pixel_auroc"], found
    )


def surfaces(seed: int, size: Size) -> tuple[Pictures, Pictures]:
    """Surfaces to train on, and others of other textures with one more kind of damage."""
    generator = np.random.default_rng(seed)
    order = [FAMILIES[place] for place in generator.permutation(len(FAMILIES))]
    held = DEFECTS[int(generator.integers(len(DEFECTS)))]
    half = len(order) // 2
    seen = SurfaceConfig(families=tuple(order[:half]), defects=tuple(d for d in DEFECTS if d != held))
    other = SurfaceConfig(families=tuple(order[half:]))
    return pictures(seen, 2 * seed, size.train, size.side), pictures(
        other, 2 * seed + 1, size.test, size.side
    )


def pictures(config: SurfaceConfig, seed: int, count: int, side: int) -> Pictures:
    """The first surfaces of a world."""
    world = WorldSurfaces(config, seed, count, side)
    examples = [world[index] for index in range(count)]
    return Pictures([one.image for one in examples], [one.extra["mask"] for one in examples])


def tiles(folder: Path) -> Pictures:
    """All photographs of a set with masks, at their own sizes."""
    inner = folder / "magnetic-tile"
    found = open_masked(inner if inner.is_dir() else folder)
    images = [read_picture(one) for one in found.images]
    return Pictures(images, [read_mask(mask) > 0 for mask in found.masks])


def experiment(
    clip: Clip, train: Pictures, targets: dict[str, Pictures], seed: int, size: Size
) -> dict[str, Any]:
    """What every arm reaches on every target, by arm, target and metric."""
    settings: dict[str, Any] = {"seed": seed, "epochs": size.epochs, "progress": False}
    base = AnomalyCLIP(clip, **settings)
    direct = AnomalyCLIP(clip, **settings, value_from=len(clip.image.blocks))  # type: ignore[arg-type]
    seen = base.view(train.images, train.masks)
    there = {name: base.view(one.images, one.masks) for name, one in targets.items()}
    arms: dict[str, AnomalyCLIP] = {
        "plain": fixed(clip, clip.embed_texts(list(PLAIN))),
        "ensemble": fixed(clip, ensemble(clip, "object")),
        "anomalyclip": base.fit_views(seen),
        "free": FreeVectors(clip, **settings).fit_views(seen),
    }
    if size.variants:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(seen)))
        permuted = replace(seen, masks=seen.masks[order], faulty=seen.faulty[order])  # type: ignore[index]
        arms["named"] = AnomalyCLIP(clip, **settings, noun="surface").fit_views(seen)
        arms["shallow"] = AnomalyCLIP(clip, **settings, prompt_depth=1).fit_views(seen)
        arms["permuted_masks"] = AnomalyCLIP(clip, **settings).fit_views(permuted)
    found: dict[str, Any] = {
        name: {on: measured(arm.score_views(there[on]), targets[on]) for on in targets}
        for name, arm in arms.items()
    }
    found["odd"] = {on: measured(odd(base, there[on]), targets[on]) for on in targets}
    direct.fit_views(direct.view(train.images, train.masks))
    found["without_value_path"] = {
        on: measured(direct.score_views(direct.view(one.images)), one) for on, one in targets.items()
    }
    return found


def fixed(clip: Clip, vectors: Tensor) -> Fixed:
    """A scorer by sentences (2, D)."""
    scorer = Fixed(clip, progress=False)
    scorer.vectors = vectors
    return scorer


def ensemble(clip: Clip, noun: str) -> Tensor:
    """The mean vectors (2, D) of both kinds of states in all templates."""
    rows = [
        [template.format(state.format(noun)) for template in SIMPLE_TEMPLATES for state in states]
        for states in (NORMAL, DAMAGED)
    ]
    return clip.class_features(rows, templates=("{}",))


def odd(method: AnomalyCLIP, views: Views) -> Scores:
    """Patches unlike the mean patch of their picture; a picture's score is its highest pixel."""
    z = views.places.float()
    mean = unit(z.mean(dim=(1, 2), keepdim=True))
    far = (1 - (z * mean).sum(dim=-1)).clamp(0, 1)
    seen = (method.side, method.side)
    maps = [method._map(one, seen, size) for one, size in zip(far, views.sizes, strict=True)]
    return Scores(torch.stack([one.max() for one in maps]), maps)


def measured(scores: Scores, pictures: Pictures) -> dict[str, float]:
    """Image AUROC and AP, pixel AUROC and PRO, both ways of cutting the latter."""
    faulty: Sequence[int] = [int(np.asarray(mask).any()) for mask in pictures.masks]
    return {
        "image_auroc": image_auroc(scores.image, faulty),
        "average_precision": average_precision(scores.image, faulty),
        "pixel_auroc": pixel_auroc(scores.maps, pictures.masks),
        "pro": per_region_overlap(scores.maps, pictures.masks),
        "pro_stretched": per_region_overlap(scores.maps, pictures.masks, stretched=True),
    }


PROOF = Proof(
    slug="anomalyclip",
    claim="Two learned sentences that name no object find defects on surfaces never trained on better than "
    "written sentences do.",
    baseline="an ensemble of written states and templates",
    method="AnomalyCLIP",
    metric="pixel AUROC on unseen textures",
    run=run,
    controls={
        "without_value_path.unseen.pixel_auroc": "the value path",
        "free.unseen.pixel_auroc": "the sentences: two free vectors learn in their place",
        "odd.unseen.pixel_auroc": "any learning: patches unlike their picture's mean",
    },
)
