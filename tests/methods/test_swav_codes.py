"""SwAV's codes and its loss, as functions of scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from swav_oracles import codes_by_loops, loss_by_loops
from torch import Tensor

from fdkit.methods.swav import SwAVConfig, balanced_codes, prototype_usage, swapped_loss


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_codes_match_naive_loops(num_iterations: int) -> None:
    scores = F.normalize(rows(7, 3), dim=1) @ F.normalize(rows(5, 3, seed=1), dim=1).T
    codes = balanced_codes(scores, epsilon=0.05, num_iterations=num_iterations)
    torch.testing.assert_close(codes, codes_by_loops(scores, 0.05, num_iterations), rtol=1e-10, atol=1e-13)
    single = balanced_codes(scores.float(), epsilon=0.05, num_iterations=num_iterations)
    torch.testing.assert_close(single, codes.float(), rtol=1e-4, atol=1e-6)
    unbalanced = (scores / 0.05).softmax(dim=1)
    assert (codes - unbalanced).abs().max() > 0.05


def test_codes_of_a_sample_sum_to_one_and_prototypes_share_equally() -> None:
    scores = 0.3 * rows(40, 5)
    codes = balanced_codes(scores, epsilon=0.05, num_iterations=100)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(
        codes.sum(dim=0), torch.full((5,), 40 / 5, dtype=torch.float64), rtol=1e-3, atol=0
    )
    few = balanced_codes(scores, epsilon=0.05, num_iterations=3)
    torch.testing.assert_close(few.sum(dim=1), torch.ones(40, dtype=torch.float64))  # samples come last
    assert (few.sum(dim=0) - 8).abs().max() < 4


def test_uniform_scores_have_uniform_codes() -> None:
    codes = balanced_codes(torch.full((6, 5), 0.3), epsilon=0.05, num_iterations=3)
    torch.testing.assert_close(codes, torch.full((6, 5), 0.2))


def test_a_prototype_that_all_prefer_does_not_get_all() -> None:
    scores = 0.1 * rows(8, 4)
    scores[:, 0] += 0.8
    assert (scores.argmax(dim=1) == 0).all()
    codes = balanced_codes(scores, epsilon=0.05, num_iterations=3)
    assert codes.sum(dim=0)[0] < 3
    higher = scores + torch.tensor([0.1, -0.2, 0.0, 0.3])  # what all samples share has no say
    torch.testing.assert_close(balanced_codes(higher, epsilon=0.05, num_iterations=3), codes)


def test_codes_stay_finite_for_the_sharpest_epsilon_and_the_farthest_scores() -> None:
    scores = torch.ones(64, 300)
    scores[:, 7] = -1.0
    codes = balanced_codes(scores, epsilon=0.03, num_iterations=3)
    assert codes.isfinite().all()
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.03"):
        SwAVConfig(epsilon=0.02)


def test_codes_have_no_gradient() -> None:
    assert not balanced_codes(rows(4, 5).requires_grad_(), epsilon=1.0, num_iterations=3).requires_grad


# --- the loss


@pytest.mark.parametrize("num_views", [2, 5])
def test_the_loss_matches_naive_loops(num_views: int) -> None:
    scores, codes = 0.3 * rows(num_views, 4, 6), rows(2, 4, 6, seed=1).softmax(dim=-1)
    loss = swapped_loss(scores, codes, temperature=0.1)
    assert loss.item() == pytest.approx(loss_by_loops(scores, codes, 0.1), rel=1e-12)
    if num_views == 5:
        small_ones_turned = scores[[0, 1, 4, 2, 3]]
        torch.testing.assert_close(swapped_loss(small_ones_turned, codes, temperature=0.1), loss)


def test_a_view_does_not_predict_its_own_code() -> None:
    scores = rows(2, 4, 6).requires_grad_()
    codes = torch.zeros(2, 4, 6, dtype=torch.float64)
    codes[0] = rows(4, 6, seed=1).softmax(dim=-1)
    swapped_loss(scores, codes, temperature=0.1).backward()
    assert scores.grad[0].abs().max() == 0
    assert scores.grad[1].abs().max() > 0


def test_prototype_usage_tells_one_prototype_from_all() -> None:
    assert prototype_usage(torch.zeros(2, 4, 5)).item() == pytest.approx(1)
    same = torch.zeros(2, 4, 5)
    same[..., 3] = 100
    assert prototype_usage(same).item() == pytest.approx(1 / 5)
    assert prototype_usage(100 * torch.eye(5)[None]).item() == pytest.approx(1)


def test_the_loss_starts_at_the_logarithm_of_the_number_of_prototypes() -> None:
    scores = torch.zeros(3, 4, 3000)
    codes = balanced_codes(scores[0], epsilon=0.05, num_iterations=3).expand(2, 4, 3000)
    assert swapped_loss(scores, codes, temperature=0.1).item() == pytest.approx(
        math.log(3000), abs=1e-4
    )  # 8.006
