"""Class-prototype accuracy: a test image belongs to the class whose mean training feature is nearest.

Nothing is trained and nothing chosen; works from one image a class on. By default features are scaled to unit length
before they are averaged, and similarity is the cosine with the mean; with centring the mean of all training features
is taken away first, which removes what all images have in common.
Source: Snell et al. 2017 (Prototypical networks), section 2; Wang et al. 2019 (SimpleShot), section 3, for centring and
unit length. SimpleShot measures Euclidean distance to the mean of unit vectors; the cosine used here differs from it
by the length of that mean, which punishes a class for being varied.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.evaluation._inputs import comparable
from fdkit.evaluation._metrics import Metrics, accuracies, hits_to_text, rank_of_label
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation.features import Features

Metric = Literal["cosine", "centred-cosine", "euclidean"]

# Rows read at a time; float64 copies of more would only cost memory.
ROWS_AT_ONCE = 4096


class PrototypeConfig(Config):
    """What is near."""

    metric: Metric = "cosine"
    """cosine: of unit features with the mean of those of a class; centred-cosine: the same after the mean of all
    training features is subtracted; euclidean: distance between features as they are and their class mean."""
    seed: int = Field(0, ge=0)
    """Seed of the interval; the accuracy has nothing random."""


def evaluate(train: Features, test: Features, config: PrototypeConfig) -> Metrics:
    """Accuracy on test of the nearest class mean of train, on the device of train.values.

    Returns {"evaluator", "metric", "top1", "top5" (of 5 classes or more), "interval" (95 % of top1 over test images),
    "hits" (which test images were right, see `hits_to_text`), "train", "test"}. Raises what `comparable` raises.
    """
    train, test = comparable(train, test)
    found = ranks(train, test, config.metric)
    return {
        "evaluator": "prototype",
        "metric": config.metric,
        **accuracies(found, len(train.classes)),
        "interval": list(bootstrap_interval(found == 0, seed=config.seed)),
        "hits": hits_to_text(found == 0),
        "train": train.info,
        "test": test.info,
    }


def ranks(train: Features, test: Features, metric: Metric) -> Tensor:
    """The place of the true class among the prototypes, (N,) int64, of comparable features; 0 is a hit."""
    prepare = _preparation(train.values, metric)
    prototypes = _class_means(train, prepare)
    blocks = zip(test.values.split(ROWS_AT_ONCE), test.labels.split(ROWS_AT_ONCE), strict=True)
    score = _minus_squared_distance if metric == "euclidean" else _cosine
    return torch.cat(
        [rank_of_label(_known(score(prepare(values), prototypes)), labels) for values, labels in blocks]
    )


def _preparation(values: Tensor, metric: Metric) -> Callable[[Tensor], Tensor]:
    """What is done to features (B, D) before they are averaged or compared; returns float64."""
    if metric == "euclidean":
        return Tensor.double
    if metric == "cosine":
        return lambda block: F.normalize(block.double(), dim=1)
    sums = [block.double().sum(dim=0) for block in values.split(ROWS_AT_ONCE)]
    mean = torch.stack(sums).sum(dim=0) / len(values)
    return lambda block: F.normalize(block.double() - mean, dim=1)


def _class_means(train: Features, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of the prepared features of each class, (C, D) float64; not a number for a class without images.

    By a product with one-hot labels: adding rows up by index has no fixed order on a GPU.
    """
    num_classes = len(train.classes)
    sums = torch.zeros(num_classes, train.values.shape[1], dtype=torch.float64, device=train.values.device)
    for values, labels in zip(
        train.values.split(ROWS_AT_ONCE), train.labels.split(ROWS_AT_ONCE), strict=True
    ):
        sums += F.one_hot(labels, num_classes).double().T @ prepare(values)
    return sums / torch.bincount(train.labels, minlength=num_classes)[:, None]


def _cosine(queries: Tensor, prototypes: Tensor) -> Tensor:
    """(Q, C); queries are of unit length."""
    return queries @ F.normalize(prototypes, dim=1).T


def _minus_squared_distance(queries: Tensor, prototypes: Tensor) -> Tensor:
    """(Q, C), without the term |query|^2, which favours no class; so the difference keeps its digits."""
    return 2 * queries @ prototypes.T - prototypes.square().sum(dim=1)


def _known(scores: Tensor) -> Tensor:
    """Scores in which a class without prototype is last."""
    return scores.nan_to_num(nan=-torch.inf)
