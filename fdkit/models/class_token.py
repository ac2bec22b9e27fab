"""The class token of a vision transformer without the work of its last block that never reaches it.

Of the last block, the class token takes keys and values of all tokens; its queries, its projection and its MLP act on
one token at a time, so those of the patches are left out. The class token and all gradients stay the same.
Source: Vaswani et al. 2017, equation 1: a row of the attended values depends on its own query alone.
"""

from typing import Any

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

from fdkit.models.partial_block import block_rows
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
    token = block_rows(last, tokens, slice(0, 1))
    return norm_after_pool(network)(network.norm(token))[:, 0]


def _is_watched(part: nn.Module) -> bool:
    """Whether something else than the part's own class has a say in what calling it does."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or "forward" in part.__dict__


def _drops_values(parts: list[nn.Module]) -> bool:
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts)
