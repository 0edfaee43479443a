"""Engines: each gives the tower's vectors or is refused; `auto` measures once and remembers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.encode import engines
from clipworks.encode.bulk import encode_images, encode_texts
from clipworks.encode.engines import backends, loss, places, timing
from clipworks.encode.packed import share_computed
from clipworks.errors import ConfigError, MissingExtra, ShapeError

LIBRARIES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "onnxruntime-int8": "onnxruntime"}
TEXTS = ["a dog", "a dog on the beach in summer", "", "two cats", "a photo of a red bus in the rain " * 4]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def kept(stored: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that the tests share: a tower is exported once."""
    monkeypatch.setenv(places.CACHE, str(stored))
    return stored


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(places.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def clip(tiny_clip: Any) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


def available(name: str) -> None:
    for module in (LIBRARIES[name], "onnx", "onnxscript"):
        pytest.importorskip(module)


def exact(clip: Any, kind: str, calls: list[str] | None = None) -> Callable[..., Any]:
    """A backend that is the tower itself."""
    tower = engines.onnx.as_function(clip, kind)  # type: ignore[arg-type]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(kind)
        with torch.no_grad():
            return tower(*inputs)

    return run


def pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_gives_the_towers_vectors_for_any_batch(clip: Any, kept: Path, name: Any) -> None:
    available(name)
    for count in (1, 5):
        given = pixels(count)
        found = encode_images(clip, given, engine=name, batch_size=3)
        assert found.engine == name
        assert torch.allclose(found.features, encode_images(clip, given).features, atol=1e-4)
        assert torch.allclose(
            clip.embed_images(given.float() / 255, engine=name), clip.embed_images(given), atol=1e-4
        )
        texts = TEXTS[:count]
        assert torch.allclose(encode_texts(clip, texts, engine=name), encode_texts(clip, texts), atol=1e-4)


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from clipworks import load
from clipworks.encode.engines import backends

signal.signal(signal.SIGTERM, lambda number, frame: print("asked", flush=True))
clip, folder = load(sys.argv[1]), Path(sys.argv[2])
first = backends.openvino(clip, "text", folder)
second = backends.openvino(clip, "text", folder)
del first
del second
os.kill(os.getpid(), signal.SIGTERM)
print("goes on")
"""


def test_a_signal_reaches_its_handler_when_openvino_engines_are_gone(clip: Any, tmp_path: Path) -> None:
    available("openvino")
    clip.save(tmp_path / "clip")
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path / "clip"), str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "asked\ngoes on\n"), done.stderr


@pytest.mark.slow
def test_compiled_towers_give_the_towers_vectors_and_are_compiled_once(
    clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if places.compiler() is None:
        pytest.skip("no C++ compiler")
    given = pixels(5)
    found = clip.embed_images(given, engine="compile", batch_size=4)
    assert torch.allclose(found, clip.embed_images(given), atol=1e-4)
    assert torch.allclose(clip.embed_texts(TEXTS, engine="compile"), clip.embed_texts(TEXTS), atol=1e-4)
    engines._made.clear()
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", None)
    assert torch.equal(clip.embed_images(given, engine="compile", batch_size=4), found)


def test_texts_of_many_lengths_come_back_in_their_order(
    clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "onnxruntime", lambda clip, kind, _: exact(clip, kind))
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(1, 77, (60,), generator=generator)
    tokens = Tokens(torch.randint(49408, (60, 77), generator=generator), ends)
    expected = encode_texts(clip, tokens)
    for positions in (1, 100, 4096):
        found = encode_texts(clip, tokens, engine="onnxruntime", positions=positions)
        assert torch.allclose(found, expected, atol=1e-5)


def test_an_engine_with_wrong_numbers_is_refused_before_it_is_used(
    clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def wrong(clip: Any, kind: Any, folder: Path) -> Any:
        right = exact(clip, kind)

        def run(*inputs: torch.Tensor) -> torch.Tensor:
            asked.append(len(inputs[0]))
            return right(*inputs) + 2e-4

        return run

    for name in ("compile", "onnxruntime", "openvino"):
        monkeypatch.setitem(backends.BACKENDS, name, wrong)
    with pytest.raises(ConfigError, match=r"openvino gives other image vectors .* 2\.0e-04"):
        encode_images(clip, pixels(7), engine="openvino", batch_size=7)
    assert asked and 7 not in asked
    with pytest.raises(ConfigError, match="other text vectors"):
        encode_texts(clip, TEXTS, engine="onnxruntime")
    found = engines.ready(clip, "image", "auto")
    assert found.name == "torch" and set(found.timing.per_second) == {"torch"}
    assert all("differ by 2.0e-04" in why for why in found.timing.left_out.values())
    assert set(found.timing.left_out) == {"compile", "onnxruntime", "openvino"}


def test_nan_is_not_within_the_tolerance(clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(clip: Any, kind: Any, folder: Path) -> Any:
        return lambda *inputs: torch.full((len(inputs[0]), clip.width), float("nan"))

    monkeypatch.setitem(backends.BACKENDS, "openvino", broken)
    with pytest.raises(ConfigError, match="by nan on a probe"):
        encode_images(clip, pixels(1), engine="openvino")


def spied(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float]) -> list[str]:
    """Engines that are the tower, and a clock that says these speeds; what was timed is listed."""
    timed: list[str] = []

    def measure(clip: Any, kind: str, size: int, calls: Any) -> dict[str, float]:
        timed.append(f"{kind} {size}")
        for call in calls.values():
            call(timing.sample(clip, kind, 2))  # type: ignore[arg-type]
        return {name: speed for name, speed in speeds.items() if name in calls}

    for name in ("compile", "onnxruntime", "openvino"):
        monkeypatch.setitem(backends.BACKENDS, name, lambda clip, kind, _: exact(clip, kind))
    monkeypatch.setattr(timing, "measure", measure)
    return timed


def test_auto_takes_the_fastest_and_times_once_for_a_model_a_size_and_a_tower(
    clip: Any, tiny_clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = spied(monkeypatch, {"torch": 10.0, "compile": 20.0, "onnxruntime": 30.0, "openvino": 25.0})
    given = pixels(3)
    found = encode_images(clip, given, engine="auto")
    assert found.engine == "onnxruntime"
    assert torch.allclose(found.features, clip.embed_images(given), atol=1e-4)
    assert timed == ["image 32"]
    engines._made.clear()  # as another process finds it
    assert encode_images(tiny_clip(tokenizer=ClipTokenizer()), given, engine="auto").engine == "onnxruntime"
    assert timed == ["image 32"]
    encode_images(clip, given, engine="auto", batch_size=1)
    encode_texts(clip, TEXTS, engine="auto")
    encode_images(tiny_clip(seed=1), given, engine="auto")
    assert timed == ["image 32", "image 1", "text 1", "image 32"]
    said = str(engines.ready(clip, "image", "auto"))
    assert said.startswith("engine for pictures: onnxruntime, chosen by speed (onnxruntime 30.0/s, openvino")
    files = list(fresh.glob("engines/*/auto-*.json"))
    assert len(files) == 4 and all(json.loads(one.read_text())["machine"] for one in files)


def test_a_damaged_memory_is_measured_anew(clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = spied(monkeypatch, {"torch": 10.0, "openvino": 25.0})
    engines.ready(clip, "image", "auto")
    path = timing.file(clip, "image", 32)
    for damage in ("", "[]", '{"size": 32}', '{"size": 32, "per_second": {"torch": 0}, "left_out": {}}'):
        path.write_text(damage)
        assert engines.ready(clip, "image", "auto").name == "openvino"
    assert len(timed) == 5


def test_auto_does_without_an_engine_that_is_gone_since(
    clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spied(monkeypatch, {"torch": 10.0, "compile": 5.0, "openvino": 25.0})
    assert engines.ready(clip, "image", "auto").name == "openvino"
    engines._made.clear()

    def gone(*_: Any) -> Any:
        raise MissingExtra("openvino is gone")

    monkeypatch.setitem(backends.BACKENDS, "openvino", gone)
    found = engines.ready(clip, "image", "auto")
    assert found.name == "torch" and found.timing.left_out["openvino"] == "openvino is gone"


def test_beginnings_in_common_count_for_the_tower_that_lays_them_once() -> None:
    found = timing.Timing(32, {"torch": 10.0, "openvino": 15.0})
    assert found.ranked(1.0) == ["openvino", "torch"] and found.ranked(0.5) == ["torch", "openvino"]
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 9]])
    naive = len({tuple(row[: k + 1]) for row in ids.tolist() for k in range(4)}) / 12
    assert share_computed(Tokens(ids, torch.full((3,), 3))) == pytest.approx(naive)


def test_auto_can_choose_packed_texts(clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spied(monkeypatch, {"torch": 10.0, "openvino": 15.0})
    alike = clip.tokenizer([f"a photo of a very good old {name}" for name in ("dog", "cat", "bus", "tree")])
    apart = clip.tokenizer(["dog on a beach", "cats in a box", "the red bus", "many old trees"])
    assert engines.ready(clip, "text", "auto", tokens=alike).name == "torch"
    assert engines.ready(clip, "text", "auto", tokens=apart).name == "openvino"


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    path, wrong = tmp_path / "deep" / "memory.json", []
    places.remember(path, {"size": -1, "padding": ""})

    def write(number: int) -> None:
        for _ in range(40):
            places.remember(path, {"size": number, "padding": "x" * 5000 * (number + 1)})
            if places.remembered(path) is None:
                wrong.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong and list(path.parent.iterdir()) == [path]
    made = [0]

    def make(scratch: Path) -> None:
        made[0] += 1
        (scratch / "model").write_text("whole")
        if made[0] == 1:  # another process is faster
            places.kept(tmp_path / "engine", make)

    assert (places.kept(tmp_path / "engine", make) / "model").read_text() == "whole" and made == [2]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["deep", "engine"]


def test_a_changed_weight_gets_an_engine_of_its_own(
    clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "openvino", lambda clip, kind, _: exact(clip, kind))
    before = places.folder(clip, "image")
    engines.ready(clip, "image", "openvino")
    with torch.no_grad():
        clip.image.projection.weight.mul_(0.5)
    assert places.folder(clip, "image") != before and not engines._towers(clip, "image")


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_loss_of_int8_is_what_a_plain_computation_says(clip: Any, kept: Path, kind: Any) -> None:
    available("onnxruntime-int8")
    engine = engines.ready(clip, kind, "onnxruntime-int8")
    told = engine.loss
    shown = loss.pictures(32)
    captions = [f"a photo of {name}." for name in loss.names()]
    image, text = clip.embed_images(shown), clip.embed_texts(captions)
    rounded = engine.images(shown) if kind == "image" else engine.texts(clip.tokenizer(captions))
    cosines = F.cosine_similarity(rounded, image if kind == "image" else text)
    assert told.mean_cosine == pytest.approx(float(cosines.mean()), abs=1e-3)
    assert told.min_cosine == pytest.approx(float(cosines.min()), abs=5e-3)
    assert 0.9 < told.min_cosine < 1 - 1e-6
    answers = (
        (image @ text.T).argmax(1),
        ((rounded @ text.T) if kind == "image" else image @ rounded.T).argmax(1),
    )
    assert told.exact == pytest.approx(float((answers[0] == torch.arange(32)).float().mean()), abs=0.04)
    assert told.agreement == pytest.approx(float((answers[0] == answers[1]).float().mean()), abs=0.1)
    assert f"{told.mean_cosine:.4f}" in str(engine) and engine.record()["loss"] == vars(told)
    # The vectors are close and not the exact ones, and a second look finds the loss in the cache.
    assert not torch.allclose(rounded, image if kind == "image" else text, atol=1e-6)
    engines._made.clear()
    assert engines.ready(clip, kind, "onnxruntime-int8").loss == told


def test_what_cannot_work_is_one_clear_error(clip: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean openvino"):
        encode_images(clip, pixels(1), engine="openvin")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision 'bf16' is for the engine torch"):
        encode_texts(clip, TEXTS, engine="openvino", precision="bf16")
    monkeypatch.setattr(places, "compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        encode_images(clip, pixels(1), engine="compile")

    def fails(*_: Any) -> Any:
        raise RuntimeError("Unsupported operator\nand a long story")

    monkeypatch.setitem(backends.BACKENDS, "onnxruntime", fails)
    with pytest.raises(
        ConfigError, match=r"cannot run this image tower \(RuntimeError: Unsupported operator\)"
    ):
        encode_images(clip, pixels(1), engine="onnxruntime")
    monkeypatch.setitem(backends.BACKENDS, "openvino", lambda clip, kind, _: exact(clip, kind))
    larger = torch.rand(1, 3, 64, 64)
    with pytest.raises(ShapeError, match=r"takes pixels \(B, 3, 32, 32\)"):
        encode_images(clip, larger, engine="openvino")
    monkeypatch.setattr(timing, "measure", lambda *_: {"torch": 1.0, "openvino": 9.0})
    assert torch.allclose(encode_images(clip, larger, engine="auto").features, clip.embed_images(larger))


def test_measured_speeds_are_those_of_the_calls(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def takes(seconds: float) -> Callable[[Any], None]:
        def call(given: Any) -> None:
            clock[0] += seconds * len(given)

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    calls = {"torch": takes(0.01), "openvino": takes(0.005), "compile": takes(0.1)}
    found = timing.measure(clip, "image", 32, calls)
    assert found == pytest.approx({"torch": 100, "openvino": 200, "compile": 10})
    assert timing.measure(clip, "text", 8, {"torch": takes(5.0)}) == pytest.approx({"torch": 0.2})
