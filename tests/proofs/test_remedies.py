"""The remedies that Cross the Gap examines: the image-image term, and what each training leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clipworks.core.clip import Clip, unit
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.loader import Loader, Reading
from clipworks.data.world.dataset import WorldScenes
from clipworks.data.world.scenes import SceneConfig
from clipworks.proofs.remedies import REMEDIES, RemedyObjective, gap, image_loss, remedied


@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[..., Any]) -> Clip:
    made: Clip = tiny_clip(tokenizer=ClipTokenizer())
    return made


@pytest.fixture(scope="module")
def source() -> WorldScenes:
    return WorldScenes(SceneConfig(count=(1, 2)), 0, 40, sources=("alt",))


def test_the_image_term_is_simclrs() -> None:
    one, other = (unit(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1))
    views = torch.cat([one, other]).double()
    exact = views @ views.T / 0.1
    total = torch.zeros((), dtype=torch.float64)
    for i in range(10):
        rest = [j for j in range(10) if j != i]
        total -= exact[i, (i + 5) % 10] - exact[i, rest].logsumexp(dim=0)
    assert image_loss(one, other).double() == pytest.approx(float(total / 10), abs=1e-5)


def test_the_gap_is_the_distance_of_the_means() -> None:
    images, texts = torch.eye(4)[:2], torch.eye(4)[2:]
    assert gap(images, texts) == pytest.approx(1.0)
    assert gap(images, images.flip(0)) == 0


def test_only_the_remedy_with_an_image_term_looks_at_views(clip: Clip, source: WorldScenes) -> None:
    batch = next(iter(Loader(source, clip.preprocessing, clip.tokenizer, 8, reading=Reading(workers=1))))
    for name, remedy in REMEDIES.items():
        found = RemedyObjective(remedy, 32).features(clip, batch)
        assert ("one" in found) == (name == "intra")
        assert float(found["scale"].exp()) == pytest.approx(1 / remedy.temperature, rel=1e-5)
    assert not torch.allclose(found["one"], found["other"], atol=1e-3)


def test_a_temperature_of_one_brings_the_means_together_and_the_clip_stays(
    clip: Clip, source: WorldScenes
) -> None:
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    made = {name: remedied(clip, remedy, source, 30, 0) for name, remedy in REMEDIES.items()}
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor, before[name])
    again = remedied(clip, REMEDIES["intra"], source, 30, 0)
    for name, tensor in made["intra"].state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    texts = [example.texts["alt"] for example in source]
    texts = [one if isinstance(one, str) else one[0] for one in texts]
    images = [example.image for example in source]
    gaps = {
        name: gap(one.embed_images(images), one.embed_texts(texts))
        for name, one in {"start": clip, **made}.items()
    }
    assert gaps["together"] < gaps["apart"], gaps
