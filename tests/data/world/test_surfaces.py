"""Surfaces: the mask of a defect is exactly where the picture differs from its undamaged twin."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from clipworks.data.world import surfaces
from clipworks.data.world.surfaces import DEFECTS, FAMILIES, SurfaceConfig
from clipworks.errors import ConfigError

DAMAGED = SurfaceConfig(faulty=1.0)
MANY = [pytest.param(150, id="150"), pytest.param(1000, id="1000", marks=pytest.mark.slow)]
PLACES = {
    "at the top left": (0, 0), "at the top right": (0, 2), "at the bottom left": (2, 0),
    "at the bottom right": (2, 2), "at the top": (0, 1), "at the bottom": (2, 1), "on the left": (1, 0),
    "on the right": (1, 2), "in the center": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("count", MANY)
def test_pixels_differ_from_the_twin_exactly_in_the_mask(count: int) -> None:
    for index in range(count):
        surface = surfaces.sample(DAMAGED, 1, index)
        shown = surfaces.render(surface, 64)
        twin = surfaces.render(replace(surface, defect=None), 64)
        assert np.array_equal(shown.clean, twin.pixels)
        apart = np.abs(shown.pixels.astype(int) - twin.pixels).max(2)
        assert np.array_equal(apart > 0, shown.mask)
        assert apart[shown.mask].min() >= surfaces.LEAST
        assert shown.mask.sum() >= 8
        assert not twin.mask.any()


@pytest.mark.parametrize("count", MANY)
def test_the_damage_is_where_the_record_and_the_description_say(count: int) -> None:
    for index in range(count):
        surface = surfaces.sample(DAMAGED, 2, index)
        mask = surfaces.render(surface, 96).mask
        defect = surface.defect
        assert defect is not None
        y, x = (np.argwhere(mask).mean(0) + 0.5) / 96
        assert np.hypot(x - defect.x, y - defect.y) < 0.6 * defect.reach + 0.02
        text = surfaces.describe(surface)
        cell = next(cell for words, cell in PLACES.items() if text.endswith(words))
        assert cell == (int(defect.y * 3), int(defect.x * 3))


def test_a_damage_is_one_piece_and_a_scratch_is_long_and_thin() -> None:
    for kind in DEFECTS:
        config = SurfaceConfig(defects=(kind,), faulty=1.0)
        for index in range(30):
            mask = surfaces.render(surfaces.sample(config, 3, index), 128).mask
            _, pieces = ndimage.label(mask, np.ones((3, 3)))
            assert pieces == 1, (kind, index)
            points = np.argwhere(mask).astype(float)
            length = np.ptp(points @ np.linalg.svd(points - points.mean(0), full_matrices=False)[2][0])
            assert (mask.sum() / length < 6) == (kind == "scratch"), (kind, index)


def test_half_are_damaged_and_every_family_and_defect_occurs_equally_often() -> None:
    found = [surfaces.sample(SurfaceConfig(), 4, index) for index in range(2000)]
    damaged = [s.defect.kind for s in found if s.defect is not None]

    def fair(hits: int, trials: int, rate: float) -> bool:
        return abs(hits - trials * rate) < 4 * np.sqrt(trials * rate * (1 - rate))

    assert fair(len(damaged), 2000, 0.5)
    assert all(fair(sum(s.family == family for s in found), 2000, 1 / 8) for family in FAMILIES)
    assert all(fair(damaged.count(kind), len(damaged), 1 / 4) for kind in DEFECTS)


def test_families_can_be_told_apart_by_simple_statistics() -> None:
    """Nearest mean of 12 numbers about color and grain names the family of unseen surfaces."""

    def numbers(surface: surfaces.Surface) -> np.ndarray:
        pixels = surfaces.render(surface, 64).pixels.astype(float)
        gray = pixels.mean(2)
        steps = [np.abs(gray - np.roll(gray, k, axis)).mean() for k in (1, 2, 4) for axis in (0, 1)]
        return np.array(
            [*pixels.mean((0, 1)) / 3, gray.std(), np.median(gray) - gray.mean(), gray.min(), *steps]
        )

    def table(seed: int) -> dict[str, np.ndarray]:
        config = {family: SurfaceConfig(families=(family,), faulty=0) for family in FAMILIES}
        return {
            f: np.stack([numbers(surfaces.sample(config[f], seed, i)) for i in range(15)]) for f in FAMILIES
        }

    known, fresh = table(0), table(1)
    spread = np.concatenate(list(known.values())).std(0)
    right = 0
    for family, rows in fresh.items():
        for row in rows:
            right += family == min(FAMILIES, key=lambda f: (((row - known[f].mean(0)) / spread) ** 2).sum())
    assert right > 0.85 * 15 * len(FAMILIES)


@settings(max_examples=40)
@given(size=st.integers(32, 256), index=st.integers(0, 10**6))
def test_every_size_can_be_rendered(size: int, index: int) -> None:
    shown = surfaces.render(surfaces.sample(DAMAGED, 5, index), size)
    assert shown.pixels.shape == shown.clean.shape == (size, size, 3)
    assert shown.pixels.dtype == np.uint8
    assert shown.mask.any()


def test_descriptions_name_family_and_damage_in_every_language() -> None:
    families = {
        "en": "woven fabric|wood|tiles|leather|brushed metal|carpet|perforated metal|marble",
        "de": "Gewebe|Holz|Fliesen|Leder|gebürstetes Metall|Teppich|Lochblech|Marmor",
        "fr": "tissu|bois|carrelage|cuir|métal brossé|moquette|tôle perforée|marbre",
        "zh": "织物|木材|瓷砖|皮革|拉丝金属|地毯|冲孔板|大理石",
    }
    damages = {
        "en": "a scratch|a stain|a missing piece|a discoloration",
        "de": "einem Kratzer|einem Fleck|einem fehlenden Stück|einer Verfärbung",
        "fr": "une rayure|une tache|un morceau manquant|une décoloration",
        "zh": "划痕|污渍|缺损|变色",
    }
    for language in families:
        for index in range(60):
            surface = surfaces.sample(SurfaceConfig(), 6, index)
            text = surfaces.describe(surface, language)
            named = [w for w in families[language].split("|") if w in text]
            assert named == [families[language].split("|")[FAMILIES.index(surface.family)]]
            damage = [DEFECTS[k] for k, w in enumerate(damages[language].split("|")) if w in text]
            assert damage == ([surface.defect.kind] if surface.defect else [])


def test_no_two_surfaces_are_the_same() -> None:
    shown = [
        surfaces.render(surfaces.sample(SurfaceConfig(families=("tile",)), 7, i), 32).pixels
        for i in range(12)
    ]
    assert all((a != b).any() for a, b in combinations(shown, 2))


def test_nothing_global_is_drawn_from(untouched_rng: None) -> None:
    surfaces.render(surfaces.sample(DAMAGED, 0, 0), 32)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"families": ("lether",)}, "did you mean leather"),
        ({"defects": ()}, "empty"),
        ({"faulty": -0.1}, "-0.1"),
    ],
)
def test_bad_knobs_are_named(knobs: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SurfaceConfig(**knobs)  # type: ignore[arg-type]
