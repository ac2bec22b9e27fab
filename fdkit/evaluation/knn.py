"""Weighted k-nearest-neighbour accuracy of frozen features: nothing to train, only k and a temperature to set.

Features are scaled to unit length; the k most similar training images vote for their class with weight
exp(cosine similarity / temperature). All k and temperatures asked for come from one exact search of the largest k,
which goes through queries and bank in blocks, so memory does not grow with either. Nothing is chosen by the
result: the headline is the first k and temperature of the configuration.
Source: Wu et al. 2018 (Non-parametric instance discrimination), section 3.4; Caron et al. 2021 (DINO),
appendix F.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.evaluation._metrics import Metrics, accuracies, hits_to_text, rank_of_label
from fdkit.evaluation._search import Method, default_blocks, resolve_method, search, search_all
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import Features, paired
from fdkit.models.collectives import world_size


class KNNConfig(Config):
    """The numbers of neighbours and the temperatures to report."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((20,), min_length=1)
    """Numbers of voting neighbours, at most the training images; the first is the headline."""
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.07,), min_length=1)
    """Divides cosine similarity before the exponential, so low values favour the nearest; the first is the headline."""
    search: Method = "auto"
    """Precision neighbours are looked for in: bf16, fp32, or auto: bf16 where the hardware multiplies bf16 matrices.
    The neighbours found are the same, to the bit."""


def evaluate(train: Features, test: Features, config: KNNConfig, *, sharded: bool = False) -> Metrics:
    """Accuracy on test of a vote among train, for every k and temperature, on the device of train.values.

    sharded: every process of the default group calls this together, with the same features; each searches a slice
    of train, and all get the accuracies of one process alone. train.values may be mapped from a file.
    Returns {"evaluator", "k", "temperature", "top1", "top5" (of 5 classes or more), "results": [one entry a
    k and temperature, in the order asked], "search": {"method", "rechecked": queries that took a second, more
    precise search}, "hits" (which test images the headline had right, see `hits_to_text`), "train", "test"}. A class
    without a vote is never a top-5 hit.
    Raises ConfigError if a k exceeds the training images, DataError if test has classes that train lacks,
    NumericsError if a feature is not finite.
    """
    train, test = paired(train, test)
    method, rechecked = resolve_method(config.search, train.values.device), 0
    ranks: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in config.k for t in config.temperature}
    for found, rows in search(test.values, train.values, max(config.k), method=method, sharded=sharded):
        voters, labels = train.labels[found.rows], test.labels[rows]
        rechecked += int(found.rechecked.sum())
        for temperature in config.temperature:
            for k, votes in _votes(found.similarity, voters, len(train.classes), set(config.k), temperature):
                own = votes.gather(1, labels[:, None])[:, 0]
                rank = rank_of_label(votes, labels).where(own > 0, len(train.classes))
                ranks[k, temperature].append(rank)
    joined = {setting: torch.cat(rank) for setting, rank in ranks.items()}
    results = [
        {"k": k, "temperature": t, **accuracies(rank, len(train.classes))} for (k, t), rank in joined.items()
    ]
    return {
        "evaluator": "knn",
        **results[0],
        "results": results,
        "hits": hits_to_text(next(iter(joined.values())) == 0),
        "search": {"method": method, "rechecked": rechecked},
        "train": train.info,
        "test": test.info,
    }


def measure(subject: Subject, config: KNNConfig) -> Metrics:
    """What `evaluate` returns, of a model and its images; under torchrun each process searches a slice of train."""
    train, test = subject.splits()
    return evaluate(train, test, config, sharded=world_size() > 1)


def predict(train: Features, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """The class of most votes for each query (N, D), (N,) int64; of classes with equal votes, the lowest."""
    classes = []
    for found, _ in search(queries, train.values, k):
        voters = train.labels[found.rows]
        for _, votes in _votes(found.similarity, voters, len(train.classes), {k}, temperature):
            classes.append((votes == votes.amax(dim=1, keepdim=True)).int().argmax(dim=1))
    return torch.cat(classes)


def nearest(queries: Tensor, bank: Tensor, k: int, *, block: int) -> tuple[Tensor, Tensor]:
    """The k largest cosine similarities of each query with the bank, descending, and their rows in it; both (Q, k).

    queries: (Q, D), Q at least 1; bank: (N, D), N >= k; `block` rows of the bank are compared at a time. Of equal
    similarities the lower row comes first, whatever the block.
    """
    found = search_all(queries, bank, k, blocks=default_blocks(bank.device)._replace(bank=block))
    return found.similarity, found.rows


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
