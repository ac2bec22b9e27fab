"""Mean and scatter of vectors that stream by."""

import torch
from torch import Tensor


class Moments:
    """Count, mean and scatter of rows (D,) seen so far, float64 on the CPU; memory D x D, whatever their number.

    Batches are merged by Chan, Golub and LeVeque 1983 ("Algorithms for computing the sample variance"), which does not
    cancel where the mean is far larger than the deviations.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        """Sum over rows of (row - mean)(row - mean)^T."""

    def add(self, rows: Tensor) -> None:
        """Counts rows (B, D), B >= 1."""
        rows = rows.detach().double().cpu()
        mean = rows.mean(0)
        centred, gap = rows - mean, mean - self.mean
        total = self.count + len(rows)
        self.scatter += centred.T @ centred + gap.outer(gap) * (self.count * len(rows) / total)
        self.mean += gap * (len(rows) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """(D, D): the scatter divided by the count."""
        return self.scatter / self.count

    def second_moment(self) -> Tensor:
        """(D, D): the mean of row row^T, not centred."""
        return self.covariance() + self.mean.outer(self.mean)
