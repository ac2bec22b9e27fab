"""Images as patches of pixels, and a vision transformer that reads the visible ones alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone
from fdkit.models.tokens import norm_after_pool


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, h*w, P*P*3) of images (B, 3, H, W): patches row by row, in each the row, the column, then the channel.

    Source: facebookresearch/mae at efb2a80, models_mae.py.
    """
    height, width = (size // patch_size for size in images.shape[-2:])
    parts = images.unflatten(-1, (width, patch_size)).unflatten(-3, (height, patch_size))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The images (B, 3, h*P, w*P) whose patches (B, h*w, P*P*3) these are; grid: (h, w)."""
    patch_size = round((patches.shape[-1] / 3) ** 0.5)
    parts = patches.unflatten(1, grid).unflatten(-1, (patch_size, patch_size, 3))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """(B, K, C): rows[b, index[b, k]] of rows (B, L, C) and index (B, K)."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]


def patch_grid(backbone: Backbone) -> tuple[int, int]:
    """(h, w): rows and columns of the patches of an image."""
    side = backbone.image_size // backbone.patch_size
    return side, side


def require_maskable(backbone: Backbone) -> None:
    """Raises ConfigError unless patches can be left out: a plain vision transformer of timm, without dropped patches
    or attention pooling of its own, whose patches divide the image.
    """
    from timm.models.vision_transformer import VisionTransformer

    network: Any = backbone.network
    name = backbone.recipe.get("architecture", type(network).__name__)
    if type(network) is not VisionTransformer:
        raise ConfigError(
            f"{name} cannot leave out patches: only timm's plain vision transformers can",
            "use an architecture such as vit_base_patch16_224",
        )
    if not isinstance(network.patch_drop, nn.Identity) or network.attn_pool is not None:
        raise ConfigError(
            f"{name} drops patches or pools by attention itself, which has no place beside a mask",
            "leave patch_drop_rate out of the model's arguments, and global_pool at token or avg",
        )
    side = backbone.image_size
    if side % backbone.patch_size:
        raise ConfigError(
            f"an image of {side}x{side} pixels does not divide into patches of {backbone.patch_size}",
            f"use an image size of {max(1, round(side / backbone.patch_size)) * backbone.patch_size}",
        )


def encode_visible(backbone: Backbone, pixels: Tensor, visible: Tensor) -> Tensor:
    """Final tokens (B, P + V, C) of a plain vision transformer that sees the patches `visible` (B, V) alone.

    pixels: (B, 3, H, W) as `Backbone.normalise` gives them. Prefix tokens come first, after the final norm as all.
    A convolutional stem looks beyond a patch, so it reads the whole image, and its tokens are left out afterwards.
    """
    network: Any = backbone.network
    tokens = _embed(network, pixels.to(backbone.dtype), visible)
    prefix = [part for part in (network.cls_token, network.reg_token) if part is not None]
    num_prefix = sum(part.shape[1] for part in prefix)
    if network.pos_embed is not None:
        num_rows = network.pos_embed.shape[1]
        num_patches = num_rows if network.no_embed_class else num_rows - num_prefix
        prefix_rows, rows = network.pos_embed[0].split([num_rows - num_patches, num_patches])
        tokens = tokens + rows[visible]
        if len(prefix_rows) and prefix:
            prefix = [torch.cat(prefix, dim=1) + prefix_rows]
    tokens = torch.cat([*(part.expand(len(tokens), -1, -1) for part in prefix), tokens], dim=1)
    tokens = _run_blocks(network, network.norm_pre(network.pos_drop(tokens)))
    final: Tensor = norm_after_pool(network)(network.norm(tokens))
    return final


def _embed(network: Any, pixels: Tensor, visible: Tensor) -> Tensor:
    """Tokens (B, V, C) of the visible patches, without positions."""
    from timm.layers import PatchEmbed

    embed, projection = network.patch_embed, network.patch_embed.proj
    if type(embed) is PatchEmbed:
        # A convolution whose stride is its kernel is a linear map of each patch: hidden ones need not be computed.
        seen = take_rows(patchify(pixels, embed.patch_size[0]), visible)
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens: Tensor = embed.norm(F.linear(seen, weight, projection.bias))
        return tokens
    tokens = embed(pixels)
    return take_rows(tokens.flatten(1, 2) if tokens.ndim == 4 else tokens, visible)


def _run_blocks(network: Any, tokens: Tensor) -> Tensor:
    from timm.models import checkpoint_seq

    is_saving = network.grad_checkpointing and torch.is_grad_enabled()
    output: Tensor = checkpoint_seq(network.blocks, tokens) if is_saving else network.blocks(tokens)
    return output
