"""Batch norms on two ranks against torch's own on one process, and how many messages they send."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fdkit.models.batch_norm import BatchNorm, each_apart
from fdkit.models.heads import mlp_head


def head() -> nn.Module:
    torch.manual_seed(0)
    module = mlp_head([3, 5, 4], hidden_bias=False, last_bias=False, hidden_norm=True, last_norm="plain")
    for part in module.modules():
        if isinstance(part, BatchNorm) and part.affine:
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.uniform_(part.bias, -1, 1)
    return module.double().train()


def views(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 + (1 + view) * torch.randn(6, 3, generator=generator).double() for view in range(count)]


def outcome(module: nn.Module, inputs: list[Tensor], outputs: list[Tensor], share: float) -> dict[str, Any]:
    weights = torch.arange(1.0, 5.0).double()
    loss = sum(((1 + number) * weights * rows.sin()).sum() for number, rows in enumerate(outputs))
    (loss / share).backward()  # type: ignore[operator]
    return {
        "outputs": [rows.detach() for rows in outputs],
        "inputs": [rows.grad for rows in inputs],
        "weights": {name: one.grad for name, one in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
    }


class Messages:
    """Counts what is sent through torch.distributed."""

    def __init__(self) -> None:
        self.count = 0
        for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast"):
            self._watch(name, getattr(dist, name))

    def _watch(self, name: str, function: Any) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return function(*args, **kwargs)

        setattr(dist, name, counted)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    messages = Messages()
    for count in (1, 2, 3):
        module = head()
        mine = [rows[3 * rank : 3 * rank + 3].clone().requires_grad_() for rows in views(count)]
        messages.count = 0
        outputs = each_apart(module, mine)
        forward = messages.count
        found = outcome(module, mine, outputs, share=1)
        results[str(count)] = found | {"forward": forward, "backward": messages.count - forward}
    results["image"] = image(rank)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def image(rank: int) -> Tensor:
    """Of maps, (B, C, H, W)."""
    maps = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(2)).double()
    return (
        BatchNorm(3)
        .double()
        .train()(maps[2 * rank : 2 * rank + 2] if dist.is_initialized() else maps)
        .detach()
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize("count", [1, 2, 3])
def test_views_on_two_ranks_are_normalised_one_at_a_time_over_all_rows(
    ranks: list[dict[str, Any]], count: int
) -> None:
    module = head()
    inputs = [rows.requires_grad_() for rows in views(count)]
    wanted = outcome(module, inputs, [module(rows) for rows in inputs], share=1)
    found = [rank[str(count)] for rank in ranks]
    for key in ("outputs", "inputs"):
        for number, rows in enumerate(wanted[key]):
            torch.testing.assert_close(torch.cat([one[key][number] for one in found]), rows)
    for name, gradient in wanted["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name] + found[1]["weights"][name], gradient, msg=name)
    for one in found:
        for name, buffer in wanted["buffers"].items():
            torch.testing.assert_close(one["buffers"][name], buffer, msg=name)


@pytest.mark.distributed
def test_a_batch_norm_sends_one_message_each_way_whatever_the_number_of_views(
    ranks: list[dict[str, Any]],
) -> None:
    norms = sum(isinstance(part, BatchNorm) for part in head().modules())
    assert norms == 2
    for rank in ranks:
        assert {(rank[str(count)]["forward"], rank[str(count)]["backward"]) for count in (1, 2, 3)} == {
            (2, 2)
        }


@pytest.mark.distributed
def test_maps_are_normalised_over_their_places_too(ranks: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(torch.cat([rank["image"] for rank in ranks]), image(0))


def test_one_process_goes_view_by_view_to_the_bit() -> None:
    module, other = head(), copy.deepcopy(head())
    assert all(
        torch.equal(a, b)
        for a, b in zip(each_apart(module, views(2)), [other(rows) for rows in views(2)], strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), other.buffers(), strict=True))
