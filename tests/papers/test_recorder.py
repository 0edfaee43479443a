"""How the suite writes evidence: pytest runs small suites of their own, with this suite's conftest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]

CONFTEST = """
import sys
sys.path.insert(0, {root!r})
from tests.conftest import *
import tests.conftest as suite
from pathlib import Path
from types import SimpleNamespace
here = Path(__file__).parent
suite.EVIDENCE = here / "evidence"
suite.register = lambda: [
    SimpleNamespace(slug=slug, method=slug + ".py", places=SimpleNamespace(package=here))
    for slug in ("one", "two")
]
"""

SUITE = """
import pytest

@pytest.mark.contract("one")
def test_first(): pass

@pytest.mark.contract("one")
@pytest.mark.parametrize("size", [1, 2])
def test_second(size): assert size != {bad}

@pytest.mark.checkpoint("one")
def test_loads(): {loads}

@pytest.mark.contract("two")
def test_other(): pytest.skip("not here")

def test_unmarked(): assert {unmarked}
"""


SETTINGS = """
[pytest]
markers =
  contract(slug)
  checkpoint(slug)
  shelf
"""


@pytest.fixture
def folder(pytester: pytest.Pytester) -> Path:
    """A suite of its own, with methods `one` and `two`."""
    pytester.makeconftest(CONFTEST.format(root=str(ROOT)))
    pytester.makeini(SETTINGS)
    pytester.makepyfile(one="x = 1", two="x = 1")
    return pytester.path


Run = Callable[..., int]


@pytest.fixture
def run(pytester: pytest.Pytester, folder: Path) -> Run:
    """Write the suite with the faults asked for, run it with recording, give pytest's exit code."""

    def go(*arguments: str, bad: int = 0, loads: str = "pass", unmarked: bool = True) -> int:
        pytester.makepyfile(test_suite=SUITE.format(bad=bad, loads=loads, unmarked=unmarked))
        command = ["-q", "-p", "no:cacheprovider", "--record-evidence", *arguments]
        return int(pytester.runpytest_inprocess(*command).ret)

    return go


def evidence(folder: Path) -> dict[str, list[str]] | None:
    path = folder / "evidence" / "one.json"
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_passed_is_recorded_once_a_test_in_one_process_and_in_several(
    run: Run, folder: Path, workers: str
) -> None:
    assert run("-n", workers) == 0
    recorded = evidence(folder)
    assert recorded is not None
    assert recorded["contract"] == ["test_suite.py::test_first", "test_suite.py::test_second"]
    assert recorded["checkpoint"] == ["test_suite.py::test_loads"]
    assert not (folder / "evidence" / "two.json").exists(), "a skipped test is no evidence"


def test_one_failure_withdraws_what_was_recorded_of_its_kind(run: Run, folder: Path) -> None:
    run()
    assert run(bad=2) == 1
    recorded = evidence(folder)
    assert recorded is not None
    assert recorded["contract"] == []
    assert recorded["checkpoint"]


def test_failures_of_all_kinds_remove_the_file_and_unmarked_ones_do_not_matter(
    run: Run, folder: Path
) -> None:
    assert run(unmarked=False) == 1
    assert evidence(folder)
    run(bad=1, loads="raise OSError")
    assert evidence(folder) is None


def test_a_changed_method_loses_what_this_run_did_not_show_again(run: Run, folder: Path) -> None:
    run()
    (folder / "one.py").write_text("x = 2\n")
    run("-m", "contract")
    recorded = evidence(folder)
    assert recorded is not None
    assert recorded["contract"]
    assert recorded["checkpoint"] == []


def test_a_part_of_a_contract_cannot_be_recorded_as_the_whole(run: Run, folder: Path) -> None:
    assert run("-k", "first") == 4
    assert evidence(folder) is None


def test_a_mark_for_a_paper_without_a_method_is_refused(pytester: pytest.Pytester, folder: Path) -> None:
    pytester.makepyfile(test_suite="import pytest\n@pytest.mark.contract('three')\ndef test_it(): pass\n")
    assert pytester.runpytest_inprocess("-p", "no:cacheprovider", "--record-evidence").ret == 4
