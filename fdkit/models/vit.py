"""Initialisation and fixed positions of timm's vision transformers, where a method asks for its own."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError


def sincos_position(grid: tuple[int, int], dim: int, *, first: Literal["row", "column"]) -> Tensor:
    """Fixed position embeddings of a grid of h x w patches, row-major; (h*w, dim) float32.

    One half of the channels encodes the row, the other the column, each as [sines, cosines] of dim / 4
    frequencies 10000^(-i / (dim / 4)). first: whose half comes first; MoCo v3 puts the row first, MAE the column,
    and taking one for the other transposes the image.
    Raises ConfigError if dim is not a multiple of 4. Source: Vaswani et al. 2017, section 3.5, along each axis.
    """
    if dim % 4:
        raise ConfigError(
            f"the width {dim} is not a multiple of 4, as 2-D sine-cosine positions need",
            'choose such a width, or position "learned"',
        )
    rows, columns = torch.meshgrid(*(torch.arange(size).float() for size in grid), indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(dim // 4).float() / (dim // 4))
    halves = []
    for index in (rows, columns) if first == "row" else (columns, rows):
        angles = index.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1)


def fix_position(network: Any, *, first: Literal["row", "column"]) -> None:
    """Give a timm vision transformer frozen sine-cosine positions, in place; 0 for prefix tokens."""
    grid, position = network.patch_embed.grid_size, network.pos_embed
    table = sincos_position(grid, position.shape[-1], first=first)
    with torch.no_grad():
        position.zero_()
        position[0, -len(table) :] = table
    position.requires_grad_(False)


@torch.no_grad()
def xavier_initialise(network: Any) -> None:
    """Initialise a timm vision transformer as MoCo v3 does, in place.

    Xavier-uniform matrices with query, key and value counted as three, and the patch projection as one matrix from
    3 * P^2 pixels; zero biases; a class token near zero (std 1e-6).
    Source: facebookresearch/moco-v3, vits.py.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            for matrix in module.weight.chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(matrix)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = patch_projection(network)
    if projection is not None:
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    if getattr(network, "cls_token", None) is not None:
        nn.init.normal_(network.cls_token, std=1e-6)


MAE_TOKEN_STD = 0.02


@torch.no_grad()
def mae_initialise(network: Any) -> None:
    """Initialise a timm vision transformer as MAE does, in place; fixed positions stay.

    Xavier-uniform matrices, query, key and value as one, and the patch projection as one matrix from P * P * 3 pixels,
    whose offset keeps the spread of torch's convolutions; no other offsets; prefix tokens of deviation 0.02.
    Source: facebookresearch/mae at efb2a80, models_mae.py.
    """
    xavier_linear_layers(network)
    projection = patch_projection(network)
    if projection is not None:
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        if projection.bias is not None:
            bound = projection.weight[0].numel() ** -0.5
            nn.init.uniform_(projection.bias, -bound, bound)
    for token in (network.cls_token, network.reg_token):
        if token is not None:
            nn.init.normal_(token, std=MAE_TOKEN_STD)


@torch.no_grad()
def xavier_linear_layers(module: nn.Module) -> None:
    """Xavier-uniform weights for every linear layer, query, key and value drawn as the one matrix they are; no bias.

    Source: facebookresearch/mae at efb2a80, models_mae.py.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def dino_initialise(network: Any) -> None:
    """Draw the class token of a timm vision transformer as DINO does, with deviation 0.02; the rest is timm's own.

    Source: facebookresearch/dino at 7c446df, vision_transformer.py.
    """
    if getattr(network, "cls_token", None) is not None:
        nn.init.trunc_normal_(network.cls_token, std=0.02)


def patch_projection(network: Any) -> nn.Conv2d | None:
    """The one convolution that makes patches into tokens; None for models that have no such layer."""
    projection = getattr(getattr(network, "patch_embed", None), "proj", None)
    return projection if isinstance(projection, nn.Conv2d) else None
