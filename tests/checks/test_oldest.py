"""The oldest versions follow from pyproject.toml."""

from __future__ import annotations

import oldest
import pytest
from packaging.requirements import Requirement

PROJECT = {
    "name": "clipworks",
    "dependencies": ["torch>=2.10", "numpy>=1.26", "tomli>=2; python_version < '3.0'"],
    "optional-dependencies": {
        "train": ["lightning>=2.5,<4"],
        "search": ["numpy>=2.0", "lancedb>=0.20"],
        "all": ["clipworks[train,search]"],
        "dev": ["pytest"],
    },
}


def test_extras_of_extras_are_followed_and_tools_are_not() -> None:
    names = {requirement.name for requirement in oldest.requirements(PROJECT, ["all", "dev"])}
    assert names == {"torch", "numpy", "tomli", "lightning", "lancedb"}


def test_the_highest_of_several_lower_bounds_counts() -> None:
    bounds = oldest.oldest(oldest.requirements(PROJECT, ["all"]), torch="2.13.0")
    assert bounds == {"torch": "2.13.0", "numpy": "2.0", "lightning": "2.5", "lancedb": "0.20"}


def test_versions_are_compared_as_versions() -> None:
    wanted = [Requirement("a>=1.9"), Requirement("a>=1.10")]
    assert oldest.oldest(wanted, torch="1")["a"] == "1.10"


def test_a_dependency_without_a_lower_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="lancedb<1: no lower bound"):
        oldest.oldest([Requirement("lancedb<1")], torch="2.13.0")


def test_pins_of_tools_are_kept_and_those_of_dependencies_are_not() -> None:
    assert oldest.pins("# c\nnumpy==2.4\npytest==9.2.0  # why\n", {"numpy"}) == {"pytest": "9.2.0"}
