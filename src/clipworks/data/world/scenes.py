"""Scenes of simple things: 18 shapes in 12 colors and 7 textures on 10 backgrounds, in 6 styles.

A `Scene` is a record in which everything is stated: `sample` draws one, `render` paints it and gives the
truth of every pixel, `graph` and `attributes` read the record, `captions.py` puts it into words. Lengths
are fractions of the picture's side, so one scene can be rendered at any size from 32 to 256 pixels.

Two words about truth. *Visible* is what nothing in front hides (`instances`, `classes`, `boxes`,
`visible`); *amodal* is the whole object (`amodal`, `amodal_boxes`). A pixel belongs to an object when its
center lies inside the shape. And colors are the objects' own: in the style `inverted` a red circle is
shown as in a negative, and its truth is still red.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import cos, pi, sin
from typing import TYPE_CHECKING

import numpy as np

from clipworks.data.world import paint
from clipworks.data.world.kinds import Kind, check_names, check_size, pick, stream
from clipworks.data.world.shapes import REACH, distance
from clipworks.data.world.shapes import SHAPES as SHAPES
from clipworks.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS, TEXTURES, STYLES, BACKGROUNDS = paint.COLORS, paint.TEXTURES, paint.STYLES, paint.BACKGROUNDS
RADII: dict[str, tuple[float, float]] = {
    "small": (0.088, 0.104),
    "medium": (0.138, 0.158),
    "large": (0.205, 0.235),
}
SIZES: tuple[str, ...] = tuple(RADII)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "texture": TEXTURES,
    "size": SIZES,
    "background": BACKGROUNDS,
    "style": STYLES,
}
ATTRIBUTE_NAMES: tuple[str, ...] = tuple(f"{a}:{v}" for a, values in ATTRIBUTES.items() for v in values)
_COLUMN = {name: column for column, name in enumerate(ATTRIBUTE_NAMES)}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below", "in front of", "behind")
OPPOSITE: dict[str, str] = {a: RELATIONS[i ^ 1] for i, a in enumerate(RELATIONS)}
MARGIN = 0.08
"""Centers closer than this along an axis stand in no relation along it."""


@dataclass(frozen=True)
class Object:
    """One thing in a scene.

    Attributes:
        shape, color, texture, size: what it is called.
        x, y: its center in [0, 1], y downward.
        radius: its reach from the center, a fraction of the picture's side (exactly that for a circle).
        angle: counterclockwise, in radians.
        phase: where its texture begins.
    """

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    phase: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows. `objects` go from back to front; the first is the main one."""

    objects: tuple[Object, ...]
    background: str
    style: str
    seed: int
    index: int

    def without(self, i: int) -> Scene:
        """The same scene with object `i` taken away and nothing else changed."""
        return replace(self, objects=self.objects[:i] + self.objects[i + 1 :])


@dataclass(frozen=True)
class Tie:
    """A spurious tie: a value of one attribute decides another one, `rate` of the time.

    `Tie("shape", "background", {"fish": "water"}, 0.9)` puts 90 % of the scenes whose main object is a
    fish on water, and the others on any other background. Between attributes of an object a tie acts on
    every object: `Tie("color", "texture", {"red": "striped"}, 0.8)`.

    Attributes:
        cause: `"shape"`, `"color"`, `"texture"` or `"size"`.
        effect: another one of them that is drawn later than the cause, `"background"` or `"style"`.
        pairs: value of the cause -> value of the effect.
        rate: how often the tied value is taken, in [0, 1].
    """

    cause: str
    effect: str
    pairs: Mapping[str, str] = field(hash=False)  # equal ties still have equal hashes
    rate: float

    def __post_init__(self) -> None:
        order = tuple(ATTRIBUTES)
        check_names("Tie.cause", (self.cause,), order[:4])
        check_names("Tie.effect", (self.effect,), order[1:])
        if order.index(self.effect) <= order.index(self.cause):
            raise ConfigError(f"Tie: {self.effect} is drawn before {self.cause}; swap cause and effect")
        check_names("Tie.pairs", tuple(self.pairs), ATTRIBUTES[self.cause])
        check_names("Tie.pairs", tuple(self.pairs.values()), ATTRIBUTES[self.effect])
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"Tie.rate {self.rate} is outside 0..1")
        object.__setattr__(self, "pairs", dict(self.pairs))


@dataclass(frozen=True)
class SceneConfig:
    """Which scenes there are.

    Attributes:
        shapes, colors, textures, sizes, backgrounds, styles: the values in use; everything by default.
        pairs: if given, the only (shape, color) combinations in use, so that others stay unseen.
        count: the smallest and the largest number of objects, each number equally often.
        overlap: how often an object is put partly in front of an earlier one.
        repeats: how often an object looks like the one before it, which makes countable groups.
        ties: spurious ties, later ones overriding earlier ones.
    """

    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = COLORS
    textures: tuple[str, ...] = TEXTURES
    sizes: tuple[str, ...] = SIZES
    backgrounds: tuple[str, ...] = BACKGROUNDS
    styles: tuple[str, ...] = STYLES
    pairs: tuple[tuple[str, str], ...] | None = None
    count: tuple[int, int] = (1, 4)
    overlap: float = 0.3
    repeats: float = 0.15
    ties: tuple[Tie, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, attribute in zip(
            ("shapes", "colors", "textures", "sizes", "backgrounds", "styles"), ATTRIBUTES, strict=True
        ):
            given = tuple(getattr(self, name))
            object.__setattr__(self, name, given)  # a YAML file brings lists
            check_names(f"SceneConfig.{name}", given, ATTRIBUTES[attribute])
        if self.pairs is not None:
            pairs = tuple((shape, color) for shape, color in self.pairs)
            object.__setattr__(self, "pairs", pairs)
            check_names("SceneConfig.pairs", tuple(shape for shape, _ in pairs), SHAPES)
            check_names("SceneConfig.pairs", tuple(color for _, color in pairs), COLORS)
        low, high = self.count
        if not 1 <= low <= high <= MOST:
            raise ConfigError(f"SceneConfig.count {low, high} must rise within 1..{MOST}")
        object.__setattr__(self, "count", (low, high))
        object.__setattr__(self, "ties", tuple(self.ties))
        for name in ("overlap", "repeats"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"SceneConfig.{name} {getattr(self, name)} is outside 0..1")


MOST = 16
"""The largest number of objects in a scene."""


# ------------------------------------------------------------------------------------------- sampling


def sample(config: SceneConfig, seed: int, index: int) -> Scene:
    """Scene `index` of the world under `seed`: the same for the same three, in every process.

    Raises:
        ConfigError: if a number is negative.
    """
    rng = stream("scenes", seed, index)
    low, high = config.count
    count = low + int(rng.random() * (high - low + 1))
    looks: list[dict[str, str]] = []
    for i in range(count):
        looks.append(dict(looks[-1]) if i and rng.random() < config.repeats else _look(config, rng))
    surroundings = {"background": config.backgrounds, "style": config.styles}
    chosen = {name: _tied(config, rng, name, options, looks[0]) for name, options in surroundings.items()}
    return Scene(_place(config, rng, looks), chosen["background"], chosen["style"], seed, index)


def _look(config: SceneConfig, rng: np.random.Generator) -> dict[str, str]:
    look: dict[str, str] = {}
    if config.pairs is not None:
        look["shape"], look["color"] = pick(rng, config.pairs)
    else:
        look["shape"] = pick(rng, config.shapes)
        look["color"] = _tied(config, rng, "color", config.colors, look)
    look["texture"] = _tied(config, rng, "texture", config.textures, look)
    look["size"] = _tied(config, rng, "size", config.sizes, look)
    return look


def _tied(
    config: SceneConfig,
    rng: np.random.Generator,
    effect: str,
    options: tuple[str, ...],
    look: Mapping[str, str],
) -> str:
    value: str = pick(rng, options)
    for tie in config.ties:
        if tie.effect == effect and look.get(tie.cause) in tie.pairs:
            target = tie.pairs[look[tie.cause]]
            others = tuple(option for option in options if option != target)
            value = target if not others or rng.random() < tie.rate else pick(rng, others)
    return value


def _place(config: SceneConfig, rng: np.random.Generator, looks: list[dict[str, str]]) -> tuple[Object, ...]:
    """Puts things where they fit, from back to front; all become smaller together until they do."""
    shrink = min(1.0, (4.5 / len(looks)) ** 0.5)
    while True:
        placed: list[Object] = []
        free: list[int] = []  # objects that take no part in an overlap yet
        for look in looks:
            low, high = RADII[look["size"]]
            r = shrink * (low + (high - low) * float(rng.random()))
            turn, a, b = (float(t) for t in rng.random(3))
            thing = Object(**look, x=0.5, y=0.5, radius=r, angle=(turn - 0.5) * pi / 3, phase=(a, b))
            found = None
            if free and rng.random() < config.overlap:
                found = _in_front(rng, thing, placed, free)
            if found is None:
                found = _apart(rng, thing, placed)
                if found is None:
                    break
                free.append(len(placed))
            placed.append(found)
        else:
            return tuple(placed)
        shrink *= 0.93


def _apart(rng: np.random.Generator, thing: Object, placed: list[Object]) -> Object | None:
    edge = thing.radius * REACH
    for _ in range(40):
        x, y = (edge + (1 - 2 * edge) * float(t) for t in rng.random(2))
        if all((x - o.x) ** 2 + (y - o.y) ** 2 > ((o.radius + thing.radius) * 1.12) ** 2 for o in placed):
            return replace(thing, x=x, y=y)
    return None


def _in_front(
    rng: np.random.Generator, thing: Object, placed: list[Object], free: list[int]
) -> Object | None:
    """Puts `thing` over the edge of an earlier object, hiding 5 to 45 % of it; None without room."""
    edge = thing.radius * REACH
    for _ in range(12):
        j = free[int(rng.random() * len(free))]
        other = placed[j]
        small, big = sorted((thing.radius, other.radius))
        turn, step = (float(t) for t in rng.random(2))
        apart = big + small * (0.6 * step)
        x, y = other.x + apart * cos(2 * pi * turn), other.y + apart * sin(2 * pi * turn)
        if not (edge <= x <= 1 - edge and edge <= y <= 1 - edge):
            continue
        if any(
            (x - o.x) ** 2 + (y - o.y) ** 2 <= ((o.radius + thing.radius) * 1.12) ** 2
            for k, o in enumerate(placed)
            if k != j
        ):
            continue
        found = replace(thing, x=x, y=y)
        if 0.05 <= hidden(other, found) <= 0.45:
            free.remove(j)
            return found
    return None


@lru_cache(maxsize=1)
def _raster() -> tuple[np.ndarray, np.ndarray]:
    at = np.linspace(-REACH, REACH, 33, dtype=np.float32)
    v, u = np.meshgrid(at, at, indexing="ij")
    return u, v


def hidden(behind: Object, front: Object) -> float:
    """The part of `behind` that `front` covers, in [0, 1], from the two shapes alone."""
    far = REACH * (behind.radius + front.radius)
    if (behind.x - front.x) ** 2 + (behind.y - front.y) ** 2 >= far * far:
        return 0.0
    u, v = _raster()
    inside = distance(behind.shape, u, v) <= 0
    c, s = np.float32(cos(behind.angle)), np.float32(sin(behind.angle))
    x = np.float32(behind.x) + np.float32(behind.radius) * (c * u - s * v)
    y = np.float32(behind.y) - np.float32(behind.radius) * (s * u + c * v)
    covered = distance(front.shape, *_own(front, x, y)) <= 0
    return float((inside & covered).sum() / inside.sum())


def _own(thing: Object, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An object's own coordinates of points of the picture."""
    c, s = np.float32(cos(thing.angle) / thing.radius), np.float32(sin(thing.angle) / thing.radius)
    right, up = x - np.float32(thing.x), np.float32(thing.y) - y
    return c * right + s * up, c * up - s * right


# ------------------------------------------------------------------------------------------ rendering


@dataclass(frozen=True)
class Truth:
    """Where everything is, pixel by pixel; n objects, picture (H, W).

    Attributes:
        instances: (H, W) int16, 0 is background and i + 1 the visible part of object i.
        classes: (H, W) int16, 0 is background and k + 1 the shape `SHAPES[k]`.
        depth: (H, W) float32, distance of what is seen: 1 is the background, the front object is nearest.
        boxes: (n, 4) int32, x0 y0 x1 y1 around the visible part, ends exclusive; zeros if nothing is seen.
        amodal: (n, H, W) bool, the whole objects.
        amodal_boxes: (n, 4) int32 around them.
        visible: (n,) float32, the visible part of each object, in [0, 1].
    """

    instances: np.ndarray
    classes: np.ndarray
    depth: np.ndarray
    boxes: np.ndarray
    amodal: np.ndarray
    amodal_boxes: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class Rendered(Truth):
    """A picture, `pixels` (H, W, 3) uint8, and its truth."""

    pixels: np.ndarray


def distances(count: int) -> np.ndarray:
    """The depth of `count` objects from back to front, (count,) float32 between 1 (the background) and 0."""
    return (np.arange(count, 0, -1) / (count + 1)).astype(np.float32)


def truth(scene: Scene, size: int) -> Truth:
    """Masks, boxes and depth at `size` x `size` pixels without painting a picture.

    Raises:
        ConfigError: if `size` is not in 32..256.
    """
    check_size(size)
    return _truth(scene, _trace(scene, size), size)


def render(scene: Scene, size: int) -> Rendered:
    """Paints a scene at `size` x `size` pixels and gives the truth with it.

    Raises:
        ConfigError: if `size` is not in 32..256.
    """
    check_size(size)
    drawn = _trace(scene, size)
    block = _block(scene.style, size)
    cells = -(-size // block)
    rng = stream("scenes/picture", scene.seed, scene.index)
    ground = paint.background(scene.background, cells * block, rng)
    if block > 1:
        ground = ground.reshape(cells, block, cells, block, 3).mean((1, 3))
    turn, strength = (float(t) for t in rng.random(2))
    light = paint.Light(cos(2 * pi * turn), sin(2 * pi * turn), 0.15 + 0.3 * strength)
    pixels = np.array(paint.canvas(scene.style, ground), dtype=np.float32)
    for thing, (window, d, u, v) in zip(scene.objects, drawn, strict=True):
        tones = paint.TONES[thing.color]
        pattern = paint.texture(thing.texture, u, v, thing.phase)
        surface = paint.fill(scene.style, tones, pattern, window, cells)
        per_pixel = np.float32(thing.radius * cells)
        if scene.style == "photo":  # a bulge, lit from the light's side
            bulge = np.float32(0.22) * (np.float32(light.x) * u - np.float32(light.y) * v)
            surface = surface * (1 + bulge)[..., None]
        # On a thing of few pixels a full outline would leave little of the color.
        ink = np.float32(min(0.75, max(0.3, 0.06 * float(per_pixel))))
        if scene.style == "pixelated":
            alpha, line = (d <= 0).astype(np.float32), (d > -0.8 / per_pixel) * ink
        else:
            alpha = _coverage(d, per_pixel)
            width = max(0.055, 0.5 / float(per_pixel)) * (1.5 if scene.style == "sketch" else 1)
            line = np.clip(np.float32(0.5) + (d + np.float32(width)) * per_pixel, 0, 1) * ink
        if scene.style == "sketch":
            line = line * np.float32(1.2)
        surface = surface + (tones.edge - surface) * line[..., None]
        below = pixels[window]
        pixels[window] = below + (surface - below) * alpha[..., None]
    picture = paint.finish(scene.style, pixels, light, rng)
    if block > 1:
        picture = picture.repeat(block, 0).repeat(block, 1)[:size, :size]
    known = _truth(scene, drawn, size)
    return Rendered(**vars(known), pixels=picture)


def _coverage(d: np.ndarray, per_pixel: np.float32) -> np.ndarray:
    """How much of each pixel a shape covers: (h, w) in [0, 1].

    Only pixels beside the mask's edge are partly covered. A tip or a notch narrower than a pixel would
    otherwise be painted where the mask knows nothing of it.
    """
    inside = np.pad((d <= 0).view(np.uint8), 1, mode="edge")
    rows = inside[:-2] + inside[1:-1] + inside[2:]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]  # of the 9 pixels here, how many are inside
    alpha = np.clip(np.float32(0.5) - d * per_pixel, 0, 1)
    return np.where(around == 9, np.float32(1), np.where(around == 0, np.float32(0), alpha))


def _block(style: str, size: int) -> int:
    """The side of one cell of the style `pixelated`, in pixels; a cell is the unit of picture and truth."""
    return max(1, round(size / 40)) if style == "pixelated" else 1


_Drawn = tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]


def _trace(scene: Scene, size: int) -> list[_Drawn]:
    """For each object the window it lies in, and there its signed distance and own coordinates."""
    block = _block(scene.style, size)
    cells = -(-size // block)
    at = paint.grid(cells) * np.float32(cells * block / size)  # cells at the far edge may be cut
    drawn = []
    for thing in scene.objects:
        reach = thing.radius * REACH + 1.5 * block / size
        first_row, last_row = np.searchsorted(at, (thing.y - reach, thing.y + reach))
        first, last = np.searchsorted(at, (thing.x - reach, thing.x + reach))
        window = (slice(int(first_row), int(last_row)), slice(int(first), int(last)))
        u, v = _own(thing, at[None, window[1]], at[window[0], None])
        d = distance(thing.shape, u, v)
        if scene.style == "sketch":  # an unsteady hand
            d = d + np.float32(0.03) * np.sin(7 * u + np.float32(6 * thing.phase[0])) * np.cos(
                6 * v + np.float32(6 * thing.phase[1])
            )
        drawn.append((window, d, u, v))
    return drawn


def _truth(scene: Scene, drawn: list[_Drawn], size: int) -> Truth:
    count = len(scene.objects)
    block = _block(scene.style, size)
    cells = -(-size // block)
    amodal = np.zeros((count, cells, cells), dtype=bool)
    instances = np.zeros((cells, cells), dtype=np.int16)
    for i, (window, d, _, _) in enumerate(drawn):
        inside = d <= 0
        amodal[i][window] = inside
        instances[window][inside] = i + 1
    if block > 1:
        amodal = amodal.repeat(block, 1).repeat(block, 2)[:, :size, :size]
        instances = instances.repeat(block, 0).repeat(block, 1)[:size, :size]
    shapes = np.array([0] + [SHAPES.index(o.shape) + 1 for o in scene.objects], dtype=np.int16)
    far = np.concatenate([np.ones(1, np.float32), distances(count)])
    seen = np.bincount(instances.reshape(-1), minlength=count + 1)[1:]
    whole = amodal.reshape(count, -1).sum(1)
    shown = instances[None] == np.arange(1, count + 1, dtype=np.int16)[:, None, None]
    return Truth(
        instances=instances,
        classes=shapes[instances],
        depth=far[instances],
        boxes=boxes_of(shown),
        amodal=amodal,
        amodal_boxes=boxes_of(amodal),
        visible=(seen / np.maximum(whole, 1)).astype(np.float32),
    )


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of masks: (n, H, W) bool -> (n, 4) int32 x0 y0 x1 y1, ends exclusive, zeros if empty."""
    boxes = np.zeros((len(masks), 4), dtype=np.int32)
    for axis, (low, high) in ((1, (0, 2)), (2, (1, 3))):
        filled = np.any(masks, axis=axis)  # over rows: which columns are filled, and the other way round
        boxes[:, low] = filled.argmax(1)
        boxes[:, high] = np.where(filled.any(1), filled.shape[1] - filled[:, ::-1].argmax(1), 0)
    return boxes


# ---------------------------------------------------------------------------------- reading a scene


def graph(scene: Scene) -> tuple[tuple[int, str, int], ...]:
    """The scene graph: all (subject, relation, object), objects by their place in `scene.objects`.

    Left, right, above and below hold along the axis on which the centers are farther apart, if that is
    more than `MARGIN`; in front and behind hold where at least 3 % of the one behind are covered.
    """
    found = []
    for i, a in enumerate(scene.objects):
        for j, b in enumerate(scene.objects):
            if i == j:
                continue
            across, down = b.x - a.x, b.y - a.y
            if max(abs(across), abs(down)) > MARGIN:
                if abs(across) >= abs(down):
                    found.append((i, "left of" if across > 0 else "right of", j))
                else:
                    found.append((i, "above" if down > 0 else "below", j))
            if i < j and hidden(a, b) >= 0.03:
                found.append((i, "behind", j))
                found.append((j, "in front of", i))
    return tuple(found)


def attributes(scene: Scene) -> np.ndarray:
    """Which of `ATTRIBUTE_NAMES` each object has: (n, A) uint8 of 0 and 1.

    Background and style belong to every object; `.max(0)` is the attribute vector of the scene.
    """
    table = np.zeros((len(scene.objects), len(ATTRIBUTE_NAMES)), dtype=np.uint8)
    for row, thing in zip(table, scene.objects, strict=True):
        for name in ("shape", "color", "texture", "size"):
            row[_COLUMN[f"{name}:{getattr(thing, name)}"]] = 1
        row[_COLUMN[f"background:{scene.background}"]] = 1
        row[_COLUMN[f"style:{scene.style}"]] = 1
    return table


def _describe(scene: Scene, kind: str = "short", language: str = "en", *, seed: int = 0) -> str:
    from clipworks.data.world.captions import describe

    return describe(scene, kind, language, seed=seed)


def preview(count: int, seed: int, size: int) -> Image:
    """A sheet of `count` scenes with their short captions."""
    from clipworks.data.world.sheet import contact_sheet

    tiles = []
    for index in range(count):
        scene = sample(SceneConfig(), seed, index)
        label = f"{index} {scene.style}: {_describe(scene)}"
        tiles.append((render(scene, size).pixels, label))
    return contact_sheet(tiles)


KIND = Kind(
    name="scenes",
    about="simple things on backgrounds, with masks, boxes, order, relations and attributes",
    config=SceneConfig,
    record=Scene,
    sample=sample,
    render=render,
    describe=_describe,
    preview=preview,
)
