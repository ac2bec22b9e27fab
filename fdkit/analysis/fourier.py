"""How much fine detail the feature maps of each layer hold: their spectrum over spatial frequency, layer by layer.

Attention tends to smooth features across the image, convolutions and MLPs to sharpen them; the spectrum shows where a
model does which. Each channel of a layer's tokens is taken as a picture of the grid of patches, and the logarithm of
the amplitude of its 2-D Fourier transform is averaged over images and channels. Shown is its value at the frequencies
on the diagonal, from 0 to pi in rows and columns alike, less its value at 0.
White noise is flat but for its ends: the amplitudes at 0 and pi are of real numbers, and the mean logarithm of the
others is higher by ln(2) / 2 = 0.35 for the same power. So the last step to pi falls by that much in every model whose
grid is even, and a grid of odd side, which does not reach pi, is lifted by it.
Source: Park and Kim 2022 (arXiv 2202.06709), figures 2a and 8. Their published code draws the diagonal of an even grid
up to the frequency before pi, stretched to pi; here every frequency stands at its place, and pi is there.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._features import need_models
from fdkit.analysis._figure import NARROW, WIDE, in_style, panels, wrapped
from fdkit.analysis._lines import draw_over_depth
from fdkit.analysis.observe import Observed, first_images, observe_layers
from fdkit.config import Config
from fdkit.errors import ConfigError, NumericsError
from fdkit.models.backbone import Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READING = (
    "A line that falls steeply belongs to a layer whose maps are smooth across the image, one that stays up to a layer "
    "with detail from patch to patch; in the last panel, a model smooths where it falls and sharpens where it rises."
)
FLOOR = 1e-6
"""Added to amplitudes, so that one of 0 has a logarithm."""


class FourierConfig(Config):
    """On how many images the feature maps are transformed."""

    num_images: int = Field(default=128, ge=1)
    """Images averaged over, drawn from the data with the seed."""
    batch_size: int = Field(default=16, ge=1)
    """Images a forward pass; memory grows with it, and not with the number of images."""


def diagonal_frequencies(side: int) -> list[float]:
    """Frequencies on the diagonal of the transform of a side x side grid, in units of pi: 0, 2/side, ... at most 1.

    1 is one period in two patches, and is reached by grids with an even number of rows.
    """
    return [2 * place / side for place in range(side // 2 + 1)]


def log_amplitudes(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Log amplitude at the diagonal frequencies of square maps, averaged over channels; (B, side // 2 + 1) float32.

    patches: (B, h*w, C), row-major; grid: (h, w), h == w. Natural logarithm of the amplitude + 1e-6; the transform is
    the plain sum, not divided by the number of patches.
    Raises ValueError for a grid that is not square.
    """
    side = grid[0]
    if grid != (side, side):
        raise ValueError(f"the grid must be square to have one frequency along its diagonal: {grid}")
    spectrum = torch.fft.fft2(patches.float().unflatten(1, grid), dim=(1, 2))
    diagonal = spectrum.diagonal(dim1=1, dim2=2)[..., : side // 2 + 1]  # (B, C, K)
    return (diagonal.abs() + FLOOR).log().mean(1)


def analyze(observed: Sequence[Observed], config: FourierConfig) -> Analysis:
    """The spectrum of every layer's feature maps, averaged over images; memory does not grow with their number.

    Layers are as each leaves them, without the final norm. The numbers hold, for each model, for every layer "side",
    rows of its grid, "frequency", in units of pi, "log_amplitude", see `log_amplitudes`, "relative_log_amplitude", the
    same less that of frequency 0, in a list of one number a frequency, and "high_frequency", the last of these: Delta
    log amplitude at pi, or at (side - 1) / side pi where the side is odd.
    Raises ConfigError for a model whose layers are not known or whose grid is not square or has one row alone,
    DataError if there are no images, NumericsError for features that are not finite.
    """
    need_models(observed, "fourier")
    numbers = {
        "analysis": "fourier",
        "unit": "natural logarithm of amplitude",
        "models": [_measure(one, config) for one in observed],
    }
    return Analysis(numbers, partial(draw, numbers))


def _measure(observed: Observed, config: FourierConfig) -> dict[str, Any]:
    sums: list[Tensor] = []
    sides: list[int] = []
    num_images = 0
    for images in first_images(observed, config.num_images):
        layers = observe_layers(observed.model, images.pixels)
        if not sums:
            sides = [_side(observed, tokens, number) for number, tokens in enumerate(layers, start=1)]
            sums = [torch.zeros(side // 2 + 1, dtype=torch.float64) for side in sides]
        for place, tokens in enumerate(layers):
            sums[place] += log_amplitudes(tokens.patches, tokens.grid).cpu().double().sum(0)
        num_images += len(images.pixels)
    means = [total / num_images for total in sums]
    for number, mean in enumerate(means, start=1):
        if not mean.isfinite().all():
            raise NumericsError(
                f"the features of layer {number} of {observed.name} are not finite",
                "the weights may be damaged, or training has diverged; if --precision is bf16, try fp32",
            )
    relative = [(mean - mean[0]).tolist() for mean in means]
    return {
        "name": observed.name,
        "num_images": num_images,
        "side": sides,
        "frequency": [diagonal_frequencies(side) for side in sides],
        "log_amplitude": [mean.tolist() for mean in means],
        "relative_log_amplitude": relative,
        "high_frequency": [line[-1] for line in relative],
    }


def _side(observed: Observed, tokens: Tokens, number: int) -> int:
    rows, columns = tokens.grid
    if rows != columns or rows < 2:
        raise ConfigError(
            f"layer {number} of {observed.name} has a grid of {rows} x {columns} patches, which has no spectrum",
            "the grid must be square, with 2 rows or more; larger images have larger ones: --image-size",
        )
    return rows


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """The highest frequency's log amplitude less the lowest's, of the last layer and of the mean over layers."""
    high = model["high_frequency"]
    return {
        "relative log amplitude of the highest frequency, last layer": high[-1],
        "relative log amplitude of the highest frequency, mean of layers": sum(high) / len(high),
    }


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; the highest frequency, by layer."""
    models = numbers["models"]
    rows = [
        [str(layer + 1), *(_at(model["high_frequency"], layer) for model in models)]
        for layer in range(max(len(model["side"]) for model in models))
    ]
    title = f"relative log amplitude of the highest frequency, {models[0]['num_images']} images"
    return title, [["layer", *(model["name"] for model in models)], *rows]


def _at(values: Sequence[float], place: int) -> str:
    """Empty for a layer that the model does not have."""
    return f"{values[place]:.2f}" if place < len(values) else ""


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """A panel a model with a line a layer over frequency, coloured by depth, and the highest frequency over depth.

    numbers: as `analyze` gives them; width: inches.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    models = numbers["models"]
    figure, axes = panels(len(models) + 1, width=width, height=2.9)
    values = [one for model in models for line in model["relative_log_amplitude"] for one in line]
    margin = 0.05 * (max(values) - min(values) or 1)
    for place, model in zip(axes, models, strict=False):
        _draw_layers(place, model)
        place.set_ylim(min(values) - margin, max(values) + margin)
        place.set_title(wrapped(model["name"], figure))
    for number, model in enumerate(models):
        draw_over_depth(axes[-1], number, model["high_frequency"], label=model["name"])
    axes[-1].set_title(wrapped("highest frequency", figure))
    axes[-1].set_ylabel("relative log amplitude")
    colours = ScalarMappable(Normalize(0, 1), _colours())
    # Where panels stand below each other, the scale is seen first.
    location = "bottom" if width > NARROW else "top"
    bar = figure.colorbar(colours, ax=axes, location=location, shrink=0.7, aspect=30, pad=0.02)
    bar.set_label("depth of the layer (1: last)")
    bar.outline.set_visible(False)
    if len(models) > 1:
        figure.legend(loc="outside lower left", ncols=1)
    return figure


def _colours() -> Any:
    """From dark blue to orange-yellow, light to dark the same for all eyes; the palest end is left out."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](torch.linspace(0, 0.92, 256).numpy()))


def _draw_layers(axes: "Axes", model: dict[str, Any]) -> None:
    colours = _colours()
    lines = model["relative_log_amplitude"]
    for layer, (frequencies, values) in enumerate(zip(model["frequency"], lines, strict=True), start=1):
        axes.plot(frequencies, values, color=colours(layer / len(lines)), linewidth=1.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "π/2", "π"])
    axes.set_xlabel("frequency")
    axes.set_ylabel("relative log amplitude")
