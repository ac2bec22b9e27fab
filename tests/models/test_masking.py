import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.models.masking import (
    Split,
    _next_block,
    check_mask,
    draw_blocks,
    draw_noise,
    num_visible,
    split_patches,
)

GRID = (4, 6)


def split_of(sampling: str, ratio: float, batch: int = 5, grid: tuple[int, int] = GRID) -> Split:
    noise = draw_noise(batch, grid, sampling=sampling, mask_ratio=ratio)  # type: ignore[arg-type]
    return split_patches(noise, num_visible(math.prod(grid), ratio))


def touching(masks: Tensor) -> float:
    """Share of the pairs of neighbouring patches that are both hidden or both visible; masks: (B, h, w)."""
    across, down = masks[:, :, 1:] == masks[:, :, :-1], masks[:, 1:] == masks[:, :-1]
    return torch.cat([across.flatten(), down.flatten()]).float().mean().item()


def test_the_patches_of_smallest_noise_stay_visible() -> None:
    noise = torch.tensor([[0.7, 0.1, 0.9, 0.4], [0.2, 0.8, 0.3, 0.6]])
    split = split_patches(noise, 1)
    assert split.visible.tolist() == [[1], [0]]
    assert split.hidden.tolist() == [[3, 0, 2], [2, 3, 1]]
    assert split.is_hidden().tolist() == [[True, False, True, True], [False, True, True, True]]


def test_restoring_puts_every_patch_back_and_the_shuffle_itself_does_not() -> None:
    split = split_of("random", 0.75)
    shuffled = torch.cat(split, dim=1)
    assert torch.equal(shuffled.gather(1, split.restoring()), torch.arange(24).expand(5, -1))
    assert not torch.equal(shuffled.gather(1, shuffled), torch.arange(24).expand(5, -1))


@pytest.mark.parametrize(
    ("grid", "ratio", "visible"),
    [((14, 14), 0.75, 49), ((14, 14), 0.9, 19), ((16, 16), 0.75, 64), ((10, 10), 0.9, 9), (GRID, 0.4, 14)],
)
def test_the_number_of_visible_patches_is_that_of_the_official_code(
    grid: tuple[int, int], ratio: float, visible: int
) -> None:
    assert num_visible(math.prod(grid), ratio) == visible  # 100 * (1 - 0.9) is just below 10, and int() cuts
    for sampling in ("random", "block"):
        split = split_of(sampling, ratio, grid=grid)
        assert split.visible.shape == (5, visible)
        assert split.hidden.shape == (5, math.prod(grid) - visible)
        assert torch.equal(torch.cat(split, dim=1).sort().values, torch.arange(math.prod(grid)).expand(5, -1))


@pytest.mark.parametrize("sampling", ["random", "block"])
def test_every_image_has_a_mask_of_its_own(sampling: str) -> None:
    masks = split_of(sampling, 0.5, batch=8, grid=(14, 14)).is_hidden()
    assert len({tuple(mask.tolist()) for mask in masks}) == 8


def test_every_patch_is_hidden_equally_often_at_random() -> None:
    share = split_of("random", 0.75, batch=4000).is_hidden().float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.04


def test_a_grid_keeps_the_first_of_every_two_by_two() -> None:
    hidden = split_of("grid", 0.75).is_hidden().view(5, *GRID)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            assert (hidden[:, row, column] == (row % 2 == 1 or column % 2 == 1)).all()


def test_blocks_hang_together_and_random_patches_do_not() -> None:
    shares = {
        name: touching(split_of(name, 0.5, batch=200, grid=(14, 14)).is_hidden().view(-1, 14, 14))
        for name in ("random", "block")
    }
    assert shares["random"] == pytest.approx(0.5, abs=0.02)
    assert shares["block"] > 0.75


class Numbers:
    """A generator of known numbers: shares of each range that is asked for."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)

    def uniform(self, low: float, high: float) -> float:
        return low + self.shares.pop(0) * (high - low)

    def integers(self, high: int) -> int:
        return int(self.shares.pop(0) * high)


def test_a_block_by_hand() -> None:
    mask: Any = np.zeros((14, 14), dtype=bool)
    # area 16 + 0.5 * (100 - 16) = 58; aspect exp(0) = 1: a square of side round(7.6) = 8, in 7 x 7 places
    block = _next_block(mask, 100, Numbers(0.5, 0.5, 0.5, 0.99))  # type: ignore[arg-type]
    assert block == (slice(3, 11), slice(6, 14))
    mask[block] = True
    # the same square again hides nothing new, the one moved by a row hides 8 more
    block = _next_block(mask, 100, Numbers(0.5, 0.5, 0.5, 0.99, 0.5, 0.5, 0.6, 0.99))  # type: ignore[arg-type]
    assert block == (slice(4, 12), slice(6, 14))
    # with 7 to hide, area 11.5 gives 3 x 3: too many where all are visible, nothing new where all are hidden
    assert _next_block(mask, 7, Numbers(*[0.5, 0.5, 0, 0] * 10)) is None  # type: ignore[arg-type]
    assert _next_block(mask, 7, Numbers(*[0.5, 0.5, 0.5, 0.9] * 10)) is None  # type: ignore[arg-type]
    tall = _next_block(np.zeros((14, 14), dtype=bool), 100, Numbers(0.0, 1.0, 0, 0))  # type: ignore[arg-type]
    assert tall == (slice(0, 7), slice(0, 2))  # area 16, height over width 1 / 0.3


def test_blocks_hide_exactly_as_many_even_where_none_fits() -> None:
    for grid, count in (((14, 14), 147), ((4, 6), 23), ((2, 2), 3), ((3, 5), 1)):
        assert (draw_blocks(6, grid, count).sum(dim=(1, 2)) == count).all()


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_masks_follow_torchs_generator_or_the_one_given(sampling: Any) -> None:
    def draw(**options: Any) -> Tensor:
        return draw_noise(3, GRID, sampling=sampling, mask_ratio=0.75, **options)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    given = [draw(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])


@pytest.mark.parametrize(
    ("grid", "sampling", "ratio", "message"),
    [
        ((2, 2), "random", 0.9, "a mask ratio of 0.9 leaves none visible of 2x2 patches"),
        ((2, 2), "random", 1e-20, "a mask ratio of 1e-20 hides none of 2x2 patches"),
        ((4, 4), "grid", 0.5, "keeps one of every 2x2 patches, a mask ratio of 0.75, not 0.5"),
        ((7, 7), "grid", 0.75, "which 7x7 patches do not divide into"),
    ],
)
def test_masks_that_cannot_be_are_refused(
    grid: tuple[int, int], sampling: Any, ratio: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_mask(grid, sampling, ratio)


def test_masks_that_can_be_are_taken() -> None:
    check_mask((2, 2), "random", 0.75)
    check_mask((14, 14), "grid", 0.75)
    check_mask((7, 7), "block", 0.99 - 0.02)
