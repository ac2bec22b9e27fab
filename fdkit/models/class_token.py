"""The class token of a vision transformer without the work of its last block that never reaches it.

Of the last block, the class token takes keys and values of all tokens; its queries, its projection and its MLP act on
one token at a time, so those of the patches are left out. The class token and all gradients stay the same.
Source: Vaswani et al. 2017, equation 1: a row of the attended values depends on its own query alone.
"""

from typing import Any

import torch.nn.functional as F
from timm.layers import (
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    QuickGELU,
    RmsNorm,
    RmsNormFp32,
    SwiGLU,
)
from timm.layers.activations import GELU
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fdkit.models.stochastic_depth import ConstantDropPath
from fdkit.models.tokens import norm_after_pool

_NORMS = {nn.Identity, nn.LayerNorm, nn.RMSNorm, LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32}
_PARTS = {
    *_NORMS,
    *(Block, Attention, LayerScale, DropPath, ConstantDropPath),
    *(nn.Linear, nn.Dropout, Mlp, GluMlp, SwiGLU),
    *(nn.GELU, nn.ReLU, nn.SiLU, GELU, GELUTanh, QuickGELU),
}
"""What the last block may be made of: each but the attention treats one token as any other, by itself."""


def has_fast_class_token(network: nn.Module) -> bool:
    """Whether `class_token` gives what the network itself would, to rounding.

    False for all but timm's own vision transformers, and where somebody looks on: hooks in the last block or on the
    final norm, activation checkpointing, or dropout of single values or patches, whose draws depend on what is left
    out.
    """
    if not isinstance(network, VisionTransformer) or network.cls_token is None or network.grad_checkpointing:
        return False
    is_own = getattr(network.forward_features, "__func__", None) is VisionTransformer.forward_features
    blocks = network.blocks
    if not is_own or type(blocks) is not nn.Sequential or len(blocks) == 0 or type(blocks[-1]) is not Block:
        return False
    if type(network.patch_drop) is not nn.Identity or type(blocks[-1].attn) is not Attention:
        return False
    norms = [network.norm, norm_after_pool(network)]
    parts = [*blocks[-1].modules(), *norms]
    is_known = {type(part) for part in parts} <= _PARTS and {type(norm) for norm in norms} <= _NORMS
    return is_known and not any(_is_watched(part) for part in [blocks, *parts]) and not _drops_values(parts)


def class_token(network: Any, images: Tensor) -> Tensor:
    """The class token behind the final norm, (B, C), of normalised images (B, 3, H, W).

    network: one that `has_fast_class_token` accepts.
    """
    *blocks, last = network.blocks
    tokens = network.norm_pre(network._pos_embed(network.patch_embed(images)))
    for block in blocks:
        tokens = block(tokens)
    token = _through_block(last, tokens)
    return norm_after_pool(network)(network.norm(token))[:, 0]


def _through_block(block: Any, tokens: Tensor) -> Tensor:
    """The first token (B, 1, C) behind a block that reads tokens (B, N, C)."""
    token = tokens[:, :1]
    token = token + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(tokens))))
    return token + block.drop_path2(block.ls2(block.mlp(block.norm2(token))))


def _attend(attention: Any, tokens: Tensor) -> Tensor:
    """What timm's attention gives the first of the tokens (B, N, C), (B, 1, C)."""
    token, width = tokens[:, :1], attention.attn_dim
    sections = (width, 2 * width)
    weights = attention.qkv.weight.split(sections)
    biases = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split(sections)
    by_head = (attention.num_heads, attention.head_dim)
    query = F.linear(token, weights[0], biases[0]).unflatten(-1, by_head).transpose(1, 2)  # (B, H, 1, D)
    keys_values = F.linear(tokens, weights[1], biases[1]).unflatten(-1, (2, *by_head))
    key, value = keys_values.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
    query, key = attention.q_norm(query), attention.k_norm(key)
    if attention.fused_attn:
        attended = F.scaled_dot_product_attention(query, key, value)
    else:
        attended = (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    attended = attention.norm(attended.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        attended = attended * attention.gate(token).sigmoid()
    projected: Tensor = attention.proj(attended)
    return projected


def _is_watched(part: nn.Module) -> bool:
    """Whether something else than the part's own class has a say in what calling it does."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or "forward" in part.__dict__


def _drops_values(parts: list[nn.Module]) -> bool:
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts)
