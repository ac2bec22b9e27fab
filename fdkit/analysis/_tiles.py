"""Many small pictures in one panel: images, and where a model looks in them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.analysis._pictures import image_to_text, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 160
"""Pixels of a tile's side."""
GAP = 12
LABEL = 0.16
"""Inches above a tile, for its label."""


class Tile(NamedTuple):
    """A picture and what stands above it."""

    label: str
    pixels: np.ndarray
    """(SIDE, SIDE, 3) uint8."""


def small_picture(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as text, SIDE pixels wide and high or less."""
    side = min(SIDE, *image.shape[-2:])
    shrunk = F.interpolate(image[None].float(), size=(side, side), mode="bicubic", antialias=True)
    return image_to_text(to_pixels(shrunk[0].clamp(0, 1)), quality=90)


def image_tile(label: str, pixels: np.ndarray) -> Tile:
    """A picture (h, w, 3) uint8 as a tile."""
    return Tile(label, _resized(pixels.astype(np.float32) / 255, "bicubic"))


def heat_tile(label: str, values: np.ndarray) -> Tile:
    """Numbers (h, w) of at least 0 as a tile, dark for 0 to bright for the largest; patches stay squares."""
    from matplotlib import colormaps

    shares = values / max(float(values.max()), np.finfo(np.float32).tiny)
    return Tile(label, _resized(colormaps["inferno"](shares)[..., :3].astype(np.float32), "nearest"))


def over_tile(label: str, pixels: np.ndarray, values: np.ndarray) -> Tile:
    """The picture (h, w, 3) uint8, in grey and darkened except where the numbers (h, w) are large."""
    from matplotlib import colormaps

    shares = values / max(float(values.max()), np.finfo(np.float32).tiny)
    smooth = _resized(np.repeat(shares[..., None], 3, axis=2).astype(np.float32), "bilinear")[..., 0] / 255
    heat = colormaps["inferno"](smooth)[..., :3] * 255
    grey = image_tile(label, pixels).pixels.mean(axis=2, keepdims=True)
    return Tile(label, np.round(0.35 * grey + 0.65 * heat).astype(np.uint8))


def _resized(picture: np.ndarray, mode: str) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 of a picture (h, w, 3) in [0, 1]."""
    channels = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]
    grown = F.interpolate(channels, size=(SIDE, SIDE), mode=mode)
    return to_pixels(grown[0].clamp(0, 1))


def rows_of(num_tiles: int, columns: int) -> int:
    """Rows that the tiles fill."""
    return -(-num_tiles // columns)


def height_of(num_rows: int, columns: int, width: float) -> float:
    """Inches of a panel of tiles that is this wide."""
    return num_rows * (width / columns + LABEL)


def draw_tiles(axes: "Axes", groups: Sequence[Sequence[Tile]], columns: int, width: float) -> None:
    """Groups of tiles below each other, each filling rows of as many columns; width: inches."""
    num_rows = sum(rows_of(len(group), columns) for group in groups)
    step = SIDE + GAP
    label = round(LABEL * columns * step / width)
    canvas = np.full((num_rows * (step + label), columns * step - GAP, 3), 255, dtype=np.uint8)
    row = 0
    for group in groups:
        for number, tile in enumerate(group):
            top = (row + number // columns) * (step + label) + label
            left = number % columns * step
            canvas[top : top + SIDE, left : left + SIDE] = tile.pixels
            axes.text(left, top - label / 8, tile.label, fontsize=7.5, ha="left", va="bottom")
        row += rows_of(len(group), columns)
    axes.imshow(canvas, interpolation="antialiased", aspect="equal")
    axes.set_axis_off()
