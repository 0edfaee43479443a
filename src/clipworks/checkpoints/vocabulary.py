"""The tokenizer that belongs to foreign weights: found beside them, and compared with them.

A folder may hold CLIP's vocabulary in one of two spellings (`tokenizer.json`; `vocab.json` with
`merges.txt`), which becomes our own `ClipTokenizer`, or another `tokenizer.json`, which is run as it is. A
tokenizer that does not fit the weights is an error: ids of another vocabulary give wrong answers without one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from clipworks.checkpoints.files import read_json
from clipworks.checkpoints.own import check_tokenizer
from clipworks.checkpoints.settings import Words
from clipworks.core.config import Config
from clipworks.core.tokenizer import ClipTokenizer, FileTokenizer, Tokenizer, _vocabulary
from clipworks.errors import CheckpointError, ConfigError

START, END = "<|startoftext|>", "<|endoftext|>"


def choose(
    config: Config,
    words: Words | None,
    folder: Path | None,
    given: Tokenizer | Literal[False] | None,
    source: str,
) -> Tokenizer | None:
    """The tokenizer for weights of this geometry.

    Args:
        words: what the file's config, or the table of known models, says.
        folder: where the file's tokenizer would be; None if it can have none.
        given: what the caller says; False for none at all.
        source: the file of weights, for messages.

    Raises:
        CheckpointError: if none is found, or one that does not belong to the weights.
    """
    if given is False:
        return None
    if given is not None:
        check_tokenizer(config, given, "the tokenizer given")
        return given
    length, vocabulary = config.text.context_length, config.text.vocab_size
    beside = find(folder, words or Words("clip"), length) if folder is not None else None
    if isinstance(beside, FileTokenizer):
        check_tokenizer(config, beside, f"{folder}")
        return beside
    if vocabulary != ClipTokenizer.vocab_size or (words is not None and words.kind == "file" and words.full):
        where = (
            f"there is no tokenizer.json in {folder}"
            if folder is not None
            else "it says nothing of a tokenizer"
        )
        what = "CLIP's vocabulary does not fit" if beside is not None else where
        raise CheckpointError(
            f"{source}: its text tower has vectors for {vocabulary} ids, and {what}: pass tokenizer=…, or "
            "tokenizer=False to embed no strings"
        )
    if words is not None and words.end not in (None, ClipTokenizer.end):
        raise CheckpointError(
            f"{source}: its texts end with id {words.end}, "
            f"CLIP's vocabulary ends them with {ClipTokenizer.end}"
        )
    tokenizer = beside or ClipTokenizer(length)
    check_tokenizer(config, tokenizer, source)
    return tokenizer


def find(folder: Path, words: Words, length: int) -> Tokenizer | None:
    """The tokenizer in a folder, with texts of at most `length` tokens; None if there is none.

    Raises:
        CheckpointError: for files that cannot be read, or leave open how a text ends or is filled up.
    """
    file, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if file.is_file():
        content = read_json(file)
        model = content.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise CheckpointError(f"{file}: has no model with a vocabulary")
        pairs = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
            for pair in model.get("merges") or []
        ]
        if model.get("type", "BPE") == "BPE" and is_clip(model["vocab"], pairs):
            return ClipTokenizer(length)
        if words.kind == "clip":
            raise CheckpointError(f"{file}: not CLIP's vocabulary, which the config asks for")
        return _from_file(file, content, words, length)
    if vocab.is_file() and merges.is_file():
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if is_clip(read_json(vocab), pairs):
            return ClipTokenizer(length)
        raise CheckpointError(
            f"{vocab}: not CLIP's vocabulary; other vocabularies are read from a tokenizer.json"
        )
    return None


def is_clip(vocab: Any, merges: list[tuple[str, ...]]) -> bool:
    """Whether a vocabulary and its merges are those of CLIP."""
    return isinstance(vocab, dict) and vocab == clip_vocabulary() and merges == clip_merges()


def clip_vocabulary() -> dict[str, int]:
    """CLIP's symbols to ids, start and end under the names that transformers knows."""
    return {**_vocabulary().ids, START: ClipTokenizer.start, END: ClipTokenizer.end}


def clip_merges() -> list[tuple[str, ...]]:
    """CLIP's merges in their order."""
    return [tuple(line.split(" ")) for line in _vocabulary().ranks]


def _from_file(path: Path, content: Mapping[str, Any], words: Words, length: int) -> FileTokenizer:
    options = _options(path.parent)
    ids = token_ids(content)
    start, end = _around(content.get("post_processor"), path)
    for name, flag in (
        ("bos_token", options.get("add_bos_token")),
        ("eos_token", options.get("add_eos_token")),
    ):
        # Set, these flags decide, whatever the file was written with.
        if flag is not None:
            token = _spelling(options.get(name)) if flag else None
            start, end = (token, end) if name == "bos_token" else (start, token)
    filler = _spelling(options.get("pad_token"))
    if filler is None and isinstance(content.get("padding"), dict):
        filler = content["padding"].get("pad_token")
    for token in (start, end, filler):
        if token is not None and token not in ids:
            raise CheckpointError(f"{path}: the token {token!r} is not in its vocabulary")
    if words.full and filler is None:
        raise CheckpointError(f"{path}: this model fills up its texts, but no pad_token is named")
    last = ids[end] if end is not None else None
    if last is None and not words.full:
        raise CheckpointError(f"{path}: nothing says how a text ends, and there this model reads it")
    if words.end is not None and words.end != last:
        raise CheckpointError(f"{path}: texts end with id {last}, the config says {words.end}")
    if words.largest and last != max(ids.values()):
        raise CheckpointError(
            f"{path}: texts end with id {last}, but this model reads them at the largest id, "
            f"{max(ids.values())}"
        )
    try:
        return FileTokenizer(
            path,
            context_length=length,
            start=ids[start] if start is not None else None,
            end=last,
            pad=ids[filler] if filler is not None else 0,
            pad_full=words.full,
            clean=words.clean or _clean(options, words),
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _options(folder: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            merged |= read_json(folder / name)
    return merged


def _clean(options: Mapping[str, Any], words: Words) -> Literal["siglip", "lower", "none"]:
    """How transformers cleans a text before its tokenizer sees it, which its class decides."""
    kind = str(options.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "SiglipTokenizer":
        return "siglip"
    # SigLIP 2 was trained in lower case; the class of its tokenizer in older releases does not say so.
    return "lower" if kind == "Siglip2Tokenizer" or (kind == "GemmaTokenizer" and words.full) else "none"


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of a `tokenizer.json` to their ids."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # a unigram model: pieces with their scores
        vocab = {piece[0]: i for i, piece in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}


def _around(processor: Any, path: Path) -> tuple[str | None, str | None]:
    """The tokens that a post-processor puts before and behind a text.

    Raises:
        CheckpointError: if it puts more than one on a side.
    """
    if not isinstance(processor, dict):
        return None, None
    if processor.get("type") == "Sequence":
        found = [_around(one, path) for one in processor.get("processors") or []]
        starts, ends = [start for start, _ in found if start], [end for _, end in found if end]
        return next(iter(starts), None), next(iter(ends), None)
    if processor.get("type") in ("RobertaProcessing", "BertProcessing"):
        return processor["cls"][0], processor["sep"][0]
    before: list[str] = []
    behind: list[str] = []
    side = before
    for piece in processor.get("single") or []:
        if "Sequence" in piece:
            side = behind
        else:
            side.append(piece["SpecialToken"]["id"])
    if len(before) > 1 or len(behind) > 1:
        raise CheckpointError(
            f"{path}: puts {before} before and {behind} behind a text, which is not supported"
        )
    return next(iter(before), None), next(iter(behind), None)


def _spelling(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def with_length(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """The same tokenizer for texts of at most `length` tokens."""
    twin = copy.copy(tokenizer)
    twin.context_length = length
    return twin
