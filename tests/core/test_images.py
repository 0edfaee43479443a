"""Pictures: equality with the reference, refusal of what is bad, and geometry that agrees everywhere."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.core.hostile import (
    ODD_MODES,
    Case,
    encoded,
    odd_picture,
    png,
    smooth,
    truncatable,
    with_orientation,
    write_hostile,
)

from clipworks.core.images import Prepared, Preprocessing, fit, prepare_many, prepare_stream, summarize
from clipworks.core.pictures import (
    MAX_PIXELS,
    SUFFIXES,
    describe,
    find_pictures,
    read_picture,
    sniff,
    to_pixels,
)
from clipworks.errors import ConfigError, DataError, PictureError, ShapeError

RECORD = json.loads(Path(__file__).with_name("recorded").joinpath("images.json").read_text())
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def reference(
    picture: Image.Image, n: int, resize: str = "shortest", interpolation: str = "bicubic"
) -> np.ndarray:
    """The pipeline of the CLIP card, composed of Pillow's calls: (3, n, n) uint8."""
    width, height = picture.size
    if resize == "squash":
        size = (n, n)
    elif resize == "shortest":
        short, long = sorted(picture.size)
        size = (n, int(n * long / short)) if width <= height else (int(n * long / short), n)
    else:
        ratio = max(picture.size) / n
        size = (round(width / ratio), round(height / ratio))
    if picture.size != size:
        picture = picture.resize(size, FILTERS[interpolation])
    if resize == "longest":
        wide, high = n - size[0], n - size[1]
        border = (wide // 2, high // 2, wide - wide // 2, high - high // 2)
        picture = ImageOps.expand(picture, border, fill=0)
    left, top = round((picture.width - n) / 2.0), round((picture.height - n) / 2.0)
    picture = picture.crop((left, top, left + n, top + n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on palettes with transparency
        return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return write_hostile(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth picture (1601, 1203) with some noise, as a camera makes it."""
    noise = np.random.default_rng(0).normal(0, 3, size=(1203, 1601, 1))
    return Image.fromarray(np.uint8(np.clip(smooth(1601, 1203) + noise, 0, 255)))


# ---------------------------------------------------------------------------------------------
# Equality with the reference


@pytest.mark.parametrize("faithful", [False, True])
def test_200_odd_pictures_have_the_bytes_that_open_clip_made_of_them(faithful: bool) -> None:
    # On this Pillow, or on one of those recorded: they differ in the order of a resize's passes.
    own = RECORD["digests"].get(f"Pillow {PIL.__version__}")
    recorded = [own] if own else list(RECORD["digests"].values())
    wrong, compared = [], 0
    for seed in range(200):
        preprocessing = Preprocessing(**RECORD["settings"][seed % len(RECORD["settings"])], faithful=faithful)
        pixels = preprocessing(odd_picture(seed))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, preprocessing.image_size, preprocessing.image_size)
        answers = {digests[seed] for digests in recorded if digests[seed] is not None}
        compared += bool(answers)
        if answers and hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] not in answers:
            wrong.append((seed, ODD_MODES[seed % len(ODD_MODES)]))
    assert not wrong
    assert compared > 190


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 80),
    resize=st.sampled_from(["shortest", "squash", "longest"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
@settings(max_examples=120)
def test_every_mode_and_size_equals_the_pipeline_composed_of_pillow_calls(
    seed: int, n: int, resize: Any, interpolation: Any
) -> None:
    picture = odd_picture(seed)
    try:
        expected = reference(picture, n, resize, interpolation)
    except ValueError:  # a side rounded to nothing
        return
    found = Preprocessing(n, resize, interpolation)(picture)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_faithful_clips_deep_grays_as_the_reference_does(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 3000, size=(50, 70))
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    picture = Image.fromarray(values.astype(kind))
    assert picture.mode == mode
    try:
        expected = reference(picture, 24)
    except ValueError:  # older releases of Pillow cannot convert I;16
        with pytest.raises(PictureError, match="cannot be resized and converted"):
            Preprocessing(24, faithful=True)(picture)
        return
    found = Preprocessing(24, faithful=True)(picture)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert (found == 255).float().mean() > 0.9  # which is why it is not the default


@pytest.mark.parametrize(
    ("array", "low", "high"),
    [
        (np.linspace(0, 65535, 2000).reshape(40, 50).astype(np.uint16), 0, 255),
        (np.linspace(0, 65535, 2000).reshape(40, 50).astype(np.int32), 0, 255),
        (np.linspace(-9e5, 9e5, 2000).reshape(40, 50).astype(np.int32), 0, 255),
        (np.linspace(0, 1, 2000).reshape(40, 50).astype(np.float32), 0, 255),
        (np.linspace(0, 200, 2000).reshape(40, 50).astype(np.float32), 0, 200),
        (np.linspace(0, 65535, 2000).reshape(40, 50).astype(np.float32), 0, 255),
        (np.linspace(-3, 7, 2000).reshape(40, 50).astype(np.float32), 0, 255),
    ],
)
def test_deep_grays_keep_their_order_and_their_range(array: np.ndarray, low: int, high: int) -> None:
    levels = np.asarray(read_picture(Image.fromarray(array))).astype(int)
    assert (levels.min(), levels.max()) == (low, high)
    assert (np.diff(levels.ravel()) >= 0).all()


def test_floats_that_are_no_numbers_become_black() -> None:
    array = np.full((4, 5), 0.5, dtype=np.float32)
    array[0, 0], array[1, 1] = np.nan, np.inf
    levels = np.asarray(read_picture(Image.fromarray(array)))
    assert levels[0, 0] == levels[1, 1] == 0
    assert levels[2, 2] == 128


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_turns_the_picture_upright_unless_told_not_to(orientation: int) -> None:
    data = with_orientation(Image.fromarray(smooth(60, 40)), orientation)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(read_picture(data)), UPRIGHT[orientation](stored))
    np.testing.assert_array_equal(np.asarray(read_picture(data, exif=False)), stored)
    faithful = Preprocessing(16, faithful=True)(data)
    np.testing.assert_array_equal(faithful.numpy(), reference(Image.fromarray(stored), 16))


def test_a_long_strip_is_prepared_without_resizing_all_of_it() -> None:
    strip = Image.fromarray(smooth(60_000, 2)).transpose(Image.Transpose.ROTATE_90)
    with peak_memory(100):
        found = Preprocessing(64)(strip)
    # The reference, on the part of the strip that its crop keeps.
    expected = reference(strip.crop((0, 29_000, 2, 31_000)), 64)
    assert np.abs(found.numpy().astype(int) - expected).max() <= 1


# ---------------------------------------------------------------------------------------------
# Reduced decoding


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_fast_decoding_stays_within_a_level_of_the_exact_picture(
    photo: Image.Image, resize: Any, orientation: int
) -> None:
    data = with_orientation(photo, orientation)
    preprocessing = Preprocessing(96, resize)
    exact, fast = preprocessing(data), preprocessing(data, fast=True)
    difference = (exact.int() - fast.int()).abs()
    assert 0 < difference.float().mean() < 0.5  # more than nothing: the reduced decoding did happen
    assert difference.max() <= 8


@pytest.mark.parametrize(
    ("target", "expected"), [(None, 1203), (700, 1203), (301, 1203), (300, 602), (75, 151)]
)
def test_fast_decoding_leaves_twice_the_target(photo: Image.Image, target: int | None, expected: int) -> None:
    data = encoded(photo, "JPEG")
    picture = read_picture(data, target=target)
    assert min(picture.size) == expected
    assert read_picture(data, target=target, fast=False).size == photo.size


def test_faithful_never_decodes_at_a_reduced_size(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG")
    exact = reference(Image.open(io.BytesIO(data)), 64)
    np.testing.assert_array_equal(Preprocessing(64, faithful=True)(data, fast=True).numpy(), exact)


# ---------------------------------------------------------------------------------------------
# Bad and odd files


def test_there_are_many_hostile_cases_of_both_kinds(hostile: list[Case]) -> None:
    assert sum(case.good for case in hostile) >= 50
    assert sum(not case.good for case in hostile) >= 60


@pytest.mark.parametrize("fast", [False, True])
def test_good_files_are_read_and_bad_ones_refused_in_one_line_that_says_why(
    hostile: list[Case], fast: bool
) -> None:
    for case in hostile:
        started = time.monotonic()
        try:
            pixels = Preprocessing(8)(case.path, fast=fast)
        except PictureError as error:
            message = str(error)
            assert not case.good, message
            assert message.isprintable(), message
            assert case.message in message
            if len(str(case.path)) <= 160:
                assert case.path.name.replace("\0", "\\x00") in message
        else:
            assert case.good, case.path
            assert pixels.shape == (3, 8, 8)
        assert time.monotonic() - started < 5


def test_many_keeps_the_good_files_in_order_and_reports_every_bad_one(hostile: list[Case]) -> None:
    sources = [case.path for case in hostile]
    preprocessing = Preprocessing(8)
    good = [index for index, case in enumerate(hostile) if case.good]
    for workers in (0, 4):
        prepared = prepare_many(sources, preprocessing, workers=workers, on_error="skip", fast=False)
        assert prepared.kept == good
        assert [index for index, _ in prepared.errors] == sorted(set(range(len(hostile))) - set(good))
        expected = torch.stack([preprocessing(sources[index]) for index in good])
        assert torch.equal(prepared.pixels, expected)
    assert prepared.summary().startswith(f"skipped {len(hostile) - len(good)} of {len(hostile)}: ")
    assert prepared.summary().isprintable()


def test_many_raises_the_first_bad_file_by_default(hostile: list[Case]) -> None:
    first = next(case for case in hostile if not case.good)
    with pytest.raises(PictureError, match=first.path.name):
        prepare_many([case.path for case in hostile], Preprocessing(8))


def test_what_is_skipped_leaves_no_warning_and_no_filter_behind(hostile: list[Case]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="PIL")  # a user's own, which has to survive
        before = list(warnings.filters)
        warnings.filters.remove(before[0])  # type: ignore[attr-defined]
        before = list(warnings.filters)
        prepare_many([case.path for case in hostile], Preprocessing(8), workers=4, on_error="skip")
        assert list(warnings.filters) == before
    assert not caught


def test_hostile_files_of_the_shelf_are_refused_or_read(shelf: Path) -> None:
    paths = find_pictures(shelf / "corrupt")
    prepared = prepare_many(paths, Preprocessing(32), on_error="skip")
    bad = {paths[index].name for index, _ in prepared.errors}
    assert bad == {
        "bomb-60000x60000.png",
        "svg-named.png",
        "text-named.jpg",
        "truncated.jpg",
        "zero-bytes.jpg",
    }
    assert len(prepared.kept) == len(paths) - len(bad)


@pytest.mark.parametrize(("name", "data"), truncatable().items(), ids=truncatable())
def test_a_file_cut_anywhere_is_refused_or_loses_no_pixel(name: str, data: bytes) -> None:
    whole = np.asarray(read_picture(data))
    survived = 0
    for end in [*range(0, len(data) - 64, 97), *range(len(data) - 64, len(data))]:
        try:
            picture = read_picture(data[:end])
        except PictureError:
            continue
        survived += 1
        np.testing.assert_array_equal(np.asarray(picture), whole, err_msg=f"{name} cut at {end}")
    assert survived < 64


@given(name=st.sampled_from(sorted(truncatable())), data=st.data())
@settings(max_examples=150)
def test_damaged_bytes_give_a_picture_or_a_picture_error(name: str, data: st.DataObject) -> None:
    file = bytearray(truncatable_once()[name])
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, min(len(file) - 1, data.draw(st.sampled_from([64, 100_000])))))
        file[position] = data.draw(st.integers(0, 255))
    try:
        pixels = Preprocessing(4)(bytes(file), max_pixels=1_000_000)
    except PictureError:
        return
    assert pixels.shape == (3, 4, 4)


_files: dict[str, bytes] = {}


def truncatable_once() -> dict[str, bytes]:
    _files.update(truncatable() if not _files else {})
    return _files


def test_the_limit_of_pixels_is_held_before_decoding() -> None:
    bomb = png(12_000, 12_000, b"")  # 144 million pixels are claimed, none are there
    with pytest.raises(PictureError, match=r"refused, its 12000x12000 are 144,000,000 pixels .* 1,000,000"):
        read_picture(bomb, max_pixels=1_000_000)
    with pytest.raises(PictureError, match="truncated or damaged PNG"):
        read_picture(bomb)
    for source in (np.zeros((20, 30), np.uint8), torch.zeros(3, 20, 30), Image.new("L", (30, 20))):
        assert read_picture(source, max_pixels=600).size == (30, 20)
        with pytest.raises(PictureError, match="30x20 are 600 pixels"):
            read_picture(source, max_pixels=599)
    assert MAX_PIXELS == 2 * (1 << 30) // 4 // 3  # Pillow's own limit


def test_a_picture_loaded_by_the_user_is_not_changed() -> None:
    data = with_orientation(Image.fromarray(smooth(60, 40)), 6)
    picture = Image.open(io.BytesIO(data))
    upright = read_picture(picture, target=4)
    assert picture.size == (60, 40)
    assert upright.size == (40, 60)
    assert picture.getexif()[0x0112] == 6


def test_an_open_picture_whose_file_is_cut_is_refused() -> None:
    picture = Image.open(io.BytesIO(truncatable_once()["jpg"][:1500]))
    with pytest.raises(PictureError, match="truncated or damaged JPEG"):
        Preprocessing(8)(picture)


# ---------------------------------------------------------------------------------------------
# Sources


def test_one_picture_gives_the_same_bytes_in_whatever_form_it_comes(tmp_path: Path) -> None:
    array = smooth(61, 47)
    picture = Image.fromarray(array)
    path = tmp_path / "a.png"
    picture.save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    opened = path.open("rb")
    sources: list[Any] = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), opened]
    sources += [memoryview(path.read_bytes()), io.BytesIO(path.read_bytes()), picture, Image.open(path)]
    sources += [array, array / 255.0, (array / 255.0).astype(np.float32), np.asfortranarray(array)]
    sources += [
        tensor,
        tensor / 255.0,
        (tensor / 255.0).requires_grad_(),
        tensor.double() / 255,
        tensor.flip(2).flip(2),
    ]
    sources += [array[:, ::-1][:, ::-1]]
    expected = Preprocessing(24)(path)
    for source in sources:
        assert torch.equal(Preprocessing(24)(source), expected), describe(source)
    opened.close()


def test_gray_and_alpha_arrays_and_tensors_are_taken() -> None:
    gray, alpha = smooth(9, 7)[..., 0].copy(), np.dstack([smooth(9, 7), np.full((7, 9), 3, np.uint8)])
    expected = Preprocessing(5)(Image.fromarray(gray))
    for source in (gray, gray[..., None], torch.from_numpy(gray)[None], np.uint16(gray) * 257):
        assert torch.equal(Preprocessing(5)(source), expected)
    expected = Preprocessing(5)(Image.fromarray(alpha))
    assert torch.equal(Preprocessing(5)(torch.from_numpy(alpha).permute(2, 0, 1)), expected)
    mask = gray > 100
    assert torch.equal(Preprocessing(5)(mask), Preprocessing(5)(np.uint8(mask) * 255))
    assert read_picture(torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 20, 20), np.uint8), "give a tensor"),
        (np.zeros((2, 20, 20, 3), np.uint8), "one by one"),
        (np.zeros((20, 20, 2), np.uint8), r"\(20, 20, 2\)"),
        (np.zeros((0, 20, 3), np.uint8), "20x0 pixels"),
        (np.zeros((20, 20, 3), np.int64), "int64 is ambiguous"),
        (np.full((20, 20, 3), 255.0), r"in \[255, 255\]"),
        (np.full((20, 20, 3), np.nan), "in \\[0, 1\\]"),
        (torch.zeros(20, 20, 3), "give an array"),
        (torch.zeros(2, 3, 20, 20), "one by one"),
        (torch.zeros(20, 20), r"\(20, 20\)"),
        (torch.full((3, 4, 4), -0.5), r"in \[-0.5, -0.5\]"),
        (io.StringIO("text"), "binary mode"),
        (17, "not something to read"),
        (None, "not something to read"),
        ("", "an empty path"),
        ("https://example.org/a.jpg", "not fetched"),
        (b"", "empty"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(source: Any, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        read_picture(source)


def test_transparency_is_dropped_or_laid_on_a_background() -> None:
    array = np.zeros((20, 20, 4), np.uint8)
    array[..., 0] = 200
    array[:10, :, 3] = 255
    dropped, laid = Preprocessing(20)(array), Preprocessing(20, background=(0, 0, 255))(array)
    assert (dropped[0] == 200).all()
    assert laid[:, 5, 5].tolist() == [200, 0, 0]
    assert laid[:, 15, 5].tolist() == [0, 0, 255]
    palette = Image.fromarray(np.zeros((20, 20), np.uint8))
    palette.putpalette([9, 9, 9] * 256)
    palette.info["transparency"] = 0
    assert Preprocessing(8, background=(1, 2, 3))(palette)[:, 4, 4].tolist() == [1, 2, 3]
    opaque = Image.fromarray(smooth(30, 20))
    assert torch.equal(Preprocessing(8, background=(1, 2, 3))(opaque), Preprocessing(8)(opaque))
    padded = Preprocessing(8, "longest", background=(1, 2, 3))(Image.new("CMYK", (40, 20)))
    assert padded[:, 0, 0].tolist() == [1, 2, 3]


def test_palette_with_alpha_array_mode_is_read_in_its_colors() -> None:
    picture = Image.new("PA", (20, 20), (0, 255))
    picture.putpalette([10, 20, 30] + [0] * 765)
    assert Preprocessing(8)(picture)[:, 3, 3].tolist() == [10, 20, 30]


# ---------------------------------------------------------------------------------------------
# Many


def uneven(count: int) -> list[bytes]:
    """PNG files whose sizes differ much, so that threads finish out of order."""
    rng = np.random.default_rng(0)
    sizes = [(500, 400) if index % 5 == 0 else (5 + index % 9, 7) for index in range(count)]
    arrays = [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in sizes]
    return [encoded(Image.fromarray(array), "PNG", compress_level=0) for array in arrays]


def running() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("clipworks-pictures")}


def test_order_is_kept_and_threads_end() -> None:
    files = uneven(40)
    preprocessing = Preprocessing(6)
    expected = torch.stack([preprocessing(file) for file in files])
    assert torch.equal(prepare_many(files, preprocessing, workers=5, fast=False).pixels, expected)
    batches = list(prepare_stream(iter(files), preprocessing, batch_size=7, workers=5, fast=False))
    assert [len(batch.kept) for batch in batches] == [7] * 5 + [5]
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)
    assert list(itertools.chain(*(batch.kept for batch in batches))) == list(range(40))
    assert not running()


def test_a_stream_reads_only_a_little_ahead_and_stops_when_closed() -> None:
    asked = 0

    def endless() -> Iterator[bytes]:
        nonlocal asked
        for file in itertools.cycle(uneven(4)):
            asked += 1
            yield file

    stream = prepare_stream(endless(), Preprocessing(6), batch_size=4, workers=2)
    assert asked == 0
    assert next(stream).pixels.shape == (4, 3, 6, 6)
    assert asked <= 4 + 2 * 4 + 1
    assert running()
    stream.close()  # type: ignore[attr-defined]
    assert not running()


def test_a_stream_fills_its_batches_past_bad_sources() -> None:
    good, bad = uneven(2)[1], b"no picture"
    sources = [bad, good, bad, good, good, bad, bad]
    batches = list(prepare_stream(sources, Preprocessing(6), batch_size=3, workers=2, on_error="skip"))
    assert [batch.kept for batch in batches] == [[1, 3, 4], []]
    assert [[index for index, _ in batch.errors] for batch in batches] == [[0, 2], [5, 6]]
    assert batches[1].pixels.shape == (0, 3, 6, 6)
    with pytest.raises(PictureError, match="found text"):
        next(prepare_stream(sources, Preprocessing(6), workers=2))
    assert not running()


def test_an_error_of_the_sources_themselves_is_not_swallowed() -> None:
    def broken() -> Iterator[bytes]:
        yield uneven(2)[1]
        raise RuntimeError("the disk is gone")

    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            prepare_many(broken(), Preprocessing(6), workers=workers, on_error="skip")
    assert not running()


def test_nothing_gives_nothing() -> None:
    prepared = prepare_many([], Preprocessing(6))
    assert (prepared.pixels.shape, prepared.kept, prepared.errors) == ((0, 3, 6, 6), [], [])
    assert prepared.summary() == ""
    assert not list(prepare_stream([], Preprocessing(6)))


def test_the_same_open_picture_may_be_given_many_times() -> None:
    data = encoded(Image.fromarray(smooth(300, 200)), "PNG")
    for _ in range(5):
        picture = Image.open(io.BytesIO(data))
        prepared = prepare_many([picture] * 16, Preprocessing(6), workers=8)
        assert torch.equal(prepared.pixels, Preprocessing(6)(data).expand(16, -1, -1, -1))


@pytest.mark.parametrize(
    "options",
    [{"workers": -1}, {"on_error": "ignore"}, {"batch_size": 0}],
    ids=["workers", "on_error", "batch_size"],
)
def test_bad_options_are_refused_before_anything_is_read(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        prepare_stream([b""], Preprocessing(6), **options)


def test_a_single_path_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="got one str"):
        prepare_many("photo.jpg", Preprocessing(6))


def test_a_summary_is_one_line_and_counts_everything() -> None:
    errors = [(index, f"{index}.jpg: empty") for index in range(5)]
    expected = "skipped 5 of 40: 0.jpg: empty; 1.jpg: empty; and 3 more"
    assert summarize(errors, 40, shown=2) == expected
    assert Prepared(torch.empty(0), list(range(35)), errors).summary().startswith("skipped 5 of 40: 0.jpg")


class peak_memory:
    """Fails if more than `limit` megabytes are held at once inside; skips where that cannot be measured."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def _read(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) // 1024

    def __enter__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = self._read("VmRSS")
            peak = self._read("VmHWM")
        except (OSError, StopIteration):
            pytest.skip("this system does not tell the peak of memory")
        if peak > self.before + 5:
            pytest.skip("this system does not reset the peak of memory")

    def __exit__(self, kind: object, *_: object) -> None:
        used = self._read("VmHWM") - self.before
        assert kind is not None or used < self.limit, f"{used} MB"


def test_bombs_cost_no_memory(hostile: list[Case]) -> None:
    bombs = [case.path for case in hostile if case.path.name.startswith(("huge", "bomb", "text-bomb"))]
    assert len(bombs) >= 9
    with peak_memory(60):
        prepared = prepare_many(bombs, Preprocessing(8), workers=4, on_error="skip")
    assert len(prepared.errors) == len(bombs)


def test_memory_is_bounded_by_the_pixel_limit_and_not_by_the_threads() -> None:
    size = 6000
    file = png(size, size, bytes((size + 1) * size), color=0)  # 36 MB each, once decoded
    with peak_memory(90):
        prepare_many([file] * 6, Preprocessing(8), workers=6, max_pixels=size * size)


# In a process of its own: what a long test run has left behind on the heap moves the figures of this one.
REPEATED = """
import gc, json, sys
from pathlib import Path
from clipworks.core.images import Preprocessing, prepare_many

paths = json.loads(sys.stdin.read())

def everything():
    prepare_many(paths, Preprocessing(8), workers=2, on_error="skip")

def resident():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))

everything()
everything()
held, opened = resident(), descriptors()
for _ in range(5):
    everything()
print(resident() - held, descriptors() - opened)
"""


def test_repeated_reading_leaves_no_memory_and_no_open_file(hostile: list[Case]) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")
    paths = json.dumps([str(case.path) for case in hostile])
    done = subprocess.run(
        [sys.executable, "-c", REPEATED], input=paths, capture_output=True, text=True, check=True
    )
    megabytes, files = map(int, done.stdout.split())
    assert files == 0
    assert megabytes < 60


# ---------------------------------------------------------------------------------------------
# fit and to_pixels


@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    size=st.integers(1, 60),
    mode=st.sampled_from(["shortest", "squash", "longest"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
@settings(max_examples=60)
def test_fit_equals_preprocessing_on_smooth_pictures(
    width: int, height: int, size: int, mode: Any, interpolation: Any
) -> None:
    array = smooth(width, height)
    expected = Preprocessing(size, mode, interpolation)(array).float() / 255
    found = fit(to_pixels(array), size, mode, interpolation=interpolation)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2 / 255


def test_fit_has_a_gradient_at_every_pixel_it_shows() -> None:
    pixels = torch.rand(2, 3, 20, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels = (0.3 + 0.4 * pixels).requires_grad_()
    for mode in ("shortest", "squash", "longest"):
        assert torch.autograd.gradcheck(lambda x, mode=mode: fit(x, 4, mode), (pixels[:1, :1, :9, :13],))
    (gradient,) = torch.autograd.grad(fit(pixels, 7, "squash").sum(), pixels)
    assert (gradient != 0).all()


def test_fit_keeps_range_type_and_pictures_of_the_right_size() -> None:
    pixels = torch.rand(2, 3, 31, 31, generator=torch.Generator().manual_seed(0)).round()
    assert torch.equal(fit(pixels, 31), pixels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = fit(pixels.to(dtype), 17)
        assert found.dtype == dtype
        assert 0 <= found.min() <= found.max() <= 1
    for bad in (torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 0, 8)):
        with pytest.raises(ShapeError, match="fit takes"):
            fit(bad, 4)
    with pytest.raises(ConfigError):
        fit(pixels, 4, "stretch")  # type: ignore[arg-type]


def test_to_pixels_brings_every_form_to_one() -> None:
    array = smooth(9, 7)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for form in (array, array[None], tensor, tensor[None], tensor.float() / 255):
        assert torch.equal(to_pixels(form), expected)
    gray = to_pixels(array[..., 0].copy())
    assert gray.shape == (1, 3, 7, 9)
    assert torch.equal(gray[:, 0], gray[:, 2])
    traced = torch.rand(3, 4, 4, requires_grad=True)
    assert to_pixels(traced).requires_grad
    for bad in (
        torch.zeros(4, 4),
        torch.zeros(2, 4, 4),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        np.zeros((2, 3, 4, 5, 3)),
    ):
        with pytest.raises(ShapeError):
            to_pixels(bad)


# ---------------------------------------------------------------------------------------------
# Settings and folders


@given(
    st.builds(
        Preprocessing,
        image_size=st.integers(1, 1000),
        resize=st.sampled_from(["shortest", "squash", "longest"]),
        interpolation=st.sampled_from(["bicubic", "bilinear"]),
        background=st.none() | st.tuples(*[st.integers(0, 255)] * 3),
        faithful=st.booleans(),
    )
)
def test_settings_survive_json(preprocessing: Preprocessing) -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_sise": 4}, "did you mean image_size"),
        ({"image_size": 0}, "got 0"),
        ({"image_size": True}, "got True"),
        ({"image_size": 7.0}, "got 7.0"),
        ({"resize": "stretch"}, "'stretch'"),
        ({"interpolation": "nearest"}, "'nearest'"),
        ({"background": [1, 2]}, "background"),
        ({"background": [1, 2, 256]}, "background"),
        ({"background": "white"}, "background"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocessing.from_dict(values)


def test_pictures_are_found_by_suffix_in_natural_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    wanted = ["a1.jpg", "A2.JPG", "a10.png", "b/2.webp", "b/11.tif", "folder.jpg/x.gif"]
    for name in [*wanted, "notes.txt", ".a3.jpg", ".hidden/c.jpg", "jpg"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a3.jpg").symlink_to("nowhere")  # listed: reading says what is wrong with it
    relative = [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)]
    assert relative == ["a1.jpg", "A2.JPG", "a3.jpg", *wanted[2:]]
    assert [path.name for path in find_pictures(tmp_path, recursive=False)] == [
        "a1.jpg",
        "A2.JPG",
        "a3.jpg",
        "a10.png",
    ]
    assert [path.name for path in find_pictures(f"{tmp_path}/a*.jpg")] == ["a1.jpg", "a3.jpg"]
    assert [path.name for path in find_pictures(f"{tmp_path}/b/**/*.webp")] == ["2.webp"]
    assert find_pictures(tmp_path / "a1.jpg") == [tmp_path / "a1.jpg"]
    with pytest.raises(DataError, match="no such folder"):
        find_pictures(tmp_path / "missing")


def test_every_suffix_is_of_a_format_that_is_read() -> None:
    Image.init()
    others = {".heic", ".heif", ".avif"}  # need a plug-in or a build of Pillow that has them
    known = Image.registered_extensions()
    assert {suffix for suffix in SUFFIXES if suffix not in known} <= others | {".jpe", ".mpo"}


@given(st.binary(max_size=600))
def test_sniffing_never_fails_and_gives_words(head: bytes) -> None:
    assert sniff(head)
    assert sniff(head).isprintable()


@given(st.text(max_size=400))
def test_a_description_is_one_printable_line(name: str) -> None:
    assert describe(name).isprintable()
    assert 0 < len(describe(name)) <= 160
