import math

import pytest
import torch
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.models import attention
from fdkit.models.attention import attention_path, bias_attention, sdpa_backend

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
def test_every_path_equals_float64_naive_attention(dtype: torch.dtype, tolerance: float, path: str) -> None:
    operands = _operands(dtype)
    exact = [x.detach().double().clone().requires_grad_() for x in operands]
    out, expected = bias_attention(*operands, wanted=path), _naive(*exact)
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


@pytest.mark.parametrize("path", ["sdpa", "matmul", "matmul_fp32"])
def test_what_is_asked_for_is_what_runs(path: str) -> None:
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert attention_path(device, torch.bfloat16, wanted=path) == path


@pytest.mark.parametrize(
    ("device", "dtype", "head_width", "reason"),
    [
        ("cpu", torch.float32, 64, "needs a CUDA device, and this is cpu"),
        ("mps", torch.float32, 64, "needs a CUDA device, and this is mps"),
        ("cuda", torch.float64, 64, "not in float64"),
        ("cuda", torch.bfloat16, 60, "a multiple of 8, and these have 60"),
        ("cuda", torch.bfloat16, 136, "up to 128 channels"),
    ],
)
def test_fused_is_refused_in_words_where_it_cannot_run(
    device: str, dtype: torch.dtype, head_width: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    with pytest.raises(ConfigError, match=reason):
        attention_path(torch.device(device), dtype, wanted="fused", head_width=head_width)


def test_fused_is_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    cuda = torch.device("cuda")
    assert attention_path(cuda, torch.bfloat16, wanted="fused") == "fused"
    monkeypatch.setattr(attention, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="Triton, which is not installed"):
        attention_path(cuda, torch.bfloat16, wanted="fused")


def test_the_mask_of_sdpa_is_padded_and_asks_no_gradient_in_evaluation() -> None:
    bias = torch.randn(H, N, N, requires_grad=True)
    mask = attention._sdpa_mask(bias, torch.bfloat16)
    assert (mask.shape, mask.stride(-2), mask.requires_grad) == ((1, H, N, N), 8, True)
    with torch.no_grad():
        assert not attention._sdpa_mask(bias, torch.bfloat16).requires_grad


def test_pytorch_is_asked_which_kernel_it_takes() -> None:
    assert sdpa_backend(torch.device("cpu"), torch.float32, num_tokens=5, head_width=8) == "math"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [64, 197, 257])
def test_sdpa_takes_the_memory_efficient_kernel_on_cuda(num_tokens: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        backend = sdpa_backend(torch.device("cuda"), dtype, num_tokens=num_tokens, head_width=64)
        assert backend == "memory-efficient"
