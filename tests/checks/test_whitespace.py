"""The check of blanks, line ends and sizes fails where it must."""

from __future__ import annotations

from pathlib import Path

import pytest
import whitespace


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x = 1", "must end in exactly one newline"),
        (b"x = 1\n\n", "must end in exactly one newline"),
        (b"x = 1 \n", "a.py:1: trailing blank"),
        (b"x = 1\r\n", "a.py:1: carriage return"),
        (b"<<<<<<< ours\n", "a.py:1: conflict mark"),
        (b"#" * 1_100_000 + b"\n", "large files do not belong"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.py").write_bytes(content)
    found = whitespace.problems(tmp_path, [Path("a.py")])
    assert any(said in fault for fault in found)


@pytest.mark.parametrize(
    ("name", "content"), [("a.py", b""), ("a.py", b"x = 1\n"), ("a.md", b"a  \nb\n"), ("a.png", b"\0 \n\n")]
)
def test_what_is_in_order_passes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert whitespace.problems(tmp_path, [Path(name)]) == []
