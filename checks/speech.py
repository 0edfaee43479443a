"""The project speaks of itself alone: no addresses of package indexes, no paths of one machine, nothing about
how or by whom a change was made.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from files import ROOT, project_files, text_of

FORBIDDEN = {
    r"(?<![\w.~])/work/": "a path of one machine",
    r"(?<![\w.])/(?:root|home/\w+|Users/\w+)/": "a path of one machine",
    r"(?<![\w.])/opt/(?:pypi|wheels)": "a path of one machine",
    r"(?<![\w.])/tmp/(?:work|bash_jobs)": "a path of one machine",
    r"\b(?:test\.)?pypi\.org|pypi\.python\.org": "a package index by address",
    r"\bfiles\.pythonhosted\b": "a package index by address",
    r"\bregistry\.npmjs\b|\bdeb\.debian\.org|\bdownload\.pytorch\.org": "a package index by address",
    # Fixtures, HTTP and inference engines have sessions too; people's are told by the word before.
    r"\b(?:this|my|your|our|previous|earlier|last|next|later|another|current)"
    r" (?:coding |working )?sessions?\b": "a word about how the change was made",
    r"\bin (?:this|the (?:current|present)) (?:workplace|sandbox)\b": "a word about how the change was made",
    r"\b(?:my|our) (?:colleagues?|helpers?|subagents?)\b": "a word about how the change was made",
    r"\b(?:fix(?:es|ed)?|close[sd]?|resolve[sd]?|see|per|for) (?:issue )?#\d+\b": "an issue by number",
    r"\bissue #?\d+\b": "an issue by number",
}
PATTERNS = [(re.compile(pattern, re.IGNORECASE), why) for pattern, why in FORBIDDEN.items()]

# The two files that must spell out what they forbid.
EXEMPT = {Path("checks/speech.py"), Path("tests/checks/test_speech.py")}


def problems(root: Path, names: list[Path]) -> list[str]:
    """One line a fault, `path:line: why: "what"`; file names are read too."""
    found = []
    for name in names:
        if name in EXEMPT:
            continue
        text = text_of(root / name)
        for number, line in enumerate([f"/{name.as_posix()}", *(text or "").splitlines()]):
            for pattern, why in PATTERNS:
                if match := pattern.search(line):
                    found.append(f"{name}:{number}: {why}: {match.group()!r}")
    return found


def main() -> int:
    """Check every file of the project."""
    found = problems(ROOT, project_files())
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
