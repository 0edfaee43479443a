"""The index: it ranks as brute force does, stays up to date with least work, and survives being killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb")

import clipworks
import clipworks.search.build as building
import clipworks.search.index as module
import clipworks.search.items as reading
from clipworks.errors import ConfigError, DataError, PictureError
from clipworks.search import Index, Report


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    from clipworks.core.tokenizer import ClipTokenizer

    return tiny_clip(tokenizer=ClipTokenizer())


def draw(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    # Large patches: noise alone would give nearly the same vector for every picture.
    small = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        draw(tmp_path / "pictures" / ("deep" if i % 3 else "") / f"{i}.png", i)
    return tmp_path / "pictures"


@pytest.fixture
def index(tmp_path: Path, clip: Any) -> Index:
    return Index.create(tmp_path / "index", clip)


def paths(index: Index) -> list[str]:
    return sorted(path for piece in index._table.scan(("path",)) for path in piece["path"])


def counts(report: Report) -> tuple[int, int, int, int, int]:
    return report.embedded, report.reused, report.unchanged, report.removed, len(report.skipped)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a picture went through the model")

    monkeypatch.setattr(module, "encode_images", refuse)


# ------------------------------------------------------------------------------------------------ asking


def test_hits_and_scores_are_those_of_brute_force(index: Index, folder: Path, clip: Any) -> None:
    index.add(folder)
    files = paths(index)
    vectors = clip.embed_images(files).numpy()
    for text in ("a cat", "a photo of the sea"):
        cosines = vectors @ clip.embed_texts([text])[0].numpy()
        order = np.argsort(-cosines)
        hits = index.query(text, k=7)
        assert [hit.path for hit in hits] == [files[i] for i in order[:7]]
        assert [hit.score for hit in hits] == pytest.approx(cosines[order[:7]].tolist(), abs=1e-5)


def test_a_picture_finds_itself_first_whatever_it_is_given_as(index: Index, folder: Path) -> None:
    index.add(folder)
    path = folder / "deep" / "4.png"
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        (hit,) = index.query(picture=source, k=1)
        assert hit.path == str(path)
        assert hit.score == pytest.approx(1, abs=1e-5)
        assert (hit.width, hit.height) == (24, 20)


def test_a_vector_of_any_length_ranks_as_its_direction_does(index: Index, folder: Path, clip: Any) -> None:
    index.add(folder)
    vector = clip.embed_texts(["a cat"])[0].numpy()
    near, far = index.search(vector), index.search(7 * vector)
    assert [hit.path for hit in near] == [hit.path for hit in far]
    assert [hit.score for hit in near] == pytest.approx([hit.score for hit in far], abs=1e-5)


def test_a_condition_filters_before_ranking(index: Index, folder: Path) -> None:
    draw(folder / "wide.png", 100, (60, 20))
    index.add(folder)
    assert [Path(hit.path).name for hit in index.query("a cat", k=3, where="width > 50")] == ["wide.png"]
    assert index.query("a cat", where="width > 5000") == []
    assert len(index.query("a cat", k=100, where="path like '%/deep/%'")) == 8


def test_a_caption_beside_the_picture_and_the_upright_size_are_kept(index: Index, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (40, 10)).save(folder / "turned.jpg", exif=exif)
    (folder / "turned.txt").write_text(" it's a turned picture\n")
    index.add(folder)
    (hit,) = index.query("a cat", where="caption like '%turned%'")
    assert (hit.caption, hit.width, hit.height) == ("it's a turned picture", 10, 40)


def test_an_empty_index_finds_nothing(index: Index) -> None:
    assert index.query("a cat") == []
    assert len(index) == 0


def test_a_wrong_question_says_what_is_wrong(index: Index, folder: Path) -> None:
    index.add(folder)
    with pytest.raises(ConfigError, match="give one of them"):
        index.query()
    with pytest.raises(ConfigError, match="the query is empty"):
        index.query("  ")
    with pytest.raises(ConfigError, match="k must be at least 1, not 0"):
        index.query("a cat", k=0)
    with pytest.raises(ConfigError, match=r"the condition 'weight > 3' cannot be applied: .*weight"):
        index.query("a cat", where="weight > 3")
    with pytest.raises(ConfigError, match=r"a vector \(16,\), not one of shape \(3,\)"):
        index.search(np.ones(3))
    with pytest.raises(PictureError, match=r"none\.png"):
        index.query(picture="none.png")


# ------------------------------------------------------------------------------------------------ building


def test_a_second_build_reads_no_picture_and_embeds_none(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counts(index.add(folder)) == (12, 0, 0, 0, 0)
    forbid(monkeypatch)
    monkeypatch.setattr(reading, "read_facts", lambda path: pytest.fail(f"{path} was read"))
    assert counts(index.add(folder)) == (0, 0, 12, 0, 0)


def test_what_changed_is_embedded_again_and_what_is_gone_leaves(
    index: Index, folder: Path, clip: Any
) -> None:
    index.add(folder)
    changed = draw(folder / "0.png", 77, (30, 30))
    draw(folder / "new.png", 78)
    (folder / "deep" / "1.png").unlink()
    shutil.rmtree(folder / "deep", ignore_errors=True)
    assert counts(index.add(folder)) == (2, 0, 3, 8, 0)
    assert paths(index) == sorted(map(str, folder.rglob("*.png")))
    (hit,) = index.query(picture=changed, k=1)
    assert hit.path == str(changed)
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert hit.width == 30


def test_touched_renamed_and_copied_files_are_told_by_their_content(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(folder)
    os.utime(folder / "0.png", ns=(1, 1))
    (folder / "3.png").rename(folder / "moved.png")
    shutil.copyfile(folder / "6.png", folder / "copy.png")
    forbid(monkeypatch)
    assert counts(index.add(folder)) == (0, 3, 10, 1, 0)
    assert paths(index) == sorted(map(str, folder.rglob("*.png")))
    assert {Path(hit.path).name for hit in index.query(picture=folder / "6.png", k=2)} == {
        "6.png",
        "copy.png",
    }


def test_equal_files_of_one_build_are_embedded_once(index: Index, folder: Path) -> None:
    for i in range(5):
        shutil.copyfile(folder / "0.png", folder / f"copy{i}.png")
    assert counts(index.add(folder)) == (12, 5, 0, 0, 0)


def test_a_change_that_keeps_size_and_time_is_found_by_verify_alone(index: Index, folder: Path) -> None:
    path = folder / "0.bmp"
    draw(path, 101)
    index.add(folder)
    before = path.stat()
    draw(path, 102)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert counts(index.add(folder)) == (0, 0, 13, 0, 0)
    assert counts(index.add(folder, verify=True)) == (1, 0, 12, 0, 0)


def test_pictures_that_cannot_be_read_are_counted_and_do_not_stop_a_build(index: Index, folder: Path) -> None:
    (folder / "text.jpg").write_text("no picture")
    (folder / "same.jpg").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "lost.png").symlink_to(folder / "nothing")
    report = index.add(folder)
    assert counts(report) == (12, 0, 0, 0, 4)
    assert {Path(path).name for path, _ in report.skipped} == {"text.jpg", "same.jpg", "cut.png", "lost.png"}
    assert all(Path(path).name in reason for path, reason in report.skipped)
    assert report.seen == 16
    assert len(index) == 12


def test_a_picture_that_became_unreadable_leaves_the_index(index: Index, folder: Path) -> None:
    index.add(folder)
    (folder / "0.png").write_text("no picture any more")
    assert counts(index.add(folder)) == (0, 0, 11, 1, 1)
    assert str(folder / "0.png") not in paths(index)


def test_a_build_of_one_folder_leaves_the_rows_of_others_alone(
    index: Index, folder: Path, tmp_path: Path
) -> None:
    other = draw(tmp_path / "pictures-2" / "x.png", 50)
    index.add(folder)
    index.add([other])
    other.unlink()
    assert counts(index.add(folder)) == (0, 0, 12, 0, 0)
    assert str(other) in paths(index)
    index.remove([other, folder / "never.png"])
    assert len(index) == 12


def test_an_empty_or_missing_folder_is_an_error_and_forgets_nothing(
    index: Index, folder: Path, tmp_path: Path
) -> None:
    index.add(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="no such folder"):
        index.add(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="no pictures there"):
        index.add(folder)
    assert len(index) == 12


def test_paths_with_quotes_blanks_and_other_scripts_come_and_go(index: Index, tmp_path: Path) -> None:
    names = ["it's.png", 'say "hi".png', "a b.png", "кот 猫.png", "100%_.png", "semi;--.png"]
    files = [draw(tmp_path / "odd" / name, i) for i, name in enumerate(names)]
    index.add(tmp_path / "odd")
    assert paths(index) == sorted(map(str, files))
    for file in files[:-1]:
        file.unlink()
    assert index.add(tmp_path / "odd").removed == len(files) - 1
    assert paths(index) == [str(files[-1])]


def test_a_name_that_is_not_utf_8_is_reported(index: Index, folder: Path) -> None:
    odd = os.fsencode(folder) + b"/bad\xff.png"
    Path(os.fsdecode(odd)).write_bytes((folder / "0.png").read_bytes())
    report = index.add(folder)
    assert counts(report) == (12, 0, 0, 0, 1)
    assert "not UTF-8" in report.skipped[0][1]


def test_a_build_hands_on_no_more_pictures_at_once_than_it_commits(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, done = [], []
    encode = module.encode_images

    def watched(clip: Any, sources: Any, **options: Any) -> Any:
        listed = list(sources)
        sizes.append(len(listed))
        return encode(clip, listed, **options)

    monkeypatch.setattr(module, "encode_images", watched)
    monkeypatch.setattr(building, "COMMIT", 5)
    index.add(folder, progress=lambda finished, total: done.append((finished, total, len(index))))
    assert sizes == [5, 5, 2]
    assert done == [(5, 12, 5), (10, 12, 10), (12, 12, 12)]


KILLED = """
import json, os, signal, sys, time
import lancedb, torch
import clipworks.search.build as module
from clipworks.checkpoints.zoo import load
from clipworks.search import Index

module.COMMIT = 1
model, place, pictures = sys.argv[1:]
torch.set_num_threads(1)
clip = load(model)
for attempt in range(10):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        index = Index.open(place, clip) if Index.exists(place) else Index.create(place, clip, model)
        encode = index.clip.image.forward
        def watched(pixels):
            os.write(tell, b"x")  # another picture goes through the model
            return encode(pixels)
        index.clip.image.forward = watched
        index.add(pictures, batch_size=1)
        os._exit(0)
    os.close(tell)
    for _ in range(1 + attempt % 4):
        os.read(told, 1)
    time.sleep(0.004 * attempt)  # in the middle of encoding, of writing, of the next picture
    os.kill(child, signal.SIGKILL)
    print(json.dumps({"signal": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1}), flush=True)
    os.close(told)
"""


def test_a_build_that_is_killed_ten_times_goes_on_and_loses_or_doubles_nothing(
    tmp_path: Path, clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [draw(tmp_path / "many" / f"{i}.png", i) for i in range(60)]
    model, place = str(clip.save(tmp_path / "tiny")), tmp_path / "index"
    environment = os.environ | {"PYTHONPATH": str(Path(clipworks.__file__).parent.parent)}
    # One process that has imported everything stands ready; each build is a fork of it, killed during one of
    # its first commits or between them.
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, model, str(place), str(tmp_path / "many")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    ends = [json.loads(line) for line in out.splitlines()]
    assert [end["signal"] for end in ends] == [9] * 10
    index = Index.open(place)
    there = len(index)
    assert 0 < there < 60
    report = index.add(tmp_path / "many")
    assert counts(report) == (60 - there, 0, there, 0, 0)
    assert paths(index) == sorted(map(str, files))
    vectors = clip.embed_images(files).numpy()
    for file, vector in zip(files, vectors, strict=True):
        (hit,) = index.search(vector, k=1)
        assert hit.path == str(file)
    forbid(monkeypatch)
    assert counts(index.add(tmp_path / "many")) == (0, 0, 60, 0, 0)


def test_two_builds_at_once_are_refused(index: Index, folder: Path) -> None:
    with index._table.alone(), pytest.raises(DataError, match="another process is building this index"):
        Index.open(index.location, index.clip).add(folder)
    assert index.add(folder).embedded == 12


# ------------------------------------------------------------------------------------------------ the model


def test_an_index_opens_with_its_own_model_and_refuses_another(
    tmp_path: Path, folder: Path, clip: Any, tiny_clip: Callable[..., Any]
) -> None:
    model = str(clip.save(tmp_path / "tiny"))
    Index.create(tmp_path / "index", clip, model).add(folder)
    opened = Index.open(tmp_path / "index")
    assert opened.model == model
    assert opened.info()["pictures"] == len(opened.query("a cat", k=100)) == 12
    other = tiny_clip(seed=1, tokenizer=clip.tokenizer)
    with pytest.raises(ConfigError, match="their vectors cannot be compared"):
        Index.open(tmp_path / "index", other)
    other.save(model)
    with pytest.raises(ConfigError, match="their vectors cannot be compared"):
        Index.open(tmp_path / "index").query("a cat")


def test_the_fingerprint_tells_trainings_apart_and_not_copies(
    tiny_clip: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    first, again, other = tiny_clip(seed=0), tiny_clip(seed=0), tiny_clip(seed=1)
    assert module.fingerprint(first) == module.fingerprint(again) != module.fingerprint(other)
    with torch.no_grad():
        again.scale += 1e-3
    assert module.fingerprint(first) != module.fingerprint(again)


def test_what_is_no_index_is_refused(tmp_path: Path, folder: Path, clip: Any) -> None:
    import lancedb

    with pytest.raises(DataError, match="no index there"):
        Index.open(tmp_path / "none")
    with pytest.raises(DataError, match="no index there"):
        Index.open(folder)
    with pytest.raises(DataError, match="something is there already"):
        Index.create(folder, clip)
    lancedb.connect(str(tmp_path / "foreign")).create_table("items", [{"path": "x"}])
    with pytest.raises(DataError, match="not an index that clipworks wrote"):
        Index.open(tmp_path / "foreign")
    (tmp_path / "damaged" / "items.lance").mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be opened"):
        Index.open(tmp_path / "damaged")
