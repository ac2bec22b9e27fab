"""Attention by a fused kernel whose bias is constant to it, and the bias gradient by a kernel of its own, in Triton.

Fused kernels that return a bias gradient write one for every sample of the batch and sum afterwards. Here a program
owns one tile of the (N, N) bias, goes through the batch, computes the tile of the score gradient again from what the
forward pass kept, and adds in float32. No program writes where another does, so the gradient repeats to the bit; it is
as large as the bias, whatever the batch. Autograd adds the gradients of layers that share a bias, in float32, so
accumulation, checkpointing and several forward passes need no care here.

Source of the recomputation: Dao et al. 2022 (FlashAttention, arXiv 2205.14135), appendix B.2.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 64
"""Rows and columns of the bias that a program owns; half as many for float32, whose operands fill shared memory."""
MAX_WIDTH = 128
"""Channels a head whose operands still fit."""
ALIGNMENT = 8
"""Elements a row of the bias is padded to a multiple of: fused kernels read rows that start at 16 bytes."""
WANTED_PROGRAMS = 1024
"""Programs that fill a large GPU; where tiles and heads make fewer, the batch is split, at most MAX_SPLITS ways."""
MAX_SPLITS = 8


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query keyᵀ / sqrt(D) + bias) value, (B, H, N, D), in the dtype of `query`.

    query, key, value: (B, H, N, D) of one dtype; bias: (H, N, N), any float dtype, may need grad. It is added in the
    dtype of `query`; its gradient is summed in float32. Raises ValueError for a bias of another shape.
    """
    num_tokens = query.shape[-2]
    if tuple(bias.shape) != (query.shape[1], num_tokens, num_tokens) or key.shape[-2] != num_tokens:
        raise ValueError(f"the bias is {tuple(bias.shape)}, not one (N, N) a head of {tuple(query.shape)}")
    out: Tensor = _FusedAttention.apply(query, key, value, bias)
    return out


def pad_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias (..., N, N) in `dtype`, its rows a multiple of ALIGNMENT apart in memory; differentiable."""
    num_keys = bias.shape[-1]
    padding = -num_keys % ALIGNMENT
    return torch.nn.functional.pad(bias.to(dtype), (0, padding))[..., :num_keys]


class _FusedAttention(torch.autograd.Function):
    """The fused kernel for all but the bias gradient; keeps the bias as given, which layers share, not padded."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        mask = pad_bias(bias, query.dtype).expand(len(query), -1, -1, -1)
        aten = torch.ops.aten
        if query.is_cuda:
            out, lse, *random = aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)
        else:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
            random = []
        ctx.save_for_backward(query, key, value, bias, out, lse, *random)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, lse, *random = ctx.saved_tensors
        mask = pad_bias(bias, query.dtype)
        expanded = mask.expand(len(query), -1, -1, -1)
        grad = grad.to(query.dtype)
        aten = torch.ops.aten
        if query.is_cuda:
            wanted = [True, True, True, False]
            operand_grads = aten._scaled_dot_product_efficient_attention_backward(
                grad, query, key, value, expanded, out, lse, *random, 0.0, wanted
            )[:3]
        else:
            operand_grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, out, lse, 0.0, False, attn_mask=expanded
            )
        if not ctx.needs_input_grad[3]:
            return (*operand_grads, None)
        delta = (grad.float() * out.float()).sum(-1)
        lse = lse[..., : query.shape[-2]].float()
        return (*operand_grads, bias_gradient(query, key, value, grad, lse, delta, mask).to(bias.dtype))


@torch.library.custom_op("fdkit::bias_gradient", mutates_args=())
def bias_gradient(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, bias: Tensor
) -> Tensor:
    """Gradient of a bias shared by the batch, (H, N, N) float32, the same to the bit each time.

    query, key, value, grad: (B, H, N, D) of one dtype, grad of the attended values; lse: (B, H, N) float32, natural
    logarithm of the sum of exp(scores); delta: (B, H, N) float32, attended values times grad, summed over D;
    bias: (H, N, N) as it was added.
    """
    import triton

    query, key, value, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, grad))
    if not query.is_cuda:  # Triton's interpreter multiplies bfloat16 as if its bits were integers
        query, key, value, grad, bias = (x.float() for x in (query, key, value, grad, bias))
    batch_size, num_heads, num_tokens, width = query.shape
    is_wide = query.dtype == torch.float32
    tile = TILE // 2 if is_wide else TILE
    tiles = triton.cdiv(num_tokens, tile)
    splits = _num_splits(batch_size, tiles * tiles * num_heads)
    # Every element of the output is written by exactly one program.
    sums = torch.empty(splits, num_heads, num_tokens, num_tokens, dtype=torch.float32, device=query.device)
    _kernel()[(tiles, tiles, num_heads * splits)](
        query, key, value, grad, lse.contiguous(), delta.contiguous(), bias, sums,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3], *bias.stride()[:2],
        batch_size, num_heads, num_tokens, triton.cdiv(batch_size, splits), width**-0.5,
        width=width, width_padded=max(16, triton.next_power_of_2(width)),
        tile=tile, num_stages=1 if is_wide else 2,
    )  # fmt: skip
    return sums.sum(0) if splits > 1 else sums.squeeze(0)


@bias_gradient.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, bias: Tensor
) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[2], query.shape[2], dtype=torch.float32)


def _num_splits(batch_size: int, num_programs: int) -> int:
    """Parts the batch is taken in; from shapes alone, so that another device adds in the same order."""
    return max(1, min(MAX_SPLITS, WANTED_PROGRAMS // num_programs, batch_size))


@functools.cache
def _kernel() -> Any:
    """The Triton kernel; made when first needed, since Triton is not installed everywhere."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def bias_gradient_tile(  # type: ignore[no-untyped-def]
        query, key, value, grad, lse, delta, bias, sums,
        q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, bias_h, bias_n,
        batch_size, num_heads, num_tokens, split_size, scale,
        width: tl.constexpr, width_padded: tl.constexpr, tile: tl.constexpr,
    ):  # fmt: skip
        head = (tl.program_id(2) % num_heads).to(tl.int64)
        split = (tl.program_id(2) // num_heads).to(tl.int64)
        rows = tl.program_id(0) * tile + tl.arange(0, tile)
        columns = tl.program_id(1) * tile + tl.arange(0, tile)
        channels = tl.arange(0, width_padded)
        is_row, is_column, is_channel = rows < num_tokens, columns < num_tokens, channels < width
        is_query = is_row[:, None] & is_channel[None, :]
        is_key = is_column[:, None] & is_channel[None, :]
        inside = is_row[:, None] & is_column[None, :]
        first = split * split_size
        last = tl.minimum(first + split_size, batch_size)
        added = tl.load(
            bias + head * bias_h + rows[:, None] * bias_n + columns[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        # 64-bit offsets are made once; inside the loop pointers move on by one sample.
        query += first * q_b + head * q_h + rows[:, None] * q_n + channels[None, :]
        key += first * k_b + head * k_h + columns[:, None] * k_n + channels[None, :]
        value += first * v_b + head * v_h + columns[:, None] * v_n + channels[None, :]
        grad += first * g_b + head * g_h + rows[:, None] * g_n + channels[None, :]
        lse += (first * num_heads + head) * num_tokens + rows
        delta += (first * num_heads + head) * num_tokens + rows
        total = tl.zeros((tile, tile), tl.float32)
        for _ in range(first, last):
            q = tl.load(query, mask=is_query, other=0.0)
            k = tl.load(key, mask=is_key, other=0.0)
            v = tl.load(value, mask=is_key, other=0.0)
            g = tl.load(grad, mask=is_query, other=0.0)
            row_lse = tl.load(lse, mask=is_row, other=0.0)
            row_delta = tl.load(delta, mask=is_row, other=0.0)
            # "ieee": float32 operands are multiplied as such, not rounded to TF32.
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + added
            share = tl.exp(scores - row_lse[:, None])
            share_grad = tl.dot(g, tl.trans(v), input_precision="ieee")
            total += tl.where(inside, share * (share_grad - row_delta[:, None]), 0.0)
            query += q_b
            key += k_b
            value += v_b
            grad += g_b
            lse += num_heads * num_tokens
            delta += num_heads * num_tokens
        target = sums + (split * num_heads + head) * num_tokens * num_tokens
        tl.store(target + rows[:, None] * num_tokens + columns[None, :], total, mask=inside)

    return bias_gradient_tile
