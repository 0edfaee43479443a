"""Every `python` and `console` block of the README and the guides runs, in a folder with what they name.

The folder has `photo.jpg`, `labels.txt` and `Pictures/`. Blocks of a page run in their order; its Python
blocks share their names. In a `console` block the lines after `$ ` are commands; other lines are what they
might print. A block is left alone only if the line before it is `<!-- not run: WHY -->`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import clipworks
from clipworks.cli import COMMANDS, app

ROOT = Path(__file__).resolve().parent.parent
SEEDLING = Path(clipworks.__file__).parent / "checkpoints" / "seedling"
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "quickstart.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
FENCE = re.compile(
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL
)
LEFT_ALONE = re.compile(r"<!-- not run: \S.*-->\s*\Z")


@dataclass(frozen=True)
class Block:
    """Code of a page, and the line of the page on which it begins."""

    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(match["language"], match["code"], text[: match.start("code")].count("\n") + 1)
        for match in FENCE.finditer(text)
        if match["language"] in ("python", "console") and not LEFT_ALONE.search(text[: match.start()])
    ]


def commands(code: str) -> list[str]:
    """The commands of a console block; a line that ends in a backslash goes on in the next."""
    found: list[str] = []
    going_on = False
    for line in code.splitlines():
        if line.startswith("$ ") or going_on:
            text = line.removeprefix("$ ").removesuffix("\\").strip()
            found = [*found[:-1], f"{found[-1]} {text}"] if going_on else [*found, text]
            going_on = line.endswith("\\")
    return found


def execute(command: str) -> str:
    """Run one command, and say what went wrong; `clipworks` runs in this process, which has torch loaded."""
    words = shlex.split(command)
    if words[0] != "clipworks":
        done = subprocess.run(["/bin/sh", "-e", "-c", command], capture_output=True, text=True, timeout=240)
        return "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    target = Path(words[-1]) if words[-2] == ">" else None
    outcome = CliRunner().invoke(app, words[1 : -2 if target else None])
    if target:
        target.write_text(outcome.stdout, encoding="utf-8")
    return (
        ""
        if outcome.exit_code == 0
        else f"exit code {outcome.exit_code}: {outcome.output}{outcome.exception!r}"
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("Pictures").mkdir()
    for name in ("photo.jpg", "Pictures/beach.jpg", "Pictures/dog.jpg"):
        patches = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        patches.resize((400, 300)).save(name)
    Path("Pictures/beach.txt").write_text("a beach in summer\n")
    Path("labels.txt").write_text("a beach\na street\n")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, place: Path) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    if not found:
        pytest.skip("a page without code")
    if not any(SEEDLING.glob("*.safetensors")):
        pytest.skip("the seedling's weights are not here")
    if any("search" in block.code or "index" in block.code for block in found):
        pytest.importorskip("lancedb")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        if block.language == "python":
            # Empty lines in front, so that a traceback names the page's own line.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        else:
            for command in commands(block.code):
                wrong = execute(command)
                assert not wrong, f"{page.name}:{block.line}: {command}\n{wrong}"


def test_a_block_is_found_with_its_line_and_left_alone_only_with_a_reason() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n```python\ny\n```\n"
    text += "<!-- not run: -->\n```console\n$ z\n```\n"
    assert blocks(text) == [Block("python", "x = 1\n", 3), Block("console", "$ z\n", 11)]


def test_commands_are_the_lines_after_a_dollar_sign_and_their_continuations() -> None:
    assert commands("$ a \\\n  b\noutput\n$ c\n") == ["a b", "c"]


def test_a_command_that_fails_is_noticed_and_output_goes_where_it_is_sent(place: Path) -> None:
    assert execute("clipworks --version > said.txt") == ""
    assert Path("said.txt").read_text() == f"clipworks {clipworks.__version__}\n"
    assert "there is no command 'clasify'" in execute("clipworks clasify photo.jpg")
    assert execute("true") == ""
    assert "exit code 1" in execute("false")


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {name for names in COMMANDS.values() for name in names}
    assert set(re.findall(r"^\| `clipworks (\w+)`", text, re.MULTILINE)) <= known
