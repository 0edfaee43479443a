"""The registry of kinds, their independent streams, the sheets, and the world as a source of examples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from clipworks.cli.world import app
from clipworks.data import world
from clipworks.data.world import captions, scenes, sheet, surfaces
from clipworks.data.world.dataset import WorldScenes, WorldSurfaces
from clipworks.data.world.kinds import stream
from clipworks.errors import ConfigError

NEW_KIND = '''
"""Dots: a kind of world that somebody adds."""
from dataclasses import dataclass
import numpy as np
from clipworks.data.world.kinds import Kind, stream

@dataclass(frozen=True)
class Config:
    pass

@dataclass(frozen=True)
class Dot:
    x: float

def sample(config, seed, index):
    return Dot(float(stream("dots", seed, index).random()))

KIND = Kind("dots", "dots", Config, Dot, sample, lambda dot, size: None, lambda dot: "a dot", lambda *a: None)
'''


def scenes_digest() -> str:
    total = hashlib.sha256()
    for index in range(10):
        scene = scenes.sample(scenes.SceneConfig(), 0, index)
        total.update(scenes.render(scene, 64).pixels.tobytes())
        total.update(captions.describe(scene, "alt", noise=0.5).encode())
        total.update(
            surfaces.render(surfaces.sample(surfaces.SurfaceConfig(), 0, index), 64).pixels.tobytes()
        )
    return total.hexdigest()


def test_a_new_kind_is_one_new_file_and_changes_no_byte_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, known = scenes_digest(), world.kinds()
    (tmp_path / "dots.py").write_text(NEW_KIND)
    monkeypatch.setattr(world, "__path__", [*world.__path__, str(tmp_path)])
    assert world.kinds() == tuple(sorted([*known, "dots"]))
    dots = world.kind("dots")
    assert dots.sample(dots.config(), 0, 0) == dots.sample(dots.config(), 0, 0)
    assert scenes_digest() == before


@pytest.mark.parametrize("name", world.kinds())
def test_every_kind_keeps_the_contract(name: str) -> None:
    kind = world.kind(name)
    assert kind.name == name
    record = kind.sample(kind.config(), 3, 4)
    assert isinstance(record, kind.record)
    assert record == kind.sample(kind.config(), 3, 4)
    assert record != kind.sample(kind.config(), 3, 5)
    assert hash(record) == hash(kind.sample(kind.config(), 3, 4))
    pixels = kind.render(record, 48).pixels
    assert pixels.shape == (48, 48, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, kind.render(record, 48).pixels)
    assert kind.describe(record)
    assert kind.preview(2, 0, 48).size[0] > 48
    with pytest.raises(ConfigError, match="300"):
        kind.render(record, 300)


@given(
    st.lists(
        st.tuples(st.text(max_size=5), st.integers(0, 2**70), st.integers(0, 2**40)),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_streams_of_different_names_or_numbers_differ_and_equal_ones_agree(
    keys: list[tuple[str, int, int]],
) -> None:
    firsts = [tuple(stream(*key).integers(0, 2**63, 2)) for key in keys]
    assert len(set(firsts)) == len(keys)
    assert [tuple(stream(*key).integers(0, 2**63, 2)) for key in keys] == firsts


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    for wrong in ("scnes", "kinds", "no.such", ""):
        with pytest.raises(ConfigError, match="captions, scenes, surfaces"):
            world.kind(wrong)
    with pytest.raises(ConfigError, match="did you mean scenes"):
        world.kind("scnes")


# ---------------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize("what", ["scenes", "surfaces", "captions"])
def test_preview_writes_a_sheet_in_which_the_pictures_are(what: str, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    arguments = [
        "preview",
        "--what",
        what,
        "--out",
        str(out),
        "--count",
        "3",
        "--seed",
        "5",
        "--size",
        "64",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {"path": str(out), "kind": what, "count": 3}
    shown = np.asarray(Image.open(out).convert("RGB"))
    kind = world.kind(what)
    first = kind.render(kind.sample(kind.config(), 5, 0), 64).pixels
    assert np.array_equal(shown[12:76, 12:76], first)
    assert (shown[80:100, 12:140] < 100).any(), "there are words under the picture"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--what", "scene"], "did you mean scenes"),
        (["--count", "0"], "--count 0"),
        (["--out", "sheet.jpg"], ".png"),
        (["--out", "/no/such/folder/sheet.png"], "/no/such/folder"),
        (["--size", "500"], "500"),
    ],
)
def test_preview_answers_bad_input_with_one_clear_line(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    base = [] if "--out" in arguments else ["--out", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(app, ["preview", *base, *arguments])
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_words_without_a_font_for_them_are_replaced_by_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    monkeypatch.setattr(sheet, "_font", lambda chinese, height: None)
    noted = sheet.contact_sheet([(picture, "红色的圆形")])
    assert np.array_equal(np.asarray(noted), np.asarray(sheet.contact_sheet([(picture, sheet.NO_FONT)])))
    plain = sheet.contact_sheet([(picture, "grün, weiß, cœur rayé")])
    assert np.array_equal(
        np.asarray(plain), np.asarray(sheet.contact_sheet([(picture, "grun, weiss, coeur raye")]))
    )


# --------------------------------------------------------------------------------------------- examples


def test_world_scenes_are_examples_with_all_that_was_asked_for() -> None:
    source = WorldScenes(
        seed=2, length=20, size=48, sources=("short", "alt", "region"), languages=("de", "zh")
    )
    assert len(source) == 20
    for index, example in enumerate(source[i] for i in range(20)):
        scene = example.extra["scene"]
        assert scene == scenes.sample(scenes.SceneConfig(), 2, index)
        assert example.key == f"scenes-2-{index}"
        assert example.image.shape == (48, 48, 3)
        assert np.array_equal(example.image, scenes.render(scene, 48).pixels)
        assert set(example.texts) == {"short", "alt", "region", "de", "zh"}
        assert example.texts["short"] == captions.describe(scene)
        assert example.texts["de"] == captions.describe(scene, "short", "de")
        assert len(example.texts["region"]) == len(scene.objects)
        assert example.label is not None
        assert source.class_names[example.label] == scene.objects[0].shape
        assert source.labels[index] == example.label


@pytest.mark.parametrize("label", ["color", "texture", "size", "background", "style", "pair"])
def test_labels_name_what_they_are_asked_to(label: str) -> None:
    source = WorldScenes(length=12, label=label, sources=())
    for index in range(12):
        scene = source.scene(index)
        main = scene.objects[0]
        owner = scene if label in ("background", "style") else main
        value = f"{main.color} {main.shape}" if label == "pair" else getattr(owner, label)
        assert source.class_names[source.labels[index]] == value


def test_classes_follow_the_pairs_and_ties_in_use() -> None:
    pairs = (("circle", "red"), ("star", "blue"))
    assert WorldScenes(scenes.SceneConfig(pairs=pairs), label="pair").class_names == (
        "red circle",
        "blue star",
    )
    tie = scenes.Tie("shape", "background", {"fish": "water"}, 1.0)
    tied = scenes.SceneConfig(shapes=("fish",), backgrounds=("grass",), ties=(tie,))
    source = WorldScenes(tied, label="background", length=3)
    assert source.class_names == ("grass", "water")
    assert source.labels.tolist() == [1, 1, 1]


def test_world_surfaces_are_examples_with_masks() -> None:
    source = WorldSurfaces(seed=1, length=15)
    for index in range(15):
        example = source[index]
        assert example.label == source.labels[index] == int(example.extra["mask"].any())
        assert np.array_equal((example.image != example.extra["clean"]).any(2), example.extra["mask"])


def test_indices_are_those_of_a_list() -> None:
    source = WorldScenes(length=4, size=32)
    assert source[-1].key == source[3].key
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sources": ("shrt",)}, "did you mean short"),
        ({"languages": ("ed",)}, "'ed'"),
        ({"label": "colour"}, "did you mean color"),
        ({"size": 8}, "8"),
        ({"noise": 3.0}, "3.0"),
        ({"seed": -2}, "-2"),
    ],
)
def test_bad_wishes_are_named(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WorldScenes(**arguments)  # type: ignore[arg-type]
