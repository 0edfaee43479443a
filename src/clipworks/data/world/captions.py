"""What is said about a scene: short, long, web-like and rewritten captions, and hard negatives.

A caption is made in two steps. A `Claim` states what it says, independent of any language, and `holds`
decides whether a scene bears it out; `say` puts a claim into English, German, French or Chinese. Hard
negatives are claims changed in one place and checked to be false. `rewrite` sees a caption and nothing
else. Every random choice is drawn from the scene's own numbers and `seed`, so texts are repeatable, and
the same `seed` makes a caption and its negative a pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from clipworks.data.world.kinds import Kind, pick, stream
from clipworks.data.world.scenes import (
    ATTRIBUTES,
    OPPOSITE,
    Object,
    Scene,
    SceneConfig,
    graph,
    hidden,
    render,
    sample,
    truth,
)
from clipworks.data.world.words import (
    BACKGROUND_PHRASES,
    LANGUAGES,
    PLACE_PHRASES,
    PLACES,
    RELATION_PHRASES,
    STYLE_PHRASES,
    Thing,
    another,
    check_language,
    french_de,
    listing,
    noun_phrase,
    relation_phrase,
    sentence,
)
from clipworks.errors import ConfigError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Claim:
    """What a caption says.

    Attributes:
        things: what is there.
        relation: how the first of two things stands to the second, or None.
        place: where in the picture the only thing is, or None.
        background: where it all is, or None if that is not mentioned.
        style: what sort of picture it is, or None if that is not mentioned.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class AltText:
    """A web-like text and what is wrong with it: `"none"`, `"partial"`, `"wrong"` or `"boilerplate"`."""

    text: str
    fault: str


@dataclass(frozen=True)
class Region:
    """One object's description, and the box x0 y0 x1 y1 around its visible part, ends exclusive."""

    object: int
    text: str
    box: tuple[int, int, int, int]


# ---------------------------------------------------------------------------------------------- truth


def matches(thing: Thing, scene: Scene) -> tuple[int, ...]:
    """The objects of the scene that have every property that `thing` mentions."""
    asked = [
        (name, value)
        for name in ("shape", "color", "texture", "size")
        if (value := getattr(thing, name)) is not None
    ]
    everything = enumerate(scene.objects)
    return tuple(i for i, o in everything if all(getattr(o, name) == value for name, value in asked))


def place(thing: Object) -> str:
    """In which ninth of the picture an object's center lies, one of `words.PLACES`."""
    return PLACES[3 * min(int(thing.y * 3), 2) + min(int(thing.x * 3), 2)]


def holds(claim: Claim, scene: Scene, *, generous: bool = False) -> bool:
    """Whether a scene bears a claim out.

    "A red circle" holds if there is at least one, "two red circles" only if there are exactly two. Things
    named side by side must be different objects. A relation must be in the scene's graph; with `generous`
    it is enough that the centers differ that way at all, or that one covers a little of the other. What
    fails even so is false for every reader.
    """
    if claim.background not in (None, scene.background) or claim.style not in (None, scene.style):
        return False
    found = [matches(thing, scene) for thing in claim.things]
    for thing, objects in zip(claim.things, found, strict=True):
        if len(objects) != thing.count if thing.count > 1 else not objects:
            return False
    if claim.place is not None and all(place(scene.objects[i]) != claim.place for i in found[0]):
        return False
    if claim.relation is not None:
        pairs = [(i, j) for i in found[0] for j in found[1] if i != j]
        if generous:
            return any(_roughly(scene, i, claim.relation, j) for i, j in pairs)
        edges = set(graph(scene))
        return any((i, claim.relation, j) in edges for i, j in pairs)
    singles = [objects for thing, objects in zip(claim.things, found, strict=True) if thing.count == 1]
    return _all_different(singles)


def _all_different(sets: list[tuple[int, ...]]) -> bool:
    """Whether one object can be taken from each set so that none is taken twice."""
    if not sets:
        return True
    sets = sorted(sets, key=len)
    return any(_all_different([tuple(j for j in rest if j != i) for rest in sets[1:]]) for i in sets[0])


def _roughly(scene: Scene, i: int, relation: str, j: int) -> bool:
    a, b = scene.objects[i], scene.objects[j]
    if relation in ("in front of", "behind"):
        return (i > j) == (relation == "in front of") and max(hidden(a, b), hidden(b, a)) > 0
    apart = b.x - a.x if relation in ("left of", "right of") else b.y - a.y
    return apart > 0 if relation in ("left of", "above") else apart < 0


# --------------------------------------------------------------------------------------------- claims


def _thing(thing: Object, texture: bool = True, size: bool = True) -> Thing:
    return Thing(
        thing.shape,
        thing.color,
        thing.texture if texture and thing.texture != "plain" else None,
        thing.size if size else None,
    )


def _groups(scene: Scene, texture: bool, size: bool) -> list[tuple[Thing, list[int]]]:
    """Objects that are called the same, counted; a group that would be ambiguous says that it is plain."""
    members: dict[Thing, list[int]] = {}
    for i, thing in enumerate(scene.objects):
        members.setdefault(_thing(thing, texture, size), []).append(i)
    groups = []
    for name, group in members.items():
        if len(group) > 1 and len(matches(name, scene)) != len(group):
            name = replace(name, texture="plain")
        groups.append((replace(name, count=len(group)), group))
    return groups


def claim_of(scene: Scene, seed: int = 0, *, styled: bool = False) -> Claim:
    """What a short caption says: up to three kinds of things, always their shape and color.

    Whether texture, size, background, a relation or a place are mentioned is drawn from the scene's
    numbers and `seed`. The style is mentioned only if `styled`.
    """
    rng = stream("captions/short", scene.seed, scene.index, seed)
    texture, size, tell, ground = (float(t) for t in rng.random(4))
    groups = _groups(scene, texture < 0.75, size < 0.4)[:3]
    things = tuple(name for name, _ in groups)
    claim = Claim(
        things,
        background=scene.background if ground < 0.6 else None,
        style=scene.style if styled else None,
    )
    if len(things) == 1 and things[0].count == 1 and tell < 0.35:
        return replace(claim, place=place(scene.objects[groups[0][1][0]]))
    if len(things) >= 2 and things[0].count == things[1].count == 1 and tell < 0.6:
        relations = _between(scene, groups[0][1][0], groups[1][1][0])
        if relations:
            return replace(claim, things=things[:2], relation=pick(rng, relations))
    return claim


def _between(scene: Scene, i: int, j: int) -> tuple[str, ...]:
    return tuple(relation for a, relation, b in graph(scene) if (a, b) == (i, j))


def relation_claims(scene: Scene, seed: int = 0) -> tuple[Claim, Claim]:
    """A true claim about where things are, and the same turned around and false.

    Two things and their relation where the scene has a pair for which the reverse is false of all objects
    that answer to the two names; otherwise one thing and its place in the picture.
    """
    rng = stream("captions/relation", scene.seed, scene.index, seed)
    edges = list(graph(scene))
    for k in rng.permutation(len(edges)):
        i, relation, j = edges[k]
        true = Claim((_thing(scene.objects[i]), _thing(scene.objects[j])), relation)
        false = replace(true, relation=OPPOSITE[relation])
        if not holds(false, scene, generous=True):
            return true, false
    return _place_claims(scene, rng)


def _place_claims(scene: Scene, rng: np.random.Generator) -> tuple[Claim, Claim]:
    i = int(rng.random() * len(scene.objects))
    name = _thing(scene.objects[i])
    here = place(scene.objects[i])
    taken = {place(scene.objects[k]) for k in matches(name, scene)}
    opposite = PLACES[len(PLACES) - 1 - PLACES.index(here)]
    free = tuple(p for p in PLACES if p not in taken)
    there = opposite if opposite in free else pick(rng, free or PLACES)
    return Claim((name,), place=here), Claim((name,), place=there)


def negative_claim(scene: Scene, seed: int = 0, *, styled: bool = False) -> Claim:
    """The claim of the short caption with one attribute changed so that it is false.

    Half of the time, if it can be done, two things exchange a color, texture, size or shape; otherwise a
    value gives way to another one. Some thing that is then named is nowhere in the scene.
    """
    claim = claim_of(scene, seed, styled=styled)
    rng = stream("captions/negative", scene.seed, scene.index, seed)
    swaps, changes = [], []
    for name in ("color", "shape", "texture", "size"):
        for a, b in permutations(range(len(claim.things)), 2):
            left, right = getattr(claim.things[a], name), getattr(claim.things[b], name)
            if a < b and left != right and None not in (left, right):
                swaps.append({a: (name, right), b: (name, left)})
        for a, thing in enumerate(claim.things):
            now = getattr(thing, name)
            changes += [{a: (name, value)} for value in ATTRIBUTES[name] if now not in (None, value)]
    ordered = [changes[k] for k in rng.permutation(len(changes))]
    shuffled = [swaps[k] for k in rng.permutation(len(swaps))]
    for edit in shuffled + ordered if rng.random() < 0.5 else ordered:
        things = tuple(
            replace(thing, **dict([edit[a]])) if a in edit else thing for a, thing in enumerate(claim.things)
        )
        if any(not matches(things[a], scene) for a in edit):
            return replace(claim, things=things)
    raise AssertionError("18 shapes cannot all be in a scene of 16 objects")


# ---------------------------------------------------------------------------------------------- words


def say(claim: Claim, language: str = "en") -> str:
    """A claim in words, without a capital or a stop.

    Raises:
        ConfigError: if the world does not speak `language`.
    """
    check_language(language)
    if language == "zh":
        return _say_chinese(claim)
    case = "dative" if claim.style and language == "de" else "nominative"
    phrases = [noun_phrase(thing, language, case) for thing in claim.things]
    if claim.style and language == "fr":
        phrases = [french_de(phrase) for phrase in phrases]
    parts = [STYLE_PHRASES[claim.style][language]] if claim.style else []
    if claim.relation:
        parts += [phrases[0], relation_phrase(claim.relation, claim.things[1], language)]
    else:
        parts.append(listing(phrases, language))
        if claim.place:
            parts.append(PLACE_PHRASES[claim.place][language])
    if claim.background:
        parts.append(BACKGROUND_PHRASES[claim.background][language])
    return " ".join(parts)


def _say_chinese(claim: Claim) -> str:
    start = STYLE_PHRASES[claim.style]["zh"] if claim.style else ""
    ground = BACKGROUND_PHRASES[claim.background]["zh"] if claim.background else ""
    phrases = [noun_phrase(thing, "zh") for thing in claim.things]
    if claim.relation:
        said = phrases[0] + relation_phrase(claim.relation, claim.things[1], "zh")
    elif claim.place:
        said = f"{phrases[0]}在{PLACE_PHRASES[claim.place]['zh']}"
    elif ground:
        return f"{start}{ground}有{listing(phrases, 'zh')}"
    else:
        return start + listing(phrases, "zh")
    return f"{start}{ground}，{said}" if ground else start + said


_IS = {"en": " is ", "de": " ist ", "fr": " se trouve ", "zh": ""}
_SETTING = {"en": "the scene is ", "de": "die Szene spielt ", "fr": "la scène se passe ", "zh": "场景在"}


def _long(scene: Scene, language: str, seed: int) -> str:
    rng = stream("captions/long", scene.seed, scene.index, seed)
    edges = graph(scene)
    sentences: list[str] = []
    named: set[Thing] = set()
    for i, thing in enumerate(scene.objects):
        name = _thing(thing)
        subject = another(name, language) if name in named else noun_phrase(name, language)
        named.add(name)
        related = tuple((relation, j) for a, relation, j in edges if a == i and j < i)
        if related and rng.random() < 0.6:
            relation, j = pick(rng, related)
            rest = relation_phrase(relation, _thing(scene.objects[j]), language)
        else:
            where = PLACE_PHRASES[place(thing)][language]
            rest = f"在{where}" if language == "zh" else where
        sentences.append(sentence(subject + _IS[language] + rest, language))
    sentences.append(sentence(_SETTING[language] + BACKGROUND_PHRASES[scene.background][language], language))
    return ("" if language == "zh" else " ").join(sentences)


def regions(scene: Scene, size: int, language: str = "en") -> tuple[Region, ...]:
    """A full description of every object of which something is seen, with its box at `size` pixels.

    Raises:
        ConfigError: if the world does not speak `language`, or has no pictures of that size.
    """
    check_language(language)
    boxes = truth(scene, size).boxes
    return tuple(
        Region(i, noun_phrase(replace(_thing(thing), texture=thing.texture), language), tuple(box.tolist()))
        for i, (thing, box) in enumerate(zip(scene.objects, boxes, strict=True))
        if box[2] > box[0]
    )


# ---------------------------------------------------------------------------------------- web-like text

_FILLERS = {
    "en": ("Free shipping", "Stock photo", "Click to enlarge", "Shop now", "HD wallpaper", "Image 3 of 12"),
    "de": ("Versandkostenfrei", "Archivbild", "Zum Vergrößern klicken", "Jetzt kaufen", "Bild 3 von 12"),
    "fr": ("Livraison gratuite", "Photo d'archives", "Cliquez pour agrandir", "Image 3 sur 12"),
    "zh": ("包邮", "图库照片", "点击放大", "立即购买", "高清壁纸"),
}
_FILES = ("IMG_{:04d}.JPG", "DSC{:05d}.jpg", "untitled-{}.png", "banner_{}.webp", "photo ({}).jpeg")


def alt_text(scene: Scene, language: str = "en", *, noise: float = 0.0, seed: int = 0) -> AltText:
    """A web-like alternative text.

    With probability `noise` it is bad: two times in three it names only things that are not in the scene
    (`"wrong"`), otherwise it says nothing of the picture (`"boilerplate"`). The others are true; a part
    of them, half of `noise`, names no more than one shape (`"partial"`). Trade talk and file
    names decorate texts with probability `noise`. So 0 is the bare truth and 1 never tells any of it.

    Raises:
        ConfigError: if `noise` is outside 0..1 or the world does not speak `language`.
    """
    check_language(language)
    if not 0 <= noise <= 1:
        raise ConfigError(f"noise {noise} is outside 0..1")
    rng = stream("captions/alt", scene.seed, scene.index, seed)
    # All draws come first: a text that is true at one noise stays the same text at any smaller one.
    bad, sort, partial, talk, form, shop, number = (float(t) for t in rng.random(7))
    things = [name for name, _ in _groups(scene, form < 0.5, False)[:3]]
    file_name = _FILES[int(shop * len(_FILES))].format(int(number * 9999))
    filler = _FILLERS[language][int(shop * len(_FILLERS[language]))]
    fault = "none"
    if bad < noise:
        fault = "wrong" if sort < 2 / 3 else "boilerplate"
    elif partial < noise / 2:
        fault = "partial"
    if fault == "boilerplate":
        return AltText(file_name if talk < 0.5 else f"{filler} | {file_name}", fault)
    if fault == "wrong":
        things = _strangers(scene, things, rng)
    if fault == "partial":
        things = [Thing(things[0].shape)]
    names = [_bare(thing, language) for thing in things]
    glue = (", ", " | ", " - ", " + ")[int(form * 4)]
    text = glue.join(names)
    if talk < noise:
        text = f"{text} | {filler}" if number < 0.5 else f"{filler}: {text} {file_name}"
    return AltText(text, fault)


def _bare(thing: Thing, language: str) -> str:
    """A noun phrase without its article."""
    phrase = noun_phrase(thing, language)
    if thing.count > 1:
        return phrase
    return phrase[2:] if language == "zh" else phrase.split(" ", 1)[1]


def _strangers(scene: Scene, things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    """As many other things, of shapes and of colors that are nowhere in the scene."""
    shapes = tuple(s for s in ATTRIBUTES["shape"] if all(o.shape != s for o in scene.objects))
    colors = tuple(c for c in ATTRIBUTES["color"] if all(o.color != c for o in scene.objects))
    return [
        replace(thing, shape=pick(rng, shapes), color=pick(rng, colors) if colors else None, texture=None)
        for thing in things
    ]


# ---------------------------------------------------------------------------------------- rewriting

_SYNONYMS: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        (r"\bcircle(s?)\b", r"disc\1"), (r"\blarge\b", "big"), (r"\bsmall\b", "little"),
        (r"\bcyan\b", "turquoise"), (r"\bgray\b", "grey"), (r"\bpurple\b", "violet"),
        (r"\boval(s?)\b", r"ellipse\1"), (r"\btree(s?)\b", r"fir\1"),
        (r"\bdrop(s?)\b", r"droplet\1"), (r"\bdiamond\b", "rhombus"),
        (r"\bbelow\b", "underneath"), (r"\bto the (left|right) of\b", r"\1 of"),
    ),
    "de": (
        (r"\bklein(e[rsnm]?)\b", r"winzig\1"), (r"\bgroß(e[rsnm]?)\b", r"riesig\1"),
        (r"\bkariert(e[rsnm]?)\b", r"gewürfelt\1"), (r"\bviolett(e[rsnm]?)\b", r"lilafarben\1"),
        (r"\blinks von\b", "zur Linken von"), (r"\brechts von\b", "zur Rechten von"),
    ),
    "fr": (
        (r"\bgrands?\b", "gros"), (r"\bgrande(s?)\b", r"grosse\1"), (r"\bviolet(te)?(s?)\b", r"mauve\2"),
        (r"\brayé", "zébré"), (r"\bà (gauche|droite) d", r"sur la \1 d"), (r"\ben dessous d", "au-dessous d"),
    ),
    "zh": (
        (r"(?<!大)小的", "小小的"), (r"大的", "大大的"), (r"粉色", "粉红色"), (r"橙色", "橘色"),
        (r"左边", "左侧"), (r"右边", "右侧"), (r"上方", "上面"), (r"下方", "下面"), (r"房子", "小屋"),
    ),
}  # fmt: skip
_FRAMES: dict[str, tuple[str, ...]] = {
    "en": ("{}", "a picture showing {}", "an image of {}", "{}, seen in a picture", "here: {}"),
    "de": ("{}", "Bild: {}", "zu sehen: {}", "hier zu sehen: {}", "im Bild: {}"),
    "fr": ("{}", "image : {}", "à voir ici : {}", "dans cette image : {}", "on voit {}"),
    "zh": ("{}", "图中：{}", "画面内容：{}", "可以看到：{}", "这里：{}"),
}


def rewrite(text: str, language: str = "en", *, seed: int = 0) -> str:
    """The same caption in other words; it sees nothing but the caption.

    Words give way to synonyms, the background moves to the front, English relations are turned around
    ("A above B" becomes "B below A"), and the whole gets a frame. Words that it does not know stay.

    Raises:
        ConfigError: if the world does not speak `language`.
    """
    check_language(language)
    rng = stream(f"captions/rewrite/{text}", seed, 0)
    ground = ""
    if language != "zh":
        for phrases in BACKGROUND_PHRASES.values():
            if text.endswith(" " + phrases[language]):
                ground = phrases[language]
                text = text[: -len(ground) - 1]
    if language == "en" and rng.random() < 0.5:
        text = _turned(text)
    for pattern, other in _SYNONYMS[language]:
        if rng.random() < 0.6:
            text = re.sub(pattern, other, text)
    if ground and language == "en" and rng.random() < 0.4:
        return f"{ground}, {text}"
    if ground:
        text = f"{text} {ground}"
    if text.startswith(tuple(phrases[language] for phrases in STYLE_PHRASES.values())):
        return text  # "a photo of" is frame enough
    return str(pick(rng, _FRAMES[language])).format(text)


def _turned(text: str) -> str:
    for relation, phrases in RELATION_PHRASES.items():
        first, found, second = text.partition(f" {phrases['en']} ")
        # Only whole things may change places: not "a photo of a ...", nothing with an "and".
        if found and first.startswith(("a ", "an ")) and not re.search(r" (of|and) ", first + " " + second):
            return f"{second} {RELATION_PHRASES[OPPOSITE[relation]]['en']} {first}"
    return text


# ----------------------------------------------------------------------------------------- front door


def describe(
    scene: Scene,
    kind: str = "short",
    language: str = "en",
    *,
    noise: float = 0.0,
    seed: int = 0,
    styled: bool = False,
) -> str:
    """A text about a scene.

    Args:
        scene: what is described.
        kind: `"short"`; `"long"`, one sentence an object and one for the background; `"alt"`, web-like;
            `"rewrite"`, the short one in other words; `"negative-attribute"`, the short one with an
            attribute changed and false; `"relation"`, where things are; `"negative-relation"`, the same
            turned around and false.
        language: `"en"`, `"de"`, `"fr"` or `"zh"`.
        noise: for `"alt"`, how often it is bad, see `alt_text`.
        seed: which of many wordings; the same one pairs a caption with its negative.
        styled: whether short captions, their rewrites and negatives name the style.

    Raises:
        ConfigError: if a kind or language is unknown, or noise is given where it means nothing.
    """
    check_language(language)
    if kind not in KINDS:
        raise ConfigError(f"kind of caption {kind!r} is unknown{nearest(kind, KINDS)}")
    if noise and kind != "alt":
        raise ConfigError(f"noise {noise} is for the kind 'alt'; {kind!r} captions have none")
    makers: dict[str, Callable[[], str]] = {
        "short": lambda: say(claim_of(scene, seed, styled=styled), language),
        "long": lambda: _long(scene, language, seed),
        "alt": lambda: alt_text(scene, language, noise=noise, seed=seed).text,
        "rewrite": lambda: rewrite(say(claim_of(scene, seed, styled=styled), language), language, seed=seed),
        "relation": lambda: say(relation_claims(scene, seed)[0], language),
        "negative-attribute": lambda: say(negative_claim(scene, seed, styled=styled), language),
        "negative-relation": lambda: say(relation_claims(scene, seed)[1], language),
    }
    return makers[kind]()


KINDS: tuple[str, ...] = (
    "short", "long", "alt", "rewrite", "relation", "negative-attribute", "negative-relation",
)  # fmt: skip


def preview(count: int, seed: int, size: int) -> Image:
    """A sheet of `count` scenes, each with all kinds of captions and its short one in every language."""
    from clipworks.data.world.sheet import contact_sheet

    tiles = []
    for index in range(count):
        scene = sample(SceneConfig(), seed, index)
        lines = [f"{kind}: {describe(scene, kind)}" for kind in KINDS]
        lines += [f"alt, noise 1: {describe(scene, 'alt', noise=1.0)}"]
        lines += [f"{language}: {describe(scene, 'short', language)}" for language in LANGUAGES[1:]]
        tiles.append((render(scene, size).pixels, "\n".join(lines)))
    return contact_sheet(tiles, text_width=280)


KIND = Kind(
    name="captions",
    about="the same scenes with short, long, web-like and rewritten captions and hard negatives",
    config=SceneConfig,
    record=Scene,
    sample=sample,
    render=render,
    describe=describe,
    preview=preview,
)
