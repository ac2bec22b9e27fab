"""What evaluators share: the place of the true class among the scores, and the JSON they return."""

from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, Any]
"""Plain JSON; accuracies are fractions in [0, 1]."""


def rank_of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, (N,) int64: 0 is a top-1 hit, below 5 a top-5 hit.

    scores: (N, C), higher is likelier; labels: (N,) in [0, C). Of equal scores the lower class comes
    first, so the answer is the same on every device, unlike that of argmax or topk. A score that is
    not a number is never a hit.
    """
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    tied_after = (scores == own) & (classes >= labels[:, None])
    return (~(scores < own) & ~tied_after).sum(dim=1)


def accuracies(ranks: Tensor, num_classes: int) -> dict[str, float]:
    """Fractions "top1" and, of at least 5 classes, "top5", of the ranks (N,) that `rank_of_label` returns."""
    tops = (1, 5) if num_classes >= 5 else (1,)
    return {f"top{top}": int((ranks < top).sum()) / len(ranks) for top in tops}
