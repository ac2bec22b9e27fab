"""Batch norms that normalise a batch in groups, held against torch's own on each group alone."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.split_batch_norm import SplitBatchNorm, deal, split_batch_norm, undo_deal


def plain(*shape: int) -> tuple[nn.Module, Tensor]:
    """A batch norm whose scale, offset and statistics are not those it starts with, and rows for it."""
    generator = torch.Generator().manual_seed(0)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1]).double()
    for values in (norm.weight.data, norm.bias.data, norm.running_mean):
        values.copy_(torch.randn(shape[1], generator=generator))
    return norm, 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def split(norm: nn.Module, num_groups: int) -> nn.Module:
    norm = copy.deepcopy(norm)
    assert split_batch_norm(norm, num_groups)
    return norm


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3, 2)])
def test_each_group_is_normalised_alone(shape: tuple[int, ...]) -> None:
    norm, rows = plain(*shape)
    mine, rows_of_mine = split(norm, 3), rows.clone().requires_grad_()
    got = undo_deal(mine(deal(rows_of_mine, 3)), 3)
    groups = [copy.deepcopy(norm) for _ in range(3)]
    rows.requires_grad_()
    expected = torch.cat([one(part) for one, part in zip(groups, rows.chunk(3), strict=True)])
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(rows)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(rows_of_mine.grad, rows.grad)
    torch.testing.assert_close(mine.weight.grad, sum(one.weight.grad for one in groups))
    torch.testing.assert_close(mine.bias.grad, sum(one.bias.grad for one in groups))
    assert not torch.allclose(got, norm(rows))  # which the whole batch would give


def test_running_statistics_are_those_of_the_first_group() -> None:
    norm, rows = plain(6, 4, 3, 2)
    mine, first = split(norm, 2), copy.deepcopy(norm)
    mine(deal(rows, 2))
    first(rows[:3])
    assert mine.state_dict().keys() == norm.state_dict().keys()
    for key, value in first.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value, msg=key)


def test_one_group_and_evaluation_are_the_plain_batch_norm() -> None:
    norm, rows = plain(6, 5)
    torch.testing.assert_close(split(norm, 1)(rows), copy.deepcopy(norm)(rows))
    torch.testing.assert_close(split(norm, 3).eval()(rows), norm.eval()(rows))


def test_dealing_puts_groups_in_turn_and_is_undone() -> None:
    rows = torch.arange(6)
    assert deal(rows, 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert deal(rows, 3).tolist() == [0, 2, 4, 1, 3, 5]
    for groups in (1, 2, 3, 6):
        assert torch.equal(undo_deal(deal(rows, groups), groups), rows)


def test_a_network_without_batch_norm_has_none_to_split() -> None:
    assert not split_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 4)


def test_every_batch_norm_of_a_network_is_split_and_copied() -> None:
    network = timm.create_model("resnet10t", num_classes=0)
    assert split_batch_norm(network, 4)
    norms = [part for part in copy.deepcopy(network).modules() if isinstance(part, nn.BatchNorm2d)]
    assert not norms
    split_ones = [part for part in copy.deepcopy(network).modules() if isinstance(part, SplitBatchNorm)]
    assert len(split_ones) > 8
    assert {part.num_groups for part in split_ones} == {4}


def test_a_batch_norm_fused_with_its_activation_is_refused() -> None:
    network = timm.create_model("mobilenetv3_small_050", num_classes=0)
    with pytest.raises(ConfigError, match="BatchNormAct2d cannot normalise a batch in groups"):
        split_batch_norm(network, 2)
