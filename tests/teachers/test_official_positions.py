"""Position tables for other grids, each against its official code's arithmetic written as a matrix over the grid."""

import math

import pytest
import torch
from torch import Tensor

from fdkit.teachers.official._layout import Resample
from fdkit.teachers.official.positions import by_scale, by_size, by_size_antialiased, row_first

ALL = (by_size, by_scale, by_size_antialiased, row_first)


def cubic(distance: float, sharpness: float) -> float:
    """Keys' kernel; torch has a = -0.75, and -0.5 when antialiasing."""
    x = abs(distance)
    if x <= 1:
        return ((sharpness + 2) * x - (sharpness + 3)) * x * x + 1
    return ((sharpness * x - 5 * sharpness) * x + 8 * sharpness) * x - 4 * sharpness if x < 2 else 0.0


def interpolation(old: int, new: int, scale: float) -> Tensor:
    """(new, old) weights of plain bicubic sampling; `scale` is old pixels for a new one."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for target in range(new):
        place = (target + 0.5) * scale - 0.5
        for source in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[target, min(max(source, 0), old - 1)] += cubic(place - source, -0.75)
    return weights


def antialiased(old: int, new: int) -> Tensor:
    """(new, old) weights of the same with the kernel as wide as a new pixel, cut at the edge and normalised."""
    scale = old / new
    width = max(scale, 1.0)
    weights = torch.zeros(new, old, dtype=torch.float64)
    for target in range(new):
        centre = (target + 0.5) * scale
        for source in range(old):
            weights[target, source] = cubic((source + 0.5 - centre) / width, -0.5)
    return weights / weights.sum(dim=1, keepdim=True)


def separable(table: Tensor, old: tuple[int, int], rows: Tensor, columns: Tensor) -> Tensor:
    grid = table.double().reshape(*old, -1)
    return torch.einsum("ti,uj,ijd->tud", rows, columns, grid).reshape(1, -1, grid.shape[-1]).float()


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (6, 6)), ((5, 5), (3, 3)), ((4, 4), (7, 3)), ((14, 14), (16, 24))]
)
def test_tables_are_resampled_by_the_official_weights(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(1, old[0] * old[1], 5)
    sizes = list(zip(old, new, strict=True))
    plain = separable(table, old, *(interpolation(a, b, a / b) for a, b in sizes))
    offset = separable(table, old, *(interpolation(a, b, a / (b + 0.1)) for a, b in sizes))
    smooth = separable(table, old, *(antialiased(a, b) for a, b in sizes))
    torch.testing.assert_close(by_size(table, old, new), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_scale(table, old, new), offset, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_size_antialiased(table, old, new), smooth, rtol=0, atol=1e-5)
    for one, other in ((plain, offset), (plain, smooth), (offset, smooth)):
        assert (one - other).abs().max() > 1e-3


def test_fixed_positions_are_made_anew_with_the_row_first() -> None:
    table = row_first(torch.zeros(1, 16, 8), (4, 4), (2, 3))
    for row in range(2):
        for column in range(3):
            angles = [place / 10000 ** (i / 2) for place in (row, column) for i in range(2)]
            sines, cosines = [math.sin(angle) for angle in angles], [math.cos(angle) for angle in angles]
            expected = [*sines[:2], *cosines[:2], *sines[2:], *cosines[2:]]
            assert table[0, 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("resample", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_its_own_grid_a_table_stays_to_the_bit(resample: Resample, dtype: torch.dtype) -> None:
    table = torch.randn(1, 35, 8).to(dtype)
    assert torch.equal(resample(table, (5, 7), (5, 7)), table)
    assert resample(table, (5, 7), (3, 4)).dtype == dtype
