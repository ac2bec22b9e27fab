"""Vision transformers that take images of several sizes as they are, such as the small crops of multi-crop.

A learned table of positions is resampled for the other grid of patches in every forward pass, so that all sizes train
it; fixed sines and cosines are made anew. timm's own `dynamic_img_size` resamples otherwise (with antialiasing).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone
from fdkit.models.stems import ConvStem
from fdkit.models.vit import sincos_position

Grid = tuple[int, int]
"""Rows and columns of patches."""


def take_any_size(backbone: Backbone, sizes: Sequence[int]) -> None:
    """Lets a backbone take square images of further sizes, in pixels, without resizing them, in place.

    Parameters and their names stay, and so does what the network makes of images of its own size. A network of
    convolutions takes any size as it is.
    Raises ConfigError for sizes that are no whole number of patches, and for transformers that are bound to one size.
    """
    network: Any = backbone.network
    if type(network) is VisionTransformer:
        _check_sizes(network, sizes)
        _free(network)
    elif _is_bound_to_its_size(network):
        from fdkit.models import any_size_swin

        any_size_swin.take_any_size(network, sizes)
    backbone.sizes = tuple(sizes)


def resample_by_scale(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """A position table (1, h*w, D), row-major and without prefix tokens, for another grid; differentiable.

    Bicubic, without antialiasing, by the factor (new + 0.1) / old, so a little off the new grid's own points; in
    float32 or finer. At its own grid the table stays as it is.
    Source: facebookresearch/dino at 7c446df, vision_transformer.py, interpolate_pos_encoding.
    """
    if old == new:
        return table
    values = table.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, old)
    factors = [(target + 0.1) / source for source, target in zip(old, new, strict=True)]
    resampled = F.interpolate(values.permute(0, 3, 1, 2), scale_factor=factors, mode="bicubic")
    return resampled.flatten(2).transpose(1, 2).to(table.dtype)


class AnySizeViT(VisionTransformer):
    """timm's vision transformer, on square images of any whole number of patches."""

    is_position_fixed: bool
    """Whether the table of positions does not train; asked of the network itself, not of a momentum copy."""
    fixed_tables: dict[tuple[Any, ...], Tensor]
    """Of the other grids met so far, where positions are fixed."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Tokens (B, P + h*w, D), prefix first, with their positions, of patches (B, h*w, D)."""
        own: Grid = self.patch_embed.grid_size
        side = math.isqrt(x.shape[1])
        if self.pos_embed is None or x.shape[1] == own[0] * own[1]:
            return super()._pos_embed(x)
        assert side**2 == x.shape[1], f"{x.shape[1]} patches are no square"
        num_prefix = self.pos_embed.shape[1] - own[0] * own[1]
        prefix, table = self.pos_embed.split([num_prefix, own[0] * own[1]], dim=1)
        patches = x + self._position(table, own, (side, side))
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return self.pos_drop(patches)
        first = torch.cat(tokens, dim=1)
        first = (first + prefix if num_prefix else first).expand(len(x), -1, -1)
        return self.pos_drop(torch.cat([first, patches], dim=1))

    def _position(self, table: Tensor, own: Grid, grid: Grid) -> Tensor:
        """(1, h*w, D): the table of the network's own grid for another one."""
        if not self.is_position_fixed:
            return resample_by_scale(table, own, grid)
        key = (grid, table.device, table.dtype)
        if key not in self.fixed_tables:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # made for evaluation, it is used in training too
                self.fixed_tables[key] = _fixed_position(table.clone(), own, grid)
        return self.fixed_tables[key]


class AnySizeConvStem(ConvStem):
    """A convolutional stem on images of any whole number of patches."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, h*w, D) of images (B, C, H, W)."""
        features: Tensor = self.proj(x)
        return self.norm(features.flatten(2).transpose(1, 2) if self.flatten else features)


def _free(network: Any) -> None:
    """Turns a timm vision transformer, and its stem, into forms that take any size."""
    # A changed class, unlike a changed method, survives a deep copy such as a momentum encoder's.
    network.__class__ = AnySizeViT
    network.is_position_fixed = network.pos_embed is not None and not network.pos_embed.requires_grad
    network.fixed_tables = {}
    if isinstance(network.patch_embed, ConvStem):
        network.patch_embed.__class__ = AnySizeConvStem
    else:
        network.patch_embed.strict_img_size = False


def _fixed_position(table: Tensor, own: Grid, grid: Grid) -> Tensor:
    """Sines and cosines of another grid, in the order that the table has; any other fixed table is resampled."""
    orders: tuple[Literal["row", "column"], ...] = ("row", "column")
    for first in orders:
        if torch.allclose(sincos_position(own, table.shape[-1], first=first).to(table), table[0], atol=1e-4):
            return sincos_position(grid, table.shape[-1], first=first).to(table)[None]
    return resample_by_scale(table, own, grid)


def _is_bound_to_its_size(network: nn.Module) -> bool:
    """Whether timm states so."""
    return bool(getattr(network, "pretrained_cfg", {}).get("fixed_input_size"))


def _check_sizes(network: Any, sizes: Sequence[int]) -> None:
    patch = network.patch_embed.patch_size[0]
    if uneven := [size for size in sizes if size % patch or size < patch]:
        listed = " and ".join(str(size) for size in uneven)
        raise ConfigError(
            f"image size {listed} is no whole number of patches: the network reads {patch}x{patch} pixels each",
            f"use a multiple of {patch}",
        )
    if network.dynamic_img_size:
        raise ConfigError(
            "network.model_args.dynamic_img_size resamples positions in timm's way, not in DINO's",
            "leave it out; all sizes of the views are taken as they are",
        )
