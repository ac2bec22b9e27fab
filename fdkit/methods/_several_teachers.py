"""One loss from several teachers: weights, and teacher dropping.

Where teachers differ in how easily they are imitated, the easy ones take over. Teacher dropping holds against that:
for each image the teacher imitated worst always counts, and each other one is left out at random.
Source: Sariyildiz et al. 2024 (UNIC, arXiv 2408.05088), released code naver/unic at 02269db, modeling/teacher_dropping.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkit.models.collectives import mean_over_ranks


def normalised_weights(weights: Sequence[float] | None, num_teachers: int) -> tuple[float, ...]:
    """Weights that sum to 1, so that the learning rate means the same for any number of teachers; None: equal ones."""
    chosen = (1.0,) * num_teachers if weights is None else tuple(weights)
    return tuple(weight / sum(chosen) for weight in chosen)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The scalars, one a teacher, times their weights, summed."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def dropped_mean(losses: Tensor, weights: Sequence[float], probability: float) -> Tensor:
    """The weighted mean of losses (T, B), of T teachers on B images, over what teacher dropping keeps; a scalar.

    The mean is over all images of all ranks, so an image with more teachers left counts more, as in the released code.
    """
    kept = keep_teachers(losses.detach(), probability)
    shares = torch.stack([weight * row for weight, row in zip(weights, kept.to(losses.dtype), strict=True)])
    return (shares * losses).sum() / mean_over_ranks(shares.sum())


def keep_teachers(losses: Tensor, probability: float) -> Tensor:
    """Which teachers count for which image, (T, B) bool: the one with the largest loss, others unless dropped.

    losses: (T, B); probability: that a teacher other than the worst imitated is left out. The draw is from torch's
    own generator of the device, which training seeds for each rank and keeps with every checkpoint.
    """
    kept = torch.rand_like(losses) >= probability
    return kept.scatter(0, losses.argmax(dim=0, keepdim=True), True)
