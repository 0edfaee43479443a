"""The laboratory: what it makes depends on its seed alone, and training leaves nothing behind."""

from __future__ import annotations

import torch

from clipworks.data.captions import ClassTexts
from clipworks.data.source import Example, Examples
from clipworks.data.world.scenes import Scene, SceneConfig
from clipworks.evaluate.retrieval import pair_recall
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.proofs.laboratory import (
    classify,
    fresh_clip,
    recipe_for,
    retrieve,
    scenes,
    tokenizer_of,
    train,
)

CONFIG = SceneConfig(count=(1, 1), shapes=("circle", "star"), colors=("red", "blue"))


def caption(scene: Scene) -> dict[str, list[str]]:
    thing = scene.objects[0]
    return {"alt": [f"a {thing.color} {thing.shape}", f"{thing.shape} in {thing.color}"]}


def test_scenes_carry_their_texts_and_true_labels_and_repeat() -> None:
    one, again, later = (scenes(CONFIG, 0, which, caption) for which in (range(6), range(6), range(4, 8)))
    names = ["red circle", "blue circle", "red star", "blue star"]
    for i in range(6):
        thing = one[i].extra["scene"].objects[0]
        assert names[one[i].label or 0] == f"{thing.color} {thing.shape}"
        assert one[i].texts == caption(one[i].extra["scene"])
        assert (one[i].image == again[i].image).all()
    assert [later[i].key for i in range(2)] == [one[i].key for i in (4, 5)]


def test_a_training_repeats_itself_and_its_model_can_be_measured() -> None:
    source = scenes(CONFIG, 0, range(24), caption)
    tokenizer = tokenizer_of(text for i in range(24) for text in source[i].texts["alt"])
    recipe = recipe_for(3, 8, 0)
    clips = [
        train(fresh_clip(tokenizer, 0, width=32, depth=1), ClipObjective(fresh=True), source, recipe, 8)
        for _ in range(2)
    ]
    for one, again in zip(clips[0].parameters(), clips[1].parameters(), strict=True):
        assert torch.equal(one, again)
    classes = ClassTexts(["red circle", "blue circle", "red star", "blue star"])
    assert 0 <= classify(clips[0], source, classes) <= 1
    assert recipe.lr == 1e-3 * (8 / 256) ** 0.5 and recipe_for(3, 8, 0, lr=1.0).lr == 1.0


def test_retrieval_knows_all_texts_of_a_picture() -> None:
    source = scenes(CONFIG, 0, range(5), caption)
    texts = [text for i in range(5) for text in source[i].texts["alt"]]
    clip = fresh_clip(tokenizer_of(texts), 0, width=32, depth=1)
    images, vectors = clip.embed_images([source[i].image for i in range(5)]), clip.embed_texts(texts)
    owner = torch.tensor([i for i in range(5) for _ in range(2)])
    assert retrieve(clip, source) == pair_recall(images, vectors, owner)
    one = Examples([Example("a", source[0].image, {"alt": texts[0]})])
    assert retrieve(clip, one)["image_to_text_recall@1"] == 1
