"""Which files the checks look at: those that git knows or would take, or all below a folder without git."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {".git", "__pycache__", "site", "build", "dist", "node_modules"}
LARGEST_TEXT = 1_000_000


def project_files(root: Path = ROOT) -> list[Path]:
    """Paths relative to `root`, sorted; what .gitignore names is left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.decode().split("\0") if name]
    else:
        names = [path.relative_to(root) for path in root.rglob("*") if not LEFT_OUT & set(path.parts)]
    return sorted(name for name in names if (root / name).is_file() and not (root / name).is_symlink())


def text_of(path: Path) -> str | None:
    """The text of a file, or None if it is binary, too large to have been written by hand, or not UTF-8."""
    if path.stat().st_size > LARGEST_TEXT:
        return None
    content = path.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def python_modules(root: Path = ROOT) -> list[tuple[str, Path]]:
    """Dotted name and path of every module of the package, sorted."""
    source = root / "src"
    modules = []
    for path in sorted((source / "clipworks").rglob("*.py")):
        parts = list(path.relative_to(source).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        modules.append((".".join(parts), path))
    return modules
