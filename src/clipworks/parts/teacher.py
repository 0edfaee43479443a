"""What a frozen teacher says of examples, computed once: a table of its unit vectors by the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.data.batch import Batch
from clipworks.data.source import Source
from clipworks.errors import DataError


class TeacherTable:
    """A teacher's unit vectors by the examples' keys: a loader's `transform` that adds them to each batch.

    Nothing of the teacher runs in training then, and its tokenizer may be another one. It says the same of
    every view of a picture, so crops should be slight (0.9 to 1 of the area in the published runs).

    Args:
        keys: n names.
        image, text: (n, D*), unit length.
    """

    def __init__(self, keys: Sequence[str], image: Tensor, text: Tensor):
        if not len(keys) == len(image) == len(text):
            raise DataError(f"{len(keys)} keys, {len(image)} image vectors and {len(text)} text vectors")
        self.rows = {key: row for row, key in enumerate(keys)}
        self.image, self.text = image, text

    @classmethod
    def of(cls, teacher: Clip, source: Source, text: str = "alt") -> TeacherTable:
        """Encode every picture of a source and its one text of a kind.

        Raises:
            DataError: if an example has not exactly one such text.
        """
        examples = [source[index] for index in range(len(source))]
        texts = [example.texts.get(text) for example in examples]
        for example, found in zip(examples, texts, strict=True):
            if not isinstance(found, str):
                raise DataError(f"{example.key}: a table of a teacher's vectors takes one text {text!r}")
        image = teacher.embed_images([example.image for example in examples])
        return cls(
            [example.key for example in examples], image, teacher.embed_texts(cast("list[str]", texts))
        )

    def __call__(self, batch: Batch) -> Batch:
        """The batch with features `teacher_image` and `teacher_text` (B, D*)."""
        unknown = [key for key in batch.keys if key not in self.rows]
        if unknown or len(batch.keys) != len(batch):
            raise DataError(
                f"the teacher has no vectors for {unknown[0] if unknown else 'examples without key'}"
            )
        rows = torch.tensor([self.rows[key] for key in batch.keys], dtype=torch.int64)
        added = {"teacher_image": self.image[rows], "teacher_text": self.text[rows]}
        return replace(batch, features=batch.features | added)
