"""What other tools are given: ONNX files that onnxruntime runs, and errors for what they do not have."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.conftest import lively, same_weights, small, small_siglip
from typer.testing import CliRunner

import clipworks
from clipworks.cli import app
from clipworks.core.clip import Clip
from clipworks.core.config import BlockConfig, ResNetConfig
from clipworks.core.tokenizer import Tokens
from clipworks.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def resnet() -> Clip:
    return lively(Clip.from_config(replace(small().config, image=ResNetConfig(64, (1, 1, 1, 1), 4, 2))), 0)


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in (small_siglip, resnet)]


@pytest.mark.parametrize("make", [small, *SLOW])
def test_onnxruntime_gives_the_towers_vectors_for_any_batch(make: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from clipworks.checkpoints import onnx

    clip = make().train()
    done = onnx.export(clip, tmp_path)
    assert max(done.image_difference, done.text_difference) < 1e-4 and clip.training
    clip.eval()
    side = clip.config.image.image_size
    generator = torch.Generator().manual_seed(7)
    for count in (1, 2, 5):
        pixels = torch.rand(count, 3, side, side, generator=generator)
        ids = torch.randint(1, 64, (count, 12), generator=generator)
        ends = torch.randint(12, (count,), generator=generator)
        with torch.no_grad():
            image, text = clip(pixels, Tokens(ids, ends))
        for path, inputs, expected in (
            (done.image, {"pixels": pixels}, image),
            (done.text, {"ids": ids, "ends": ends}, text),
        ):
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            (found,) = session.run(["features"], {name: value.numpy() for name, value in inputs.items()})
            assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-4
    about = json.loads((tmp_path / "clip.json").read_text())
    assert about["image_size"] == side and about["scale"] == pytest.approx(clip.scale.item())
    # The comparison that `export` makes would notice other weights.
    with pytest.raises(CheckpointError, match="differ from torch's"):
        onnx._compare(onnx._Image(lively(make(), seed=9)), done.image, [{"pixels": pixels}])


def test_what_another_tool_has_no_place_for_is_an_error(tmp_path: Path) -> None:
    pruned = replace(small().config.image, blocks=(BlockConfig(1, 16, 128), BlockConfig(2, 16, 128)))
    clips = {
        "no ResNet": (resnet(), "transformers"),
        "blocks of the image tower differ": (
            Clip.from_config(replace(small().config, image=pruned)),
            "transformers",
        ),
        "or their heads": (Clip.from_config(replace(small().config, image=pruned)), "open_clip"),
        "timm": (small_siglip(), "open_clip"),
        "one activation": (
            Clip.from_config(replace(small().config, image=replace(small().config.image, activation="gelu"))),
            "open_clip",
        ),
    }
    for says, (clip, tool) in clips.items():
        write = clip.save_pretrained_hf if tool == "transformers" else clip.save_open_clip
        with pytest.raises(CheckpointError, match=says):
            write(tmp_path / "out")


@pytest.mark.parametrize("make", [small, resnet])
def test_open_clips_folder_comes_back(make: Any, tmp_path: Path) -> None:
    clip = make()
    back = clipworks.load(clip.save_open_clip(tmp_path / "model"), tokenizer=False)
    assert (
        same_weights(back, clip)
        and back.config.image == clip.config.image
        and back.config.text == clip.config.text
    )


SCRIPT = """
import json, sys, torch, open_clip
from safetensors.torch import load_file
folder, inputs = sys.argv[1:]
model = open_clip.create_model(f"local-dir:{folder}").eval()
given = load_file(inputs)
mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.visual.image_mean, model.visual.image_std))
with torch.no_grad():
    image = model.encode_image((given["pixels"] - mean) / std, normalize=True)
    text = model.encode_text(given["ids"], normalize=True)
print(json.dumps([float((image - given["image"]).abs().max()), float((text - given["text"]).abs().max())]))
"""


@pytest.mark.peers
@pytest.mark.parametrize("make", [small, resnet])
def test_open_clip_loads_what_is_written_for_it_and_agrees(make: Any, tmp_path: Path) -> None:
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment of the peers: make peers")
    from safetensors.torch import save_file

    clip = make()
    folder = clip.save_open_clip(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    side = clip.config.image.image_size
    pixels = torch.rand(2, 3, side, side, generator=generator)
    ids = torch.randint(1, 63, (3, 12), generator=generator)
    ids[:, 5] = 63
    with torch.no_grad():
        image, text = clip(pixels, Tokens(ids, torch.full((3,), 5)))
    save_file({"pixels": pixels, "ids": ids, "image": image, "text": text}, tmp_path / "inputs.safetensors")
    command = [str(python), "-c", SCRIPT, str(folder), str(tmp_path / "inputs.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1])) < 1e-5


def test_the_command_writes_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipworks.checkpoints import onnx

    def export(clip: Clip, folder: Path) -> onnx.Exported:  # the test above runs the real one
        return onnx.Exported(folder / "image.onnx", folder / "text.onnx", 1e-7, 2e-7)

    monkeypatch.setattr(onnx, "export", export)
    model = small().save(tmp_path / "model")
    places = {kind: tmp_path / kind for kind in ("onnx", "transformers", "open-clip", "folder")}
    options = [word for kind, place in places.items() for word in (f"--{kind}", str(place))]
    done = CliRunner().invoke(app, ["export", str(model), *options, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["difference"] == 2e-7 and said["onnx"] == str(places["onnx"])
    for kind in ("transformers", "open-clip", "folder"):
        assert same_weights(clipworks.load(places[kind], tokenizer=False), small())


def test_the_command_turns_a_bare_file_into_a_folder_only_with_what_it_does_not_say(
    bare: Any, tmp_path: Path
) -> None:
    arguments = ["export", str(bare()), "--folder", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert (
        done.exit_code == 2
        and "does not say its activation" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    done = CliRunner().invoke(app, ["export", str(bare())])
    assert done.exit_code == 2 and "nothing to write" in done.stderr
