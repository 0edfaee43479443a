"""Strings that try a tokenizer: every kind of text that a web crawl holds, and some that it does not.

`odd_string(seed)` is one string, the same on every machine. What is drawn has long been in Unicode, so that
the same string gets the same ids under every version of Python; `odd_string(seed, any_character=True)` lifts
that restriction for comparisons within one interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

# Long lines of samples are kept as they are.
# ruff: noqa: E501, SIM905
# fmt: off
WORDS = (
    "a an the of in on and with photo picture drawing dog cat horse bird tree house street car bicycle boat red blue "
    "green yellow small large old young man woman child two three running standing sitting beside behind under front "
    "water beach mountain snow city night morning light dark bright rainy sunny market kitchen table chair window door "
    "portrait landscape closeup background colourful wooden stone iron vintage modern abstract painting sketch logo "
    "it's don't we're they've i'm you'll he'd photographer's antidisestablishmentarianism Reykjavik Mississippi iPhone"
).split()
SENTENCES = (
    "Ein großer Hund läuft über die Straße.", "Un très vieux château près de la forêt, l'été.",
    "El niño pequeño está en el jardín, ¿verdad?", "一只狗在海滩上奔跑。", "猫が窓のそばに座っている", "개가 공원에서 달린다",
    "Собака бежит по снегу", "Ένας σκύλος τρέχει στην ΟΔΟΣ", "كلب يجري على الشاطئ", "כלב רץ על החוף", "कुत्ता दौड़ रहा है",
    "สุนัขวิ่งบนชายหาด", "Bir köpek İstanbul'da KOŞUYOR", "Mały piesek biegnie w śniegu, źdźbło", "Con chó đang chạy trên bãi biển",
)
ENTITIES = (
    "&amp; &amp;amp; &amp;amp;lt; &lt; &gt; &quot; &#39; &#x27; &nbsp; &eacute; &Eacute; &EACUTE; &copy &notit; &AMP "
    "&#0; &#xD800; &#128; &#x110000; &#150; &bogus; & && &; &# &#x &amp;#8217; &hellip; &NotEqualTilde; &lt;b&gt; &zwj; "
    "&#10; &#13; &#x85; &ThickSpace; &#55357;&#56832; AT&T a&b R&D; &e &Tab; &NewLine; &#127; &#27;[31m"
).split()
SPELLED = (
    "<|startoftext|> <|endoftext|> <start_of_text> <end_of_text> <START_OF_TEXT> <End_Of_Text> <end_of_text <|endoftext|"
    " </s> <s> <pad> [PAD] </w> <|endoftext|><|endoftext|> x<end_of_text>y <end_of_text>'s &lt;end_of_text&gt;"
    " <\u017ftart_of_text> <end_of_te\u200bxt> <end_of_text>&amp;"
).split()
EMOJI = "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 ❤️ ☕ ♥ ★ ✔ ➜ 🦄🦄🦄 1️⃣ ™ © ® € ½ ² № ﬁ ﬀ ŉ Ǆ ĳ \u212b \u212a \u2126".split()
MARKS = "'s 'T 'Re 've 'M 'LL 'd ' '' 's's ’s ‘quoted’ “quoted” ´s `s ''ll 'ſ ʼs n't ＇s".split()
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]
SPACES += ["\u200b", "\ufeff", "\u00ad", "\u180e", "\u202f", ""]
CONTROLS = ["\x00", "\x01", "\x08", "\x0e", "\x1b", "\x7f", "\x80", "\x9f", "\x1b[31m", "\x1b[0;1m", "\x1b[", "\u202e"]
CONTROLS += ["\ud800", "\udfff", "\ud83d\ude00", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\u2060", "\ue000"]
CASES = "İ I ı ẞ ß ς ΣΑΣ ΑΣ Σ ſ ﬅ Ⅷ ⅷ Ⓐ ǅ ᾳ ᾼ Ａｂｃ １２３ ٣ ४ ௧ ² ³ ¼ 五 Ⅻ 𝟙 𝐀𝐛𝐜 e\u0301 E\u0301 a\u0308\u0304 \u0301 ﷺ 각".split()
ADDRESSES = ["https://example.org/?q={}&p=1&amp;r=2", "IMG_{}.JPG", "{}@example.org", "#{}", "@{}_", "C:\\{}"]
BLOCKS = (
    (0x20, 0x7E), (0xA0, 0x24F), (0x250, 0x2AF), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x621, 0x64A),
    (0x905, 0x939), (0xE01, 0xE3A), (0x10A0, 0x10C5), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x20A0, 0x20B5),
    (0x2100, 0x214F), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x25FF), (0x2600, 0x26FF),
    (0x3041, 0x3096), (0x30A1, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xF900, 0xFA2D),
    (0xFB00, 0xFB06), (0xFF01, 0xFF5E), (0x1D400, 0x1D454), (0x1F300, 0x1F320), (0x1F600, 0x1F640), (0x20000, 0x2A6D6),
)
CODECS = ("latin-1", "cp1252", "cp1251", "cp437", "mac-roman", "cp1250")
# fmt: on


class _Dice:
    """Draws that depend on nothing but `random()`, whose sequence Python promises to keep."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, options: Sequence[str]) -> str:
        return options[self.below(len(options))]


def odd_string(seed: int, *, any_character: bool = False) -> str:
    """The string of a seed."""
    dice = _Dice(seed)
    kind = dice.below(20)
    if kind < 5:
        return _caption(dice)
    if kind < 7:
        return " ".join(_invented(dice) for _ in range(1 + dice.below(12)))
    if kind == 7:
        return _any(dice, 1 + dice.below(30)) if any_character else _characters(dice)
    if kind == 8 and dice.below(4) == 0:
        return _MAKERS[dice.below(len(_MAKERS))](dice) * (1 + dice.below(200))
    if kind == 9 and dice.below(8) == 0:
        return dice.pick(SPACES) * dice.below(4)
    pieces = []
    for _ in range(1 + dice.below(10)):
        pieces.append(_MAKERS[dice.below(len(_MAKERS))](dice))
        pieces.append(" " if dice.below(3) else dice.pick(SPACES))
    return "".join(pieces)


def odd_strings(count: int, first: int = 0, *, any_character: bool = False) -> list[str]:
    """The strings of `count` seeds."""
    return [odd_string(seed, any_character=any_character) for seed in range(first, first + count)]


def _caption(dice: _Dice) -> str:
    words = [dice.pick(WORDS) for _ in range(1 + dice.below(25))]
    if dice.below(3) == 0:
        words[0] = words[0].capitalize()
    if dice.below(4) == 0:
        words = [word + dice.pick([",", "", "", "", ".", "!", " -", ":", '"', ")"]) for word in words]
    return " ".join(words) + dice.pick(["", ".", "...", "!!!", "?!", " 2019", ", 4K", " #1", " 1,000.50"])


def _invented(dice: _Dice) -> str:
    word = "".join(dice.pick("etaoinshrdlucmfwypvbgkjqxz") for _ in range(1 + dice.below(14)))
    return word if dice.below(4) else word.upper()


def _characters(dice: _Dice) -> str:
    first, last = BLOCKS[dice.below(len(BLOCKS))]
    return "".join(chr(first + dice.below(last - first + 1)) for _ in range(1 + dice.below(12)))


def _any(dice: _Dice, count: int) -> str:
    return "".join(chr(dice.below(0x110000 if dice.below(2) else 0x3000)) for _ in range(count))


def _mojibake(dice: _Dice) -> str:
    text = dice.pick(SENTENCES) if dice.below(2) else dice.pick(EMOJI) + dice.pick(MARKS)
    for _ in range(1 + dice.below(2)):
        text = text.encode("utf-8", "replace").decode(
            dice.pick(CODECS), "replace" if dice.below(2) else "ignore"
        )
    return text


def _punctuation(dice: _Dice) -> str:
    return "".join(dice.pick("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") for _ in range(1 + dice.below(8)))


def _number(dice: _Dice) -> str:
    return "".join(dice.pick("0123456789.,-/:x") for _ in range(1 + dice.below(10)))


def _address(dice: _Dice) -> str:
    return dice.pick(ADDRESSES).format(dice.pick(WORDS) + str(dice.below(1000)))


def _repeated(dice: _Dice) -> str:
    return dice.pick(["a", "ab", "ha", "!", "-", "é", "狗", "👍", "aab", "na "]) * (1 + dice.below(60))


_MAKERS: tuple[Callable[[_Dice], str], ...] = (
    _caption, _invented, _characters, _characters, _mojibake, _punctuation, _number, _address, _repeated,
    lambda dice: dice.pick(WORDS), lambda dice: dice.pick(WORDS) + dice.pick(MARKS), lambda dice: dice.pick(SENTENCES),
    lambda dice: dice.pick(ENTITIES), lambda dice: dice.pick(ENTITIES), lambda dice: dice.pick(SPELLED),
    lambda dice: dice.pick(EMOJI), lambda dice: dice.pick(CONTROLS), lambda dice: dice.pick(CASES),
    lambda dice: dice.pick(WORDS) + dice.pick(CONTROLS) + dice.pick(WORDS),
)  # fmt: skip
