"""A transformer block without work whose result nobody reads, or that another row has done already.

Queries, projection and MLP act on one token at a time, so those of tokens that nobody reads are left out, and what
equal tokens of several images have in common is computed once.
Source: Vaswani et al. 2017, equation 1: a row of the attended values depends on its own query alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def block_rows(block: Any, tokens: Tensor, rows: slice) -> Tensor:
    """What timm's `Block` makes of tokens[:, rows], (B, R, C), given all tokens (B, N, C)."""
    return _finish(block, tokens[:, rows], _attend(block.attn, block.norm1(tokens), rows))


def block_shared(block: Any, tokens: Tensor, shared: Tensor, index: Tensor) -> Tensor:
    """What timm's `Block` makes of tokens (B, N, C), followed by shared[index] of each image: (B, N + K, C).

    shared: (S, C), normalised and projected once, not once per image; index: (B, K). Their gradients are summed over
    images in the dtype of `shared`, also where autocast projects in a coarser one.
    """

    def joined(own: Tensor, common: Tensor) -> Tensor:
        return torch.cat([own, F.embedding(index, common.to(shared.dtype)).to(own.dtype)], dim=1)

    attention, own, common = block.attn, block.norm1(tokens), block.norm1(shared)
    projected = joined(attention.qkv(own), attention.qkv(common))
    by_head = projected.unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = (part.transpose(1, 2) for part in by_head.unbind(2))  # (B, H, N + K, D) each
    gate = None if attention.gate is None else joined(attention.gate(own), attention.gate(common))
    return _finish(block, joined(tokens, shared), _mix(attention, query, key, value, gate))


def _finish(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """The rest of the block, from what attention gives its tokens, (B, R, C)."""
    tokens = tokens + block.drop_path1(block.ls1(attended))
    output: Tensor = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return output


def _attend(attention: Any, tokens: Tensor, rows: slice) -> Tensor:
    """What timm's attention gives tokens[:, rows] of the tokens (B, N, C), (B, R, C)."""
    some, width = tokens[:, rows], attention.attn_dim
    sections = (width, 2 * width)
    weights = attention.qkv.weight.split(sections)
    biases = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split(sections)
    by_head = (attention.num_heads, attention.head_dim)
    query = F.linear(some, weights[0], biases[0]).unflatten(-1, by_head).transpose(1, 2)  # (B, H, R, D)
    keys_values = F.linear(tokens, weights[1], biases[1]).unflatten(-1, (2, *by_head))
    key, value = keys_values.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
    return _mix(attention, query, key, value, None if attention.gate is None else attention.gate(some))


def _mix(attention: Any, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None) -> Tensor:
    """What timm's attention makes of projected tokens: query (B, H, R, D), the others (B, H, N, D); gate (B, R, C)."""
    query, key = attention.q_norm(query), attention.k_norm(key)
    if attention.fused_attn:
        attended = F.scaled_dot_product_attention(query, key, value)
    else:
        attended = (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    attended = attention.norm(attended.transpose(1, 2).flatten(2))
    if gate is not None:
        attended = attended * gate.sigmoid()
    projected: Tensor = attention.proj(attended)
    return projected
