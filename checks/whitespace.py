"""Text files end in one newline and have no trailing blanks, no conflict marks and no carriage returns."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from files import LARGEST_TEXT, ROOT, project_files, text_of

CONFLICT = re.compile(r"^(<{7} |>{7} |={7}$)")
# Two blanks at a line's end mean a line break in Markdown; vocabularies and weights are data.
DATA = {".txt", ".json", ".jsonl", ".tsv", ".csv", ".svg", ".safetensors", ".npz", ".gz", ".pt"}
LARGEST_FILE = 16_000_000


def problems(root: Path, names: list[Path]) -> list[str]:
    """One line a fault, `path:line: what`."""
    found = []
    for name in names:
        path = root / name
        size = path.stat().st_size
        if size > LARGEST_FILE or (size > LARGEST_TEXT and name.suffix not in DATA):
            found.append(f"{name}: {size / 1e6:.1f} MB; large files do not belong in the history")
            continue
        text = text_of(path)
        if text is None or name.suffix in DATA:
            continue
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            found.append(f"{name}: must end in exactly one newline")
        for number, line in enumerate(text.split("\n"), 1):
            if "\r" in line:
                found.append(f"{name}:{number}: carriage return")
            elif line != line.rstrip() and name.suffix != ".md":
                found.append(f"{name}:{number}: trailing blank")
            if CONFLICT.match(line):
                found.append(f"{name}:{number}: conflict mark")
    return found


def main(arguments: list[str]) -> int:
    """Check the named files, or all of the project."""
    names = [Path(name) for name in arguments if Path(name).is_file()] or project_files()
    found = problems(ROOT, names)
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
