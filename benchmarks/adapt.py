"""What adapting costs: a step of prompt learning, a probe and a training-free fit, at sizes that people have.

    python benchmarks/adapt.py --json

`text-step` is the text side of a training step of 16 shared context vectors, forward and backward, through a
text tower of ViT-B's size. The peer is the same step without the common beginning: texts cut at the longest
of their chunk, as many positions a chunk, each chunk computed again for its gradient as ours is. Names are
random tokens, so nothing but the context is shared. `max_diff` is between the gradients, relative to their
size. `memory_mib` is what the process grew by at most while ours ran, which runs first.

`probe-fit` and `mean-fit-predict` are seconds on cached features; they have no peer here. Ratios are of
processor time, which other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipworks.core.config import TextConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower
from clipworks.methods.adapt.linear_probe import LinearProbe
from clipworks.methods.adapt.nearest_mean import NearestMean
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
    rows[0]["accuracy"], rows[1]["accuracy"] = (
        float((one == labels).mean()) for one in (probe.predict(test), found)
    )
    return rows


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a list of results for machines")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--without-peer", action="store_true", help="leave out the slow form of the step")
    parser.add_argument("--only", choices=["text", "cached"], help="one half of the cases")
    options = parser.parse_args()
    rows = [] if options.only == "cached" else [text_step(options.classes, not options.without_peer)]
    rows += [] if options.only == "text" else cached(options.classes)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
