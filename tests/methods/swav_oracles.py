"""SwAV's two equations as plain loops over plain numbers."""

import math

import torch
from torch import Tensor


def codes_by_loops(scores: Tensor, epsilon: float, num_iterations: int) -> Tensor:
    """Sinkhorn-Knopp on plain numbers: prototypes to 1 / K of the whole, then samples to 1 / B of it, in turn."""
    num_samples, num_prototypes = scores.shape
    table = [[math.exp(float(score) / epsilon) for score in sample] for sample in scores]
    for _ in range(num_iterations):
        for k in range(num_prototypes):
            total = sum(sample[k] for sample in table)
            for sample in table:
                sample[k] /= total * num_prototypes
        for sample in table:
            total = sum(sample)
            sample[:] = [share / (total * num_samples) for share in sample]
    return torch.tensor(table, dtype=scores.dtype) * num_samples


def loss_by_loops(scores: Tensor, codes: Tensor, temperature: float) -> float:
    """Mean over coded views of the mean over the other views and samples of -sum code * log prediction."""
    total = 0.0
    for coded in range(len(codes)):
        of_view = 0.0
        for view in range(len(scores)):
            if view == coded:
                continue
            for code, sample in zip(codes[coded], scores[view], strict=True):
                exponentials = [math.exp(float(score) / temperature) for score in sample]
                of_view -= sum(
                    float(share) * math.log(one / sum(exponentials))
                    for share, one in zip(code, exponentials, strict=True)
                )
        total += of_view / (len(scores) - 1) / scores.shape[1]
    return total / len(codes)
