"""Training steps of ours and of open_clip's own training loop in one run, from the same weights.

    make peers
    python benchmarks/train.py --json            # ViT-B/32; several minutes a case on two cores
    python benchmarks/train.py --small --cases step-fp32

`step-fp32` and `step-bf16` take optimizer steps on batches in memory: pictures and captions of natural length
(8 to 25 tokens, which open_clip pads to 77), softmax loss, AdamW, warm-up. `epoch` reads JPEG files, decodes
and tokenizes them. Ours is `engine.fit`, open_clip's is its `train_one_epoch`, in `amp_bf16` where ours
computes in bf16; its data come from a `DataLoader` with its own preprocessing and tokenizer, as its CSV data
sets do (their module needs torchvision). Each side runs in a process of its own with all cores; they take
turns.

`ours` and `peer` are samples a second of the fastest step (`epoch`: of the fastest whole epoch), `ratio` is
ours over the peer's, `cpu_ratio` the same for processor time, which other work on the machine disturbs less;
`ratio_to_fp32` compares with open_clip in fp32. `losses` are both curves from the common start, `max_diff`
is their largest difference; `memory_mib` is the peak of each process in the first round above what it held
before, and `utilization` is ours as `fit` prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worker import Worker, serve

CASES = ("step-fp32", "step-bf16", "epoch")
STEPS, ROUNDS, PICTURES = 4, 3, 96
LR, WARMUP, TOTAL, DECAY = 5e-4, 8, 1000, 0.2
SCENES = [
    "a dog runs along the beach",
    "two children play football in the park",
    "a red bus stops in front of the old town hall",
    "a cup of coffee on a wooden table",
    "an astronaut in a white suit smiles at the camera",
    "a motorcycle leans against a brick wall",
    "a woman reads a book by the window",
    "snow on the roofs of a mountain village",
]
ENDINGS = ["", " in the evening light", ", seen from above", " while a crowd of people in coats waits nearby"]


def captions(count: int) -> list[str]:
    """Different captions of 8 to 25 tokens, 14 in the mean."""
    return [f"{SCENES[i % 8]}{ENDINGS[i // 8 % 4]} {i}" for i in range(count)]


def memory(mark: str) -> int:
    """MiB of this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(mark + ":"):
            return int(line.split()[1]) // 1024
    raise SystemExit("memory is measured on Linux only")


class Watch:
    """Clocks around steps, losses, and the peak of memory between the first and the last."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
        self.marks = time.perf_counter(), time.process_time()
        self.begun = time.perf_counter()

    def step(self, loss: float) -> None:
        """A step is over."""
        now = time.perf_counter(), time.process_time()
        self.wall.append(now[0] - self.marks[0])
        self.cpu.append(now[1] - self.marks[1])
        self.marks = now
        self.losses.append(loss)

    def report(self, utilization: float = 0.0) -> dict[str, Any]:
        """What was seen."""
        return {
            "wall": min(self.wall),
            "cpu": min(self.cpu),
            "whole": time.perf_counter() - self.begun,
            "losses": self.losses,
            "memory_mib": memory("VmHWM") - self.before,
            "workers_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
            "utilization": utilization,
        }


class Enough(Exception):
    """The steps that were asked for are done."""


def serve_ours(folder: str) -> None:
    """Answer for this library."""
    import torch

    from clipworks.checkpoints.zoo import load
    from clipworks.data.batch import Batch
    from clipworks.data.folders import CaptionedFolder
    from clipworks.data.loader import Loader, Reading
    from clipworks.data.samplers import Sequential
    from clipworks.engine import Callback, Recipe, State, fit
    from clipworks.methods.pretrain.clip import ClipObjective

    place = Path(folder)
    pixels, texts = torch.load(place / "pixels.pt", weights_only=True), captions(PICTURES)

    class Seen(Callback):
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def on_start(self, state: State) -> None:
            self.watch = Watch()

        def on_step(self, state: State) -> None:
            self.watch.step(state.loss)
            self.utilization = state.utilization
            if state.step == self.steps:
                raise Enough  # before anything is saved: the peer saves nothing either

    def run(data: Any, steps: int, precision: str) -> dict[str, Any]:
        clip, seen = load(place / "ours"), Seen(steps)
        recipe = Recipe(steps=TOTAL, lr=LR, warmup=WARMUP, weight_decay=DECAY, precision=precision)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as out, contextlib.suppress(Enough):
            fit(clip, ClipObjective(), data(clip), recipe, folder=out, callbacks=[seen], show="nothing")
        return seen.watch.report(seen.utilization)

    def in_memory(batch: int, steps: int, precision: str, **_: Any) -> dict[str, Any]:
        def data(clip: Any) -> list[Batch]:
            return [
                Batch(images=pixels[rows], texts={"alt": clip.tokenizer([texts[i] for i in rows])})
                for rows in rows_of(batch, steps)
            ]

        return run(data, steps, precision)

    def epoch(batch: int, precision: str, **_: Any) -> dict[str, Any]:
        def data(clip: Any) -> Loader:
            source = CaptionedFolder(place / "captions.csv", image="filepath", texts={"alt": "title"})
            return Loader(
                source, clip.preprocessing, clip.tokenizer, batch,
                sampler=Sequential(), reading=Reading(workers=2),
            )  # fmt: skip

        return run(data, PICTURES // batch, precision)

    serve({"step": in_memory, "epoch": epoch})


def serve_open_clip(folder: str) -> None:
    """Answer for open_clip."""
    import csv
    import logging
    from types import SimpleNamespace

    import open_clip
    import torch
    from open_clip_train import train as training
    from open_clip_train.scheduler import cosine_lr
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    logging.disable(logging.CRITICAL)
    place = Path(folder)
    pixels, texts = torch.load(place / "pixels.pt", weights_only=True), captions(PICTURES)
    config = json.loads((place / "open_clip" / "open_clip_config.json").read_text())["model_cfg"]
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    preprocess = open_clip.image_transform(pixels.shape[-1], is_train=False)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    class Files(Dataset):
        """The rows of the file of captions, as open_clip's CSV data set reads them."""

        def __init__(self) -> None:
            with (place / "captions.csv").open(encoding="utf-8", newline="") as file:
                self.rows = [(row["filepath"], row["title"]) for row in csv.DictReader(file)]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            path, caption = self.rows[index]
            return preprocess(Image.open(place / path)), tokenizer([caption])[0]

    def run(batches: Any, count: int, batch: int, precision: str) -> dict[str, Any]:
        model = open_clip.CLIP(**config, output_dict=True)
        state = open_clip.factory.load_state_dict(str(place / "open_clip" / "open_clip_model.safetensors"))
        model.load_state_dict(state)
        # As its main.py builds it.
        named = list(model.named_parameters())
        free = [p for n, p in named if p.ndim < 2 or any(x in n for x in ("bn", "ln", "bias", "logit_scale"))]
        held = {id(p) for p in free}
        groups = [
            {"params": free, "weight_decay": 0.0},
            {"params": [p for _, p in named if id(p) not in held], "weight_decay": DECAY},
        ]
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
        options = SimpleNamespace(
            device="cpu", precision=precision, distill=False, accum_freq=1, skip_scheduler=False,
            horovod=False, grad_clip_norm=None, log_every_n_steps=1, batch_size=batch, rank=0,
            local_rank=0, world_size=1, wandb=False, tensorboard=False, log_local=False,
        )  # fmt: skip
        watch = Watch()

        class Board:
            """Where the loop reports the loss after every step."""

            def add_scalar(self, name: str, value: float, step: int) -> None:
                if name == "train/loss":
                    watch.step(value)

        data = SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)
        batches.num_batches, batches.num_samples = count, count * batch
        training.train_one_epoch(
            model, {"train": data}, open_clip.ClipLoss(), 0, optimizer, None,
            cosine_lr(optimizer, LR, WARMUP, TOTAL), None, options, tb_writer=Board(),
        )  # fmt: skip
        return watch.report()

    class InMemory(list):  # type: ignore[type-arg]
        """A list that may be told its number of samples."""

    def in_memory(batch: int, steps: int, precision: str, **_: Any) -> dict[str, Any]:
        batches = InMemory(
            ((pixels[rows].float() / 255 - mean) / std, tokenizer([texts[i] for i in rows]))
            for rows in rows_of(batch, steps)
        )
        return run(batches, steps, batch, precision)

    def epoch(batch: int, precision: str, **_: Any) -> dict[str, Any]:
        loader = DataLoader(Files(), batch_size=batch, num_workers=2, drop_last=True)
        return run(loader, len(loader), batch, precision)

    serve({"step": in_memory, "epoch": epoch})


SIDES = {"ours": serve_ours, "open_clip": serve_open_clip}


def rows_of(batch: int, steps: int) -> Iterator[list[int]]:
    """The examples of each step."""
    for step in range(steps):
        yield [(step * batch + row) % PICTURES for row in range(batch)]


def prepare(folder: Path, small: bool) -> None:
    """Write one model in both layouts, pixels, JPEG files and their captions."""
    import csv

    import numpy as np
    import torch
    from PIL import Image

    from clipworks.core.clip import Clip
    from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
    from clipworks.core.tokenizer import ClipTokenizer

    depth, widths, side, width = (4, (256, 192), 128, 192) if small else (12, (768, 512), 224, 512)
    config = Config(
        width=width,
        image=VisionConfig(side, 32, widths[0], uniform_blocks(depth, widths[0])),
        text=TextConfig(77, 49408, widths[1], uniform_blocks(depth, widths[1])),
        name="benchmark",
    )
    clip = Clip.from_config(config, ClipTokenizer(), seed=0)
    clip.save(folder / "ours")
    clip.save_open_clip(folder / "open_clip")
    dice = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "title"])
        for i, caption in enumerate(captions(PICTURES)):
            # Smooth noise compresses as photographs do; white noise would make huge files.
            noise = Image.fromarray(dice.integers(0, 256, (47, 62, 3), dtype=np.uint8))
            noise.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
            table.writerow([f"{i}.jpg", caption])
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(PICTURES, 3, side // 8, side // 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    torch.save((255 * pixels).round().to(torch.uint8), folder / "pixels.pt")


def case_of(case: str, ours: Worker, peer: Worker, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """One row: both sides in turns, the first round also for losses and memory."""
    task = "epoch" if case == "epoch" else "step"
    half = case == "step-bf16"
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": lambda: ours.ask(task, batch=batch, steps=steps, precision="bf16" if half else "fp32"),
        "peer": lambda: peer.ask(task, batch=batch, steps=steps, precision="amp_bf16" if half else "fp32"),
    }
    if half:
        sides["peer in fp32"] = lambda: peer.ask(task, batch=batch, steps=steps, precision="fp32")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            found[side].append(call())
    clock, samples = ("whole", PICTURES // batch * batch) if task == "epoch" else ("wall", batch)
    wall = {side: min(one[clock] for one in each) for side, each in found.items()}
    cpu = {side: min(one["cpu"] for one in each) for side, each in found.items()}
    curves = [found[side][0]["losses"] for side in ("ours", "peer")]
    row = {
        "case": case,
        "ours": samples / wall["ours"],
        "peer": samples / wall["peer"],
        "ratio": wall["peer"] / wall["ours"],
        "cpu_ratio": cpu["peer"] / cpu["ours"],
        "unit": "samples per second",
        "batch": batch,
        "losses": curves,
        "max_diff": max(abs(a - b) for a, b in zip(*curves, strict=True)),
        "memory_mib": [found[side][0]["memory_mib"] for side in ("ours", "peer")],
        "utilization": max(one["utilization"] for one in found["ours"]),
    }
    if task == "epoch":
        row["workers_mib"] = [found[side][-1]["workers_mib"] for side in ("ours", "peer")]
    if half:
        row["ratio_to_fp32"] = wall["peer in fp32"] / wall["ours"]
        row["cpu_ratio_to_fp32"] = cpu["peer in fp32"] / cpu["ours"]
    return row


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.small)
        script = str(Path(__file__).resolve())
        for case in options.cases:
            workers = [
                Worker(python, script, side, "--folder", name)
                for side, python in (("ours", sys.executable), ("open_clip", options.peer_python))
            ]
            rows.append(case_of(case, *workers, options.batch, options.steps, options.rounds))
            for worker in workers:
                worker.close()
    return rows


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="Python of `make peers`")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--small", action="store_true", help="towers of 4 blocks instead of ViT-B/32")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        SIDES[options.serve](options.folder)
        return
    rows = run(options)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['case']:9} ours {row['ours']:8.2f}/s  open_clip {row['peer']:8.2f}/s  {row['ratio']:.2f}x"
            f"  (processor time {row['cpu_ratio']:.2f}x)  losses within {row['max_diff']:.1e}"
            f"  memory {row['memory_mib'][0]} and {row['memory_mib'][1]} MiB"
        )


if __name__ == "__main__":
    main()
