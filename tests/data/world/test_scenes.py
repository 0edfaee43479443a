"""The truth of a scene agrees with its picture, by code that shares nothing with the renderer."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from clipworks.data.world import paint, scenes
from clipworks.data.world.scenes import Object, Rendered, Scene, SceneConfig, Tie
from clipworks.errors import ConfigError

FEW = 150
MANY = [pytest.param(FEW, id="150"), pytest.param(1000, id="1000", marks=pytest.mark.slow)]
CROWDED = SceneConfig(count=(2, 8), overlap=0.7)

# What a person means by these words, as web colors and not as the renderer's own table.
SEEN_AS = {
    "red": (220, 20, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 220, 40),
    "green": (34, 139, 60),
    "cyan": (40, 200, 210),
    "blue": (50, 80, 210),
    "purple": (128, 40, 160),
    "pink": (255, 130, 190),
    "brown": (115, 65, 30),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
}


@cache
def drawn(config: SceneConfig, seed: int, index: int, size: int) -> tuple[Scene, Rendered]:
    scene = scenes.sample(config, seed, index)
    return scene, scenes.render(scene, size)


def world(count: int, config: SceneConfig = CROWDED, size: int = 64) -> list[tuple[Scene, Rendered]]:
    return [drawn(config, 11, index, size) for index in range(count)]


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    return ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=pixels)


def span(mask: np.ndarray) -> float:
    """The largest distance between two pixels of a mask."""
    edge = np.argwhere(mask & ~ndimage.binary_erosion(mask)).astype(float)
    return float(np.sqrt(((edge[:, None] - edge[None]) ** 2).sum(-1)).max())


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB 0..255 under D65, in which equal steps look about equally large."""
    linear = np.where(rgb / 255 > 0.04045, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def digest(config: SceneConfig, seed: int, count: int, size: int) -> str:
    total = hashlib.sha256()
    for index in range(count):
        shown = scenes.render(scenes.sample(config, seed, index), size)
        for part in (shown.pixels, shown.instances, shown.classes, shown.depth, shown.boxes, shown.amodal):
            total.update(np.ascontiguousarray(part).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("count", MANY)
def test_taking_an_object_away_changes_the_picture_inside_its_mask_and_edge_and_nowhere_else(
    count: int,
) -> None:
    for scene, shown in world(count):
        for i in range(len(scene.objects)):
            without = scenes.render(scene.without(i), 64)
            changed = (without.pixels != shown.pixels).any(2)
            assert not (changed & ~grown(shown.amodal[i], paint.halo(scene.style, 64))).any()
            core = ndimage.binary_erosion(shown.instances == i + 1)
            if core.sum() >= 9:
                assert changed[core].mean() > 0.2, (scene, i)  # gray pixels on gray stone may agree


@pytest.mark.parametrize("count", MANY)
def test_what_lies_behind_cannot_be_seen_where_it_is_covered(count: int) -> None:
    overlaps = 0
    for scene, shown in world(count):
        reach = paint.halo(scene.style, 64)
        for behind, front in combinations(range(len(scene.objects)), 2):
            both = shown.amodal[behind] & shown.amodal[front]
            if not both.any():
                continue
            overlaps += 1
            assert (shown.instances[both] > behind + 1).all()
            near, far = shown.depth[shown.instances == front + 1], shown.depth[shown.instances == behind + 1]
            assert near.max() < far.min() < 1
            covered = both & ndimage.binary_erosion(shown.amodal[front], np.ones((3, 3)), iterations=reach)
            without = scenes.render(scene.without(behind), 64)
            assert (without.pixels == shown.pixels)[covered].all()
    assert overlaps > count / 4


@pytest.mark.parametrize("count", MANY)
def test_boxes_are_the_tight_bounds_of_the_visible_and_of_the_whole_object(count: int) -> None:
    for scene, shown in world(count):
        for i in range(len(scene.objects)):
            for mask, box in (
                (shown.instances == i + 1, shown.boxes[i]),
                (shown.amodal[i], shown.amodal_boxes[i]),
            ):
                rows, columns = np.nonzero(mask)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("count", MANY)
def test_masks_agree_with_each_other(count: int) -> None:
    for scene, shown in world(count):
        names = np.array(["-", *scenes.SHAPES])
        assert (shown.classes == 0).tolist() == (shown.instances == 0).tolist()
        assert (shown.depth == 1).tolist() == (shown.instances == 0).tolist()
        assert (shown.instances > 0).tolist() == shown.amodal.any(0).tolist()
        for i, thing in enumerate(scene.objects):
            seen = shown.instances == i + 1
            assert not (seen & ~shown.amodal[i]).any()
            assert set(names[shown.classes[seen]]) == {thing.shape}
            assert shown.visible[i] == pytest.approx(seen.sum() / shown.amodal[i].sum())
            assert shown.visible[i] > 0.3, "no object is nearly hidden"


@pytest.mark.parametrize("count", MANY)
def test_the_mean_color_inside_a_mask_is_nearest_to_the_color_that_is_named(count: int) -> None:
    names = list(SEEN_AS)
    anchors = lab(np.array(list(SEEN_AS.values()), dtype=float))
    config = SceneConfig(styles=("flat",), count=(1, 6))
    judged = 0
    for scene, shown in world(count, config):
        for i, thing in enumerate(scene.objects):
            inside = shown.instances == i + 1
            core = ndimage.binary_erosion(inside)
            # The edge mixes the surroundings in. A thing of some size bears that; of a tiny or thin one
            # only the pixels wholly inside are judged, if there are any to speak of.
            for region, enough in ((inside, 60), (core, 10)):
                if shown.visible[i] > 0.8 and region.sum() >= enough:
                    judged += 1
                    mean = shown.pixels[region].mean(0)
                    named = names[int(((anchors - lab(mean)) ** 2).sum(-1).argmin())]
                    assert named == thing.color, (thing, mean)
    assert judged > 4 * count


@pytest.mark.parametrize("count", MANY)
def test_what_is_called_larger_is_larger(count: int) -> None:
    rank = {"small": 0, "medium": 1, "large": 2}
    compared = 0
    for scene, shown in world(count, SceneConfig(count=(2, 4)), size=128):
        spans = [span(mask) for mask in shown.amodal]
        for a, b in combinations(range(len(spans)), 2):
            left, right = rank[scene.objects[a].size], rank[scene.objects[b].size]
            if left != right:
                compared += 1
                assert (spans[a] < spans[b]) == (left < right), (scene, spans)
    assert compared > count / 2


@pytest.mark.parametrize("count", MANY)
def test_relations_agree_with_the_centers_and_the_overlaps_of_the_masks(count: int) -> None:
    for index in range(count):
        scene = scenes.sample(CROWDED, 11, index)
        # The graph says nothing of the style, in whose coarse cells a small overlap may vanish.
        shown = scenes.truth(replace(scene, style="flat"), 128)
        centers = [np.argwhere(mask).mean(0)[::-1] for mask in shown.amodal]
        edges = scenes.graph(scene)
        assert len(set(edges)) == len(edges)
        for i, relation, j in edges:
            (xi, yi), (xj, yj) = centers[i], centers[j]
            both = (shown.amodal[i] & shown.amodal[j]).any()
            assert {
                "left of": xi < xj,
                "right of": xi > xj,
                "above": yi < yj,
                "below": yi > yj,
                "in front of": both and i > j,
                "behind": both and i < j,
            }[relation], (scene, i, relation, j)
            assert (j, {"left of": "right of", "right of": "left of", "above": "below", "below": "above",
                        "in front of": "behind", "behind": "in front of"}[relation], i) in edges  # fmt: skip
        for i, j in combinations(range(len(centers)), 2):
            share = (shown.amodal[i] & shown.amodal[j]).sum() / shown.amodal[i].sum()
            if share > 0.08:
                assert (j, "in front of", i) in edges
            if np.abs(centers[i] - centers[j]).max() > 128 * 0.2:
                assert any((a, b) == (i, j) and r not in ("behind", "in front of") for a, r, b in edges)


def test_attributes_name_what_the_record_says() -> None:
    names = scenes.ATTRIBUTE_NAMES
    for scene, _ in world(FEW):
        table = scenes.attributes(scene)
        assert table.shape == (len(scene.objects), len(names))
        for row, thing in zip(table, scene.objects, strict=True):
            assert {names[k] for k in np.nonzero(row)[0]} == {
                f"shape:{thing.shape}",
                f"color:{thing.color}",
                f"texture:{thing.texture}",
                f"size:{thing.size}",
                f"background:{scene.background}",
                f"style:{scene.style}",
            }


@settings(max_examples=60)
@given(size=st.integers(32, 256), index=st.integers(0, 10**6), style=st.sampled_from(scenes.STYLES))
def test_every_size_and_style_can_be_rendered_and_no_object_leaves_the_frame(
    size: int, index: int, style: str
) -> None:
    scene = scenes.sample(SceneConfig(styles=(style,)), 3, index)
    shown = scenes.render(scene, size)
    assert shown.pixels.shape == (size, size, 3)
    assert shown.pixels.dtype == np.uint8
    assert shown.instances.shape == shown.classes.shape == shown.depth.shape == (size, size)
    block = max(1, round(size / 40)) if style == "pixelated" else 1  # a cell may be cut by the frame
    for i, thing in enumerate(scene.objects):
        left, top, right, bottom = shown.amodal_boxes[i] / size
        slack = 2 * block / size + 0.05 * thing.radius
        assert abs((left + right) / 2 - thing.x) < 0.45 * thing.radius + slack
        assert max(right - left, bottom - top) < 2.5 * thing.radius + slack
        assert max(right - left, bottom - top) > 1.3 * thing.radius - slack


def test_truth_without_a_picture_is_the_truth_of_the_picture() -> None:
    for scene, shown in world(40):
        truth = scenes.truth(scene, 64)
        for name, value in vars(truth).items():
            assert np.array_equal(value, getattr(shown, name)), name


def test_a_scene_twice_the_size_shows_the_same() -> None:
    config = SceneConfig(styles=("flat",))
    for index in range(30):
        scene = scenes.sample(config, 2, index)
        small, large = scenes.truth(scene, 64).amodal, scenes.truth(scene, 128).amodal
        for a, b in zip(small, large, strict=True):
            halved = b.reshape(64, 2, 64, 2).mean((1, 3))
            assert not (a & ~grown(halved > 0, 1)).any()
            assert not ((halved == 1) & ~grown(a, 1)).any()


def test_the_negative_of_a_scene_is_the_flat_one_turned_around() -> None:
    for index in range(30):
        scene = scenes.sample(SceneConfig(styles=("flat",)), 5, index)
        flat = scenes.render(scene, 64).pixels.astype(int)
        negative = scenes.render(replace(scene, style="inverted"), 64).pixels.astype(int)
        assert np.abs(flat + negative - 255).max() <= 1


def test_styles_look_different_and_leave_layout_alone() -> None:
    scene = scenes.sample(SceneConfig(styles=("flat",), count=(3, 3)), 8, 0)
    shown = {style: scenes.render(replace(scene, style=style), 64) for style in scenes.STYLES}
    for a, b in combinations(scenes.STYLES, 2):
        assert np.abs(shown[a].pixels.astype(int) - shown[b].pixels).mean() > 4, (a, b)
    for style in ("photo", "inverted", "watercolor"):
        assert np.array_equal(shown[style].instances, shown["flat"].instances)


@pytest.mark.parametrize("size", [48, 64])
def test_shapes_can_be_told_apart(size: int) -> None:
    """Even at the medium size no two outlines agree, by the share of the pixels that they have in common."""
    masks = {}
    for shape in scenes.SHAPES:
        thing = Object(shape, "red", "plain", "medium", 0.5, 0.5, 0.148, 0.0, (0.0, 0.0))
        masks[shape] = scenes.truth(Scene((thing,), "paper", "flat", 0, 0), size).amodal[0]
    for a, b in combinations(masks, 2):
        common = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert common < 0.9, (a, b, common)


def test_textures_can_be_seen_at_64_pixels() -> None:
    def painted(texture: str, color: str) -> tuple[np.ndarray, np.ndarray]:
        thing = Object("circle", color, texture, "medium", 0.5, 0.5, 0.148, 0.2, (0.2, 0.6))
        shown = scenes.render(Scene((thing,), "paper", "flat", 0, 0), 64)
        return shown.pixels.astype(int), ndimage.binary_erosion(shown.amodal[0], iterations=2)

    for color in scenes.COLORS:
        pictures = {texture: painted(texture, color) for texture in scenes.TEXTURES}
        for a, b in combinations(scenes.TEXTURES, 2):
            (left, inside), (right, _) = pictures[a], pictures[b]
            assert np.abs(left - right)[inside].mean() > 5, (color, a, b)


def test_the_same_numbers_give_the_same_bytes_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hashlib, numpy as np\n"
        "from clipworks.data.world import scenes, captions\n"
        "total = hashlib.sha256()\n"
        "for index in reversed(range(20)):\n"  # another order, other caches
        "    scenes.render(scenes.sample(scenes.SceneConfig(), 4, index), 48)\n"
        "for index in range(20):\n"
        "    shown = scenes.render(scenes.sample(scenes.SceneConfig(), 4, index), 64)\n"
        "    for part in (shown.pixels, shown.instances, shown.classes,\n"
        "                 shown.depth, shown.boxes, shown.amodal):\n"
        "        total.update(np.ascontiguousarray(part).tobytes())\n"
        "assert 'torch' not in sys.modules\n"
        "print(total.hexdigest())\n"
    )
    source = str(Path(scenes.__file__).parents[3])
    other = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(SceneConfig(), 4, 20, 64)


def test_nothing_global_is_drawn_from(untouched_rng: None) -> None:
    digest(SceneConfig(), 0, 12, 32)


def test_other_seeds_and_indices_give_other_scenes() -> None:
    found = {scenes.sample(SceneConfig(), seed, index).objects for seed in range(20) for index in range(20)}
    assert len(found) == 400


def within(successes: int, trials: int, rate: float) -> bool:
    """A two-sided bound that chance breaks once in some ten thousand worlds."""
    return abs(successes - trials * rate) <= 4 * np.sqrt(trials * rate * (1 - rate)) + 1


@pytest.mark.parametrize("rate", [0.0, 0.6, 0.95, 1.0])
def test_a_tie_to_the_background_holds_as_often_as_it_says(rate: float) -> None:
    config = SceneConfig(
        shapes=("fish", "tree"),
        count=(1, 2),
        ties=(Tie("shape", "background", {"fish": "water", "tree": "grass"}, rate),),
    )
    sampled = [scenes.sample(config, 1, index) for index in range(1500)]
    for shape, ground in (("fish", "water"), ("tree", "grass")):
        group = [scene.background == ground for scene in sampled if scene.objects[0].shape == shape]
        assert len(group) > 600
        assert within(sum(group), len(group), rate)


def test_a_tie_between_attributes_holds_for_every_object_and_leaves_the_rest_alone() -> None:
    tie = Tie("color", "texture", {"red": "striped", "blue": "dotted"}, 0.8)
    config = SceneConfig(
        colors=("red", "blue", "green"), textures=("striped", "dotted"), repeats=0, ties=(tie,)
    )
    objects = [thing for index in range(800) for thing in scenes.sample(config, 6, index).objects]
    for color, texture, rate in (("red", "striped", 0.8), ("blue", "dotted", 0.8), ("green", "striped", 0.5)):
        group = [thing.texture == texture for thing in objects if thing.color == color]
        assert within(sum(group), len(group), rate)


def test_equal_worlds_have_equal_hashes() -> None:
    def config(rate: float) -> SceneConfig:
        return SceneConfig(ties=(Tie("shape", "background", {"fish": "water"}, rate),))

    assert config(0.5) == config(0.5) != config(0.6)
    assert hash(config(0.5)) == hash(config(0.5))


def test_without_ties_values_are_equally_frequent() -> None:
    sampled = [scenes.sample(SceneConfig(repeats=0), 9, index) for index in range(800)]
    objects = [thing for scene in sampled for thing in scene.objects]
    for name in ("shape", "color", "texture", "size"):
        for value in scenes.ATTRIBUTES[name]:
            hits = sum(getattr(thing, name) == value for thing in objects)
            assert within(hits, len(objects), 1 / len(scenes.ATTRIBUTES[name])), value
    for number in range(1, 5):
        assert within(sum(len(scene.objects) == number for scene in sampled), len(sampled), 0.25)


def test_only_the_pairs_that_are_allowed_occur() -> None:
    pairs = (("circle", "red"), ("star", "blue"), ("star", "red"))
    seen = {
        (thing.shape, thing.color)
        for index in range(200)
        for thing in scenes.sample(SceneConfig(pairs=pairs), 0, index).objects
    }
    assert seen == set(pairs)


def test_a_full_scene_still_keeps_its_objects_in_view() -> None:
    for index in range(25):
        scene = scenes.sample(SceneConfig(count=(16, 16)), 0, index)
        shown = scenes.truth(scene, 128)
        assert len(scene.objects) == 16
        assert shown.visible.min() > 0.3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SceneConfig(shapes=("cirlce",)), "did you mean circle"),
        (lambda: SceneConfig(colors=()), "empty"),
        (lambda: SceneConfig(count=(0, 3)), "0, 3"),
        (lambda: SceneConfig(count=(5, 4)), "5, 4"),
        (lambda: SceneConfig(overlap=1.5), "1.5"),
        (lambda: SceneConfig(pairs=(("circle", "rot"),)), "rot"),
        (lambda: Tie("texture", "color", {"striped": "red"}, 0.5), "swap"),
        (lambda: Tie("shape", "background", {"fish": "wter"}, 0.5), "did you mean water"),
        (lambda: Tie("shape", "background", {"fish": "water"}, 2), "2"),
        (lambda: scenes.sample(SceneConfig(), -1, 0), "-1"),
        (lambda: scenes.render(scenes.sample(SceneConfig(), 0, 0), 31), "31"),
        (lambda: scenes.truth(scenes.sample(SceneConfig(), 0, 0), 257), "257"),
    ],
)
def test_bad_knobs_are_named(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()  # type: ignore[operator]


def test_lists_from_a_file_make_the_same_world() -> None:
    listed = SceneConfig(shapes=["circle", "star"], count=[1, 2])  # type: ignore[arg-type]
    assert scenes.sample(listed, 0, 1) == scenes.sample(
        SceneConfig(shapes=("circle", "star"), count=(1, 2)), 0, 1
    )
