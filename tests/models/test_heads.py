import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.batch_norm import BatchNorm, synchronise_batch_norm
from fdkit.models.heads import mlp_head


def normalised(rows: Tensor) -> Tensor:
    """Batch normalisation of rows, column by column."""
    columns = []
    for column in rows.T:
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append((column - mean) / (variance + 1e-5).sqrt())
    return torch.stack(columns, dim=1)


def test_batch_norms_of_their_own_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNormAct2d cannot be synchronised"):
        synchronise_batch_norm(nn.Sequential(BatchNormAct2d(3)))


def test_a_head_is_its_formula() -> None:
    head = mlp_head(3, 2, hidden_dim=5, num_layers=3)
    rows = torch.randn(7, 3)
    first, second, last = (layer for layer in head if isinstance(layer, nn.Linear))
    hidden = normalised(rows @ first.weight.T).relu()
    hidden = normalised(hidden @ second.weight.T).relu()
    torch.testing.assert_close(head(rows), normalised(hidden @ last.weight.T), atol=1e-4, rtol=1e-4)


def test_the_names_and_shapes_of_a_head() -> None:
    head = mlp_head(3, 2, hidden_dim=5, num_layers=2)
    assert {name: tuple(value.shape) for name, value in head.named_parameters()} == {
        "0.weight": (5, 3),
        "1.weight": (5,),
        "1.bias": (5,),
        "3.weight": (2, 5),
    }


def test_without_last_norm_the_output_is_linear() -> None:
    head = mlp_head(3, 2, hidden_dim=5, num_layers=2, last_norm=False)
    assert isinstance(head[-1], nn.Linear)
    assert head[-1].bias is None


def test_the_output_of_a_normalised_head_has_mean_0_and_variance_1() -> None:
    head = mlp_head(3, 4, hidden_dim=5, num_layers=2)
    with torch.no_grad():
        head[3].weight.mul_(100)
    output = head(torch.randn(64, 3))
    torch.testing.assert_close(output.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.var(0, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is 0; a head has at least one layer"):
        mlp_head(3, 2, hidden_dim=5, num_layers=0)


def test_alone_a_synchronised_batch_norm_is_the_ordinary_one() -> None:
    ordinary = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    synchronised = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    synchronised.load_state_dict(ordinary.state_dict())
    synchronised = synchronise_batch_norm(synchronised)
    assert type(synchronised[1]) is BatchNorm
    images = torch.randn(2, 3, 3, 5)
    assert torch.equal(ordinary(images), synchronised(images))
    for key, value in ordinary.state_dict().items():
        assert torch.equal(synchronised.state_dict()[key], value)
    assert torch.equal(ordinary.eval()(images), synchronised.eval()(images))
