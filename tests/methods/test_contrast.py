"""The contrast that several methods share, against its equation in loops."""

import math

import pytest
import torch
from torch import Tensor

from fdkit.methods._contrast import info_nce


def info_nce_by_loops(queries: Tensor, keys: Tensor, temperature: float) -> float:
    """Mean over queries of -log of the softmax share of their own key."""
    total = 0.0
    for i, query in enumerate(queries):
        scores = [float(torch.dot(query, key) / query.norm() / key.norm()) / temperature for key in keys]
        total -= math.log(math.exp(scores[i]) / sum(math.exp(score) for score in scores))
    return total / len(queries)


def test_the_contrast_matches_naive_loops() -> None:
    queries, keys = torch.randn(4, 6), torch.randn(4, 6)
    for temperature in (0.2, 1.0):
        expected = info_nce_by_loops(queries, keys, temperature)
        assert info_nce(queries, keys, temperature=temperature).loss.item() == pytest.approx(
            expected, rel=1e-5
        )


def test_rows_of_a_later_rank_own_the_later_keys() -> None:
    queries, keys = torch.randn(6, 5), torch.randn(6, 5)
    whole = info_nce(queries, keys, temperature=0.2).loss
    parts = [info_nce(queries[i : i + 2], keys, temperature=0.2, first_label=i).loss for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_the_contrast_ignores_the_length_of_queries_and_keys() -> None:
    queries, keys = torch.randn(4, 6), torch.randn(4, 6)
    loss = info_nce(queries, keys, temperature=0.2).loss
    torch.testing.assert_close(info_nce(queries * 7, keys, temperature=0.2).loss, loss)
    torch.testing.assert_close(info_nce(queries, keys * 0.1, temperature=0.2).loss, loss)


def test_matching_features_are_found() -> None:
    rows = torch.eye(4, 6)
    result = info_nce(rows, rows, temperature=0.2)
    assert (result.positive_similarity.item(), result.top1.item()) == (1.0, 1.0)
    assert info_nce(rows, rows.roll(1, dims=0), temperature=0.2).top1.item() == 0.0


def test_half_precision_is_compared_in_float32() -> None:
    queries, keys = torch.randn(4, 6), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(queries.bfloat16(), keys.bfloat16(), temperature=0.05).loss
    assert loss.dtype == torch.float32
    expected = info_nce_by_loops(queries.bfloat16().float(), keys.bfloat16().float(), 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
