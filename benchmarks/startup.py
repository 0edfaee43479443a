"""How long it takes to be useful: import, help, first embedding.

    python benchmarks/startup.py --json

`ratio` above 1 means that ours is within what it is compared with: the bound in seconds, or 1.3 times the
import of torch alone for the first text embedding. Each figure is the fastest of several processes, which
take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "import sys, clipworks; assert 'torch' not in sys.modules"
EMBED = "import clipworks; clipworks.load('seedling').embed_texts('a dog')"
HELP = "import sys; sys.argv = ['clipworks', '--help']; from clipworks.cli import main; main()"


def seconds(code: str) -> float:
    """Wall time of a Python process that runs the code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def run(rounds: int) -> list[dict[str, Any]]:
    """All cases."""
    codes = {"python": "pass", "torch": "import torch", "import": IMPORT, "embed": EMBED, "help": HELP}
    best = dict.fromkeys(codes, float("inf"))
    for number in range(rounds + 1):
        for name, code in codes.items():
            taken = seconds(code)
            if number:  # the first round fills the file cache
                best[name] = min(best[name], taken)
    empty = best["python"]
    rows = [
        ("import", best["import"] - empty, 0.3, "seconds, against the bound"),
        ("help", best["help"], 1.0, "seconds, against the bound"),
        ("first-text", best["embed"], 1.3 * best["torch"], "seconds, against 1.3 times the import of torch"),
    ]
    return [
        {"case": case, "ours": ours, "peer": peer, "ratio": peer / ours, "unit": unit, "torch": best["torch"]}
        for case, ours, peer, unit in rows
    ]


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = run(options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for one in rows:
        figures = f"{one['ours']:.3f}  bound {one['peer']:.3f}  ratio {one['ratio']:.2f}"
        print(f"{one['case']:12} {figures}  ({one['unit']})")


if __name__ == "__main__":
    main()
