"""Our own folder: everything comes back, and what would not come back is not written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.conftest import lively, same_weights, small, small_siglip

import clipworks
from clipworks.core.clip import Clip
from clipworks.core.config import ResNetConfig, StemStage
from clipworks.core.images import Preprocessing
from clipworks.core.tokenizer import ClipTokenizer, FileTokenizer, train_tokenizer
from clipworks.core.variant import variant
from clipworks.errors import CheckpointError

TEXTS = ["two dogs", "a photo of a cat", ""]


def resnet() -> Clip:
    config = small().config
    return lively(Clip.from_config(replace(config, image=ResNetConfig(64, (1, 2, 1, 1), 4, 2))), 0)


def stemmed() -> Clip:
    config = small().config
    image = replace(config.image, stem=(StemStage(4), StemStage(8, 1), StemStage(16)))
    return lively(Clip.from_config(replace(config, image=image)), 0)


@pytest.mark.parametrize("make", [small, small_siglip, resnet, stemmed])
def test_weights_and_config_come_back(make: Any, tmp_path: Path, untouched_rng: None) -> None:
    clip = make()
    back = clipworks.load(clip.save(tmp_path / "model"))
    assert same_weights(back, clip) and back.config == clip.config and not back.training
    side = clip.config.image.image_size
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(back.image(pixels), clip.image(pixels))


@pytest.mark.parametrize("clean", ["clip", "siglip", "lower", "none"])
def test_a_tokenizer_of_its_own_comes_back_though_the_config_did_not_name_it(
    clean: str, tmp_path: Path
) -> None:
    made = train_tokenizer(TEXTS * 5, 300, context_length=12)
    made.save(tmp_path / "made")
    source = tmp_path / "made" / "tokenizer.json"
    tokenizer = FileTokenizer(source, context_length=12, start=made.start, end=made.end, clean=clean)  # type: ignore[arg-type]
    clip = small(vocabulary=tokenizer.vocab_size)
    clip.tokenizer = tokenizer
    back = clipworks.load(clip.save(tmp_path / "model"))
    assert back.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(back.embed_texts(TEXTS), clip.embed_texts(TEXTS))
    # And once more, now that the config names it.
    again = clipworks.load(back.save(tmp_path / "again"))
    assert again.config == back.config and again.config.tokenizer.kind == "file"


def test_clips_tokenizer_comes_back_with_its_settings(tmp_path: Path) -> None:
    clip = small(vocabulary=49408)
    clip.tokenizer = ClipTokenizer(12, control_tokens=True)
    back = clipworks.load(clip.save(tmp_path / "model"))
    assert back.tokenizer.control_tokens is True and back.tokenizer.context_length == 12


def test_a_model_without_tokenizer_comes_back_without_one(tmp_path: Path) -> None:
    assert clipworks.load(small().save(tmp_path / "model")).tokenizer is None


def test_preprocessing_that_the_config_does_not_describe_comes_back(tmp_path: Path) -> None:
    clip = small()
    clip.preprocessing = Preprocessing(32, background=(255, 255, 255), faithful=True)
    assert clipworks.load(clip.save(tmp_path / "model")).preprocessing == clip.preprocessing


def test_what_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 5, 300, context_length=12)
    wrong_tokenizer = small(vocabulary=tokenizer.vocab_size + 200)
    wrong_tokenizer.tokenizer = tokenizer
    wrong_size = small()
    wrong_size.preprocessing = Preprocessing(64)
    long_texts = small(vocabulary=49408)
    long_texts.tokenizer = ClipTokenizer(77)
    cut_texts = small_siglip(vocabulary=49408)
    cut_texts.tokenizer = ClipTokenizer(12)
    computed = variant(small(), weights={"image.class_token": lambda token: token * 2})
    for number, (clip, says) in enumerate(
        [
            (wrong_tokenizer, "does not belong"),
            (wrong_size, "image_size 64"),
            (long_texts, "77 tokens do not fit"),
            (cut_texts, "sees its padding"),
            (computed, "image.class_token"),
        ]
    ):
        folder = tmp_path / str(number)
        with pytest.raises(CheckpointError, match=says):
            clip.save(folder)
        assert not folder.exists()


def test_a_variant_with_replaced_weights_is_saved_as_it_is(tmp_path: Path) -> None:
    clip = small()
    token = torch.randn(32, generator=torch.Generator().manual_seed(0))
    back = clipworks.load(variant(clip, weights={"image.class_token": token}).save(tmp_path / "model"))
    assert torch.equal(back.image.class_token, token)


def test_half_the_bytes_are_half_the_precision(tmp_path: Path) -> None:
    from clipworks.checkpoints import own

    clip = resnet()
    folder = own.save(clip, tmp_path / "model", torch.float16)
    back = clipworks.load(folder)
    for name, tensor in clip.state_dict().items():
        kept = "running_" in name or not tensor.is_floating_point() or tensor.ndim == 0
        assert torch.equal(back.state_dict()[name], tensor if kept else tensor.half().float()), name


def test_a_folder_is_never_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(seed=1).save(tmp_path / "model")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        small(seed=2).save(folder)
    assert same_weights(clipworks.load(folder), small(seed=1))


def test_the_tokenizer_may_be_left_out_or_given_only_if_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 5, 300, context_length=12)
    clip = small(vocabulary=tokenizer.vocab_size)
    clip.tokenizer = tokenizer
    folder = clip.save(tmp_path / "model")
    assert clipworks.load(folder, tokenizer=False).tokenizer is None
    assert clipworks.load(folder, tokenizer=tokenizer).tokenizer is tokenizer
    other = train_tokenizer(["snow on hills"] * 5, tokenizer.vocab_size, context_length=12)
    with pytest.raises(CheckpointError, match="not the one that these weights"):
        clipworks.load(folder, tokenizer=other)
