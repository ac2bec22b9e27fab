"""Multinomial logistic regression to its optimum: one convex objective, L-BFGS, float64.

The objective is scikit-learn's, C * (sum of cross-entropies) + |weight|^2 / 2 with free biases, on features that are
standardised first. It is divided by C * N here, so that the tolerance on its gradient means the same at every C
and N. Features are read in blocks of rows and never copied whole: they may be a file, and float64 costs no memory.
Source: Liu and Nocedal 1989 for L-BFGS; the solver is scipy's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor

from fdkit.errors import NumericsError

# Smallest variance a channel is divided by: a constant channel stays near zero.
VARIANCE_FLOOR = 1e-6
# Numbers in a block of features or scores: on a CPU they stay in the cache, on a GPU (0.3 GB) they fill it.
BLOCK_CPU = 1 << 18
BLOCK_GPU = 1 << 25
# Steps L-BFGS remembers.
MEMORY = 20


class Fit(NamedTuple):
    """A classifier at (or near) the optimum, on features as they were extracted, and how near."""

    weight: Tensor
    """(C, D) float64; standardisation is folded in."""
    bias: Tensor
    """(C,) float64; -inf for a class without training images."""
    objective: float
    """C * (sum of cross-entropies in nats) + |weight of standardised features|^2 / 2."""
    gradient: float
    """Largest component, without sign, of the gradient of objective / (C * N)."""
    iterations: int
    """Steps of L-BFGS."""
    converged: bool
    """Whether gradient is at most the tolerance asked for."""

    def scores(self, values: Tensor) -> Tensor:
        """Logits of features (N, D), (N, C) float64."""
        rows = _rows_of_a_block(values, len(self.bias))
        return torch.cat([block.double() @ self.weight.T for block in values.split(rows)]) + self.bias


def fit_path(
    values: Tensor,
    labels: Tensor,
    num_classes: int,
    cs: Sequence[float],
    *,
    standardize: bool = True,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> list[Fit]:
    """The optimum for every inverse regularisation C, in the order asked.

    values: (N, D) float32; labels: (N,) int64 in [0, num_classes), two classes or more among them. Each C starts where
    the next smaller one ended: where that is decides how long it takes, and not what is found.
    Raises NumericsError if the objective is not finite.
    """
    problem = _Problem(values, labels, standardize=standardize)
    found: dict[float, Fit] = {}
    start = np.zeros(problem.num_parameters)
    for c in sorted(set(cs)):
        result = minimize(
            problem.objective,
            start,
            args=(c,),
            jac=True,
            method="L-BFGS-B",
            options={
                "gtol": tolerance,
                "ftol": 0.0,  # stops by the gradient, or when no step makes the objective smaller
                "maxiter": max_iterations,
                "maxfun": 10 * max_iterations,
                "maxcor": MEMORY,
            },
        )
        if not np.isfinite(result.fun):
            raise NumericsError(
                f"logistic regression with C {c:g} has an objective of {result.fun}",
                "the features may be huge or damaged: `fdkit doctor MODEL` looks at them",
            )
        start = result.x
        weight, bias = problem.classifier(result.x, num_classes)
        gradient = float(np.abs(result.jac).max())
        objective = float(result.fun) * c * len(labels)
        found[c] = Fit(weight, bias, objective, gradient, int(result.nit), gradient <= tolerance)
    return [found[c] for c in cs]


class _Problem:
    """Features, labels and the objective as scipy asks for it: a flat float64 vector in, value and gradient out.

    The vector is (K, D + 1), K the classes that have images, the last column their biases.
    """

    def __init__(self, values: Tensor, labels: Tensor, *, standardize: bool) -> None:
        self.values = values
        self.present, self.targets = labels.unique(return_inverse=True)
        width = values.shape[1]
        self.shape = (len(self.present), width + 1)
        self.num_parameters = len(self.present) * (width + 1)
        self.rows = _rows_of_a_block(values, len(self.present))
        self.mean, self.scale = _standardizer(values, self.rows) if standardize else _unchanged(values)

    def objective(self, parameters: np.ndarray, c: float) -> tuple[float, np.ndarray]:
        """(mean cross-entropy + |weight|^2 / (2 C N), its gradient)."""
        weight, bias = self._split(parameters)
        folded, offset = self._fold(weight, bias)
        loss = weight.new_zeros(())
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for values, targets in zip(self.values.split(self.rows), self.targets.split(self.rows), strict=True):
            inputs = values.double()  # (B, D)
            scores = torch.addmm(offset, inputs, folded.T)  # (B, K)
            every = torch.arange(len(targets), device=targets.device)
            log_likelihood = scores.log_softmax(dim=1)
            loss -= log_likelihood[every, targets].sum()
            error = log_likelihood.exp_()
            error[every, targets] -= 1.0
            by_weight.addmm_(error.T, inputs)
            by_bias += error.sum(dim=0)
        decay, count = 1 / c, len(self.values)
        by_weight = (by_weight - by_bias[:, None] * self.mean) * self.scale + decay * weight
        value = (float(loss) + 0.5 * decay * float(weight.square().sum())) / count
        gradient = torch.cat([by_weight, by_bias[:, None]], dim=1).div_(count)
        return value, gradient.flatten().cpu().numpy()

    def classifier(self, parameters: np.ndarray, num_classes: int) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) on features as they are, of all classes."""
        folded, offset = self._fold(*self._split(parameters))
        weight = folded.new_zeros(num_classes, folded.shape[1])
        bias = offset.new_full((num_classes,), -torch.inf)
        weight[self.present], bias[self.present] = folded, offset
        return weight, bias

    def _split(self, parameters: np.ndarray) -> tuple[Tensor, Tensor]:
        matrix = torch.from_numpy(parameters).to(self.values.device).view(self.shape)
        return matrix[:, :-1], matrix[:, -1]

    def _fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same scores from features that are not standardised."""
        folded = weight * self.scale
        return folded, bias - folded @ self.mean


def _standardizer(values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each channel, both (D,) float64."""
    blocks = values.split(rows)
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(values)
    squares = [(block.double() - mean).square().sum(dim=0) for block in blocks]
    variance = torch.stack(squares).sum(dim=0) / len(values)
    return mean, (variance + VARIANCE_FLOOR).rsqrt()


def _unchanged(values: Tensor) -> tuple[Tensor, Tensor]:
    width = values.shape[1]
    zeros = torch.zeros(width, dtype=torch.float64, device=values.device)
    return zeros, torch.ones_like(zeros)


def _rows_of_a_block(values: Tensor, num_classes: int) -> int:
    budget = BLOCK_CPU if values.device.type == "cpu" else BLOCK_GPU
    return max(1, budget // max(values.shape[1], num_classes))
