import pytest
from torch import nn

from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._method import Duration, Method


def method(layer: nn.Module) -> Method:
    built = Method()
    built.head = nn.Sequential(nn.Linear(2, 2), layer)
    return built


@pytest.mark.parametrize(
    ("duration", "what"),
    [
        (Duration(batch_size=1, part_size=1), "train.batch_size 1: a batch norm"),
        (Duration(batch_size=8, part_size=1), "train.batch_size 8 in parts of 1: a batch norm"),
    ],
)
def test_a_batch_norm_of_a_single_image_is_refused(duration: Duration, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"{what} \(head.1\) cannot normalise a single image"):
        check_batch_norm(method(nn.BatchNorm1d(2)), duration)


def test_a_single_image_a_process_will_do_among_several_processes() -> None:
    check_batch_norm(method(nn.BatchNorm1d(2)), Duration(batch_size=2, part_size=1, world_size=2))


def test_without_batch_norms_a_single_image_will_do() -> None:
    check_batch_norm(method(nn.LayerNorm(2)), Duration(batch_size=1, part_size=1))
