"""Each measure against a loop over its definition, at the values it is known to have, and in what leaves it alone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fdkit.models.representation import alignment, channel_std, effective_rank, uniformity


def rows(count: int = 37, width: int = 5, seed: int = 1) -> Tensor:
    """Rows off the origin, of unlike lengths and unlike spread along the channels."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, width + 1, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * spread + 2


def scaled(values: np.ndarray) -> list[list[float]]:
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in values.tolist()]


def naive_channel_std(values: np.ndarray) -> float:
    unit = scaled(values)
    stds = []
    for channel in range(len(unit[0])):
        column = [row[channel] for row in unit]
        mean = sum(column) / len(column)
        stds.append(math.sqrt(sum((x - mean) ** 2 for x in column) / len(column)))
    return sum(stds) / len(stds)


def naive_rank(values: np.ndarray) -> float:
    """From the eigenvalues of the smaller Gram matrix, whose roots are the singular values."""
    gram = values @ values.T if len(values) < values.shape[1] else values.T @ values
    sigma = [math.sqrt(max(0.0, x)) for x in np.linalg.eigvalsh(gram)]
    shares = [s / sum(sigma) + 1e-7 for s in sigma]
    return math.exp(-sum(p * math.log(p) for p in shares))


def naive_alignment(first: np.ndarray, second: np.ndarray) -> float:
    pairs = zip(scaled(first), scaled(second), strict=True)
    squares = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in pairs]
    return sum(squares) / len(squares)


def naive_uniformity(values: np.ndarray) -> float:
    unit = scaled(values)
    potentials = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(unit[i], unit[j], strict=True)))
        for i in range(len(unit))
        for j in range(i)
    ]
    return math.log(sum(potentials) / len(potentials))


@pytest.mark.parametrize(("count", "width"), [(37, 5), (4, 11)])
def test_each_measure_is_its_definition(count: int, width: int) -> None:
    first, second = rows(count, width), rows(count, width, seed=2)
    a, b = first.numpy(), second.numpy()
    assert channel_std(first).item() == pytest.approx(naive_channel_std(a), rel=1e-12)
    assert effective_rank(first).item() == pytest.approx(naive_rank(a), rel=1e-9)
    assert alignment(first, second).item() == pytest.approx(naive_alignment(a, b), rel=1e-12)
    assert uniformity(first).item() == pytest.approx(naive_uniformity(a), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_are_measured_in_float32(dtype: torch.dtype) -> None:
    narrow = rows(50, 8).to(dtype)
    wide = narrow.double()
    for measure in (channel_std, effective_rank, uniformity, lambda x: alignment(x, x.roll(1, dims=0))):
        found = measure(narrow)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(measure(wide).item(), rel=1e-5)


def test_equal_rows_are_a_collapse_by_every_measure() -> None:
    equal = rows(1, 6).expand(20, 6)
    assert channel_std(equal).item() == pytest.approx(0, abs=1e-12)
    assert effective_rank(equal).item() == pytest.approx(1, abs=1e-4)
    assert alignment(equal, equal).item() == 0
    assert uniformity(equal).item() == pytest.approx(0, abs=1e-12)


def test_features_of_a_dead_network_are_a_collapse_too() -> None:
    dead = torch.zeros(9, 4)
    assert channel_std(dead).item() == 0
    assert effective_rank(dead).item() == pytest.approx(1, abs=1e-4)
    assert uniformity(dead).item() == 0


def test_rows_in_all_directions_have_the_known_values() -> None:
    generator = torch.Generator().manual_seed(0)
    width = 64
    gaussian = torch.randn(1500, width, generator=generator)
    assert channel_std(gaussian).item() * math.sqrt(width) == pytest.approx(1, abs=0.01)
    assert effective_rank(gaussian).item() == pytest.approx(width, rel=0.02)
    # The mean of exp(-4 + 4 cos) for cosines of variance 1/width.
    assert uniformity(gaussian).item() == pytest.approx(-4 + 8 / width, abs=0.02)
    assert alignment(gaussian, gaussian.flip(0)).item() == pytest.approx(2, abs=0.02)


def test_bounds_are_reached() -> None:
    axes = torch.eye(7)
    assert effective_rank(axes).item() == pytest.approx(7, rel=1e-5)
    assert channel_std(torch.cat([axes, -axes])).item() == pytest.approx(1 / math.sqrt(7))
    opposite = torch.tensor([[1.0, 0], [-1, 0]])
    assert uniformity(opposite).item() == pytest.approx(-8)
    assert alignment(opposite, -opposite).item() == 4


def test_only_rank_sees_lengths_and_none_sees_rotations_or_order() -> None:
    values = rows()
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    longer = values * torch.linspace(0.5, 3, len(values), dtype=torch.float64)[:, None]
    for measure in (channel_std, uniformity):
        assert measure(longer).item() == pytest.approx(measure(values).item())
    assert effective_rank(longer).item() != pytest.approx(effective_rank(values).item(), rel=1e-3)
    assert effective_rank(7 * values).item() == pytest.approx(effective_rank(values).item())
    for measure in (effective_rank, uniformity):
        assert measure(values @ rotation).item() == pytest.approx(measure(values).item())
    for measure in (channel_std, effective_rank, uniformity):
        assert measure(values.flip(0)).item() == pytest.approx(measure(values).item())


def test_rank_is_of_the_rows_as_they_are_not_centred() -> None:
    values = rows(200, 6) + 50
    centred = values - values.mean(dim=0)
    assert effective_rank(values).item() < 2
    assert effective_rank(centred).item() > 4


@pytest.mark.parametrize("block", [1, 5, 36, 37, 100])
def test_uniformity_does_not_hang_on_the_block(block: int) -> None:
    assert uniformity(rows(), block=block).item() == pytest.approx(uniformity(rows()).item(), rel=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(37, 5\) against \(36, 5\)"):
        alignment(rows(37), rows(36))
    with pytest.raises(ValueError, match="pairs of rows; there is 1"):
        uniformity(rows(1))
