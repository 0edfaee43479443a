"""The text bank gives the vectors and the gradients of the plain form, and computes less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipworks.core.tokenizer import ClipTokenizer, Tokens
from clipworks.errors import ConfigError, ShapeError
from clipworks.parts.text_bank import TextBank, with_slots

NAMES = ("cat", "dog", "cat food", "hot air balloon", "guacamole", "Siberian husky", "a", "dog sled")
CONTEXT = 3
Bank = tuple[Any, Tokens, Tensor]


def slotted(per_text: bool = False, names: tuple[str, ...] = NAMES) -> Tokens:
    tokens = ClipTokenizer()([f"X X X {name}." for name in names])
    return with_slots(tokens, 49408, 1, CONTEXT, per_text=per_text)


@pytest.fixture(scope="module")
def tower(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip().text.double().requires_grad_(False)


def plain(tower: Any, tokens: Tokens, vectors: Tensor, deep: tuple[Tensor, ...] = ()) -> Tensor:
    """Text by text at full length: what stands in a slot replaces the word; deep ones overwrite it again."""
    features = []
    for ids, end in zip(tokens.ids.tolist(), tokens.ends.tolist(), strict=True):
        rows = [vectors[i - 49408] if i >= 49408 else tower.embedding.weight[i] for i in ids]
        x = (torch.stack(rows) + tower.positions[: len(rows)])[None]
        for number, block in enumerate(tower.blocks):
            if 1 <= number <= len(deep):
                kept = [deep[number - 1][i - 49408] if i >= 49408 else x[0, p] for p, i in enumerate(ids)]
                x = torch.stack(kept)[None]
            x = block(x, mask="causal")
        features.append(tower.project(x, at=torch.tensor([end]))[0])
    return torch.stack(features)


def gradients(features: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(5), dtype=features.dtype)
    return torch.autograd.grad((features * weights).sum(), learned)


def learned(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 32, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("per_text", [False, True])
@pytest.mark.parametrize("memory", [1, 20_000, 1 << 29])
@pytest.mark.parametrize("depth", [0, 1])
def test_vectors_and_gradients_are_those_of_the_plain_form(
    tower: Any, per_text: bool, memory: int, depth: int
) -> None:
    tokens = slotted(per_text)
    count = CONTEXT * (len(NAMES) if per_text else 1)
    vectors = learned(count)
    deep = tuple(learned(count, seed) for seed in range(1, depth + 1))
    bank = TextBank(tower, tokens, memory=memory)
    assert bank.slots == count
    expected, found = plain(tower, tokens, vectors, deep), bank(vectors, deep)
    assert torch.allclose(found, expected, atol=1e-12)
    for one, other in zip(gradients(expected, vectors, *deep), gradients(found, vectors, *deep), strict=True):
        assert torch.allclose(one, other, atol=1e-11)
        assert one.any()


def test_chunks_differ_in_nothing(tower: Any) -> None:
    vectors = learned(CONTEXT)
    one, many = (TextBank(tower, slotted(), memory=memory) for memory in (1 << 29, 1))
    assert len(one.chunks) == 1
    assert len(many.chunks) == len(NAMES)
    assert torch.allclose(one(vectors), many(vectors), atol=1e-13)
    assert torch.allclose(
        gradients(one(vectors), vectors)[0], gradients(many(vectors), vectors)[0], atol=1e-12
    )


def test_a_shared_context_is_computed_once_and_padding_never(tower: Any) -> None:
    tokens = slotted()
    bank = TextBank(tower, tokens)
    suffixes = {
        tuple(ids[: end + 1][:i])
        for ids, end in zip(tokens.ids.tolist(), tokens.ends.tolist(), strict=True)
        for i in range(1, end + 2)
    }
    assert bank.positions == len(suffixes)  # every distinct beginning is one position
    assert TextBank(tower, slotted(per_text=True)).positions == int((tokens.ends + 1).sum()) - len(NAMES) + 1


def test_many_texts_keep_no_activations(tower: Any) -> None:
    """What autograd saves does not grow with the number of classes, once there are several chunks."""

    def kept(names: tuple[str, ...]) -> int:
        sizes: list[int] = []
        vectors = learned(CONTEXT)
        bank = TextBank(tower, slotted(names=names), memory=1)

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() if tensor.requires_grad or tensor.grad_fn is not None else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            bank(vectors)
        return sum(sizes)

    few, many = kept(NAMES[:2]), kept(NAMES)
    assert many - few <= 2 * 3 * 16 * len(NAMES)  # the texts' own vectors at most, no block's


def test_no_gradient_is_asked_for_where_nothing_is_learned(tower: Any) -> None:
    with torch.no_grad():
        assert not TextBank(tower, slotted())(learned(CONTEXT)).requires_grad
    assert not TextBank(tower, slotted())(learned(CONTEXT).detach()).requires_grad


def test_a_tower_that_sees_both_ways_runs_plainly(tiny_clip: Callable[..., Any]) -> None:
    both = tiny_clip(text={"mask": "padding"}).text.double().requires_grad_(False)
    vectors, tokens = learned(CONTEXT), slotted()
    content = torch.stack(
        [
            torch.stack([vectors[i - 49408] if i >= 49408 else both.embedding.weight[i] for i in ids])
            for ids in tokens.ids.tolist()
        ]
    )
    expected = both.project(both.run(both.place(content), mask=both.mask_for(tokens)), at=tokens.ends)
    (gradient,) = gradients(expected, vectors)
    for memory in (1, 1 << 29):
        found = TextBank(both, tokens, memory=memory)(vectors)
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.allclose(gradients(found, vectors)[0], gradient, atol=1e-11)


def test_wrong_input_is_refused(tower: Any) -> None:
    with pytest.raises(ShapeError, match=r"\(3, 32\)"):
        TextBank(tower, slotted())(torch.zeros(2, 32))
    with pytest.raises(ShapeError, match="past the end"):
        with_slots(ClipTokenizer()(["cat"]), 49408, 1, 4)
    with pytest.raises(ConfigError, match="Linear"):
        TextBank(torch.nn.Linear(2, 2), slotted())
