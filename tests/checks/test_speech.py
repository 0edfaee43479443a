"""The check of speech fails where it must, and leaves ordinary words alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import speech


def said(tmp_path: Path, line: str, name: str = "notes.md") -> list[str]:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"first\n{line}\n")
    return speech.problems(tmp_path, [Path(name)])


@pytest.mark.parametrize(
    "line",
    [
        'DATA = "/work/shared/data"',
        "see /tmp/work/notes",
        "cd /root/clipworks",
        "/home/anna/clip.pt",
        "pip install -i https://pypi.org/simple clipworks",
        "https://files.pythonhosted.org/packages/x.whl",
        "measured in this session",
        "left for the next coding session",
        "fixes #12",
        "as issue 12 asks",
    ],
)
def test_these_are_faults(tmp_path: Path, line: str) -> None:
    (fault,) = said(tmp_path, line)
    assert fault.startswith("notes.md:2: ")


@pytest.mark.parametrize(
    "line",
    [
        '@pytest.fixture(scope="session")',
        "def pytest_sessionfinish(session): ...",
        "session = onnxruntime.InferenceSession(path)",
        "the service keeps no session between requests",
        "one request in an HTTP session",
        'out = "~/work/clips"',
        "frames/work/of/art.jpg",
        "channel #3 of the picture",
        "CoOp #8 reports it",
        "a tissue 12 micrometers thick",
    ],
)
def test_these_are_not(tmp_path: Path, line: str) -> None:
    assert said(tmp_path, line) == []


def test_binary_files_are_left_alone_and_their_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0/work/\0")
    assert speech.problems(tmp_path, [Path("w.bin")]) == []
    assert len(said(tmp_path, "x", name="work/a.md")) == 1
