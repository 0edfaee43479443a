"""Modality inversion: real words and patches pass as through the tower; items do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipworks.core.clip import unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.encode.bulk import tokenize
from clipworks.errors import CheckpointError, ConfigError, ShapeError
from clipworks.methods.retrieve.cross_the_gap import NOISE, ModalityInversion, Picture, Sentence

TOKENIZER = ClipTokenizer()


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def exact(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(tokenizer=TOKENIZER).double()


def vectors(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return unit(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed), dtype=dtype))


# ------------------------------------------------------------------------------------------- the two ways


@pytest.mark.parametrize("words", ["cat", "red cat sleeping here"])
@pytest.mark.parametrize("template", ["a photo of {}", "the {} in a photo."])
def test_embeddings_of_real_words_give_the_ordinary_feature(exact: Any, words: str, template: str) -> None:
    count = len(words.split())
    sentence = Sentence(exact, template, count)
    ids = tokenize(exact, [words]).ids[0, 1 : 1 + count]
    spoken = sentence(exact.text.embedding(ids)[None])
    expected = exact.text(tokenize(exact, [template.replace("{}", words)]))
    assert torch.allclose(spoken, expected, atol=1e-12, rtol=0)


def test_pseudo_words_stand_where_the_papers_sentence_has_them(clip: Any) -> None:
    sentence = Sentence(clip, "a photo of {}", 4)
    assert sentence.places.tolist() == [4, 5, 6, 7]
    assert sentence.end == 8
    assert sentence.cached == 4


@pytest.mark.parametrize("tokens", [1, 4])
def test_what_is_kept_of_the_beginning_changes_neither_feature_nor_gradient(exact: Any, tokens: int) -> None:
    sentence, whole = (Sentence(exact, "a photo of {}", tokens) for _ in range(2))
    whole.cached = 0
    found = []
    for one in (sentence, whole):
        generator = torch.Generator().manual_seed(0)
        words = torch.randn(3, tokens, 32, generator=generator, dtype=torch.float64).requires_grad_()
        features = one(words)
        found.append((features, torch.autograd.grad(features.square().sum(), words)[0]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-12, rtol=0)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-12, rtol=0)


def test_a_tower_that_sees_all_places_is_spoken_through_whole(tiny_clip: Callable[..., Any]) -> None:
    seeing = tiny_clip(tokenizer=TOKENIZER, text={"mask": "none"})
    sentence = Sentence(seeing, "a photo of {}", 1)
    assert sentence.cached == 0
    ids = tokenize(seeing, ["cat"]).ids[0, 1:2]
    said = tokenize(seeing, ["a photo of cat"])
    assert torch.allclose(sentence(seeing.text.embedding(ids)[None]), seeing.text(said), atol=1e-5)


def test_a_pictures_own_patches_give_its_feature(exact: Any) -> None:
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches = exact.image.read(pixels).flatten(1, 2)
    assert torch.allclose(Picture(exact.image)(patches), exact.image(pixels), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("side", "count", "runs"), [(7, 4, [13, 12, 12, 12]), (4, 1, [16]), (2, 4, [1, 1, 1, 1]), (3, 2, [5, 4])]
)
def test_pseudo_patches_fill_runs_along_the_raster(
    tiny_clip: Callable[..., Any], side: int, count: int, runs: list[int]
) -> None:
    tower = tiny_clip(image={"image_size": 8 * side}).image
    seen: list[Tensor] = []
    place = tower.place
    tower.place = lambda content: seen.append(content) or place(content)
    patches = torch.arange(count, dtype=torch.float32)[None, :, None].expand(1, count, 32)
    Picture(tower)(patches)
    filled = seen[0][0, :, :, 0].flatten().long()
    assert filled.tolist() == sorted(filled.tolist())
    assert torch.bincount(filled).tolist() == runs


# ------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_the_other_tower_comes_to_say_the_same(clip: Any, direction: Any) -> None:
    targets = vectors(5)
    before = ModalityInversion(clip, direction=direction, steps=1, lr=1e-9)
    after = ModalityInversion(clip, direction=direction, steps=60)
    start = before.transform(targets)
    crossed = after.transform(targets)
    assert torch.allclose(crossed.norm(dim=1), torch.ones(5), atol=1e-5)
    assert (after.cosine_ > before.cosine_ + 0.1).all()
    assert torch.allclose(after.cosine_, (crossed * targets).sum(dim=1), atol=1e-5)
    assert not torch.allclose(start, crossed)


def test_a_word_that_was_said_is_said_again(clip: Any) -> None:
    targets = clip.embed_texts([f"a photo of {word}" for word in ("cat", "tree", "house", "sea", "sun")])
    inversion = ModalityInversion(clip)
    inversion.transform(targets)
    assert float(inversion.cosine_.mean()) > 0.98


def test_it_starts_from_small_noise_of_each_item_alone(clip: Any) -> None:
    still = ModalityInversion(clip, steps=1, lr=1e-12, weight_decay=0, tokens=3, seed=1)
    still.transform(vectors(200), keys=[str(i) for i in range(200)])
    assert still.tokens_.shape == (200, 3, 32)
    assert float(still.tokens_.std()) == pytest.approx(NOISE, rel=0.02)
    assert float(still.tokens_.mean()) == pytest.approx(0, abs=1e-3)
    again = ModalityInversion(clip, steps=1, lr=1e-12, weight_decay=0, tokens=3, seed=1)
    again.transform(vectors(200, seed=1)[:2], keys=["7", "3"])
    assert torch.allclose(again.tokens_, still.tokens_[[7, 3]], atol=1e-9)


def test_an_item_alone_ends_as_it_does_in_a_batch(exact: Any) -> None:
    targets = vectors(6, dtype=torch.float64)
    inversion = ModalityInversion(exact, steps=25)
    speak, width = inversion._speaker()
    noise = inversion._noise([str(i) for i in range(6)], width)
    together = inversion._invert(speak, targets, noise)
    for row in range(6):
        alone = inversion._invert(speak, targets[row : row + 1], noise[row : row + 1])
        assert torch.allclose(alone, together[row : row + 1], atol=1e-6, rtol=0)


def test_order_batches_and_resuming_change_nothing(clip: Any, tmp_path: Path) -> None:
    targets = vectors(7)
    whole = ModalityInversion(clip, steps=8, batch_size=7).transform(targets)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.allclose(
        ModalityInversion(clip, steps=8, batch_size=2).transform(targets[order]), whole[order], atol=1e-5
    )
    store = tmp_path / "deep" / "tokens.safetensors"
    ModalityInversion(clip, steps=8, store=store).transform(targets[:3])
    resumed = ModalityInversion(clip, steps=8, store=store)
    searched: list[int] = []
    invert = resumed._invert
    resumed._invert = lambda speak, targets, start: (
        searched.append(len(start)) or invert(speak, targets, start)
    )
    assert torch.allclose(resumed.transform(targets), whole, atol=1e-5)
    assert searched == [4]
    assert torch.equal(resumed.transform(targets), resumed.transform(targets))
    assert searched == [4]


def test_pseudo_tokens_of_other_settings_or_towers_are_refused(
    clip: Any, tiny_clip: Callable[..., Any], tmp_path: Path
) -> None:
    store = tmp_path / "tokens.safetensors"
    ModalityInversion(clip, steps=2, store=store).transform(vectors(2))
    other = tiny_clip(seed=1, tokenizer=TOKENIZER)
    for refused in (
        ModalityInversion(clip, steps=3, store=store),
        ModalityInversion(clip, steps=2, template="a {}", store=store),
        ModalityInversion(other, steps=2, store=store),
    ):
        with pytest.raises(CheckpointError, match="name another file"):
            refused.transform(vectors(2))
    clip.save(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="not a file of pseudo-tokens"):
        ModalityInversion(clip, store=next((tmp_path / "clip").glob("*.safetensors"))).transform(vectors(2))


def test_the_summed_loss_is_the_mean_with_a_larger_eps(exact: Any) -> None:
    """So the published code's steps, on the mean over a batch of B, are ours with eps = B · 1e-8."""
    targets = vectors(8, dtype=torch.float64)
    inversion = ModalityInversion(exact, steps=10, eps=8e-8)
    speak, width = inversion._speaker()
    noise = inversion._noise([str(i) for i in range(8)], width)
    tokens = noise.double().requires_grad_()
    optimizer = torch.optim.AdamW([tokens], 0.02, weight_decay=0.01)
    for _ in range(10):
        loss = (1 - torch.cosine_similarity(speak(tokens), targets)).mean()
        (tokens.grad,) = torch.autograd.grad(loss, [tokens])
        optimizer.step()
    assert torch.allclose(inversion._invert(speak, targets, noise), tokens.detach().float(), atol=1e-6)


def test_a_score_is_the_intra_modal_one_and_what_deviates(clip: Any) -> None:
    queries, gallery = vectors(4, 1), vectors(6, 2)
    inversion = ModalityInversion(clip, steps=10)
    scores = inversion.similarity(queries, gallery)
    crossed, c = inversion.transform(queries), inversion.cosine_[:, None]
    deviation = unit(crossed - c * queries)
    expected = c * (queries @ gallery.T) + (1 - c**2).sqrt() * (deviation @ gallery.T)
    assert torch.allclose(scores, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------- what cannot be


def test_what_cannot_be_inverted_says_why(clip: Any, tiny_clip: Callable[..., Any]) -> None:
    targets = vectors(2)
    for settings, said in (
        ({"template": "a photo"}, "must have one {}"),
        ({"template": "{} and {}"}, "must have one {}"),
        ({"tokens": 0}, "tokens, steps and batch_size must be at least 1"),
        ({"steps": 0}, "tokens, steps and batch_size must be at least 1"),
        ({"tokens": 90}, "do not fit the context"),
        ({"direction": "sideways"}, "direction 'sideways'"),
        ({"direction": "text_to_image", "tokens": 17}, "17 pseudo-patches do not fit a picture of 16"),
    ):
        with pytest.raises(ConfigError) as refused:
            ModalityInversion(clip, **settings).transform(targets)
        assert said in str(refused.value)
    with pytest.raises(ShapeError, match="3 keys were given for 2 features"):
        ModalityInversion(clip, steps=1).transform(targets, keys=["a", "b", "c"])
    with pytest.raises(ShapeError, match=r"not \(2, 3\)"):
        ModalityInversion(clip, steps=1).transform(targets[:, :3])


def test_nothing_to_invert_is_nothing(clip: Any) -> None:
    assert ModalityInversion(clip).transform(torch.empty(0, 16)).shape == (0, 16)
