"""How far each head looks: the mean distance, in input pixels, between a patch and what it attends to.

Heads that all look equally far in a deep layer do the same work; heads spread over many distances are diverse.
Feature distillation is known to spread them in deep layers.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._figure import BLUE, GREY, NARROW, ORANGE, WIDE, columns_of, in_style, panels, wrapped
from fdkit.analysis.observe import (
    Observed,
    backbone_of,
    num_attended_prefix_tokens,
    observe_attention,
)
from fdkit.config import Config
from fdkit.errors import ConfigError, DataError
from fdkit.models.patches import patch_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class AttentionDistanceConfig(Config):
    """How attention distance is measured."""

    renormalise: bool = True
    """Attention among patches is scaled to sum to 1, so that attention to class and register tokens, which have no
    place in the image, does not shorten distances; false keeps it as the softmax gave it."""
    num_images: int = Field(default=128, ge=1)
    """Images averaged over, the first ones of the data."""
    batch_size: int = Field(default=8, ge=1)
    """Images a forward pass; memory grows with it, and not with the number of images."""


def patch_distances(grid: tuple[int, int], patch_size: float) -> Tensor:
    """Euclidean distances between patch centres, in pixels; (h*w, h*w) float32, row-major.

    grid: (h, w), rows and columns of patches; patch_size: pixels between neighbouring patches.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).double()
    offsets = places[:, None] - places[None]
    return (patch_size * offsets.norm(dim=-1)).float()


def attention_distance(
    attention: Tensor, distances: Tensor, *, num_prefix_tokens: int, renormalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean distance from a query patch to what it attends to, and mean attention to prefix tokens; both (H,) float64.

    attention: (B, H, N, N), softmax over the last axis, prefix tokens first; prefix tokens' rows and columns are
    dropped. distances: (n, n) between the n = N - num_prefix_tokens patches; the mean has its unit.
    renormalise: rows are scaled to sum to 1 once the prefix columns are gone; a row with no attention left counts 0.
    Raises ValueError if N does not fit.
    Source: Dosovitskiy et al. 2021, appendix D.7, which leaves open how the class token is treated.
    """
    num_patches = attention.shape[-1] - num_prefix_tokens
    if distances.shape != (num_patches, num_patches):
        raise ValueError(
            f"distances are {tuple(distances.shape)}, but {attention.shape[-1]} tokens with "
            f"{num_prefix_tokens} prefix tokens leave {num_patches} patches"
        )
    batch_size, num_heads = attention.shape[:2]
    among_patches = attention[..., num_prefix_tokens:, num_prefix_tokens:].float()
    by_query = among_patches.flatten(0, 1).transpose(0, 1)  # (n, B*H, n): one matrix product a query, no copy
    weights = torch.stack([distances, torch.ones_like(distances)], dim=-1)  # (n, n, 2)
    distance, mass = torch.bmm(by_query, weights.to(by_query.device)).double().unbind(-1)  # (n, B*H) each
    if renormalise:
        distance = distance / mass.clamp_min(torch.finfo(torch.float32).tiny)
    shape = (num_patches, batch_size, num_heads)
    return distance.view(shape).mean((0, 1)).cpu(), 1 - mass.view(shape).mean((0, 1)).cpu()


def analyze(observed: Sequence[Observed], config: AttentionDistanceConfig) -> Analysis:
    """Attention distance of every head of every model, averaged over images; memory does not grow with their number.

    The numbers hold, for each model, "distance" as [[a number a head] a layer] in pixels of the model's own input,
    its "mean" and "head_std" over the heads of a layer, "prefix_attention" in the same layout as "distance", and
    "uniform_distance", the distance if every patch attended to all patches alike.
    Raises ConfigError if a model's attention cannot be read, DataError if there are no images.
    """
    if not observed:
        raise ConfigError("attention distance needs a model")
    numbers = {
        "analysis": "attention-distance",
        "unit": "pixel",
        "renormalised": config.renormalise,
        "models": [_measure(one, config) for one in observed],
    }
    return Analysis(numbers, partial(draw, numbers))


def _measure(observed: Observed, config: AttentionDistanceConfig) -> dict[str, Any]:
    backbone = backbone_of(observed.model)
    distances = patch_distances(patch_grid(backbone), backbone.patch_size)
    sums, num_images = _sum_over_images(observed, distances, config)
    if num_images == 0:
        raise DataError(f"there are no images to observe {observed.name} on")
    per_layer = [one / num_images for one in sums]
    return {
        "name": observed.name,
        "distance": [distance.tolist() for distance, _ in per_layer],
        "mean": [distance.mean().item() for distance, _ in per_layer],
        "head_std": [distance.std(correction=0).item() for distance, _ in per_layer],
        "prefix_attention": [prefix.tolist() for _, prefix in per_layer],
        "uniform_distance": distances.double().mean().item(),
        "patch_size": backbone.patch_size,
        "image_size": backbone.image_size,
        "num_images": num_images,
    }


def _sum_over_images(
    observed: Observed, distances: Tensor, config: AttentionDistanceConfig
) -> tuple[list[Tensor], int]:
    """For each layer, (2, H): distance and prefix attention summed over images; and the number of images."""
    backbone = backbone_of(observed.model)
    distances = distances.to(backbone.mean.device)
    num_prefix_tokens = num_attended_prefix_tokens(backbone)
    sums: list[Tensor] = []
    num_images = 0

    def add(layer: int, attention: Tensor) -> None:
        means = attention_distance(
            attention, distances, num_prefix_tokens=num_prefix_tokens, renormalise=config.renormalise
        )
        if layer == len(sums):
            sums.append(torch.zeros(2, attention.shape[1], dtype=torch.float64))
        # In place: small tensors made between large ones would keep the allocator from reusing memory.
        sums[layer] += len(attention) * torch.stack(means)

    for images in observed.batches:
        images = images[: config.num_images - num_images]
        observe_attention(observed.model, images, add)
        num_images += len(images)
        if num_images >= config.num_images:
            break
    return sums, num_images


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; the mean over heads of every layer."""
    models = numbers["models"]
    header = ["layer", *(model["name"] for model in models)]
    rows = [
        [str(layer + 1), *(_mean_of_heads(model, layer) for model in models)]
        for layer in range(max(len(model["mean"]) for model in models))
    ]
    return f"{numbers['analysis']}, {numbers['unit']}s, mean of heads ± spread", [header, *rows]


def _mean_of_heads(model: dict[str, Any], layer: int) -> str:
    """Empty for a layer that the model does not have."""
    if layer >= len(model["mean"]):
        return ""
    return f"{model['mean'][layer]:.1f} ± {model['head_std'][layer]:.1f}"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Distance over depth, a panel a model with one distance axis for all: a dot a head, a line for their mean.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    figure, axes = panels(len(models), width=width, share_y=True)
    for place, model in zip(axes, models, strict=True):
        _draw_model(place, model)
        place.set_title(wrapped(model["name"], figure))
    highest = max(max(max(heads) for heads in model["distance"]) for model in models)
    uniform = max(model["uniform_distance"] for model in models)
    axes[0].set_ylim(0, 1.08 * max(highest, uniform))
    for place in axes[:: columns_of(figure)]:
        place.set_ylabel("attention distance (pixels)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if width > NARROW else 2)
    return figure


def _draw_model(axes: "Axes", model: dict[str, Any]) -> None:
    layers = range(1, len(model["distance"]) + 1)
    depths = [layer for layer, heads in zip(layers, model["distance"], strict=True) for _ in heads]
    values = [value for heads in model["distance"] for value in heads]
    axes.axhline(
        model["uniform_distance"], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="uniform attention"
    )
    axes.scatter(depths, values, s=20, color=BLUE, alpha=0.55, linewidths=0, zorder=2, label="a head")
    axes.plot(layers, model["mean"], color=ORANGE, linewidth=2, zorder=3, label="mean of heads")
    axes.set_xlabel("layer")
    axes.set_xlim(0.4, len(layers) + 0.6)
    axes.locator_params(axis="x", integer=True)
