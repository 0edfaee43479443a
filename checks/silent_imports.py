"""Every module imports without a word, and with the core dependencies alone.

A fresh interpreter turns warnings into errors, hides every installed library that the dependencies in
pyproject.toml do not bring with them, and imports each module of the package in a fork of itself; what a
module prints, raises or warns is reported. Modules without torch are also held to that: `import clipworks`,
the errors, the register and the command line's front must come up without loading it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata as metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from files import ROOT, python_modules

LIGHT = ("clipworks", "clipworks.errors", "clipworks.papers", "clipworks.cli", "clipworks.cli.papers")


def requirements(root: Path = ROOT) -> list[str]:
    """The core dependencies as pyproject.toml states them."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def closure(core: Iterable[str]) -> set[str]:
    """Normalized names of the installed distributions that `core` brings, itself included."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    queue = [(Requirement(line), frozenset[str]()) for line in core]
    visited: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement, parents = queue.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in parents or {""}
        ):
            continue
        name, extras = normalized(requirement.name), frozenset(requirement.extras)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        queue += [(Requirement(line), extras) for line in needs]
    return found


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def optional(core: Iterable[str]) -> set[str]:
    """Top-level modules that are installed but that the core dependencies do not bring."""
    kept = closure(core) | {"pip", "setuptools", "clipworks"}
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(normalized(owner) in kept for owner in owners) and module not in sys.stdlib_module_names
    }


class Blocked(importlib.abc.MetaPathFinder):
    """Makes the named top-level modules look as if they were not installed."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Refuse a hidden module; leave all others to the finders that follow."""
        top = fullname.partition(".")[0]
        if top in self.names:
            raise ModuleNotFoundError(
                f"No module named {top!r} (the core dependencies do not bring it)", name=top
            )
        return None


def complaint(module: str) -> str:
    """Import one module in a fork of this process; empty if it said nothing."""
    with tempfile.TemporaryFile() as heard:
        child = os.fork()
        if child == 0:
            os.dup2(heard.fileno(), 1)
            os.dup2(heard.fileno(), 2)
            code = 0
            try:
                importlib.import_module(module)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent reports it
                traceback.print_exc(limit=-3)
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        heard.seek(0)
        said = heard.read().decode(errors="replace").strip()
    if said or status == 0:
        return said
    return f"ended with status {status}"


def worker(modules: list[str]) -> int:
    """What the fresh interpreter does: hide, load torch once so that forks are cheap, import each module."""
    warnings.simplefilter("error")
    hidden = optional(requirements())
    sys.meta_path.insert(0, Blocked(hidden))
    faults = 0
    for name in LIGHT:
        if name not in modules:
            continue
        check = f"import sys, {name}; sys.exit('torch' in sys.modules)"
        if subprocess.run([sys.executable, "-c", check], check=False).returncode:
            print(f"{name}: loads torch on import, or fails to import")
            faults += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch")
    for module in modules:
        if said := complaint(module):
            print(f"{module}:\n    " + said.replace("\n", "\n    "))
            faults += 1
    return 1 if faults else 0


def problems(modules: list[str], path: list[Path]) -> str:
    """What importing `modules`, found on `path` first, printed; empty if all are silent."""
    here = Path(__file__).resolve()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*path, here.parent])),
        "PYTHONWARNINGS": "",
    }
    done = subprocess.run(
        [sys.executable, str(here), "--worker", *modules],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout or ("" if done.returncode == 0 else f"the check itself ended with {done.returncode}\n")


def main() -> int:
    """Check the package."""
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    said = problems([name for name, _ in python_modules()], [ROOT / "src"])
    print(said, end="")
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
