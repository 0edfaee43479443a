"""The remedies for intra-modal misalignment that Cross the Gap examines (Mistretta et al., ICLR 2025).

If comparing pictures with pictures goes wrong because no loss ever compared them, and the two modalities lie
apart, then training that mends either should leave inversion nothing to gain. Three trainings of one model on
the same pairs, in the same order, that differ in their loss alone:

    apart     L_clip at temperature 0.01, at which the means of both modalities stay apart
    together  L_clip at temperature 1, at which they meet
    intra     L_clip at 0.01, and an image-image term as in SLIP (Mu et al., ECCV 2022)

The image-image term is SimCLR's: z are two views of each of B pictures, p(i) the other view of i's picture,

    L_image = mean_i -log exp(z_i·z_p(i) / 0.1) / Σ_{j≠i} exp(z_i·z_j / 0.1)

Here z are the vectors that retrieval compares; SLIP puts three more layers between, which are thrown away
afterwards. That brings the term nearer to what it is to mend.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipworks.core.clip import Clip, unit
from clipworks.data.augment import RandomView
from clipworks.data.batch import Batch
from clipworks.data.source import Source
from clipworks.errors import DataError
from clipworks.methods.pretrain.base import Objective, pairs
from clipworks.parts.contrastive import Targets, contrastive_loss
from clipworks.proofs.laboratory import recipe_for, train

VIEWS = 0.1  # temperature of the image-image term
BATCH = 100
LR = 1e-4


@dataclass(frozen=True)
class Remedy:
    """How a training differs from others: its temperature, and whether pictures are compared too."""

    temperature: float
    intra: bool = False


REMEDIES = {"apart": Remedy(0.01), "together": Remedy(1.0), "intra": Remedy(0.01, intra=True)}


class RemedyObjective(Objective):
    """The loss of CLIP at a fixed temperature, with SLIP's image-image term where asked for.

    Args:
        remedy: temperature and term.
        size: of the views, in pixels.
        seed: of the views.
    """

    def __init__(self, remedy: Remedy, size: int, seed: int = 0):
        super().__init__()
        self.remedy = remedy
        self.view = RandomView(size, crop=(0.5, 1.0), seed=seed)

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """`image` and `text`, with the term also `one` and `other`, unit vectors (B, D) each; `scale`."""
        scale = torch.tensor(-math.log(self.remedy.temperature), device=clip.device)
        found: dict[str, Any] = pairs(clip, batch, self.source) | {"scale": scale}
        if self.remedy.intra:
            if batch.images is None:
                raise DataError("the batch has no pictures")
            number = 2 * int(torch.randint(1 << 30, ()))
            for name, view in (("one", number), ("other", number + 1)):
                found[name] = unit(clip.image(self.view(batch.images, batch.keys, view)))
        return found

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """`contrastive`, and with the term `images`, 0-D."""
        terms = {
            "contrastive": contrastive_loss(features["image"], features["text"], features["scale"].exp())
        }
        return (
            terms | {"images": image_loss(features["one"], features["other"])} if self.remedy.intra else terms
        )


def image_loss(one: Tensor, other: Tensor, temperature: float = VIEWS) -> Tensor:
    """SimCLR's loss, 0-D, of two views of each picture, unit vectors (B, D) each."""
    views = torch.cat([one, other])
    picture = torch.arange(len(one), device=one.device).repeat(2)
    itself = torch.eye(len(views), dtype=torch.bool, device=one.device)
    return contrastive_loss(views, views, 1 / temperature, targets=Targets((picture, picture), mask=~itself))


def remedied(clip: Clip, remedy: Remedy, source: Source, steps: int, seed: int) -> Clip:
    """A copy of a Clip, trained on pairs with a remedy; the Clip stays as it is."""
    objective = RemedyObjective(remedy, clip.config.image.image_size, seed)
    recipe = recipe_for(steps, BATCH, seed, lr=LR)
    return train(copy.deepcopy(clip), objective, source, recipe, min(BATCH, len(source))).eval()


def gap(images: Tensor, texts: Tensor) -> float:
    """The distance of the means of unit vectors (n, D) of pictures and (m, D) of texts."""
    return float((images.mean(dim=0) - texts.mean(dim=0)).norm())
