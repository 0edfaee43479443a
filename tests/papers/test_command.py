"""`clipworks papers`, on a bare application that holds only this command."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import typer
from typer.testing import CliRunner

from clipworks.cli.papers import papers
from clipworks.errors import ConfigError
from clipworks.papers import FAMILIES, register

app = typer.Typer()
app.command()(papers)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_json_holds_every_paper_with_the_fields_promised() -> None:
    records = json.loads(run("--json"))
    assert [record["slug"] for record in records] == [entry.slug for entry in register()]
    promised = {"slug", "title", "venue", "family", "status", "checkpoint", "proof", "missing"}
    assert all(set(record) == promised for record in records)


def test_filters_combine() -> None:
    every = json.loads(run("--json"))
    for family, status in [("adapt", "planned"), ("video", "works")]:
        chosen = json.loads(run("--json", "--family", family, "--status", status))
        assert chosen == [
            record for record in every if record["family"] == family and record["status"] == status
        ]


def test_the_table_groups_by_family_and_counts() -> None:
    text = run()
    counts = Counter(entry.family for entry in register())
    titles = [line for line in text.splitlines() if line.partition(":")[0] in FAMILIES]
    assert [title.partition(":")[0] for title in titles] == list(FAMILIES)
    for title in titles:
        family, _, numbers = title.partition(":")
        assert sum(int(word) for word in numbers.replace(",", "").split() if word.isdigit()) == counts[family]
    assert "97 papers" in text
    assert all(entry.slug in text for entry in register())


def test_an_empty_choice_says_so() -> None:
    if not [entry for entry in register() if entry.family == "space" and entry.status == "works"]:
        assert "no paper fits" in run("--family", "space", "--status", "works")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "adept"), "--family 'adept' is unknown; did you mean adapt"),
        (("--status", "zzz"), "--status 'zzz' is unknown; choose from planned, partial, works"),
    ],
)
def test_an_unknown_filter_is_one_clear_error(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*arguments)
    assert message in str(caught.value)


def test_help_explains_with_an_example() -> None:
    """Also with the oldest typer that pyproject.toml allows: 0.15 breaks here beside click 8.2 and newer."""
    text = run("--help")
    assert "Example: clipworks papers --family adapt --status works" in text
    assert "--json" in text
