"""The oldest versions that pyproject.toml allows, as constraints for pip: `name==lower bound`, one a line.

Covers the core dependencies and those of the named extras, extras of extras included. torch is given
separately, since its old CPU builds are not everywhere to be had. A dependency without a lower bound is
an error: nobody knows what it was tested with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

# The tools of development are not what a user gets; they stay as they are pinned.
TOOLS = ("dev", "docs", "test")


def requirements(project: dict[str, Any], extras: list[str]) -> list[Requirement]:
    """The core dependencies and those of `extras`, with the package's own extras followed."""
    found = [Requirement(line) for line in project["dependencies"]]
    queue, seen = list(extras), set()
    while queue:
        extra = queue.pop()
        if extra in seen or extra in TOOLS:
            continue
        seen.add(extra)
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                queue += requirement.extras
            else:
                found.append(requirement)
    return found


def oldest(wanted: list[Requirement], torch: str) -> dict[str, str]:
    """The lower bound of each name; the highest, where several extras state one.

    Raises:
        ValueError: if a requirement has no lower bound.
    """
    bounds: dict[str, str] = {}
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        lower = [item.version for item in requirement.specifier if item.operator in (">=", "==", "~=")]
        if not lower:
            raise ValueError(f"{requirement}: no lower bound")
        name = requirement.name.lower()
        bounds[name] = max([*lower, bounds.get(name, "0")], key=Version)
    return bounds | {"torch": torch}


def pins(text: str, names: set[str]) -> dict[str, str]:
    """The pins of a constraints file for other names than `names`: the tools of development."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = [line.split("==") for line in lines if "==" in line]
    return {name.lower(): version for name, version in pairs if name.lower() not in names}


def main() -> int:
    """Print the constraints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", default="all", help="extras to cover, with commas between them")
    parser.add_argument("--torch", required=True, help="the version of torch to run with")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        bounds = oldest(requirements(project, arguments.extras.split(",")), arguments.torch)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    known = {requirement.name.lower() for requirement in requirements(project, ["all"])}
    tools = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"), known)
    for name, version in sorted((tools | bounds).items()):
        print(f"{name}=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
