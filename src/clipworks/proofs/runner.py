"""Run a proof over several seeds and publish it: JSON, plot, verdict.

`<slug>.json` holds under `runs` every run there has been, and at its top what the newest one on enough seeds
says. A run is a set of settings (budget, data, and a fingerprint of the method's and the proof's code) with
the outcome of each seed under them. Outcomes are written the moment they are there, so an interrupted run
goes on where it was; with the same settings a seed is never computed twice; with others it becomes a run of
its own, and the earlier one stays. A seed that was begun and never ended stays named too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipworks import __version__
from clipworks.errors import ConfigError, DataError, require
from clipworks.papers import MINIMUM_SEEDS, fingerprint, paper
from clipworks.proofs.base import (
    BUDGETS,
    DEVELOPMENT_SEEDS,
    FIRST_EVALUATION_SEED,
    Budget,
    Outcome,
    Proof,
    detail,
    module_name,
)
from clipworks.proofs.statistics import CONFIDENCE, judge, paired_interval


def prove(
    proof: Proof,
    seeds: Sequence[int],
    *,
    budget: Budget = "small",
    data: Path | None = None,
    out: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run a proof on the seeds that it has not been run on, and write what it says.

    Args:
        proof: the experiment.
        seeds: all of development or all of evaluation; only the latter are published.
        budget: `small` or `full`.
        data: folder of real data, for a proof that takes it.
        out: folder of the results; None as `results_folder`.
        advance: told how many seeds are done of how many.

    Returns:
        What was written, without `runs`.

    Raises:
        ConfigError: for seeds that are neither or both, or an unknown budget.
        DataError: if the results there are damaged, or an outcome is not finite.
        MissingExtra: without SciPy or Matplotlib.
    """
    if budget not in BUDGETS:
        raise ConfigError(f"budget {budget!r} is none of {', '.join(BUDGETS)}")
    published = check_seeds(seeds)
    for library in ("scipy.stats", "matplotlib"):  # missed before the work, not after it
        require(library, extra="evaluate", purpose="a proof")
    folder = out or results_folder(published)
    if not published:
        folder = folder / "development"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{proof.slug}.json"
    settings = {
        "budget": budget,
        "data": data.resolve().name if data else "generated",
        "code": code_of(proof),
    }
    runs = _read(path)
    run = next((run for run in runs if run["settings"] == settings), None)
    if run is None:
        run = {"settings": settings, "outcomes": [], "begun": []}
    runs = [other for other in runs if other is not run] + [run]  # the newest is the last
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        if any(outcome["seed"] == seed for outcome in run["outcomes"]):
            continue
        if seed not in run["begun"]:
            run["begun"].append(seed)
        _write(path, proof, runs, published)
        outcome = proof.run(seed, budget, data)
        if not (math.isfinite(outcome.baseline) and math.isfinite(outcome.method)):
            raise DataError(f"{proof.slug}, seed {seed}: not finite: {outcome}")
        _add(run, seed, outcome)
        _write(path, proof, runs, published)
    advance(len(seeds), len(seeds))
    result = _write(path, proof, runs, published)
    plot(result, runs[-1]["outcomes"], path.with_suffix(".png"))
    return result


def check_seeds(seeds: Sequence[int]) -> bool:
    """Whether these are evaluation seeds, whose verdict is published, rather than development seeds.

    Raises:
        ConfigError: if they are mixed, repeated, of neither kind, or there are none.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"a proof needs different seeds, and at least one, not {list(seeds)}")
    if all(seed in DEVELOPMENT_SEEDS for seed in seeds):
        return False
    if all(seed >= FIRST_EVALUATION_SEED for seed in seeds):
        return True
    raise ConfigError(
        f"seeds {min(seeds)} to {max(seeds)}: a verdict takes evaluation seeds, {FIRST_EVALUATION_SEED} and "
        f"above; 0 to {DEVELOPMENT_SEEDS[-1]} are for development and are not published"
    )


def results_folder(published: bool) -> Path:
    """`docs/proofs` of a checkout for what is published, else `proofs` in the present folder."""
    root = Path(__file__).resolve().parents[3]
    checkout = root / "docs" / "proofs"
    if published and checkout.is_dir() and (root / "pyproject.toml").is_file():
        return checkout
    return Path("proofs")


def code_of(proof: Proof) -> str:
    """A name for the state of the code that a proof's numbers come from: its own file and the method's."""
    files = [Path(__file__).parent / f"{module_name(proof.slug)}.py"]
    entry = paper(proof.slug)
    if entry.method:
        files.append(entry.places.package / entry.method)
    marks = [fingerprint(file) for file in files if file.exists()]
    return hashlib.sha256(" ".join(marks).encode()).hexdigest()[:16]


def summary(proof: Proof, run: dict[str, Any]) -> dict[str, Any]:
    """What a run says: means, interval and verdict, and of what."""
    outcomes = run["outcomes"]
    differences = [outcome["method"] - outcome["baseline"] for outcome in outcomes]
    interval = paired_interval(differences)
    return {
        "baseline": _mean([outcome["baseline"] for outcome in outcomes]),
        "method": _mean([outcome["method"] for outcome in outcomes]),
        "difference": _mean(differences),
        "interval": list(interval) if interval else None,
        "seeds": [outcome["seed"] for outcome in outcomes],
        "verdict": judge(interval, proof.direction, proof.margin),
        "claim": proof.claim,
        "baseline_name": proof.baseline,
        "method_name": proof.method,
        "metric": proof.metric,
        "direction": proof.direction,
        "margin": proof.margin,
        "confidence": CONFIDENCE,
        **_causes(proof, outcomes),
    }


def _causes(proof: Proof, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the controls say: whether the method is better than each, and so whether its mechanism does it."""
    if not proof.controls:
        return {}
    rows = []
    for path, lacks in proof.controls.items():
        values = [detail(outcome, path) for outcome in outcomes]
        differences = [outcome["method"] - value for outcome, value in zip(outcomes, values, strict=True)]
        interval = paired_interval(differences)
        rows.append(
            {
                "control": path,
                "lacks": lacks,
                "mean": _mean(values),
                "method_above_it": _mean(differences),
                "interval": list(interval) if interval else None,
                "method_is_better": judge(interval, proof.direction, 0.0),
            }
        )
    kinds = {row["method_is_better"] for row in rows}
    cause = next(kind for kind in ("does not hold", "undecided", "holds") if kind in kinds)
    said = {"holds": "supported", "undecided": "undecided", "does not hold": "not supported"}[cause]
    return {"mechanism_as_the_cause": said, "controls": rows}


def machine() -> dict[str, Any]:
    """The processor, its cores and the accelerator, nothing that tells one machine from its equals."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": _processor(),
        "cores": cores,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def plot(result: dict[str, Any], outcomes: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw both on every seed, and how far the method is above the baseline and above each control."""
    from matplotlib.figure import Figure

    rows = [(result["baseline_name"], result["difference"], result["interval"])]
    rows += [
        (f"without {one['lacks']}", one["method_above_it"], one["interval"])
        for one in result.get("controls", ())
    ]
    figure = Figure(figsize=(11, max(4.0, 1.4 + 0.7 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for outcome in outcomes:
        both = [outcome["baseline"], outcome["method"]]
        left.plot([0, 1], both, marker="o", label=f"seed {outcome['seed']}")
    left.set_xticks([0, 1], [_wrapped(result[name], 28) for name in ("baseline_name", "method_name")])
    left.set_xlim(-0.3, 1.3)
    left.set_ylabel(_wrapped(result["metric"], 40))
    left.legend(fontsize="small")
    for row, (_, difference, interval) in enumerate(rows):
        low, high = interval or (difference, difference)
        right.errorbar(
            [(low + high) / 2], [row], xerr=[(high - low) / 2], marker="o", capsize=5, color="black"
        )
    right.axvline(0, color="gray", linewidth=1)
    if result["margin"]:
        right.axvline(result["direction"] * result["margin"], color="gray", linestyle="--", linewidth=1)
    right.set_yticks(range(len(rows)), [_wrapped(name, 34) for name, _, _ in rows], fontsize="small")
    right.set_ylim(len(rows) - 0.5, -0.5)
    better = "more" if result["direction"] > 0 else "less"
    right.set_xlabel(f"the method above ({better} is better), {CONFIDENCE:.0%} interval")
    figure.suptitle(f"{result['slug']}: {result['verdict']}")
    temporary = path.with_suffix(".writing")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width)


def _add(run: dict[str, Any], seed: int, outcome: Outcome) -> None:
    run["outcomes"] = sorted(
        [*run["outcomes"], {"seed": seed, **asdict(outcome)}], key=lambda entry: entry["seed"]
    )
    run["begun"].remove(seed)
    run["version"], run["machine"] = __version__, machine()


def _write(path: Path, proof: Proof, runs: list[dict[str, Any]], published: bool) -> dict[str, Any]:
    """Write the file whole or not at all, and give what the last run says.

    At the top stands the newest run on enough seeds, so that a short one afterwards does not displace it;
    earlier runs stay as they were written.
    """
    last = runs[-1]
    if last["outcomes"]:
        last |= summary(proof, last) | {name: last["settings"][name] for name in ("budget", "data")}
    done = [run for run in runs if run["outcomes"]]
    enough = [run for run in done if len(run["seeds"]) >= MINIMUM_SEEDS]
    chosen = (enough or done or [{"verdict": "undecided", "seeds": []}])[-1]
    same = {"slug": proof.slug, "published": published}
    text = json.dumps(same | _head(chosen) | {"runs": runs}, indent=2, ensure_ascii=False, allow_nan=False)
    temporary = path.with_suffix(".writing")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
    return same | _head(last)


def _head(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in ("settings", "outcomes", "begun")}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
        for run in runs:
            _ = run["settings"], run["begun"], [entry["seed"] for entry in run["outcomes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results of a proof ({error!r}); move it away") from error
    return runs


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
