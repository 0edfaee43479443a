"""Recall against sorting, in both directions, with several matches and with ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipworks.errors import ShapeError
from clipworks.evaluate.retrieval import average_precision, pair_recall, ranks, recall


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 1000))
def test_rank_is_the_place_of_the_best_match_in_the_sorted_gallery(n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(n, m, generator=generator)
    matches = torch.rand(n, m, generator=generator) < 0.4
    matches[:, 0] = True
    for row, rank in enumerate(ranks(similarity, matches).tolist()):
        order = similarity[row].argsort(descending=True).tolist()
        assert rank == 1 + min(order.index(j) for j in range(m) if matches[row, j])


def test_ties_count_against_the_match() -> None:
    assert ranks(torch.zeros(1, 4), torch.tensor([[True, False, False, False]])).tolist() == [4]


def test_recall_grows_with_k_and_reaches_one() -> None:
    similarity = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    matches = torch.eye(10, dtype=torch.bool).repeat(2, 1)
    found = recall(similarity, matches, (1, 5, 10))
    assert found["recall@1"] <= found["recall@5"] <= found["recall@10"] == 1.0


def test_pairs_are_counted_in_both_directions() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 0, 1, 2]]
    owner = torch.tensor([0, 1, 1, 2])
    found = pair_recall(images, texts, owner, (1,))
    assert found["text_to_image_recall@1"] == pytest.approx(3 / 4)
    # Picture 0 meets a text of picture 1 that is as near as its own: a tie, so it is not found.
    assert found["image_to_text_recall@1"] == pytest.approx(2 / 3)


def test_query_without_a_match_is_refused() -> None:
    with pytest.raises(ShapeError, match="no match"):
        ranks(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_average_precision_is_the_mean_of_the_precisions_at_the_matches(n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(n, m, generator=generator)
    matches = torch.rand(n, m, generator=generator) < 0.4
    matches[:, 0] = True
    for row, found in enumerate(average_precision(similarity, matches).tolist()):
        relevant = [bool(matches[row, j]) for j in similarity[row].argsort(descending=True)]
        precisions = [sum(relevant[:k]) / k for k in range(1, m + 1) if relevant[k - 1]]
        assert found == pytest.approx(sum(precisions) / len(precisions), abs=1e-6)


def test_a_query_left_out_of_its_gallery_counts_nowhere() -> None:
    similarity = torch.tensor([[1.0, 0.5, 0.2], [0.1, 1.0, 0.9]])
    matches = torch.tensor([[True, False, True], [True, True, False]])
    similarity[range(2), range(2)] = float("-inf")
    assert average_precision(similarity, matches).tolist() == [0.5, 0.5]
    with pytest.raises(ShapeError, match="no match"):
        average_precision(torch.tensor([[float("-inf"), 0.3]]), torch.tensor([[True, False]]))
