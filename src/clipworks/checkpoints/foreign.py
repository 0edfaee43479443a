"""Weights of another tool to a Clip: layout, geometry, what others say, tokenizer, and the copying.

file or folder  ->  weights, and what the config beside them says
+ table of known models, caller  ->  settings, which must agree
->  Config (shapes and settings), rules of the layout  ->  Clip
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from clipworks.checkpoints import configs, files, layouts, own, rules, vocabulary
from clipworks.checkpoints.geometry import facts, geometry
from clipworks.checkpoints.settings import BY_LAYOUT, Settings, Stated, check_claims, merged
from clipworks.core.clip import Clip
from clipworks.core.tokenizer import SETTINGS, Tokenizer
from clipworks.errors import CheckpointError

OPEN_CLIP, TRANSFORMERS = "open_clip_config.json", "config.json"
# By config, the files of weights, the preferred ones first: never a pickle if there is another.
WEIGHTS = {
    OPEN_CLIP: (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
    TRANSFORMERS: (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
}
# Besides the weights, what is read of a repository.
SIDE_FILES = (
    *(OPEN_CLIP, TRANSFORMERS, "preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    *(own.PREPROCESSING, SETTINGS),
)


@dataclass(frozen=True)
class Place:
    """A file of weights and the config that belongs to it ("" for none); `own` marks a folder of ours."""

    weights: Path
    config: str = ""
    own: bool = False


def locate(path: Path) -> Place:
    """Which file of a folder holds the weights, and which its config; for a file, what belongs to it.

    Raises:
        CheckpointError: if there are no weights, or several files of which none is meant more than another.
    """
    if path.is_file():
        for config, names in WEIGHTS.items():
            if path.name in names and (path.parent / config).is_file():
                found = locate_config(path.parent)
                return (
                    dataclasses.replace(found, weights=path)
                    if found and path.name in WEIGHTS[found.config]
                    else Place(path)
                )
        return Place(path)
    found = locate_config(path)
    if found is not None:
        return found
    loose = sorted(one for one in path.iterdir() if one.suffix in files.SUFFIXES and one.is_file())
    if len(loose) != 1:
        what = (
            f"{len(loose)} files of weights ({', '.join(one.name for one in loose[:3])})"
            if loose
            else "no weights"
        )
        raise CheckpointError(f"{path}: {what} and no config that says which to read; name one file")
    return Place(loose[0])


def locate_config(folder: Path) -> Place | None:
    """The config and weights of a folder; None if it has no config."""
    if (folder / TRANSFORMERS).is_file() and (folder / own.WEIGHTS).is_file():
        values = files.read_json(folder / TRANSFORMERS)
        if "model_type" not in values and {"image", "text", "width"} <= values.keys():
            return Place(folder / own.WEIGHTS, TRANSFORMERS, own=True)
    for config, names in WEIGHTS.items():
        if (folder / config).is_file():
            weights = first_of(names, {one.name for one in folder.iterdir()})
            if weights:
                return Place(folder / weights, config)
    for config, names in WEIGHTS.items():
        if (folder / config).is_file():
            raise CheckpointError(f"{folder}: has {config}, but none of {', '.join(names)}")
    return None


def first_of(names: Sequence[str], there: set[str]) -> str | None:
    """The first of `names` that is there."""
    return next((name for name in names if name in there), None)


def load(
    place: Place,
    told: Sequence[Stated] = (),
    *,
    tokenizer: Tokenizer | Literal[False] | None = None,
    but: Sequence[str] = (),
    name: str = "",
) -> Clip:
    """A Clip of another tool's weights.

    Args:
        place: where they are.
        told: what the table of known models and the caller say, besides the file's own config.
        tokenizer: the caller's; False for none; None to find it.
        but: facts that the caller changes on purpose, see `settings.check_claims`.
        name: the model's name.

    Raises:
        CheckpointError: naming the file and the key or tensor at fault.
    """
    label, folder = str(place.weights), place.weights.parent
    stated = [*told, *read_config(folder, place.config)]
    contents = files.read(place.weights)
    if contents.activation is not None:
        stated.append(Stated("the module tree of the archive", _archive_settings(contents.activation)))
    # Beside a bare file there may be anything; only a config, or a known model's words, speak of a tokenizer.
    words = next((one.words for one in stated if one.words is not None), None)
    spoken = bool(place.config) or (words is not None and words.kind == "file")
    beside = folder if spoken else None
    return assemble(contents.weights, stated, label, folder=beside, tokenizer=tokenizer, but=but, name=name)


def assemble(
    weights: Mapping[str, Tensor],
    told: Sequence[Stated],
    label: str,
    *,
    folder: Path | None = None,
    tokenizer: Tokenizer | Literal[False] | None = None,
    but: Sequence[str] = (),
    name: str = "",
) -> Clip:
    """A Clip of weights of any shape that are already in memory, in a layout that is known.

    Args:
        weights: by their names in another tool.
        told: what is said about them.
        label: the file that they are from, for messages.
        folder: where their tokenizer may lie; None if nothing says that one does.
        tokenizer, but, name: as `load` takes them.

    Raises:
        CheckpointError: naming the key or tensor at fault.
    """
    stated = list(told)
    weights = layouts.clean(weights, label)
    layout = layouts.recognize(weights, label)
    weights = layouts.without_heads(layout, weights)
    if layout in BY_LAYOUT:
        stated.append(BY_LAYOUT[layout])
    config = geometry(layout, weights, merged(stated, label), label, name)
    check_claims(stated, facts(config), label, but)
    shapes = {key: tuple(value.shape) for key, value in own.skeleton(config).state_dict().items()}
    ours = rules.read(layouts.rules(layout, config), weights, shapes, label)
    words = next((one.words for one in stated if one.words is not None), None)
    found = vocabulary.choose(config, words, folder, tokenizer, label)
    if found is not None:
        config = dataclasses.replace(config, tokenizer=own.tokenizer_config(found))
    return own.build(config, ours, label, found)


def read_config(folder: Path, name: str) -> list[Stated]:
    """What the config of a folder says; nothing if it has none.

    Raises:
        CheckpointError: naming the file and the key at fault.
    """
    try:
        if name == OPEN_CLIP:
            return [configs.open_clip(folder / OPEN_CLIP)]
        return configs.transformers(folder) if name == TRANSFORMERS else []
    except CheckpointError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{folder / name}: a value of the wrong kind ({error})") from error


def _archive_settings(activation: str) -> Settings:
    return Settings(activation=activation, text_activation=activation)  # type: ignore[arg-type]
