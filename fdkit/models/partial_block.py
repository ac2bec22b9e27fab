"""A transformer block for some of its tokens, which attend to all.

Queries, projection and MLP act on one token at a time, so those of tokens that nobody reads are left out.
Source: Vaswani et al. 2017, equation 1: a row of the attended values depends on its own query alone.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def block_rows(block: Any, tokens: Tensor, rows: slice) -> Tensor:
    """What timm's `Block` makes of tokens[:, rows], (B, R, C), given all tokens (B, N, C)."""
    some = tokens[:, rows]
    some = some + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(tokens), rows)))
    output: Tensor = some + block.drop_path2(block.ls2(block.mlp(block.norm2(some))))
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
    query, key = attention.q_norm(query), attention.k_norm(key)
    if attention.fused_attn:
        attended = F.scaled_dot_product_attention(query, key, value)
    else:
        attended = (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    attended = attention.norm(attended.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        attended = attended * attention.gate(some).sigmoid()
    projected: Tensor = attention.proj(attended)
    return projected
