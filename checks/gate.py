"""The gate: everything that must hold before a change lands, the same in the hook and in CI.

`python checks/gate.py` runs all steps, two at a time, prints what each failing one said, and exits with 1 if
any failed. `python checks/gate.py mypy speech` runs only those.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """A command of the gate, and the module without which it cannot run (empty: always there)."""

    name: str
    command: tuple[str, ...]
    needs: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a step went: `passed`, `failed` or `skipped`, in how many seconds, and what it printed."""

    name: str
    state: str
    seconds: float
    output: str


def steps(scratch: Path) -> list[Step]:
    """All steps, the longest first so that two at a time end together."""
    python = sys.executable
    return [
        Step("mypy", (python, "-m", "mypy"), "mypy"),
        Step(
            "docs",
            # Not --quiet: it also keeps warnings from --strict.
            (python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(scratch / "site")),
            "mkdocs",
        ),
        Step("silent_imports", (python, "checks/silent_imports.py")),
        # The cache misses modules that appear: it only looks at the file that imports.
        Step(
            "lint-imports",
            (str(Path(python).with_name("lint-imports")), "--no-logo", "--no-cache"),
            "importlinter",
        ),
        Step("ruff", (python, "-m", "ruff", "check"), "ruff"),
        Step("format", (python, "-m", "ruff", "format", "--check"), "ruff"),
        Step("docstrings", (python, "checks/docstrings.py")),
        Step("tree", (python, "checks/tree.py")),
        Step("speech", (python, "checks/speech.py")),
        Step("whitespace", (python, "checks/whitespace.py")),
    ]


def run(step: Step, root: Path = ROOT) -> Outcome:
    """Run one step in `root`; a step whose tool is missing is skipped here and fails in CI."""
    if step.needs and importlib.util.find_spec(step.needs) is None:
        state = "failed" if os.environ.get("CI") else "skipped"
        return Outcome(step.name, state, 0.0, f"{step.needs} is not installed: pip install -e '.[dev]'\n")
    # The package need not be installed for the gate to look at it.
    path = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH", "")]))
    start = time.monotonic()
    done = subprocess.run(
        step.command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "NO_COLOR": "1", "NO_MKDOCS_2_WARNING": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    state = "failed" if done.returncode else "passed"
    return Outcome(step.name, state, time.monotonic() - start, done.stdout)


def main(arguments: list[str] | None = None) -> int:
    """Run the named steps, or all; 0 if none failed."""
    with tempfile.TemporaryDirectory() as scratch:
        everything = steps(Path(scratch))
        parser = argparse.ArgumentParser(description="Run the gate, or the named steps of it.")
        parser.add_argument("step", nargs="*", help=f"one of {', '.join(step.name for step in everything)}")
        wanted = parser.parse_args(arguments).step
        unknown = set(wanted) - {step.name for step in everything}
        if unknown:
            parser.error(f"no step {', '.join(sorted(unknown))}")
        chosen = [step for step in everything if not wanted or step.name in wanted]
        with ThreadPoolExecutor(max_workers=2) as pool:
            outcomes = list(pool.map(run, chosen))
    for outcome in outcomes:
        if outcome.state != "passed":
            print(f"── {outcome.name} {'─' * (100 - len(outcome.name))}\n{outcome.output.rstrip()}\n")
    for outcome in outcomes:
        print(f"{outcome.state:8} {outcome.name:15} {outcome.seconds:5.1f} s")
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
