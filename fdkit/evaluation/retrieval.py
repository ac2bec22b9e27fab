"""Image retrieval with frozen features: whether what looks alike to the network belongs together.

Each test image is a query; the images of a gallery are ranked by cosine similarity, and those of the query's class
are relevant. The gallery is test itself without the query, or train. Of equal similarities the lower row comes first.
Measures of a query with R relevant images, P(i) the share of relevant ones among the first i:
average precision, the mean of P(i) over the places of all relevant images; average precision at R, the sum of P(i) over
relevant places i <= R, divided by R; recall at k, whether any relevant image is among the first k. Each is averaged
over queries; a query without relevant images has none, is left out and counted.
Source: Musgrave et al. 2020 (A metric learning reality check) for average precision at R; Oh Song et al. 2016 (Lifted
structured feature embedding) for recall at k.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation._inputs import refuse_constant, refuse_unlabelled
from fdkit.evaluation._metrics import Metrics
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import Features, paired, refuse_not_finite

# Similarities at a time; sorting and measuring them takes about 50 bytes each.
BLOCK_CPU = 1 << 21
BLOCK_GPU = 1 << 26


class RetrievalConfig(Config):
    """Where images are looked for, and how far down."""

    gallery: Literal["test", "train"] = "test"
    """Images to rank: test without the query itself, or train."""
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1)
    """Numbers of first images among which recall looks for a relevant one; at most the gallery."""
    seed: int = Field(0, ge=0)
    """Seed of the interval; the measures have nothing random."""


class Ranking(NamedTuple):
    """Measures of each query that has relevant images, (Q,) float64 on the CPU."""

    average_precision: Tensor
    average_precision_at_r: Tensor
    first_relevant: Tensor
    """(Q,) int64: how many images come before the first relevant one."""


def evaluate(train: Features, test: Features, config: RetrievalConfig) -> Metrics:
    """Mean average precision and recall of test images as queries, on the device of the gallery's values.

    Returns {"evaluator", "gallery", "map", "map@r", "recall@K" for every k asked, "interval" (95 % of map over
    queries), "num_queries", "num_left_out", "train" (if it is the gallery), "test"}. With the gallery test, train is
    not read, and its classes may be others.
    Raises ConfigError if a k exceeds the gallery, DataError if no query has a relevant image or images have no labels,
    NumericsError if features are not finite or all the same.
    """
    bank, queries = _gallery(train, test, config.gallery)
    within = config.gallery == "test"
    size = len(bank.values) - within
    if max(config.k) > size:
        raise ConfigError(
            f"recall at {max(config.k)} is asked for, but the gallery holds {size} images",
            f"ask for --k {size} or less" if size else "give more images",
        )
    found = rank(bank, queries, within=within)
    num_queries = len(found.average_precision)
    if num_queries == 0:
        raise DataError(
            f"none of the {len(queries.values)} test images has another image of its class in the gallery",
            "give classes two images or more, or use --gallery train",
        )
    recall = {f"recall@{k}": int((found.first_relevant < k).sum()) / num_queries for k in config.k}
    return {
        "evaluator": "retrieval",
        "gallery": config.gallery,
        "map": float(found.average_precision.mean()),
        "map@r": float(found.average_precision_at_r.mean()),
        **recall,
        "interval": list(bootstrap_interval(found.average_precision, seed=config.seed)),
        "num_queries": num_queries,
        "num_left_out": len(queries.values) - num_queries,
        **({} if within else {"train": train.info}),
        "test": test.info,
    }


def measure(subject: Subject, config: RetrievalConfig) -> Metrics:
    """What `evaluate` returns, of a model and its images; training images are read only if they are the gallery."""
    test = subject.features(subject.split).to(subject.device)
    train = subject.features("train").to(subject.device) if config.gallery == "train" else test
    return evaluate(train, test, config)


def rank(gallery: Features, queries: Features, *, within: bool) -> Ranking:
    """Measures of every query with relevant images in the gallery, in the order of the queries.

    Labels of both count in the same classes. within: the queries are the gallery, and no image finds itself.
    """
    num_images = torch.bincount(gallery.labels, minlength=len(gallery.classes))
    relevant = num_images[queries.labels] - int(within)  # (Q,)
    rows = (relevant > 0).nonzero()[:, 0]
    empty = Ranking(*(torch.empty(0, dtype=kind) for kind in (torch.float64, torch.float64, torch.int64)))
    parts = [empty]
    for chosen, order in _ranked(gallery.values, queries.values, rows, within=within):
        hits = gallery.labels[order] == queries.labels[chosen, None]  # (B, G)
        parts.append(Ranking(*(measure.cpu() for measure in _measures(hits, relevant[chosen]))))
    return Ranking(*(torch.cat(measure) for measure in zip(*parts, strict=True)))


def _gallery(train: Features, test: Features, gallery: str) -> tuple[Features, Features]:
    """Gallery and queries, with labels counted in the same classes."""
    refuse_unlabelled(test, "test")
    if gallery == "test":
        if len(test.values) == 0:
            raise DataError(
                "there are no test images to look for", "name a split that has some: --test-split val"
            )
        refuse_not_finite(test, "test")
        refuse_constant(test, "test")
        return test, test
    refuse_unlabelled(train, "training")
    train, test = paired(train, test)
    refuse_constant(train, "training")
    return train, test


def _ranked(bank: Tensor, queries: Tensor, rows: Tensor, *, within: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of query rows (B,) with the rows of the bank from most to least similar, (B, G).

    within: the queries are the bank itself, and each is taken out of its own ranking, so G is one less.
    """
    bank = F.normalize(bank, dim=1)
    budget = BLOCK_CPU if bank.device.type == "cpu" else BLOCK_GPU
    for chosen in rows.split(max(1, budget // len(bank))):
        similarity = F.normalize(queries[chosen], dim=1) @ bank.T
        if within:
            similarity[torch.arange(len(chosen), device=chosen.device), chosen] = -torch.inf
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        yield chosen, order[:, : len(bank) - within]


def _measures(hits: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average precision, the same at R, and the place of the first relevant image, each (B,).

    hits: (B, G) bool, whether the image in a place is relevant; relevant: (B,) how many are, at least 1.
    """
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = (hits.cumsum(dim=1) / places.double()).masked_fill_(~hits, 0.0)
    average = precision.sum(dim=1) / relevant
    precision.masked_fill_(places > relevant[:, None], 0.0)
    return average, precision.sum(dim=1) / relevant, hits.int().argmax(dim=1)
