"""The engines: each turns a tower into a function of plain tensors that gives its unit vectors.

Every one is made from our own export (`checkpoints.onnx`: the tower as a function) and leaves in its folder
what took time to make. All of them compute on the CPU with as many threads as torch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.checkpoints import onnx
from clipworks.checkpoints.onnx import Kind
from clipworks.core.clip import Clip
from clipworks.encode.engines import places
from clipworks.errors import ConfigError, require

Run = Callable[..., Tensor]
Backend = Callable[[Clip, Kind, Path], Run]


def compiled(clip: Clip, kind: Kind, folder: Path) -> Run:
    """Machine code by `torch.compile`'s compiler, with the weights frozen into it; made ahead of time.

    So it is compiled once for a machine and not once for a process, and no batch size compiles it anew.

    Raises:
        ConfigError: without a C++ compiler.
    """
    if places.compiler() is None:
        raise ConfigError("the engine compile needs a C++ compiler, and none is there (CXX names one)")

    def make(scratch: Path) -> None:
        inputs = onnx.examples(clip, kind, 3, torch.Generator().manual_seed(0))
        function = onnx.as_function(clip, kind).eval()
        with _quiet("torch"):
            exported = torch.export.export(
                function, tuple(inputs.values()), dynamic_shapes=onnx.free_sizes(clip, kind)
            )
            torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(scratch / "model.pt2"),
                inductor_configs={"freezing": True},
            )

    path = places.kept(folder / f"compiled-{places.machine_mark()}", make) / "model.pt2"
    return torch._inductor.aoti_load_package(str(path))


def onnxruntime(clip: Clip, kind: Kind, folder: Path) -> Run:
    """ONNX Runtime.

    Raises:
        MissingExtra: without onnxruntime, onnx or onnxscript.
    """
    return _session(_onnx_file(clip, kind, folder, "onnxruntime"))


def onnxruntime_int8(clip: Clip, kind: Kind, folder: Path) -> Run:
    """ONNX Runtime on weights in 8 bits, a scale for each output, and inputs that are rounded as they come.

    Raises:
        MissingExtra: without onnxruntime, onnx or onnxscript.
    """
    source = _onnx_file(clip, kind, folder, "onnxruntime")

    def make(scratch: Path) -> None:
        quantization = require(
            "onnxruntime.quantization", extra="export", purpose="the engine onnxruntime-int8"
        )
        with _quiet(None):
            quantization.quantize_dynamic(
                source,
                scratch / "model.onnx",
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                use_external_data_format=(source.parent / "model.onnx.data").exists(),
            )

    return _session(places.kept(folder / "int8", make) / "model.onnx")


def openvino(clip: Clip, kind: Kind, folder: Path) -> Run:
    """OpenVINO, the batch spread over as many streams as it finds best: they need not wait for each other.

    Raises:
        MissingExtra: without openvino, onnx or onnxscript.
    """
    library = require("openvino", extra="export", purpose="the engine openvino")
    path = _onnx_file(clip, kind, folder, "openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = _core(library).compile_model(path, "CPU", settings)
    streams = int(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
    queue = library.AsyncInferQueue(model, streams)
    alone, width = threading.Lock(), clip.width

    def run(*inputs: Tensor) -> Tensor:
        rows = len(inputs[0])
        found = torch.empty(rows, width)
        step = -(-rows // streams)

        def take(request: Any, start: int) -> None:
            found[start : start + step] = torch.from_numpy(request.get_output_tensor().data)

        with alone:
            queue.set_callback(take)
            for start in range(0, rows, step):
                queue.start_async([one[start : start + step].numpy() for one in inputs], start)
            queue.wait_all()
        return found

    return run


_CORES: list[Any] = []
_ONE_AT_A_TIME = threading.Lock()


def _core(library: Any) -> Any:
    """OpenVINO's `Core` of this process, which lives as long as it does.

    Each Core puts a stack for signal handlers in place and takes it away when it dies; those that do not die
    in reverse order leave one that is no longer there, and the next signal with a handler, a SIGTERM to the
    service, is a segmentation fault.
    """
    with _ONE_AT_A_TIME:
        if not _CORES:
            _CORES.append(library.Core())
        return _CORES[0]


BACKENDS: dict[str, Backend] = {
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "onnxruntime-int8": onnxruntime_int8,
}


def _onnx_file(clip: Clip, kind: Kind, folder: Path, name: str) -> Path:
    for module in (name, "onnx", "onnxscript"):
        require(module, extra="export", purpose=f"the engine {name}")
    made = places.kept(folder / "onnx", lambda new: onnx.write_tower(clip, kind, new / "model.onnx"))
    return made / "model.onnx"


def _session(path: Path) -> Run:
    import onnxruntime as library

    options: Any = library.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        fed = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["features"], fed)[0])

    return run


@contextlib.contextmanager
def _quiet(name: str | None) -> Iterator[None]:
    """Let a library keep its remarks to itself."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
