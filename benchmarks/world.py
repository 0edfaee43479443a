"""How many scenes, captions and surfaces a second the generated world makes on one core.

    python benchmarks/world.py [--count 1000] [--json]

There is no peer that makes the same; `ours` is examples a second of processor time of this process, so
that a busy machine does not show, and `wall` the same by the clock. Scenes come with all masks, boxes and
depth. Every case makes fresh examples and takes its best of three rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from clipworks.data.world import captions, scenes, surfaces


def cases() -> dict[str, Callable[[int], Any]]:
    """What is measured: a name and a function of the example's number."""
    config, crowd = scenes.SceneConfig(), scenes.SceneConfig(count=(8, 12))
    faulty = surfaces.SurfaceConfig()

    def scene(size: int, config: scenes.SceneConfig = config) -> Callable[[int], Any]:
        return lambda index: scenes.render(scenes.sample(config, 0, index), size)

    found: dict[str, Callable[[int], Any]] = {f"scenes-{size}": scene(size) for size in (32, 64, 128, 256)}
    found["crowds-64"] = scene(64, crowd)

    def caption(kind: str) -> Callable[[int], str]:
        return lambda index: captions.describe(scenes.sample(config, 0, index), kind)

    found |= {f"caption-{kind}": caption(kind) for kind in captions.KINDS}
    found["surfaces-64"] = lambda index: surfaces.render(surfaces.sample(faulty, 0, index), 64)
    return found


def rate(make: Callable[[int], Any], count: int) -> tuple[float, float]:
    """Examples a second of processor time, and by the clock: the best of three rounds."""
    for index in range(count, count + 40):  # grids, backgrounds and grain are computed once
        make(index)
    best_processor = best_wall = float("inf")
    for _ in range(3):
        processor, wall = time.process_time(), time.perf_counter()
        for index in range(count):
            make(index)
        best_processor = min(best_processor, time.process_time() - processor)
        best_wall = min(best_wall, time.perf_counter() - wall)
    return count / best_processor, count / best_wall


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="examples in a round")
    parser.add_argument("--json", action="store_true", help="print a list of records")
    options = parser.parse_args()
    records = []
    for case, make in cases().items():
        processor, wall = rate(make, options.count)
        records.append(
            {"case": case, "ours": round(processor, 1), "peer": None, "ratio": None, "wall": round(wall, 1)}
        )
        if not options.json:
            print(f"{case:28s} {processor:8.0f} a second of one core ({wall:.0f} by the clock)")
    if options.json:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
