"""Directions in the space of a network's weights, and the walk along them.

Random ones are Gaussian and filter-normalised, so that a step of one moves every filter by as much as it is long and
networks of different scale compare. Those of a training are the principal components of its path.
Source: Li et al. 2018 (arXiv 1712.09913), sections 4 and 7.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdkit.errors import DataError

Weights = Mapping[str, Tensor]
"""Parameters of a network, or changes of them, by name."""
COLUMNS = ("proj",)
"""Matrices that tokens are multiplied with from the left, so that an output is a column: open_clip's projection."""
WEIGHTS = ("weight", "in_proj_weight")
"""How layers call the matrices and kernels whose first axis is their outputs."""


def is_table(name: str, weights: Tensor) -> bool:
    """Whether a parameter of two axes or more is no layer's weight: a token, or a table of positions."""
    return weights.ndim > 1 and name.rpartition(".")[2] not in (*WEIGHTS, *COLUMNS)


def random_direction(
    parameters: Weights, *, seed: int, number: int, tables: bool = False
) -> dict[str, Tensor]:
    """A filter-normalised Gaussian direction; parameters of one axis, such as norms and biases, stay where they are.

    What is drawn hangs on the seed, the direction's number, and each parameter's name and shape alone, so networks of
    one architecture get the same draw, whatever their weights, their order or their device.
    tables: move tokens and position tables too, each row (the last axis) by as much as it is long; else they stay.
    A filter of norm zero stays. Same dtype and device as the parameters.
    """
    direction = {}
    for name, weights in parameters.items():
        if weights.ndim < 2 or (is_table(name, weights) and not tables):
            continue
        drawn = _drawn(name, weights.shape, seed=seed, number=number)
        direction[name] = filter_normalised(name, drawn.to(weights.device, weights.dtype), weights)
    return direction


def filter_normalised(name: str, direction: Tensor, weights: Tensor) -> Tensor:
    """The direction with each filter scaled to the norm of the same filter of the weights.

    A filter is what makes one output: all weights of one row of a matrix, of one kernel of a convolution, or of one
    token. Source: Li et al. 2018, section 4, d_ij <- d_ij / |d_ij| |theta_ij|.
    """
    axes = _filter_axes(name, weights)
    own, wanted = (
        torch.linalg.vector_norm(part, dim=axes, keepdim=True) for part in (direction, weights.detach())
    )
    return direction / own.clamp_min(torch.finfo(own.dtype).tiny) * wanted


def _filter_axes(name: str, weights: Tensor) -> tuple[int, ...]:
    """The axes within one filter."""
    if is_table(name, weights):
        return (weights.ndim - 1,)
    if name.rpartition(".")[2] in COLUMNS:
        return tuple(range(weights.ndim - 1))
    return tuple(range(1, weights.ndim))


def _drawn(name: str, shape: torch.Size, *, seed: int, number: int) -> Tensor:
    """Standard normal values, float32, from a generator of this parameter's own."""
    text = f"{seed} {number} {name} {tuple(shape)}"
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


class Path(NamedTuple):
    """A training's way through the space of weights, seen from where it ended."""

    directions: tuple[dict[str, Tensor], dict[str, Tensor]]
    """Two orthonormal directions, the first of the largest variance."""
    places: Tensor
    """(T, 2) float64: each stop's offset from the end, along the directions."""
    distances: Tensor
    """(T,) float64: each stop's distance from the end, also what is outside the plane."""
    explained: tuple[float, float]
    """Shares of the path's variance along the two directions."""


def principal_path(stops: Sequence[Weights], end: Weights) -> Path:
    """The plane through the end in which a path varies most: the principal components of its offsets.

    stops: the same parameters at T >= 3 points of the path; all are held at once. All axes count as they are, norms
    and biases included: nothing is normalised. The offsets are centred at their mean, as principal components are,
    and found from their (T, T) products. Signs are such that the first stop lies at positive coordinates.
    Raises DataError if the stops lie on one line.
    Source: Li et al. 2018, section 7.
    """
    names = list(end)
    gram = torch.zeros(len(stops), len(stops), dtype=torch.float64)
    for name in names:
        rows = torch.stack([_offset(stop, end, name).flatten() for stop in stops]).double()
        gram += (rows @ rows.T).cpu()
    centre = torch.eye(len(stops), dtype=torch.float64) - 1 / len(stops)
    values, vectors = torch.linalg.eigh(centre @ gram @ centre)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if len(stops) < 3 or values[1] <= 1e-10 * values[0]:
        raise DataError(
            f"the {len(stops)} checkpoints lie on one line, and a plane needs three that do not",
            "keep more of them: --train.keep-checkpoints 20 --train.save-every-steps N",
        )
    shares = vectors[:, :2] / values[:2].sqrt()  # each direction is this mixture of the offsets
    places = gram @ shares
    signs = torch.where(places[0] < 0, -1.0, 1.0).double()
    first, second = (_mixture(stops, end, column) for column in (shares * signs).T)
    explained = (values[:2] / values.sum()).tolist()
    return Path((first, second), places * signs, gram.diagonal().sqrt(), (explained[0], explained[1]))


def _offset(stop: Weights, end: Weights, name: str) -> Tensor:
    own = end[name].detach()
    return stop[name].detach().to(own.device, own.dtype) - own


def _mixture(stops: Sequence[Weights], end: Weights, shares: Tensor) -> dict[str, Tensor]:
    """The sum of the offsets, each times its share."""
    return {
        name: sum(
            (share * _offset(stop, end, name) for share, stop in zip(shares.tolist(), stops, strict=True)),
            start=torch.zeros_like(weights),
        )
        for name, weights in end.items()
    }


@torch.no_grad()
def walk(
    parameters: Weights,
    directions: Sequence[Weights],
    steps: Sequence[Sequence[float]],
    measure: Callable[[], tuple[float, float]],
) -> list[tuple[float, float]]:
    """What `measure` gives at each step, with the weights moved there; afterwards they are as before, to the bit.

    parameters: moved in place; steps: multiples of each direction. Holds a copy of the weights that move.
    """
    moving = {name for direction in directions for name in direction}
    origin = {name: parameters[name].detach().clone() for name in parameters if name in moving}
    found = []
    try:
        for step in steps:
            for name, start in origin.items():
                parameters[name].copy_(_moved(start, name, directions, step))
            found.append(measure())
    finally:
        put(parameters, origin)
    return found


def _moved(start: Tensor, name: str, directions: Sequence[Weights], step: Sequence[float]) -> Tensor:
    moved = start
    for multiple, direction in zip(step, directions, strict=True):
        if name in direction:
            moved = moved + multiple * direction[name]
    return moved


@torch.no_grad()
def put(parameters: Weights, values: Weights) -> None:
    """Write values into parameters of the same names."""
    for name, value in values.items():
        parameters[name].copy_(value)


def axis(extent: float, resolution: int) -> list[float]:
    """Equally spaced steps from -extent to extent; an odd number of them has an exact 0 in the middle."""
    half = (resolution - 1) / 2
    return [extent * ((number - half) / half) for number in range(resolution)]


def span(values: Sequence[float], resolution: int, *, margin: float = 0.25) -> list[float]:
    """Equally spaced steps over the values and 0, and a share of their range beyond on either side."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    beyond = margin * (high - low)
    low, high = low - beyond, high + beyond
    assert high > low, f"no range in {values}"
    return [low + (high - low) * number / (resolution - 1) for number in range(resolution)]
