"""`clipworks soup`: files become their average, chosen on pictures, with one line for bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import clipworks
from clipworks.cli import app
from clipworks.core.tokenizer import ClipTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Callable[..., Any]) -> Path:
    tokenizer = ClipTokenizer(context_length=16)
    clip = tiny_clip(image={"image_size": 16}, text={"context_length": 16}, tokenizer=tokenizer)
    return Path(clip.save(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def files(model: Path) -> list[Path]:
    """Three neighbors of the model."""
    weights, made = load_file(model / "model.safetensors"), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        near = {name: _near(tensor, generator) for name, tensor in weights.items()}
        made.append(model.parent / f"{seed}.safetensors")
        save_file(near, made[-1])
    return made


def _near(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("held"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(8):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["soup", *map(str, words)])


def test_without_pictures_all_files_are_averaged(files: list[Path], model: Path, tmp_path: Path) -> None:
    done = run(*files, "--out", tmp_path / "all.safetensors")
    assert done.exit_code == 0, done.output
    assert "average of 3 of 3" in done.stdout
    found, parts = load_file(tmp_path / "all.safetensors"), [load_file(file) for file in files]
    for name, tensor in found.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    clipworks.load(model).load_state_dict(found)


def test_pictures_choose_and_the_soup_is_not_below_its_best_file(
    files: list[Path], model: Path, held: Path, tmp_path: Path
) -> None:
    out = tmp_path / "soup.safetensors"
    words = (*files, "--data", held, "--model", model, "--out", out)
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    kept = [trial for trial in said["trials"] if trial["kept"]]
    assert [trial["file"] for trial in kept] == said["members"]
    assert kept[0]["accuracy"] == max(said["accuracies"].values()) <= kept[-1]["accuracy"]
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert again.stdout.count("yes") == len(kept) and f"average of {len(kept)} of 3" in again.stdout


def test_bad_input_is_one_line(files: list[Path], model: Path, held: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    save_file({"image.weight": torch.zeros(2)}, other)
    for words, said in (
        ((tmp_path / "none.safetensors", "--out", out), "no such file"),
        ((files[0], other, "--out", out), "different models"),
        ((other, "--data", held, "--model", model, "--out", out), "not those of --model"),
        ((files[0], "--out", tmp_path / "out.pt"), ".safetensors"),
        ((files[0], "--classes", "names.txt", "--out", out), "--data"),
    ):
        done = run(*words)
        assert done.exit_code == 2, done.output
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()
