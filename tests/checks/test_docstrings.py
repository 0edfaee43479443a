"""The check of docstrings fails where it must, and takes shapes as people write them."""

from __future__ import annotations

from pathlib import Path

import docstrings
import pytest


def said(tmp_path: Path, source: str) -> list[str]:
    package = tmp_path / "src" / "clipworks"
    package.mkdir(parents=True)
    (package / "module.py").write_text(source)
    return docstrings.problems(package)


@pytest.mark.parametrize(
    "text",
    [
        "(B, D)", "(n,)", "()", "a 0-D tensor", "(..., 3, H, W)", "(B, N + 1, D)", "of any shape",
        "(3 * w, w)", "(B, C) or (B, 1, C)", "(n, width)", "(D_a, D)", "(2, F·B)", "(49408, w)", "(g²+1, w)",
    ],
)  # fmt: skip
def test_these_state_a_shape(text: str) -> None:
    assert docstrings.states_shape(f"Unit vectors {text}, fp32.")


@pytest.mark.parametrize(
    "text",
    [
        "unit vectors (see, below)",
        "a mean (or, if asked for, a sum)",
        "one (1) thing",
        "features",
        "f(x) is taken",
    ],
)
def test_these_do_not(text: str) -> None:
    assert not docstrings.states_shape(text)


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: Tensor) -> float:\n    ...",
        'def f(x: Tensor) -> float:\n    """The mean of x."""',
        'def f(n: int) -> tuple[Tensor, int]:\n    """Some numbers."""',
        'def f(*, t: Tokens | None = None) -> int:\n    """Reads t."""',
        'def f(x: torch.Tensor) -> int:\n    """Reads x."""',
        'class A:\n    """An a."""\n    def forward(self, x: Tensor) -> Tensor:\n        """Goes."""',
        'class A:\n    """Of (B, D)."""\n    def loss(self, x: Tensor) -> Tensor:\n        """Goes."""',
        'class A:\n    @property\n    def x(self) -> Tensor:\n        """An x."""',
    ],
)
def test_a_tensor_without_a_shape_is_a_fault(tmp_path: Path, source: str) -> None:
    assert len(said(tmp_path, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'def f(x: Tensor) -> Tensor:\n    """(B, D) to (B,)."""',
        "def f(x: Tensor) -> Tensor:  # (B, D) -> (B,)\n    return x",
        "def _f(x: Tensor) -> Tensor: ...",
        "def f(x: int) -> Callable[[Tensor], Tensor]: ...",
        "class _A:\n    def f(self, x: Tensor) -> Tensor: ...",
        'class A:\n    """(B, D) to (B, D)."""\n    def forward(self, x: Tensor) -> Tensor: ...',
        'class Base:\n    def logits(self, x: Tensor) -> Tensor:\n        """(B, D) to (B, C)."""\n'
        "class A(Base):\n    def logits(self, x: Tensor) -> Tensor: ...",
        'class Tokens:\n    """Ids (n, L)."""\n    def cut(self) -> Tokens:\n        """Shorter."""',
        "def outer() -> int:\n    def inner(x: Tensor) -> Tensor: ...\n    return 1",
    ],
)
def test_what_is_documented_private_or_inherited_is_none(tmp_path: Path, source: str) -> None:
    assert said(tmp_path, source) == []


def test_a_fault_names_file_line_and_function(tmp_path: Path) -> None:
    (fault,) = said(tmp_path, "x = 1\n\nclass A:\n    def f(self, x: Tensor) -> Tensor: ...\n")
    assert fault == "src/clipworks/module.py:4: A.f has no docstring that states shapes"
