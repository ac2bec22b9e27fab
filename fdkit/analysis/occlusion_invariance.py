"""How little a model's representation changes when parts of the image are hidden, layer by layer.

Kong and Zhang 2022 (arXiv 2208.04164) read masked image modelling as learning features that occlusion leaves alike. The
measure, by definition here, is linear CKA between what a layer says of whole images and of the same images with random
cells hidden: 1 where the images keep their places to each other, and near 0 where these are lost.
Cells are hidden in the pixels, as every model can be shown them, and are squares of the image, not of a model's own
patches, so that all models see the same parts of the same images.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._cka import SMALLEST_BATCH, MinibatchCKA
from fdkit.analysis._depth import model_legend
from fdkit.analysis._features import POOLING_WORDS, FeatureConfig, layer_features, need_models
from fdkit.analysis._figure import NARROW, WIDE, columns_of, in_style, panels, wrapped
from fdkit.analysis._lines import draw_over_depth
from fdkit.analysis.observe import Observed, backbone_of, first_images
from fdkit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "A line near 1 belongs to a model that tells the images apart alike with and without the hidden parts, as training "
    "on masked images is to teach, and where it falls, the representation of that depth hangs on what was hidden; a "
    "model that sees little but mean colours stays near 1 too, so read it beside accuracy."
)


class OcclusionInvarianceConfig(FeatureConfig):
    """What is hidden, and which vector of a layer stands for an image."""

    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(0.25, 0.5, 0.75), min_length=1)
    """Shares of the cells that are hidden; of one image, what a smaller share hides a larger one hides too."""
    cells: int = Field(default=14, ge=2)
    """Cells along each side of the image: 14 are patches of 16 pixels in an image of 224."""
    fill: Literal["model", "visible"] = "model"
    """Colour of what is hidden: model, the mean that the model subtracts from its input, the same for all images; or
    visible, the mean of what stays visible of the image. The mean of the whole image would tell of what is hidden."""
    mask_seed: int = Field(default=0, ge=0)
    """Seed of the masks, which are the same for all models."""
    num_images: int = Field(default=256, ge=SMALLEST_BATCH)
    """Images read, drawn from the data with the seed."""
    batch_size: int = Field(default=32, ge=SMALLEST_BATCH)
    """Images a forward pass and a minibatch of CKA, at least 4; a last minibatch of fewer is left out."""


def analyze(observed: Sequence[Observed], config: OcclusionInvarianceConfig) -> Analysis:
    """Linear CKA between each layer's features of whole and of occluded images, for every share hidden.

    The numbers hold "ratios" and, for each model, "cka" as [[a number a layer] a ratio], null where a layer says the
    same of all images. The estimate is that of unbiased HSIC over minibatches, see `_cka`. Memory holds one minibatch's
    features and a B x B matrix for each layer and ratio, and does not grow with the number of images.
    Raises ConfigError for ratios that hide no cell or all, images smaller than the cells, a model whose layers are not
    known or without the class token asked for; DataError for fewer than 4 images; NumericsError for features that are
    not finite.
    """
    need_models(observed, "occlusion-invariance")
    _check(observed, config)
    numbers = {
        "analysis": "occlusion-invariance",
        "unit": "CKA",
        "ratios": list(config.ratios),
        "cells": config.cells,
        "fill": config.fill,
        "pooling": config.pooling,
        "models": [_measure(one, config) for one in observed],
    }
    return Analysis(numbers, partial(draw, numbers))


def _check(observed: Sequence[Observed], config: OcclusionInvarianceConfig) -> None:
    from fdkit.models.masking import (
        check_mask,
    )  # here and below, for a second that a report does not have to wait

    if len(set(config.ratios)) < len(config.ratios):
        raise ConfigError(f"a ratio is named twice: {' '.join(map(str, config.ratios))}", "name each once")
    for ratio in config.ratios:
        check_mask((config.cells, config.cells), "random", ratio)
    for one in observed:
        side = backbone_of(one.model).image_size
        if side < config.cells:
            raise ConfigError(
                f"{one.name} sees {side}x{side} pixels, which {config.cells} cells a side do not fit in",
                f"use --cells {side} or fewer",
            )


def _measure(observed: Observed, config: OcclusionInvarianceConfig) -> dict[str, Any]:
    from fdkit.models.masking import draw_noise

    generator = torch.Generator().manual_seed(config.mask_seed)
    cka: MinibatchCKA | None = None
    for pixels in _minibatches(observed, config):
        noise = draw_noise(
            len(pixels), (config.cells, config.cells), sampling="random", mask_ratio=0.5, generator=generator
        )
        whole = layer_features(observed, pixels, config.pooling)
        occluded = [
            features
            for ratio in config.ratios
            for features in layer_features(
                observed, _occluded(observed, pixels, noise, ratio, config), config.pooling
            )
        ]
        cka = cka or MinibatchCKA(len(whole), len(occluded))
        cka.add(whole, occluded)
    assert cka is not None, "first_images gives enough images or raises"
    num_layers = len(cka.value())
    by_ratio = cka.value().unflatten(1, (-1, num_layers)).diagonal(dim1=0, dim2=2)  # (ratios, layers)
    return {
        "name": observed.name,
        "num_images": cka.num_images,
        "num_layers": num_layers,
        "ratios": list(config.ratios),
        "cka": [[None if one != one else one for one in row] for row in by_ratio.tolist()],
    }


def _minibatches(observed: Observed, config: OcclusionInvarianceConfig) -> Iterator[Tensor]:
    """Images (B, 3, H, W) in minibatches of one size, however they come; the last may be smaller, but not than 4."""
    waiting: list[Tensor] = []
    for images in first_images(observed, config.num_images, at_least=SMALLEST_BATCH):
        waiting += images.pixels
        while len(waiting) >= config.batch_size:
            yield torch.stack(waiting[: config.batch_size])
            waiting = waiting[config.batch_size :]
    if len(waiting) >= SMALLEST_BATCH:
        yield torch.stack(waiting)


def _occluded(
    observed: Observed, pixels: Tensor, noise: Tensor, ratio: float, config: OcclusionInvarianceConfig
) -> Tensor:
    from fdkit.models.masking import num_visible, split_patches

    hidden = split_patches(noise, num_visible(config.cells**2, ratio)).is_hidden()
    hidden = hidden.unflatten(1, (config.cells, config.cells)).to(pixels.device)
    colour = backbone_of(observed.model).mean.to(pixels.dtype) if config.fill == "model" else None
    return occlude(pixels, hidden, colour)


def occlude(pixels: Tensor, hidden: Tensor, colour: Tensor | None) -> Tensor:
    """Images (B, 3, H, W) with a colour in the hidden cells.

    hidden: (B, h, w) bool, cells that share the image evenly, to the pixel, not all of them; colour: (3, 1, 1), or None
    for the mean of each image's visible pixels.
    """
    rows, columns = (
        torch.arange(size, device=pixels.device) * count // size
        for size, count in zip(pixels.shape[2:], hidden.shape[1:], strict=True)
    )
    is_hidden = hidden[:, None, rows[:, None], columns]
    if colour is None:
        num_pixels = (~is_hidden).sum((2, 3), keepdim=True)
        colour = pixels.masked_fill(is_hidden, 0).sum((2, 3), keepdim=True) / num_pixels
    return torch.where(is_hidden, colour, pixels)


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """CKA of the last layer with and without what is hidden, for each share."""
    return {
        f"CKA of the last layer, {100 * ratio:g} % hidden": layers[-1]
        for ratio, layers in zip(model["ratios"], model["cka"], strict=True)
        if layers[-1] is not None
    }


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; a row a model, a column a ratio."""
    header = ["model", *(f"{100 * ratio:g} % hidden" for ratio in numbers["ratios"])]
    rows = [[model["name"], *(_shown(layers[-1]) for layers in model["cka"])] for model in numbers["models"]]
    words = POOLING_WORDS[numbers["pooling"]]
    return f"{numbers['analysis']}, CKA of the last layer's {words}, occluded with whole images", [
        header,
        *rows,
    ]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """CKA over relative depth: a panel a share hidden, in it a line a model; of one model, one panel, a line a share.

    numbers: as `analyze` gives them; width: inches.
    """
    models, ratios = numbers["models"], numbers["ratios"]
    is_alone = len(models) == 1
    figure, axes = panels(1 if is_alone else len(ratios), width=width, share_y=True)
    lowest = 0.0
    for row, ratio in enumerate(ratios):
        for number, model in enumerate(models):
            values = [float("nan") if one is None else one for one in model["cka"][row]]
            lowest = min([lowest, *(one for one in model["cka"][row] if one is not None)])
            place, line = (axes[0], row) if is_alone else (axes[row], number)
            draw_over_depth(place, line, values, label=_percent(ratio) if is_alone else model["name"])
        if not is_alone:
            axes[row].set_title(_percent(ratio))
    if is_alone:
        axes[0].set_title(wrapped(models[0]["name"], figure))
    axes[0].set_ylim(1.05 * lowest, 1.03)
    for place in axes[:: columns_of(figure)]:
        place.set_ylabel("CKA with whole images")
    for place in axes:
        place.set_xlabel("relative depth" if width > NARROW else "relative depth (1: last layer)")
    model_legend(figure, axes[0])
    return figure


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} % hidden"
