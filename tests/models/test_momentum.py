import pytest
import torch
from torch import nn

from fdkit.models.momentum import follow, momentum_at, momentum_copy


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def test_the_copy_equals_its_source_and_takes_no_gradient() -> None:
    source = network()
    target = momentum_copy(source)
    for key, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], value, rtol=0, atol=0)
        assert target.state_dict()[key].data_ptr() != value.data_ptr()
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert all(parameter.requires_grad for parameter in source.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
def test_following_is_the_weighted_mean_written_out(momentum: float) -> None:
    source, target = network(), network().requires_grad_(False)
    expected = [
        momentum * old + (1 - momentum) * new
        for old, new in zip(target.parameters(), source.parameters(), strict=True)
    ]
    before = [parameter.clone() for parameter in source.parameters()]
    follow(target, source, momentum)
    for parameter, value in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
    for parameter, value in zip(source.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=0)


def test_equal_parameters_stay_exactly_equal() -> None:
    source = network()
    target = momentum_copy(source)
    follow(target, source, 0.99)
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(old, new)


def test_buffers_are_not_followed() -> None:
    source = network()
    target = momentum_copy(source)
    source(torch.randn(4, 3))
    follow(target, source, 0.0)
    assert torch.equal(target[1].running_mean, torch.zeros(5))
    assert not torch.equal(source[1].running_mean, torch.zeros(5))


def test_the_cosine_schedule_starts_at_the_given_momentum_and_ends_at_one() -> None:
    assert momentum_at(0.0, 0.99, "cosine") == pytest.approx(0.99, abs=1e-12)
    assert momentum_at(0.5, 0.99, "cosine") == pytest.approx(0.995, abs=1e-12)
    assert momentum_at(1.0, 0.99, "cosine") == 1.0
    rising = [momentum_at(step / 50, 0.9, "cosine") for step in range(51)]
    assert rising == sorted(rising)
    assert len(set(rising)) == 51


def test_the_constant_schedule_stays() -> None:
    assert {momentum_at(step / 5, 0.996, "constant") for step in range(6)} == {0.996}
