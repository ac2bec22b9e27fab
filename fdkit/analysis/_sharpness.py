"""The largest eigenvalue of a loss's Hessian, from products of the Hessian with vectors alone."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Product = Callable[[Tensor], Tensor]


class Sharpness(NamedTuple):
    """The largest eigenvalue as far as it was found."""

    value: float
    """Of the Hessian, the largest by sign and not by magnitude; never above the true one but for rounding."""
    residual: float
    """|H v - value v| / |value| of the unit vector v found: some eigenvalue lies within this share of the value."""
    products: int
    """Products with the Hessian that were made."""
    converged: bool
    """Whether the residual fell to the tolerance."""


def largest_eigenvalue(
    multiply: Product, start: Tensor, *, tolerance: float = 0.05, max_products: int = 30
) -> Sharpness:
    """The largest algebraic eigenvalue of a symmetric operator on vectors (P,), by Lanczos' method.

    start: a vector that is no eigenvector, such as a random one. In each step the basis (k, P) is kept orthogonal in
    full. Unlike power iteration, which finds the largest magnitude, it finds the largest value whatever the sign of
    others, and needs fewer products. Memory: max_products times P numbers of the start's type.
    Source: Golub and Van Loan, Matrix Computations, sections 10.1 and 10.3.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    value, residual, scale = 0.0, float("inf"), 0.0
    while len(diagonal) < min(max_products, start.numel()):
        image = multiply(basis[-1])
        diagonal.append(float(image.double() @ basis[-1].double()))
        for _ in range(2):  # once more, since rounding leaves a rest of the first time
            stacked = torch.stack(basis)
            image = image - stacked.T @ (stacked @ image)
        length = float(image.norm())
        value, last = _top(diagonal, beside)
        scale = max(abs(one) for one in (*diagonal, *beside, length))
        residual = length * abs(last)
        if residual <= tolerance * abs(value) or length <= 1e-6 * scale:
            break
        beside.append(length)
        basis.append(image / length)
    relative = residual / abs(value) if value else (0.0 if residual == 0 else float("inf"))
    is_whole = residual <= 1e-6 * scale
    return Sharpness(value, relative, len(diagonal), bool(relative <= tolerance or is_whole))


def _top(diagonal: list[float], beside: list[float]) -> tuple[float, float]:
    """The largest eigenvalue of a tridiagonal matrix, and the last entry of its unit eigenvector."""
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag()
    outside = torch.tensor(beside, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix + outside.diag(1) + outside.diag(-1))
    return float(values[-1]), float(vectors[-1, -1])


def hessian_product(losses: Callable[[], Iterable[Tensor]], parameters: Mapping[str, Tensor]) -> Product:
    """Multiplies vectors (P,) by the Hessian of the sum of the losses, taken one at a time.

    losses: gives scalar losses with gradient, anew in each call; their sum is the loss, and the memory of one is freed
    before the next. parameters: what it is a function of, requiring gradients; a vector holds them one after the other.
    Attention runs unfused: fused kernels have no second derivative.
    """
    tensors = list(parameters.values())

    def multiply(vector: Tensor) -> Tensor:
        parts = vector.split([tensor.numel() for tensor in tensors])
        along = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
        total = torch.zeros_like(vector)
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for loss in losses():
                slopes = torch.autograd.grad(
                    loss, tensors, create_graph=True, allow_unused=True, materialize_grads=True
                )
                slope = torch.stack([(one * way).sum() for one, way in zip(slopes, along, strict=True)]).sum()
                if not slope.requires_grad:  # linear in all of them: its Hessian is zero
                    continue
                curved = torch.autograd.grad(slope, tensors, allow_unused=True, materialize_grads=True)
                total += torch.cat([one.flatten() for one in curved])
        return total

    return multiply
