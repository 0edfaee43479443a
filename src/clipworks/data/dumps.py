"""Words, bigrams, titles and names out of local dumps: what `Metadata.build` makes a list of.

- `count_words` reads a Wikipedia as plain text, or as the JSON lines that extractors write; `pmi` ranks its
  bigrams.
- `page_views` reads Wikimedia's hourly page view files.
- `wordnet_names` reads WordNet's database.

Files that end in `.gz` or `.bz2` are unpacked as they are read.
"""

from __future__ import annotations

import bz2
import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import regex

from clipworks.errors import DataError

_WORD_OR_MARK = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['’\-][\p{L}\p{M}\p{N}]+)*|[\p{P}\n]+")
_PUNCTUATION = regex.compile(r"[\p{P}\n]+")
_WORDNET = ("noun", "verb", "adj", "adv")


def lines_of(files: str | Path | Iterable[str | Path]) -> Iterator[str]:
    """The lines of text files, without their ends; what is not UTF-8 is replaced.

    Raises:
        DataError: if a file cannot be read or unpacked.
    """
    for path in map(Path, [files] if isinstance(files, (str, Path)) else files):
        opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
        try:
            with opener(path, "rt", encoding="utf-8", errors="replace") as lines:  # type: ignore[operator]
                for line in lines:
                    yield line.rstrip("\r\n")
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{path}: cannot be read ({reason})") from error


def articles(files: str | Path | Iterable[str | Path]) -> Iterator[str]:
    """The texts of a corpus: the field `text` of lines that are JSON objects, other lines as they are."""
    for line in lines_of(files):
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("text"), str):
                line = record["text"]
        yield line


def count_words(
    texts: Iterable[str], *, lower: bool = True, segment: Callable[[str], list[str]] | None = None
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Counts of words and of bigrams, pairs of neighbors that no punctuation parts.

    Args:
        texts: of one language.
        lower: fold case, as the English list does; the others keep it.
        segment: words of a stretch without punctuation, for what is written without blanks (Chinese,
            Japanese, Thai, Khmer, Lao, Burmese, Tibetan); None takes runs of letters and digits, with
            apostrophes and hyphens inside.
    """
    words: Counter[str] = Counter()
    bigrams: Counter[tuple[str, str]] = Counter()
    for text in texts:
        for row in _rows(text.lower() if lower else text, segment):
            words.update(row)
            bigrams.update(pairwise(row))
    return words, bigrams


def _rows(text: str, segment: Callable[[str], list[str]] | None) -> Iterator[list[str]]:
    """The words between two marks of punctuation."""
    if segment is not None:
        for stretch in _PUNCTUATION.split(text):
            yield [word for word in segment(stretch) if word.strip()]
        return
    row: list[str] = []
    for token in _WORD_OR_MARK.findall(text):
        if _PUNCTUATION.match(token):
            yield row
            row = []
        else:
            row.append(token)
    yield row


def pmi(
    words: Mapping[str, int], bigrams: Mapping[tuple[str, str], int], *, glue: str = " "
) -> dict[str, float]:
    """log2(c12 N / (c1 c2)) of every bigram, N the number of running words.

    A pair that only occurs together, c times, has log2(N / c), and no pair has more. `glue` is what joins
    its words: nothing for languages that are written without blanks.
    """
    running = sum(words.values())
    return {
        f"{first}{glue}{second}": math.log2(count * running / (words[first] * words[second]))
        for (first, second), count in bigrams.items()
    }


def page_views(
    files: str | Path | Iterable[str | Path], *, project: str = "en", hourly: int = 50
) -> Counter[str]:
    """Views of articles from hourly files, whose lines are `project title views bytes`.

    Args:
        files: one an hour.
        project: `en` is the desktop English Wikipedia; mobile readers are `en.m`.
        hourly: views an hour below this do not count.

    A title with ":" is no article and left out; "_" becomes a blank, case stays.
    """
    views: Counter[str] = Counter()
    for line in lines_of(files):
        parts = line.split(" ")
        if len(parts) < 3 or parts[0] != project or ":" in parts[1] or not parts[2].isdecimal():
            continue
        if int(parts[2]) >= hourly:
            views[parts[1].replace("_", " ")] += int(parts[2])
    return views


def wordnet_names(folder: str | Path) -> list[str]:
    """The names of all synsets, each once, from the files `data.noun`, `data.verb`, `data.adj`, `data.adv`.

    A synset is named after its first word, in lower case, cut at its first dot, "_" as a blank.

    Raises:
        DataError: if none of the files is there.
    """
    names: dict[str, None] = {}
    found = [path for part in _WORDNET if (path := Path(folder) / f"data.{part}").is_file()]
    if not found:
        raise DataError(f"{folder}: has no data.noun or the like, so no database of WordNet")
    for path in found:
        for line in lines_of(path):
            parts = line.split(" ")
            if line.startswith(" ") or len(parts) < 5:  # the license
                continue
            word = parts[4].partition("(")[0]  # an adjective's place, "(a)"
            name = word.lower().partition(".")[0].replace("_", " ")
            if name:
                names[name] = None
    return list(names)
