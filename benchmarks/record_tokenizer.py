"""Records open_clip's ids of 20,000 odd strings, for tests/core/test_tokenizer.py.

    PYTHONPATH=. python benchmarks/record_tokenizer.py --peer-python .venv-peers/bin/python

Kept are all ids of the first 300 strings, and of every block of 100 a digest of all its ids. The libraries
that repair and split text have a part in the ids, so their versions are kept too.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from pathlib import Path

from benchmarks.tokenizer import Peer, digest
from tests.core.odd_strings import odd_strings

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "core" / "recorded" / "tokenizer.json.gz"
COUNT, BLOCK, FULL = 20_000, 100, 300


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PATH")
    python = parser.parse_args().peer_python
    texts = odd_strings(COUNT)
    blocks = [texts[first : first + BLOCK] for first in range(0, COUNT, BLOCK)]
    with Peer(python, "theirs") as peer:
        record = {
            "peer": "open_clip",
            "versions": peer.about["versions"],
            "strings": hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest(),
            "block": BLOCK,
            "blocks": [digest(peer.ask("ids", block)) for block in blocks],
            "ids": peer.ask("ids", texts[:FULL]),
            "rows": digest(peer.ask("rows", texts[:FULL])),
        }
    packed = gzip.compress(json.dumps(record, separators=(",", ":")).encode(), mtime=0)
    RECORD.write_bytes(packed)
    print(f"{RECORD}: {len(packed):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
