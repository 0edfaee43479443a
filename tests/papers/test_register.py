"""The register: what its files hold, and how a status follows from evidence."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clipworks.errors import ConfigError, DataError
from clipworks.papers import FAMILIES, Paper, Places, fingerprint, paper, register

TOML = """
title = "A Paper"
venue = "Conf 2024"
year = 2024
family = "adapt"
summary = "s"
mechanism = "m"
claim = "c"
code = ""
license = ""
weights = "none known"
checkpoint = "{checkpoint}"
method = "methods/adapt/one.py"
extra = ""
mechanism_complete = {complete}
"""


class World:
    """A package with one paper, in a folder, whose evidence a test lays out."""

    def __init__(self, folder: Path) -> None:
        package = folder / "clipworks"
        self.places = Places(package, package / "papers", package / "papers" / "evidence", folder / "proofs")
        self.method = package / "methods" / "adapt" / "one.py"
        for place in (self.places.evidence, self.places.proofs, self.method.parent):
            place.mkdir(parents=True)

    def write(
        self, *, method: bool = True, complete: bool = True, contract: bool = True, released: bool = False,
        loads: bool = False, seeds: int | None = 5, verdict: str = "holds",
    ) -> Paper:  # fmt: skip
        text = TOML.format(checkpoint="released" if released else "none", complete=str(complete).lower())
        (self.places.papers / "one.toml").write_text(text)
        if method:
            self.method.write_text("LEARNED = 1\n")
            evidence: dict[str, Any] = {"source": fingerprint(self.method)}
            evidence["contract"] = ["tests/contracts/adapt.py::test_frozen"] if contract else []
            evidence["checkpoint"] = ["tests/methods/adapt/test_one.py::test_loads"] if loads else []
            (self.places.evidence / "one.json").write_text(json.dumps(evidence))
        if seeds is not None:
            proof = {"verdict": verdict, "seeds": list(range(seeds)), "budget": "small"}
            (self.places.proofs / "one.json").write_text(json.dumps(proof))
        return paper("one", self.places)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_all_ninety_seven_papers_are_in_with_the_families_of_the_floor_plan() -> None:
    papers = register()
    assert len({paper.slug for paper in papers}) == len(papers) == 97
    assert Counter(paper.family for paper in papers) == {
        "pretrain": 21, "adapt": 21, "video": 10, "dense": 9, "generate": 8,
        "curate": 6, "language": 6, "robust": 6, "retrieve": 5, "space": 5,
    }  # fmt: skip


def test_what_a_toml_names_exists() -> None:
    for entry in register():
        assert entry.title, entry.slug
        assert entry.summary.endswith("."), entry.slug
        assert str(entry.year) in entry.venue, entry.slug
        if entry.method:
            assert (entry.places.package / entry.method).exists(), entry.slug
            assert entry.method.startswith(f"methods/{entry.family}/"), entry.slug
        assert (entry.checkpoint == "none") or not entry.weights.startswith("none"), entry.slug


def test_evidence_and_proofs_belong_to_papers_and_name_tests_that_exist() -> None:
    papers = register()
    slugs = {entry.slug for entry in papers}
    places = papers[0].places
    root = Path(__file__).resolve().parents[2]
    for path in [*places.evidence.glob("*.json"), *places.proofs.glob("*.json")]:
        assert path.stem in slugs, path
    for path in places.evidence.glob("*.json"):
        evidence = json.loads(path.read_text())
        for name in evidence["contract"] + evidence["checkpoint"]:
            file, *_, function = name.split("::")
            assert f"def {function}(" in (root / file).read_text(), (
                f"{path.name}: {name} is gone; run make contracts"
            )
    for entry in papers:
        assert entry.status in ("planned", "partial", "works")


def test_evidence_is_of_the_methods_as_they_stand() -> None:
    stale = [entry.slug for entry in register() if any("changed since" in gap for gap in entry.missing)]
    assert not stale, (
        f"run `make contracts`: the methods of {', '.join(stale)} changed since their contract was shown"
    )


def test_a_paper_works_exactly_when_nothing_is_missing(world: World) -> None:
    """All combinations of what can be missing, against the definition written out."""
    options = list(itertools.product([True, False], repeat=5))
    for (complete, contract, released, loads, method), seeds in itertools.product(options, [None, 4, 5]):
        for path in [*world.places.evidence.iterdir(), *world.places.proofs.iterdir(), world.method]:
            path.unlink(missing_ok=True)
        entry = world.write(
            method=method, complete=complete, contract=contract, released=released, loads=loads, seeds=seeds
        )
        if not method:
            expected = "planned"
        elif complete and contract and (loads or not released) and seeds is not None and seeds >= 5:
            expected = "works"
        else:
            expected = "partial"
        assert entry.status == expected
        assert (entry.status == "works") == (not entry.missing)


@pytest.mark.parametrize("verdict", ["holds", "does not hold", "undecided"])
def test_the_verdict_does_not_decide_whether_a_paper_works(world: World, verdict: str) -> None:
    entry = world.write(verdict=verdict)
    assert entry.status == "works"
    assert entry.to_dict()["proof"] == verdict


def test_a_method_that_changed_loses_its_contract_and_checkpoint(world: World) -> None:
    entry = world.write(released=True, loads=True)
    assert entry.status == "works"
    world.method.write_text("LEARNED = 2\n")
    assert entry.missing == (
        "method changed since its contract was shown",
        "loading the released checkpoint not shown",
    )


def test_repeated_seeds_count_once(world: World) -> None:
    entry = world.write(seeds=4)
    path = world.places.proofs / "one.json"
    path.write_text(json.dumps({"verdict": "holds", "seeds": [0, 1, 2, 3, 3, 3]}))
    assert entry.missing == ("proof on 4 of 5 seeds",)


def test_fingerprint_ignores_line_ends_and_sees_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_bytes(b"a = 1\nb = 2\n")
    first = fingerprint(path)
    path.write_bytes(b"a = 1\r\nb = 2\r\n")
    assert fingerprint(path) == first
    path.write_bytes(b"a = 1\nb = 3\n")
    assert fingerprint(path) != first
    package = tmp_path / "method"
    package.mkdir()
    (package / "one.py").write_text("x = 1\n")
    alone = fingerprint(package)
    (package / "two.py").write_text("y = 1\n")
    assert fingerprint(package) != alone


def test_an_unknown_slug_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no paper 'coo'.*coop"):
        paper("coo")
    assert paper("coop").title == "Learning to Prompt for Vision-Language Models"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('claim = "c"', "", "claim is missing"),
        ("year = 2024", 'year = "2024"', "year must be of type int, found '2024'"),
        ('extra = ""', 'extra = ""\nstatus = "works"', "unknown key 'status'"),
        ('extra = ""', 'extra = ""\nmetod = "x"', "unknown key 'metod'; did you mean method"),
        ('family = "adapt"', 'family = "adopt"', "family 'adopt' is none of pretrain, adapt"),
        ('title = "A Paper"', "title = A Paper", "not valid TOML"),
    ],
)
def test_a_wrong_toml_is_one_clear_error(world: World, old: str, new: str, message: str) -> None:
    world.write()
    path = world.places.papers / "one.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError) as caught:
        register(world.places)
    assert str(caught.value).startswith("one.toml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"verdict": "proved", "seeds": [1]}', '{"verdict": "holds", "seeds": 5}']
)
def test_a_damaged_proof_is_an_error_that_names_its_file(world: World, content: str) -> None:
    entry = world.write()
    (world.places.proofs / "one.json").write_text(content)
    with pytest.raises(DataError, match=r"one\.json"):
        entry.status  # noqa: B018


def test_the_register_loads_no_heavy_library() -> None:
    code = (
        "import sys; from clipworks.papers import register; register();"
        "sys.exit(bool({'torch', 'numpy', 'rich', 'typer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_papers_come_in_the_order_of_families_then_slugs() -> None:
    keys = [(FAMILIES.index(entry.family), entry.slug) for entry in register()]
    assert keys == sorted(keys)
