"""Nothing that a file brings along is run: code is planted in every kind of file, and a trace would show it.

What is damaged is one `CheckpointError` that names the file.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.conftest import edit, openai_weights, same_weights, small
from torch import nn

import clipworks
from clipworks.checkpoints import archive, files
from clipworks.errors import CheckpointError

TOLD: dict[str, Any] = {"activation": "quick_gelu", "statistics": "clip", "heads": (2, 2), "tokenizer": False}


class Evil:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@contextmanager
def quiet() -> Iterator[None]:
    """Newer releases of torch warn that TorchScript is on its way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def scripted() -> torch.jit.ScriptModule:
    """A TorchScript module with the names of a small CLIP in OpenAI's layout."""
    weights = openai_weights(small())
    root = nn.Module()
    for name, tensor in weights.items():
        *way, leaf = name.split(".")
        inside = root
        for step in way:
            if not hasattr(inside, step):
                inside.add_module(step, nn.Module())
            inside = getattr(inside, step)
        inside.register_parameter(leaf, nn.Parameter(tensor.clone()))
    root.register_buffer("input_resolution", torch.tensor(32))
    with quiet():
        return torch.jit.script(root)


def save_scripted(path: Path) -> Path:
    with quiet():
        torch.jit.save(scripted(), str(path))
    return path


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **more: bytes
) -> Path:
    """A copy of a zip, its members changed (None leaves one out) and others added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
        root = old.namelist()[0].partition("/")[0]
        for name, data in more.items():
            new.writestr(f"{root}/{name.replace('__', '/')}", data)
    return target


def test_a_torchscript_archive_is_read_as_what_torch_reads_from_it(tmp_path: Path) -> None:
    path = save_scripted(tmp_path / "model.pt")
    weights, activation = archive.read(path)
    with quiet():
        theirs = torch.jit.load(str(path)).state_dict()
    assert weights.keys() == theirs.keys() and activation is None
    assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.items())
    assert same_weights(clipworks.load(path, **TOLD), small())


def test_an_archive_whose_classes_name_its_activation_says_it(tmp_path: Path) -> None:
    class QuickGELU(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(1.702 * x)

    module = nn.Sequential(nn.Linear(2, 2), QuickGELU())
    with quiet():
        torch.jit.save(torch.jit.trace(module, torch.zeros(1, 2)), str(tmp_path / "a.pt"))
        torch.jit.save(
            torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.GELU()), torch.zeros(1, 2)),
            str(tmp_path / "b.pt"),
        )
    assert archive.read(tmp_path / "a.pt")[1] == "quick_gelu"
    assert archive.read(tmp_path / "b.pt")[1] == "gelu"


def test_half_precision_and_shared_storages_of_an_archive_are_read(tmp_path: Path) -> None:
    module = nn.Linear(4, 4).half()
    module.register_buffer("view", module.weight.detach()[1:, ::2])
    with quiet():
        torch.jit.save(torch.jit.script(module), str(tmp_path / "half.pt"))
    weights, _ = archive.read(tmp_path / "half.pt")
    assert weights["weight"].dtype == torch.float16
    assert torch.equal(weights["view"], module.weight.detach()[1:, ::2])


def test_the_programs_of_an_archive_are_not_looked_at(tmp_path: Path, trace: Path) -> None:
    path = save_scripted(tmp_path / "model.pt")

    def spoil(name: str, data: bytes) -> bytes:
        return b"import os\nos.system('touch %s')\n" % bytes(trace) if "/code/" in name else data

    evil = rewritten(path, tmp_path / "evil.pt", spoil, code____init__=b"raise SystemExit")
    assert same_weights(clipworks.load(evil, **TOLD), small())
    assert not trace.exists()


def planted(kind: str, folder: Path, trace: Path) -> Path:
    """A file or folder with code in it, of which nothing may run."""
    evil, weights = Evil(trace), openai_weights(small())
    folder.mkdir(exist_ok=True)
    if kind == "a pickle":
        (folder / "a.pt").write_bytes(
            pickle.dumps({"state_dict": weights["logit_scale"].item(), "evil": evil})
        )
        return folder / "a.pt"
    if kind == "a file of torch":
        torch.save({"state_dict": weights, "evil": evil}, folder / "a.pt")
        return folder / "a.pt"
    if kind == "a file of torch in the old format":
        torch.save(
            {"state_dict": weights, "evil": evil}, folder / "a.pth", _use_new_zipfile_serialization=False
        )
        return folder / "a.pth"
    if kind == "a pickle named safetensors":
        (folder / "a.safetensors").write_bytes(pickle.dumps(evil))
        return folder / "a.safetensors"
    if kind == "the module tree of an archive":
        path = save_scripted(folder / "whole.pt")
        code = pickle.dumps(evil, protocol=2)
        return rewritten(
            path, folder / "a.pt", lambda name, data: code if name.endswith("/data.pkl") else data
        )
    if kind == "a shard":
        small().save_pretrained_hf(folder)
        (folder / "model.safetensors").unlink()
        torch.save({"logit_scale": torch.zeros(()), "evil": evil}, folder / "part.bin")
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"logit_scale": "part.bin"}}')
        return folder
    raise AssertionError(kind)


KINDS = (
    "a pickle",
    "a file of torch",
    "a file of torch in the old format",
    "a pickle named safetensors",
    "the module tree of an archive",
    "a shard",
)


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_file_of_weights_does_not_run(kind: str, tmp_path: Path, trace: Path) -> None:
    path = planted(kind, tmp_path / "model", trace)
    with pytest.raises(CheckpointError) as caught:
        clipworks.load(path, **TOLD)
    assert not trace.exists()
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_planted_code_would_run_if_it_were_unpickled(tmp_path: Path, trace: Path) -> None:
    """The tests above can fail."""
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()


@pytest.mark.parametrize(
    "call",
    [
        ("builtins", "eval"),
        ("os", "system"),
        ("torch", "load"),
        ("torch.jit._pickle", "os"),
        ("collections", "namedtuple"),
    ],
)
def test_the_archives_unpickler_looks_up_nothing_but_tensors(call: tuple[str, str], tmp_path: Path) -> None:
    path = save_scripted(tmp_path / "whole.pt")
    module, name = call
    code = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(X\x01\x00\x00\x001tR."
    evil = rewritten(
        path, tmp_path / "a.pt", lambda member, data: code if member.endswith("/data.pkl") else data
    )
    with pytest.raises(CheckpointError, match="asks for"):
        archive.read(evil)


@pytest.mark.parametrize("kind", ["transformers", "open_clip", "own"])
def test_programs_beside_the_weights_are_not_run(
    kind: str, tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {
        "transformers": small().save_pretrained_hf,
        "open_clip": small().save_open_clip,
        "own": small().save,
    }[kind]
    folder = write(tmp_path / "model")
    code = f"import pathlib; pathlib.Path({str(trace)!r}).touch()\n"
    for name in (
        "modeling.py",
        "configuration.py",
        "__init__.py",
        "tokenization.py",
        "conftest.py",
        "setup.py",
    ):
        (folder / name).write_text(code)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Evil(trace)))
    if kind == "transformers":
        auto = {
            "AutoModel": "modeling.Model",
            "AutoConfig": "configuration.Config",
            "AutoTokenizer": "tokenization.Tokenizer",
        }
        edit(folder / "config.json", {"auto_map": auto, "trust_remote_code": True})
        (folder / "tokenizer_config.json").write_text("{}")
        edit(folder / "tokenizer_config.json", {"auto_map": auto, "tokenizer_class": "Tokenizer"})
        edit(folder / "preprocessor_config.json", {"auto_map": auto})
    monkeypatch.chdir(folder)
    assert same_weights(clipworks.load(folder, tokenizer=False), small())
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/part.safetensors", "part.py"])
def test_an_index_cannot_point_out_of_its_folder(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    edit(index, {"weight_map": {"logit_scale": name}})
    with pytest.raises(CheckpointError, match="same folder"):
        files.read(index)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["torch", "old", "safetensors", "torchscript"])
def test_a_truncated_file_is_one_clear_error(kind: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    weights = openai_weights(small())
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    elif kind == "torchscript":
        save_scripted(path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "torch")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError) as caught:
        clipworks.load(path, **TOLD)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_archive_that_lies_about_its_numbers_is_an_error(tmp_path: Path) -> None:
    path = save_scripted(tmp_path / "whole.pt")

    def shorter(name: str, data: bytes) -> bytes:
        return data[:-4] if "/data/" in name else data

    for number, change in enumerate(
        (
            shorter,
            lambda name, data: None if "/data/0" in name else data,
            lambda name, data: None if name.endswith("data.pkl") else data,
        )
    ):
        evil = rewritten(path, tmp_path / f"{number}.pt", change)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=f"{number}.pt"):
            archive.read(evil)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = save_scripted(tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match="damaged"):
        archive.read(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": 1}, "holds no weights"),
        ([torch.zeros(1)], "found list"),
        ({"state_dict": {"a": torch.zeros(1), "b": 3}}, "b is int"),
        (torch.zeros(1), "found Tensor"),
        ({"encoder": torch.zeros(1)}, "no layout"),
    ],
)
def test_what_holds_no_clip_says_what_it_holds(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=says):
        clipworks.load(tmp_path / "a.pt", **TOLD)


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict"])
def test_training_checkpoints_are_unwrapped(nest: str, tmp_path: Path) -> None:
    weights = {f"module.{name}": tensor for name, tensor in openai_weights(small()).items()}
    torch.save({"epoch": 7, nest: weights, "optimizer": {"lr": 0.1}}, tmp_path / "epoch_7.pt")
    clip = clipworks.load(tmp_path / "epoch_7.pt", **TOLD)
    assert same_weights(clip, small()) and clip.config.name == "epoch_7"


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_json_that_is_none_is_one_clear_error(text: str, tmp_path: Path) -> None:
    folder = small().save(tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        clipworks.load(folder)


def test_reading_leaves_the_global_generators_alone(bare: Any, untouched_rng: None) -> None:
    clipworks.load(bare(), **TOLD)
