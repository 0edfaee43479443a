"""`clipworks demo`: the main job on real photographs that come with installed packages.

The photographs, the labels and the queries below were chosen before any model was trained, and are not to
be changed to suit one.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipworks.cli import console
from clipworks.cli.console import DeviceOption, JsonOption, ModelOption
from clipworks.errors import ConfigError, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipworks.core.clip import Clip
    from clipworks.search import Hit, Index

SCIKIT_IMAGE, SCIKIT_LEARN, MATPLOTLIB = (
    "skimage/data",
    "sklearn/datasets/images",
    "matplotlib/mpl-data/sample_data",
)
PHOTOGRAPHS: dict[str, str] = {
    "cat.png": f"{SCIKIT_IMAGE}/chelsea.png",
    "coffee.png": f"{SCIKIT_IMAGE}/coffee.png",
    "rocket.jpg": f"{SCIKIT_IMAGE}/rocket.jpg",
    "astronaut.png": f"{SCIKIT_IMAGE}/astronaut.png",
    "motorcycle.png": f"{SCIKIT_IMAGE}/motorcycle_left.png",
    "cameraman.png": f"{SCIKIT_IMAGE}/camera.png",
    "coins.png": f"{SCIKIT_IMAGE}/coins.png",
    "galaxies.jpg": f"{SCIKIT_IMAGE}/hubble_deep_field.jpg",
    "moon.png": f"{SCIKIT_IMAGE}/moon.png",
    "retina.jpg": f"{SCIKIT_IMAGE}/retina.jpg",
    "tissue.png": f"{SCIKIT_IMAGE}/ihc.png",
    "brick.png": f"{SCIKIT_IMAGE}/brick.png",
    "grass.png": f"{SCIKIT_IMAGE}/grass.png",
    "gravel.png": f"{SCIKIT_IMAGE}/gravel.png",
    "horse.png": f"{SCIKIT_IMAGE}/horse.png",
    "page.png": f"{SCIKIT_IMAGE}/page.png",
    "pagoda.jpg": f"{SCIKIT_LEARN}/china.jpg",
    "flower.jpg": f"{SCIKIT_LEARN}/flower.jpg",
    "admiral.jpg": f"{MATPLOTLIB}/grace_hopper.jpg",
}
"""Name in the demo's folder -> file in an installed package."""

LABELS: dict[str, tuple[str, ...]] = {
    "cat.png": (
        "a cat", "a dog", "a fox", "a rabbit", "a hamster",
        "a bear", "a lion", "a squirrel", "an owl", "a sheep",
    ),
    "coffee.png": (
        "a cup of coffee", "a glass of beer", "a bowl of soup", "a slice of pizza", "a teapot",
        "a loaf of bread", "a candle", "an alarm clock", "a basket of fruit", "a laptop",
    ),
    "rocket.jpg": (
        "a rocket", "an airplane", "a helicopter", "a lighthouse", "a skyscraper",
        "a bridge", "a sailing ship", "a windmill", "a train", "a volcano",
    ),
    "astronaut.png": (
        "an astronaut", "a firefighter", "a police officer", "a doctor", "a chef",
        "a soldier", "a basketball player", "a diver", "a bride", "a clown",
    ),
    "motorcycle.png": (
        "a motorcycle", "a bicycle", "a car", "a bus", "a tractor",
        "a lawn mower", "a truck", "a shopping cart", "a wheelchair", "a train",
    ),
}  # fmt: skip
"""Ten labels for each of five photographs; the first one is right."""

QUERIES: dict[str, str] = {
    "a photo of a cat": "cat.png",
    "a photo of a cup of coffee": "coffee.png",
    "a photo of a rocket": "rocket.jpg",
    "a photo of an astronaut": "astronaut.png",
    "a photo of a motorcycle": "motorcycle.png",
    "a photo of a flower": "flower.jpg",
    "a photo of coins": "coins.png",
}
"""What is searched for -> the photograph that shows it."""

SCENES, SCENE_SEED, SCENE_SIZE = 300, 20_260, 96


@dataclass(frozen=True)
class Classified:
    """A photograph and its labels with probabilities, the likeliest first."""

    photograph: str
    expected: str
    predictions: list[tuple[str, float]]

    @property
    def correct(self) -> bool:
        """Whether the likeliest label is the right one."""
        return self.predictions[0][0] == self.expected


@dataclass(frozen=True)
class Searched:
    """A query, the rank of the photograph it means among all pictures (from 1), and the first hits."""

    query: str
    expected: str
    rank: int
    hits: list[Hit]


def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where all of it goes.")] = Path("demo"),
    model: ModelOption = console.SEEDLING,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Classify real photographs, then find them by words among a few hundred other pictures.

    The photographs come with scikit-image, scikit-learn and matplotlib.
    A contact sheet of what was found is written as a PNG.

    Example: clipworks demo --out demo
    """
    from clipworks.search import Index
    from clipworks.search.sheet import contact_sheet, tiles

    start = time.monotonic()
    photographs = {name: installed(path) for name, path in PHOTOGRAPHS.items()}
    pictures = lay_out(photographs, out / "pictures")
    seconds = {"pictures": time.monotonic() - start}

    mark = time.monotonic()
    clip = console.load_clip(model, device)
    seconds["model"] = time.monotonic() - mark

    mark = time.monotonic()
    classified = [classify(clip, pictures / name, labels) for name, labels in LABELS.items()]
    seconds["classify"] = time.monotonic() - mark

    mark = time.monotonic()
    place = out / "index"
    index = Index.open(place, clip) if Index.exists(place) else Index.create(place, clip, model)
    with console.progress("indexing") as advance:
        report = index.add(pictures, progress=advance)
    seconds["index"] = time.monotonic() - mark

    mark = time.monotonic()
    searched = [search(index, query, pictures / name) for query, name in QUERIES.items()]
    seconds["search"] = time.monotonic() - mark

    groups = [
        (
            f"{one.query}   (the photograph is hit {one.rank} of {len(index)})",
            tiles(one.hits, marked=one.expected),
        )
        for one in searched
    ]
    sheet = out / "hits.png"
    contact_sheet(groups, columns=6, side=150).save(sheet)
    seconds["all"] = time.monotonic() - start
    seconds = {name: round(value, 2) for name, value in seconds.items()}

    if as_json:
        console.print_json(
            {
                "model": model,
                "photographs": [
                    {
                        "photograph": one.photograph,
                        "expected": one.expected,
                        "top1": one.predictions[0][0],
                        "correct": one.correct,
                        "predictions": [{"label": label, "probability": p} for label, p in one.predictions],
                    }
                    for one in classified
                ],
                "correct": sum(one.correct for one in classified),
                "pictures": len(index),
                "embedded": report.embedded,
                "search": [asdict(one) for one in searched],
                "sheet": str(sheet),
                "seconds": seconds,
            }
        )
        return
    _show(classified, searched, len(index), seconds)
    typer.echo(f"pictures: {pictures}, index: {place}")
    typer.echo(f"contact sheet of the hits: {sheet}")


def installed(path: str) -> Path:
    """A file inside an installed package, which is found but not imported.

    Raises:
        MissingExtra: if the package is not installed.
        ConfigError: if this version of it comes without the file.
    """
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        require(package, extra="demo", purpose="the demo")
        raise ConfigError(f"{package} is installed in a way in which its files cannot be found")
    file = Path(spec.origin).parent / inside
    if not file.is_file():
        raise ConfigError(f"{file}: this version of {package} comes without it; install another one")
    return file


def lay_out(photographs: dict[str, Path], folder: Path) -> Path:
    """The folder, with copies of the photographs and below it generated scenes; what is there stays."""
    from PIL import Image

    from clipworks.data.world import kind

    world = folder / "world"
    world.mkdir(parents=True, exist_ok=True)
    for name, source in photographs.items():
        if not (folder / name).exists():
            shutil.copyfile(source, folder / name)
    scenes = kind("scenes")
    for i in range(SCENES):
        path = world / f"{i:04}.png"
        if not path.exists():
            scene = scenes.sample(scenes.config(), SCENE_SEED, i)
            Image.fromarray(scenes.render(scene, SCENE_SIZE).pixels).save(path)
    return folder


def classify(clip: Clip, photograph: Path, labels: Sequence[str]) -> Classified:
    """The labels of one photograph with their probabilities; the first one given is the right one."""
    found = clip.classify(photograph, labels, templates=("a photo of {}.",))
    return Classified(photograph.name, labels[0], found.top(len(labels))[0])


def search(index: Index, query: str, photograph: Path, shown: int = 6) -> Searched:
    """The first hits of a query, and where the photograph stands among all pictures."""
    hits = index.query(query, k=len(index))
    rank = 1 + [Path(hit.path).name for hit in hits].index(photograph.name)
    return Searched(query, photograph.name, rank, hits[:shown])


def _show(
    classified: Sequence[Classified], searched: Sequence[Searched], pictures: int, seconds: dict[str, float]
) -> None:
    table = console.make_table("photograph", "label", ">probability", "", title="Which of ten labels fits?")
    for one in classified:
        mark = "[green]right[/]" if one.correct else f"[red]wrong[/], it is {one.expected}"
        for place, (label, p) in enumerate(one.predictions[:3]):
            first = one.photograph if place == 0 else (mark if place == 1 else "")
            table.add_row(first, label, f"{p:.1%}", console.bar(p), end_section=place == 2)
    right = sum(one.correct for one in classified)
    found = console.make_table(
        "query", "photograph", ">rank", title=f"Where is it among {pictures} pictures?"
    )
    for hunt in searched:
        found.add_row(hunt.query, hunt.expected, str(hunt.rank))
    clock = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    console.show(table, f"{right} of {len(classified)} right; chance would be one in ten", "", found)
    console.show(f"seconds: {clock}")
