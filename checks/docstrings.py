"""Every public function or method that takes or gives a Tensor or Tokens states shapes in its docstring.

A shape is `(B, D)`, `(n,)`, `(..., 3, H, W)`, `()` or the word 0-D; a function that takes tensors as they
come says "any shape". What counts for a function is its own docstring or a comment on its `def` line; for
`forward`, `__call__` and a method that handles nothing but its own class also the class's docstring; for a
method that overrides another of the package also the docstring of the one that it overrides, which is
where a family's contract stands. The source is read, nothing is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from files import ROOT

TENSORS = re.compile(r"\b(?:Tensor|Tokens)\b")
AS_CLASS = {"forward", "__call__"}

# Between brackets, commas between dimensions; at least one dimension is a number, an ellipsis or a letter or
# two, so that an aside in prose is not taken for a shape.
_LETTER = r"[A-Za-z]{1,2}(?:_\w+|['′]|\d)*"
_SHORT = rf"(?:\d+|\.\.\.|…|{_LETTER})"
_PLAIN = re.compile(rf"{_SHORT}(?: ?[-+*/·×−^²] ?(?:{_SHORT}|\w+)|²)*$")
_WORD = re.compile(r"[A-Za-z_][\w.]*(?: ?[-+*/·×−] ?\w+)*$")
_BRACKETS = re.compile(r"\(([^()]*)\)")


def states_shape(text: str) -> bool:
    """Whether a docstring names a shape."""
    if re.search(r"\b(?:0-D|any\s+shape)\b", text):
        return True
    for inside in _BRACKETS.findall(text):
        if not inside.strip():
            return True
        parts = [part.strip() for part in re.sub(r"\s+", " ", inside).strip().removesuffix(",").split(",")]
        short = [bool(_PLAIN.match(part)) for part in parts]
        words = [bool(_WORD.match(part)) for part in parts]
        if "," in inside and any(short) and all(map(max, short, words)):
            return True
    return False


@dataclass
class Class:
    """What the check needs to know of a class."""

    doc: str
    bases: list[str]
    methods: dict[str, str] = field(default_factory=dict)


def classes(trees: dict[Path, ast.Module]) -> dict[str, Class]:
    """All classes by name, with the docstrings of their methods."""
    found: dict[str, Class] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
                methods = {
                    item.name: ast.get_docstring(item) or ""
                    for item in node.body
                    if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
                }
                found[node.name] = Class(ast.get_docstring(node) or "", bases, methods)
    return found


def problems(package: Path) -> list[str]:
    """One line a fault, `path:line: what`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    known = classes(trees)
    found = []
    for path, tree in trees.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for owner, node in _public(tree):
            if not _touches_tensors(node):
                continue
            texts = [ast.get_docstring(node) or "", *_def_comments(node, lines)]
            if owner is not None:
                if node.name in AS_CLASS or not _touches_tensors(node, besides=owner.name):
                    texts.append(ast.get_docstring(owner) or "")
                texts += _inherited(owner.name, node.name, known)
            if not any(states_shape(text) for text in texts):
                name = f"{owner.name}.{node.name}" if owner else node.name
                what = (
                    "states no shape in its docstring"
                    if any(texts)
                    else "has no docstring that states shapes"
                )
                found.append(f"{path.relative_to(package.parent.parent)}:{node.lineno}: {name} {what}")
    return found


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _public(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield None, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if not isinstance(item, Function):
                    continue
                overload = any("overload" in ast.unparse(mark) for mark in item.decorator_list)
                if not overload and (item.name == "__call__" or not item.name.startswith("_")):
                    yield node, item


def _touches_tensors(node: Function, besides: str = "") -> bool:
    every = [
        *node.args.posonlyargs,
        *node.args.args,
        *node.args.kwonlyargs,
        node.args.vararg,
        node.args.kwarg,
    ]
    hints = [item.annotation for item in every if item is not None and item.annotation is not None]
    if node.returns is not None:
        hints.append(node.returns)
    # A callable among the arguments has its own documentation.
    plain = [re.sub(r"Callable\[.*\]", "", ast.unparse(hint).strip("'\"")) for hint in hints]
    return any(set(TENSORS.findall(hint)) - {besides} for hint in plain)


def _def_comments(node: Function, lines: list[str]) -> list[str]:
    last = node.body[0].lineno - 1
    return [line.partition("#")[2] for line in lines[node.lineno - 1 : max(last, node.lineno)] if "#" in line]


def _inherited(name: str, method: str, known: dict[str, Class]) -> list[str]:
    texts, queue, seen = [], list(known[name].bases), {name}
    while queue:
        base = queue.pop(0)
        if base in known and base not in seen:
            seen.add(base)
            texts.append(known[base].methods.get(method, ""))
            if method in AS_CLASS:
                texts.append(known[base].doc)
            queue += known[base].bases
    return [text for text in texts if text]


def main() -> int:
    """Check the package."""
    found = problems(ROOT / "src" / "clipworks")
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
