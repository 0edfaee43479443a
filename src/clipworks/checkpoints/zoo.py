"""Names to files to a Clip.

seedling                        ships with the package
ViT-B-32/openai                 a known model: its name says where it is and what its weights cannot say
openai/clip-vit-base-patch32    a repository of the hub, in the layout of transformers or open_clip
epoch_5.pt, run/clip            a file or a folder
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clipworks.checkpoints.known import ALIASES, ARCHITECTURES, MODELS, OLDER_WEIGHTS, Known, parameters
from clipworks.checkpoints.settings import Stated, Statistics, from_caller, from_config
from clipworks.errors import CheckpointError, ConfigError, ModelNotFound, nearest

if TYPE_CHECKING:
    from clipworks.checkpoints.foreign import Place
    from clipworks.core.clip import Clip
    from clipworks.core.tokenizer import Tokenizer

SEEDLING = "seedling"
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Model:
    """A model that can be loaded by name.

    Attributes:
        name: what `load` takes.
        parameters: how many numbers it learned; None if its files are not here.
        megabytes: about how large its weights are in memory, in fp32.
        image_size: side of its pictures in pixels.
        source: where its weights come from.
    """

    name: str
    parameters: int | None
    megabytes: int | None
    image_size: int | None
    source: str


def models() -> list[Model]:
    """All models that can be loaded by name, besides repositories of the hub, files and folders."""
    listed = [_seedling()]
    for known in MODELS.values():
        count = parameters(known.config)
        listed.append(
            Model(
                known.name,
                count,
                round(count * 4 / 1e6),
                known.config.image.image_size,
                f"hub: {known.repository}",
            )
        )
    return listed


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    like: str | None = None,
    activation: str | None = None,
    statistics: Statistics | None = None,
    heads: tuple[int, int] | None = None,
    tokenizer: Tokenizer | Literal[False] | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> Clip:
    """A Clip by name, from the hub, from a file or from a folder; in evaluation mode, fp32, on the CPU.

    What a file does not say is not guessed, and what two sources say differently is an error: a wrong
    activation, mean or vocabulary gives plausible numbers and wrong answers. The arguments below `like` are
    for files that come without a config.

    Args:
        name: `seedling`, a name of `clipworks models`, a repository of the hub, a file or a folder.
        revision: branch, tag or commit of a repository.
        like: a known model whose settings the file shares, for instance the one it was fine-tuned from.
        activation: `quick_gelu` (OpenAI's weights and what descends from them), `gelu` or `gelu_tanh`.
        statistics: mean and deviation of the pictures' pixels: `clip`, `half` (0.5 each), or two triples.
        heads: attention heads of image and text tower.
        tokenizer: the model's tokenizer; False for a Clip that embeds no strings.
        image_size: interpolate the image tower's positions to pictures of this size.
        context_length: interpolate the text tower's positions to texts of this length.

    Raises:
        ModelNotFound: if nothing answers to the name; it says the nearest names.
        CheckpointError: naming the file and the key or tensor at fault, or what has to be said.
        ConfigError: for an argument that cannot be.
    """
    told = [from_caller(activation, statistics, heads)]
    if like is not None:
        if like not in MODELS and like not in ALIASES:
            raise ModelNotFound(f"like={like!r}: no known model{nearest(like, MODELS)}")
        relative = MODELS[ALIASES.get(like, like)]
        told.append(
            replace(from_config(relative.config, f"like={like!r}", sizes=False), words=relative.words)
        )
    clip = _load(name, revision, told, tokenizer, image_size, context_length)
    if (image_size or context_length) is None:
        return clip
    from clipworks.checkpoints.sizes import resized

    return resized(clip, image_size=image_size, context_length=context_length)


def _load(
    name: str | Path,
    revision: str | None,
    told: list[Stated],
    tokenizer: Tokenizer | Literal[False] | None,
    image_size: int | None,
    context_length: int | None,
) -> Clip:
    from clipworks.checkpoints import foreign, own

    but = ["image.size"] * (image_size is not None) + ["text.length"] * (context_length is not None)
    text = str(name).removeprefix("hf-hub:")
    if revision is not None and (text == SEEDLING or Path(name).exists()):
        raise ConfigError(f"revision={revision!r} is for repositories of the hub; {text!r} is here already")
    if text == SEEDLING:
        with resources.as_file(resources.files("clipworks.checkpoints") / SEEDLING) as folder:
            return _own(foreign.Place(folder / own.WEIGHTS, own.CONFIG, own=True), told, tokenizer)
    if text and Path(name).exists():
        place = foreign.locate(Path(name))
        if place.own:
            return _own(place, told, tokenizer)
        label = place.weights.stem if place.weights.parent == Path(name).parent else Path(name).name
        known = _by_hash(place)
        return foreign.load(
            place, [*told, *known], tokenizer=tokenizer, but=but, name=known[0].name if known else label
        )
    known_name = ALIASES.get(text, text)
    if known_name in MODELS:
        place, known = _fetch_known(MODELS[known_name], revision)
        return foreign.load(place, [*told, *known], tokenizer=tokenizer, but=but, name=known_name)
    if isinstance(name, Path) or _looks_like_a_path(text):
        raise ModelNotFound(f"{name}: no such file or folder")
    if not HUB.fullmatch(text) or text.partition("/")[0].removesuffix("-quickgelu") in ARCHITECTURES:
        raise ModelNotFound(
            f"no model {text!r}{nearest(text, [SEEDLING, *MODELS]) or '; `clipworks models` lists the names'}"
        )
    place = _fetch(text, revision)
    if place.own:
        return _own(place, told, tokenizer)
    return foreign.load(place, told, tokenizer=tokenizer, but=but, name=text)


def _own(place: Place, told: list[Stated], tokenizer: Tokenizer | Literal[False] | None) -> Clip:
    """A folder of ours says everything; what the caller says besides must agree."""
    from clipworks.checkpoints import own
    from clipworks.checkpoints.geometry import facts
    from clipworks.checkpoints.settings import check_claims, merged

    clip = own.load(place.weights.parent)
    path = str(place.weights.parent / place.config)
    merged([from_config(clip.config, path), *told], path)
    check_claims(told, facts(clip.config), path)
    if tokenizer is False:
        clip.tokenizer = None
    elif tokenizer is not None:
        own.check_tokenizer(clip.config, tokenizer, "the tokenizer given")
        if own.tokenizer_config(tokenizer) != clip.config.tokenizer:
            raise CheckpointError(
                f"{path}: the tokenizer given is not the one that these weights were trained with"
            )
        clip.tokenizer = tokenizer
    return clip


def _fetch_known(known: Known, revision: str | None) -> tuple[Place, list[Stated]]:
    """Download a known model's weights, and its tokenizer where it is not CLIP's."""
    from clipworks.checkpoints import foreign, hub

    weights = hub.download(known.repository, (known.file, OLDER_WEIGHTS), revision)
    stated = [_stated(known)]
    if known.words.kind == "clip":
        return foreign.Place(weights), stated
    for name in ("tokenizer.json", "tokenizer_config.json"):
        hub.download(known.repository, (name,), revision)
    return foreign.Place(weights), stated


def _fetch(repository: str, revision: str | None) -> Place:
    """Download what a repository has that is read here, in one revision.

    Raises:
        CheckpointError: if it has no weights in a layout that is known.
    """
    from clipworks.checkpoints import foreign, hub
    from clipworks.checkpoints.files import shard_names

    there = set(hub.listing(repository, revision))
    for config, weights in foreign.WEIGHTS.items():
        chosen = foreign.first_of(weights, there) if config in there else None
        if chosen is None:
            continue
        # Asked for by its revision, the first file tells the cache which commit that is; the rest are of it.
        folder = hub.download(repository, (config,), revision).parent
        for name in foreign.SIDE_FILES:
            if name in there:
                hub.download(repository, (name,), folder.name)
        path = hub.download(repository, (chosen,), folder.name)
        for name in shard_names(path) if chosen.endswith(".index.json") else ():
            hub.download(repository, (name,), folder.name)
        return foreign.locate(folder)
    raise CheckpointError(
        f"{repository}: has no weights in a layout that is read here "
        f"({' or '.join(foreign.WEIGHTS)} with weights beside it)"
    )


def _by_hash(place: Place) -> list[Stated]:
    """What is known of a local archive if it is one of those that OpenAI published."""
    from clipworks.checkpoints.archive import is_torchscript

    if place.config or not is_torchscript(place.weights):
        return []
    digest = hashlib.sha256()
    with place.weights.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    for known in MODELS.values():
        if known.sha256 == digest.hexdigest():
            return [_stated(known)]
    return []


def _stated(known: Known) -> Stated:
    """What the table says of a known model."""
    stated = from_config(known.config, f"the table of known models ({known.name})")
    return replace(stated, words=known.words, name=known.name)


def _seedling() -> Model:
    import json

    from clipworks.core.config import Config

    config = resources.files("clipworks.checkpoints") / SEEDLING / "config.json"
    if not config.is_file():
        return Model(SEEDLING, None, None, None, "ships with the package")
    found = Config.from_dict(json.loads(config.read_text(encoding="utf-8")))
    count = parameters(found)
    return Model(SEEDLING, count, round(count * 4 / 1e6), found.image.image_size, "ships with the package")


def _looks_like_a_path(text: str) -> bool:
    from clipworks.checkpoints.files import SUFFIXES

    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text or text.endswith(SUFFIXES)
