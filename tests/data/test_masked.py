"""Pictures and masks find each other in shards and folders, or one line says which does not."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipworks.core.pictures import read_picture
from clipworks.data.masked import open_masked
from clipworks.errors import DataError
from clipworks.parts.segmentation import read_mask


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def jpg(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "JPEG")
    return stream.getvalue()


PICTURES = [np.full((6, 8, 3), 40 * number, np.uint8) for number in range(3)]
MASKS = [np.arange(48, dtype=np.uint8).reshape(6, 8) % (number + 2) for number in range(3)]


def shard(path: Path, masks: bool = True) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (picture, mask) in enumerate(zip(PICTURES, MASKS, strict=True)):
            members = {"jpg": jpg(picture), "png": png(mask)} if masks else {"jpg": jpg(picture)}
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"frame {number}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_shards_and_folders_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "train-000.tar")
    classes = {"classes": [{"index": 1, "name": "car"}, {"index": 0, "name": "sky"}], "ignore": 11}
    (tmp_path / "shards" / "classes.json").write_text(json.dumps(classes))
    for part in ("images/train", "masks/train"):
        (tmp_path / "folders" / part).mkdir(parents=True)
    for number, (picture, mask) in enumerate(zip(PICTURES, MASKS, strict=True)):
        (tmp_path / f"folders/images/train/frame {number}.jpg").write_bytes(jpg(picture))
        (tmp_path / f"folders/masks/train/frame {number}.png").write_bytes(png(mask))
    sharded, files = open_masked(tmp_path / "shards", "train"), open_masked(tmp_path / "folders", "train")
    assert sharded.keys == files.keys == [f"frame {number}" for number in range(3)]
    for found in (sharded, files):
        assert len(found) == 3
        for number in range(3):
            assert np.array_equal(read_mask(found.masks[number], (6, 8)), MASKS[number])
            assert read_picture(found.images[number]).size == (8, 6)
    assert sharded.classes is not None
    assert sharded.classes.names == ("sky", "car")
    assert (sharded.ignore, files.classes, files.ignore) == (11, None, None)


def test_without_a_part_everything_is_read(tmp_path: Path) -> None:
    shard(tmp_path / "train-000.tar")
    shard(tmp_path / "test-000.tar")
    assert len(open_masked(tmp_path)) == 6
    assert len(open_masked(tmp_path, "test")) == 3


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_masked(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither shards"):
        open_masked(tmp_path)
    shard(tmp_path / "train-000.tar", masks=False)
    with pytest.raises(DataError, match="frame 0: has no picture with a mask"):
        open_masked(tmp_path, "train")
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        open_masked(folder)
    (folder / "images" / "a.jpg").write_bytes(jpg(PICTURES[0]))
    with pytest.raises(DataError, match=r"a\.jpg: has no mask"):
        open_masked(folder)
    with pytest.raises(DataError, match="no part 'test'"):
        open_masked(folder, "test")
    (folder / "masks" / "a.png").write_bytes(png(PICTURES[0]))
    with pytest.raises(DataError, match="one number a pixel"):
        read_mask(open_masked(folder).masks[0])
    with pytest.raises(DataError, match="a mask of 6x8 for a picture of 8x6"):
        read_mask(MASKS[0], (8, 6))
    (folder / "classes.json").write_text('{"classes": [{"index": 2, "name": "car"}]}')
    with pytest.raises(DataError, match="not 0 to 0"):
        open_masked(folder)


def test_the_shelfs_sets_are_read(shelf: Path) -> None:
    train, test = open_masked(shelf / "camvid", "train"), open_masked(shelf / "camvid", "test")
    assert (len(train), len(test)) == (367, 233)
    assert train.classes is not None
    assert (len(train.classes), train.ignore) == (11, 11)
    assert read_mask(test.masks[0]).shape == (180, 240)
    tiles = open_masked(shelf / "magnetic-tile")
    assert len(tiles) == 892
    faulty = [read_mask(mask).any() for mask in tiles.masks]
    free = [key.startswith("free") for key in tiles.keys]
    assert (sum(free), sum(faulty)) == (500, 388)  # four defects have empty masks
    assert not any(one and two for one, two in zip(free, faulty, strict=True))
