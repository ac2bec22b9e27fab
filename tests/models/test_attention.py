import math

import pytest
import torch
from torch import Tensor

from fdkit.models import attention
from fdkit.models.attention import attention_path, bias_attention

B, H, N, D = 2, 3, 5, 4


def _operands(dtype: torch.dtype) -> list[Tensor]:
    query, key, value = (torch.randn(B, H, N, D, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, H, N, N, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (query, key, value)] + [bias.float().requires_grad_()]


def _naive(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention, one query at a time."""
    out = torch.zeros_like(query)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                scores = torch.stack(
                    [query[b, h, i] @ key[b, h, j] / math.sqrt(D) + bias[0, h, i, j] for j in range(N)]
                )
                share = scores.exp() / scores.exp().sum()
                out[b, h, i] = sum(share[j] * value[b, h, j] for j in range(N))
    return out


def _gradients(out: Tensor, operands: list[Tensor]) -> list[Tensor]:
    weight = torch.arange(out.numel(), dtype=torch.float64).sin().view_as(out)
    return list(torch.autograd.grad((out.double() * weight).sum(), operands))


@pytest.mark.parametrize("path", ["matmul", "matmul_fp32", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_every_path_equals_float64_naive_attention(
    dtype: torch.dtype, tolerance: float, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attention_path", lambda *_: path)
    operands = _operands(dtype)
    exact = [x.detach().double().clone().requires_grad_() for x in operands]
    out, expected = bias_attention(*operands), _naive(*exact)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    for found, reference in zip(_gradients(out, operands), _gradients(expected, exact), strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=0, atol=4 * tolerance)


def test_widening_is_more_exact_than_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = _operands(torch.bfloat16)
    expected = _naive(*(x.detach().double() for x in operands))
    errors = []
    for native in (True, False):
        monkeypatch.setattr(attention, "has_fast_bfloat16", lambda native=native: native)
        errors.append((bias_attention(*operands).double() - expected).abs().max())
    assert errors[1] <= errors[0]


def test_autocast_does_not_reach_inside() -> None:
    operands = _operands(torch.float32)
    plain = bias_attention(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bias_attention(*operands), plain)


def test_a_constant_added_to_the_bias_changes_nothing() -> None:
    query, key, value, bias = _operands(torch.float32)
    shifted = bias_attention(query, key, value, bias + 3)
    torch.testing.assert_close(shifted, bias_attention(query, key, value, bias))


def test_the_path_has_a_name_for_each_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(attention, "has_fast_bfloat16", lambda: False)
    assert attention_path(cpu, torch.bfloat16) == "matmul_fp32"
    assert attention_path(cpu, torch.float32) == "matmul"
    assert attention_path(cuda, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(attention, "has_fast_bfloat16", lambda: True)
    assert attention_path(cpu, torch.bfloat16) == "matmul"
