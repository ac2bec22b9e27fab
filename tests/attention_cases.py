"""Attention, models and images that tests of attention share."""

from functools import cache

import torch
from torch import Tensor

from fdkit.analysis.observe import Attention, Images, Observed, observe_attention
from fdkit.models.libraries import build_timm

GRID = (3, 5)


def global_attention(weights: Tensor, num_prefix_tokens: int = 0, grid: tuple[int, int] = GRID) -> Attention:
    """Weights (B, H, N, N) of all tokens to all, as they are observed."""
    prefix = torch.full((num_prefix_tokens,), -1)
    places = torch.cat([prefix, torch.arange(weights.shape[-1] - num_prefix_tokens)])
    return Attention(weights[:, None], places[None], grid, 16.0)


def random_attention(num_prefix_tokens: int, *, sharpness: float = 3.0, num_heads: int = 4) -> Attention:
    """Of 2 images on an oblong grid, the same each time."""
    num_tokens = num_prefix_tokens + GRID[0] * GRID[1]
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, num_heads, num_tokens, num_tokens, generator=generator)
    weights = (sharpness * scores).softmax(-1)
    return global_attention(weights, num_prefix_tokens)


def tiny(**args):
    """A ViT of 3 heads, 4 x 4 patches and a class token, whose attention is not uniform."""
    backbone = build_timm(
        "vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "embed_dim": 48, **args}
    ).eval()
    for block in backbone.network.blocks:
        block.attn.qkv.weight.data.mul_(8)
    return backbone


def tiny_swin(size: int = 72):
    """A Swin in windows of 4, every second block shifted; 2, then 4 heads.

    At 72 pixels its maps of 18 x 18 and 9 x 9 are padded; at 64, of 16 x 16 and 8 x 8, shifts join opposite edges.
    """
    args = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": size, "window_size": 4}
    backbone = build_timm("swin_tiny_patch4_window7_224", args).eval()
    for stage in backbone.network.layers:
        for block in stage.blocks:
            block.attn.qkv.weight.data.mul_(8)
    return backbone


@cache
def windows() -> tuple[Attention, ...]:
    """Of 2 images: 9 x 9 padded, 9 x 9 padded and shifted, 16 x 16 and 8 x 8 shifted."""
    torch.manual_seed(5)
    padded, even = (layers_of(observed(model=tiny_swin(size))) for size in (72, 64))
    return padded[2], padded[3], even[1], even[3]


def batches(images: Tensor, sizes: int | list[int] = 8) -> list[Images]:
    """The images, in batches of these sizes."""
    return [Images(part) for part in images.split(sizes)]


def observed(name: str = "m", model=None, count: int = 2, sizes: int | list[int] = 8) -> Observed:
    """A model with random images, the same each time."""
    model = tiny() if model is None else model
    size = model.image_size
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(7))
    return Observed(name, model, batches(images, sizes))


def layers_of(one: Observed) -> list[Attention]:
    """The attention of all its images in one batch, layer by layer."""
    seen: list[Attention] = []
    pixels = torch.cat([batch.pixels for batch in one.batches])
    observe_attention(one.model, pixels, lambda layer, attention: seen.append(attention))
    return seen
