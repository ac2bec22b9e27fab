"""Attention with a learned additive bias, computed the way that is fast on the device at hand.

Fused kernels take no learned bias on a CPU: PyTorch falls back to plain matrix products in float32, slower than the
products written out here. Where the CPU has no bfloat16 matrix product, bfloat16 operands are multiplied by a
reference loop many times slower than float32, so they are widened first.
"""

from typing import Literal

import torch
from torch import Tensor

AttentionPath = Literal["matmul", "matmul_fp32", "sdpa"]


def attention_path(device: torch.device, dtype: torch.dtype) -> AttentionPath:
    """How `bias_attention` computes for operands of this device and dtype; a run records it.

    "matmul": products in the operands' dtype; "matmul_fp32": widened to float32; "sdpa": PyTorch's own choice.
    """
    if device.type != "cpu":
        return "sdpa"
    if dtype == torch.bfloat16 and not has_fast_bfloat16():
        return "matmul_fp32"
    return "matmul"


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by oneDNN rather than by PyTorch's reference loop."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bias_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query keyᵀ / sqrt(D) + bias) value, (B, H, N, D), in the dtype of `query`.

    query, key, value: (B, H, N, D) of one dtype; bias: broadcasts to (B, H, N, N), any float dtype, may need grad.
    Autocast does not reach inside: the path fixes the dtypes.
    """
    path = attention_path(query.device, query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        if path == "sdpa":
            bias = bias.to(query.dtype)
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if path == "matmul_fp32":
            return _matmul_attention(query.float(), key.float(), value.float(), bias.float()).to(query.dtype)
        return _matmul_attention(query, key, value, bias.to(query.dtype))


def _matmul_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    scores += bias  # in place: the product's own values are not needed for its gradient
    return scores.softmax(dim=-1) @ value
