"""Small examples whose content says who they are, and a tokenizer that can be read back."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from clipworks.core.tokenizer import Tokens
from clipworks.data.source import Example


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """`png(number, mode="RGB", size=8)`: a picture of one color that encodes the number."""

    def make(number: int, mode: str = "RGB", size: int = 8) -> bytes:
        color = (number % 256, number // 256 % 256, 7)
        image = Image.new(mode, (size, size), color if mode == "RGB" else (*color, 128))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def make_examples(png: Callable[..., bytes]) -> Callable[..., list[Example]]:
    """`make_examples(n, classes=None)`: n examples `e0`, `e1` … with a picture, two captions and a label."""

    def make(count: int, classes: int | None = None, prefix: str = "e") -> list[Example]:
        return [
            Example(
                f"{prefix}{number}",
                png(number),
                {"alt": [f"{prefix}{number} one", f"{prefix}{number} two"]},
                None if classes is None else number % classes,
            )
            for number in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def spell() -> Callable[[list[str]], Tokens]:
    """A tokenizer that writes code points."""

    def tokenize(texts: list[str]) -> Tokens:
        length = max(map(len, texts))
        ids = torch.tensor([[ord(sign) for sign in text.ljust(length)] for text in texts])
        return Tokens(ids, torch.tensor([len(text) - 1 for text in texts]), None)

    return tokenize


@pytest.fixture(scope="session")
def read() -> Callable[[Tokens], list[str]]:
    """The texts that `spell` wrote."""

    def texts(tokens: Tokens) -> list[str]:
        return [
            "".join(map(chr, row[: end + 1])) for row, end in zip(tokens.ids.tolist(), tokens.ends.tolist())
        ]

    return texts
