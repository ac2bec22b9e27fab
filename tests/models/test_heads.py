import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.batch_norm import BatchNorm, synchronise_batch_norm
from fdkit.models.heads import DINOHead, Prototypes, _Cosines, mlp_head
from fdkit.models.momentum import momentum_copy


def normalised(rows: Tensor) -> Tensor:
    """Batch normalisation of rows, column by column."""
    columns = []
    for column in rows.T:
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append((column - mean) / (variance + 1e-5).sqrt())
    return torch.stack(columns, dim=1)


def filled(head: nn.Module) -> nn.Module:
    """The head in double precision, with every parameter away from its start."""
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head.double()


def linear_layers(head: nn.Module) -> list[nn.Linear]:
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)]


# --- batch norms


def test_batch_norms_of_their_own_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNormAct2d cannot be synchronised"):
        synchronise_batch_norm(nn.Sequential(BatchNormAct2d(3)))


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


# --- mlp_head


def test_a_head_is_its_formula() -> None:
    head = filled(mlp_head([3, 5, 4, 2], last_norm="plain"))
    for norm in (head[1], head[4]):
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    rows = torch.randn(7, 3, dtype=torch.float64)
    first, second, last = linear_layers(head)
    hidden = normalised(rows @ first.weight.T).relu()
    hidden = normalised(hidden @ second.weight.T).relu()
    torch.testing.assert_close(head(rows), normalised(hidden @ last.weight.T))


def test_biases_scales_and_offsets_count() -> None:
    head = filled(mlp_head([3, 5, 2], hidden_bias=True, last_bias=True, last_norm="affine"))
    rows = torch.randn(7, 3, dtype=torch.float64)
    first, last = linear_layers(head)
    hidden = normalised(rows @ first.weight.T + first.bias) * head[1].weight + head[1].bias
    output = normalised(hidden.relu() @ last.weight.T + last.bias) * head[4].weight + head[4].bias
    torch.testing.assert_close(head(rows), output)


def test_a_head_without_norms_is_linear_layers_and_the_activation() -> None:
    head = filled(mlp_head([3, 5, 2], hidden_bias=True, hidden_norm=False, activation="gelu"))
    rows = torch.randn(7, 3, dtype=torch.float64)
    first, last = linear_layers(head)
    hidden = rows @ first.weight.T + first.bias
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(head(rows), gelu @ last.weight.T)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"0.weight": (5, 3), "1.weight": (5,), "1.bias": (5,), "3.weight": (2, 5)}),
        (
            {"hidden_bias": True, "hidden_norm": False},
            {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5)},
        ),
        (
            {"last_bias": True, "last_norm": "plain"},
            {"0.weight": (5, 3), "1.weight": (5,), "1.bias": (5,), "3.weight": (2, 5), "3.bias": (2,)},
        ),
    ],
)
def test_the_names_and_shapes_of_a_head(options: dict, shapes: dict) -> None:
    head = mlp_head([3, 5, 2], **options)
    assert {name: tuple(value.shape) for name, value in head.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("kind", "trained"),
    [("none", set()), ("plain", set()), ("scale", {"4.weight"}), ("affine", {"4.weight", "4.bias"})],
)
def test_the_last_norm_trains_what_its_name_says(kind: str, trained: set[str]) -> None:
    head = mlp_head([3, 5, 2], last_norm=kind)  # type: ignore[arg-type]
    assert {
        name for name, p in head.named_parameters() if name.startswith("4.") and p.requires_grad
    } == trained
    assert isinstance(head[-1], nn.Linear) == (kind == "none")


def test_the_output_of_a_normalised_head_has_mean_0_and_variance_1() -> None:
    head = mlp_head([3, 5, 4], last_norm="plain")
    with torch.no_grad():
        head[3].weight.mul_(100)
    output = head(torch.randn(64, 3))
    torch.testing.assert_close(output.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.var(0, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)


def test_one_layer_is_a_linear_layer() -> None:
    assert [type(layer) for layer in mlp_head([3, 2])] == [nn.Linear]


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"widths \(3,\): a head has at least an input and an output"):
        mlp_head([3])


# --- prototypes


def test_scores_are_products_with_prototypes_of_length_1() -> None:
    prototypes = Prototypes(4, 6).double()
    with torch.no_grad():
        prototypes.weight.mul_(7)
    rows = torch.randn(3, 4, dtype=torch.float64)
    scores = prototypes(rows)
    for i, row in enumerate(rows):
        for k, prototype in enumerate(prototypes.weight.detach()):
            length = math.sqrt(sum(float(value) ** 2 for value in prototype))
            assert scores[i, k].item() == pytest.approx(float(row @ prototype) / length)


def test_a_gradient_turns_prototypes_and_never_stretches_them() -> None:
    prototypes = Prototypes(4, 6)
    prototypes(torch.randn(3, 4)).square().sum().backward()
    along = (prototypes.weight.grad * prototypes.weight).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(6), atol=1e-5, rtol=0)
    assert prototypes.weight.grad.norm() > 0.1


def test_a_learned_gain_is_that_of_weight_normalisation() -> None:
    prototypes = Prototypes(4, 6, learn_gain=True)
    with torch.no_grad():
        prototypes.gain.uniform_(0.5, 2)
    official = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6, bias=False))
    with torch.no_grad():
        official.parametrizations.weight.original0.copy_(prototypes.gain)
        official.parametrizations.weight.original1.copy_(prototypes.weight)
    rows = torch.randn(3, 4)
    scores, expected = prototypes(rows), official(rows)
    torch.testing.assert_close(scores, expected)
    for output in (scores, expected):
        (output * torch.arange(6)).sum().backward()
    torch.testing.assert_close(prototypes.gain.grad, official.parametrizations.weight.original0.grad)
    torch.testing.assert_close(prototypes.weight.grad, official.parametrizations.weight.original1.grad)


def test_a_fixed_gain_is_1_and_does_not_train() -> None:
    prototypes = Prototypes(4, 6)
    assert not prototypes.gain.requires_grad
    assert torch.equal(prototypes.gain, torch.ones(6, 1))
    assert prototypes.state_dict().keys() == {"weight", "gain"}


# --- DINO's head


def test_dinos_head_is_its_formula() -> None:
    head = DINOHead(3, 8, hidden_dim=5, bottleneck_dim=4).double()
    rows = torch.randn(7, 3, dtype=torch.float64)
    first, second, last = linear_layers(head.mlp)
    hidden = nn.functional.gelu(rows @ first.weight.T + first.bias)
    hidden = nn.functional.gelu(hidden @ second.weight.T + second.bias) @ last.weight.T + last.bias
    unit = hidden / hidden.norm(dim=1, keepdim=True)
    weight = head.prototypes.weight
    scores = unit @ (weight / weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(rows), scores)
    assert head(1000 * rows).abs().max() <= 1


def test_dinos_head_starts_as_published() -> None:
    torch.manual_seed(0)
    head = DINOHead(64, 16, hidden_dim=256, bottleneck_dim=32)
    for layer in linear_layers(head.mlp):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias.abs().max().item() == 0
    assert [tuple(layer.weight.shape) for layer in linear_layers(head.mlp)] == [
        (256, 64),
        (256, 256),
        (32, 256),
    ]
    assert head.prototypes.weight.abs().max().item() <= 1 / math.sqrt(32)  # a linear layer's own start
    assert not any(isinstance(part, BatchNorm) for part in head.modules())


def test_dinos_head_takes_batch_norms_and_other_depths() -> None:
    kinds = [type(layer).__name__ for layer in DINOHead(3, 8, hidden_dim=5, num_layers=2, norm=True).mlp]
    assert kinds == ["Linear", "BatchNorm", "GELU", "Linear"]
    assert [type(layer).__name__ for layer in DINOHead(3, 8, num_layers=1).mlp] == ["Linear"]


def test_cosines_and_their_gradients_are_those_of_weight_normalisation() -> None:
    prototypes = Prototypes(4, 6).double()
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Cosines.apply, (rows, prototypes.weight))
    expected = F.linear(rows, torch._weight_norm(prototypes.weight, prototypes.gain, 0))
    torch.testing.assert_close(prototypes(rows), expected)


def test_a_frozen_copy_of_a_learned_gain_still_counts() -> None:
    prototypes = Prototypes(4, 6, learn_gain=True).double()
    with torch.no_grad():
        prototypes.gain.uniform_(0.5, 2)
    rows = torch.randn(5, 4, dtype=torch.float64)
    expected = prototypes(rows)
    torch.testing.assert_close(momentum_copy(prototypes)(rows), expected)
    assert not torch.allclose(expected, F.linear(rows, F.normalize(prototypes.weight, dim=1)))
