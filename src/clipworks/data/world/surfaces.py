"""Surfaces with and without defects: eight materials, four kinds of damage, and where it is.

A `Surface` states its material and its damage, if any. `render` gives the picture, the same surface
undamaged, and the mask: picture and undamaged twin differ in every pixel of the mask and in no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin
from typing import TYPE_CHECKING

import numpy as np

from clipworks.data.world.kinds import Kind, check_names, check_size, pick, stream
from clipworks.data.world.paint import cloud, grid
from clipworks.data.world.words import PLACE_PHRASES, PLACES, check_language
from clipworks.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

DEFECTS: tuple[str, ...] = ("scratch", "blob", "missing", "shift")


@dataclass(frozen=True)
class Defect:
    """Damage: `kind` is one of `DEFECTS`; lengths and places are fractions of the picture's side.

    Attributes:
        kind: a scratch, a blob (stain), a missing part or a shift of color.
        x, y: its center, y downward.
        reach: half its length.
        angle: its direction in radians.
        bend: how crooked or uneven it is, in [-1, 1].
        tone: which of its possible tones it has, in [0, 1).
    """

    kind: str
    x: float
    y: float
    reach: float
    angle: float
    bend: float
    tone: float


@dataclass(frozen=True)
class Surface:
    """A piece of material: `scale` and `angle` of its pattern, `tint` (3 numbers near 1) of its color."""

    family: str
    scale: float
    angle: float
    tint: tuple[float, float, float]
    defect: Defect | None
    seed: int
    index: int


@dataclass(frozen=True)
class RenderedSurface:
    """`pixels` and `clean` (H, W, 3) uint8, with and without the damage; `mask` (H, W) bool."""

    pixels: np.ndarray
    clean: np.ndarray
    mask: np.ndarray


# ------------------------------------------------------------------------------------------ materials
# Each takes coordinates (H, W) in widths of the picture and a generator, and gives a tone in [0, 1].

Pattern = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _weave(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    p, q = np.float32(9 * pi) * x, np.float32(9 * pi) * y
    over = np.sin(p) * np.sin(q) > 0
    return np.where(over, 0.35 + 0.65 * np.abs(np.sin(p)), 0.1 + 0.6 * np.abs(np.sin(q))).astype(np.float32)


def _wood(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drift = cloud(rng, x.shape[0], 4)
    rings = 7 * y + np.float32(1.6) * drift + np.float32(0.2) * np.sin(5 * x)
    return np.float32(0.5) + np.float32(0.5) * np.sin(np.float32(2 * pi) * rings)


def _tile(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    p, q = (4 * x) % 1, (4 * y) % 1
    groove = np.minimum(np.minimum(p, 1 - p), np.minimum(q, 1 - q))
    glaze = np.float32(0.15) * cloud(rng, x.shape[0], 9)
    return np.clip(14 * groove - np.float32(0.4), 0, 1) * np.float32(0.85) + glaze


def _leather(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    jitter = rng.random((2, 32, 32)).astype(np.float32)
    p, q = 9 * x, 9 * y
    column, row = np.floor(p).astype(np.int32), np.floor(q).astype(np.int32)
    first = np.full(x.shape, 9, np.float32)
    second = first.copy()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            c, r = column + right, row + down
            d = np.hypot(c + jitter[0, r & 31, c & 31] - p, r + jitter[1, r & 31, c & 31] - q)
            second = np.minimum(second, np.maximum(first, d))
            first = np.minimum(first, d)
    return np.clip(3.2 * (second - first), 0, 1).astype(np.float32)


def _metal(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = x.shape[0]
    rows = rng.random(4 * size).astype(np.float32)
    streaks = rows[(np.floor((y + 4) * size)).astype(np.int64) % (4 * size)]
    gleam = np.float32(0.5) + np.float32(0.5) * np.cos(np.float32(2 * pi) * (np.float32(0.7) * y + rows[0]))
    return np.float32(0.45) * streaks + np.float32(0.55) * gleam


def _carpet(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.random(x.shape).astype(np.float32)
    tufts = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / np.float32(3)
    worn = np.float32(0.4) * (cloud(rng, x.shape[0], 6) - np.float32(0.5))
    return np.clip(np.float32(0.5) + np.float32(1.3) * (tufts - np.float32(0.5)) + worn, 0, 1)


def _mesh(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    q = 8 * y
    p = 7 * x + np.float32(0.5) * (np.floor(q) % 2)
    holes = np.hypot(p % 1 - np.float32(0.5), q % 1 - np.float32(0.5))
    return np.clip(9 * (holes - np.float32(0.27)), 0, 1)


def _marble(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = x.shape[0]
    drift = cloud(rng, size, 3) + np.float32(0.4) * cloud(rng, size, 8)
    veins = np.abs(np.sin(np.float32(pi) * (2.2 * x + 1.1 * y + 2.6 * drift)))
    return np.clip(np.float32(2.2) * veins, 0, 1) * np.float32(0.8) + np.float32(0.2) * cloud(rng, size, 5)


_MATERIALS: dict[str, tuple[Pattern, tuple[int, int, int], tuple[int, int, int]]] = {
    "weave": (_weave, (84, 92, 118), (172, 178, 196)),
    "wood": (_wood, (138, 94, 54), (204, 160, 108)),
    "tile": (_tile, (120, 124, 126), (206, 214, 214)),
    "leather": (_leather, (78, 46, 32), (150, 98, 66)),
    "metal": (_metal, (128, 132, 138), (206, 210, 214)),
    "carpet": (_carpet, (96, 52, 60), (182, 118, 120)),
    "mesh": (_mesh, (40, 42, 46), (176, 182, 186)),
    "marble": (_marble, (146, 148, 154), (236, 234, 230)),
}
FAMILIES: tuple[str, ...] = tuple(_MATERIALS)


@dataclass(frozen=True)
class SurfaceConfig:
    """Which surfaces there are: materials and defects in use, and the fraction that is damaged."""

    families: tuple[str, ...] = FAMILIES
    defects: tuple[str, ...] = DEFECTS
    faulty: float = 0.5

    def __post_init__(self) -> None:
        for name, known in (("families", FAMILIES), ("defects", DEFECTS)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            check_names(f"SurfaceConfig.{name}", getattr(self, name), known)
        if not 0 <= self.faulty <= 1:
            raise ConfigError(f"SurfaceConfig.faulty {self.faulty} is outside 0..1")


def sample(config: SurfaceConfig, seed: int, index: int) -> Surface:
    """Surface `index` of the world under `seed`: the same for the same three, in every process.

    Raises:
        ConfigError: if a number is negative.
    """
    rng = stream("surfaces", seed, index)
    family = pick(rng, config.families)
    scale, angle, r, g, b, broken = (float(t) for t in rng.random(6))
    defect = _damage(config, rng) if broken < config.faulty else None
    shade = 0.9 + 0.2 * r
    tint = (shade * (0.94 + 0.12 * g), shade, shade * (0.94 + 0.12 * b))
    return Surface(family, 0.8 + 0.5 * scale, (angle - 0.5) * pi / 4, tint, defect, seed, index)


_REACH = {"scratch": (0.14, 0.34), "blob": (0.06, 0.13), "missing": (0.06, 0.14), "shift": (0.11, 0.22)}


def _damage(config: SurfaceConfig, rng: np.random.Generator) -> Defect:
    kind = pick(rng, config.defects)
    x, y, reach, angle, bend, tone = (float(t) for t in rng.random(6))
    low, high = _REACH[kind]
    reach = low + (high - low) * reach
    return Defect(kind, 0.2 + 0.6 * x, 0.2 + 0.6 * y, reach, 2 * pi * angle, 2 * bend - 1, tone)


# ------------------------------------------------------------------------------------------ rendering


def render(surface: Surface, size: int) -> RenderedSurface:
    """Paints a surface at `size` x `size` pixels, and its undamaged twin.

    Raises:
        ConfigError: if `size` is not in 32..256.
    """
    check_size(size)
    rng = stream("surfaces/picture", surface.seed, surface.index)
    at = grid(size)
    x, y = at[None, :], at[:, None]
    c, s = np.float32(cos(surface.angle) * surface.scale), np.float32(sin(surface.angle) * surface.scale)
    left, top = (np.float32(t) for t in rng.random(2))
    pattern, dark, light = _MATERIALS[surface.family]
    tone = pattern(c * x + s * y + left, c * y - s * x + top, rng)
    low, high = (np.asarray(color, dtype=np.float32) / 255 for color in (dark, light))
    clean = (low + tone[..., None] * (high - low)) * np.asarray(surface.tint, dtype=np.float32)
    clean = clean * (1 + np.float32(0.1) * (x - y))[..., None]
    clean = clean + np.float32(0.012) * rng.standard_normal((size, size, 1), dtype=np.float32)
    twin = _bytes(clean)
    if surface.defect is None:
        return RenderedSurface(twin, twin, np.zeros((size, size), dtype=bool))
    alpha, damaged = _DAMAGES[surface.defect.kind](surface.defect, np.clip(clean, 0, 1), x, y, size)
    mask = alpha > 0.1
    pixels = _bytes(np.clip(clean, 0, 1) + (damaged - np.clip(clean, 0, 1)) * alpha[..., None])
    pixels = np.where(mask[..., None], pixels, twin)
    # Where damage happens to have the surface's own tone it would be no damage: it is pushed aside.
    changed = np.abs(pixels.astype(np.int16) - twin).max(2)
    faint = mask & (changed < LEAST)
    aside = np.where(twin > 127, twin - np.uint8(2 * LEAST), twin + np.uint8(2 * LEAST))
    return RenderedSurface(np.where(faint[..., None], aside, pixels), twin, mask)


LEAST = 8
"""In every pixel of a defect's mask at least one channel differs by this much (of 255) from the twin."""


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return (np.clip(pixels, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def _local(defect: Defect, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.float32(cos(defect.angle)), np.float32(sin(defect.angle))
    right, down = x - np.float32(defect.x), y - np.float32(defect.y)
    return c * right + s * down, c * down - s * right


Painted = tuple[np.ndarray, np.ndarray]  # how strongly (H, W), and with what (H, W, 3)


def _scratch(defect: Defect, clean: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> Painted:
    along, across = _local(defect, x, y)
    t = along / np.float32(defect.reach)
    off = np.abs(across - np.float32(0.22 * defect.bend * defect.reach) * (1 - 2 * t * t))
    width = np.float32(max(0.011, 0.75 / size)) * (np.float32(1.1) - np.float32(0.5) * t * t)
    line = np.clip((width - off) * size + np.float32(0.5), 0, 1) * (np.abs(t) <= 1)
    # A scratch is light on a dark surface and dark on a light one, or it would not be seen.
    bright = clean.mean() < 0.5
    return line * np.float32(0.9), np.full_like(clean, 0.95 if bright else 0.12)


def _uneven(defect: Defect, x: np.ndarray, y: np.ndarray, waves: float) -> np.ndarray:
    """Distance from the center in units of the reach, with a wavy edge."""
    along, across = _local(defect, x, y)
    turn = np.arctan2(across, along)
    wave = np.sin(3 * turn + np.float32(9 * defect.bend))
    wave = wave + np.float32(0.6) * np.sin(5 * turn + np.float32(7 * defect.tone))
    edge = 1 + np.float32(waves) * wave
    return np.hypot(along, np.float32(1.25) * across) / (np.float32(defect.reach) * edge)


def _blob(defect: Defect, clean: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> Painted:
    d = _uneven(defect, x, y, 0.16)
    alpha = np.clip((1 - d) * np.float32(4), 0, 1) * np.float32(0.85)
    stains = ((0.16, 0.1, 0.05), (0.08, 0.1, 0.22), (0.9, 0.88, 0.78), (0.3, 0.05, 0.05))
    return alpha, np.broadcast_to(np.asarray(stains[int(defect.tone * 4)], dtype=np.float32), clean.shape)


def _missing(defect: Defect, clean: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> Painted:
    along, across = _local(defect, x, y)
    # A broken-out piece: a crooked quadrilateral, its far wall in the light.
    skew = along + np.float32(0.4 * defect.bend) * across
    sides = np.float32(1.3) * np.abs(across) + np.float32(0.2) * np.abs(skew)
    d = np.maximum(np.abs(skew), sides) - np.float32(defect.reach)
    alpha = np.clip(np.float32(0.5) - d * size, 0, 1)
    wall = np.clip(1 + d / np.float32(0.3 * defect.reach), 0, 1) * (across > 0)
    return alpha, (np.float32(0.04) + np.float32(0.3) * wall)[..., None] + np.zeros_like(clean)


def _shift(defect: Defect, clean: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> Painted:
    alpha = np.clip((1 - _uneven(defect, x, y, 0.1)) * np.float32(3), 0, 1)
    shifts = ((0.22, -0.06, -0.12), (-0.14, 0.16, -0.08), (-0.12, -0.04, 0.24), (0.18, 0.12, -0.16))
    return alpha, clean + np.asarray(shifts[int(defect.tone * 4)], dtype=np.float32)


_DAMAGES: dict[str, Callable[[Defect, np.ndarray, np.ndarray, np.ndarray, int], Painted]] = {
    "scratch": _scratch,
    "blob": _blob,
    "missing": _missing,
    "shift": _shift,
}


# ---------------------------------------------------------------------------------------------- words

FAMILY_PHRASES: dict[str, dict[str, str]] = {
    "weave": {"en": "woven fabric", "de": "Gewebe", "fr": "tissu", "zh": "织物"},
    "wood": {"en": "wood", "de": "Holz", "fr": "bois", "zh": "木材"},
    "tile": {"en": "tiles", "de": "Fliesen", "fr": "carrelage", "zh": "瓷砖"},
    "leather": {"en": "leather", "de": "Leder", "fr": "cuir", "zh": "皮革"},
    "metal": {"en": "brushed metal", "de": "gebürstetes Metall", "fr": "métal brossé", "zh": "拉丝金属"},
    "carpet": {"en": "carpet", "de": "Teppich", "fr": "moquette", "zh": "地毯"},
    "mesh": {"en": "perforated metal", "de": "Lochblech", "fr": "tôle perforée", "zh": "冲孔板"},
    "marble": {"en": "marble", "de": "Marmor", "fr": "marbre", "zh": "大理石"},
}
DEFECT_PHRASES: dict[str, dict[str, str]] = {
    "scratch": {"en": "a scratch", "de": "einem Kratzer", "fr": "une rayure", "zh": "一道划痕"},
    "blob": {"en": "a stain", "de": "einem Fleck", "fr": "une tache", "zh": "一块污渍"},
    "missing": {
        "en": "a missing piece",
        "de": "einem fehlenden Stück",
        "fr": "un morceau manquant",
        "zh": "一处缺损",
    },
    "shift": {"en": "a discoloration", "de": "einer Verfärbung", "fr": "une décoloration", "zh": "一处变色"},
}
_SOUND = {"en": "flawless {}", "de": "{} ohne Fehler", "fr": "{} sans défaut", "zh": "没有瑕疵的{}"}
_DAMAGED = {"en": "{} with {} {}", "de": "{} mit {} {}", "fr": "{} avec {} {}"}


def place(defect: Defect) -> str:
    """In which ninth of the picture a defect's center lies, one of `words.PLACES`."""
    return PLACES[3 * min(int(defect.y * 3), 2) + min(int(defect.x * 3), 2)]


def describe(surface: Surface, language: str = "en") -> str:
    """A surface and its damage in words: `"leather with a scratch at the top left"`, `"flawless wood"`.

    Raises:
        ConfigError: if the world does not speak `language`.
    """
    check_language(language)
    material = FAMILY_PHRASES[surface.family][language]
    if surface.defect is None:
        return _SOUND[language].format(material)
    where = PLACE_PHRASES[place(surface.defect)][language]
    damage = DEFECT_PHRASES[surface.defect.kind][language]
    if language == "zh":
        return f"{material}，{where}有{damage}"
    return _DAMAGED[language].format(material, damage, where)


def preview(count: int, seed: int, size: int) -> Image:
    """A sheet of `count` surfaces, each beside its mask, with its description."""
    from clipworks.data.world.sheet import contact_sheet

    tiles = []
    for index in range(count):
        surface = sample(SurfaceConfig(), seed, index)
        shown = render(surface, size)
        mask = np.repeat(shown.mask[..., None] * np.uint8(255), 3, axis=2)
        tiles.append((np.concatenate([shown.pixels, mask], axis=1), f"{index} {describe(surface)}"))
    return contact_sheet(tiles)


KIND = Kind(
    name="surfaces",
    about="materials with and without damage, with an undamaged twin and a mask",
    config=SurfaceConfig,
    record=Surface,
    sample=sample,
    render=render,
    describe=describe,
    preview=preview,
)
