"""Segmenting with ours, and the peer's tower with the same upsampling, in one run.

    make peers
    python benchmarks/dense.py --json

`segment-480` is `MaskCLIP.segment_all` on pictures of 480 x 480 pixels, each in one window, with a ViT-B/16
and 12 labels: pictures in, label maps out. The peer is open_clip's tower of that size on the same pictures,
read and normalized before the clock starts, its patch tokens compared with 12 vectors, the scores stretched
to 480 x 480 and the best taken. Weights are random. Labels are encoded before the clock starts, for they are
encoded once, however many pictures follow; `label_seconds` is what that took, in one sentence each.

Both run in processes of their own with all cores and take turns; the fastest of several rounds counts. `ours`
and `peer` are pictures a second, `ratio` ours over the peer's, `overhead` what ours takes longer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worker import Worker, serve

SIZE, LABELS, BATCH, SHARPNESS = 480, 12, 8, 100.0


def pictures(count: int) -> Any:
    """Noise, (count, 480, 480, 3) bytes."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def serve_ours() -> None:
    """Answer for this library."""
    from PIL import Image

    from clipworks.core.clip import Clip
    from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
    from clipworks.core.tokenizer import ClipTokenizer
    from clipworks.data.captions import ClassTexts
    from clipworks.methods.dense.base import Asked
    from clipworks.methods.dense.maskclip import MaskCLIP

    class Encoded(MaskCLIP):
        """Takes vectors that are there."""

        asked: Asked

        def _asked(self, texts: ClassTexts, background: int | None) -> Asked:
            return self.asked

    config = Config(
        width=512,
        image=VisionConfig(224, 16, 768, uniform_blocks(12, 768)),
        text=TextConfig(77, 49408, 512, uniform_blocks(12, 512)),
        name="ViT-B-16",
    )
    clip = Clip.from_config(config, ClipTokenizer(), seed=0)
    names = [f"label {i}" for i in range(LABELS)]
    method = Encoded(clip, size="full", window=SIZE, templates=("a photo of a {}.",), progress=False)
    texts, _ = method._texts(names, None)
    start = time.perf_counter()
    method.asked = MaskCLIP._asked(method, texts, None)
    spent = time.perf_counter() - start

    def segment(count: int) -> float:
        images = [Image.fromarray(one) for one in pictures(count)]
        return timed(lambda: [one.map for one in method.segment_all(images, names, batch_size=BATCH)])  # type: ignore[union-attr]

    serve({"segment": segment, "labels": lambda: spent})


def serve_open_clip() -> None:
    """Answer for open_clip."""
    import open_clip
    import torch
    from torch.nn import functional as F

    model = open_clip.create_model("ViT-B-16", pretrained=None, force_image_size=SIZE).eval()
    model.visual.output_tokens = True
    vectors = F.normalize(torch.randn(LABELS, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    @torch.no_grad()
    def segment(count: int) -> float:
        pixels = torch.from_numpy(pictures(count)).permute(0, 3, 1, 2).float() / 255
        batches = ((pixels - mean) / std).split(BATCH)

        def run() -> None:
            for batch in batches:
                _, tokens = model.visual(batch)
                features = F.normalize(tokens @ model.visual.proj, dim=2)
                likely = (SHARPNESS * features @ vectors.T).softmax(dim=2)
                maps = likely.transpose(1, 2).unflatten(2, (SIZE // 16, SIZE // 16))
                F.interpolate(maps, (SIZE, SIZE), mode="bilinear").argmax(dim=1)

        return timed(run)

    serve({"segment": segment})


SIDES = {"ours": serve_ours, "open_clip": serve_open_clip}


def run(peer_python: str, rounds: int, count: int) -> list[dict[str, Any]]:
    """The case."""
    script = str(Path(__file__).resolve())
    workers = {
        side: Worker(sys.executable if side == "ours" else peer_python, script, side) for side in SIDES
    }
    best = dict.fromkeys(SIDES, float("inf"))
    for number in range(rounds + 1):
        for side, worker in workers.items():
            seconds = worker.ask("segment", count=count)
            if number:  # the first round warms up
                best[side] = min(best[side], seconds)
    row = {
        "case": f"segment-{SIZE}",
        "ours": count / best["ours"],
        "peer": count / best["open_clip"],
        "ratio": best["open_clip"] / best["ours"],
        "overhead": best["ours"] / best["open_clip"] - 1,
        "peer_name": "open_clip",
        "unit": "per second",
        "label_seconds": workers["ours"].ask("labels"),
    }
    for worker in workers.values():
        worker.close()
    return [row]


def main() -> None:
    """Run the case and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="Python of `make peers`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=SIDES)
    options = parser.parse_args()
    if options.serve:
        SIDES[options.serve]()
        return
    rows = run(options.peer_python, options.rounds, options.images)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for one in rows:
        print(
            f"{one['case']} ours {one['ours']:.2f}/s  {one['peer_name']} {one['peer']:.2f}/s  "
            f"{one['ratio']:.2f}x  overhead {one['overhead']:.1%}"
        )


if __name__ == "__main__":
    main()
