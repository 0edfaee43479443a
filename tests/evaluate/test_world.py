"""`evaluate/world.py`: what is asked, and that a model which knows the answer is found to know it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clipworks.data.world.captions import describe
from clipworks.data.world.scenes import ATTRIBUTES, SceneConfig, sample
from clipworks.errors import ConfigError
from clipworks.evaluate import world


def test_captions_name_the_value_and_vary_all_else():
    for name in ATTRIBUTES:
        texts = world.attribute_texts(name)
        assert len(texts) == len(ATTRIBUTES[name])
        assert len({text for value in texts for text in value}) == sum(map(len, texts)), name
    assert all("striped" in text for text in world.attribute_texts("texture")[1])
    assert not any("plain" in text for text in world.attribute_texts("texture")[0])
    assert all("rot" in text for text in world.attribute_texts("color", "de")[0])


class Oracle:
    """Answers from the scene's record: its vector of a picture is the one-hot number of the scene's value."""

    config = SimpleNamespace(image=SimpleNamespace(image_size=32))

    def __init__(self, name: str, config: SceneConfig, count: int, shift: int = 0):
        values = ATTRIBUTES[name]
        scenes = [sample(config, world.SEED, i) for i in range(count)]
        owners = [s if name in ("background", "style") else s.objects[0] for s in scenes]
        self.answers = torch.tensor([values.index(getattr(owner, name)) for owner in owners]) + shift
        self.classes = len(values)

    def embed_images(self, images):
        return torch.nn.functional.one_hot(self.answers % self.classes, self.classes).float()

    def class_features(self, texts, templates):
        return torch.eye(len(texts))


@pytest.mark.parametrize("name", ["shape", "style"])
def test_knowing_gives_one_and_its_contrary_none(name):
    config = SceneConfig(count=(1, 1))
    assert world.attributes(Oracle(name, config, 20), [name], count=20)[name].accuracy == 1
    assert world.attributes(Oracle(name, config, 20, shift=1), [name], count=20)[name].accuracy == 0


@pytest.mark.parametrize("kind", ["attribute", "relation"])
def test_swaps_count_the_true_caption(kind):
    config = SceneConfig(count=(2, 3))
    scenes = [sample(config, world.SEED, i) for i in range(12)]
    true = {describe(s, "short" if kind == "attribute" else "relation") for s in scenes}

    class Knows:
        config = SimpleNamespace(image=SimpleNamespace(image_size=32))

        def embed_images(self, images):
            return torch.ones(len(images), 1)

        def embed_texts(self, texts):
            return torch.tensor([[1.0 if text in true else 0.0] for text in texts])

    assert world.swaps(Knows(), kind, count=12).accuracy == 1
    same = Knows()
    same.embed_texts = lambda texts: torch.ones(len(texts), 1)
    assert world.swaps(same, kind, count=12).accuracy == 0.5


def test_an_unknown_attribute_is_refused():
    with pytest.raises(ConfigError, match="texture"):
        world.attribute_texts("textur")
