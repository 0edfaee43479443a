"""The gate fails when a step fails, and each of its tools fails on a bad example with our settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gate
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package of this name with this project's settings and nothing in it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "src" / "clipworks"
    rooms = "cli serve search proofs methods evaluate parts engine data encode checkpoints core papers"
    for name in [*rooms.split(), "methods/adapt", "methods/dense"]:
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").touch()
    write(package / "errors.py", "")
    return tmp_path


def write(path: Path, source: str) -> None:
    path.write_text(f'"""A module."""\n{source}')


def run(name: str, project: Path) -> gate.Outcome:
    (step,) = [step for step in gate.steps(project) if step.name == name]
    if step.needs:
        pytest.importorskip(step.needs)
    return gate.run(step, project)


BAD = {
    "print": ("ruff", "print(1)\n", "T201"),
    "assert": ("ruff", "def f() -> None:\n    '''F.'''\n    assert True\n", "S101"),
    "numpy's generator": ("ruff", "import numpy as np\n\nnp.random.rand(3)\n", "NPY002"),
    "torch's generator": ("ruff", "import torch\n\ntorch.manual_seed(0)\n", "TID251"),
    "python's generator": ("ruff", "import random\n\nrandom.shuffle([])\n", "TID251"),
    "torchvision": ("ruff", "import torchvision\n\ntorchvision.x\n", "TID251"),
    "no docstring": ("ruff", "def f() -> None:\n    return\n", "D103"),
    "layout": ("format", "x = {  'a':1}\n", "would be reformatted"),
    "untyped": ("mypy", "\n\ndef f(x):\n    return x\n", "no-untyped-def"),
    "wrong type": ("mypy", "\nx: int = 'a'\n", "assignment"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_code_fails(project: Path, case: str) -> None:
    step, source, text = BAD[case]
    assert run(step, project).state == "passed"
    write(project / "src" / "clipworks" / "core" / "bad.py", source)
    outcome = run(step, project)
    assert outcome.state == "failed"
    assert text in outcome.output


IMPORTS = {
    "core takes from the engine": ("core/a.py", "engine/b.py"),
    "a part takes from a metric": ("parts/a.py", "evaluate/b.py"),
    "search takes from serve": ("search/a.py", "serve/b.py"),
    "a family takes from another": ("methods/adapt/a.py", "methods/dense/b.py"),
    "a method takes from another": ("methods/adapt/a.py", "methods/adapt/b.py"),
    "a base takes from a method": ("methods/adapt/base.py", "methods/adapt/b.py"),
    "the register takes from the core": ("papers/a.py", "core/b.py"),
    "errors take from the register": ("errors.py", "papers/b.py"),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_an_import_against_the_direction_fails(project: Path, case: str) -> None:
    source, target = IMPORTS[case]
    package = project / "src" / "clipworks"
    write(package / target, "")
    write(package / source, f"import clipworks.{target[:-3].replace('/', '.')}\n")
    outcome = run("lint-imports", project)
    assert outcome.state == "failed"
    assert "BROKEN" in outcome.output


def test_imports_in_the_direction_pass(project: Path) -> None:
    package = project / "src" / "clipworks"
    write(package / "methods" / "adapt" / "base.py", "import clipworks.parts\nimport clipworks.engine\n")
    write(
        package / "methods" / "adapt" / "a.py", "import clipworks.core\nimport clipworks.methods.adapt.base\n"
    )
    write(package / "core" / "a.py", "import clipworks.errors\n")
    write(package / "cli" / "a.py", "import clipworks.papers\nimport clipworks.methods.adapt.a\n")
    outcome = run("lint-imports", project)
    assert outcome.state == "passed", outcome.output


def test_documentation_with_a_dead_link_fails(project: Path) -> None:
    pytest.importorskip("mkdocs")
    for name in [
        "mkdocs.yml",
        "docs/hooks.py",
        "docs/index.md",
        "docs/quickstart.md",
        "docs/guides/index.md",
    ]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    for path in (ROOT / "src" / "clipworks" / "papers").glob("*.py"):
        shutil.copy(path, project / "src" / "clipworks" / "papers")
    for name in ["papers/coop.toml", "errors.py"]:
        shutil.copy(ROOT / "src" / "clipworks" / name, project / "src" / "clipworks" / name)
    proof = {
        "verdict": "does not hold",
        "seeds": [11, 12, 13, 14, 15],
        "difference": {"mean": -0.0123, "interval": [-0.02, 0.001]},
        "rows": [{"seed": 11, "ours": 0.5, "baseline": None}, {"seed": 12, "ours": 0.25, "converged": True}],
    }
    (project / "docs" / "proofs").mkdir()
    (project / "docs" / "proofs" / "coop.json").write_text(json.dumps(proof))
    outcome = run("docs", project)
    assert outcome.state == "passed", outcome.output
    page = (project / "site" / "proofs" / "coop.html").read_text()
    for text in ["does not hold", "11, 12, 13, 14, 15", "-0.0123", "-0.02, 0.001", "baseline", "yes"]:
        assert text in page
    assert 'href="proofs/coop.html">does not hold' in (project / "site" / "register.html").read_text()
    with (project / "docs" / "quickstart.md").open("a") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    outcome = run("docs", project)
    assert outcome.state == "failed"
    assert "nowhere.md" in outcome.output


def test_one_failing_step_fails_the_gate_and_all_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = gate.Step("good", (sys.executable, "-c", "pass"))
    bad = gate.Step("bad", (sys.executable, "-c", "print('why'); raise SystemExit(3)"))
    monkeypatch.setattr(gate, "steps", lambda scratch: [bad, good])
    assert gate.main([]) == 1
    printed = capsys.readouterr().out
    assert "why" in printed
    assert "failed   bad" in printed
    assert "passed   good" in printed
    assert gate.main(["good"]) == 0


@pytest.mark.parametrize(("ci", "state"), [("true", "failed"), ("", "skipped")])
def test_a_missing_tool_is_skipped_by_hand_and_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, state: str
) -> None:
    monkeypatch.setenv("CI", ci)
    assert gate.run(gate.Step("x", ("true",), "no_such_tool")).state == state


def test_ci_and_the_hook_run_the_gate() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make check", "make test"]
    assert "entry: make check" in (ROOT / ".pre-commit-config.yaml").read_text()
    assert "run: .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_make_help_names_every_target_for_people() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in [
        "demo",
        "test",
        "check",
        "bench",
        "proofs",
        "peers",
        "docs",
        "check-oldest",
        "clean",
        "help",
    ]:
        assert f"make {target}" in done.stdout
