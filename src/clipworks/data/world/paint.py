"""Colors, textures, backgrounds and styles: everything about a scene's look that is not its layout.

Coordinate grids, background tiles and grain depend on nothing but their names and the picture's size, so
they are computed once. A scene draws only where its background is cut out of the tile, how the light
falls and which noise lies on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clipworks.data.world.kinds import stream

RGB: dict[str, tuple[int, int, int]] = {
    "red": (218, 28, 36),
    "orange": (250, 140, 12),
    "yellow": (250, 222, 36),
    "green": (36, 156, 58),
    "cyan": (38, 200, 208),
    "blue": (34, 74, 216),
    "purple": (134, 48, 172),
    "pink": (250, 132, 190),
    "brown": (122, 66, 24),
    "white": (250, 250, 250),
    "gray": (134, 134, 134),
    "black": (20, 20, 20),
}
COLORS: tuple[str, ...] = tuple(RGB)
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered", "speckled", "wavy", "shaded")
STYLES: tuple[str, ...] = ("flat", "sketch", "photo", "inverted", "pixelated", "watercolor")
BACKGROUNDS: tuple[str, ...] = (
    "grass", "sky", "sand", "water", "brick", "wood", "snow", "night", "stone", "paper",
)  # fmt: skip


@dataclass(frozen=True)
class Tones:
    """The four tones of one color, (3,) float32 in [0, 1] each."""

    base: np.ndarray
    light: np.ndarray
    dark: np.ndarray
    edge: np.ndarray


def _tones(rgb: tuple[int, int, int]) -> Tones:
    base = np.asarray(rgb, dtype=np.float32) / 255
    bright = float(base @ np.asarray([0.3, 0.59, 0.11], dtype=np.float32))
    # Light and dark lie about as far on either side of the base, so that a texture keeps its color's name.
    step = (1 - base) * np.float32(0.42 if bright > 0.4 else 0.37 if bright > 0.2 else 0.22)
    dark = np.maximum(base - step, 0) * np.float32(0.82)
    if bright > 0.2:
        edge = base * np.float32(0.55 if bright < 0.85 else 0.4)
    else:
        edge = base + (1 - base) * np.float32(0.2)
    return Tones(base, base + step, dark, edge)


TONES: dict[str, Tones] = {name: _tones(rgb) for name, rgb in RGB.items()}

_TURN = np.float32(2 * np.pi)


@lru_cache(maxsize=1)
def _specks() -> np.ndarray:
    return np.where(stream("paint/specks", 0, 0).random((64, 64)) < 0.3, -1.0, 0.42).astype(np.float32)


def texture(name: str, u: np.ndarray, v: np.ndarray, phase: tuple[float, float]) -> np.ndarray | None:
    """How light or dark a texture is at an object's own coordinates.

    Args:
        name: one of `TEXTURES`.
        u, v: (h, w) float32; the object reaches about 1.
        phase: two numbers in [0, 1) that shift the pattern.

    Returns:
        (h, w) float32 in [-1, 1] with a mean near 0, or None for a plain surface.
    """
    a, b = np.float32(phase[0]), np.float32(phase[1])
    if name == "plain":
        return None
    if name == "striped":
        return np.clip(3 * np.sin(_TURN * (u / np.float32(0.62) + a)), -1, 1)
    if name == "wavy":
        bent = v + np.float32(0.17) * np.sin(_TURN * (u / np.float32(0.95) + b))
        return np.clip(3 * np.sin(_TURN * (bent / np.float32(0.6) + a)), -1, 1)
    if name == "checkered":
        board = np.sin(_TURN * (u / np.float32(1.0) + a)) * np.sin(_TURN * (v / np.float32(1.0) + b))
        return np.clip(6 * board, -1, 1)
    if name == "dotted":
        p = (u / np.float32(0.64) + a) % 1 - np.float32(0.5)
        q = (v / np.float32(0.64) + b) % 1 - np.float32(0.5)
        return np.clip(4 - 13 * np.hypot(p, q), -0.45, 1)
    if name == "speckled":
        rows = ((v + 4) * np.float32(5.2) + a * 64).astype(np.int32) & 63
        columns = ((u + 4) * np.float32(5.2) + b * 64).astype(np.int32) & 63
        return _specks()[rows, columns]
    return np.clip(v, -1, 1)  # shaded: dark below, light above


# ---------------------------------------------------------------------------------------- backgrounds


def cloud(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth periodic noise: (side, side) float32 in [0, 1], about `cells` hills across."""
    knots = rng.random((cells, cells)).astype(np.float32)
    at = np.arange(side, dtype=np.float32) * np.float32(cells / side)
    low = at.astype(np.int64)
    part = at - low
    part = part * part * (3 - 2 * part)
    low %= cells
    high = (low + 1) % cells
    rows = knots[low] * (1 - part)[:, None] + knots[high] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, high] * part


def mix(a: tuple[int, int, int], b: tuple[int, int, int], amount: np.ndarray) -> np.ndarray:
    """Two colors (0..255) blended by `amount` (h, w) in [0, 1]: (h, w, 3) float32 in [0, 1]."""
    first, second = (np.asarray(c, dtype=np.float32) / 255 for c in (a, b))
    return first + (second - first) * amount[..., None].astype(np.float32)


@lru_cache(maxsize=64)
def tile(name: str, size: int) -> np.ndarray:
    """A background half as large again as a picture of `size`: (1.5 size, 1.5 size, 3) float32 in [0, 1]."""
    side = size + size // 2
    rng = stream(f"paint/background/{name}", 0, size)
    unit = (np.arange(side, dtype=np.float32) + 0.5) / size  # in widths of the picture
    x, y = unit[None, :], unit[:, None]
    soft = cloud(rng, side, 6)
    fine = rng.random((side, side)).astype(np.float32)
    if name == "grass":
        upright = (fine + np.roll(fine, 1, 0) + np.roll(fine, 2, 0)) / 3
        blades = np.clip(0.5 * cloud(rng, side, 24) + 0.5 * upright, 0, 1)
        return mix((104, 158, 84), (176, 208, 132), 0.25 * soft + 0.75 * blades)
    if name == "sky":
        puffs = np.clip((0.65 * cloud(rng, side, 5) + 0.35 * cloud(rng, side, 12) - 0.52) * 5, 0, 1)
        return mix((150, 196, 240), (240, 246, 252), puffs)
    if name == "sand":
        ripples = 0.5 + 0.5 * np.sin(_TURN * (7 * y + 0.5 * np.sin(_TURN * x * 1.4) + soft))
        return mix((206, 178, 128), (236, 214, 168), 0.55 * ripples + 0.2 * soft + 0.25 * fine)
    if name == "water":
        waves = np.sin(_TURN * (9 * y + 0.35 * np.sin(_TURN * x * 3) + 0.8 * soft))
        return mix((62, 124, 156), (150, 200, 212), np.clip(0.4 + 0.35 * waves + 0.35 * (soft - 0.5), 0, 1))
    if name == "brick":
        high, wide = 0.11, 0.22
        row = np.floor(y / high)
        across = (x + wide / 2 * (row % 2)) / wide
        mortar = ((y / high) % 1 < 0.17) | (across % 1 < 0.09)
        each = stream("paint/brick", 0, 0).random((32, 32)).astype(np.float32)
        wall = each[row.astype(int) % 32, np.floor(across).astype(int) % 32]
        bricks = mix((158, 88, 68), (198, 126, 98), 0.7 * wall + 0.3 * fine)
        return np.where(mortar[..., None], np.array([0.82, 0.79, 0.74], np.float32), bricks)
    if name == "wood":
        grain = 0.5 + 0.5 * np.sin(_TURN * (9 * y + 2.2 * cloud(rng, side, 4) + 0.3 * soft))
        planks = (y / 0.36) % 1 < 0.035
        shade = np.where(planks, 0.0, 0.25 + 0.6 * grain + 0.15 * fine)
        return mix((120, 80, 46), (208, 164, 112), shade)
    if name == "snow":
        glints = (fine > 0.985).astype(np.float32)
        return mix((206, 218, 234), (246, 248, 252), np.clip(0.2 + 0.9 * soft + glints, 0, 1))
    if name == "night":
        stars = (rng.random((side, side)) < 3.0 / size / (1 + size / 64)).astype(np.float32)
        return np.maximum(mix((18, 22, 54), (48, 50, 98), soft), 0.85 * stars[..., None])
    if name == "stone":
        veins = np.abs(cloud(rng, side, 9) - 0.5) < 0.025
        rock = mix((126, 124, 122), (190, 187, 182), 0.45 * soft + 0.3 * cloud(rng, side, 20) + 0.25 * fine)
        return np.where(veins[..., None], rock * np.float32(0.72), rock)
    lines = (y / 0.12) % 1 < 0.09  # paper: ruled
    sheet = mix((232, 226, 212), (246, 242, 232), 0.6 * fine + 0.4 * soft)
    return np.where(lines[..., None], np.array([0.72, 0.8, 0.9], np.float32), sheet)


def background(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A fresh cut of a background, lighter or darker each time: (size, size, 3) float32 in [0, 1]."""
    whole = tile(name, size)
    top, left, tint, turned = rng.random(4)
    room = whole.shape[0] - size + 1
    top, left = int(top * room), int(left * room)
    cut = whole[top : top + size, left : left + size]
    return (cut[:, ::-1] if turned < 0.5 else cut) * np.float32(0.93 + 0.12 * tint)


# --------------------------------------------------------------------------------------------- styles


@dataclass(frozen=True)
class Light:
    """How light falls in one picture: its direction (x, y; y down) and strength."""

    x: float
    y: float
    strength: float


@lru_cache(maxsize=16)
def grid(size: int) -> np.ndarray:
    """The centers of a picture's pixels along one side: (size,) float32 in (0, 1)."""
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)


@lru_cache(maxsize=16)
def _strokes(size: int) -> np.ndarray:
    # Noise smeared along one diagonal looks drawn; regular lines would look like the texture "striped".
    noise = stream("paint/strokes", 0, size).random((size, size)).astype(np.float32)
    smeared = np.mean([np.roll(noise, (k, -k), (0, 1)) for k in range(6)], axis=0)
    strokes: np.ndarray = np.clip(0.9 + 0.9 * (smeared - 0.5), 0.6, 1).astype(np.float32)
    return strokes


@lru_cache(maxsize=16)
def _blotches(size: int) -> np.ndarray:
    rng = stream("paint/blotches", 0, size)
    return (0.6 * cloud(rng, size, 7) + 0.4 * cloud(rng, size, 19)).astype(np.float32)


def halo(style: str, size: int) -> int:
    """How many pixels beyond its mask an object may change a picture of this style: its edge and its blur."""
    return 1 + _blurs(size) if style == "photo" else 1


def _blurs(size: int) -> int:
    return max(1, round(size / 96))


def _blur(pixels: np.ndarray) -> np.ndarray:
    """One pass of (1, 2, 1) / 4 along both sides, edges repeated."""
    padded = np.concatenate([pixels[:1], pixels, pixels[-1:]])
    pixels = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) * np.float32(0.25)
    padded = np.concatenate([pixels[:, :1], pixels, pixels[:, -1:]], axis=1)
    return (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) * np.float32(0.25)


def canvas(style: str, ground: np.ndarray) -> np.ndarray:
    """The background as the style shows it; (H, W, 3) float32 in [0, 1] in and out."""
    if style == "sketch":
        gray = ground.mean(axis=2, keepdims=True)
        return np.float32(0.5) + np.float32(0.28) * gray + np.float32(0.17) * ground
    if style == "watercolor":
        uneven = np.float32(0.08) * _blotches(ground.shape[0])[..., None]
        return np.float32(0.42) + np.float32(0.5) * ground + uneven
    return ground


def fill(
    style: str, tones: Tones, pattern: np.ndarray | None, window: tuple[slice, slice], size: int
) -> np.ndarray:
    """An object's surface inside `window` of a picture: (h, w, 3) float32 in [0, 1].

    Args:
        style: one of `STYLES`.
        tones: the tones of the object's color.
        pattern: (h, w) in [-1, 1] from `texture`, or None.
        window: the rows and columns of the picture that are painted.
        size: the picture's side in pixels.
    """
    shape = (window[0].stop - window[0].start, window[1].stop - window[1].start)
    if pattern is None:
        surface = np.broadcast_to(tones.base, (*shape, 3))
    else:
        up, down = np.maximum(pattern, 0)[..., None], np.minimum(pattern, 0)[..., None]
        surface = tones.base + up * (tones.light - tones.base) + down * (tones.base - tones.dark)
    if style == "sketch":
        strokes = _strokes(size)[window][..., None]
        return np.float32(0.95) + (surface - np.float32(0.95)) * strokes
    if style == "watercolor":
        wash = (np.float32(0.1) + np.float32(0.45) * _blotches(size)[window])[..., None]
        return surface + (1 - surface) * wash
    return surface


def finish(style: str, pixels: np.ndarray, light: Light, rng: np.random.Generator) -> np.ndarray:
    """The last step of a style over the whole picture; (H, W, 3) float32 in, uint8 out."""
    size = pixels.shape[0]
    if style == "photo":
        for _ in range(_blurs(size)):
            pixels = _blur(pixels)
        at = grid(size) - np.float32(0.5)
        across, down = np.float32(light.x * light.strength), np.float32(light.y * light.strength)
        slope = across * at[None, :] + down * at[:, None]
        corner = np.float32(0.45) * (at[None, :] ** 2 + at[:, None] ** 2)
        pixels = pixels * (np.float32(0.98) - corner + slope)[..., None]
        pixels = pixels + np.float32(0.035) * rng.standard_normal(pixels.shape, dtype=np.float32)
    elif style == "inverted":
        pixels = 1 - pixels
    elif style == "pixelated":
        pixels = np.round(pixels * 9) / 9
    elif style == "watercolor":
        pixels = pixels + np.float32(0.015) * rng.standard_normal((size, size, 1), dtype=np.float32)
    return (np.clip(pixels, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
