"""The check of the README's tree fails where it must."""

from __future__ import annotations

from pathlib import Path

import pytest
import tree

README = """# A project

```
another block
```

```
.ci/run  Makefile
src/clipworks/
  errors.py        the errors
  core/            what a CLIP is
    clip.py          two towers
  data/            examples
    world/           the generated world
  methods/         one folder a family
    adapt/  dense/
tests/             mirrors src/
```
"""
FILES = [
    "errors.py",
    "core/clip.py",
    "data/batch.py",
    "data/world/scenes.py",
    "methods/adapt/coop.py",
    "methods/dense/a.py",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in [*FILES, "core/__pycache__/clip.pyc"]:
        path = tmp_path / "src" / "clipworks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_a_true_tree_passes(project: Path) -> None:
    assert tree.problems(project) == []


def test_a_tree_with_drawing_characters_passes(project: Path) -> None:
    drawing = (
        "```text\nsrc/clipworks/\n├── core/ a\n│   └── clip.py\n├── data/\n│   └── world/\n└── methods/\n"
        "    ├── adapt/\n    └── dense/\n```\n"
    )
    (project / "README.md").write_text(drawing)
    assert tree.problems(project) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    world/           the generated world\n", "", "the tree lacks src/clipworks/data/world/"),
        ("adapt/  dense/", "adapt/", "the tree lacks src/clipworks/methods/dense/"),
        ("  core/ ", "  cores/ ", "the tree shows src/clipworks/cores/, which does not exist"),
        ("    world/", "  world/", "the tree shows src/clipworks/world/, which does not exist"),
        ("clip.py", "clop.py", "the tree shows src/clipworks/core/clop.py, which does not exist"),
        ("src/clipworks/\n", "src/other/\n", "expected one code block"),
    ],
)
def test_a_tree_that_differs_fails(project: Path, old: str, new: str, said: str) -> None:
    (project / "README.md").write_text(README.replace(old, new))
    assert any(said in fault for fault in tree.problems(project))


def test_a_new_folder_fails_until_it_is_drawn(project: Path) -> None:
    path = project / "src" / "clipworks" / "search" / "index.py"
    path.parent.mkdir()
    path.touch()
    assert tree.problems(project) == ["README.md: the tree lacks src/clipworks/search/"]


def test_a_missing_readme_fails_clearly(project: Path) -> None:
    (project / "README.md").unlink()
    assert tree.problems(project) == ["README.md: missing; it must hold the tree of src/clipworks"]
