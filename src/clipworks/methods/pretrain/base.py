"""The contract of the family `pretrain`: what is minimized when a Clip is trained.

An objective is an `nn.Module` with three verbs, handed to `clipworks.engine.fit`:

- `prepare(clip) -> clip`: the model to train. It may be the one given, changed (a new initial scale) or
  wrapped (frozen parts, more heads). It gives the same for the same clip and seed.
- `features(clip, batch) -> dict`: this process's rows, computed from weights and batch alone. Tensors
  (B, ...) have one row an example and are gathered from all processes with gradient; 0-D tensors
  (`scale`, `bias`) pass through, and of a batch cut into parts their mean; entries named in the class
  attribute `local` stay this process's own. A tensor holds no indices into rows, for gathering would shift
  them.
- `loss(features) -> dict`: named scalars from the rows of the *global* batch; their sum is minimized, or
  the entry `loss` alone if there is one. Computed in fp32.

It may also have `groups(clip)`, a list of groups for the optimizer (`params`, and `lr` and `weight_decay`
where they differ from the recipe's, or `lr_scale`, a factor of it; `scheduled=False` for an `lr` that stays)
in place of weight decay on matrices only, `backward(terms)`, in place of the backward pass of the terms' sum,
and `set_epoch(epoch)`, called when an epoch begins or goes on, with its number from 0. It never calls a
collective, never steps, and draws random numbers only in `features`, from torch's generator. What it learns
or counts is in parameters and buffers, so that checkpoints hold it; learned numbers that `loss` needs travel
as 0-D entries, and larger tensors are used in `features`, where gradients are synchronized.

Every objective of the family is finite on a batch of pairs, gives gradients to every parameter it does not
freeze, does not depend on the order of the pairs, and gives the same gradients when the batch is cut into
parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from clipworks.core.clip import Clip, unit
from clipworks.data.batch import Batch
from clipworks.encode.packed import text_vectors
from clipworks.errors import DataError


class Objective(nn.Module):
    """What is minimized when a Clip is trained; the module's docstring is the contract."""

    local: ClassVar[tuple[str, ...]] = ()
    source: str = "alt"

    @property
    def texts(self) -> Mapping[str, int | None]:
        """How many sentences of which sources of texts it reads of a picture; None: all that there are."""
        return {self.source: 1}

    def prepare(self, clip: Clip) -> Clip:
        """The model to train; by default the one given."""
        return clip

    def features(self, clip: Clip, batch: Batch) -> dict[str, Any]:
        """This process's rows: names to tensors (B, ...) or 0-D."""
        raise NotImplementedError

    def loss(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """Named 0-D terms from the rows of the global batch."""
        raise NotImplementedError


def pairs(clip: Clip, batch: Batch, source: str = "alt") -> dict[str, Tensor]:
    """Unit vectors of pictures and of their texts from one source, with the model's scale and bias.

    Returns:
        `image` (B, D) and `text` (B, D), unit length, fp32; `scale` 0-D, a logarithm; `bias` 0-D if the model
        has one.

    Raises:
        DataError: if the batch lacks pictures or that source, or has not one text a picture.
    """
    if batch.images is None:
        raise DataError("the batch has no pictures")
    if source not in batch.texts:
        raise DataError(
            f"the batch has no texts of source {source!r}, only {', '.join(batch.texts) or 'none'}"
        )
    tokens = batch.texts[source]
    if tokens.owner is not None:
        raise DataError(f"source {source!r} has several texts a picture; this objective takes one")
    features = {
        "image": unit(clip.image(batch.images)),
        "text": unit(text_vectors(clip.text, tokens)),
        "scale": clip.scale,
    }
    return features if clip.bias is None else features | {"bias": clip.bias}
