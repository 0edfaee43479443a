"""`engine="auto"` against the fastest of open_clip, transformers, ONNX Runtime and OpenVINO, in fp32.

    make peers
    python benchmarks/engines.py --json

One ViT-B/32 with the same random weights for all. Each is fed what its users feed it: pixels, and texts
padded to 77 tokens. ONNX Runtime and OpenVINO run transformers' model, exported by torch, with the settings
they come with. Each side is a process of its own with all cores; they take turns, and the fastest of several
rounds counts. What `auto` measures beforehand, once for a model and machine, is not in the time; `chose` says
what it chose by. `peer` is the fastest peer, `ratio` its time over ours, `max_diff` the largest difference of
a component of the unit vectors.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from encode import (
    captions,
    measure,
    prepare,
    serve_open_clip,
    serve_transformers,
    take_turns,
)
from worker import Worker, serve

ROUNDS = 5


def serve_ours(folder: str) -> None:
    """Answer for this library."""
    import torch

    from clipworks.checkpoints.zoo import load
    from clipworks.encode import engines

    os.environ["CLIPWORKS_CACHE"] = str(Path(folder) / "cache")
    clip = load(Path(folder) / "ours")
    pixels = torch.load(Path(folder) / "pixels.pt", weights_only=True)

    def chose(kind: Any, rows: int, **_: Any) -> dict[str, Any]:
        return engines.ready(clip, kind, "auto", rows=rows).record()

    serve(
        {
            "chose": chose,
            "texts": lambda texts, **_: measure(lambda: clip.embed_texts(texts, engine="auto")),
            "pixels": lambda **_: measure(lambda: clip.embed_images(pixels, engine="auto")),
        }
    )


def serve_exported(folder: str, library: str) -> None:
    """Answer for an engine on transformers' model, which is exported by the first who needs it."""
    import torch
    from transformers import CLIPModel, CLIPTokenizerFast

    source = str(Path(folder) / "transformers")
    tokenizer = CLIPTokenizerFast.from_pretrained(source)
    pixels = torch.load(Path(folder) / "pixels.pt", weights_only=True)
    statistics = json.loads((Path(folder) / "statistics.json").read_text())
    mean, std = (torch.tensor(statistics[name]).view(3, 1, 1) for name in ("mean", "std"))
    normalized = ((pixels - mean) / std).numpy()
    batch = torch.export.Dim("batch", min=1)

    class Tower(torch.nn.Module):
        def __init__(self, kind: str):
            super().__init__()
            self.model, self.kind = CLIPModel.from_pretrained(source).eval(), kind

        def forward(self, *inputs: Any) -> Any:
            names = ("pixel_values",) if self.kind == "image" else ("input_ids", "attention_mask")
            features = getattr(self.model, f"get_{self.kind}_features")(**dict(zip(names, inputs)))
            return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)

    def exported(kind: str) -> str:
        path = Path(folder) / f"peer-{kind}.onnx"
        if not path.exists():
            ids = torch.full((2, 77), 49407)
            inputs = (torch.zeros(2, 3, 224, 224),) if kind == "image" else (ids, torch.ones_like(ids))
            names = ["pixels"] if kind == "image" else ["ids", "mask"]
            torch.onnx.export(
                Tower(kind),
                inputs,
                str(path),
                input_names=names,
                output_names=["features"],
                # The module takes its inputs as one list.
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        return str(path)

    @functools.cache  # when it is asked for: two processes must not write one file at the same time
    def session(kind: str) -> Any:
        path = exported(kind)
        if library == "openvino":
            import openvino

            model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            return lambda *inputs: torch.from_numpy(model(list(inputs))[0])
        import onnxruntime

        run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [one.name for one in run.get_inputs()]
        return lambda *inputs: torch.from_numpy(run.run(None, dict(zip(names, inputs)))[0])

    def texts(texts: list[str], **_: Any) -> tuple[float, Any]:
        def encode() -> Any:
            found = tokenizer(
                texts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
            )
            return session("text")(found["input_ids"], found["attention_mask"])

        return measure(encode)

    serve({"texts": texts, "pixels": lambda **_: measure(lambda: session("image")(normalized))})


SIDES = {
    "ours": serve_ours,
    "open_clip": serve_open_clip,
    "transformers": serve_transformers,
    "onnxruntime": lambda folder: serve_exported(folder, "onnxruntime"),
    "openvino": lambda folder: serve_exported(folder, "openvino"),
}


def run(peer_python: str, rounds: int, images: int, texts: int, only: list[str]) -> list[dict[str, Any]]:
    """Both cases."""
    import numpy as np

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), images)
        script = str(Path(__file__).resolve())
        workers = {
            side: Worker(sys.executable if side == "ours" else peer_python, script, side, "--folder", name)
            for side in SIDES
        }
        listed = captions(texts)
        for case, count in (("image-best", images), ("text-best", texts)):
            if only and case not in only:
                continue
            chose = workers["ours"].ask("chose", kind=case.partition("-")[0], rows=count)
            asked = {"task": "pixels"} if case == "image-best" else {"task": "texts", "texts": listed}
            best = take_turns(
                {
                    side: lambda worker=worker, asked=asked: worker.ask(**asked, padding="max_length")
                    for side, worker in workers.items()
                },
                rounds,
            )
            seconds, vectors = best.pop("ours")
            peer = min(best, key=lambda side: best[side][0])
            rows.append(
                {
                    "case": case,
                    "ours": count / seconds,
                    "peer": peer,
                    "peer_per_second": count / best[peer][0],
                    "ratio": best[peer][0] / seconds,
                    "max_diff": float(np.abs(vectors - best[peer][1]).max()),
                    "unit": "per second",
                    "peers": {side: count / one for side, (one, _) in best.items()},
                    "engine": chose["name"],
                    "chose": chose,
                }
            )
        for worker in workers.values():
            worker.close()
    return rows


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="Python of `make peers`")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=[], help="only these cases")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=SIDES)
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.serve:
        SIDES[options.serve](options.folder)
        return
    rows = run(options.peer_python, options.rounds, options.images, options.texts, options.only)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for one in rows:
        print(
            f"{one['case']:11} ours ({one['engine']}) {one['ours']:8.1f}/s  {one['peer']}"
            f" {one['peer_per_second']:8.1f}/s  {one['ratio']:5.2f}x  max difference {one['max_diff']:.1e}"
        )


if __name__ == "__main__":
    main()
