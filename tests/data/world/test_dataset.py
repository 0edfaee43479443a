"""`data/world/dataset.py`: scenes as a source whose captions a model learns from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipworks.data.world import scenes
from clipworks.data.world.captions import describe
from clipworks.data.world.dataset import WorldCaptions, WorldScenes
from clipworks.errors import ConfigError
from clipworks.methods.pretrain.sources import SourcePlan, open_source


def test_captions_are_those_of_the_scene_shown():
    config = scenes.SceneConfig(count=(2, 3))
    source, plain = WorldCaptions(config, seed=3, length=5), WorldScenes(config, seed=3, length=5)
    for index in range(5):
        example, scene = source[index], scenes.sample(config, 3, index)
        assert np.array_equal(np.asarray(example.image), np.asarray(plain[index].image))
        texts = example.texts["alt"]
        assert texts[0] == describe(scene, "short", seed=0)
        assert describe(scene, "relation", seed=5) in texts
        assert texts[-3:] == [
            describe(scene, "short", language, seed=6 + n) for n, language in enumerate(("de", "fr", "zh"))
        ]
        assert not set(texts) & {
            describe(scene, kind, seed=s)
            for kind in ("negative-attribute", "negative-relation")
            for s in range(6)
        }
    assert source.captions == [source[i].texts["alt"] for i in range(5)]


def test_a_plan_says_which_scenes():
    source = open_source(
        SourcePlan(kind="world", examples=60, scenes={"count": [1, 1], "styles": ["photo", "inverted"]}),
        Path(),
    )
    assert isinstance(source, WorldCaptions)
    drawn = [source.scenes.scene(i) for i in range(60)]
    assert {scene.style for scene in drawn} == {"photo", "inverted"}
    assert {len(scene.objects) for scene in drawn} == {1}


def test_an_unknown_language_is_refused():
    with pytest.raises(ConfigError, match="languages"):
        WorldCaptions(languages=("de", "klingon"))
