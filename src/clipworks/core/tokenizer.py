"""Strings to `Tokens`: CLIP's own byte-pair encoding, and any `tokenizer.json`.

`Tokens` is how text goes into every tower: ids, where each text ends, and whose it is. `ClipTokenizer`
gives the ids of the reference; `FileTokenizer` runs a `tokenizer.json` (SigLIP's, or one of our own from
`train_tokenizer`). Ids are as long as the longest text of the batch, so that no padding is computed, unless
a model was trained on full-length padding.

The file is longer than most because all that decides the ids of a text stands in it: `Tokens`, the two
tokenizers and the training of one, then the cleaning of text, CLIP's vocabulary, and the cache of words.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import string
import threading
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipworks.errors import CheckpointError, ConfigError, DataError, ShapeError

if TYPE_CHECKING:
    from os import PathLike

    import tokenizers

Clean = Literal["clip", "siglip", "lower", "none"]
Truncate = Literal["cut", "error"]

# The merges that OpenAI published with CLIP (github.com/openai/CLIP; MIT licence, Copyright (c) 2021 OpenAI).
MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
FILE, SETTINGS = "tokenizer.json", "tokenizer_settings.json"


@dataclass(frozen=True, eq=False)
class Tokens:
    """n texts of at most L tokens.

    Attributes:
        ids: (n, L) int64; what stands behind a text's end is padding.
        ends: (n,) int64; the position whose vector stands for the text.
        owner: (n,) int64, the row of the batch to which each text belongs, or None: one text a row, in order.

    Raises:
        ShapeError: if shapes, dtypes or devices do not fit, or an end lies outside the ids (which is checked
            on the CPU only: elsewhere it would have to wait for the device).
    """

    ids: Tensor
    ends: Tensor
    owner: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "ends"):
            if not isinstance(getattr(self, name), Tensor):
                raise ShapeError(f"{name} must be a tensor, not {type(getattr(self, name)).__name__}")
        if self.ids.ndim != 2:
            raise ShapeError(f"ids must be (n, L), not {tuple(self.ids.shape)}")
        n, length = self.ids.shape
        for name in ("ids", "ends", "owner"):
            value = getattr(self, name)
            if value is None:
                continue
            if name != "ids" and value.shape != (n,):
                raise ShapeError(f"{name} must be ({n},) for ids ({n}, {length}), not {tuple(value.shape)}")
            if value.dtype != torch.int64:
                raise ShapeError(f"{name} must be int64, not {value.dtype}")
            if value.device != self.ids.device:
                raise ShapeError(f"{name} is on {value.device}, but ids are on {self.ids.device}")
        if n and self.ends.device.type == "cpu" and not torch.compiler.is_compiling():
            first, last = (int(end) for end in torch.aminmax(self.ends))
            if first < 0 or last >= length:
                raise ShapeError(
                    f"ends must lie in [0, {length}) for ids ({n}, {length}), not [{first}, {last}]"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tokens:
        """The texts at an index (always as `Tokens`), a slice, places or a mask (n,).

        On the CPU, ids are cut to the longest text that is left; elsewhere that would have to wait for the
        device.

        Raises:
            IndexError: for a place that is not there.
        """
        if isinstance(index, (int, np.integer)):
            index = int(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"text {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        elif not isinstance(index, (slice, Tensor)):
            index = torch.as_tensor(index, dtype=None if len(index) else torch.int64)
        elif isinstance(index, Tensor) and index.ndim == 0:
            index = index[None]
        left = Tokens(self.ids[index], self.ends[index], None if self.owner is None else self.owner[index])
        return left.cut() if self.ids.device.type == "cpu" else left

    def cut(self) -> Tokens:
        """The same texts without the columns behind the last end, ids (n, L)."""
        length = int(self.ends.max()) + 1 if len(self) else 0
        return self if length == self.ids.shape[1] else Tokens(self.ids[:, :length], self.ends, self.owner)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tokens:
        """The same texts, ids (n, L), on another device."""
        ids, ends = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.ids, self.ends))
        return Tokens(
            ids, ends, None if self.owner is None else self.owner.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Tokens:
        """The same texts, ids (n, L), in page-locked memory, for asynchronous copies to a GPU."""
        owner = None if self.owner is None else self.owner.pin_memory()
        return Tokens(self.ids.pin_memory(), self.ends.pin_memory(), owner)

    @staticmethod
    def cat(parts: Sequence[Tokens], pad: int = 0) -> Tokens:
        """All texts of several, ids (n, L), padded with `pad` to the longest; owners stay as they are.

        Raises:
            DataError: if there are no parts, or only some of them have owners.
        """
        parts = list(parts)
        if not parts:
            raise DataError("Tokens.cat needs at least one part")
        owners = [part.owner for part in parts if part.owner is not None]
        if owners and len(owners) != len(parts):
            raise DataError(
                f"{len(owners)} of {len(parts)} parts have owners: give all of them owners, or none"
            )
        length = max(part.ids.shape[1] for part in parts)
        ids = [
            torch.nn.functional.pad(part.ids, (0, length - part.ids.shape[1]), value=pad) for part in parts
        ]
        return Tokens(
            torch.cat(ids), torch.cat([part.ends for part in parts]), torch.cat(owners) if owners else None
        )


Self = TypeVar("Self", bound="Tokenizer")


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
        vocab_size: how many ids there are.
        context_length: the longest text, start and end included, unless a call says otherwise.
        start, end: ids put before and behind every text, or None.
        pad: what fills up shorter texts.
        pad_full: whether every text is filled up to the context length, and read at its last position.
        control_tokens: whether the literal spelling of a control token in a text becomes that token.
    """

    kind: ClassVar[str]
    vocab_size: int
    context_length: int
    start: int | None
    end: int | None
    pad: int
    pad_full: bool = False
    control_tokens: bool | tuple[str, str] = False

    # Ids travel as packed bytes: joining bytes is many times faster than building lists of numbers.
    _dtype: type[np.unsignedinteger] = np.uint32

    @abstractmethod
    def _pack(self, texts: Sequence[str], limit: int | None) -> list[bytes]:
        """The ids of each text as bytes of `_dtype`; of more than `limit` ids, the first `limit` will do."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text that ids, (L,) int64 or a list, stand for; start is skipped, the first end ends it.

        Raises:
            DataError: for an id that is not in the vocabulary.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that decides which ids a text gets, save the context length."""

    @abstractmethod
    def save(self, folder: str | PathLike[str]) -> None:
        """Write what `load` needs to a folder, which is made if it is not there."""

    @classmethod
    def load(cls: type[Self], folder: str | PathLike[str]) -> Self:
        """The tokenizer that `save` wrote.

        Raises:
            CheckpointError: if a file is missing or damaged, or the tokenizer is of another class.
        """
        path = Path(folder) / SETTINGS
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            kind = {"clip": ClipTokenizer, "file": FileTokenizer}[settings.pop("kind")]
            if kind is FileTokenizer:
                settings["source"] = Path(folder) / FILE
            elif isinstance(settings.get("control_tokens"), list):
                settings["control_tokens"] = tuple(settings["control_tokens"])
            tokenizer = kind(**settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: not the settings of a tokenizer ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(tokenizer, cls):
            raise CheckpointError(f"{path}: a {kind.__name__}, not a {cls.__name__}")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of one text, all of them, without start and end."""
        return np.frombuffer(self._pack(_checked(text), None)[0], self._dtype).tolist()

    def __call__(
        self,
        texts: str | Iterable[str],
        context_length: int | None = None,
        owner: Sequence[int] | Tensor | None = None,
        *,
        truncate: Truncate = "cut",
    ) -> Tokens:
        """Strings to `Tokens` (n, L) on the CPU, L the longest text or, with `pad_full`, the context length.

        Args:
            texts: one string or n of them.
            context_length: the longest L; this tokenizer's own if left out.
            owner: n numbers, the row of the batch to which each text belongs.
            truncate: a text that is too long is `cut`, its last position becoming the end, or is an `error`.

        Raises:
            DataError: for what is not a string, naming its place; for a text that is too long, with "error".
            ConfigError: if the context has no room for start and end.
            ShapeError: if `owner` does not have n entries.
        """
        texts = _checked(texts)
        length = self.context_length if context_length is None else context_length
        around = (self.start is not None) + (self.end is not None)
        if length < max(1, around):
            raise ConfigError(f"context_length must be at least {max(1, around)}, not {length}")
        if truncate not in ("cut", "error"):
            raise ConfigError(f"truncate must be 'cut' or 'error', not {truncate!r}")
        room, size = length - around, np.dtype(self._dtype).itemsize
        packed = self._pack(texts, room if truncate == "cut" else None)
        for place, row in enumerate(packed):
            if len(row) > room * size:
                if truncate == "error":
                    raise DataError(
                        f"text {place} has {len(row) // size + around} tokens, the context has {length}: "
                        f"{texts[place][:60]!r}; shorten it, or let it be cut"
                    )
                packed[place] = row[: room * size]
        return self._lay(packed, length, owner)

    def _lay(self, packed: list[bytes], length: int, owner: Sequence[int] | Tensor | None) -> Tokens:
        start, end = (b"" if i is None else self._dtype(i).tobytes() for i in (self.start, self.end))
        # A text of no tokens at all is read at one position of padding.
        filler = self._dtype(self.pad).tobytes() if not start and not end else b""
        rows = [start + (row or filler) + end for row in packed]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows)) // np.dtype(self._dtype).itemsize
        longest = length if self.pad_full else int(lengths.max(initial=0))
        ids = np.full((len(rows), longest), self.pad, np.int64)
        ids[np.arange(longest) < lengths[:, None]] = np.frombuffer(b"".join(rows), self._dtype)
        ends = np.full(len(rows), longest - 1, np.int64) if self.pad_full else lengths - 1
        owners = None if owner is None else torch.as_tensor(owner, dtype=torch.int64)
        return Tokens(torch.from_numpy(ids), torch.from_numpy(ends), owners)

    def _words(self, ids: Iterable[int] | Tensor) -> Iterator[int]:
        for token in ids.tolist() if isinstance(ids, Tensor) else ids:
            if token == self.end:
                return
            if not 0 <= token < self.vocab_size:
                raise DataError(f"id {token} is not in a vocabulary of {self.vocab_size}")
            if token != self.start:
                yield int(token)


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding: 49,408 ids, lower case, start 49406, end 49407, padding 0.

    Args:
        context_length: the longest text, start and end included.
        control_tokens: False: what looks like a control token in a text is text like any other. True: as in
            open_clip, `<start_of_text>` and `<end_of_text>` become the ids of start and end. OpenAI's own
            spellings are the pair `("<|startoftext|>", "<|endoftext|>")`.
        cache_size: how many words are remembered; threads may share a tokenizer and its cache.

    Raises:
        ConfigError: for a context or a cache below 2, or spellings that no cleaned text can hold.
    """

    kind = "clip"
    vocab_size, start, end, pad = 49408, 49406, 49407, 0
    _dtype = np.uint16

    def __init__(
        self,
        context_length: int = 77,
        *,
        control_tokens: bool | tuple[str, str] = False,
        cache_size: int = 2**18,
    ):
        if context_length < 2:
            raise ConfigError(f"context_length must be at least 2, not {context_length}")
        self.context_length = context_length
        self.control_tokens = control_tokens
        spelled = ("<start_of_text>", "<end_of_text>") if control_tokens is True else control_tokens or ()
        if len(spelled) not in (0, 2) or any(one.lower().split() != [one] for one in spelled):
            raise ConfigError(
                f"control_tokens must be a bool or the spellings of start and end, in lower case and without "
                f"blanks, not {control_tokens!r}"
            )
        self._controls = dict(zip(spelled, (self.start, self.end)))
        self._cache = _Cache(cache_size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _clip_tokenizer, (self.context_length, self.control_tokens, self._cache.size)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        symbols = _vocabulary().symbols
        joined = "".join(symbols[i] for i in self._words(ids))
        return (
            joined.translate(_TO_BYTES)
            .encode("latin-1")
            .decode("utf-8", "replace")
            .replace("</w>", " ")
            .rstrip()
        )

    def fingerprint(self) -> str:
        parts = ["clip", str(self._controls), *_vocabulary().ranks]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: str | PathLike[str]) -> None:
        settings = {"context_length": self.context_length, "control_tokens": self.control_tokens}
        _write_settings(folder, self.kind, settings)

    def _pack(self, texts: Sequence[str], limit: int | None) -> list[bytes]:
        cached = self._cache.fresh
        rows: list[bytes] = []
        later: list[tuple[int, list[str]]] = []
        for text in texts:
            # No token crosses white space, so each stretch between blanks can be looked up by itself.
            words = (text if _at_rest(text) else _repair(text)).lower().split()
            if limit is not None and len(words) > limit:
                words = words[:limit]  # each of them gives at least one token, so the rest would be cut
            try:
                rows.append(b"".join([cached[word] for word in words]))
            except KeyError:
                later.append((len(rows), words))
                rows.append(b"")
        if later:
            found = self._look_up({word for _, words in later for word in words})
            for place, words in later:
                rows[place] = b"".join([found[word] for word in words])
        return rows

    def _look_up(self, words: set[str]) -> dict[str, bytes]:
        fresh, aged = self._cache.fresh, self._cache.aged
        found: dict[str, bytes] = {}
        plain: set[str] = set()
        mixed: dict[str, list[str]] = {}
        for word in words:
            known = fresh.get(word) or aged.get(word)
            if known is not None:
                found[word] = known
            elif word.isascii() and word.isalpha():
                plain.add(word)
            else:
                mixed[word] = self._split(word)
        pieces = _vocabulary().encode(plain.union(*mixed.values()) - self._controls.keys())
        pieces |= {spelled: _packed([i]) for spelled, i in self._controls.items()}
        found |= {word: pieces[word] for word in plain}
        found |= {word: b"".join([pieces[part] for part in parts]) for word, parts in mixed.items()}
        self._cache.add(found)
        return found

    def _split(self, word: str) -> list[str]:
        controls = "".join(f"{re.escape(spelled)}|" for spelled in self._controls)
        if word.isascii():
            return _ascii_pattern(controls).findall(word)
        return _pattern(controls).findall(word)


def _clip_tokenizer(
    context_length: int, control_tokens: bool | tuple[str, str], cache_size: int
) -> ClipTokenizer:
    return ClipTokenizer(context_length, control_tokens=control_tokens, cache_size=cache_size)


class FileTokenizer(Tokenizer):
    """Any `tokenizer.json`, run by the `tokenizers` library; `pickle` and `deepcopy` work.

    Padding, truncation and the start and end tokens of the file are not used: what is given here is.

    Args:
        source: the path of a `tokenizer.json`, or its text.
        context_length: the longest text, start and end included.
        start, end: ids put before and behind every text; None for none.
        pad: what fills up shorter texts.
        pad_full: fill up every text to the context length and read it at its last position, as SigLIP does.
        clean: `clip` repairs, unescapes HTML, collapses white space and lower-cases; `siglip` does so too
            and removes punctuation; `lower` only lower-cases; `none` leaves text to the file's own rules.
        control_tokens: let the literal spelling of a control token in a text become that token.

    Raises:
        CheckpointError: if the file is missing or is not a tokenizer.
        ConfigError: for an id that is not in the vocabulary, or an unknown way of cleaning.
    """

    kind = "file"

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        context_length: int = 77,
        start: int | None = None,
        end: int | None = None,
        pad: int = 0,
        pad_full: bool = False,
        clean: Clean = "none",
        control_tokens: bool = False,
    ):
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        name = "tokenizer.json (given as text)" if is_text else str(source)
        try:
            self._source = str(source) if is_text else Path(source).read_text(encoding="utf-8")
            content = json.loads(self._source)
            self._library = _load_library(content, {start, end, pad}, control_tokens)
        except Exception as error:
            raise CheckpointError(f"{name}: not a tokenizer that can be read ({error})") from error
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for label, token in (("start", start), ("end", end), ("pad", pad)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"{name}: {label}={token} is not in the vocabulary of {self.vocab_size} ids"
                )
        if clean not in _CLEAN:
            raise ConfigError(f"clean must be one of {', '.join(_CLEAN)}, not {clean!r}")
        if context_length < 1:
            raise ConfigError(f"context_length must be at least 1, not {context_length}")
        self.context_length, self.start, self.end, self.pad = context_length, start, end, pad
        self.pad_full, self.clean, self.control_tokens = pad_full, clean, control_tokens
        self._controls = _control_tokens(self._library, content["model"], (start, end))

    def __reduce__(self) -> tuple[Any, ...]:
        return _file_tokenizer, (self._source, self._settings())

    def _settings(self) -> dict[str, Any]:
        names = ("context_length", "start", "end", "pad", "pad_full", "clean", "control_tokens")
        return {name: getattr(self, name) for name in names}

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        return self._library.decode(list(self._words(ids)), skip_special_tokens=True)

    def fingerprint(self) -> str:
        # Of the file as it was read: what the library writes back may differ from one version to the next.
        content = {k: v for k, v in json.loads(self._source).items() if k not in ("truncation", "padding")}
        settings = self._settings()
        del settings["context_length"]
        text = json.dumps([content, settings], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: str | PathLike[str]) -> None:
        _write_settings(folder, self.kind, self._settings())
        (Path(folder) / FILE).write_text(self._source, encoding="utf-8")

    def _pack(self, texts: Sequence[str], limit: int | None) -> list[bytes]:
        cleaned = list(map(_CLEAN[self.clean], texts))
        rows = [encoded.ids for encoded in self._library.encode_batch_fast(cleaned, add_special_tokens=False)]
        if not self.control_tokens:
            # Some models hold a control token's spelling in their own vocabulary, as SentencePiece's do.
            for place, row in enumerate(rows):
                if not self._controls.keys().isdisjoint(row):
                    rows[place] = self._as_text(cleaned[place])
        return [np.array(row, self._dtype).tobytes() for row in rows]

    def _as_text(self, text: str) -> list[int]:
        """Ids of a text in which every control token's spelling is taken apart behind its first character."""
        spelled = sorted(self._controls.values(), key=len, reverse=True)
        inside = "|".join(
            f"(?<={re.escape(token[:1])})(?={re.escape(token[1:])})" for token in spelled if token[1:]
        )
        parts = re.split(inside, text) if inside else [text]
        encoded = self._library.encode_batch_fast([part for part in parts if part], add_special_tokens=False)
        return [i for part in encoded for i in part.ids if i not in self._controls]


def _file_tokenizer(source: str, settings: dict[str, Any]) -> FileTokenizer:
    return FileTokenizer(source, **settings)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, *, context_length: int = 77, min_frequency: int = 2
) -> FileTokenizer:
    """Learn a byte-level BPE vocabulary from captions in any language.

    The same texts give the same tokenizer. Cleaned and split as for CLIP, but a word carries the blank
    before it (rather than a mark of its end), so that `decode` gives back the cleaned text exactly. Start and
    end are the last two ids, the end being the largest, as tools that look for the largest id expect.

    Args:
        vocab_size: ids at most, 256 bytes, start and end included; fewer if the texts do not hold more pairs.
        min_frequency: how often a pair must occur to become a token.

    Raises:
        ConfigError: for a vocabulary smaller than 258.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ConfigError(
            f"vocab_size must be at least {len(alphabet) + 2} (the bytes, start and end), not {vocab_size}"
        )
    library = Tokenizer(models.BPE())
    words = Regex(rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, min_frequency=min_frequency, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(map(clean_clip, texts), trainer)
    library.add_special_tokens(["<start_of_text>", "<end_of_text>"])
    start, end = library.token_to_id("<start_of_text>"), library.token_to_id("<end_of_text>")
    return FileTokenizer(library.to_str(), context_length=context_length, start=start, end=end, clean="clip")


# --- cleaning ---------------------------------------------------------------------------------------------

# Repair by ftfy and unescaping leave a text alone if it has none of the characters they look for. In ASCII
# these are control characters (though not all white space, which is collapsed anyway) and an `&` that may
# begin an entity.
_TOUCHED_ASCII = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]|&(?![ \n]|\Z)")
# Beyond ASCII it is anything not listed here: curly quotes, ligatures, full-width forms, line and paragraph
# separators, surrogates and other controls are left out, and so are line breaks, at which ftfy starts
# anew. What is listed may still be the trace of a wrong encoding, or not be composed: both are asked for.
_TOUCHED = re.compile(
    "&(?! |\\Z)|[^\t -~\xa0-\xac\xae-\u0131\u0134-\u0148\u014a-\u01c3\u01cd-\u01f0\u01f4-\u024f"
    "\u0370-\u06ff\u0900-\u0eff\u1e00-\u1eff\u200d\u2010-\u2017\u2020-\u2027\u2030-\u205e\u20a0-\u20bf"
    "\u2100-\u2bff\u3001-\u30ff\u3400-\u9fff\uac00-\ud7a3\ufe0f\U0001f000-\U0001faff]"
)


def clean_clip(text: str) -> str:
    """As CLIP's tokenizer cleans: repaired, HTML unescaped twice, blanks collapsed, lower-cased."""
    return " ".join((text if _at_rest(text) else _repair(text)).split()).lower()


def _clean_siglip(text: str) -> str:
    repaired = (text if _at_rest(text) else _repair(text)).replace("_", " ")
    return " ".join(repaired.translate(_NO_PUNCTUATION).lower().split())


def _at_rest(text: str) -> bool:
    """Whether `_repair` would, white space aside, give back what it got; quick, and False when in doubt."""
    if text.isascii():
        return _TOUCHED_ASCII.search(text) is None
    if _TOUCHED.search(text) is not None or len(text) > 100_000 or not unicodedata.is_normalized("NFC", text):
        return False
    from ftfy.badness import is_bad

    return not is_bad(text)


def _repair(text: str) -> str:
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _well_formed(text: str) -> str:
    """Pairs of surrogates joined, lone ones (which have no UTF-8) replaced; what is repaired has none."""
    if text.isascii() or _SURROGATES.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_SURROGATES = re.compile("[\ud800-\udfff]")
_CLEAN: dict[str, Callable[[str], str]] = {
    "clip": clean_clip,
    "siglip": _clean_siglip,
    "lower": lambda text: _well_formed(text).lower(),
    "none": _well_formed,
}

# --- CLIP's vocabulary --------------------------------------------------------------------------------------

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
# Bytes as printable characters, in the order of their ids.
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)
}
_TO_BYTES = {ord(character): byte for byte, character in _CHARACTERS.items()}


@lru_cache
def _ascii_pattern(controls: str) -> re.Pattern[str]:
    return re.compile(rf"{controls}{CONTRACTIONS}|[a-z]+|[0-9]|[^\sa-z0-9]+")


@lru_cache
def _pattern(controls: str) -> Any:
    import regex

    return regex.compile(rf"{controls}{CONTRACTIONS}|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)


@lru_cache(maxsize=1)
def _vocabulary() -> _Vocabulary:
    return _Vocabulary()


class _Vocabulary:
    """CLIP's symbols and merges, read once a process.

    Attributes:
        symbols: all 49,406, by id, in printable characters; `</w>` marks a word's end.
        ids: the inverse.
        ranks: merges as "first second" to their rank; the merge of rank r makes symbol 512 + r.
    """

    merges = 48894
    # So many bytes of the list hold them; the rest of it CLIP never used.
    beginning = 530_000
    # Below so many new words, merging here is quicker than preparing the compiled model.
    patience = 2048

    def __init__(self) -> None:
        with gzip.open(MERGES) as file:
            lines = file.read(self.beginning).decode("utf-8", "ignore").split("\n", self.merges + 1)[1:-1]
        base = list(_CHARACTERS.values())
        made = "\n".join(lines).replace(" ", "").split("\n")
        self.symbols = [*base, *(character + "</w>" for character in base), *made]
        self.ids = dict(zip(self.symbols, range(len(self.symbols))))
        self.ranks = dict(zip(lines, range(len(lines))))
        self._model: tokenizers.models.BPE | None = None
        self._merged = 0

    def encode(self, pieces: Iterable[str]) -> dict[str, bytes]:
        """The packed ids of pieces as the splitting pattern gives them."""
        found: dict[str, bytes] = {}
        unknown: dict[str, str] = {}
        ids = self.ids
        for piece in pieces:
            text = piece if piece.isascii() else piece.encode().decode("latin-1").translate(_CHARACTERS)
            # A whole word of the vocabulary is what merging arrives at (the tests go through all of them).
            whole = ids.get(text + "</w>")
            if whole is None:
                unknown[piece] = text
            else:
                found[piece] = _packed([whole])
        if not unknown:
            return found
        self._merged += len(unknown)
        if self._model is None and self._merged < self.patience and max(map(len, unknown.values())) < 64:
            return found | {piece: _packed(self.merge(text)) for piece, text in unknown.items()}
        tokenize = self._compiled().tokenize
        return found | {
            piece: _packed([token.id for token in tokenize(text)]) for piece, text in unknown.items()
        }

    def merge(self, text: str) -> list[int]:
        """Byte-pair encoding of one piece in printable characters, the plain way."""
        parts = [*text[:-1], text[-1] + "</w>"]
        while len(parts) > 1:
            ranks = [self.ranks.get(f"{a} {b}", self.merges) for a, b in pairwise(parts)]
            best = min(ranks)
            if best == self.merges:
                break
            merged, i = [], 0
            while i < len(parts):
                if i < len(ranks) and ranks[i] == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return [self.ids[part] for part in parts]

    def _compiled(self) -> tokenizers.models.BPE:
        if self._model is None:
            from tokenizers.models import BPE

            pairs = [tuple(line.split(" ")) for line in self.ranks]
            self._model = BPE(self.ids, pairs, end_of_word_suffix="</w>", cache_capacity=0)  # type: ignore[arg-type]
        return self._model


class _Cache:
    """Words to packed ids, at most `size` of them, in two generations.

    When the young one holds half of them it becomes the old one, and the old one is dropped; a word of the
    old one that is met again is young again. So frequent words stay without any bookkeeping per look-up.
    """

    longest = 64

    def __init__(self, size: int):
        if size < 2:
            raise ConfigError(f"cache_size must be at least 2, not {size}")
        self.size = size
        self.fresh: dict[str, bytes] = {}
        self.aged: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.fresh) + len(self.aged)

    def add(self, words: dict[str, bytes]) -> None:
        with self._lock:
            for word, ids in words.items():
                if len(word) > self.longest:
                    continue
                if len(self.fresh) >= self.size // 2:
                    self.fresh, self.aged = {}, self.fresh
                self.fresh[word] = ids


def _packed(ids: list[int]) -> bytes:
    return array("H", ids).tobytes()


# --- files --------------------------------------------------------------------------------------------------


def _load_library(
    content: dict[str, Any], controls: set[int | None], control_tokens: bool
) -> tokenizers.Tokenizer:
    """The library's tokenizer without padding and truncation, deaf to control tokens unless asked."""
    from tokenizers import Tokenizer

    for token in content.get("added_tokens") or []:
        token["special"] = token["special"] or token["id"] in controls
    library = Tokenizer.from_str(json.dumps(content))
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = not control_tokens
    return library


def _control_tokens(
    library: tokenizers.Tokenizer, model: dict[str, Any], around: Iterable[int | None]
) -> dict[int, str]:
    """Ids that a text must not be able to spell, with their spellings: the special ones, start and end.

    The token for what is unknown is none of them: a text may well hold what the vocabulary lacks.
    """
    unknown = model.get("unk_token")
    if unknown is None and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    special = {i: token.content for i, token in library.get_added_tokens_decoder().items() if token.special}
    special |= {i: library.id_to_token(i) or "" for i in around if i is not None}
    return {i: spelled for i, spelled in special.items() if spelled != unknown}


def _write_settings(folder: str | PathLike[str], kind: str, settings: dict[str, Any]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps({"kind": kind, **settings}, indent=1) + "\n", encoding="utf-8")


def _checked(texts: str | Iterable[str]) -> Sequence[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise DataError(f"texts must be a string or several, not {type(texts).__name__}")
    listed = texts if isinstance(texts, (list, tuple)) else list(texts)
    for place, text in enumerate(listed):
        if not isinstance(text, str):
            raise DataError(f"text {place} is not a string but {type(text).__name__}: {text!r}")
    return listed
