from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call

from fdkit.analysis._sharpness import hessian_product, largest_eigenvalue
from fdkit.models.libraries import build_timm


def symmetric(values: list[float]) -> Tensor:
    """A matrix of these eigenvalues in a random basis."""
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return basis @ torch.tensor(values, dtype=torch.float64).diag() @ basis.T


def power_iteration(matrix: Tensor, start: Tensor, steps: int = 200) -> float:
    """The eigenvalue of largest magnitude, whatever its sign: not what is asked for."""
    for _ in range(steps):
        start = matrix @ start / (matrix @ start).norm()
    return (start @ matrix @ start).item()


@pytest.mark.parametrize(
    "values",
    [
        [5.0, 1.0, 0.5, 0.1, 0.0, -0.2, -1.0],
        [-9.0, -5.0, -1.0, 0.0, 1.0, 2.0, 3.0],  # the largest magnitude is negative
        [-4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5],  # all are
        [2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0],
        [0.0] * 7,
    ],
)
def test_the_largest_by_sign_is_found(values: list[float]) -> None:
    matrix, start = symmetric(values), torch.randn(7, dtype=torch.float64)
    found = largest_eigenvalue(lambda vector: matrix @ vector, start, tolerance=1e-9)
    assert found.value == pytest.approx(max(values), abs=1e-7)
    assert found.converged
    assert found.products <= 7
    if min(values) == -9:
        assert power_iteration(matrix, start) == pytest.approx(-9)  # the plausible wrong answer


@given(seed=st.integers(0, 1000), num_products=st.integers(1, 8))
def test_too_few_products_give_a_lower_bound_that_says_so(seed: int, num_products: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(40, 40, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.T
    start = torch.randn(40, dtype=torch.float64, generator=generator)
    found = largest_eigenvalue(
        lambda vector: matrix @ vector, start, tolerance=1e-12, max_products=num_products
    )
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert found.value <= eigenvalues[-1] + 1e-9
    assert (found.products, found.converged) == (num_products, False)
    nearest = (eigenvalues - found.value).abs().min()
    assert nearest <= found.residual * abs(found.value) + 1e-9  # what the residual promises


def test_it_agrees_with_arpack_on_a_large_matrix_in_float32() -> None:
    values = [30.0, 20.0, *torch.linspace(-8, 8, 298).tolist()]
    matrix = symmetric(values).float()
    found = largest_eigenvalue(lambda v: matrix @ v, torch.randn(300), tolerance=1e-3, max_products=60)
    operator = LinearOperator((300, 300), matvec=lambda v: matrix.double().numpy() @ v, dtype=float)
    assert found.converged
    assert found.value == pytest.approx(eigsh(operator, k=1, which="LA")[0][0], rel=1e-4)


class Quadratic(nn.Module):
    """Half the quadratic form of a symmetric matrix at all the weights, so the matrix is the Hessian."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.rows = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def forward(self) -> Tensor:
        weights = torch.cat([self.rows.flatten(), self.bias])
        return weights @ self.matrix @ weights / 2


def test_the_product_is_exact_for_a_quadratic_taken_in_parts() -> None:
    matrices = [symmetric([8.0, 3, 2, 1, 1, 0, -1, -20]), symmetric([1.0, 1, 1, 1, 1, 1, 1, 1])]
    parts = [Quadratic(matrix) for matrix in matrices]
    weights = dict(parts[0].named_parameters())
    multiply = hessian_product(lambda: (functional_call(part, weights, ()) for part in parts), weights)
    vector = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(multiply(vector), sum(matrices) @ vector)
    found = largest_eigenvalue(multiply, vector, tolerance=1e-10)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(sum(matrices))[-1].item())
    assert found.value > 0
    assert all(tensor.grad is None for tensor in weights.values())


def test_a_loss_that_is_linear_or_leaves_a_weight_out_has_curvature_zero_there() -> None:
    weights = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(3, requires_grad=True)}
    linear = hessian_product(lambda: [weights["a"].sum()], weights)
    assert not linear(torch.randn(5)).any()
    cubic = hessian_product(lambda: [(weights["a"] ** 3).sum()], weights)
    assert cubic(torch.arange(5.0)).tolist() == [0.0, 6.0, 0.0, 0.0, 0.0]


def tiny_loss(name: str, args: dict) -> tuple[nn.Module, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    small = {"depth": 1, "img_size": 8, "patch_size": 4, "embed_dim": 4, "num_heads": 2, "num_classes": 3}
    network = build_timm(name, {**small, "mlp_ratio": 1.0, **args}).network.double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    weights = {key: value.detach().requires_grad_() for key, value in network.named_parameters()}
    batches = [(torch.rand(count, 3, 8, 8).double(), torch.randint(0, 3, (count,))) for count in (3, 2)]
    return network, weights, batches


@pytest.mark.parametrize(
    ("name", "args", "fuses"),
    [
        ("vit_tiny_patch16_224", {}, True),
        (
            "beit_base_patch16_224",
            {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False},
            False,
        ),
    ],
)
def test_a_vits_product_and_eigenvalue_are_those_of_its_whole_hessian(
    name: str, args: dict, fuses: bool
) -> None:
    network, weights, batches = tiny_loss(name, args)

    def losses(parameters: dict[str, Tensor]) -> list[Tensor]:
        return [
            F.cross_entropy(functional_call(network, parameters, (images,)), labels, reduction="sum") / 5
            for images, labels in batches
        ]

    names, start = list(weights), torch.cat([tensor.detach().flatten() for tensor in weights.values()])

    def loss_at(vector: Tensor) -> Tensor:
        parts = vector.split([tensor.numel() for tensor in weights.values()])
        shaped = zip(names, parts, strict=True)
        return sum(losses({key: part.view_as(weights[key]) for key, part in shaped}))

    multiply = hessian_product(lambda: iter(losses(weights)), weights)
    vector = torch.randn_like(start)
    vector /= vector.norm()
    product, step = multiply(vector), 1e-5
    slopes = [
        torch.func.grad(loss_at)(start + sign * step * vector) for sign in (1, -1)
    ]  # an oracle without a second derivative
    torch.testing.assert_close(product, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-4, atol=1e-6)
    hessian = torch.stack([multiply(row) for row in torch.eye(len(start), dtype=torch.float64)[:10]])
    torch.testing.assert_close(hessian[:, :10], hessian[:, :10].T, rtol=1e-6, atol=1e-9)
    with pytest.raises(RuntimeError, match="not implemented") if fuses else nullcontext():
        torch.autograd.functional.hessian(loss_at, start)  # what comes of fused kernels
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    whole = torch.autograd.functional.hessian(loss_at, start)
    torch.testing.assert_close(product, whole @ vector, rtol=1e-8, atol=1e-10)
    found = largest_eigenvalue(multiply, vector, tolerance=1e-6, max_products=60)
    assert found.converged
    assert found.value == pytest.approx(torch.linalg.eigvalsh(whole)[-1].item(), rel=1e-8)
