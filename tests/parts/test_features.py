"""Features are computed once for each content, encoder and view, and survive writers that meet or die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from clipworks.core.images import Preprocessing
from clipworks.data.augment import RandomView
from clipworks.errors import ConfigError, PictureError, ShapeError
from clipworks.parts.features import FeatureStore, Views, content, encode_views, fingerprint, keys_of

PREPROCESSING = Preprocessing(image_size=8)


class Encoder:
    """The mean color of each picture, four times; counts what it was shown."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        pixels = pixels if pixels.is_floating_point() else pixels / 255
        return pixels.mean(dim=(2, 3)).repeat(1, 4)


def some(count: int = 5, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(count)]


def encode(encoder: Encoder, images: Any, views: Views | None = None, **options: Any) -> Tensor:
    return encode_views(images, encoder, PREPROCESSING, views or Views(), **options)


def test_features_are_those_of_the_plain_loop() -> None:
    images, views = some(), Views(3, crop=(0.4, 0.8), seed=2)
    pixels = torch.stack([PREPROCESSING(image) for image in images])
    keys = [content(image).hex() for image in images]
    view = RandomView(8, crop=(0.4, 0.8), seed=2)
    expected = torch.stack([Encoder()(view(pixels, keys, number)) for number in range(3)], dim=1)
    assert torch.allclose(encode(Encoder(), images, views, batch_size=2), expected)
    assert torch.allclose(encode(Encoder(), images)[:, 0], Encoder()(pixels))


def test_a_view_depends_on_content_and_not_on_order_or_company() -> None:
    images, views = some(), Views(2)
    whole = encode(Encoder(), images, views)
    assert torch.equal(encode(Encoder(), images[::-1], views).flip(0), whole)
    assert torch.equal(encode(Encoder(), images[3:4], views), whole[3:4])


def test_equal_pictures_are_encoded_once() -> None:
    encoder, image = Encoder(), some(1)[0]
    features = encode(encoder, [image, some(2)[1], image.copy(), image])
    assert encoder.seen == 2
    assert torch.equal(features[0], features[2])


def test_a_store_answers_for_what_it_has_and_takes_what_it_lacks(tmp_path: Path) -> None:
    images, encoder = some(6), Encoder()
    first = encode(encoder, images[:4], Views(2), store=FeatureStore(tmp_path), space="a")
    assert encoder.seen == 8
    # Another process would open the folder anew.
    again = encode(encoder, images, Views(2), store=FeatureStore(tmp_path), space="a")
    assert encoder.seen == 8 + 4
    assert torch.equal(again[:4], first)
    assert torch.equal(again, encode(Encoder(), images, Views(2)))
    more = encode(encoder, images, Views(3), store=FeatureStore(tmp_path), space="a")
    assert encoder.seen == 12 + 6  # one view more of each
    assert torch.equal(more[:, :2], again)
    encode(encoder, images, Views(2), store=FeatureStore(tmp_path), space="b")
    assert encoder.seen == 18 + 12  # another encoder shares nothing


def test_views_do_not_meet_under_one_key() -> None:
    settings = [
        (crop, flip, seed) for crop in ((0.5, 1.0), (0.1, 1.0)) for flip in (True, False) for seed in (0, 1)
    ]
    names = [Views(4, *one).name(number) for one in settings for number in range(4)] + [Views().name(0)]
    assert len(set(names)) == 2 * 2 * 2 * 4 + 1
    assert len({keys_of([b"x" * 16], name).tobytes() for name in names}) == len(names)


def test_files_are_mapped_and_a_second_store_sees_what_the_first_wrote(tmp_path: Path) -> None:
    one, other = FeatureStore(tmp_path), FeatureStore(tmp_path)
    keys = keys_of([bytes([i]) * 16 for i in range(3)], "plain")
    assert not other.find("a", keys)[0].any()
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    one.add("a", keys, rows)
    there, found = other.find("a", keys[::-1].copy())
    assert there.all()
    assert np.array_equal(found, rows[::-1])
    assert isinstance(other._spaces["a"].files[0], np.memmap)
    assert other.count("a") == 3


def test_what_is_damaged_or_half_written_is_not_there(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    keys = keys_of([b"a" * 16, b"b" * 16], "plain")
    store.add("a", keys[:1], np.ones((1, 4), np.float32))
    store.add("a", keys[1:], np.ones((1, 4), np.float32))
    first = sorted((tmp_path / "a").glob("*.features.npy"))[0]
    first.write_bytes(first.read_bytes()[:-7])
    np.save(tmp_path / "a" / "alone.features.npy", np.ones((5, 4), np.float32))
    (tmp_path / "a" / "z.keys.npy").write_bytes(b"no array")
    fresh = FeatureStore(tmp_path)
    assert fresh.count("a") == 1
    assert fresh.find("a", keys)[0].sum() == 1


WRITER = """
import sys, numpy as np
from clipworks.parts.features import FeatureStore, keys_of
store, who = FeatureStore(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    names = [f"{who}-{i}-{j}".encode().ljust(16) for j in range(8)] + [f"both-{i}".encode().ljust(16)]
    rows = np.full((9, 64), float(i), np.float32)
    store.add("a", keys_of(names, "plain"), rows)
print("done", flush=True)
"""


def writer(folder: Path, who: int, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(who), str(rounds)], stdout=subprocess.PIPE, text=True
    )


def test_two_writers_and_one_that_is_killed_lose_nothing_of_what_was_added(tmp_path: Path) -> None:
    rounds = 40
    writers = [writer(tmp_path, 0, rounds), writer(tmp_path, 1, 10_000)]
    victim = writers[1]
    assert victim.stdout is not None and victim.stdout.readline() == "ready\n"
    while len(list((tmp_path / "a").glob("*.keys.npy"))) < 5:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    out = writers[0].communicate(timeout=200)[0]
    victim.communicate()
    assert "done" in out
    store = FeatureStore(tmp_path)
    for i in range(rounds):
        names = [f"0-{i}-{j}".encode().ljust(16) for j in range(8)] + [f"both-{i}".encode().ljust(16)]
        there, rows = store.find("a", keys_of(names, "plain"))
        assert there.all()
        assert (rows == i).all()
    # Whatever else is there is whole.
    assert all(np.isfinite(file).all() and (file == file[:, :1]).all() for file in store._spaces["a"].files)


def test_content_is_of_what_is_shown(tmp_path: Path) -> None:
    array = some(1)[0]
    Image.fromarray(array).save(tmp_path / "a.png")
    Image.fromarray(array).save(tmp_path / "b.png")
    assert (
        content(tmp_path / "a.png")
        == content(str(tmp_path / "b.png"))
        == content((tmp_path / "a.png").read_bytes())
    )
    assert content(Image.fromarray(array)) == content(Image.fromarray(array.copy()))
    different = [array, array.reshape(4, 16, 3), torch.from_numpy(array), Image.fromarray(array)]
    different += [Image.fromarray(array).convert("L"), array.astype(np.float32) / 255]
    assert len({content(one) for one in different}) == len(different)
    with pytest.raises(PictureError, match=r"nowhere\.jpg"):
        content("nowhere.jpg")
    with pytest.raises(PictureError, match="int"):
        content(3)


def test_a_fingerprint_changes_with_every_weight_and_setting_and_with_nothing_else() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = fingerprint(module, "fp32")
    assert fingerprint(module, "fp32") == before != fingerprint(module, "bf16")
    twin = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    twin.load_state_dict(module.state_dict())
    assert fingerprint(twin, "fp32") == before
    with torch.no_grad():
        module[0].weight[1, 2] += 1e-6
    assert fingerprint(module, "fp32") != before
    module.load_state_dict(twin.state_dict())
    assert fingerprint(module, "fp32") == before
    module[1].running_mean += 1
    assert fingerprint(module, "fp32") != before


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-1"):
        Views(-1)
    with pytest.raises(ShapeError, match="no pictures"):
        encode(Encoder(), [])
    with pytest.raises(ShapeError, match=r"\(2, 16\)"):
        FeatureStore(tmp_path).add("a", np.zeros((2, 16), np.uint8), np.zeros((3, 4), np.float32))
