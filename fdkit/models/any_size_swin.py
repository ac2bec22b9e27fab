"""Swins that take images of several sizes, such as the small crops of multi-crop, as EsViT's network does.

A window keeps the size it was built with. A map that does not divide into windows is padded with zeros at its bottom
and right, which takes part in attention, and cut afterwards. EsViT pads before it shifts a map; timm's own way to other
sizes (`strict_img_size=False`) shifts first, and so mixes other places of a map that needs padding. Everything else
timm does alike: the masks of the padded map, and a merging of patches that pads odd maps.
Source: microsoft/esvit at 2d6becd, models/swin_transformer.py (SwinTransformerBlock.forward, PatchMerging.forward).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from fdkit.errors import ConfigError


def take_any_size(network: nn.Module, sizes: Sequence[int]) -> None:
    """Lets a timm Swin (version 1) take square images of further sizes, in pixels, in place.

    Parameters and their names stay, and so does what the network makes of images of its own size.
    Raises ConfigError for sizes that are no whole number of patches, and for a network whose own size needs padding:
    plain timm would run the exported weights otherwise than they were trained.
    """
    if not isinstance(network, SwinTransformer):
        raise ConfigError(
            f"{type(network).__name__} takes images of one size alone, not of {_listed(sizes)} pixels as well",
            "choose a Swin of version 1, a ViT or a ResNet, or leave the small crops out",
        )
    embed: Any = network.patch_embed
    patch = embed.patch_size[0]
    if uneven := [size for size in sizes if size % patch or size < patch]:
        raise ConfigError(
            f"image size {_listed(uneven)} is no whole number of patches: the Swin reads {patch}x{patch} pixels each",
            f"use a multiple of {patch} for views.local_size",
        )
    _check_own_size(network, embed.img_size[0])
    embed.strict_img_size = False
    for block in network.modules():
        if type(block) is SwinTransformerBlock:
            # A changed class, unlike a changed method, survives a deep copy such as a momentum encoder's.
            block.__class__ = AnySizeBlock
            block.dynamic_mask = True
            block.masks = {}


class AnySizeBlock(SwinTransformerBlock):
    """timm's Swin block, on maps of any size in EsViT's way."""

    masks: dict[tuple[Any, ...], Tensor | None]
    """Of the padded maps met so far: timm would make a mask anew in every forward pass."""

    def _attn(self, x: Tensor) -> Tensor:
        """Attended map (B, H, W, C) of a map (B, H, W, C); once padded, it divides into windows."""
        height, width = x.shape[1:3]
        rows, columns = (
            -side % window for side, window in zip((height, width), self.window_size, strict=True)
        )
        if not rows and not columns:
            return super()._attn(x)
        return super()._attn(F.pad(x, (0, 0, 0, columns, 0, rows)))[:, :height, :width]

    def get_attn_mask(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
        """(windows, N, N): 0 between places of a window that lay together before the shift, else -100; or None."""
        if x is None:
            return super().get_attn_mask(x, *args, **kwargs)
        key = (*x.shape[1:3], *self.window_size, *self.shift_size, x.device, x.dtype)
        if key not in self.masks:
            with torch.inference_mode(False):  # a mask made for evaluation is used in training too
                self.masks[key] = super().get_attn_mask(x)
        return self.masks[key]


def _check_own_size(network: SwinTransformer, size: int) -> None:
    """Raises ConfigError if a shifted map of the network's own size does not divide into windows."""
    for stage in network.layers:
        for block in stage.blocks:
            side, window = block.input_resolution[0], block.window_size[0]
            if side % window and any(block.shift_size):
                raise ConfigError(
                    f"image size {size}: a {side}x{side} map does not divide into {window}x{window} windows",
                    "change views.image_size, or window_size among the model arguments",
                )


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(str(size) for size in sizes)
