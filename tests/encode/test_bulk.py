"""Bulk encoding: what comes out is what the tower gives for each picture and text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.core.tokenizer import ClipTokenizer
from clipworks.encode.bulk import encode_images, encode_texts, evaluating
from clipworks.encode.precision import bf16_speedup, cast, choose
from clipworks.errors import ConfigError, DataError, PictureError


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def clip(tiny_clip: Any) -> Any:
    return tiny_clip(tokenizer=ClipTokenizer())


def test_pictures_in_batches_equal_each_picture_alone(clip: Any, pictures: list[Path]) -> None:
    together = encode_images(clip, pictures, batch_size=3).features
    alone = torch.cat([clip.embed_images(path) for path in pictures])
    assert torch.allclose(together, alone, atol=1e-6)
    with torch.no_grad():
        raw = clip.image(torch.stack([clip.preprocessing(path) for path in pictures]))
    assert torch.allclose(together, raw / raw.norm(dim=-1, keepdim=True), atol=1e-6)


def test_every_form_of_a_picture_gives_the_same_vector(clip: Any, pictures: list[Path]) -> None:
    path = pictures[0]
    picture = Image.open(path)
    array = np.asarray(picture)
    forms = [
        str(path),
        path,
        path.read_bytes(),
        picture,
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    vectors = torch.cat([clip.embed_images(form) for form in forms])
    assert torch.allclose(vectors, vectors[:1].expand_as(vectors), atol=1e-6)
    assert torch.allclose(clip.embed_images(iter(forms)), vectors, atol=1e-6)


def test_pixels_pass_as_they_are(clip: Any) -> None:
    pixels = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(clip.embed_images(pixels), clip.embed_images(pixels.float() / 255), atol=1e-6)


def test_broken_pictures_are_skipped_counted_and_named(
    clip: Any, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    sources = [pictures[0], broken, pictures[1]]
    with pytest.raises(PictureError, match=r"broken\.jpg"):
        clip.embed_images(sources)
    found = encode_images(clip, sources, on_error="skip")
    assert found.kept == [0, 2] and [place for place, _ in found.errors] == [1]
    assert "skipped 1 of 3" in found.report() and "broken.jpg" in found.report()
    assert torch.allclose(found.features, clip.embed_images(pictures[:2]), atol=1e-6)


def test_nothing_gives_an_empty_table(clip: Any) -> None:
    assert clip.embed_images([]).shape == (0, 16)
    assert clip.embed_texts([]).shape == (0, 16)


def test_texts_equal_the_tower_one_by_one(clip: Any) -> None:
    texts = [
        "a dog",
        "a dog on a beach",
        "",
        "a dog",
        "something quite different, and longer than the others",
    ]
    together = encode_texts(clip, texts, positions=8)
    with torch.no_grad():
        raw = torch.cat([clip.text(clip.tokenizer(text)) for text in texts])
    assert torch.allclose(together, raw / raw.norm(dim=-1, keepdim=True), atol=1e-6)


def test_embeddings_can_be_used_by_what_is_trained_on_them(clip: Any) -> None:
    features = clip.embed_texts(["a", "b"])
    assert not features.requires_grad and not features.is_inference() and features.dtype == torch.float32
    head = torch.nn.Linear(16, 2)
    head(features).sum().backward()
    assert head.weight.grad is not None


def test_encoding_leaves_every_module_in_its_mode(clip: Any) -> None:
    clip.train()
    clip.text.eval()
    before = [module.training for module in clip.modules()]
    clip.embed_texts(["a"])
    with evaluating(clip):
        assert not any(module.training for module in clip.modules())
    assert [module.training for module in clip.modules()] == before


def test_bad_input_is_named(clip: Any) -> None:
    with pytest.raises(DataError, match="text 1 is not a string but int"):
        clip.embed_texts(["a", 3])
    with pytest.raises(ConfigError, match="batch_size"):
        clip.embed_images([], batch_size=0)
    with pytest.raises(ConfigError, match="precision"):
        clip.embed_texts(["a"], precision="fp8")


def test_cast_twin_follows_the_weights_it_was_made_from(clip: Any) -> None:
    first = cast(clip.image, torch.bfloat16)
    assert cast(clip.image, torch.bfloat16) is first
    assert first.mean.dtype == torch.float32 and first.positions.dtype == torch.bfloat16
    with torch.no_grad():
        clip.image.positions.add_(1)
    second = cast(clip.image, torch.bfloat16)
    assert second is not first
    assert torch.equal(second.positions, clip.image.positions.bfloat16())


def test_bf16_agrees_with_fp32(clip: Any) -> None:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, rough = clip.embed_images(pixels), clip.embed_images(pixels, precision="bf16")
    assert rough.dtype == torch.float32
    assert float((exact * rough).sum(-1).min()) > 0.99


def test_auto_falls_back_where_bf16_disagrees(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipworks.encode.precision.bf16_speedup", lambda device: 3.0)
    probe = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("clipworks.encode.precision.AGREEMENT", 1.1)
    assert choose(clip.image, probe, "auto") is clip.image
    monkeypatch.setattr("clipworks.encode.precision.AGREEMENT", -1.0)
    assert choose(clip.image, probe, "auto") is cast(clip.image, torch.bfloat16)
    monkeypatch.setattr("clipworks.encode.precision.bf16_speedup", lambda device: 1.0)
    assert choose(clip.image, probe, "auto") is clip.image


def test_speed_of_bf16_is_measured() -> None:
    assert bf16_speedup(size=64) > 0
