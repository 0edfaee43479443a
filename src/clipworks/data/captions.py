"""Texts for pictures of known classes: names, synonyms and templates, drawn for training or all of them.

`ClassTexts` is what a zero-shot head is built from: every template, letter by letter. `CaptionGrid` is
what training draws from: grammatical captions of one class, one name and one template at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

from clipworks.data.randomness import Randomness
from clipworks.data.source import TextChoices
from clipworks.data.templates import (
    EMOJI_TEMPLATES,
    IMAGENET_TEMPLATES,
    PHOTO_TEMPLATE,
    SIMPLE_TEMPLATES,
    TRAINING_TEMPLATES,
)
from clipworks.errors import ConfigError, DataError, nearest

__all__ = [
    "EMOJI_TEMPLATES",
    "IMAGENET_TEMPLATES",
    "PHOTO_TEMPLATE",
    "SIMPLE_TEMPLATES",
    "TRAINING_TEMPLATES",
    "AnyOf",
    "CaptionGrid",
    "ClassTexts",
    "class_names",
    "class_texts",
    "draw_text",
    "fill",
    "indefinite_article",
    "sample_caption",
]

# Spelled with a vowel, spoken with a consonant, and the other way round.
_CONSONANT_SOUND = re.compile(
    r"eu|ew|uni(?!m|n)|use|usu|ute|uku|ura|uro|one\b|one-|once|u\b|u-|oui", re.IGNORECASE
)
_SILENT_H = re.compile(r"hour|honest|honou?r|heir|hors\b", re.IGNORECASE)
# Letters whose names begin with a vowel: an MRI, an SUV, but a CD, a USB stick.
_VOWEL_LETTERS = frozenset("AEFHILMNORSX")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    """a an the some any no my your his her its our their this that these those each every many several
    two three"""
)
# Endings that look like a plural and are not one, and plurals that do not look like one.
_SINGULAR_ENDINGS = ("ss", "us", "is", "ops")
_SINGULAR_WORDS = _words("lens gas bias canvas christmas species series atlas pancreas pampas")
_PLURAL_WORDS = _words("people children men women feet teeth geese mice oxen cattle police")
_UNCOUNTED = _words(
    """guacamole brass thatch confectionery popcorn bread rice cheese butter milk water grass sand snow ice
    rain fog money luggage furniture clothing jewelry hair music traffic spaghetti cotton wool wood paper
    plastic gold silver broccoli celery spinach garlic honey sugar salt soup bacon beef pork tofu sushi lava
    smoke fire mud wheat mashed-potato ice-cream cauliflower"""
)


@lru_cache(maxsize=1 << 14)
def indefinite_article(name: str) -> str:
    """The article before a name: "a", "an", or "" before plurals, uncountable things and determiners.

    A rule of thumb for English: it hears "an hour", "a unicorn", "an MRI scan", "an 8-ball", and takes
    words in -s for plurals unless they end in -ss, -us, -is.
    """
    words = name.split()
    if not words:
        return ""
    first, last = words[0], words[-1].strip(".,;:!?)").casefold()
    if first.casefold() in _DETERMINERS:
        return ""
    head = re.split(r"\b(?:of|in|on|with|for|from)\b", name)[0].split()  # "cups of coffee": the noun is cups
    if head:
        last = head[-1].strip(".,;:!?)").casefold()
    if last in _UNCOUNTED or name.casefold().replace(" ", "-") in _UNCOUNTED or last in _PLURAL_WORDS:
        return ""
    plural = last.endswith("s") and len(last) > 3 and not last.endswith(_SINGULAR_ENDINGS)
    if plural and last not in _SINGULAR_WORDS:
        return ""
    return "an" if _vowel_sound(first) else "a"


def _vowel_sound(word: str) -> bool:
    word = word.lstrip("\"'(“‘")
    if not word:
        return False
    if word[0].isdigit():
        number = re.match(r"\d+", word)
        digits = number.group() if number else ""
        return digits.startswith("8") or (digits[:2] in {"11", "18"} and len(digits) % 3 == 2)
    letters = re.split(r"[^A-Za-z]", word)[0]
    if letters.isupper() and (len(letters) <= 4 or not re.search("[AEIOU]", letters)):
        return letters[0] in _VOWEL_LETTERS
    if _SILENT_H.match(word):
        return True
    return word[0].casefold() in "aeiouàáâäæèéêëìíîïòóôöøùúûü" and not _CONSONANT_SOUND.match(word)


def fill(template: str, name: str) -> str:
    """Put a name into a template; `{a}` becomes its article, and vanishes with its blank where there is none.

    >>> fill("a photo of {a} {}.", "orange"), fill("{a} {} here", "sunglasses")
    ('a photo of an orange.', 'sunglasses here')
    """
    if "{a}" in template:
        article = indefinite_article(name)
        template = template.replace("{a} ", f"{article} " if article else "").replace("{a}", article)
    return template.replace("{}", name)


def sample_caption(names: Sequence[str], templates: Sequence[str], generator: Randomness) -> str:
    """One caption of a class: the first name half of the time, else another one, in any template.

    The first name is the one people use; the others are often Latin or regional.
    """
    which = 0
    if len(names) > 1 and generator.integers(2):
        which = 1 + generator.integers(len(names) - 1)
    return fill(templates[generator.integers(len(templates))], names[which])


class CaptionGrid(Sequence[str]):
    """All captions of one class, names × templates, of which `draw` picks one as `sample_caption` does."""

    __slots__ = ("names", "templates")

    def __init__(self, names: Sequence[str], templates: Sequence[str] = TRAINING_TEMPLATES) -> None:
        if not names or not templates:
            raise DataError("captions need at least one name and one template")
        self.names, self.templates = tuple(names), tuple(templates)

    def __len__(self) -> int:
        return len(self.names) * len(self.templates)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return fill(self.templates[index % len(self.templates)], self.names[index // len(self.templates)])

    def draw(self, generator: Randomness) -> str:
        """One caption; see `sample_caption`."""
        return sample_caption(self.names, self.templates, generator)


class AnyOf(Sequence[str]):
    """Several groups of texts, for instance one a language; `draw` picks a group, then one of its texts."""

    __slots__ = ("_flat", "groups")

    def __init__(self, groups: Sequence[TextChoices]) -> None:
        self.groups = [group for group in groups if len(group)]
        if not self.groups:
            raise DataError("there is no text to draw from")
        self._flat: list[str] | None = None

    def __bool__(self) -> bool:
        return True  # without listing all texts to count them

    def _texts(self) -> list[str]:
        if self._flat is None:
            lists = ([group] if isinstance(group, str) else group for group in self.groups)
            self._flat = [text for texts in lists for text in texts]
        return self._flat

    def __len__(self) -> int:
        return len(self._texts())

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._texts()[index]

    def draw(self, generator: Randomness) -> str:
        """One text of one group."""
        return draw_text(self.groups[generator.integers(len(self.groups))], generator)


def draw_text(choices: TextChoices, generator: Randomness) -> str:
    """One of the texts: a single one as it is, of a list any, a `CaptionGrid` or `AnyOf` weighs its own."""
    if isinstance(choices, str):
        return choices
    draw = getattr(choices, "draw", None)
    if draw is not None:
        return str(draw(generator))
    return choices[generator.integers(len(choices))]


@dataclass(frozen=True)
class ClassTexts:
    """What is said about each class, for estimators and zero-shot heads.

    Attributes:
        names: one name a class, in the order of the labels.
        synonyms: further names of each class, or None.
        descriptions: whole sentences about each class, taken as they stand, or None.
        templates: sentences with `{}` for the name.

    Raises:
        DataError: if there are no names, or not one entry a class in `synonyms` or `descriptions`.
        ConfigError: if a template has no `{}`.
    """

    names: Sequence[str]
    synonyms: Sequence[Sequence[str]] | None = None
    descriptions: Sequence[Sequence[str]] | None = None
    templates: Sequence[str] = (PHOTO_TEMPLATE,)

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names:
            raise DataError(f"class names are a list with at least one name, not {self.names!r}")
        for field in ("synonyms", "descriptions"):
            entries = getattr(self, field)
            if entries is not None:
                if len(entries) != len(self.names):
                    raise DataError(f"{field} has {len(entries)} entries for {len(self.names)} classes")
                object.__setattr__(self, field, tuple(tuple(entry) for entry in entries))
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates:
            if "{}" not in template:
                raise ConfigError(f"template {template!r} has no {{}} where the class name belongs")

    def __len__(self) -> int:
        return len(self.names)

    def texts(self, class_index: int) -> list[str]:
        """All sentences of a class: every template with the name and each synonym, then the descriptions."""
        names = [self.names[class_index]]
        if self.synonyms is not None:
            names += [name for name in self.synonyms[class_index] if name not in names]
        texts = [fill(template, name) for name in names for template in self.templates]
        if self.descriptions is not None:
            texts += self.descriptions[class_index]
        return texts

    def all_names(self, class_index: int) -> list[str]:
        """The name of a class and its synonyms, without repetition."""
        others = () if self.synonyms is None else self.synonyms[class_index]
        return list(dict.fromkeys([self.names[class_index], *others]))

    def select(self, classes: Sequence[int | str]) -> ClassTexts:
        """The texts of some classes, by index or name, in the order given.

        Raises:
            DataError: if there is no such class.
        """
        chosen = class_indices(self.names, classes)

        def pick(entries: Sequence[Sequence[str]] | None) -> list[Sequence[str]] | None:
            return None if entries is None else [entries[index] for index in chosen]

        names = [self.names[index] for index in chosen]
        return ClassTexts(names, pick(self.synonyms), pick(self.descriptions), self.templates)

    def grids(self, templates: Sequence[str] = TRAINING_TEMPLATES) -> list[CaptionGrid]:
        """One `CaptionGrid` a class, from which training draws."""
        return [CaptionGrid(self.all_names(index), templates) for index in range(len(self))]


def class_indices(names: Sequence[str], classes: Sequence[int | str]) -> list[int]:
    """Classes given by index or name as indices.

    Raises:
        DataError: for an unknown class, with the nearest names, or one that is given twice.
    """
    where = {name: index for index, name in reversed(list(enumerate(names)))}
    chosen: list[int] = []
    for one in classes:
        if isinstance(one, str):
            if one not in where:
                raise DataError(f"no class is named {one!r}{nearest(one, names)}")
            chosen.append(where[one])
        elif 0 <= int(one) < len(names):
            chosen.append(int(one))
        else:
            raise DataError(f"class {one} is outside of 0 to {len(names) - 1}")
    if len(set(chosen)) != len(chosen):
        raise DataError("a class is named twice")
    return chosen


def class_texts(path: str | Path, templates: Sequence[str] = (PHOTO_TEMPLATE,)) -> ClassTexts:
    """Read class names from a file: JSON or plain text.

    JSON may be a list of strings, a list of records `{index, name, names}` of which `index` gives the
    order and `names` the synonyms, or an object from index to name. Any other file has one name a line.

    Raises:
        DataError: if the file is missing, empty, or in none of these forms.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file of class names") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: class names cannot be read ({error})") from error
    if path.suffix.casefold() == ".json":
        try:
            names, synonyms = _from_json(json.loads(content))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not a list of class names, strings or records with index and name ({error})"
            ) from error
    else:
        names, synonyms = [line.strip() for line in content.splitlines() if line.strip()], None
    if not names:
        raise DataError(f"{path}: has no class names")
    return ClassTexts(names, synonyms, templates=templates)


def class_names(path: str | Path) -> list[str]:
    """The names alone of what `class_texts` reads."""
    return list(class_texts(path).names)


def _from_json(content: Any) -> tuple[list[str], list[list[str]] | None]:
    if isinstance(content, dict):
        content = [{"index": int(index), "name": name} for index, name in content.items()]
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__}")
    if all(isinstance(entry, str) for entry in content):
        return list(content), None
    if all("index" in entry for entry in content):
        content = sorted(content, key=lambda entry: int(entry["index"]))
        indices = [int(entry["index"]) for entry in content]
        if indices != list(range(len(indices))):
            raise ValueError("the indices are not 0, 1, 2, …")
    names = []
    for entry in content:
        if not isinstance(entry["name"], str):
            raise ValueError(f"{entry['name']!r} is no name")
        names.append(entry["name"])
    if not any("names" in entry for entry in content):
        return names, None
    return names, [
        [str(name) for name in entry.get("names", []) if name != entry["name"]] for entry in content
    ]
