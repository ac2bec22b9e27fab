"""Relative position bias tables made for one window, for another window.

A table has one row for each offset between two patches of its window, (2h - 1)(2w - 1) in all, rows first, and one
column a head. BEiT's tables end with three more rows, for pairs with the class token; those stay as they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.teachers.official._layout import Grid

NUM_CLASS_ROWS = 3
"""Rows of a BEiT table for the class token: to patches, from patches, to itself."""


def window_of(table: Tensor, num_class_rows: int = 0) -> int:
    """Side of the square window a bias table was made for; WeightsError if its rows are those of no square."""
    num_offsets = table.shape[0] - num_class_rows
    side = math.isqrt(max(num_offsets, 0))
    if side % 2 == 0 or side * side != num_offsets:
        raise WeightsError(
            f"a relative position bias table of {table.shape[0]} rows is that of no square window"
        )
    return (side + 1) // 2


def bicubic_bias(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Swin's way: the map of offsets (2h - 1, 2w - 1) of every head, resized bicubically.

    table: (rows, heads) for the window `old`; the result is for the window `new`.
    Source: Swin Transformer, utils.py, load_pretrained; EsViT does the same.
    """
    maps, class_rows = _offset_maps(table, old)
    resized = F.interpolate(maps.unsqueeze(0).float(), size=_num_offsets(new), mode="bicubic").squeeze(0)
    return torch.cat([resized.flatten(1).T.to(table.dtype), class_rows])


def geometric_bias(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """BEiT's way, and the Feature-Distillation students': the old offsets are spread over the new window in steps that
    grow geometrically from 1, so that near offsets keep their values, and a bicubic spline through them is read
    at the new offsets; beyond the outermost old one its value holds.

    table: (rows, heads) for the window `old`, at least 3x3; the result is for the window `new`.
    Raises WeightsError for a smaller old window: a cubic needs more offsets than it has.
    Source: Bao et al. 2022, unilm/beit/run_class_finetuning.py; Wei et al. 2022, utils.py, remap_pretrained_keys_vit.
    """
    if min(old) < 3:
        raise WeightsError(
            f"a relative position bias table for a window of {old[0]}x{old[1]} cannot be resampled"
        )
    maps, class_rows = _offset_maps(table, old)
    by_row, by_column = (_spline_weights(before, after) for before, after in zip(old, new, strict=True))
    resized = by_row @ maps.double() @ by_column.T
    return torch.cat([resized.flatten(1).T.to(table.dtype), class_rows])


def _num_offsets(window: Grid) -> tuple[int, int]:
    return 2 * window[0] - 1, 2 * window[1] - 1


def _offset_maps(table: Tensor, window: Grid) -> tuple[Tensor, Tensor]:
    """(heads, 2h - 1, 2w - 1) of a table, and its rows for the class token."""
    height, width = _num_offsets(window)
    offsets, class_rows = table[: height * width], table[height * width :]
    assert len(class_rows) in (0, NUM_CLASS_ROWS), f"{len(table)} rows are not those of a window of {window}"
    return offsets.T.unflatten(1, (height, width)), class_rows


def _spline_weights(old: int, new: int) -> Tensor:
    """(2 new - 1, 2 old - 1): what each old offset along one axis adds to each new one."""
    num_steps, reach = old - 1, new - 1
    steps = _growth(num_steps, reach) ** torch.arange(num_steps, dtype=torch.float64)
    positive = steps.cumsum(0)
    knots = torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])
    points = torch.arange(-reach, reach + 1, dtype=torch.float64).clamp(knots[0], knots[-1])
    return _not_a_knot(knots, points)


def _growth(num_steps: int, reach: int) -> float:
    """The ratio, between 1.01 and 1.5, at which so many growing steps reach so far; found by halving, as BEiT does."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        middle = (low + high) / 2
        if (1 - middle**num_steps) / (1 - middle) > reach:
            high = middle
        else:
            low = middle
    return middle


def _not_a_knot(knots: Tensor, points: Tensor) -> Tensor:
    """(P, K): weights of the values at K >= 4 knots in their interpolating cubic spline at P points between them.

    The spline's third derivative is continuous at the second knot from either end (the not-a-knot condition), as in
    FITPACK, whose interpolation the official code calls.
    """
    count, gaps = len(knots), knots.diff()
    system = torch.zeros(count, count, dtype=knots.dtype)  # of the second derivatives at the knots
    right = torch.zeros_like(system)
    for i in range(1, count - 1):
        before, after = gaps[i - 1], gaps[i]
        system[i, i - 1 : i + 2] = torch.stack([before, 2 * (before + after), after]) / 6
        right[i, i - 1 : i + 2] = torch.stack([1 / before, -1 / before - 1 / after, 1 / after])
    for row, first in ((0, 0), (count - 1, count - 3)):
        before, after = gaps[first], gaps[first + 1]
        system[row, first : first + 3] = torch.stack([1 / before, -1 / before - 1 / after, 1 / after])
    curvature = torch.linalg.solve(system, right)
    left = (torch.searchsorted(knots, points, right=True) - 1).clamp(0, count - 2)
    gap = gaps[left].unsqueeze(1)
    b = (points - knots[left]).unsqueeze(1) / gap
    a = 1 - b
    values = torch.eye(count, dtype=knots.dtype)
    bend = (a**3 - a) * curvature[left] + (b**3 - b) * curvature[left + 1]
    return a * values[left] + b * values[left + 1] + bend * gap**2 / 6
