"""Weighted k-nearest-neighbour accuracy of frozen features: nothing to train, only k and a temperature to set.

Features are scaled to unit length; the k most similar training images vote for their class with weight
exp(cosine similarity / temperature). All k and temperatures asked for come from one search of the largest k,
which goes through queries and bank in blocks, so memory does not grow with either. Nothing is chosen by the
result: the headline is the first k and temperature of the configuration.
Source: Wu et al. 2018 (Non-parametric instance discrimination), section 3.4; Caron et al. 2021 (DINO),
appendix F.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.errors import ConfigError
from fdkit.evaluation._metrics import Metrics, accuracies, rank_of_label
from fdkit.evaluation.features import Features, paired

# Blocks of the similarity matrix: on a CPU they stay in the cache, on a GPU (0.5 GB) they fill it.
BLOCK_CPU = (1024, 4096)
BLOCK_GPU = (2048, 65536)


class KNNConfig(Config):
    """The numbers of neighbours and the temperatures to report."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((20,), min_length=1)
    """Numbers of voting neighbours, at most the training images; the first is the headline."""
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.07,), min_length=1)
    """Divides cosine similarity before the exponential, so low values favour the nearest; the first is the headline."""


def evaluate(train: Features, test: Features, config: KNNConfig) -> Metrics:
    """Accuracy on test of a vote among train, for every k and temperature, on the device of train.values.

    Returns {"evaluator", "k", "temperature", "top1", "top5" (of 5 classes or more), "results": [one entry a
    k and temperature, in the order asked], "train", "test"}. A class without a vote is never a top-5 hit.
    Raises ConfigError if a k exceeds the training images, DataError if test has classes that train lacks.
    """
    train, test = paired(train, test)
    ranks: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in config.k for t in config.temperature}
    for similarity, neighbours, rows in _searched(train.values, test.values, max(config.k)):
        voters, labels = train.labels[neighbours], test.labels[rows]
        for temperature in config.temperature:
            for k, votes in _votes(similarity, voters, len(train.classes), set(config.k), temperature):
                own = votes.gather(1, labels[:, None])[:, 0]
                rank = rank_of_label(votes, labels).where(own > 0, len(train.classes))
                ranks[k, temperature].append(rank)
    results = [
        {"k": k, "temperature": t, **accuracies(torch.cat(rank), len(train.classes))}
        for (k, t), rank in ranks.items()
    ]
    return {"evaluator": "knn", **results[0], "results": results, "train": train.info, "test": test.info}


def predict(train: Features, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """The class of most votes for each query (N, D), (N,) int64; of classes with equal votes, the lowest."""
    found = []
    for similarity, neighbours, _ in _searched(train.values, queries, k):
        for _, votes in _votes(similarity, train.labels[neighbours], len(train.classes), {k}, temperature):
            found.append((votes == votes.amax(dim=1, keepdim=True)).int().argmax(dim=1))
    return torch.cat(found)


def nearest(queries: Tensor, bank: Tensor, k: int, *, block: int) -> tuple[Tensor, Tensor]:
    """The k largest dot products of each query with the bank, descending, and their rows in it; both (Q, k).

    queries: (Q, D); bank: (N, D), N >= k; `block` rows of the bank are compared at a time. Of equal dot
    products the lower row comes first, whatever the block.
    """
    best, rows = _top(queries @ bank[: max(block, k)].T, k)
    for start in range(max(block, k), len(bank), block):
        scores = queries @ bank[start : start + block].T
        # An equal score cannot displace one of a lower row, so only rows that gain are looked at again.
        gains = (scores.amax(dim=1) > best[:, -1]).nonzero()[:, 0]
        if len(gains) == 0:
            continue
        new, new_rows = _top(scores[gains], k)
        merged = torch.cat([best[gains], new], dim=1)
        merged_rows = torch.cat([rows[gains], new_rows + start], dim=1)
        merged, order = merged.sort(dim=1, descending=True, stable=True)
        best[gains], rows[gains] = merged[:, :k], merged_rows.gather(1, order[:, :k])
    return best, rows


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k (or all, if fewer) largest of each row, descending, equal ones by column; both (Q, min(k, n))."""
    num_columns = scores.shape[1]
    values, columns = scores.topk(min(k + 1, num_columns), dim=1)
    if num_columns > k:
        # topk picks freely among equals: where the last one in equals the first one out, sort in full.
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        if len(tied) > 0:
            columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _searched(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Cosine similarities (Q, k), bank rows (Q, k) and query rows, a block of queries at a time."""
    if k > len(bank):
        raise ConfigError(
            f"k is {k}, but there are only {len(bank)} training images to be neighbours",
            f"ask for --k {len(bank)} or less",
        )
    bank = F.normalize(bank, dim=1)
    num_queries, block = BLOCK_CPU if bank.device.type == "cpu" else BLOCK_GPU
    for start in range(0, len(queries), num_queries):
        rows = slice(start, start + num_queries)
        yield *nearest(F.normalize(queries[rows], dim=1), bank, k, block=block), rows


def _votes(
    similarity: Tensor, voters: Tensor, num_classes: int, ks: set[int], temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """Each k of ks with the votes (Q, C) of the k nearest, ascending; the tensor is reused for the next k.

    similarity: (Q, K), descending; voters: (Q, K), their classes.
    """
    # A factor common to a query's votes changes no order, and without it low temperatures would overflow.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    for position in range(max(ks)):
        # One vote a query at a time, nearest first: the sum is the same on every device, whatever the largest k.
        chosen = slice(position, position + 1)
        votes.scatter_add_(1, voters[:, chosen], weights[:, chosen])
        if position + 1 in ks:
            yield position + 1, votes
