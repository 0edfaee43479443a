"""Cross the Gap: is a picture better found through the text tower? (Mistretta et al., ICLR 2025.)

Query pictures look for pictures of their class among others. The seedling's vectors of the queries are
compared with the gallery as they are (the baseline) and after textual inversion (the method). The claim is
refuted if inversion ranks no better. Three questions go with it.

Is it crossing, or would any change of that size do?

    noise           c ψ + √(1 - c²) times a random direction: as far from ψ as the inverted query, c by c
    image_to_oti    crossed back: the gallery is inverted and the query is not
    oti_to_oti      crossed twice: both are, so both are texts again; both on some classes only

Would something simpler do as well?

    centered        the gallery's mean removed from both
    text_pca        both projected on the leading directions of texts with other names; how many, by other
    classes soft_words      the mean of these texts' vectors, weighted by their likeness to the query

Does it help only with what captions talk about? With world scenes the same queries are asked for their shape,
which captions name, and for their style. And zero-shot classification, which crosses anyway, should suffer
from inversion, and more than from the noise.

Data: scenes of one object each, whose classes are shapes; or with `data`, a folder of Tiny-ImageNet, of whose
validation pictures each seed draws classes, queries and galleries. The budget `full` draws more, and adds
steps and numbers of tokens as curves, visual inversion of captions of the scenes, and the remedies: the
seedling trained on pairs (Flickr8k's where `data` has them) with the modalities kept apart, brought together,
and with a loss between pictures; how far apart they are then, and what inversion still gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipworks.checkpoints.zoo import load
from clipworks.core.clip import Clip, unit
from clipworks.data.sets import tiny_imagenet
from clipworks.data.shards import TarShards
from clipworks.data.source import Selected, Source, TextChoices, iterate
from clipworks.data.world.captions import describe
from clipworks.data.world.dataset import WorldScenes
from clipworks.data.world.scenes import BACKGROUNDS, COLORS, SHAPES, TEXTURES, SceneConfig
from clipworks.errors import DataError
from clipworks.evaluate.held import pixels_of
from clipworks.evaluate.retrieval import average_precision
from clipworks.methods.retrieve.cross_the_gap import ModalityInversion
from clipworks.proofs.base import Budget, Outcome, Proof
from clipworks.proofs.remedies import REMEDIES, gap, remedied

TEMPLATE = "a photo of a {}"
WIDTHS = (8, 16, 32, 64)  # of the text subspace, from which other classes choose


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        classes: of Tiny-ImageNet that are asked for.
        queries, gallery: pictures of each class.
        both: classes whose gallery is inverted too.
        curves: steps and tokens that are tried besides.
        captions: scenes whose captions are inverted visually.
        training: steps of each remedy, and `pairs` to train on without photographs.
    """

    classes: int
    queries: int
    gallery: int
    both: int
    curves: tuple[tuple[int, int], ...] = ()
    captions: int = 0
    training: int = 0
    pairs: int = 700


SIZES: dict[Budget, Size] = {
    "small": Size(50, 4, 20, 10),
    "full": Size(
        100,
        5,
        40,
        20,
        tuple((steps, tokens) for tokens in (1, 4) for steps in (5, 15, 50, 150, 500)),
        captions=100,
        training=60,
    ),
}


@dataclass(frozen=True)
class Asked:
    """What is asked for: unit vectors, labels, and words that are not about the classes asked for.

    Attributes:
        queries: (n, D); `query_labels` (n,) int64.
        gallery: (m, D); `gallery_labels` (m,) int64.
        names: of the classes, in the order of the labels.
        words: other names.
        others: (o, D) pictures of other classes; `other_labels` (o,) int64.
        styles: of queries and gallery, where they are known.
    """

    queries: Tensor
    query_labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor
    names: tuple[str, ...]
    words: tuple[str, ...]
    others: Tensor
    other_labels: Tensor
    styles: tuple[Tensor, Tensor] | None = None


def run(seed: int, budget: Budget, data: Path | None) -> Outcome:
    """The experiment under one seed."""
    return experiment(load("seedling"), seed, SIZES[budget], data)


def experiment(clip: Clip, seed: int, size: Size, data: Path | None = None) -> Outcome:
    """The experiment with any Clip and at any size."""
    asked = scenes(clip, seed, size) if data is None else photographs(clip, seed, size, data)
    details = compare(clip, asked, seed, size)
    if data is not None:
        named = compare(clip, scenes(clip, seed, size), seed, size)
        details |= {f"scenes_{name}": named[name] for name in ("image", "oti", "style_image", "style_oti")}
    for steps, tokens in size.curves:
        inversion = _inversion(clip, seed, steps=steps, tokens=tokens)
        found = _precision(inversion.transform(asked.queries), asked.gallery, asked)
        details[f"oti_steps_{steps}_tokens_{tokens}"] = found
    if size.captions:
        details |= captions(clip, seed, size.captions)
    if size.training:
        details |= remedies(clip, seed, size, data)
    return Outcome(baseline=details["image"], method=details["oti"], details=details)


def compare(clip: Clip, asked: Asked, seed: int, size: Size) -> dict[str, float]:
    """mAP of each way to ask, top-1 of each way to classify, and what inversion reached."""
    inversion = _inversion(clip, seed)
    oti, c = inversion.transform(asked.queries), inversion.cosine_
    if c is None:
        raise DataError("nothing was inverted")
    noise = _as_far(asked.queries, c, seed)
    texts = clip.embed_texts([TEMPLATE.format(word) for word in asked.words])
    mean = asked.gallery.mean(dim=0)
    leading = _leading(texts, asked)
    soft = (asked.queries @ texts.T * clip.scale.exp()).softmax(dim=1) @ texts
    found = {
        "image": _precision(asked.queries, asked.gallery, asked),
        "oti": _precision(oti, asked.gallery, asked),
        "noise": _precision(noise, asked.gallery, asked),
        "centered": _precision(unit(asked.queries - mean), unit(asked.gallery - mean), asked),
        "text_pca": _precision(unit(asked.queries @ leading), unit(asked.gallery @ leading), asked),
        "text_pca_width": float(leading.shape[1]),
        "soft_words": _precision(unit(soft), asked.gallery, asked),
    }
    # Both sides inverted, on a few classes.
    few = asked.gallery_labels < size.both
    small, rows = asked.gallery[few], asked.query_labels < size.both
    crossed = _inversion(clip, seed + 1).transform(small)
    matches = asked.query_labels[rows][:, None] == asked.gallery_labels[few]
    for name, queries, gallery in (
        ("few_image", asked.queries, small),
        ("few_oti", oti, small),
        ("few_image_to_oti", asked.queries, crossed),
        ("few_oti_to_oti", oti, crossed),
    ):
        found[name] = _mean_precision(queries[rows] @ gallery.T, matches)
    # Classification crosses anyway: one prompt in all arms.
    heads = clip.embed_texts([TEMPLATE.format(name) for name in asked.names])
    for name, queries in (("image", asked.queries), ("oti", oti), ("noise", noise)):
        right = (queries @ heads.T).argmax(dim=1) == asked.query_labels
        found[f"zero_shot_{name}"] = float(right.float().mean())
    if asked.styles is not None:
        matches = asked.styles[0][:, None] == asked.styles[1]
        for name, queries in (("image", asked.queries), ("oti", oti)):
            found[f"style_{name}"] = _mean_precision(queries @ asked.gallery.T, matches)
    low, middle, high = torch.quantile(c, c.new_tensor([0.1, 0.5, 0.9])).tolist()
    reached = {"cosine_10": low, "cosine_50": middle, "cosine_90": high}
    return (
        found | reached | {"recall_1_image": _first(asked.queries, asked), "recall_1_oti": _first(oti, asked)}
    )


def captions(clip: Clip, seed: int, count: int) -> dict[str, float]:
    """Texts that look for texts: a caption of each scene looks for its others, inverted or not."""
    config = SceneConfig(count=(1, 2))
    source = WorldScenes(config, seed, count, sources=())
    kinds = ("short", "rewrite", "relation", "alt")
    spoken = [[describe(source.scene(i), kind, seed=n) for n, kind in enumerate(kinds)] for i in range(count)]
    first = clip.embed_texts([texts[0] for texts in spoken])
    others = clip.embed_texts([text for texts in spoken for text in texts[1:]])
    matches = torch.arange(count)[:, None] == torch.arange(count).repeat_interleave(len(kinds) - 1)
    inversion = _inversion(clip, seed, direction="text_to_image", steps=300)
    mean = others.mean(dim=0)
    pairs = {
        "captions_text": first @ others.T,
        "captions_ovi": inversion.transform(first) @ others.T,
        "captions_centered": unit(first - mean) @ unit(others - mean).T,
    }
    return {name: _mean_precision(cosines, matches) for name, cosines in pairs.items()}


def remedies(clip: Clip, seed: int, size: Size, data: Path | None = None) -> dict[str, float]:
    """How far apart the modalities are before and after each training, and mAP without and with inversion."""
    pairs, held = _pairs(seed, size, data)
    images = [example.image for example in iterate(held)]
    texts = [spoken(example.texts["alt"]) for example in iterate(held)]
    found: dict[str, float] = {}
    models = {"start": clip} | {
        name: remedied(clip, remedy, pairs, size.training, seed) for name, remedy in REMEDIES.items()
    }
    for name, model in models.items():
        asked = scenes(model, seed, size) if data is None else photographs(model, seed, size, data)
        oti = _inversion(model, seed).transform(asked.queries)
        found |= {
            f"{name}_gap": gap(model.embed_images(images), model.embed_texts(texts)),
            f"{name}_image": _precision(asked.queries, asked.gallery, asked),
            f"{name}_oti": _precision(oti, asked.gallery, asked),
        }
    return found


def spoken(texts: TextChoices) -> str:
    """The first of a picture's texts."""
    return texts if isinstance(texts, str) else texts[0]


def _pairs(seed: int, size: Size, data: Path | None) -> tuple[Source, Source]:
    """Pairs to train on and others: of Flickr8k where there is one, else scenes with captions."""
    flickr = None if data is None else data / "flickr8k-1000"
    if flickr is not None and flickr.is_dir():
        return TarShards(flickr / "train-*.tar"), TarShards(flickr / "test-*.tar")
    held = max(1, size.pairs // 3)
    source = WorldScenes(SceneConfig(count=(1, 2)), seed, size.pairs + held, sources=("alt",))
    return Selected(source, range(size.pairs)), Selected(source, range(size.pairs, size.pairs + held))


def scenes(clip: Clip, seed: int, size: Size) -> Asked:
    """Scenes of one object each, in every color and style; half of the shapes are asked for."""
    drawn = np.random.default_rng(seed).permutation(len(SHAPES))
    shapes = [SHAPES[i] for i in drawn[: len(SHAPES) // 2]]
    rest = [SHAPES[i] for i in drawn[len(SHAPES) // 2 :]]
    queries, gallery = size.classes * size.queries // 2, size.classes * size.gallery // 2
    config = SceneConfig(shapes=tuple(shapes), count=(1, 1))
    source = WorldScenes(config, seed, queries + gallery, sources=())
    features = _encode(clip, source)[0]
    labels = torch.from_numpy(source.labels)
    styles = torch.from_numpy(WorldScenes(config, seed, len(source), sources=(), label="style").labels)
    other = WorldScenes(SceneConfig(shapes=tuple(rest), count=(1, 1)), seed, 200, sources=())
    others, other_labels = _encode(clip, other)
    things = [f"{color} {texture} {shape}" for color in COLORS for texture in TEXTURES for shape in rest]
    return Asked(
        features[:queries],
        labels[:queries],
        features[queries:],
        labels[queries:],
        tuple(source.class_names),
        (*rest, *things[:: len(rest) + 1], *BACKGROUNDS),
        others,
        other_labels,
        (styles[:queries], styles[queries:]),
    )


def photographs(clip: Clip, seed: int, size: Size, data: Path) -> Asked:
    """Validation pictures of classes of Tiny-ImageNet that the seed draws; the other names are the words."""
    folder = data / "tiny-imagenet" if (data / "tiny-imagenet").is_dir() else data
    if not (folder / "classes.json").is_file():
        raise DataError(f"{data}: no classes.json, so not a folder of Tiny-ImageNet")
    source = tiny_imagenet(folder, "val")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(source.classes)).tolist()
    chosen, rest = order[: size.classes], order[size.classes :]
    if source.labels is None:
        raise DataError(f"{folder}: the pictures have no labels")

    def rows(classes: Sequence[int], first: int, count: int) -> tuple[list[int], list[int]]:
        places, labels = [], []
        for label, index in enumerate(classes):
            places += members[index][first : first + count]
            labels += [label] * len(members[index][first : first + count])
        return places, labels

    members = [
        generator.permutation(np.flatnonzero(source.labels == index)).tolist()
        for index in range(len(source.classes))
    ]
    queries, query_labels = _encode(clip, Selected(source, *rows(chosen, 0, size.queries)))
    gallery, gallery_labels = _encode(clip, Selected(source, *rows(chosen, size.queries, size.gallery)))
    others, other_labels = _encode(clip, Selected(source, *rows(rest[:20], 0, 10)))
    names = source.classes.names
    return Asked(
        queries,
        query_labels,
        gallery,
        gallery_labels,
        tuple(names[index] for index in chosen),
        tuple(names[index] for index in rest),
        others,
        other_labels,
    )


def _encode(clip: Clip, source: Source) -> tuple[Tensor, Tensor]:
    """Unit vectors (n, D) and labels (n,) of a source's pictures."""
    pixels, labels, _ = pixels_of(clip, source, workers=1)
    return clip.embed_images(pixels), labels


def _inversion(clip: Clip, seed: int, **settings: Any) -> ModalityInversion:
    return ModalityInversion(clip, seed=seed, batch_size=256, progress=False, **settings)


def _as_far(features: Tensor, c: Tensor, seed: int) -> Tensor:
    """Unit vectors whose cosines with the features (n, D) are c (n,), otherwise in random directions."""
    random = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
    across = unit(random - (random * features).sum(dim=1, keepdim=True) * features)
    return c[:, None] * features + (1 - c[:, None] ** 2).clamp(min=0).sqrt() * across


def _leading(texts: Tensor, asked: Asked) -> Tensor:
    """The leading directions (D, k) of texts (t, D); k is best for pictures of other classes."""
    directions = torch.linalg.svd(texts - texts.mean(dim=0), full_matrices=False).Vh.T
    matches = asked.other_labels[:, None] == asked.other_labels
    matches.fill_diagonal_(False)

    def quality(width: int) -> float:
        projected = unit(asked.others @ directions[:, :width])
        cosines = (projected @ projected.T).fill_diagonal_(float("-inf"))
        return _mean_precision(cosines, matches)

    widths = [width for width in WIDTHS if width <= directions.shape[1]] or [directions.shape[1]]
    return directions[:, : max(widths, key=quality)]


def _precision(queries: Tensor, gallery: Tensor, asked: Asked) -> float:
    return _mean_precision(queries @ gallery.T, asked.query_labels[:, None] == asked.gallery_labels)


def _mean_precision(similarity: Tensor, matches: Tensor) -> float:
    """mAP of the queries that have a match; 0 if none has."""
    asked = matches.any(dim=1)
    if not asked.any():
        return 0.0
    return float(average_precision(similarity[asked], matches[asked]).mean())


def _first(queries: Tensor, asked: Asked) -> float:
    nearest = (queries @ asked.gallery.T).argmax(dim=1)
    return float((asked.gallery_labels[nearest] == asked.query_labels).float().mean())


PROOF = Proof(
    slug="cross-the-gap",
    claim="A picture inverted into a text finds pictures of its class better than the picture itself does.",
    baseline="image to image",
    method="inverted image to image",
    metric="mAP",
    run=run,
)
