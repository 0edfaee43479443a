"""Captions in other words: prompts with examples, a language model, and files of rewrites joined by key.

Fan et al., Improving CLIP Training with Language Rewrites, NeurIPS 2023. For each caption and each pool of
examples the model is shown three pairs of the pool and completes the fourth:

    write image captions differently,                   line 1
                                                        lines 2, 4, 6 and 8 are empty
                source => target                        lines 3, 5 and 7: other pairs for each caption
                caption =>                              line 9, which the model goes on with

What it writes up to its next line or arrow is the rewrite. Pairs, and what a model samples, depend on (seed,
key, pool) alone, so rewrites can be made again. Where the authors' code goes wrong in silence, this one does
not: a caption's own arrow becomes `->` and its line breaks blanks; a caption too long for the model is cut
itself, not the prompt's end; results are written batch by batch and a run that is killed goes on; what is
odd about a rewrite is counted and never corrected. `rewritten` joins rewrites to pictures, by key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from clipworks.data.randomness import Draws, fold, key_number
from clipworks.data.rewritten import is_stump, overlap
from clipworks.errors import ConfigError, DataError

INSTRUCTION = "write image captions differently,"
ARROW = "=>"
INDENT = " " * 12  # as the authors' prompts have it
EXAMPLES = 3
FLAGS = ("empty", "one word", "as the caption", "as an example", "caption cut")


@dataclass(frozen=True)
class Pool:
    """Examples of one manner of rewriting.

    Attributes:
        name: of the manner.
        entries: pairs (source, target), or groups of captions of one picture, of which any two are a pair.
        paired: whether entries are pairs.

    Raises:
        DataError: if there are fewer than three entries, or one has fewer than two texts.
    """

    name: str
    entries: tuple[tuple[str, ...], ...]
    paired: bool = True

    def __post_init__(self) -> None:
        if len(self.entries) < EXAMPLES or any(len(entry) < 2 for entry in self.entries):
            raise DataError(f"pool {self.name!r} needs at least {EXAMPLES} entries of two texts or more")

    def draw(self, draws: Draws) -> list[tuple[str, str]]:
        """Three pairs of different entries."""
        left, pairs = list(self.entries), []
        for _ in range(EXAMPLES):
            texts = list(left.pop(draws.integers(len(left))))
            if not self.paired:
                first = texts.pop(draws.integers(len(texts)))
                texts = [first, texts[draws.integers(len(texts))]]
            pairs.append((texts[0], texts[1]))
        return pairs


def read_pool(path: str | Path) -> Pool:
    """A pool from a file of JSON lines, `{"source": …, "target": …}` or `{"captions": […]}` each.

    Raises:
        DataError: if the file is missing or a line is neither.
    """
    path = Path(path)
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        groups = [tuple(record["captions"]) for record in records if "captions" in record]
        pairs = [(record["source"], record["target"]) for record in records if "captions" not in record]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not JSON lines of source and target, or of captions ({error})") from error
    if groups and pairs:
        raise DataError(f"{path}: mixes pairs and groups of captions")
    return Pool(path.stem, tuple(groups or pairs), paired=bool(pairs))


def shipped_pools() -> dict[str, Pool]:
    """Our own pools by name: three of pairs in a manner each, and one of captions of the same picture."""
    with resources.as_file(resources.files("clipworks.data") / "pools") as folder:
        return {path.stem: read_pool(path) for path in sorted(folder.glob("*.jsonl"))}


# ------------------------------------------------------------------------------------------------ prompts


def prompt(caption: str, examples: Sequence[tuple[str, str]]) -> str:
    """What the model goes on with; the caption must be clean, see `clean`."""
    lines = [f"{clean(source)} {ARROW} {clean(target)}" for source, target in examples]
    body = "".join(f"{INDENT}{line}\n\n" for line in lines)
    return f"{INSTRUCTION}\n\n{body}{INDENT}{caption} {ARROW}"


def clean(caption: str) -> str:
    """A caption that cannot be taken for a part of the prompt: one line, without an arrow."""
    return " ".join(caption.splitlines()).replace(ARROW, "->").strip()


def caption_in(text: str) -> str:
    """The caption that a prompt asks about; the inverse of `prompt`."""
    return text.rpartition("\n")[2].removesuffix(ARROW).strip()


def parse(continuation: str) -> str:
    """The rewrite in what a model wrote after a prompt: up to the next line or arrow."""
    return continuation.partition("\n")[0].partition(ARROW)[0].strip()


# ------------------------------------------------------------------------------------------------- models


class LanguageModel(Protocol):
    """What completes prompts.

    It may also have `shorten(caption, prompt_of) -> str`, which cuts a caption so that `prompt_of(caption)`
    leaves room for an answer.
    """

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str]:
        """What follows each prompt; equal prompts and seeds give equal texts."""
        ...


@dataclass(frozen=True)
class _Function:
    function: Callable[[list[str]], Sequence[str]]

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str]:
        return list(self.function(prompts))


def _model(model: Any) -> LanguageModel:
    if hasattr(model, "complete"):
        return model
    if isinstance(model, (str, Path)):
        from clipworks.data.rewriters import CausalModel

        return CausalModel.load(model)
    if callable(model):
        return _Function(model)
    raise ConfigError(
        f"{model!r} is no language model: give a folder, a CausalModel or a function of prompts"
    )


# ---------------------------------------------------------------------------------------------- rewriting


@dataclass
class PoolReport:
    """What one pool's rewrites are like.

    Attributes:
        rewrites: how many there are.
        flags: how many of them are odd, by `FLAGS`.
        words: mean of their words for each word of the caption.
        overlap: mean share of the caption's words that come back.
    """

    rewrites: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    words: float = 0.0
    overlap: float = 0.0

    def share(self, flag: str) -> float:
        """Share of the rewrites with a flag, in [0, 1]."""
        return self.flags[flag] / max(1, self.rewrites)


@dataclass(frozen=True)
class Report:
    """Pools' reports by name."""

    pools: dict[str, PoolReport]

    def __str__(self) -> str:
        lines = []
        for name, pool in self.pools.items():
            odd = "".join(f", {pool.share(flag):.1%} {flag}" for flag in FLAGS if pool.flags[flag])
            said = f"{pool.words:.2f} words a word, overlap {pool.overlap:.2f}"
            lines.append(f"{name}: {pool.rewrites} rewrites, {said}{odd}")
        return "\n".join(lines)


def rewrite(
    captions: Mapping[str, str],
    out: str | Path,
    model: LanguageModel | Callable[[list[str]], Sequence[str]] | str | Path,
    pools: Mapping[str, Pool] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Rewrite every caption once by every pool, into a file of JSON lines `{key, pool, text, flags}`.

    A file that is there already is gone on with, from its last whole batch; it then equals that of one run.
    For several machines give each a part of the captions and a file of its own.

    Args:
        captions: by key.
        out: the file; its first line says what it was made of.
        model: a folder with a causal language model, or what completes prompts.
        pools: by name; ours if left out.
        seed: another seed, other examples and other samples.
        batch_size: prompts that the model is given at once, of about equal length.
        advance: told how many rewrites are there of how many.

    Raises:
        DataError: if the file was made of other captions, pools or settings, or the model gives another
            number of texts than it was given.
        ConfigError: for a model that is none, or a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    pools = shipped_pools() if pools is None else pools
    writer, out = _model(model), Path(out)
    shorten = getattr(writer, "shorten", lambda caption, prompt_of: caption)
    keys, names = sorted(captions, key=lambda key: (len(captions[key]), key)), sorted(pools)
    total = len(keys) * len(names)
    header = {
        "rewrites_of": _digest(f"{key}\0{text}" for key, text in sorted(captions.items())),
        "pools": {name: _digest(map(repr, pool.entries)) for name, pool in pools.items()},
        "seed": seed,
        "batch_size": batch_size,
    }
    done = _go_on(out, header, batch_size, total)
    with out.open("ab") as file:
        for start in range(done, total, batch_size):
            numbers = range(start, min(total, start + batch_size))
            batch = [(keys[n // len(names)], names[n % len(names)]) for n in numbers]
            prompts, seeds, notes = [], [], []
            for key, pool in batch:
                number = fold(seed, key_number(key), key_number(pool))
                examples = pools[pool].draw(Draws(number))
                whole = clean(captions[key])
                cut = shorten(whole, lambda caption, examples=examples: prompt(caption, examples))
                prompts.append(prompt(cut, examples))
                seeds.append(number)
                notes.append((examples, cut != whole))
            answers = writer.complete(prompts, seeds)
            if len(answers) != len(batch):
                raise DataError(f"the model gave {len(answers)} texts for {len(batch)} prompts")
            lines = []
            for (key, pool), answer, (examples, cut) in zip(batch, answers, notes, strict=True):
                text = parse(answer)
                flags = _flags(text, captions[key], examples, cut)
                record = {"key": key, "pool": pool, "text": text, "flags": flags}
                lines.append(json.dumps(record, ensure_ascii=False))
            file.write(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
            advance(numbers.stop, total)
    return report(out, captions)


def _flags(text: str, caption: str, examples: Sequence[tuple[str, str]], cut: bool) -> list[str]:
    same = text.casefold()
    found = {
        "empty": not text,
        "one word": bool(text) and is_stump(text),
        "as the caption": same == clean(caption).casefold(),
        "as an example": any(same == target.casefold() for _, target in examples),
        "caption cut": cut,
    }
    return [flag for flag in FLAGS if found[flag]]


def _go_on(path: Path, header: dict[str, Any], batch_size: int, total: int) -> int:
    """How many rewrites of a file stand; what lies behind the last whole batch is cut off."""
    first = (json.dumps(header, sort_keys=True) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        begun = file.readline()
        if begun != first:
            if not first.startswith(begun) or file.read(1):
                raise DataError(
                    f"{path}: was made of other captions, pools, seed or batch size; name another file"
                )
            file.seek(0)  # new, or killed in its first line
            file.write(first)
            return 0
        end = here = len(begun)
        kept = count = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, here = count + 1, here + len(line)
            if count % batch_size == 0 or count == total:
                kept, end = count, here
        file.truncate(end)
    return kept


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ reading


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.readline()
            for line in file:
                yield json.loads(line.decode("utf-8", "surrogatepass"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a file of rewrites ({error})") from error


def report(path: str | Path, captions: Mapping[str, str]) -> Report:
    """What the rewrites of a file are like, beside the captions that they were made of."""
    found: dict[str, PoolReport] = {}
    for record in _records(Path(path)):
        pool = found.setdefault(record["pool"], PoolReport())
        caption, text = captions[record["key"]], record["text"]
        pool.rewrites += 1
        pool.flags.update(record["flags"])
        ratio = len(text.split()) / max(1, len(caption.split()))
        pool.words += (ratio - pool.words) / pool.rewrites
        pool.overlap += (overlap(caption, text) - pool.overlap) / pool.rewrites
    return Report(dict(sorted(found.items())))


def read_rewrites(path: str | Path) -> dict[str, list[str]]:
    """All rewrites of a file by key, those of a key in the alphabetical order of the pools.

    Raises:
        DataError: if the file is missing or damaged.
    """
    found: dict[str, dict[str, str]] = {}
    for record in _records(Path(path)):
        found.setdefault(record["key"], {})[record["pool"]] = record["text"]
    return {key: [texts[pool] for pool in sorted(texts)] for key, texts in found.items()}
