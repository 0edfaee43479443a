"""Fine-tuning with its guards against plain training at 1e-4, from the same start on the same batches.

    python benchmarks/finetune.py --data DATA            # a table
    python benchmarks/finetune.py --data DATA --json

DATA holds `flickr8k-1000/` (700 photographs to train on, 300 to test) and `tiny-imagenet/`. The result is
chosen on a part of the 700; forgetting is watched on every tenth validation picture of Tiny-ImageNet, and
reported on all the others. A case is a number in percent: `ours` is the result, `peer` plain training,
`start` the model before; `ratio` is ours over the peer's. A start that was trained on the 700 itself cannot
show a gain.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "text-to-image@1": "test text_to_image@1",
    "image-to-text@1": "test image_to_text@1",
    "recall-mean-of-6": "test recall",
    "tiny-imagenet": "tiny-imagenet",
}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Both trainings, and what each of the models can do."""
    import torch

    import clipworks
    from clipworks.data.pairs import open_pairs
    from clipworks.data.sets import tiny_imagenet
    from clipworks.data.source import Selected
    from clipworks.data.templates import SIMPLE_TEMPLATES
    from clipworks.evaluate.held import labeled_probe
    from clipworks.methods.pretrain.finetune import FineTuning, Measures, finetune

    torch.set_num_threads(options.threads)
    clip = clipworks.load(options.init)
    labeled = tiny_imagenet(options.data / "tiny-imagenet", "val")
    classes = replace(labeled.classes, templates=SIMPLE_TEMPLATES)
    watched = range(0, len(labeled), 10)
    others = [row for row in range(len(labeled)) if row % 10][:: options.every]
    probe = labeled_probe(clip, Selected(labeled, watched), classes)
    unseen = labeled_probe(clip, Selected(labeled, others), classes, most=len(others))
    pairs = options.data / "flickr8k-1000"
    measures = Measures(
        probe=probe,
        test=open_pairs(pairs / "test-000.tar"),
        further=(lambda model: {"tiny-imagenet": unseen.measure(model)},),
    )
    settings = FineTuning(epochs=options.epochs, at_once=options.at_once, seed=options.seed)
    began = time.perf_counter()
    tuned = finetune(
        clip, open_pairs(pairs / "train-000.tar"), folder, settings, measures, compare=True, show="nothing"
    )
    seconds = time.perf_counter() - began
    start, plain, ours = (tuned.table[name] for name in ("start", "plain training", "tuned"))
    return [
        {
            "case": case,
            "ours": round(100 * ours[name], 2),
            "peer": round(100 * plain[name], 2),
            "start": round(100 * start[name], 2),
            "ratio": round(ours[name] / plain[name], 3) if plain[name] else None,
            "share": tuned.share,
            "epochs": tuned.epochs,
            "seconds": round(seconds),
        }
        for case, name in NAMES.items()
    ]


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shelf = Path(os.environ.get("CLIPWORKS_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shelf)
    parser.add_argument("--init", default="seedling")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--at-once", type=int, default=256, help="pairs encoded at once")
    parser.add_argument("--every", type=int, default=1, help="take every so many of the unseen pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keep the folder with models and report")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (options.data / "flickr8k-1000").is_dir():
        raise SystemExit(f"{options.data}: has no flickr8k-1000; --data names the folder of the sets")
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options, options.out or Path(scratch))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'':18}{'start':>8}{'plain':>8}{'guarded':>9}   %")
    for row in rows:
        print(f"{row['case']:18}{row['start']:8.1f}{row['peer']:8.1f}{row['ours']:9.1f}")


if __name__ == "__main__":
    main()
