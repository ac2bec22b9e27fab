"""Parts of labelled images that hold some of every class: the labels and a seed decide, and nothing else."""

import hashlib

import torch
from torch import Tensor

from fdkit.errors import ConfigError, DataError


def places(labels: Tensor, seed: int) -> Tensor:
    """The place of each image in a shuffled queue of its class, (N,) int64 from 0 up.

    labels: (N,) int64. The first n of every queue are the same whatever n, so smaller parts lie within larger ones.
    """
    by_class, first = _queues(labels, seed)
    found = torch.empty_like(labels)
    found[by_class] = torch.arange(len(labels), device=labels.device) - first[labels[by_class]]
    return found


def validation_split(labels: Tensor, validation_ratio: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to compare on, both ascending; round(validation_ratio * images) of each class compare.

    A class of two or more images gives at least one row to each side; a class of one image is only fitted.
    labels: (N,) int64. The split depends on the labels and the seed alone.
    """
    counts = torch.bincount(labels)
    quota = (counts * validation_ratio).round().long().clamp_min(1).minimum(counts - 1)
    is_validation = places(labels, seed) < quota[labels]
    return (~is_validation).nonzero()[:, 0], is_validation.nonzero()[:, 0]


def folds(labels: Tensor, num_folds: int, *, seed: int) -> Tensor:
    """The fold of each image, (N,) int64 in [0, num_folds); -1 for the only image of a class, which no fold can spare.

    Classes differ by at most one image between folds, and so do the folds. Every class of two images or more has one
    outside any fold. Raises DataError if no class has two images, ConfigError if a fold would stay empty.
    """
    by_class, _ = _queues(labels, seed)
    shared = by_class[torch.bincount(labels)[labels[by_class]] > 1]
    if len(shared) == 0:
        raise DataError(
            f"no class has two images among the {len(labels)} training images: nothing to compare on",
            "add labelled images",
        )
    if len(shared) < num_folds:
        raise ConfigError(
            f"--cross-validation is {num_folds}, but classes of two images or more hold {len(shared)} images",
            f"ask for {len(shared)} folds or fewer",
        )
    found = torch.full_like(labels, -1)
    found[shared] = torch.arange(len(shared), device=labels.device) % num_folds
    return found


def fingerprint(rows: Tensor) -> str:
    """SHA-256 of row numbers (N,) int64, so that a part of a data set can be told from another."""
    return hashlib.sha256(rows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _queues(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows class by class, each class shuffled, (N,); and where each class begins among them, (C,)."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels)
    return by_class, counts.cumsum(0) - counts
