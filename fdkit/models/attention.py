"""Attention with a learned additive bias, computed the way that is fast on the device at hand.

Fused kernels take no learned bias on a CPU: PyTorch falls back to plain matrix products in float32, slower than the
products written out here. Where the CPU has no bfloat16 matrix product, bfloat16 operands are multiplied by a
reference loop many times slower than float32, so they are widened first. On CUDA a learned bias leaves PyTorch its
memory-efficient kernel alone, which writes a bias gradient for every sample; "fused" keeps the bias from it and
computes that gradient once for the batch.
"""

from typing import Literal

import torch
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.models.bias_gradient import ALIGNMENT, MAX_WIDTH, fused_attention, has_triton, pad_bias

AttentionPath = Literal["fused", "sdpa", "matmul", "matmul_fp32"]
WantedAttention = Literal["auto", "fused", "sdpa", "matmul", "matmul_fp32"]

SDPA_BACKENDS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cudnn"}
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attention_path(
    device: torch.device, dtype: torch.dtype, *, wanted: WantedAttention = "auto", head_width: int = 64
) -> AttentionPath:
    """How `bias_attention` computes for operands of this device and dtype; a run records it.

    "matmul": products in the operands' dtype; "matmul_fp32": widened to float32; "sdpa": PyTorch's own choice;
    "fused": a fused kernel and the bias gradient in Triton. wanted: one of them, or "auto" for what suits.
    head_width: channels a head. Raises ConfigError for "fused" where it cannot run.
    """
    if wanted == "fused":
        _refuse_fused(device, dtype, head_width)
    if wanted != "auto":
        return wanted
    if device.type != "cpu":
        return "sdpa"
    if dtype == torch.bfloat16 and not has_fast_bfloat16():
        return "matmul_fp32"
    return "matmul"


def _refuse_fused(device: torch.device, dtype: torch.dtype, head_width: int) -> None:
    """Raises ConfigError if the kernels of "fused" cannot take such operands."""
    reason = ""
    if device.type != "cuda":
        reason = f"it needs a CUDA device, and this is {device.type}"
    elif not has_triton():
        reason = "it needs Triton, which is not installed"
    elif dtype not in FUSED_DTYPES:
        reason = f"it computes in bfloat16, float16 or float32, not in {str(dtype).removeprefix('torch.')}"
    elif head_width % ALIGNMENT or head_width > MAX_WIDTH:
        reason = f"it takes heads of up to {MAX_WIDTH} channels, a multiple of {ALIGNMENT}, and these have {head_width}"
    if reason:
        raise ConfigError(f"attention fused cannot run: {reason}", "use auto, sdpa or matmul")


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by oneDNN rather than by PyTorch's reference loop."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def sdpa_backend(device: torch.device, dtype: torch.dtype, *, num_tokens: int, head_width: int) -> str:
    """Which of its kernels PyTorch takes for "sdpa" with a bias that learns, asked of PyTorch itself."""
    operand = torch.zeros(1, 1, num_tokens, head_width, device=device, dtype=dtype, requires_grad=True)
    bias = torch.zeros(1, num_tokens, num_tokens, device=device, requires_grad=True)
    with torch.enable_grad():
        choice = torch._fused_sdp_choice(operand, operand, operand, attn_mask=_sdpa_mask(bias, dtype))
    return SDPA_BACKENDS.get(choice, "none")


def bias_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, wanted: WantedAttention = "auto"
) -> Tensor:
    """softmax(query keyᵀ / sqrt(D) + bias) value, (B, H, N, D), in the dtype of `query`.

    query, key, value: (B, H, N, D) of one dtype; bias: broadcasts to (B, H, N, N), any float dtype, may need grad;
    for "fused" (H, N, N). wanted: see `attention_path`. Autocast does not reach inside: the path fixes the dtypes.
    """
    path = attention_path(query.device, query.dtype, wanted=wanted, head_width=query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        if path == "fused":
            return fused_attention(query, key, value, bias)
        if path == "sdpa":
            mask = _sdpa_mask(bias, query.dtype)
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if path == "matmul_fp32":
            return _matmul_attention(query.float(), key.float(), value.float(), bias.float()).to(query.dtype)
        return _matmul_attention(query, key, value, bias.to(query.dtype))


def _sdpa_mask(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias as PyTorch's kernels take it: of the operands' dtype, its rows padded, and four-dimensional."""
    if not torch.is_grad_enabled():
        bias = bias.detach()  # a mask that requires grad bars the fastest kernels even where none is computed
    mask = pad_bias(bias, dtype)
    return mask[None] if mask.ndim == 3 else mask


def _matmul_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    scores += bias  # in place: the product's own values are not needed for its gradient
    return scores.softmax(dim=-1) @ value
