"""The contrastive loss in tiles against the plain form: how much memory, how much time.

    python benchmarks/loss.py            # a table; about ten minutes on one core
    python benchmarks/loss.py --json
    python benchmarks/loss.py --cases softmax-8192

Each case runs forward and backward on N pairs of unit vectors of width 512 in fp32, in a process of its
own on one thread. `*-65536` reports the memory on top of the inputs, gradients included; the plain form
needs 16 GiB for each copy of the logits. `*-8192` compares processor time, in turns, fastest of three rounds;
`ratio` is how many times less ours takes. The plain form is that of the papers' pseudocode.
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
CASES = ("softmax-8192", "sigmoid-8192", "softmax-65536", "sigmoid-65536")
WIDTH, ROUNDS = 512, 3
LIMIT = 8192  # above it the plain form is not run


def measure(case: str) -> dict[str, Any]:
    """One case, in this process."""
    import torch
    from torch.nn import functional as F

    from clipworks.parts.contrastive import contrastive_loss

    torch.set_num_threads(1)
    form, size = case.split("-")
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(int(size), WIDTH, generator=generator), dim=-1)
    texts = F.normalize(0.3 * images + 0.05 * torch.randn(int(size), WIDTH, generator=generator), dim=-1)
    inputs = [images.requires_grad_(), texts.requires_grad_(), torch.tensor(14.3, requires_grad=True)]
    if form == "sigmoid":
        inputs.append(torch.tensor(-10.0, requires_grad=True))

    def plain(images: Any, texts: Any, scale: Any, bias: Any = None) -> Any:
        logits = scale * images @ texts.T
        if bias is None:
            own = torch.arange(len(images))
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        signs = 2 * torch.eye(len(images)) - 1
        return -F.logsigmoid(signs * (logits + bias)).sum() / len(images)

    def ours(*inputs: Any) -> Any:
        return contrastive_loss(*inputs, form=form, tiled=True)  # type: ignore[arg-type]

    def run(function: Any) -> tuple[float, float]:
        for tensor in inputs:
            tensor.grad = None
        begun = time.process_time()
        loss = function(*inputs)
        loss.backward()
        return time.process_time() - begun, loss.item()

    if int(size) > LIMIT:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
        seconds, loss = run(ours)
        extra = memory("VmHWM") - before
        return {"case": case, "loss": loss, "seconds": seconds, "extra_mib": round(extra / 2**20)}
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        (a, loss), (b, expected) = run(ours), run(plain)
        times[0].append(a)
        times[1].append(b)
        assert abs(loss - expected) < 1e-4 * abs(expected), f"{case}: {loss} is not {expected}"
    mine, peer = min(times[0]), min(times[1])
    return {"case": case, "loss": loss, "ours": mine, "peer": peer, "ratio": peer / mine, "unit": "s"}


def memory(mark: str) -> int:
    """Bytes of this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(mark + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("memory is measured on Linux only")


def main() -> None:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print a list of results")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    results = []
    for case in arguments.cases:
        command = [sys.executable, __file__, "--measure", case]
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        results.append(json.loads(said))
        if not arguments.json:
            row = results[-1]
            found = f"{row['ratio']:.2f} times faster" if "ratio" in row else f"{row['extra_mib']} MiB extra"
            print(f"{case:15} {found:20} {row.get('ours', row.get('seconds')):.2f} s")
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
