"""Clipping, against what a loop over the gradients gives, and what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fdkit.training.gradients import clip_each, first_matrix


def gradients_of(number: int) -> list[Tensor]:
    """Gradients of unequal shapes whose norms lie on both sides of 1."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(i % 3 + 1, 5, generator=generator) * 4 / (i + 1) for i in range(number)]


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [False, True], ids=["own norms", "norms given"])
def test_clipping_each_is_a_loop_over_the_gradients(given: bool) -> None:
    gradients = gradients_of(7)
    expected = [one * min(1.0, 1.5 / (float(one.norm()) + 1e-6)) for one in gradients]
    is_long = [float(one.norm()) > 1.5 for one in gradients]
    assert any(is_long)
    assert not all(is_long)
    kept = [one.clone() for one in gradients]
    clip_each(gradients, 1.5, [one.norm() for one in gradients] if given else None)
    for ours, theirs, before, long in zip(gradients, expected, kept, is_long, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours, before) != long


def test_norms_that_are_given_count_in_place_of_the_gradients_own() -> None:
    (gradient,) = gradients_of(1)
    before = gradient.clone()
    clip_each([gradient], 2.0, [torch.tensor(8.0)])
    torch.testing.assert_close(gradient, before / 4)


def test_a_gradient_that_is_not_finite_stays_apart_from_the_others() -> None:
    gradients = gradients_of(3)
    gradients[1][0, 0] = float("nan")
    others = [gradients[0].clone(), gradients[2].clone()]
    clip_each(gradients, 1.5)
    clip_each(others, 1.5)
    assert gradients[1].isnan().all()
    assert torch.equal(gradients[0], others[0])
    assert torch.equal(gradients[2], others[1])


def test_more_gradients_take_no_more_operations() -> None:
    counts = []
    for number in (3, 60):
        with Operations() as operations:
            clip_each(gradients_of(number), 1.5)
        with Operations() as making:
            gradients_of(number)
        counts.append(operations.count - making.count)
    assert counts[0] == counts[1] < 10


def test_the_first_matrix_is_the_first_that_trains() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    assert first_matrix(network) is network[0].weight
    network[0].requires_grad_(False)
    assert first_matrix(network) is network[2].weight
    assert first_matrix(network.requires_grad_(False)) is None
