"""`clipworks curate`: from a list and a pool to a kept set, in one line and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ahocorasick")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from clipworks.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "list.txt").write_text("dog\ncat\nYork\n")
    (tmp_path / "pool").mkdir()
    for shard in range(2):
        lines = [
            json.dumps({"key": f"{shard}{i}", "lang": "en" if i % 2 else "de", "caption": text})
            for i, text in enumerate(["a dog"] * 30 + ["a cat"] * 2 + ["nothing"] * 3)
        ]
        (tmp_path / "pool" / f"{shard}.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["curate", *map(str, arguments)])
    return done.exit_code, done.stdout if done.exit_code == 0 else done.stderr


def test_a_pool_becomes_a_smaller_one_with_a_card(folder: Path) -> None:
    options = (
        "metaclip",
        "--metadata",
        folder / "list.txt",
        "--in",
        folder / "pool",
        "--out",
        folder / "kept",
    )
    code, out = run(*options, "--t", 6, "--workers", 1, "--json")
    assert code == 0
    said = json.loads(out)
    assert (said["records"], said["dropped"]["no match"], said["t"], said["matched_texts"]) == (70, 6, 6, 64)
    assert said["kept"] + sum(said["dropped"].values()) == 70 and 4 <= said["kept"] <= 30
    files = sorted((folder / "kept").glob("*.jsonl"))
    kept = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(kept) == said["kept"] and sum("cat" in record["caption"] for record in kept) == 4
    assert "<h1>Data card" in Path(said["card"]).read_text()
    code, out = run(*options, "--t", 6, "--workers", 1)
    assert code == 0 and "no match" in out and f"{said['kept']}" in out


def test_several_lists_are_told_apart_by_a_field(folder: Path) -> None:
    code, out = run(
        "metaclip", "--metadata", f"en={folder}/list.txt", f"de={folder}/list.txt", "--language", "lang",
        "--in", folder / "pool", "--out", folder / "kept", "--t", 10, "--form", "online", "--workers", 1,
        "--json",
    )  # fmt: skip
    assert code == 0 and len(json.loads(out)["t"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "exactly one of t, p and keep"),
        (["--t", "5", "--metadata", "more.txt"], "need --language"),
        (["--t", "5", "--runner", "slurm"], "runner 'slurm'"),
        (["--t", "5", "--workers", "-1"], "--workers -1"),
        (["--t", "5", "--spacing", "none"], "spacing 'none'"),
    ],
)
def test_bad_input_is_one_line(folder: Path, options: list[str], message: str) -> None:
    base = ("metaclip", "--metadata", folder / "list.txt", "--in", folder / "pool", "--out", folder / "kept")
    code, error = run(*base, *options)
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_list_is_made_of_local_dumps(folder: Path) -> None:
    (folder / "corpus.txt").write_text("hong kong, hong kong.\n" + "the dog\n" * 120)
    (folder / "views").write_text("en New_York 90 0\n")
    code, out = run(
        "metadata", "--corpus", folder / "corpus.txt", "--pageviews", folder / "views",
        "--bigrams", 1, "--out", folder / "made.json", "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["entries"] == 104
    assert json.loads((folder / "made.json").read_text())[100:] == ["dog", "the", "hong kong", "New York"]
