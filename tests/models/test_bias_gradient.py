import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fdkit.models.attention import bias_attention
from fdkit.models.bias_gradient import (
    ALIGNMENT,
    MAX_SPLITS,
    _num_splits,
    bias_gradient,
    has_triton,
    pad_bias,
)

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CHECKS = Path(__file__).with_name("bias_gradient_checks.py")
"""Run in a process of their own: Triton interprets only if the environment says so before it is imported."""


@needs_triton
@pytest.mark.slow
def test_the_interpreted_kernel_holds_every_check() -> None:
    names = [
        "float64",
        "repeats",
        "shares",
        "own_and_shared",
        "accumulates",
        "checkpoints",
        "forwards",
        "extreme",
    ]
    done = subprocess.run(
        [sys.executable, CHECKS, *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{name} holds" for name in names]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tile"), [("bf16", 64), ("fp32", 32)])
def test_the_kernel_compiles_for_gpus_without_one_and_adds_nothing_atomically(dtype: str, tile: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fdkit.models.bias_gradient import _kernel

    kernel = _kernel()
    constants = {"width": 80, "width_padded": 128, "tile": tile}
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("query", "key", "value", "grad", "bias"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "delta", "sums"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    options = {"num_stages": 1 if dtype == "fp32" else 2}
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(ASTSource(kernel, types, constants), target=target, options=options)
    assert compiled.metadata.shared <= 99 * 1024  # what the smallest of today's GPUs have
    assert "atom." not in compiled.asm["ptx"]
    assert "red.global" not in compiled.asm["ptx"]


def test_padding_moves_rows_apart_and_changes_no_number() -> None:
    bias = torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
    padded = pad_bias(bias, torch.float64)
    assert torch.equal(padded, bias)
    assert padded.stride(-2) == ALIGNMENT
    assert pad_bias(bias, torch.bfloat16).dtype == torch.bfloat16
    assert torch.autograd.gradcheck(lambda x: pad_bias(x, torch.float64), bias)


def test_splits_follow_from_shapes_and_never_exceed_the_batch() -> None:
    assert _num_splits(256, 192) == 5
    assert _num_splits(3, 192) == 3
    assert _num_splits(256, 4) == MAX_SPLITS
    assert _num_splits(256, 5000) == 1


def test_the_shape_of_the_gradient_is_known_without_running() -> None:
    operand = torch.empty(2, 3, 5, 8, device="meta", dtype=torch.bfloat16)
    rows, bias = torch.empty(2, 3, 5, device="meta"), torch.empty(3, 5, 5, device="meta")
    found = bias_gradient(operand, operand, operand, operand, rows, rows, bias)
    assert found.shape == (3, 5, 5)
    assert found.dtype == torch.float32


def test_a_bias_of_another_shape_is_refused() -> None:
    from fdkit.models.bias_gradient import fused_attention

    operand = torch.zeros(2, 3, 5, 8)
    for shape in [(3, 5, 6), (1, 3, 5, 5), (2, 3, 5, 5), (1, 5, 5)]:
        with pytest.raises(ValueError, match="not one"):
            fused_attention(operand, operand, operand, torch.zeros(shape))


def _cuda_operands(dtype: torch.dtype, num_tokens: int, width: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(9, num_tokens, 3, 4, width, device="cuda", generator=generator).to(dtype)
    operands = [x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
    bias = torch.randn(4, num_tokens, num_tokens, device="cuda", generator=generator)
    return [*operands, bias.requires_grad_()]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("wanted", ["fused", "sdpa", "matmul", "matmul_fp32"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("num_tokens", "width"), [(197, 64), (257, 80), (64, 32), (49, 32)])
def test_every_path_on_cuda_equals_float64(
    wanted: str, dtype: torch.dtype, tolerance: float, num_tokens: int, width: int
) -> None:
    operands = _cuda_operands(dtype, num_tokens, width)
    exact = [x.detach().double().requires_grad_() for x in operands]
    query, key, value, bias = exact
    expected = (query * width**-0.5 @ key.transpose(-2, -1) + bias).softmax(-1) @ value
    weight = torch.randn_like(expected).to(dtype)
    found = bias_attention(*operands, wanted=wanted)
    grads = torch.autograd.grad(found, operands, weight)
    references = torch.autograd.grad(expected, exact, weight.double())
    for one, reference in zip((found, *grads), (expected, *references), strict=True):
        assert (one.double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.gpu
@needs_cuda
def test_the_gradient_on_cuda_repeats_to_the_bit_and_its_kernels_are_the_named_ones() -> None:
    from torch.profiler import ProfilerActivity, profile

    operands = _cuda_operands(torch.bfloat16, 197, 64)

    def gradient() -> Tensor:
        out = bias_attention(*operands, wanted="fused")
        return torch.autograd.grad(out.float().square().sum(), operands[3])[0]

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(20))
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        gradient()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in measured.key_averages())
    assert "fmha_cutlassF" in names
    assert "fmha_cutlassB" in names
    assert "bias_gradient_tile" in names


@pytest.mark.gpu
@needs_cuda
def test_the_bias_costs_no_memory_that_grows_with_layers() -> None:
    def kept(num_layers: int) -> int:
        query, key, value, bias = _cuda_operands(torch.bfloat16, 197, 64)
        layers = [query]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(num_layers):
            layers.append(bias_attention(layers[-1], key, value, bias, wanted="fused"))
        return torch.cuda.memory_allocated() - before

    per_layer = (kept(8) - kept(2)) / 6
    outputs_and_lse = 9 * 4 * 197 * 64 * 2 + 9 * 4 * 224 * 4
    assert per_layer <= outputs_and_lse + 8192  # rounding by the allocator; a bf16 bias would add 315 kB
