"""What ranks ask of each other, held against one process that has all rows."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fdkit.models.collectives import (
    gather_rows,
    gather_rows_with_gradient,
    mean_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)


def all_rows() -> Tensor:
    return torch.arange(4 * 3, dtype=torch.float64).view(4, 3).cos()


def similarity_loss(rows: Tensor, own: slice) -> Tensor:
    """What one rank's rows cost among all rows, no row being treated as another."""
    weights = torch.arange(1, 1 + len(rows), dtype=rows.dtype)
    return ((rows[own] @ rows.T).square() * weights).sum()


def one_rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    own = slice(2 * number, 2 * number + 2)
    rows = all_rows()[own].clone().requires_grad_()
    gathered = gather_rows_with_gradient(rows)
    similarity_loss(gathered, own).backward()
    values = all_rows()[number].clone().requires_grad_()
    mean = mean_over_ranks(values)
    (mean.square() * (number + 1)).sum().backward()
    detached = gather_rows(rows)
    strided = gather_rows(rows.detach().T[:2])  # rows that do not lie together in memory
    total = sum_over_ranks(values)
    torch.save(
        {
            "rank": rank(),
            "world_size": world_size(),
            "gathered": gathered.detach(),
            "rows_grad": rows.grad,
            "detached": detached,
            "strided": strided,
            "have_grad": [detached.requires_grad, total.requires_grad],
            "mean": mean.detach(),
            "values_grad": values.grad,
            "sum": total,
            "values": values.detach(),
        },
        f"{folder}/rank{number}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"rank{number}.pt", weights_only=True) for number in range(2)]
    rows = all_rows().requires_grad_()
    sum(similarity_loss(rows, slice(2 * number, 2 * number + 2)) for number in range(2)).backward()
    values = all_rows()[:2].clone().requires_grad_()
    (values.mean(dim=0).square() * 3).sum().backward()
    for number, result in enumerate(results):
        assert (result["rank"], result["world_size"]) == (number, 2)
        assert result["have_grad"] == [False, False]
        assert torch.equal(result["gathered"], all_rows())
        assert torch.equal(result["detached"], all_rows())
        assert torch.equal(result["strided"], torch.cat([all_rows()[i : i + 2].T[:2] for i in (0, 2)]))
        torch.testing.assert_close(result["rows_grad"], rows.grad[2 * number : 2 * number + 2])
        torch.testing.assert_close(result["mean"], all_rows()[:2].mean(dim=0))
        torch.testing.assert_close(result["values_grad"], values.grad[number])
        torch.testing.assert_close(result["sum"], all_rows()[:2].sum(dim=0))
        assert torch.equal(result["values"], all_rows()[number])  # the sum is not taken in place


def test_alone_everything_is_the_identity() -> None:
    rows = all_rows().requires_grad_()
    assert (rank(), world_size()) == (0, 1)
    assert gather_rows_with_gradient(rows) is rows
    assert mean_over_ranks(rows) is rows
    for function in (gather_rows, sum_over_ranks):
        assert torch.equal(function(rows), rows)
        assert not function(rows).requires_grad
