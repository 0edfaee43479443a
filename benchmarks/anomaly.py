"""AnomalyCLIP across worlds: trained on generated surfaces, tested on magnetic tiles, and the reverse.

    python benchmarks/anomaly.py --data DATA --json

DATA holds `magnetic-tile` (or is such a set). `world-to-tiles` learns from one half of the world's textures;
`tiles-to-world` from the photographs, tested on the textures of the other half. A row is a direction, an arm
and a metric in [0, 1]: `ours` is the arm's, `peer` that of the plain sentences, `ratio` ours by theirs. The
arms are those of the proof (`clipworks prove anomalyclip`). `--pictures` takes fewer of everything.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipworks.checkpoints.zoo import load
from clipworks.proofs.anomalyclip import Pictures, Size, experiment, surfaces, tiles

METRICS = ("image_auroc", "pixel_auroc", "pro")


def spread(pictures: Pictures, most: int) -> Pictures:
    """At most so many, evenly spread: the set lists one kind of defect after the other."""
    count = min(most, len(pictures.images))
    kept = [place * len(pictures.images) // count for place in range(count)]
    return Pictures([pictures.images[i] for i in kept], [pictures.masks[i] for i in kept])


def rows(direction: str, found: dict[str, Any], on: str) -> list[dict[str, Any]]:
    """One for each arm and metric."""
    return [
        {
            "case": f"{direction}/{arm}/{metric}",
            "ours": round(reached[on][metric], 3),
            "peer": round(found["plain"][on][metric], 3),
            "ratio": round(reached[on][metric] / max(1e-9, found["plain"][on][metric]), 2),
        }
        for arm, reached in found.items()
        for metric in METRICS
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with magnetic-tile")
    parser.add_argument("--pictures", type=int, default=400, help="to train on, and at most to test on")
    parser.add_argument("--epochs", type=int, default=15, help="of what learns")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the training")
    parser.add_argument("--json", action="store_true", help="print a list of records")
    options = parser.parse_args()
    clip = load("seedling")
    size = replace(Size(), train=options.pictures, test=options.pictures // 2, epochs=options.epochs)
    world, unseen = surfaces(options.seed, size)
    photographs = spread(tiles(options.data), options.pictures)
    there = experiment(clip, world, {"tiles": photographs}, options.seed, size)
    back = experiment(clip, photographs, {"world": unseen}, options.seed, size)
    results = rows("world-to-tiles", there, "tiles") + rows("tiles-to-world", back, "world")
    if options.json:
        print(json.dumps(results))
        return
    for one in results:
        print(f"{one['case']:50s} {one['ours']:.3f}  plain {one['peer']:.3f}")


if __name__ == "__main__":
    main()
