"""The README's tree is the real one: every folder of src/clipworks is in it, and nothing that is not there.

The tree is the code block that has a line `src/clipworks/`. Below it a folder is a word that ends in `/`,
nested by indentation (or by tree drawing characters); several may share a line. A file that the block
names must exist; it need not name all.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from files import ROOT

TOP = "src/clipworks/"
BLOCK = re.compile(r"^(```|~~~)[^\n]*\n(.*?)^\1", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w.-]+\.\w+$")


def drawn(block: str) -> tuple[set[str], set[str]]:
    """Folders and files that a block shows below `src/clipworks/`, relative to it."""
    folders: set[str] = set()
    files: set[str] = set()
    stack: list[tuple[int, str]] = []
    inside, top = False, 0
    for raw in block.splitlines():
        line = re.sub("[│├└─]", " ", raw)
        words = line.split()
        depth = len(line) - len(line.lstrip())
        if not words:
            continue
        if words[0] == TOP:
            inside, top = True, depth
            continue
        if not inside:
            continue
        if depth <= top:
            break
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parent = stack[-1][1] if stack else ""
        names = _leading(words)
        folders |= {parent + name for name in names if name.endswith("/")}
        files |= {parent + name for name in names if not name.endswith("/")}
        if names and names[-1].endswith("/"):
            stack.append((depth, parent + names[-1]))
    return folders, files


def _leading(words: list[str]) -> list[str]:
    names = []
    for word in words:
        if not (word.endswith("/") or FILE.fullmatch(word)):
            break
        names.append(word)
    return names


def real(package: Path) -> set[str]:
    """Folders below the package that hold files, relative to it, each ending in `/`."""
    found = set()
    for path in package.rglob("*"):
        folder = path.parent.relative_to(package)
        if path.is_file() and folder.parts and "__pycache__" not in folder.parts:
            found |= {f"{part.as_posix()}/" for part in [folder, *folder.parents] if part.parts}
    return found


def problems(root: Path) -> list[str]:
    """One line a fault."""
    readme = root / "README.md"
    if not readme.is_file():
        return ["README.md: missing; it must hold the tree of src/clipworks"]
    text = readme.read_text(encoding="utf-8")
    blocks = [
        block for _, block in BLOCK.findall(text) if re.search(rf"^\W*{re.escape(TOP)}", block, re.MULTILINE)
    ]
    if len(blocks) != 1:
        return [f"README.md: expected one code block with a line {TOP!r}, found {len(blocks)}"]
    folders, files = drawn(blocks[0])
    package = root / "src" / "clipworks"
    there = real(package)
    return [
        *(f"README.md: the tree lacks {TOP}{name}" for name in sorted(there - folders)),
        *(f"README.md: the tree shows {TOP}{name}, which does not exist" for name in sorted(folders - there)),
        *(
            f"README.md: the tree shows {TOP}{name}, which does not exist"
            for name in sorted(files)
            if not (package / name).is_file()
        ),
    ]


def main() -> int:
    """Compare README.md with the folders."""
    found = problems(ROOT)
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
