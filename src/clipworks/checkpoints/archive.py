"""TorchScript archives as tensors, without executing them.

OpenAI published its models so. Such a file is a zip: `*/code/` holds programs, `*/data.pkl` the module tree
as a pickle, `*/data/N` the numbers. `torch.jit.load` compiles the programs; here they are not even opened.
The pickle is read by an unpickler that knows three things: how a tensor is put together, ordered
dictionaries, and that any class of the archive itself is a bag of attributes. All else is refused.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.errors import CheckpointError

LARGEST_TREE = 64 * 2**20  # bytes of data.pkl; the largest released model has under one megabyte
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of any shape by dotted name, and the activation that the module tree names, if it does.

    Raises:
        CheckpointError: if the file is damaged, or its pickle asks for more than tensors.
    """
    try:
        with zipfile.ZipFile(path) as file:
            tree, classes = _unpickle(file, path)
    except CheckpointError:
        raise
    except (
        OSError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        *(
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            EOFError,
            RecursionError,
        ),
        *(NotImplementedError, MemoryError, OverflowError),
    ) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(f"{path}: a damaged TorchScript archive ({reason})") from error
    weights = dict(_tensors(tree, "", set()))
    if not weights:
        raise CheckpointError(f"{path}: a TorchScript archive without tensors")
    return weights, _activation(classes)


class _Bag:
    """An object of a class of the archive: its attributes, and nothing that it could do."""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"a module's state is {type(state).__name__}, not a dictionary")
        self.attributes = state


class _Reader(pickle.Unpickler):
    """Unpickles a module tree; whatever it does not know is refused, not looked up."""

    def __init__(self, data: bytes, file: zipfile.ZipFile, root: str, path: Path):
        super().__init__(io.BytesIO(data))
        self.file, self.root, self.path = file, root, path
        self.classes: set[str] = set()
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class or function of the file."""
        if module == "__torch__" or module.startswith("__torch__."):
            self.classes.add(f"{module}.{name}")
            return _Bag
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _rebuild_tensor if name == "_rebuild_tensor_v2" else _first
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            return _first
        if module == "torch" and name in STORAGES:
            return _Storage(name)
        raise CheckpointError(
            f"{self.path}: its pickle asks for {module}.{name}, which is no tensor; not loaded"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of one storage, flat."""
        kind, storage, key, _device, size = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        if key not in self.storages:
            dtype = STORAGES[storage.name]
            info = self.file.getinfo(f"{self.root}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != size * dtype.itemsize:
                raise pickle.UnpicklingError(f"{info.filename} does not hold {size} numbers of {dtype}")
            data = bytearray(self.file.read(info))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


class _Storage:
    """The name of a kind of storage, in place of its class."""

    def __init__(self, name: str):
        self.name = name


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _unpickle(file: zipfile.ZipFile, path: Path) -> tuple[Any, set[str]]:
    trees = [
        info
        for info in file.infolist()
        if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")
    ]
    if len(trees) != 1:
        raise CheckpointError(f"{path}: a TorchScript archive with {len(trees)} data.pkl")
    root = trees[0].filename.removesuffix("data.pkl")
    if trees[0].file_size > LARGEST_TREE:
        raise CheckpointError(f"{path}: its data.pkl of {trees[0].file_size} bytes is no module tree")
    order = f"{root}byteorder"
    if order in file.namelist() and (
        file.getinfo(order).file_size > 16 or file.read(order).strip() != b"little"
    ):
        raise CheckpointError(f"{path}: its numbers are not little-endian, which is not read")
    reader = _Reader(file.read(trees[0]), file, root, path)
    return reader.load(), reader.classes


def _tensors(node: Any, prefix: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a module tree with their dotted names; a module inside itself is left out."""
    if not isinstance(node, _Bag) or id(node) in above:
        return
    for name, value in node.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", above | {id(node)})


def _activation(classes: set[str]) -> str | None:
    names = {name.rpartition(".")[2] for name in classes}
    if "QuickGELU" in names:
        return "quick_gelu"
    return "gelu" if "GELU" in names else None
