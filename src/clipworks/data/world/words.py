"""Words and grammar of the world in English, German, French and Chinese.

`noun_phrase` is the heart: how many of which thing, with its adjectives, in the case that the sentence
asks for. German adjectives are declined after `ein` and, in the plural, without an article; French ones
agree with gender and number and stand where French puts them; Chinese things have their measure words.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipworks.errors import ConfigError, nearest

LANGUAGES: tuple[str, ...] = ("en", "de", "fr", "zh")


@dataclass(frozen=True)
class Thing:
    """How many of what. A property that is None is not mentioned."""

    shape: str
    color: str | None = None
    texture: str | None = None
    size: str | None = None
    count: int = 1


# English and Chinese: noun (plural or measure word). German: gender, singular, plural, dative plural,
# and the dative singular where it differs. French: gender, singular, plural.
_ENGLISH = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "diamond": "diamonds", "oval": "ovals",
    "semicircle": "semicircles", "ring": "rings", "crescent": "crescents", "cross": "crosses",
    "star": "stars", "heart": "hearts", "arrow": "arrows", "drop": "drops", "flower": "flowers",
    "house": "houses", "tree": "trees", "fish": "fish", "bolt": "lightning bolts",
}  # fmt: skip
_ENGLISH_NAME = {"bolt": "lightning bolt"}
_GERMAN = {
    "circle": ("m", "Kreis", "Kreise", "Kreisen"),
    "square": ("n", "Quadrat", "Quadrate", "Quadraten"),
    "triangle": ("n", "Dreieck", "Dreiecke", "Dreiecken"),
    "diamond": ("f", "Raute", "Rauten", "Rauten"),
    "oval": ("n", "Oval", "Ovale", "Ovalen"),
    "semicircle": ("m", "Halbkreis", "Halbkreise", "Halbkreisen"),
    "ring": ("m", "Ring", "Ringe", "Ringen"),
    "crescent": ("f", "Mondsichel", "Mondsicheln", "Mondsicheln"),
    "cross": ("n", "Kreuz", "Kreuze", "Kreuzen"),
    "star": ("m", "Stern", "Sterne", "Sternen"),
    "heart": ("n", "Herz", "Herzen", "Herzen", "Herzen"),
    "arrow": ("m", "Pfeil", "Pfeile", "Pfeilen"),
    "drop": ("m", "Tropfen", "Tropfen", "Tropfen"),
    "flower": ("f", "Blume", "Blumen", "Blumen"),
    "house": ("n", "Haus", "Häuser", "Häusern"),
    "tree": ("m", "Baum", "Bäume", "Bäumen"),
    "fish": ("m", "Fisch", "Fische", "Fischen"),
    "bolt": ("m", "Blitz", "Blitze", "Blitzen"),
}
_FRENCH = {
    "circle": ("m", "cercle", "cercles"),
    "square": ("m", "carré", "carrés"),
    "triangle": ("m", "triangle", "triangles"),
    "diamond": ("m", "losange", "losanges"),
    "oval": ("m", "ovale", "ovales"),
    "semicircle": ("m", "demi-cercle", "demi-cercles"),
    "ring": ("m", "anneau", "anneaux"),
    "crescent": ("m", "croissant", "croissants"),
    "cross": ("f", "croix", "croix"),
    "star": ("f", "étoile", "étoiles"),
    "heart": ("m", "cœur", "cœurs"),
    "arrow": ("f", "flèche", "flèches"),
    "drop": ("f", "goutte", "gouttes"),
    "flower": ("f", "fleur", "fleurs"),
    "house": ("f", "maison", "maisons"),
    "tree": ("m", "sapin", "sapins"),
    "fish": ("m", "poisson", "poissons"),
    "bolt": ("m", "éclair", "éclairs"),
}
_CHINESE = {
    "circle": ("圆形", "个"), "square": ("正方形", "个"), "triangle": ("三角形", "个"),
    "diamond": ("菱形", "个"), "oval": ("椭圆形", "个"), "semicircle": ("半圆形", "个"),
    "ring": ("圆环", "个"), "crescent": ("月牙", "弯"), "cross": ("十字", "个"), "star": ("星星", "颗"),
    "heart": ("爱心", "颗"), "arrow": ("箭头", "个"), "drop": ("水滴", "滴"), "flower": ("花", "朵"),
    "house": ("房子", "座"), "tree": ("树", "棵"), "fish": ("鱼", "条"), "bolt": ("闪电", "道"),
}  # fmt: skip

# Stems to which German endings are added; French masculine, feminine and their plurals.
_GERMAN_ADJECTIVES = {
    "red": "rot", "orange": "orangefarben", "yellow": "gelb", "green": "grün", "cyan": "türkisfarben",
    "blue": "blau", "purple": "violett", "pink": "rosafarben", "brown": "braun", "white": "weiß",
    "gray": "grau", "black": "schwarz", "plain": "einfarbig", "striped": "gestreift", "dotted": "gepunktet",
    "checkered": "kariert", "speckled": "gesprenkelt", "wavy": "gewellt", "shaded": "schattiert",
    "small": "klein", "medium": "mittelgroß", "large": "groß",
}  # fmt: skip
_FRENCH_ADJECTIVES = {
    "red": ("rouge", "rouge", "rouges", "rouges"),
    "orange": ("orange",) * 4,  # named after things, these do not agree
    "yellow": ("jaune", "jaune", "jaunes", "jaunes"),
    "green": ("vert", "verte", "verts", "vertes"),
    "cyan": ("turquoise",) * 4,
    "blue": ("bleu", "bleue", "bleus", "bleues"),
    "purple": ("violet", "violette", "violets", "violettes"),
    "pink": ("rose", "rose", "roses", "roses"),
    "brown": ("brun", "brune", "bruns", "brunes"),
    "white": ("blanc", "blanche", "blancs", "blanches"),
    "gray": ("gris", "grise", "gris", "grises"),
    "black": ("noir", "noire", "noirs", "noires"),
    "plain": ("uni", "unie", "unis", "unies"),
    "striped": ("rayé", "rayée", "rayés", "rayées"),
    "dotted": ("à pois",) * 4,
    "checkered": ("à carreaux",) * 4,
    "speckled": ("moucheté", "mouchetée", "mouchetés", "mouchetées"),
    "wavy": ("ondulé", "ondulée", "ondulés", "ondulées"),
    "shaded": ("ombré", "ombrée", "ombrés", "ombrées"),
    "small": ("petit", "petite", "petits", "petites"),
    "large": ("grand", "grande", "grands", "grandes"),
}
_CHINESE_ADJECTIVES = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "brown": "棕色", "white": "白色", "gray": "灰色", "black": "黑色",
    "plain": "纯色", "striped": "条纹", "dotted": "波点", "checkered": "格子", "speckled": "斑点",
    "wavy": "波浪纹", "shaded": "渐变", "small": "小", "medium": "中等大小", "large": "大",
}  # fmt: skip
_COUNTS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen",
    "de": "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
    "sechzehn",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
    "zh": "零 一 两 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六",
}
COUNTS: dict[str, tuple[str, ...]] = {language: tuple(words.split()) for language, words in _COUNTS.items()}

BACKGROUND_PHRASES: dict[str, dict[str, str]] = {
    "grass": {"en": "on grass", "de": "auf Gras", "fr": "sur de l'herbe", "zh": "草地上"},
    "sky": {"en": "in the sky", "de": "am Himmel", "fr": "dans le ciel", "zh": "天空中"},
    "sand": {"en": "on sand", "de": "auf Sand", "fr": "sur du sable", "zh": "沙地上"},
    "water": {"en": "on water", "de": "auf Wasser", "fr": "sur l'eau", "zh": "水面上"},
    "brick": {
        "en": "on a brick wall",
        "de": "an einer Backsteinmauer",
        "fr": "sur un mur de briques",
        "zh": "砖墙上",
    },
    "wood": {"en": "on wood", "de": "auf Holz", "fr": "sur du bois", "zh": "木板上"},
    "snow": {"en": "on snow", "de": "auf Schnee", "fr": "sur la neige", "zh": "雪地上"},
    "night": {"en": "at night", "de": "bei Nacht", "fr": "de nuit", "zh": "夜色中"},
    "stone": {"en": "on stone", "de": "auf Stein", "fr": "sur de la pierre", "zh": "石头上"},
    "paper": {"en": "on paper", "de": "auf Papier", "fr": "sur du papier", "zh": "纸上"},
}
STYLE_PHRASES: dict[str, dict[str, str]] = {
    "flat": {"en": "a drawing of", "de": "eine Zeichnung von", "fr": "un dessin", "zh": "一幅平面图画："},
    "sketch": {
        "en": "a pencil sketch of",
        "de": "eine Bleistiftskizze von",
        "fr": "un croquis",
        "zh": "一幅铅笔素描：",
    },
    "photo": {"en": "a photo of", "de": "ein Foto von", "fr": "une photo", "zh": "一张照片："},
    "inverted": {"en": "a negative of", "de": "ein Negativ von", "fr": "un négatif", "zh": "一张负片："},
    "pixelated": {
        "en": "pixel art of",
        "de": "ein Pixelbild von",
        "fr": "une image pixelisée",
        "zh": "一幅像素画：",
    },
    "watercolor": {
        "en": "a watercolor of",
        "de": "ein Aquarell von",
        "fr": "une aquarelle",
        "zh": "一幅水彩画：",
    },
}
RELATION_PHRASES: dict[str, dict[str, str]] = {
    "left of": {"en": "to the left of", "de": "links von", "fr": "à gauche", "zh": "左边"},
    "right of": {"en": "to the right of", "de": "rechts von", "fr": "à droite", "zh": "右边"},
    "above": {"en": "above", "de": "über", "fr": "au-dessus", "zh": "上方"},
    "below": {"en": "below", "de": "unter", "fr": "en dessous", "zh": "下方"},
    "in front of": {"en": "in front of", "de": "vor", "fr": "devant", "zh": "前面"},
    "behind": {"en": "behind", "de": "hinter", "fr": "derrière", "zh": "后面"},
}
PLACE_PHRASES: dict[str, dict[str, str]] = {
    "top left": {"en": "at the top left", "de": "oben links", "fr": "en haut à gauche", "zh": "左上角"},
    "top": {"en": "at the top", "de": "oben in der Mitte", "fr": "en haut au centre", "zh": "上部中间"},
    "top right": {"en": "at the top right", "de": "oben rechts", "fr": "en haut à droite", "zh": "右上角"},
    "left": {"en": "on the left", "de": "am linken Rand", "fr": "sur le bord gauche", "zh": "左侧中间"},
    "center": {"en": "in the center", "de": "in der Mitte", "fr": "au centre", "zh": "正中间"},
    "right": {"en": "on the right", "de": "am rechten Rand", "fr": "sur le bord droit", "zh": "右侧中间"},
    "bottom left": {"en": "at the bottom left", "de": "unten links", "fr": "en bas à gauche", "zh": "左下角"},
    "bottom": {"en": "at the bottom", "de": "unten in der Mitte", "fr": "en bas au centre", "zh": "下部中间"},
    "bottom right": {
        "en": "at the bottom right",
        "de": "unten rechts",
        "fr": "en bas à droite",
        "zh": "右下角",
    },
}
PLACES: tuple[str, ...] = tuple(PLACE_PHRASES)


def check_language(language: str) -> None:
    """Raises: ConfigError: if the world does not speak `language`."""
    if language not in LANGUAGES:
        raise ConfigError(
            f"language {language!r} is none of {', '.join(LANGUAGES)}{nearest(language, LANGUAGES)}"
        )


def noun_phrase(thing: Thing, language: str, case: str = "nominative") -> str:
    """A thing with article or number, adjectives and noun: `"two small red circles"`.

    Args:
        thing: what is named.
        language: one of `LANGUAGES`.
        case: `"nominative"`, `"accusative"` or `"dative"`; only German shows it.
    """
    if language == "en":
        return _english(thing)
    if language == "de":
        return _german(thing, case)
    if language == "fr":
        return _french(thing)
    return _chinese(thing)


def _english(thing: Thing) -> str:
    name = _ENGLISH_NAME.get(thing.shape, thing.shape) if thing.count == 1 else _ENGLISH[thing.shape]
    words = [word for word in (thing.size, thing.color, thing.texture, name) if word]
    start = COUNTS["en"][thing.count] if thing.count > 1 else "an" if words[0][0] in "aeiou" else "a"
    return " ".join([start, *words])


def _german(thing: Thing, case: str) -> str:
    gender, singular, plural, dative_plural, *rest = _GERMAN[thing.shape]
    if thing.count > 1:  # no article before it: strong endings
        start, ending = COUNTS["de"][thing.count], "en" if case == "dative" else "e"
        noun = dative_plural if case == "dative" else plural
    else:
        noun = rest[0] if rest and case == "dative" else singular
        start = "ein" + GERMAN_ARTICLE[case][gender]
        ending = GERMAN_ENDING[case][gender]
    stems = [_GERMAN_ADJECTIVES[word] for word in (thing.size, thing.color, thing.texture) if word]
    return " ".join([start, *(stem + ending for stem in stems), noun])


GERMAN_ARTICLE: dict[str, dict[str, str]] = {
    "nominative": {"m": "", "f": "e", "n": ""},
    "accusative": {"m": "en", "f": "e", "n": ""},
    "dative": {"m": "em", "f": "er", "n": "em"},
}
GERMAN_ENDING: dict[str, dict[str, str]] = {
    "nominative": {"m": "er", "f": "e", "n": "es"},
    "accusative": {"m": "en", "f": "e", "n": "es"},
    "dative": {"m": "en", "f": "en", "n": "en"},
}


def _french(thing: Thing) -> str:
    gender, singular, plural = _FRENCH[thing.shape]
    form = (0 if gender == "m" else 1) + (2 if thing.count > 1 else 0)
    start = COUNTS["fr"][thing.count] if thing.count > 1 else "un" if gender == "m" else "une"
    words = [start]
    if thing.size in ("small", "large"):
        words.append(_FRENCH_ADJECTIVES[thing.size][form])
    words.append(plural if thing.count > 1 else singular)
    words += [_FRENCH_ADJECTIVES[word][form] for word in (thing.color, thing.texture) if word]
    if thing.size == "medium":
        words.append("de taille moyenne")
    return " ".join(words)


def another(thing: Thing, language: str) -> str:
    """One more of a thing that was named before: `"another red circle"`, as a sentence's subject."""
    phrase = noun_phrase(thing, language)
    if language == "zh":
        return "另" + phrase
    article, rest = phrase.split(" ", 1)
    if language == "en":
        return f"another {rest}"
    if language == "fr":
        return f"{article} autre {rest}"
    return f"{article} weiter{GERMAN_ENDING['nominative'][_GERMAN[thing.shape][0]]} {rest}"


def french_de(phrase: str) -> str:
    """`de` before a noun phrase; it loses its e before `un` and `une`."""
    return f"d'{phrase}" if phrase.startswith("un") else f"de {phrase}"


def _chinese(thing: Thing) -> str:
    noun, measure = _CHINESE[thing.shape]
    size = f"{_CHINESE_ADJECTIVES[thing.size]}的" if thing.size else ""
    look = "".join(_CHINESE_ADJECTIVES[word] for word in (thing.color, thing.texture) if word)
    # One 的 is enough: after the size if there is one, else between look and noun.
    link = "的" if look and not size else ""
    return f"{COUNTS['zh'][thing.count]}{measure}{size}{look}{link}{noun}"


def relation_phrase(relation: str, thing: Thing, language: str) -> str:
    """A relation with what it refers to: `"to the left of a red circle"`; Chinese `"在……的左边"`."""
    words = RELATION_PHRASES[relation][language]
    other = noun_phrase(thing, language, "dative")
    if language == "zh":
        return f"在{other}的{words}"
    if language == "fr" and relation not in ("in front of", "behind"):
        return f"{words} {french_de(other)}"
    return f"{words} {other}"


AND: dict[str, str] = {"en": " and ", "de": " und ", "fr": " et ", "zh": "和"}
COMMA: dict[str, str] = {"en": ", ", "de": ", ", "fr": ", ", "zh": "、"}


def listing(phrases: list[str], language: str) -> str:
    """`"a, b and c"`."""
    if len(phrases) == 1:
        return phrases[0]
    return COMMA[language].join(phrases[:-1]) + AND[language] + phrases[-1]


def sentence(text: str, language: str) -> str:
    """A first letter as sentences have it, and the stop."""
    return text[:1].upper() + text[1:] + ("。" if language == "zh" else ".")
