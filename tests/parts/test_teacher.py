"""A teacher's table: the right vectors for every row, whatever the order, and nothing without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clipworks.core.tokenizer import train_tokenizer
from clipworks.data.batch import Batch
from clipworks.data.loader import Loader
from clipworks.data.source import Example, Examples
from clipworks.errors import DataError
from clipworks.parts.teacher import TeacherTable


def test_every_row_gets_the_vectors_of_its_own_example(tiny_clip: Callable[..., Any]) -> None:
    texts = [f"a thing called {word}" for word in ("red", "green", "blue", "grey", "pink", "black")]
    tokenizer = train_tokenizer(texts * 3, 280, context_length=12)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 12}
    teacher = tiny_clip(0, tokenizer=tokenizer, text=sizes)
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    source = Examples(Example(f"k{i}", pictures[i], {"alt": texts[i]}) for i in range(6))
    table = TeacherTable.of(teacher, source)
    seen = set()
    for batch in Loader(source, teacher.preprocessing, tokenizer, 3, seed=1, transform=table):
        with torch.no_grad():
            images, words = teacher(batch.images, batch.texts["alt"])
        torch.testing.assert_close(batch.features["teacher_image"], images, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.features["teacher_text"], words, atol=1e-5, rtol=1e-5)
        seen.update(batch.keys)
    assert len(seen) == 6


def test_what_the_table_lacks_is_named(tiny_clip: Callable[..., Any]) -> None:
    table = TeacherTable(["a"], torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(DataError, match="no vectors for b"):
        table(Batch(images=torch.zeros(1, 3, 8, 8), keys=["b"]))
    with pytest.raises(DataError, match="without key"):
        table(Batch(images=torch.zeros(1, 3, 8, 8)))
    with pytest.raises(DataError, match="2 keys, 1 image"):
        TeacherTable(["a", "b"], torch.ones(1, 2), torch.ones(2, 2))
    with pytest.raises(DataError, match="k: a table"):
        TeacherTable.of(tiny_clip(0), Examples([Example("k", None, {"alt": ["two", "texts"]})]))
