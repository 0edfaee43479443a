"""What adapting costs: a step of prompt learning, a probe and a training-free fit, at sizes that people have.

    python benchmarks/adapt.py --json

`text-step` is the text side of a training step of 16 shared context vectors, forward and backward, through a
text tower of ViT-B's size. The peer is the same step without the common beginning: texts cut at the longest
of their chunk, as many positions a chunk, each chunk computed again for its gradient as ours is. Names are
random tokens, so nothing but the context is shared. `max_diff` is between the gradients, relative to their
size. `memory_mib` is what the process grew by at most while ours ran, which runs first.

`coop-step` is a whole training step of CoOp on that many classes with real names, through the estimator; the
peer is the plain form of the same loss. `coop-epoch` is an epoch of CoOp on random views of 100 pictures of
100 classes, with towers of ViT-B/16's size and random weights. Ours reads the features from a store, which an
earlier fit has filled; the peer makes and encodes the views anew in every step, as the authors' loop does.
`max_diff` is between the learned contexts, `moved` how far they are from their start.

`amu-fit` is AMU-Tuning's training on cached features of 100 classes with 16 pictures each, 50 epochs of 200
steps; the peer is the same training with autograd and torch's optimizer. `max_diff` is between the heads,
`moved` how far they are from their start.

`probe-fit`, `mean-fit-predict` and `tip-fit-predict` are seconds on cached features; they have no peer here.
Ratios are of processor time, which other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipworks.core.clip import Clip, unit
from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.core.towers import TextTower
from clipworks.methods.adapt.amu_tuning import AMUTuning, class_means, confidence
from clipworks.methods.adapt.coop import CoOp
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.nearest_mean import NearestMean
from clipworks.methods.adapt.tip_adapter import TipAdapter
from clipworks.parts.features import content, pixels_of
from clipworks.parts.schedules import Schedule, rows_of_epoch
from clipworks.parts.shots import Step
from clipworks.parts.text_bank import MEMORY, TextBank

VOCABULARY, CONTEXT = 49408, 16


def tower() -> TextTower:
    """A text tower of ViT-B's size with random weights."""
    made = TextTower(TextConfig(77, VOCABULARY, 512, uniform_blocks(12, 512, heads=8)), 512)
    return made.requires_grad_(False).eval()


def prompts(classes: int) -> Tokens:
    """[start] V₁ … V₁₆ name . [end], names of one to four random tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.choice([1, 2, 3, 4], size=classes, p=[0.25, 0.4, 0.25, 0.1])
    ids = np.zeros((classes, 1 + CONTEXT + 4 + 2), np.int64)
    ids[:, 0] = VOCABULARY - 2
    ids[:, 1 : 1 + CONTEXT] = VOCABULARY + np.arange(CONTEXT)
    for row, length in zip(ids, lengths, strict=True):
        row[1 + CONTEXT : 1 + CONTEXT + length] = generator.integers(1000, 40_000, length)
        row[1 + CONTEXT + length : 3 + CONTEXT + length] = 269, VOCABULARY - 1
    return Tokens(torch.from_numpy(ids), torch.from_numpy(lengths + CONTEXT + 2))


def plainly(text: TextTower, tokens: Tokens, vectors: Tensor) -> Tensor:
    """The step without a shared beginning, a chunk at a time."""
    order = tokens.ends.argsort()
    size = max(1, MEMORY // (4 * 20 * text.width * len(text.blocks)) // tokens.ids.shape[1])

    def run(rows: Tensor, vectors: Tensor) -> Tensor:
        some = tokens[rows]
        words = text.embedding(some.ids.clamp(max=VOCABULARY - 1))
        words = torch.cat([words[:, :1], vectors.expand(len(rows), -1, -1), words[:, 1 + CONTEXT :]], dim=1)
        return text.project(text.run(text.place(words)), at=some.ends)

    parts = [checkpoint(run, rows, vectors, use_reentrant=False) for rows in order.split(size)]
    return torch.cat(parts)[order.argsort()]


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor seconds, seconds by the clock, and the result."""
    cpu, clock = time.process_time(), time.perf_counter()
    result = call()
    return time.process_time() - cpu, time.perf_counter() - clock, result


def text_step(classes: int, with_peer: bool) -> dict[str, Any]:
    """One step of ours, and of the plain form."""
    text, tokens = tower(), prompts(classes)
    target = torch.randn(classes, 512, generator=torch.Generator().manual_seed(1)) / classes
    start = 0.02 * torch.randn(CONTEXT, 512, generator=torch.Generator().manual_seed(0))

    def step(features: Callable[[Tensor], Tensor]) -> Tensor:
        vectors = start.clone().requires_grad_()
        (features(vectors) * target).sum().backward()
        assert vectors.grad is not None
        return vectors.grad

    bank = TextBank(text, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours, clock, gradient = timed(lambda: step(bank))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    row = {
        "case": f"text-step-{classes}",
        "ours": round(ours, 3),
        "clock": round(clock, 3),
        "memory_mib": round(grown),
        "process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "positions": bank.positions,
    }
    if with_peer:
        peer, _, expected = timed(lambda: step(lambda vectors: plainly(text, tokens, vectors)))
        difference = float((gradient - expected).abs().max() / expected.abs().max())
        row |= {"peer": round(peer, 3), "ratio": round(peer / ours, 2), "max_diff": difference}
    return row


def clip_with(image: VisionConfig) -> Clip:
    """A Clip whose text tower is of ViT-B's size, with random weights."""
    words = TextConfig(77, VOCABULARY, 512, uniform_blocks(12, 512, heads=8))
    return Clip.from_config(Config(image=image, text=words, width=512, name="random"), ClipTokenizer())


def class_names(classes: int) -> list[str]:
    """Three words each; there are 1,100."""
    things = ("barn", "boat", "bridge", "cabin", "car", "chair", "cup", "desk", "door", "engine", "fence")
    kinds = ("old", "small", "wooden", "broken", "painted", "heavy", "striped", "narrow", "iron", "open")
    colors = ("red", "green", "blue", "white", "black", "yellow", "brown", "gray", "pink", "orange")
    every = [f"{kind} {color} {thing}" for color in colors for kind in kinds for thing in things]
    return every[:classes]


class OneRate(CoOp):
    """CoOp without its warm-up, so that one epoch moves the context; keeps its start and its gradient."""

    schedule = Schedule("sgd", decay="constant", drop_last=True)

    def _prepare(self, shots: Any) -> Any:
        module: Any = super()._prepare(shots)
        self.start = module["context"].detach().clone()
        return module

    def _backward(self, step: Step) -> Tensor:
        loss = super()._backward(step)
        self.gradient = self.module_["context"].grad.clone()
        return loss


class Encoding(OneRate):
    """The same, but every step makes its views of the pictures and encodes them."""

    def _loss(self, step: Step) -> Tensor:
        numbers = step.shots.view_numbers(step.rows, step.epoch)
        pictures = [self.pictures[int(row)] for row in step.rows]
        pixels = torch.cat(list(pixels_of(pictures, self._model.preprocessing, len(pictures))))
        views = step.shots.views.make(pixels, [content(one).hex() for one in pictures], numbers)
        with torch.no_grad():
            inputs = self._encode(views)
        return super()._loss(replace(step, inputs=inputs))


def coop_step(classes: int, with_peer: bool) -> dict[str, Any]:
    """One step of CoOp over all classes, and the same loss in the plain form."""
    clip = clip_with(VisionConfig(32, 16, 64, uniform_blocks(1, 64, heads=1)))
    X, y = features(classes, 2)
    coop = OneRate(clip, class_names(classes), epochs=1, batch_size=len(y), progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours, clock, _ = timed(lambda: coop.fit(X, y))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {
        "case": f"coop-step-{classes}",
        "ours": round(ours, 3),
        "clock": round(clock, 3),
        "memory_mib": round((peak - before) / 1024),
        "process_mib": round(peak / 1024),
    }
    if with_peer:
        vectors = coop.start.requires_grad_()
        text = clip.text.requires_grad_(False)
        scale = float(clip.scale.detach().exp())

        def step() -> None:
            vectors_of = unit(plainly(text, coop._texts(), vectors))  # type: ignore[arg-type]
            logits = scale * unit(X) @ vectors_of.mT
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)).backward()

        peer, _, _ = timed(step)
        assert vectors.grad is not None
        difference = float((coop.gradient - vectors.grad).abs().max() / vectors.grad.abs().max())
        row |= {"peer": round(peer, 3), "ratio": round(peer / ours, 2), "max_diff": difference}
    return row


def coop_epoch(pictures: int = 100, image_size: int = 224) -> dict[str, Any]:
    """An epoch of CoOp with the store, and with the image tower in every step."""
    clip = clip_with(VisionConfig(image_size, 16, 768, uniform_blocks(12, 768, heads=12)))
    generator = np.random.default_rng(0)
    images = [
        torch.from_numpy(generator.integers(0, 256, (3, image_size, image_size), np.uint8))
        for _ in range(pictures)
    ]
    y = np.arange(pictures)
    settings: dict[str, Any] = {"epochs": 1, "lr": 0.5, "views": 1, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        OneRate(clip, class_names(pictures), store=folder, **settings).fit(images, y)
        coop = OneRate(clip, class_names(pictures), store=folder, **settings)
        ours, clock, _ = timed(lambda: coop.fit(images, y))
        other = Encoding(clip, class_names(pictures), store=folder, **settings)
        other.pictures = images
        peer, _, _ = timed(lambda: other.fit(images, y))
    return {
        "case": "coop-epoch",
        "ours": round(ours, 3),
        "clock": round(clock, 3),
        "peer": round(peer, 3),
        "ratio": round(peer / ours, 2),
        "max_diff": float((coop.context - other.context).abs().max()),
        "moved": float((coop.context - coop.start).abs().max()),
    }


def features(classes: int, shots: int) -> tuple[Tensor, Any]:
    """Unit features (n, 512) of overlapping clouds around a common direction, as CLIP's are; labels."""
    generator = torch.Generator().manual_seed(0)
    y = np.arange(classes * shots) % classes
    scales = torch.logspace(0, -1, 512)
    centers = torch.randn(classes, 512, generator=generator) * scales
    noise = 3 * torch.randn(len(y), 512, generator=generator) * scales
    X = 5.0 + centers[torch.from_numpy(y)] + noise
    return torch.nn.functional.normalize(X, dim=1), y


def cached(classes: int) -> list[dict[str, Any]]:
    """Fits on cached features."""
    X, y = features(classes, 16)
    probe = LinearProbe(progress=False)
    fit, clock, _ = timed(lambda: probe.fit(X, y))
    rows = [
        {"case": "probe-fit", "ours": round(fit, 2), "clock": round(clock, 2), "iterations": probe.n_iter_}
    ]
    test, labels = features(classes, 50)
    mean = NearestMean(progress=False)
    both, clock, found = timed(lambda: mean.fit(X, y).predict(test))
    rows.append({"case": "mean-fit-predict", "ours": round(both, 2), "clock": round(clock, 2)})
    memory = TipAdapter(small_clip(X.shape[1]), class_names(classes), progress=False)
    both, clock, remembered = timed(lambda: memory.fit(X, y).predict(test))
    rows.append({"case": "tip-fit-predict", "ours": round(both, 2), "clock": round(clock, 2)})
    for row, one in zip(rows, (probe.predict(test), found, remembered), strict=True):
        row["accuracy"] = float((one == labels).mean())
    return rows


def small_clip(width: int) -> Clip:
    """Towers that say something quickly: texts are encoded once, which is not what is measured."""
    blocks = uniform_blocks(1, 64, heads=1)
    image, text = VisionConfig(32, 16, 64, blocks), TextConfig(77, VOCABULARY, 64, blocks)
    return Clip.from_config(Config(image=image, text=text, width=width, name="random"), ClipTokenizer())


def amu_fit(with_peer: bool, classes: int = 100, shots: int = 16) -> dict[str, Any]:
    """AMU-Tuning's training, and the plain form of the same."""
    clip = small_clip(512)
    seen, y = features(classes, shots)
    own = torch.randn(len(y), clip.width, generator=torch.Generator().manual_seed(1))
    amu = AMUTuning(clip, class_names(classes), alpha=1.0, progress=False)
    ours, clock, _ = timed(lambda: amu.fit(torch.cat([own, seen], dim=1), y))
    row = {"case": "amu-fit", "ours": round(ours, 2), "clock": round(clock, 2)}
    if with_peer:
        labels, zero_shot = torch.from_numpy(y), amu._zero_shot(own)
        strength = amu.alpha_ * confidence(zero_shot)
        start = class_means(seen, labels, torch.ones(len(y)), classes)
        head = torch.nn.Parameter(start.clone())

        def train() -> None:
            optimizer = torch.optim.AdamW([head], lr=amu.lr, weight_decay=0.01, eps=1e-4)
            steps = amu.epochs * -(-len(y) // amu.batch_size)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for epoch in range(amu.epochs):
                for rows in rows_of_epoch(len(y), amu.batch_size, amu.seed, epoch, False):
                    raw = seen[rows] @ head.mT
                    bias = (raw - raw.mean(dim=1, keepdim=True)) / raw.std(dim=1, keepdim=True)
                    logits = zero_shot[rows] + strength[rows] * bias
                    losses = [torch.nn.functional.cross_entropy(one, labels[rows]) for one in (logits, bias)]
                    optimizer.zero_grad()
                    (amu.branch_weight * losses[0] + (1 - amu.branch_weight) * losses[1]).backward()
                    optimizer.step()
                    schedule.step()

        peer, _, _ = timed(train)
        row |= {
            "peer": round(peer, 2),
            "ratio": round(peer / ours, 2),
            "max_diff": float((amu.head_ - head.detach()).abs().max()),
            "moved": float((amu.head_ - start).abs().max()),
        }
    return row


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a list of results for machines")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--without-peer", action="store_true", help="leave out the slow form of the step")
    parser.add_argument("--only", choices=["text", "cached", "epoch", "amu"], help="some of the cases")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.only in (None, "text"):
        rows.append(text_step(options.classes, not options.without_peer))
        rows.append(coop_step(options.classes, not options.without_peer))
    if options.only in (None, "epoch"):
        rows.append(coop_epoch())
    if options.only in (None, "cached"):
        rows += cached(options.classes)
    if options.only in (None, "amu"):
        rows.append(amu_fit(not options.without_peer))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
