"""What a network asks of the other ranks; alone, each function is the identity.

Every rank holds equally many rows: the loader cuts a global batch into equal slices.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of the ranks this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, rank 0 first: (B, ...) becomes (B * world_size, ...).

    Detached: no gradient goes back, to this rank or another.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(rows.shape[0] * world_size(), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """The rows of all ranks, rank 0 first: (B, ...) becomes (B * world_size, ...).

    Gradients go back to the rank that owns a row, summed over all ranks that use it.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; detached."""
    values = values.detach()
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; gradients go back to every rank's values."""
    if world_size() == 1:
        return values
    mean: Tensor = _SumOverRanks.apply(values) / world_size()
    return mean


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; a value enters every rank's sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    """Rows of all ranks; every rank's loss may use a row, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        first = rank() * ctx.num_rows
        return total[first : first + ctx.num_rows]
