"""Questions: texts and pictures that are wanted and not wanted, as one vector.

A question is plain words, or quoted words with signs and weights between them:

    "a beach" - "people"
    "a street" + 0.5*"night" - 0.3*"cars"

The vector is the weighted sum of unit vectors, at unit length. Two texts share most of their direction, so
that a full minus would leave little but their difference: without a weight, a minus counts half.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipworks.core.clip import unit
from clipworks.core.pictures import Source
from clipworks.errors import ConfigError
from clipworks.search.files import Kind

if TYPE_CHECKING:
    from clipworks.core.clip import Clip

UNWANTED = 0.5
_TERM = re.compile(r'\s*(?P<sign>[-+−])?\s*(?:(?P<weight>[0-9]*\.?[0-9]+)\s*\*\s*)?"(?P<text>[^"]*)"')


@dataclass(frozen=True)
class Term:
    """A text or a picture, and how much it is wanted; less than 0 is not wanted."""

    content: str | Source
    weight: float = 1.0
    is_picture: bool = False


def parse(question: str) -> list[Term]:
    """The terms of a question in words; one without quotes is a single term as it stands.

    Raises:
        ConfigError: if it is empty, or if quotes and signs do not fit together.
    """
    if not question.strip():
        raise ConfigError("the query is empty: say what to look for")
    if _TERM.match(question) is None:
        return [Term(question)]
    terms: list[Term] = []
    end = 0
    while match := _TERM.match(question, end):
        if terms and match["sign"] is None:
            break
        if not match["text"].strip():
            raise ConfigError(f"the query {question!r} has an empty text in it")
        minus = match["sign"] in ("-", "−")
        weight = float(match["weight"] or (UNWANTED if minus else 1))
        terms.append(Term(match["text"], -weight if minus else weight))
        end = match.end()
    if question[end:].strip():
        raise ConfigError(
            f"the query {question!r} cannot be read from {question[end:].strip()!r} on:"
            ' write "wanted" + 0.5*"wanted too" - "not wanted"'
        )
    return terms


def vector(clip: Clip, terms: Sequence[Term]) -> Tensor:
    """The question (D,), unit length.

    Raises:
        ConfigError: without terms, or if they cancel.
        PictureError: if a picture cannot be read.
    """
    if not terms:
        raise ConfigError("a query is a text, a picture or both: give one of them")
    parts = []
    for term in terms:
        if term.is_picture:
            parts.append(term.weight * clip.embed_images([term.content])[0])
        else:
            parts.append(term.weight * clip.embed_texts([str(term.content)])[0])
    return combine(parts)


def combine(parts: Sequence[Tensor]) -> Tensor:
    """The sum of weighted vectors (D,), at unit length.

    Raises:
        ConfigError: if they cancel.
    """
    whole = torch.stack(list(parts)).sum(dim=0)
    if float(whole.norm()) < 1e-3:
        raise ConfigError("what is wanted and what is not cancel: nothing is left to look for")
    return unit(whole)


def invert(clip: Clip, terms: Sequence[Term], vector: Tensor, kind: Kind | None) -> Tensor:
    """The vector (D,) of pictures that look for pictures, or of texts that look for texts, in the other
    modality.

    Raises:
        ConfigError: if the question crosses from one to the other anyway, or the model cannot be inverted
            through.
    """
    from clipworks.methods.retrieve.cross_the_gap import ModalityInversion

    asked = {"image" if term.is_picture else "text" for term in terms}
    if asked != {kind}:
        raise ConfigError(
            f"inversion is for pictures that look for pictures, or texts that look for texts; here"
            f" {' and '.join(sorted(asked))} looks for {kind or 'both'}"
        )
    inversion = ModalityInversion(clip, direction="image_to_text" if kind == "image" else "text_to_image")
    return inversion.transform(vector[None])[0]
