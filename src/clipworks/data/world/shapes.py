"""Shapes as signed distances.

Each shape is a function of an object's own coordinates: `u` to the right, `v` up, its center of mass near
the origin, reaching about 1 from it. It returns the distance to the edge in the same unit, negative
inside, from which the renderer gets a mask, an outline and an antialiased edge alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

REACH = 1.27
"""No point of a shape, drawn by however unsteady a hand, is farther than this from its center."""


def _polygon(points: Sequence[tuple[float, float]]) -> Distance:
    """Exact signed distance to a simple polygon."""
    start = np.asarray(points, dtype=np.float32)
    end = np.roll(start, -1, axis=0)
    ax, ay = (start[:, k].reshape(-1, 1, 1) for k in (0, 1))
    ex, ey = ((end - start)[:, k].reshape(-1, 1, 1) for k in (0, 1))
    by = end[:, 1].reshape(-1, 1, 1)  # not ay + ey, whose rounding would count a corner twice
    squared = ex * ex + ey * ey
    slope = ex / np.where(ey == 0, np.float32(1), ey)  # flat edges are crossed by no horizontal ray

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        wx, wy = u - ax, v - ay  # (edges, h, w)
        along = np.clip((wx * ex + wy * ey) / squared, 0, 1)
        apart = np.sqrt(((wx - ex * along) ** 2 + (wy - ey * along) ** 2).min(0))
        crossed = ((ay <= v) != (by <= v)) & (wx < slope * wy)
        inside = np.logical_xor.reduce(crossed, axis=0)
        return np.where(inside, -apart, apart)

    return distance


def _disc(x: float, y: float, radius: float) -> Distance:
    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.hypot(u - np.float32(x), v - np.float32(y)) - np.float32(radius)

    return distance


def _ellipse(x: float, a: float, b: float) -> Distance:
    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        # Level set over its slope: exact on the edge and good to a few percent near it.
        p, q = (u - np.float32(x)) / np.float32(a), v / np.float32(b)
        level = np.hypot(p, q) + np.float32(1e-6)  # the center is inside, not 0 / 0
        return level * (level - 1) / (np.hypot(p / np.float32(a), q / np.float32(b)) + np.float32(1e-6))

    return distance


def _union(*parts: Distance) -> Distance:
    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        nearest = parts[0](u, v)
        for part in parts[1:]:
            nearest = np.minimum(nearest, part(u, v))
        return nearest

    return distance


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - np.float32(0.73)) - np.float32(0.29)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = u - np.float32(0.33)
    return np.maximum(
        np.hypot(u, v) - np.float32(1.0), np.float32(0.815) - np.hypot(u - np.float32(0.495), v)
    )


def _semicircle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v = v + np.float32(0.45)
    return np.maximum(np.hypot(u, v) - np.float32(1.1), -v)


def _flower() -> Distance:
    turns = np.linspace(0, 2 * np.pi, 5, endpoint=False) + np.pi / 2
    petals = (_disc(0.69 * float(np.cos(t)), 0.69 * float(np.sin(t)), 0.4) for t in turns)
    return _union(_disc(0, 0, 0.44), *petals)


def _star() -> Distance:
    turns = np.linspace(0, 2 * np.pi, 10, endpoint=False) + np.pi / 2
    radii = (1.18, 0.5) * 5
    return _polygon([(r * float(np.cos(t)), r * float(np.sin(t))) for r, t in zip(radii, turns, strict=True)])


def _heart() -> Distance:
    # A square on its corner with a disc on each upper side.
    q, foot = 0.88, -1.13
    square = _polygon([(0, foot), (q, foot + q), (0, foot + 2 * q), (-q, foot + q)])
    left, right = (_disc(side * q / 2, foot + 1.5 * q, q * 0.7071) for side in (-1, 1))
    return _union(square, left, right)


_c, _l = 0.36, 1.02  # half the width, and the length, of a cross's arm
_DISTANCES: dict[str, Distance] = {
    "circle": _disc(0, 0, 1),
    "square": _polygon([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]),
    "triangle": _polygon([(0, 1.13), (-1.04, -0.57), (1.04, -0.57)]),
    "diamond": _polygon([(0, 1.18), (0.74, 0), (0, -1.18), (-0.74, 0)]),
    "oval": _ellipse(0, 1.15, 0.6),
    "semicircle": _semicircle,
    "ring": _ring,
    "crescent": _crescent,
    "cross": _polygon(
        [(-_c, -_l), (_c, -_l), (_c, -_c), (_l, -_c), (_l, _c), (_c, _c)]
        + [(_c, _l), (-_c, _l), (-_c, _c), (-_l, _c), (-_l, -_c), (-_c, -_c)]
    ),
    "star": _star(),
    "heart": _heart(),
    "arrow": _polygon(
        [(-1.08, -0.27), (0.05, -0.27), (0.05, -0.78), (1.12, 0), (0.05, 0.78), (0.05, 0.27), (-1.08, 0.27)]
    ),
    "drop": _union(_disc(0, -0.26, 0.72), _polygon([(0, 1.18), (-0.6235, 0.1), (0, -0.4), (0.6235, 0.1)])),
    "flower": _flower(),
    "house": _polygon(
        [(-0.74, -0.88), (0.74, -0.88), (0.74, 0.15), (1.06, 0.15), (0, 1.1), (-1.06, 0.15), (-0.74, 0.15)]
    ),
    "tree": _polygon(
        [(0, 1.18), (0.62, 0.3), (0.34, 0.3), (0.9, -0.5), (0.2, -0.5), (0.2, -1.06)]
        + [(-0.2, -1.06), (-0.2, -0.5), (-0.9, -0.5), (-0.34, 0.3), (-0.62, 0.3)]
    ),
    "fish": _union(
        _ellipse(0.27, 0.85, 0.56), _polygon([(-0.3, 0), (-1.08, 0.56), (-0.9, 0), (-1.08, -0.56)])
    ),
    "bolt": _polygon([(0.4, 1.12), (-0.72, -0.12), (-0.12, -0.12), (-0.4, -1.12), (0.74, 0.26), (0.1, 0.26)]),
}

SHAPES: tuple[str, ...] = tuple(_DISTANCES)


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the edge of `shape`, negative inside.

    Args:
        shape: one of `SHAPES`.
        u, v: the object's own coordinates, float32 of the same shape (h, w).

    Returns:
        (h, w) float32.
    """
    return _DISTANCES[shape](u, v)
