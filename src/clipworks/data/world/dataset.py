"""The generated world as a source of examples, for everything that takes pictures with texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipworks.data.world import captions, scenes, surfaces
from clipworks.data.world.kinds import check_names, check_size
from clipworks.data.world.words import LANGUAGES
from clipworks.errors import ConfigError

if TYPE_CHECKING:
    from clipworks.data.source import Example

SOURCES: tuple[str, ...] = (*captions.KINDS, "region")
LABELS: tuple[str, ...] = (*scenes.ATTRIBUTES, "pair")


class WorldScenes:
    """Scenes 0 to `length` of one world; nothing is stored, every example is made when it is asked for.

    Args:
        config: which scenes there are.
        seed: which world.
        length: how many examples.
        size: the side of the pictures in pixels, 32 to 256.
        sources: which texts, of `SOURCES`; `region` is a list with one text an object.
        languages: languages other than English in which the short caption is added, under their codes.
        noise: how often the text `alt` is bad, see `captions.alt_text`.
        label: what the label names: an attribute of the main object, the background or the style, or
            `"pair"`, color and shape together; `class_names` has its values.

    Example `i` has the picture (H, W, 3) uint8, the texts, the label, and in `extra` the `scene` (its
    record) and the `truth` (masks, boxes and depth).

    Raises:
        ConfigError: if a name is unknown or a number is outside its range.
    """

    def __init__(
        self,
        config: scenes.SceneConfig | None = None,
        seed: int = 0,
        length: int = 10_000,
        size: int = 64,
        *,
        sources: Sequence[str] = ("short", "long", "alt", "rewrite", "region"),
        languages: Sequence[str] = (),
        noise: float = 0.0,
        label: str = "shape",
    ) -> None:
        if seed < 0 or length < 0:
            raise ConfigError(f"seed {seed} and length {length} must not be negative")
        if not 0 <= noise <= 1:
            raise ConfigError(f"noise {noise} is outside 0..1")
        check_size(size)
        if sources:
            check_names("sources", tuple(sources), SOURCES)
        if languages:
            check_names("languages", tuple(languages), LANGUAGES)
        check_names("label", (label,), LABELS)
        self.config = config or scenes.SceneConfig()
        self.seed, self.length, self.size, self.noise, self.label = seed, length, size, noise, label
        self.sources, self.languages = tuple(sources), tuple(languages)
        self.class_names = _class_names(self.config, label)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Example:
        from clipworks.data.source import Example

        scene = self.scene(index)
        shown = scenes.render(scene, self.size)
        texts: dict[str, str | list[str]] = {}
        for source in self.sources:
            if source == "region":
                texts[source] = [region.text for region in captions.regions(scene, self.size)]
            else:
                texts[source] = captions.describe(scene, source, noise=self.noise if source == "alt" else 0.0)
        for language in self.languages:
            texts[language] = captions.describe(scene, "short", language)
        extra: dict[str, Any] = {"scene": scene, "truth": shown}
        key = f"scenes-{self.seed}-{scene.index}"
        return Example(key=key, image=shown.pixels, texts=texts, label=self._label(scene), extra=extra)

    def scene(self, index: int) -> scenes.Scene:
        """The record of example `index`, without a picture.

        Raises:
            IndexError: if there is no such example.
        """
        return scenes.sample(self.config, self.seed, _checked(index, self.length))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The label of every example, (n,) int64; no picture is rendered for it."""
        return np.array([self._label(self.scene(i)) for i in range(self.length)], dtype=np.int64)

    def _label(self, scene: scenes.Scene) -> int:
        main = scene.objects[0]
        if self.label == "pair":
            return self.class_names.index(f"{main.color} {main.shape}")
        of = scene if self.label in ("background", "style") else main
        return self.class_names.index(getattr(of, self.label))


class WorldCaptions:
    """Scenes with many true captions each, all under `alt`: what a model learns the world's words from.

    Args:
        config, seed, length, size: as `WorldScenes` has them.
        languages: languages other than English in which captions are added.

    Half of the captions are short descriptions and rewrites of them, some naming the style; the others are
    web-like texts, relations, and short descriptions in the other languages.
    """

    def __init__(
        self,
        config: scenes.SceneConfig | None = None,
        seed: int = 0,
        length: int = 10_000,
        size: int = 64,
        *,
        languages: Sequence[str] = ("de", "fr", "zh"),
    ) -> None:
        check_names("languages", tuple(languages), LANGUAGES)
        self.scenes = WorldScenes(config, seed, length, size, sources=())
        self.languages = tuple(language for language in languages if language != "en")

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int, /) -> Example:
        example = self.scenes[index]
        return dataclasses.replace(example, texts={"alt": self._captions(example.extra["scene"])}, extra={})

    @property
    def labels(self) -> None:
        """None: a scene is of no one class."""
        return None

    @cached_property
    def captions(self) -> list[list[str]]:
        """The captions of up to 5,000 scenes, without rendering them; for training a tokenizer."""
        return [self._captions(self.scenes.scene(i)) for i in range(min(5000, len(self)))]

    def _captions(self, scene: scenes.Scene) -> list[str]:
        texts = [
            captions.describe(scene, "short", seed=0),
            captions.describe(scene, "short", seed=1),
            captions.describe(scene, "short", seed=2, styled=True),
            captions.describe(scene, "rewrite", seed=3),
            captions.describe(scene, "alt", seed=4),
            captions.describe(scene, "relation", seed=5),
        ]
        return texts + [
            captions.describe(scene, "short", language, seed=6 + number)
            for number, language in enumerate(self.languages)
        ]


def _class_names(config: scenes.SceneConfig, label: str) -> tuple[str, ...]:
    if config.pairs is not None and label in ("shape", "color", "pair"):
        names = {"shape": [s for s, _ in config.pairs], "color": [c for _, c in config.pairs]}
        return tuple(dict.fromkeys(names.get(label, [f"{c} {s}" for s, c in config.pairs])))
    if label == "pair":
        return tuple(f"{color} {shape}" for shape in config.shapes for color in config.colors)
    values: dict[str, tuple[str, ...]] = {
        "shape": config.shapes,
        "color": config.colors,
        "texture": config.textures,
        "size": config.sizes,
        "background": config.backgrounds,
        "style": config.styles,
    }
    tied = {v for tie in config.ties if tie.effect == label for v in tie.pairs.values()}
    return tuple(dict.fromkeys((*values[label], *sorted(tied))))  # a tie may bring values of its own


class WorldSurfaces:
    """Surfaces 0 to `length` of one world; label 1 is damaged, 0 is sound.

    Example `i` has the picture (H, W, 3) uint8, its description under `short`, and in `extra` the
    `surface` (its record), the `mask` (H, W) bool and the undamaged `clean` picture.

    Raises:
        ConfigError: if a number is outside its range.
    """

    class_names = ("sound", "damaged")

    def __init__(
        self, config: surfaces.SurfaceConfig | None = None, seed: int = 0, length: int = 1_000, size: int = 64
    ) -> None:
        if seed < 0 or length < 0:
            raise ConfigError(f"seed {seed} and length {length} must not be negative")
        check_size(size)
        self.config = config or surfaces.SurfaceConfig()
        self.seed, self.length, self.size = seed, length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Example:
        from clipworks.data.source import Example

        surface = self.surface(index)
        shown = surfaces.render(surface, self.size)
        return Example(
            key=f"surfaces-{self.seed}-{surface.index}",
            image=shown.pixels,
            texts={"short": surfaces.describe(surface)},
            label=int(surface.defect is not None),
            extra={"surface": surface, "mask": shown.mask, "clean": shown.clean},
        )

    def surface(self, index: int) -> surfaces.Surface:
        """The record of example `index`, without a picture.

        Raises:
            IndexError: if there is no such example.
        """
        return surfaces.sample(self.config, self.seed, _checked(index, self.length))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """1 for every damaged surface, 0 for every sound one, (n,) int64."""
        return np.array([self.surface(i).defect is not None for i in range(self.length)], dtype=np.int64)


def _checked(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"example {index} of {length}")
    return index % length
