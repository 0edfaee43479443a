"""What experiments on small models share: fresh towers, scenes with chosen captions, training, measuring.

Everything is a function of its seed. Scenes are rendered once and then lie in memory, so that several
trainings on the same pictures differ in nothing but what is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from clipworks.core.clip import Clip
from clipworks.core.config import Config, StemStage, TextConfig, TokenizerConfig, VisionConfig, uniform_blocks
from clipworks.core.tokenizer import FileTokenizer, train_tokenizer
from clipworks.data.batch import Batch
from clipworks.data.captions import ClassTexts
from clipworks.data.loader import Loader, Reading
from clipworks.data.sentences import TextChoice
from clipworks.data.source import Example, Examples, Source, TextChoices
from clipworks.data.world.dataset import WorldScenes
from clipworks.data.world.scenes import Scene, SceneConfig
from clipworks.engine import Recipe, Saving, fit
from clipworks.evaluate.retrieval import pair_recall
from clipworks.evaluate.zeroshot import labeled_batches, zero_shot
from clipworks.methods.pretrain.base import Objective

CONTEXT = 32  # tokens of a text


def tokenizer_of(
    texts: Iterable[str], vocab_size: int = 1024, context_length: int = CONTEXT
) -> FileTokenizer:
    """A tokenizer trained on these texts."""
    return train_tokenizer(list(texts), vocab_size, context_length=context_length)


def fresh_clip(
    tokenizer: FileTokenizer,
    seed: int,
    *,
    width: int = 96,
    depth: int = 3,
    image_size: int = 32,
    patch_size: int = 8,
    sigmoid: bool = False,
) -> Clip:
    """A small CLIP with the paper's initial weights: both towers of this width and depth, D = width."""
    blocks = uniform_blocks(depth, width, heads=max(1, width // 32))
    stages = patch_size.bit_length() - 1  # each halves the picture
    stem = tuple(StemStage(max(8, width >> stage)) for stage in reversed(range(stages)))
    config = Config(
        width=width,
        image=VisionConfig(
            image_size=image_size, patch_size=patch_size, width=width, blocks=blocks, stem=stem
        ),
        text=TextConfig(tokenizer.context_length, tokenizer.vocab_size, width, blocks),
        sigmoid=sigmoid,
        tokenizer=TokenizerConfig(kind="file", fingerprint=tokenizer.fingerprint()),
    )
    return Clip.from_config(config, tokenizer, seed=seed)


def scenes(
    config: SceneConfig,
    seed: int,
    which: range,
    texts: Callable[[Scene], Mapping[str, TextChoices]],
    *,
    size: int = 32,
    label: str = "pair",
) -> Examples:
    """Scenes `which` of a world, rendered, with the texts that a function gives each.

    Args:
        config: which scenes there are.
        seed: which world.
        which: indices of scenes; disjoint ranges are disjoint examples.
        texts: from a scene to its texts by source.
        size: of the pictures, in pixels.
        label: what the label names, as `WorldScenes` takes it; its `class_names` are those of the config.

    Returns:
        Examples whose `extra` has the `scene`.
    """
    world = WorldScenes(config, seed, which.stop, size, sources=(), label=label)

    def example(index: int) -> Example:
        found = world[index]
        scene = found.extra["scene"]
        return replace(found, texts=dict(texts(scene)), extra={"scene": scene})

    return Examples(example(index) for index in which)


def recipe_for(steps: int, batch_size: int, seed: int, **changes: Any) -> Recipe:
    """A recipe for a small model; the learning rate, 1e-3 at 256, goes with the root of the batch size."""
    usual: dict[str, Any] = {
        "steps": steps,
        "warmup": min(100, max(1, steps // 10)),
        "lr": 1e-3 * (batch_size / 256) ** 0.5,
        "weight_decay": 0.1,
        "betas": (0.9, 0.98),
        "precision": "fp32",
        "seed": seed,
    }
    return Recipe(**{**usual, **changes})


def train(
    clip: Clip,
    objective: Objective | Sequence[Objective],
    source: Source,
    recipe: Recipe | Sequence[Recipe],
    batch_size: int,
    *,
    texts: Sequence[str] | TextChoice = ("alt",),
    transform: Callable[[Batch], Batch] | None = None,
) -> Clip:
    """Train a Clip on a source without leaving anything on disk; several objectives are stages."""
    first = recipe if isinstance(recipe, Recipe) else recipe[0]
    loader = Loader(
        source,
        clip.preprocessing,
        clip.tokenizer,
        batch_size,
        texts=texts,
        seed=first.seed,
        reading=Reading(workers=1, cache="memory"),
        transform=transform,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            clip, objective, loader, recipe, folder=folder, saving=Saving(minutes=None), show="nothing"
        )
    trained = result.clip
    return trained if isinstance(trained, Clip) else clip


def classify(clip: Clip, source: Source, classes: ClassTexts) -> float:
    """Zero-shot top-1 in [0, 1] of a labeled source."""
    return zero_shot(clip, labeled_batches(clip, source, workers=1)[0], classes).top1


def retrieve(clip: Clip, source: Source, text: str = "alt") -> dict[str, float]:
    """Recall in [0, 1] of both directions, between the pictures of a source and their texts of one kind."""
    examples = [source[index] for index in range(len(source))]
    images = clip.embed_images([example.image for example in examples])
    sentences: list[str] = []
    owner: list[int] = []
    for row, example in enumerate(examples):
        own = example.texts[text]
        own = [own] if isinstance(own, str) else list(own)
        sentences += own
        owner += [row] * len(own)
    return pair_recall(images, clip.embed_texts(sentences), torch.tensor(owner))
