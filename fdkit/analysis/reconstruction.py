"""What a masked autoencoder makes of the patches it does not see, in pixels.

It needs the decoder, which a run of `fdkit pretrain mae` keeps beside the student and only some official files hold.
A decoder trained on normalised pixels says nothing of a patch's brightness, so its patches are shown with their own
true mean and deviation; the accuracy of such pictures is partly a gift, and stands beside that of the mean alone.
"""

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure
from fdkit.analysis._pictures import image_from_text, image_to_text, to_pixels
from fdkit.analysis.observe import Observed, first_images
from fdkit.config import Config
from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone
from fdkit.models.masking import Sampling, check_mask, draw_noise, num_visible, split_patches
from fdkit.models.patches import patch_grid
from fdkit.models.pixel_decoder import Reconstruction, reconstruct
from fdkit.teachers.decoder import TrainedDecoder, load_decoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("masked", "reconstruction", "original")
DEFAULT_RATIO = 0.75
MASK_GREY = 0.5
GAP = 0.06
"""White space around an image of a figure, as a share of its side."""
SCALED = ", scaled"
"""Ends the title of a model whose predictions have been given their patches' own mean and deviation."""


KEEPS_COLOURS = True
READING = (
    "From left to right: what the model was given, what it made of the hidden patches, and the image as it is; a "
    "PSNR well above the one without detail means that it recovers shapes, not only mean colours."
)


class ReconstructionConfig(Config):
    """What is hidden, and how many images are measured and shown."""

    mask_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the patches that is hidden; left out, what the model was trained with, or 0.75 where its file does not
    tell."""
    sampling: Sampling | None = None
    """How patches are hidden: random, block or grid; left out, as the model was trained."""
    targets: Literal["stated", "normalised", "plain"] = "stated"
    """What the decoder predicts: what its run states, each patch's normalised pixels (norm_pix_loss), or plain pixels;
    published files of MAE do not state it."""
    num_images: int = Field(default=64, ge=1)
    """Images measured, drawn from the data with the seed."""
    num_shown: int = Field(default=6, ge=1)
    """Of these, how many the figure shows, the first ones."""
    batch_size: int = Field(default=16, ge=1)
    """Images a forward pass."""
    mask_seed: int = 0
    """Seed of the masks, which are the same for models with equally many patches."""


class Mask(NamedTuple):
    """How the patches of one model's images are hidden, and how its decoder reads."""

    grid: tuple[int, int]
    ratio: float
    sampling: Sampling
    norm_pixels: bool


def analyze(observed: Sequence[Observed], config: ReconstructionConfig) -> Analysis:
    """How well each model fills in hidden patches, on the same images.

    The numbers hold, for each model, "loss" (squared error of what it predicts, as in training), "psnr" of the hidden
    pixels in [0, 1] in dB, "reference_psnr" of the same without any detail (the patch's own mean for normalised
    pixels, else the mean of the visible ones), how patches were hidden, and "pictures", small images as JPEG in base64.
    Raises ConfigError for a model without a decoder, DataError if there are no images.
    """
    if not observed:
        raise ConfigError("reconstruction needs a model")
    numbers = {
        "analysis": "reconstruction",
        "unit": "dB",
        "models": [_measure(one, config) for one in observed],
    }
    return Analysis(numbers, partial(draw, numbers))


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """How well hidden patches are filled in, and how well the best guess without any detail does."""
    return {"PSNR (dB)": model["psnr"], "loss": model["loss"]}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    header = ["model", "hidden", "loss", "PSNR", "PSNR without detail"]
    rows = [
        [
            model["name"],
            f"{100 * model['mask_ratio']:.0f} % {model['sampling']}",
            f"{model['loss']:.4f}",
            f"{model['psnr']:.2f}",
            f"{model['reference_psnr']:.2f}",
        ]
        for model in numbers["models"]
    ]
    return f"reconstruction of hidden patches, PSNR in {numbers['unit']}", [header, *rows]


def _measure(observed: Observed, config: ReconstructionConfig) -> dict[str, Any]:
    if isinstance(observed.model, Backbone):
        raise ConfigError(
            f"{observed.name} is an encoder alone: reconstruction needs a model with its decoder"
        )
    backbone = observed.model.backbone
    trained = load_decoder(observed.model)
    mask = _mask(trained, config, grid=patch_grid(backbone), name=observed.name)
    generator = torch.Generator().manual_seed(config.mask_seed)
    sums, num_images = torch.zeros(3, dtype=torch.float64), 0
    pictures: list[dict[str, Any]] = []
    for images in first_images(observed, config.num_images):
        pixels = images.pixels
        noise = draw_noise(
            len(pixels), mask.grid, sampling=mask.sampling, mask_ratio=mask.ratio, generator=generator
        )
        split = split_patches(noise.to(pixels.device), num_visible(math.prod(mask.grid), mask.ratio))
        made = reconstruct(backbone, trained.decoder, pixels, split, norm_pixels=mask.norm_pixels)
        sums += torch.stack([made.error, *made.hidden_errors()]).double().sum(dim=1).cpu()
        pictures += _pictures(made, config.num_shown - len(pictures))
        num_images += len(pixels)
    loss, error, reference_error = (sums / num_images).tolist()
    return {
        "name": observed.name,
        "loss": loss,
        "psnr": psnr(error),
        "reference_psnr": psnr(reference_error),
        "mask_ratio": mask.ratio,
        "sampling": mask.sampling,
        "norm_pixels": mask.norm_pixels,
        "patch_size": backbone.patch_size,
        "image_size": backbone.image_size,
        "num_images": num_images,
        "pictures": pictures,
    }


def _mask(trained: TrainedDecoder, config: ReconstructionConfig, *, grid: tuple[int, int], name: str) -> Mask:
    """What is asked for, or else what the model was trained with."""
    stated = {"stated": trained.norm_pixels, "normalised": True, "plain": False}[config.targets]
    if stated is None:
        raise ConfigError(
            f"the file of {name} does not tell whether its decoder predicts normalised pixels",
            "say it: --targets normalised, as MAE's pretrained models, or --targets plain, as its visualisation models",
        )
    ratio = config.mask_ratio or trained.mask_ratio or DEFAULT_RATIO
    sampling = config.sampling or trained.sampling or "random"
    check_mask(grid, sampling, ratio)
    return Mask(grid, ratio, sampling, stated)


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; at most 100, as JSON knows no
    infinity.
    """
    return -10 * math.log10(max(error, 1e-10))


def _pictures(made: Reconstruction, count: int) -> list[dict[str, Any]]:
    """The first images as plain data: each column's picture as JPEG in base64."""
    return [
        {name: image_to_text(image) for name, image in zip(COLUMNS, panels_of(made, index), strict=True)}
        for index in range(min(count, len(made.original)))
    ]


def panels_of(made: Reconstruction, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image as (H, W, 3) uint8: with grey for what is hidden, with hidden patches as predicted, and as it is."""
    original, hidden = made.original[index], made.is_hidden[index]
    masked = torch.where(hidden, MASK_GREY, original)
    filled = torch.where(hidden, made.prediction[index], original)
    panels = [to_pixels(one) for one in (masked, filled, original)]
    return panels[0], panels[1], panels[2]


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Images masked, reconstructed and as they are, a panel a model.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    panels = [
        [tuple(image_from_text(picture[name]) for name in COLUMNS) for picture in model["pictures"]]
        for model in models
    ]
    titles = [
        f"{model['name']}: {100 * model['mask_ratio']:.0f} % hidden, {model['psnr']:.1f} dB"
        + (SCALED if model["norm_pixels"] else "")
        for model in models
    ]
    return draw_pictures(panels, titles, width=width)


@in_style
def draw_pictures(
    panels: Sequence[Sequence[Sequence[np.ndarray]]], titles: Sequence[str], *, width: float = WIDE
) -> "Figure":
    """A panel a model, in it rows of images as `panels_of` gives them, two side by side where the width allows.

    titles: one a panel; a note explains those that end in SCALED. width: inches.
    """
    across = 2 if width > NARROW and any(len(rows) > 1 for rows in panels) else 1
    mosaics = [_mosaic(rows, across) for rows in panels]
    heights = [width * mosaic.pixels.shape[0] / mosaic.pixels.shape[1] for mosaic in mosaics]
    has_note = any(title.endswith(SCALED) for title in titles)
    figure = new_figure(width, sum(heights) + 0.65 * len(panels) + (0.2 if has_note else 0))
    places = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, mosaic, title in zip(places, mosaics, titles, strict=True):
        _show_mosaic(place, mosaic)
        place.set_title(textwrap.fill(title, width=round(9.5 * width)), pad=20)
    if has_note:
        note = "Scaled: predicted patches are given the true mean and deviation of their pixels."
        note = textwrap.fill(note, width=round(15 * width))
        figure.supxlabel(note, fontsize=8.5, x=0.01, ha="left")
    return figure


class _Mosaic(NamedTuple):
    """Many images as one."""

    pixels: np.ndarray
    """(H, W, 3) uint8."""
    centres: list[float]
    """Of the columns, in pixels from the left."""


def _mosaic(rows: Sequence[Sequence[np.ndarray]], across: int) -> _Mosaic:
    """All images on white, `across` rows of them side by side."""
    height, width = rows[0][0].shape[:2]
    gap = max(1, round(GAP * width))
    num_lines = math.ceil(len(rows) / across)
    row_width = (width + gap) * len(COLUMNS) + 2 * gap
    canvas = np.full((num_lines * (height + gap) - gap, across * row_width - 3 * gap, 3), 255, dtype=np.uint8)
    starts = [
        number * row_width + column * (width + gap)
        for number in range(across)
        for column in range(len(COLUMNS))
    ]
    for number, images in enumerate(rows):
        top, first = number // across * (height + gap), number % across * len(COLUMNS)
        for left, image in zip(starts[first : first + len(COLUMNS)], images, strict=True):
            canvas[top : top + height, left : left + width] = image
    return _Mosaic(canvas, [start + width / 2 for start in starts])


def _show_mosaic(axes: "Axes", mosaic: _Mosaic) -> None:
    is_small = mosaic.pixels.shape[1] < 400
    axes.imshow(mosaic.pixels, interpolation="nearest" if is_small else "antialiased", aspect="equal")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(mosaic.centres, COLUMNS * (len(mosaic.centres) // len(COLUMNS)))
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5)
    axes.set_yticks([])
