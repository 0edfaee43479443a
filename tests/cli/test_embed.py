"""`clipworks embed`: vectors of a folder, said in a line and as JSON; options that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from clipworks.cli import app


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for shade in range(3):
        Image.new("RGB", (70, 64), (80 * shade, 0, 0)).save(folder / f"{shade}.png")
    (folder / "bad.png").write_text("no picture")
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["embed", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_a_folder_becomes_vectors_and_what_cannot_be_read_is_said(photos: Path) -> None:
    code, out, err = run(photos, "--out", "vectors")
    assert code == 0 and out.startswith("vectors: 3 vectors of 1 pieces; 3 of them new")
    assert "bad.png" in err
    code, out, _ = run(photos, "--out", "vectors", "--json")
    said = json.loads(out)
    assert code == 0 and (said["rows"], said["computed"], said["reused_shards"]) == (3, 0, 1)
    assert said["skipped"] == {"unreadable picture": 1}
    table = parquet.read_table(photos.parent / "vectors" / "photos-00000.parquet")
    assert table.column("key").to_pylist() == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "are for --runner ray"),
        (["--runner", "slurm"], "not 'parquet' and 'slurm'"),
        (["--format", "csv"], "not 'csv'"),
        (["--runner", "ray", "--device", "cuda:1"], "with ray it is auto, cpu or cuda"),
    ],
)
def test_options_that_cannot_work_are_one_line(photos: Path, options: list[str], said: str) -> None:
    code, _, err = run(photos, "--out", "vectors", *options)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
