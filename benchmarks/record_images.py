"""Records what open_clip's own preprocessing makes of 200 odd pictures, for tests/core/test_images.py.

open_clip builds on torchvision, which cannot be installed beside every torch. Its transforms need
none of torchvision's compiled operators, so this script loads them from unpacked wheels:

    pip download --no-deps --dest wheels "torchvision==0.28.0" "open_clip_torch==3.3.0"
    for wheel in wheels/*.whl; do unzip -q -o "$wheel" -d wheels/unpacked; done
    PYTHONPATH=. python benchmarks/record_images.py wheels/unpacked

What is kept of each picture is the beginning of the SHA-256 of its bytes (3, n, n). Some answers
depend on the release of Pillow, which has changed the order of the two passes of a resize; each
release that the script is run with adds its own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import PIL
from tests.core.hostile import odd_picture

RECORD = Path(__file__).resolve().parent.parent / "tests" / "core" / "recorded" / "images.json"
COUNT = 200
SETTINGS: tuple[dict[str, Any], ...] = (
    {"image_size": 224, "resize": "shortest", "interpolation": "bicubic"},
    {"image_size": 64, "resize": "squash", "interpolation": "bicubic"},
    {"image_size": 37, "resize": "shortest", "interpolation": "bicubic"},
    {"image_size": 96, "resize": "longest", "interpolation": "bicubic"},
    {"image_size": 48, "resize": "shortest", "interpolation": "bilinear"},
)


def load_open_clip(unpacked: Path) -> Any:
    """open_clip's module of transforms, without running either package's own start."""
    for name in ("torchvision", "open_clip"):
        package = types.ModuleType(name)
        package.__path__ = [str(unpacked / name)]
        sys.modules[name] = package
    sys.modules["torchvision"].extension = types.SimpleNamespace(_HAS_OPS=False)  # type: ignore[attr-defined]
    return importlib.import_module("open_clip.transform")


def record(transform: Any) -> list[str | None]:
    """One digest a picture; None where the reference itself fails (a side rounded to nothing)."""
    pipelines = []
    for settings in SETTINGS:
        composed = transform.image_transform(
            settings["image_size"],
            is_train=False,
            resize_mode=settings["resize"],
            interpolation=settings["interpolation"],
        )
        composed.transforms = composed.transforms[:-1]  # the mean and deviation are the tower's
        pipelines.append(composed)
    digests: list[str | None] = []
    for seed in range(COUNT):
        try:
            pixels = pipelines[seed % len(SETTINGS)](odd_picture(seed))
        except ValueError:
            digests.append(None)
            continue
        digests.append(hashlib.sha256((pixels * 255).round().byte().numpy().tobytes()).hexdigest()[:16])
    return digests


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("unpacked", type=Path, help="the folder that holds torchvision/ and open_clip/")
    folder = parser.parse_args().unpacked
    warnings.simplefilter("ignore")  # Pillow's, on palettes with transparency
    transform = load_open_clip(folder)
    digests = record(transform)
    answers = json.loads(RECORD.read_text())["digests"] if RECORD.exists() else {}
    answer = {
        "peers": sorted(path.name.removesuffix(".dist-info") for path in folder.glob("*.dist-info")),
        "settings": SETTINGS,
        "digests": {**answers, f"Pillow {PIL.__version__}": digests},
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(answer, indent=None, separators=(",", ":")) + "\n")
    print(f"{RECORD}: {COUNT} pictures, {digests.count(None)} refused by the reference")


if __name__ == "__main__":
    main()
