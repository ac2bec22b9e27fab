"""How well vectors fill their space: measures of a representation that need no labels.

A representation collapses when all images come out alike (their spread vanishes) or along few directions only (the
rank falls). Each function takes one vector a row and returns a scalar on the rows' device, in float32 or finer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

RANK_EPSILON = 1e-7
BLOCK = 2048


def unit_rows(features: Tensor) -> Tensor:
    """Rows (N, C) scaled to length 1, in float32 or finer."""
    return F.normalize(_wide(features), dim=1)


@torch.no_grad()
def channel_std(features: Tensor) -> Tensor:
    """Standard deviation over rows (N, C), scaled to length 1, averaged over channels; in [0, 1 / sqrt(C)].

    0 for rows that are equal; near 1 / sqrt(C) for rows in all directions. Deviations are from each channel's mean
    over the rows, with N as the divisor. Source: Chen and He 2021 (SimSiam), section 4.1.
    """
    return unit_rows(features).std(dim=0, correction=0).mean()


def effective_rank(features: Tensor) -> Tensor:
    """How many directions rows (N, C) take up: exp of the entropy of their normalised singular values.

    Between 1, for rows along one direction, and min(N, C), for equal singular values; epsilon can lift either by a
    hair. Rows are neither centred nor scaled, so a direction that all rows share counts, and counts for much.
    Rows of zeros alone have rank 1. Source: Garrido et al. 2023 (RankMe), equation 1: p = sigma / sum(sigma) + epsilon.
    """
    return entropy_rank(torch.linalg.svdvals(_wide(features)))


def entropy_rank(spectrum: Tensor, *, epsilon: float = RANK_EPSILON) -> Tensor:
    """Exp of the entropy of numbers (K,) of at least 0, scaled to sum to 1 and lifted by epsilon; 1 if all are 0.

    How many of them there are, were they equal: 1 to K. Source: Roy and Vetterli 2007 ("The effective rank"), section
    2, with epsilon 0 for singular values.
    """
    shares = spectrum / spectrum.sum().clamp(min=torch.finfo(spectrum.dtype).tiny) + epsilon
    return torch.exp(torch.special.entr(shares).sum())


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance between rows i of two views (N, C), scaled to length 1; in [0, 4], lower is closer.

    Raises ValueError if the shapes differ. Source: Wang and Isola 2020, section 4.1, with alpha 2.
    """
    if first.shape != second.shape:
        raise ValueError(f"two views of the same images: {tuple(first.shape)} against {tuple(second.shape)}")
    return (unit_rows(first) - unit_rows(second)).square().sum(dim=1).mean()


def uniformity(features: Tensor, *, block: int = BLOCK) -> Tensor:
    """Log of the mean of exp(-2 squared distance) over distinct pairs of rows (N, C), scaled to length 1; in [-8, 0].

    0 for rows that are equal, near -4 for many rows in all of many directions. `block` rows are compared at a time.
    Raises ValueError for fewer than 2 rows. Source: Wang and Isola 2020, section 4.1, with t 2.
    """
    rows = unit_rows(features)
    count = len(rows)
    if count < 2:
        raise ValueError(f"uniformity compares pairs of rows; there is {count}")
    total = rows.new_zeros((), dtype=torch.float64)
    for start in range(0, count, block):
        part = rows[start : start + block]
        potentials = (
            -2 * torch.cdist(part, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        ).exp()
        potentials[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0  # each with itself
        total += potentials.sum(dtype=torch.float64)
    return (total / (count * (count - 1))).log().to(rows.dtype)


def _wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
