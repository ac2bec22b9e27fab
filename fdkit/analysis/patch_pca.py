"""What patches say, as colours: the first three principal components of a model's patch tokens.

They stand for red, green and blue. Patches of one colour say the same to the model, in one image or in several, so that
parts of objects appear without any label. Components are fitted for each model on all images shown; models have
components of their own, so that colours compare within a model and not between models. Optionally the first component
separates the foreground from the background, and the colours are those of the foreground alone.
Source: Oquab et al. 2023 (DINOv2, arXiv 2304.07193), figure 1 and the paragraph on PCA of patch features.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._features import need_models
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure
from fdkit.analysis._moments import Moments
from fdkit.analysis._pictures import exact_to_text, image_from_text, to_pixels
from fdkit.analysis._targets import final_tokens
from fdkit.analysis._tiles import small_picture
from fdkit.analysis.observe import Images, Observed, backbone_of, first_images, observe_layers
from fdkit.config import Config
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Tokens
from fdkit.models.layers import layer_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READING = (
    "Patches of one colour say the same to that model: parts of objects that keep their colour from image to image are "
    "told apart without labels, and noise or stripes without objects mean that places, not contents, rule; colours "
    "cannot be compared between models, and the percentage is the variance that they show."
)
KEEPS_COLOURS = True
NUM_COMPONENTS = 3
BACKGROUND = 230
"""Grey of what is not foreground, of 255."""
TILE = 168
"""Pixels of a tile's side in the figure."""
GAP = 8
LARGEST_CELL = 1.5
"""Inches that a tile takes at most."""


class PatchPcaConfig(Config):
    """Which patch tokens are shown as colours."""

    layer: int | None = None
    """Layer whose tokens are shown, from 0, or from the end if negative, as it leaves them; left out, the final tokens
    after the final norm."""
    foreground: bool = False
    """Colour the foreground alone: the side of the first component that the images' borders hold less of."""
    num_images: int = Field(default=6, ge=1, le=64)
    """Images shown, drawn from the data with the seed; the components are fitted on them."""
    batch_size: int = Field(default=8, ge=1)
    """Images a forward pass."""


class Components(NamedTuple):
    """The directions in which rows vary most, float64."""

    mean: Tensor
    """(C,)."""
    directions: Tensor
    """(3, C): orthonormal, most variance first; the entry of largest size is positive, which settles the sign."""
    explained_variance: list[float]
    """Of each, as a share of all variance."""

    def scores(self, rows: Tensor) -> Tensor:
        """(..., 3) of rows (..., C)."""
        return (rows.double() - self.mean) @ self.directions.T


def analyze(observed: Sequence[Observed], config: PatchPcaConfig) -> Analysis:
    """The first three principal components of each model's patch tokens over the images shown, as colours.

    The numbers hold "images", each with its "index", "description" and small "picture" (the first model's crop, JPEG in
    base64), and for each model its "grid", "explained_variance" of the three components, "pictures", one an image and
    one pixel a patch (PNG in base64), and "foreground_share" of the patches where the foreground is asked for. A
    component spreads over its colour from the 1st to the 99th percentile of all patches.
    Each model sees its own evaluation crop. Memory holds the patch tokens of the images shown.
    Raises ConfigError for a layer that is not there, fewer than 3 channels or patches, DataError without images or a
    foreground, NumericsError for tokens that are not finite or all alike.
    """
    need_models(observed, "patch-pca")
    tables = [_measure(one, config) for one in observed]
    images = [table.pop("images") for table in tables]
    for table, own in zip(tables, images, strict=True):
        if [one["index"] for one in own] != [one["index"] for one in images[0]]:
            raise DataError(
                f"{observed[0].name} and {table['name']} were given different images",
                "every model must be given the same images in the same order",
            )
    numbers = {
        "analysis": "patch-pca",
        "layer": config.layer,
        "foreground": config.foreground,
        "images": images[0],
        "models": tables,
    }
    return Analysis(numbers, partial(draw, numbers))


def _measure(observed: Observed, config: PatchPcaConfig) -> dict[str, Any]:
    patches: list[Tensor] = []
    images: list[dict[str, Any]] = []
    grid = (0, 0)
    for batch in first_images(observed, config.num_images):
        tokens = _tokens(observed, batch.pixels, config.layer)
        grid = tokens.grid
        patches.append(tokens.patches.cpu())
        images += _described(observed, batch, len(images))
    try:
        coloured = colours(torch.cat(patches).unflatten(1, grid), foreground=config.foreground)
    except (ConfigError, DataError, NumericsError) as error:
        raise type(error)(f"{observed.name}: {error.message}", error.hint) from error
    return {
        "name": observed.name,
        "num_images": len(images),
        "grid": list(grid),
        "explained_variance": coloured.components.explained_variance,
        "foreground_share": coloured.is_foreground.double().mean().item() if config.foreground else None,
        "pictures": [exact_to_text(picture) for picture in coloured.pictures],
        "images": images,
    }


def _tokens(observed: Observed, pixels: Tensor, layer: int | None) -> Tokens:
    if layer is None:
        return final_tokens(observed, pixels)
    (place,) = layer_positions(backbone_of(observed.model).network, [layer], norm=False)
    tokens = observe_layers(observed.model, pixels)[place]
    if not tokens.patches.isfinite().all():
        raise NumericsError(
            f"the tokens of layer {layer} of {observed.name} are not finite",
            "the weights may be damaged, or training has diverged",
        )
    return Tokens(tokens.prefix.float(), tokens.patches.float(), tokens.grid)


def _described(observed: Observed, batch: Images, start: int) -> list[dict[str, Any]]:
    indices = range(start, start + len(batch.pixels)) if batch.indices is None else batch.indices.tolist()
    return [
        {"index": index, "description": observed.describe(index), "picture": small_picture(image)}
        for index, image in zip(indices, batch.pixels, strict=True)
    ]


class Coloured(NamedTuple):
    """Patches as colours."""

    pictures: np.ndarray
    """(B, h, w, 3) uint8."""
    components: Components
    """Those that the colours show."""
    is_foreground: Tensor
    """(B, h, w) bool; all of them where no foreground was asked for."""


def colours(patches: Tensor, *, foreground: bool) -> Coloured:
    """Patch tokens (B, h, w, C) as colours, by components fitted on all of them, or on the foreground.

    Raises as `analyze`.
    """
    is_foreground = torch.ones(patches.shape[:3], dtype=torch.bool)
    if foreground:
        first = principal_components(patches.flatten(0, 2)).scores(patches)[..., 0]
        is_foreground = first * _side_of_the_middle(first) > 0
        if is_foreground.sum() <= NUM_COMPONENTS:
            raise DataError(
                f"only {int(is_foreground.sum())} patches are foreground, too few for {NUM_COMPONENTS} components",
                "show more images, or leave --foreground out",
            )
    rows = patches[is_foreground]
    components = principal_components(rows)
    scores = components.scores(rows)
    low, high = scores.quantile(torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    shares = ((scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)).clamp(0, 1)
    pictures = np.full((*patches.shape[:3], 3), BACKGROUND, dtype=np.uint8)
    pictures[is_foreground.numpy()] = to_pixels(shares.T[..., None])[:, 0]
    return Coloured(pictures, components, is_foreground)


def _side_of_the_middle(first: Tensor) -> float:
    """1 or -1: the sign of the first component (B, h, w) that borders have less of than the images as a whole, whose
    mean is 0; objects stand in the middle more often than at the border.
    """
    is_border = torch.ones(first.shape[1:], dtype=torch.bool)
    is_border[1:-1, 1:-1] = False
    return -1.0 if first[:, is_border].mean() > 0 else 1.0


def principal_components(rows: Tensor) -> Components:
    """The first three principal components of rows (M, C), with M > 3 and C >= 3.

    Raises ConfigError for fewer rows or channels, NumericsError for rows that are all alike.
    """
    if min(len(rows) - 1, rows.shape[1]) < NUM_COMPONENTS:
        raise ConfigError(
            f"{len(rows)} patches of {rows.shape[1]} channels have no {NUM_COMPONENTS} principal components",
            "show more images, or a layer with more channels",
        )
    moments = Moments(rows.shape[1])
    moments.add(rows)
    values, vectors = torch.linalg.eigh(moments.covariance())  # smallest first
    total = values.clamp_min(0).sum()
    if total <= torch.finfo(torch.float32).eps ** 2 * moments.mean.square().sum():
        raise NumericsError("the patch tokens are all alike: there is nothing to show")
    directions = vectors.T.flip(0)[:NUM_COMPONENTS]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    shares = values.flip(0)[:NUM_COMPONENTS].clamp_min(0) / total
    return Components(moments.mean, directions * largest.sign(), shares.tolist())


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """Nothing: the picture says it."""
    return {}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    header = ["model", "patches", "1st", "2nd", "3rd component"]
    rows = [
        [
            model["name"],
            "{}x{}".format(*model["grid"]),
            *(f"{100 * share:.1f} %" for share in model["explained_variance"]),
        ]
        for model in numbers["models"]
    ]
    tokens = "final patch tokens" if numbers["layer"] is None else f"patch tokens of layer {numbers['layer']}"
    kept = ", foreground" if numbers["foreground"] else ""
    return f"patch-pca, explained variance of {tokens}{kept}", [header, *rows]


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """A row an image and a column a model, beside the image; columns that do not fit the width stand below, and where
    there are few, the later images stand beside the first.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    num_blocks = math.ceil(len(models) / (6 if width > NARROW else 3))
    across = math.ceil(len(models) / num_blocks)
    blocks = [models[start : start + across] for start in range(0, len(models), across)]
    num_groups = min(len(numbers["images"]), max(1, int(width // ((1 + across) * LARGEST_CELL))))
    num_rows = math.ceil(len(numbers["images"]) / num_groups)
    cell = min((width - 0.1) / ((1 + across) * num_groups), LARGEST_CELL)
    titles = [["image", *(_title(model, round(11 * cell)) for model in block)] for block in blocks]
    lines = [max(title.count("\n") + 1 for title in block) for block in titles]
    heights = [num_rows * cell + 0.17 * count + 0.1 for count in lines]
    figure = new_figure(width, sum(heights))
    places = figure.subplots(num_blocks, 1, squeeze=False, height_ratios=heights)[:, 0]
    pictures = [image_from_text(image["picture"]) for image in numbers["images"]]
    for place, block, title in zip(places, blocks, titles, strict=True):
        columns = [pictures, *([image_from_text(text) for text in model["pictures"]] for model in block)]
        starts = range(0, num_groups * num_rows, num_rows)
        tiles = [column[start : start + num_rows] for start in starts for column in columns]
        _show(place, _canvas(tiles, (1 + across) * num_groups), title * num_groups)
    return figure


def _show(axes: "Axes", canvas: np.ndarray, titles: Sequence[str]) -> None:
    axes.imshow(canvas, interpolation="antialiased", aspect="equal")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    centres = [number * (TILE + GAP) + TILE / 2 for number in range(len(titles))]
    axes.set_xticks(centres, titles, linespacing=1.1)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5, pad=2)
    axes.set_yticks([])


def _title(model: dict[str, Any], letters: int) -> str:
    """The name, broken behind its marks, over the variance that is shown."""
    lines = [""]
    for part in re.findall(r"[^-_./ ]*[-_./ ]?", model["name"]):
        if lines[-1] and len(lines[-1] + part) > letters:
            lines.append("")
        lines[-1] += part
    share = 100 * sum(model["explained_variance"])
    return "\n".join([*(textwrap.fill(line, width=letters) for line in lines), f"{share:.0f} %"])


def _canvas(columns: Sequence[Sequence[np.ndarray]], count: int) -> np.ndarray:
    """Pictures (h, w, 3) of any size as tiles on white, patches as squares; `count` columns wide."""
    step = TILE + GAP
    canvas = np.full((len(columns[0]) * step - GAP, count * step - GAP, 3), 255, dtype=np.uint8)
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures):
            lines, places = (np.arange(TILE) * size // TILE for size in picture.shape[:2])
            tile = picture[lines[:, None], places]
            canvas[row * step : row * step + TILE, column * step : column * step + TILE] = tile
    return canvas
