"""Lists of concepts: short phrases in which a picture is described, read, made up and cleaned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch

from clipworks.core.clip import Clip
from clipworks.data.dumps import lines_of
from clipworks.errors import ConfigError

Concepts = Sequence[str] | str | PathLike[str]

WORLD = "world"  # names the generated world's vocabulary
_ARTICLE = re.compile(r"^(a|an|the)\s+", re.IGNORECASE)


def read_concepts(concepts: Concepts | None) -> tuple[str, ...]:
    """Phrases from a list, a text file (one a line, blank lines left out) or `"world"`, its vocabulary.

    Raises:
        ConfigError: without at least two phrases, or if one comes twice.
        DataError: for a file that cannot be read.
    """
    if concepts is None:
        raise ConfigError(f"a concept bottleneck needs concepts: a list, a text file, or {WORLD!r}")
    if isinstance(concepts, (str, PathLike)):
        lines: Iterable[str] = world_concepts() if concepts == WORLD else lines_of(Path(concepts))
    else:
        lines = concepts
    phrases = tuple(line.strip() for line in lines if line.strip())
    if len(phrases) < 2:
        raise ConfigError(f"there must be two concepts at least, not {len(phrases)}")
    if len(set(phrases)) < len(phrases):
        twice = next(phrase for place, phrase in enumerate(phrases) if phrase in phrases[:place])
        raise ConfigError(f"the concept {twice!r} is given more than once")
    return phrases


def world_concepts() -> tuple[str, ...]:
    """Every value of every attribute of the generated world in words, in the order of its attributes."""
    from clipworks.data.world.scenes import ATTRIBUTES
    from clipworks.data.world.words import BACKGROUND_PHRASES, STYLE_PHRASES

    said = {name: phrases["en"] for name, phrases in BACKGROUND_PHRASES.items()}
    said |= {name: phrases["en"].removesuffix(" of") for name, phrases in STYLE_PHRASES.items()}
    return tuple(said.get(value, value) for values in ATTRIBUTES.values() for value in values)


@torch.no_grad()
def filter_concepts(
    clip: Clip,
    concepts: Concepts,
    class_names: Sequence[str],
    *,
    max_chars: int = 30,
    class_cutoff: float = 0.85,
    other_cutoff: float = 0.9,
) -> list[str]:
    """Concepts that are short, no class in other words, and not each other in other words.

    Likeness is the cosine of this Clip's text vectors. The authors mix in a sentence model, so the same
    cut-offs keep other phrases than theirs.

    Args:
        clip: whose text tower compares.
        concepts: as `read_concepts` takes them.
        class_names: C names.
        max_chars: the longest phrase.
        class_cutoff: phrases at least that like a class go.
        other_cutoff: of two phrases at least that alike the one goes that is less like the rest.

    Returns:
        What is left, in the order given.
    """
    classes = {bare(name) for name in class_names}
    kept = [one for one in read_concepts(concepts) if len(one) <= max_chars and bare(one) not in classes]
    if not kept:
        return []
    vectors = clip.embed_texts(kept)
    apart = (vectors @ clip.embed_texts(sorted(classes)).mT).amax(dim=1) < class_cutoff
    kept = [one for one, far in zip(kept, apart.tolist(), strict=True) if far]
    vectors = vectors[apart]
    alike = vectors @ vectors.mT
    rest = alike.mean(dim=1)
    there = torch.ones(len(kept), dtype=torch.bool)
    for i, j in (alike >= other_cutoff).triu(diagonal=1).nonzero().tolist():
        if there[i] and there[j]:
            there[j if rest[j] <= rest[i] else i] = False
    return [one for one, stays in zip(kept, there.tolist(), strict=True) if stays]


def bare(name: str) -> str:
    """Lower case, without a leading article."""
    return _ARTICLE.sub("", name.strip().lower())
