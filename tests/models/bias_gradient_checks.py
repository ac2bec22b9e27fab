"""Checks of the fused attention under Triton's interpreter, against float64; `test_bias_gradient.py` runs them."""

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fdkit.models.bias_gradient import fused_attention

assert os.environ.get("TRITON_INTERPRET") == "1"


def operands(
    batch_size: int, num_heads: int, num_tokens: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Packed (B, N, 3, H, D) queries, keys and values, which make strided views, and a bias (H, N, N)."""
    generator = torch.Generator().manual_seed(num_tokens)
    qkv = torch.randn(batch_size, num_tokens, 3, num_heads, width, generator=generator).to(dtype)
    bias = torch.randn(num_heads, num_tokens, num_tokens, generator=generator)
    return qkv.requires_grad_(), bias.requires_grad_()


def split(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def exactly(qkv: Tensor, bias: Tensor) -> Tensor:
    query, key, value = split(qkv)
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1) + bias).softmax(-1) @ value


def fused(qkv: Tensor, bias: Tensor) -> Tensor:
    return fused_attention(*split(qkv), bias)


def weighted(out: Tensor) -> Tensor:
    return (out * torch.arange(out.numel()).sin().view_as(out).to(out.dtype)).sum()


def close(found: Tensor | None, expected: Tensor | None, tolerance: float = 3e-6) -> None:
    assert found is not None
    assert expected is not None
    found, expected = found.detach(), expected.detach()
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error <= tolerance, error


def compare(run: Callable[..., Tensor], qkv: Tensor, bias: Tensor, tolerance: float = 3e-6) -> None:
    """Outputs and both gradients of run(attention, qkv, bias) with the fused and the exact attention."""
    exact_qkv = qkv.detach().double().requires_grad_()
    exact_bias = bias.detach().to(qkv.dtype).double().requires_grad_()
    found, expected = run(fused, qkv, bias), run(exactly, exact_qkv, exact_bias)
    close(found, expected, tolerance)
    weighted(found).backward()
    weighted(expected).backward()
    assert qkv.grad is not None
    assert bias.grad is not None
    assert qkv.grad.dtype == qkv.dtype
    assert bias.grad.dtype == torch.float32
    close(qkv.grad, exact_qkv.grad, tolerance)
    close(bias.grad, exact_bias.grad, tolerance)


def one(attention: Callable[..., Tensor], qkv: Tensor, bias: Tensor) -> Tensor:
    return attention(qkv, bias)


def float64() -> None:
    shapes = [(1, 1, 3, 8), (5, 2, 97, 64), (11, 3, 33, 32), (2, 1, 64, 80), (9, 1, 49, 32)]
    for shape in shapes:
        compare(one, *operands(*shape))
    compare(one, *operands(3, 2, 70, 80, torch.bfloat16), tolerance=1e-2)


def repeats() -> None:
    qkv, bias = operands(11, 2, 40, 32)
    grads = [torch.autograd.grad(weighted(fused(qkv, bias)), (qkv, bias)) for _ in range(3)]
    assert all(torch.equal(a, b) for again in grads[1:] for a, b in zip(again, grads[0], strict=True))
    out = weighted(fused(qkv, bias))
    kept = [torch.autograd.grad(out, bias, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], grads[0][1])


def shares() -> None:
    def layers(attention: Callable[..., Tensor], qkv: Tensor, bias: Tensor) -> Tensor:
        first = attention(qkv, bias)
        return first * attention(qkv.flip(1), bias)

    compare(layers, *operands(3, 2, 35, 16), tolerance=1e-5)


def own_and_shared() -> None:
    qkv, shared = operands(3, 2, 35, 16)
    own = (shared.detach() * 2).cos().requires_grad_()
    weighted(fused(qkv, shared + own)).backward()
    assert own.grad is not None
    assert shared.grad is not None
    assert torch.equal(own.grad, shared.grad)
    both = (own + shared).detach().double().requires_grad_()
    weighted(exactly(qkv.detach().double(), both)).backward()
    close(own.grad, both.grad)


def accumulates() -> None:
    qkv, bias = operands(4, 2, 35, 16)
    for part in qkv.detach().chunk(2):
        fused(part, bias).square().sum().backward()
    exact = bias.detach().double().requires_grad_()
    exactly(qkv.detach().double(), exact).square().sum().backward()
    close(bias.grad, exact.grad)


def checkpoints() -> None:
    for reentrant in (False, True):
        qkv, bias = operands(3, 2, 35, 16)
        weighted(checkpoint(fused, qkv, bias, use_reentrant=reentrant)).backward()
        expected = torch.autograd.grad(weighted(fused(qkv, bias)), (qkv, bias))
        assert qkv.grad is not None
        assert bias.grad is not None
        assert torch.equal(qkv.grad, expected[0])
        assert torch.equal(bias.grad, expected[1])


def forwards() -> None:
    """Several forward passes, of unequal batches, before one backward pass."""
    qkv, bias = operands(5, 2, 35, 16)
    (fused(qkv[:3], bias).square().sum() + fused(qkv[3:], bias).square().sum()).backward()
    exact = bias.detach().double().requires_grad_()
    exactly(qkv.detach().double(), exact).square().sum().backward()
    close(bias.grad, exact.grad)


def extreme() -> None:
    qkv, bias = operands(2, 2, 35, 16)
    with torch.no_grad():
        qkv *= 30
        bias[:, :, 4] -= 1e4
        bias[:, 3] += 1e4
    # float32 scores near 1e4 resolve 1e-3, which the softmax turns into relative errors
    compare(one, qkv, bias, tolerance=5e-3)
    assert bias.grad is not None
    assert bool(bias.grad.isfinite().all())


def compiles() -> None:
    """One graph, forward and backward: the compiler sees through all but the kernel, which it takes as it is."""
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    compare(
        lambda attention, *args: (compiled if attention is fused else attention)(*args),
        *operands(3, 2, 35, 16),
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
        print(f"{name} holds", flush=True)
