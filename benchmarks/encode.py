"""Encoding with ours, open_clip and transformers in one run, on one ViT-B/32 with the same random weights.

    make peers
    python benchmarks/encode.py --json

Each library is fed what its users feed it: texts padded to 77 tokens for both peers (transformers also
padded to the longest text of the batch, stated apart), prepared tensors, or files. Each runs in a process of
its own with all cores; they take turns, and the fastest of several rounds counts. `peer` is the faster peer,
`ratio` its time over ours, `max_diff` the largest difference of a component of the unit vectors.

`image-jpeg` takes `precision="auto"`, as the commands do: bf16 where the processor multiplies it faster and
the model agrees with itself; `image-jpeg-fp32` stays in fp32.

The zero-shot head has ImageNet's 1,000 names in OpenAI's 80 templates. The peers compute a sample of its
prompts and are scaled up to all of them; ours computes all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worker import Worker, serve

ROUNDS = 5
HEAD_SAMPLE = 320
CAPTIONS = [
    "a dog runs along the beach",
    "two children play football in the park",
    "a red bus stops in front of the old town hall",
    "a cup of coffee on a wooden table",
    "an astronaut in a white suit smiles",
    "a motorcycle leans against a brick wall",
    "a woman reads a book by the window",
    "snow on the roofs of a mountain village",
]
LONG = (
    "a photograph of a busy street market with stalls of fruit, flowers, bread and cheese, where people of "
    "all ages walk slowly between the tables under colorful umbrellas while musicians play at the corner and "
    "pigeons wait for crumbs beside an old stone fountain in the warm light of a late summer afternoon in a "
    "small town by the sea"
)


def captions(count: int) -> list[str]:
    """Different captions of 6 to 16 tokens."""
    return [f"{CAPTIONS[i % len(CAPTIONS)]} {i}" for i in range(count)]


def measure(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call and its vectors; of a call of milliseconds, the fastest within half a second."""
    best, begun = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        vectors = call()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > 0.5:
            return best, vectors.float().cpu().numpy()


def serve_ours(folder: str) -> None:
    """Answer for this library."""
    import torch

    from clipworks.checkpoints.zoo import load
    from clipworks.data.templates import IMAGENET_TEMPLATES

    clip = load(Path(folder) / "ours")
    pixels = torch.load(Path(folder) / "pixels.pt", weights_only=True)

    def head(names: list[str]) -> tuple[float, Any]:
        seconds, vectors = measure(lambda: clip.class_features(names, IMAGENET_TEMPLATES))
        return seconds, vectors

    serve(
        {
            "texts": lambda texts, **_: measure(lambda: clip.embed_texts(texts)),
            "head": lambda names, **_: head(names),
            "pixels": lambda precision, **_: measure(lambda: clip.embed_images(pixels, precision=precision)),
            "files": lambda paths, precision, **_: measure(
                lambda: clip.embed_images(paths, precision=precision)
            ),
        }
    )


def serve_open_clip(folder: str) -> None:
    """Answer for open_clip."""
    import open_clip
    import torch
    from PIL import Image

    model = open_clip.create_model(
        "ViT-B-32", pretrained=str(Path(folder) / "open_clip" / "open_clip_model.safetensors")
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
    pixels = torch.load(Path(folder) / "pixels.pt", weights_only=True)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    normalized = (pixels - mean) / torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    @torch.no_grad()
    def texts(texts: list[str], **_: Any) -> tuple[float, Any]:
        return measure(lambda: model.encode_text(tokenizer(texts), normalize=True))

    @torch.no_grad()
    def images(**_: Any) -> tuple[float, Any]:
        return measure(lambda: model.encode_image(normalized, normalize=True))

    @torch.no_grad()
    def files(paths: list[str], **_: Any) -> tuple[float, Any]:
        def encode() -> Any:
            return model.encode_image(
                torch.stack([preprocess(Image.open(path)) for path in paths]), normalize=True
            )

        return measure(encode)

    def names(**_: Any) -> tuple[list[str], list[str]]:
        templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        return list(open_clip.IMAGENET_CLASSNAMES), templates

    serve({"texts": texts, "pixels": images, "files": files, "names": names})


def serve_transformers(folder: str) -> None:
    """Answer for transformers."""
    import torch
    from transformers import CLIPModel, CLIPTokenizerFast

    model = CLIPModel.from_pretrained(str(Path(folder) / "transformers")).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(str(Path(folder) / "transformers"))
    pixels = torch.load(Path(folder) / "pixels.pt", weights_only=True)
    statistics = json.loads((Path(folder) / "statistics.json").read_text())
    mean, std = (torch.tensor(statistics[name]).view(3, 1, 1) for name in ("mean", "std"))
    normalized = (pixels - mean) / std

    def vectors(output: Any) -> Any:
        output = getattr(output, "pooler_output", output)
        return torch.nn.functional.normalize(output, dim=-1)

    @torch.no_grad()
    def texts(texts: list[str], padding: str, **_: Any) -> tuple[float, Any]:
        def encode() -> Any:
            inputs = tokenizer(texts, padding=padding, truncation=True, max_length=77, return_tensors="pt")
            return vectors(model.get_text_features(**inputs))

        return measure(encode)

    @torch.no_grad()
    def images(**_: Any) -> tuple[float, Any]:
        return measure(lambda: vectors(model.get_image_features(pixel_values=normalized)))

    serve({"texts": texts, "pixels": images})


SIDES = {"ours": serve_ours, "open_clip": serve_open_clip, "transformers": serve_transformers}


def prepare(folder: Path, images: int) -> list[str]:
    """Write one model in three layouts, pixels, and JPEG files; returns their paths."""
    import numpy as np
    import torch
    from PIL import Image

    from clipworks.core.clip import Clip
    from clipworks.core.config import CLIP_MEAN, CLIP_STD, Config, TextConfig, VisionConfig, uniform_blocks
    from clipworks.core.tokenizer import ClipTokenizer

    config = Config(
        width=512,
        image=VisionConfig(224, 32, 768, uniform_blocks(12, 768)),
        text=TextConfig(77, 49408, 512, uniform_blocks(12, 512)),
        name="ViT-B-32",
    )
    clip = Clip.from_config(config, ClipTokenizer(), seed=0)
    clip.save(folder / "ours")
    clip.save_open_clip(folder / "open_clip")
    clip.save_pretrained_hf(folder / "transformers")
    (folder / "statistics.json").write_text(json.dumps({"mean": CLIP_MEAN, "std": CLIP_STD}))
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.rand(images, 3, 224, 224, generator=generator), folder / "pixels.pt")
    paths = []
    dice = np.random.default_rng(0)
    for i in range(images):
        # Smooth noise compresses as photographs do; white noise would make huge files.
        small = Image.fromarray(dice.integers(0, 256, (150, 200, 3), dtype=np.uint8))
        path = folder / f"{i}.jpg"
        small.resize((1600, 1200), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
    return paths


def take_turns(
    sides: dict[str, Callable[[], tuple[float, Any]]], rounds: int
) -> dict[str, tuple[float, Any]]:
    """The fastest of several rounds of each side, in turns, after one that does not count."""
    best: dict[str, tuple[float, Any]] = {}
    for number in range(rounds + 1):
        for side, call in sides.items():
            seconds, vectors = call()
            if number and (side not in best or seconds < best[side][0]):
                best[side] = (seconds, vectors)
    return best


def row(case: str, count: int, best: dict[str, tuple[float, Any]], **more: Any) -> dict[str, Any]:
    """One case: throughput of ours and of the faster peer, their ratio and difference."""
    import numpy as np

    ours, vectors = best["ours"]
    peers = {side: seconds for side, (seconds, _) in best.items() if side in ("open_clip", "transformers")}
    peer = min(peers, key=lambda side: peers[side])
    others = {side: count / seconds for side, (seconds, _) in best.items() if side != "ours"}
    return {
        "case": case,
        "ours": count / ours,
        "peer": count / peers[peer],
        "ratio": peers[peer] / ours,
        "max_diff": float(np.abs(vectors - best[peer][1]).max()),
        "peer_name": peer,
        "unit": "per second",
        "peers": others,
        **more,
    }


def run(peer_python: str, rounds: int, images: int, classes: int, only: list[str]) -> list[dict[str, Any]]:
    """All cases."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = prepare(folder, images)
        script = str(Path(__file__).resolve())
        workers = {
            side: Worker(sys.executable if side == "ours" else peer_python, script, side, "--folder", name)
            for side in SIDES
        }
        ours, oc, hf = workers["ours"], workers["open_clip"], workers["transformers"]

        def texts(case: str, listed: list[str]) -> None:
            if only and case not in only:
                return
            best = take_turns(
                {
                    "ours": lambda: ours.ask("texts", texts=listed),
                    "open_clip": lambda: oc.ask("texts", texts=listed),
                    "transformers": lambda: hf.ask("texts", texts=listed, padding="max_length"),
                    "transformers, longest": lambda: hf.ask("texts", texts=listed, padding="longest"),
                },
                rounds,
            )
            rows.append(row(case, len(listed), best))

        texts("text-short-32", captions(32))
        texts("text-short-1", captions(1))
        texts("text-one-long", [*captions(31), LONG])
        if not only or "zeroshot-head" in only:
            rows.append(head(ours, oc, hf, classes))
        for precision in ("fp32", "bf16"):
            if not only or f"image-{precision}" in only:
                best = take_turns(
                    {
                        "ours": lambda p=precision: ours.ask("pixels", precision=p),
                        "open_clip": lambda: oc.ask("pixels"),
                        "transformers": lambda: hf.ask("pixels"),
                    },
                    rounds,
                )
                cosine = float((best["ours"][1] * best["open_clip"][1]).sum(1).min())
                rows.append(row(f"image-{precision}", images, best, cosine=cosine))
        for case, precision in (("image-jpeg", "auto"), ("image-jpeg-fp32", "fp32")):
            if not only or case in only:
                best = take_turns(
                    {
                        "ours": lambda p=precision: ours.ask("files", paths=paths, precision=p),
                        "open_clip": lambda: oc.ask("files", paths=paths),
                    },
                    rounds,
                )
                cosine = float((best["ours"][1] * best["open_clip"][1]).sum(1).min())
                rows.append(row(case, images, best, cosine=cosine, precision=precision))
        for worker in workers.values():
            worker.close()
    return rows


def head(ours: Worker, oc: Worker, hf: Worker, classes: int) -> dict[str, Any]:
    """The zero-shot head: ours whole, the peers on a sample of its prompts, scaled."""
    import numpy as np

    names, templates = oc.ask("names")
    names = names[:classes]
    prompts = [template.replace("{}", name) for name in names for template in templates]
    picked = np.random.default_rng(0).permutation(len(prompts))[:HEAD_SAMPLE]
    sample = [prompts[i] for i in picked]
    best = take_turns(
        {
            "open_clip": lambda: oc.ask("texts", texts=sample),
            "transformers": lambda: hf.ask("texts", texts=sample, padding="max_length"),
        },
        1,
    )
    scaled = {
        side: (seconds * len(prompts) / len(sample), vectors) for side, (seconds, vectors) in best.items()
    }
    seconds, _ = ours.ask("head", names=names)
    vectors = ours.ask("texts", texts=sample)[1]
    return row(
        "zeroshot-head",
        len(prompts),
        {"ours": (seconds, vectors), **scaled},
        classes=classes,
        peer_sample=len(sample),
    )


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="Python of `make peers`")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--classes", type=int, default=1000, help="classes of the zero-shot head")
    parser.add_argument("--only", nargs="*", default=[], help="only these cases")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=SIDES)
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.serve:
        SIDES[options.serve](options.folder)
        return
    rows = run(options.peer_python, options.rounds, options.images, options.classes, options.only)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for one in rows:
        print(
            f"{one['case']:14} ours {one['ours']:9.1f}/s  {one['peer_name']} {one['peer']:9.1f}/s  "
            f"{one['ratio']:5.2f}x  max difference {one['max_diff']:.1e}"
        )


if __name__ == "__main__":
    main()
