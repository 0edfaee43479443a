"""CLIP's tokenizer against open_clip's: the same ids, in how much less time.

    python benchmarks/tokenizer.py --peer-python .venv-peers/bin/python
    python benchmarks/tokenizer.py --fuzz 1000000

Both run in the same minutes on the same texts, each in a process of its own, in turns; what is compared is
the processor time (all threads) of the fastest of three rounds, from strings to ids (n, 77). Words of
`familiar` have been met before, those of `unseen` never; in `captions` one of fifty is new; `multilingual`
has letters beyond ASCII, met before; `start` is all up to the first ids, the import of torch aside.

`--fuzz N` compares the ids of N odd strings, every one of them, and exits with status 1 if one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNT = 5000
ROUNDS = 3


class Peer:
    """A tokenizer in a process of its own; `ask` sends a request and waits for the answer."""

    def __init__(self, python: str, side: str):
        self.python = python
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if side == "ours":
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(ROOT / "src"), environment.get("PYTHONPATH", "")]
            )
        command = [python, str(Path(__file__).resolve()), "--serve", side]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.about = self._answer()

    def ask(self, task: str, texts: Sequence[str]) -> Any:
        assert self.process.stdin is not None
        pickle.dump((task, list(texts)), self.process.stdin)
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            raise SystemExit(f"{self.python}: the process ended; its message stands above") from None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve(side: str) -> None:
    """Answer requests on standard input until it is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between answers
    import torch

    torch.set_num_threads(1)
    begun = time.process_time()
    call, encode = (ours if side == "ours" else theirs)()
    call(["a photo of a dog"])
    start = time.process_time() - begun
    from importlib.metadata import version

    versions = {name: version(name) for name in ("ftfy", "regex", "tokenizers")} | {
        "python": sys.version.split()[0]
    }
    pickle.dump({"start": start, "versions": versions}, answers)
    answers.flush()
    while True:
        try:
            task, texts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if task == "time":
            begun = time.process_time()
            ids = call(texts)
            pickle.dump((time.process_time() - begun, digest(ids.tolist())), answers)
        elif task == "rows":
            pickle.dump(call(texts).tolist(), answers)
        elif task == "ids":
            pickle.dump([encode(text) for text in texts], answers)
        else:
            pickle.dump(digest([encode(text) for text in texts]), answers)
        answers.flush()


def ours() -> tuple[Callable[[list[str]], Any], Callable[[str], list[int]]]:
    """This library, told to read control tokens as the peer does, and to lay ids out in 77 columns."""
    import torch

    from clipworks.core.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer(control_tokens=True)

    def call(texts: list[str]) -> Any:
        ids = tokenizer(texts).ids
        return torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))

    return call, tokenizer.encode


def theirs() -> tuple[Callable[[list[str]], Any], Callable[[str], list[int]]]:
    """open_clip's tokenizer, from its file: the package itself would import the models, too."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise SystemExit(f"{sys.executable}: open_clip is not installed here; `make peers` does it")
    spec = importlib.util.spec_from_file_location(
        "open_clip_tokenizer", Path(package.origin).with_name("tokenizer.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._tokenizer, module._tokenizer.encode


def digest(rows: Sequence[Sequence[int]]) -> str:
    """A short name of lists of ids that differs if any id does."""
    import numpy as np

    flat = [i for row in rows for i in (*row, 0xFFFF)]
    return hashlib.sha256(np.array(flat, dtype="<u2").tobytes()).hexdigest()[:16]


def cases() -> dict[str, Callable[[int], list[str]]]:
    """For each case the texts of a round; round -1 comes before and is not counted."""
    sys.path.insert(0, str(ROOT))
    import random

    from tests.core.odd_strings import SENTENCES, WORDS

    def sentences(words: Sequence[str], seed: int) -> list[str]:
        dice = random.Random(seed)
        return [
            " ".join(words[int(dice.random() ** 2 * len(words))] for _ in range(12)) + "."
            for _ in range(COUNT)
        ]

    def invented(seed: int) -> list[str]:
        dice = random.Random(1000 + seed)
        return [
            "".join(dice.choices("etaoinshrdlucmfwypvbgk", k=dice.randrange(5, 13)))
            for _ in range(12 * COUNT)
        ]

    def unseen(number: int) -> list[str]:
        words = invented(number)
        return [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]

    def captions(number: int) -> list[str]:
        # One word in fifty is new, the rest is familiar.
        lines, new = sentences(WORDS, 10 + number), invented(100 + number)
        dice = random.Random(number)
        return [
            " ".join(new.pop() if dice.random() < 0.02 else word for word in line.split()) for line in lines
        ]

    return {
        "familiar": lambda number: sentences(WORDS, 0),
        "captions": captions,
        "unseen": unseen,
        "multilingual": lambda number: sentences(SENTENCES, 0)[: COUNT // 5],
    }


def compare(mine: Peer, peer: Peer) -> Iterator[dict[str, Any]]:
    """One row a case; `ratio` is how many times less processor time ours takes."""
    yield row("start", mine.about["start"], peer.about["start"], unit="ms", scale=1e3, identical=None)
    for case, texts_of in cases().items():
        times: tuple[list[float], list[float]] = ([], [])
        identical = True
        for number in range(-1, ROUNDS):
            texts = texts_of(number)
            (a, ids_a), (b, ids_b) = mine.ask("time", texts), peer.ask("time", texts)
            identical &= ids_a == ids_b
            if number >= 0:
                times[0].append(a / len(texts))
                times[1].append(b / len(texts))
        yield row(case, min(times[0]), min(times[1]), unit="µs a text", scale=1e6, identical=identical)


def row(
    case: str, mine: float, peer: float, *, unit: str, scale: float, identical: bool | None
) -> dict[str, Any]:
    """What `--json` prints of a case."""
    return {
        "case": case,
        "ours": round(mine * scale, 3),
        "peer": round(peer * scale, 3),
        "ratio": round(peer / mine, 2),
        "unit": unit,
        "identical": identical,
        "peer_name": "open_clip",
    }


def fuzz(mine: Peer, peer: Peer, count: int, block: int = 2000) -> dict[str, Any]:
    """Compare the ids of `count` odd strings."""
    sys.path.insert(0, str(ROOT))
    from tests.core.odd_strings import odd_strings

    different: list[dict[str, Any]] = []
    for first in range(0, count, block):
        texts = odd_strings(min(block, count - first), first, any_character=True)
        # All ids of each string; the rows of 77 that are made of them are compared for the first block.
        if mine.ask("digest", texts) != peer.ask("digest", texts):
            pairs = zip(texts, mine.ask("ids", texts), peer.ask("ids", texts))
            different += [{"text": text, "ours": a, "peer": b} for text, a, b in pairs if a != b]
        if not first:
            rows = zip(texts, mine.ask("rows", texts), peer.ask("rows", texts))
            different += [{"text": text, "ours": a, "peer": b} for text, a, b in rows if a != b]
        done = first + len(texts)
        if done % 50_000 == 0 and done < count:
            print(f"{done:,} of {count:,}: {len(different)} different", file=sys.stderr, flush=True)
    return {"case": "fuzz", "strings": count, "different": len(different), "first": different[:5]}


def main() -> int:
    """Run the comparison, or serve one side of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PATH")
    parser.add_argument(
        "--fuzz", type=int, default=0, metavar="N", help="compare the ids of N odd strings instead"
    )
    parser.add_argument("--json", action="store_true", help="print a list of results for machines")
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return 0
    if not Path(options.peer_python).exists():
        parser.error(f"{options.peer_python}: no such interpreter; `make peers` sets it up")
    with Peer(sys.executable, "ours") as mine, Peer(options.peer_python, "theirs") as peer:
        if mine.about["versions"] != peer.about["versions"]:
            print(f"note: {mine.about['versions']} here, {peer.about['versions']} there", file=sys.stderr)
        results = [fuzz(mine, peer, options.fuzz)] if options.fuzz else list(compare(mine, peer))
    if options.json:
        print(json.dumps(results, indent=1))
    elif options.fuzz:
        result = results[0]
        print(f"{result['strings']:,} odd strings, {result['different']:,} with other ids than open_clip's")
        for found in result["first"]:
            print(f"  {found['text']!r}\n    ours {found['ours']}\n    peer {found['peer']}")
    else:
        print(f"{'case':14} {'ours':>9} {'open_clip':>9} {'ratio':>6}")
        for one in results:
            same = {True: "ids identical", False: "IDS DIFFERENT", None: ""}[one["identical"]]
            figures = f"{one['ours']:9.2f} {one['peer']:9.2f} {one['ratio']:6.2f}"
            print(f"{one['case']:14} {figures}  {one['unit']:9}  {same}")
    failed = any(one.get("different") or one.get("identical") is False for one in results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
