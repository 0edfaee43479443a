"""Packed texts equal the plain tower: same vectors, same gradients, nothing computed twice."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipworks.core.config import TextConfig, uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.core.towers import TextTower
from clipworks.encode.packed import pack, run_packed, text_features

START, END, VOCABULARY = 48, 49, 50


def tower() -> TextTower:
    module = TextTower(TextConfig(16, VOCABULARY, 32, uniform_blocks(2, 32, 4), "quick_gelu"), 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.double().eval()


def tokens(texts: list[list[int]], length: int | None = None) -> Tokens:
    rows = [[START, *text, END] for text in texts]
    length = length or max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return Tokens(ids, torch.tensor([len(row) - 1 for row in rows]))


TEXTS = st.lists(st.lists(st.integers(1, 3), min_size=0, max_size=8), min_size=1, max_size=12)


@settings(max_examples=60)
@given(TEXTS, st.integers(1, 40))
def test_packed_features_equal_the_plain_tower(texts: list[list[int]], positions: int) -> None:
    module, batch = tower(), tokens(texts)
    assert torch.allclose(text_features(module, batch, positions), module(batch), atol=1e-12, rtol=0)


@settings(max_examples=60)
@given(TEXTS)
def test_the_row_holds_each_distinct_beginning_once(texts: list[list[int]]) -> None:
    batch = tokens(texts)
    beginnings = {
        tuple(row[: t + 1])
        for row, end in zip(batch.ids.tolist(), batch.ends.tolist(), strict=True)
        for t in range(end + 1)
    }
    assert len(pack(batch)) == len(beginnings)


def test_gradients_of_learned_vectors_equal_the_plain_form() -> None:
    module, batch = tower(), tokens([[1, 1, 2], [1, 1, 3, 3], [1, 1, 2, 2, 2], [2]])
    context = torch.randn(
        2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    weight = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def learned(ids: Tensor) -> Tensor:
        """The vectors of ids 1 and 3 are learned, the others are the tower's."""
        vectors = module.embedding(ids).detach().clone()
        return torch.where(
            (ids == 1)[..., None], context[0], torch.where((ids == 3)[..., None], context[1], vectors)
        )

    placed = module.place(learned(batch.ids))
    (module.project(module.run(placed), at=batch.ends) * weight).sum().backward()
    plain, context.grad = context.grad, None
    packed = pack(batch)
    (run_packed(module, packed, learned(batch.ids[packed.rows, packed.columns])) * weight).sum().backward()
    assert torch.allclose(context.grad, plain, atol=1e-12, rtol=1e-12)


def test_padding_appended_to_a_text_changes_nothing_and_a_word_does() -> None:
    module = tower()
    texts = [[1, 2], [3, 3, 1]]
    assert torch.equal(text_features(module, tokens(texts)), text_features(module, tokens(texts, 14)))
    assert not torch.allclose(
        text_features(module, tokens([[1, 2]])), text_features(module, tokens([[1, 3]]))
    )


def test_padding_mask_gives_the_answer_of_the_text_alone() -> None:
    config = TextConfig(16, VOCABULARY, 32, uniform_blocks(2, 32, 4), mask="padding")
    module = TextTower(config, 24).double().eval()
    batch = tokens([[1, 2], [3, 3, 1, 2, 2], [1]])
    alone = torch.cat([module(tokens([text])) for text in ([1, 2], [3, 3, 1, 2, 2], [1])])
    assert torch.allclose(text_features(module, batch), alone, atol=1e-12, rtol=0)
