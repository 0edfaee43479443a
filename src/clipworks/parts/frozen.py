"""A Clip that a method looks at and leaves as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clipworks.core.clip import Clip
from clipworks.encode.bulk import evaluating


@contextmanager
def undisturbed(clip: Clip) -> Iterator[None]:
    """The Clip in evaluation mode and without gradients of its own; afterwards as it was."""
    asking = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    with evaluating(clip):
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)
