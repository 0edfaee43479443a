"""`clipworks models`: every name is shown, in a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

from clipworks.checkpoints import zoo
from clipworks.cli import app


@dataclass(frozen=True)
class Entry:
    name: str
    source: str
    parameters: int | None


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    entries = [Entry("seedling", "shipped", 7), Entry("ViT-B-32/openai", "hub [x]", None)]
    monkeypatch.setattr(zoo, "models", lambda: entries, raising=False)
    return entries


def test_json_is_the_list_of_records() -> None:
    done = CliRunner().invoke(app, ["models", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == [
        {"name": "seedling", "source": "shipped", "parameters": 7},
        {"name": "ViT-B-32/openai", "source": "hub [x]", "parameters": None},
    ]


def test_the_table_shows_every_name() -> None:
    done = CliRunner().invoke(app, ["models"])
    assert done.exit_code == 0
    assert all(word in done.stdout for word in ("name", "seedling", "ViT-B-32/openai", "hub [x]"))
