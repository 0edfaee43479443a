"""What all tests share: the smallest CLIP, real data where there is some, quiet and repeatable conditions.

It also keeps the register's evidence. A test marked `contract("coop")` or `checkpoint("coop")` speaks for
that paper; with `--record-evidence` (`make contracts`) what passed is written to
`src/clipworks/papers/evidence/coop.json` together with the fingerprint of the method it ran on.
"""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is loaded: two test workers on two cores, and the same sums on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
from hypothesis import HealthCheck, settings

from clipworks.papers import fingerprint, register

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "src" / "clipworks" / "papers" / "evidence"
KINDS = ("contract", "checkpoint")

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def shelf() -> Path:
    """The folder of real data: CLIPWORKS_DATA, or shared/data beside the repository; skips without one."""
    named = os.environ.get("CLIPWORKS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder} (CLIPWORKS_DATA names the folder)")
    return folder


@pytest.fixture(scope="session")
def torch() -> Any:
    """The torch module, on one thread."""
    import torch

    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[..., Any]:
    """A factory of the smallest CLIP that can show a property: 2 layers, width 32, D = 16, 32-pixel pictures.

    `tiny_clip(seed=0, tokenizer=None, image={...}, text={...}, **config)`: what is named replaces the
    default of the fields of `VisionConfig`, `TextConfig` and `Config`.
    """

    def build(
        seed: int = 0,
        *,
        tokenizer: Any = None,
        image: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        **config: Any,
    ) -> Any:
        from clipworks.core.clip import Clip
        from clipworks.core.config import Config, TextConfig, VisionConfig, uniform_blocks

        blocks = uniform_blocks(depth=2, width=32, heads=2)
        vision: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "blocks": blocks}
        words: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 32, "blocks": blocks}
        whole: dict[str, Any] = {"width": 16, "name": "tiny"}
        return Clip.from_config(
            Config(
                image=VisionConfig(**(vision | (image or {}))),
                text=TextConfig(**(words | (text or {}))),
                **(whole | config),
            ),
            tokenizer,
            seed=seed,
        )

    return build


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Fails the test if the code in it drew from, or seeded, a global generator of Python, numpy or torch."""
    import numpy
    import torch

    def states() -> tuple[Any, ...]:
        kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002
        return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()

    before = states()
    yield
    for name, old, new in zip(("random", "numpy", "numpy", "numpy", "torch"), before, states(), strict=True):
        assert old == new, f"the global generator of {name} was touched"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-evidence",
        action="store_true",
        help="write what contract and checkpoint tests showed for the register",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--record-evidence"):
        return
    if config.getoption("keyword"):
        raise pytest.UsageError("--record-evidence with -k would record a part of a contract as the whole")
    if not hasattr(config, "workerinput"):  # the one process that sees every worker's reports
        config.pluginmanager.register(Recorder(EVIDENCE), "evidence")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell every marked test's report which papers it speaks for; user properties reach the controller."""
    for item in items:
        if "shelf" in getattr(item, "fixturenames", ()):
            item.add_marker("shelf")
        for kind in KINDS:
            item.user_properties += [(kind, slug) for mark in item.iter_markers(kind) for slug in mark.args]


class Recorder:
    """Collects outcomes by paper, and writes one file a paper when the run is over.

    A paper keeps evidence of a kind only if at least one of its tests passed and none failed or errored;
    one failure withdraws what an earlier run had recorded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.passed: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.failed: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for kind, slug in report.user_properties:
            if kind not in KINDS:
                continue
            name = report.nodeid.partition("[")[0]
            if report.failed:
                self.failed[slug, kind].add(name)
            elif report.when == "call" and report.passed:
                self.passed[slug, kind].add(name)

    def pytest_sessionfinish(self) -> None:
        methods = {paper.slug: paper.places.package / paper.method for paper in register() if paper.method}
        for slug in sorted({slug for slug, _ in [*self.passed, *self.failed]}):
            if slug not in methods:
                raise pytest.UsageError(
                    f"a test is marked for {slug!r}, but the register names no method for it"
                )
            write_evidence(self.folder / f"{slug}.json", fingerprint(methods[slug]), self._kinds(slug))

    def _kinds(self, slug: str) -> dict[str, list[str]]:
        ran = [kind for kind in KINDS if (slug, kind) in self.passed or (slug, kind) in self.failed]
        return {
            kind: [] if self.failed.get((slug, kind)) else sorted(self.passed.get((slug, kind), ()))
            for kind in ran
        }


def write_evidence(path: Path, source: str, kinds: dict[str, list[str]]) -> None:
    """Merge what this run showed into a paper's file; what was shown of another state of the method goes."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("source") != source:
        kept = {}
    shown = {kind: kinds.get(kind, kept.get(kind, [])) for kind in KINDS}
    if any(shown.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"source": source, **shown}, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)
