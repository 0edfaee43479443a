"""Lets the environment that runs this import open_clip without torchvision (see site/open_clip_alone.py)."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def main() -> None:
    """Write the path file: a folder for the import path, and the module that is loaded at every start."""
    folder = Path(__file__).resolve().parent / "site"
    target = Path(sysconfig.get_path("purelib")) / "clipworks-peers.pth"
    target.write_text(f"{folder}\nimport open_clip_alone\n", encoding="utf-8")


if __name__ == "__main__":
    main()
