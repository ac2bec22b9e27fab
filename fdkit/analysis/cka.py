"""How alike layers are: linear centred kernel alignment (CKA) of all layers of a model, and of those of two models.

CKA compares what two layers say of the same images, whatever their widths: 1 where one is the other turned, mirrored,
moved or scaled alike in all directions, near 0 where they are independent. Blocks of like layers show where a model
stops changing; a student that follows its teacher is like it at the same depth. The estimate is the unbiased one over
minibatches, so its mean does not depend on how many images a minibatch has; the usual, biased one of few images and
wide layers tends to 1 whatever the layers hold.
Source: Nguyen, Raghu and Kornblith 2021 (arXiv 2010.15327), equations 2 and 3.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._cka import SMALLEST_BATCH, MinibatchCKA
from fdkit.analysis._features import POOLING_WORDS, FeatureConfig, layer_features, need_models
from fdkit.analysis._figure import NARROW, WIDE, columns_of, in_style, panels, wrapped
from fdkit.analysis.observe import Observed, first_images
from fdkit.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

READING = (
    "Bright squares along the diagonal are runs of layers that say the same; between two models, a bright diagonal "
    "means that they do the same work at the same depth, and a dark map that they see the images differently."
)
KEEPS_COLOURS = True


class CkaConfig(FeatureConfig):
    """Which vector of a layer stands for an image, and on how many images layers are compared."""

    num_images: int = Field(default=512, ge=SMALLEST_BATCH)
    """Images read, drawn from the data with the seed."""
    batch_size: int = Field(default=64, ge=SMALLEST_BATCH)
    """Images a forward pass and a minibatch of the estimate, at least 4: its formula divides by n - 3. Larger ones
    lower its spread, and cost memory. A last minibatch counts by its images; one of fewer than 4 is left out."""


class Minibatch(NamedTuple):
    """What the layers of a model say of some images."""

    features: list[Tensor]
    """Of each layer (B, C), of a width of its own."""
    indices: Tensor | None
    """(B,): which images of the data; None where nobody counts."""


def analyze(observed: Sequence[Observed], config: CkaConfig) -> Analysis:
    """CKA of every two layers of each model, and of every layer of one model with every layer of another.

    All models read the same images side by side, each its own crops, one minibatch at a time; memory holds the
    features of one minibatch, B x B matrices of all layers, and grows with the square of the number of layers only.
    The numbers hold, for each model, "cka" as [[a number a layer] a layer], symmetric, and "cka_with" of each model
    before it, by its name: a row a layer of this model, a column a layer of the other. A layer that says the same of
    all images has null for numbers.
    Raises ConfigError for a model whose layers are not known or that has no class token where it is asked for,
    DataError for fewer than 4 images or models that read different ones, NumericsError for features not finite.
    """
    need_models(observed, "cka")
    streams = [_minibatches(one, config) for one in observed]
    cka: MinibatchCKA | None = None
    depths: list[int] = []
    for minibatches in zip_longest(*streams):
        _check_same_images(observed, minibatches)
        layers = [features for minibatch in minibatches for features in minibatch.features]
        if cka is None:
            depths = [len(minibatch.features) for minibatch in minibatches]
            cka = MinibatchCKA(len(layers), len(layers))
        cka.add(layers, layers)
    assert cka is not None, "first_images gives enough images or raises"
    numbers = {
        "analysis": "cka",
        "pooling": config.pooling,
        "minibatch": config.batch_size,
        "models": _tables([one.name for one in observed], depths, cka),
    }
    return Analysis(numbers, partial(draw, numbers))


def _minibatches(observed: Observed, config: CkaConfig) -> Iterator[Minibatch]:
    """Minibatches of one size, however the images come; the last may be smaller, but not than 4."""
    features: list[Tensor] = []
    indices: list[Tensor | None] = []
    for images in first_images(observed, config.num_images, at_least=SMALLEST_BATCH):
        new = layer_features(observed, images.pixels, config.pooling)
        features = [torch.cat(parts) for parts in zip(features, new, strict=True)] if features else new
        indices.append(images.indices)
        while len(features[0]) >= config.batch_size:
            yield Minibatch(
                [layer[: config.batch_size] for layer in features], _first(indices, config.batch_size)
            )
            features = [layer[config.batch_size :] for layer in features]
            indices = _without_first(indices, config.batch_size)
    if len(features[0]) >= SMALLEST_BATCH:
        yield Minibatch(features, _first(indices, len(features[0])))


def _first(indices: Sequence[Tensor | None], count: int) -> Tensor | None:
    known = [part for part in indices if part is not None]
    return torch.cat(known)[:count].cpu() if len(known) == len(indices) else None


def _without_first(indices: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
    whole = _first(indices, sum(len(part) for part in indices if part is not None))
    return [None if whole is None else whole[count:]]


def _check_same_images(observed: Sequence[Observed], minibatches: Sequence[Minibatch | None]) -> None:
    """Raises DataError unless all models have read the same images in the same order."""
    remedy = "every model must be given the same images in the same order"
    sizes = [0 if one is None else len(one.features[0]) for one in minibatches]
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{one.name} {size}" for one, size in zip(observed, sizes, strict=True))
        raise DataError(f"the models read different numbers of images, in one minibatch {listed}", remedy)
    known = [
        (one.name, minibatch.indices)
        for one, minibatch in zip(observed, minibatches, strict=True)
        if minibatch is not None and minibatch.indices is not None
    ]
    for name, indices in known[1:]:
        if not torch.equal(indices, known[0][1]):
            place = int((indices != known[0][1]).nonzero()[0])
            raise DataError(
                f"the models read different images: {known[0][0]} {int(known[0][1][place])}, {name} "
                f"{int(indices[place])}, where they should read the same",
                remedy,
            )


def _tables(names: Sequence[str], depths: Sequence[int], cka: MinibatchCKA) -> list[dict[str, Any]]:
    """The blocks of one matrix of all layers of all models, a table a model."""
    ends = list(accumulate(depths))
    parts = [slice(end - depth, end) for end, depth in zip(ends, depths, strict=True)]
    values = cka.value()
    return [
        {
            "name": name,
            "num_images": cka.num_images,
            "num_layers": depth,
            "cka": _plain(values[part, part]),
            "cka_with": {names[other]: _plain(values[part, parts[other]]) for other in range(place)},
        }
        for place, (name, depth, part) in enumerate(zip(names, depths, parts, strict=True))
    ]


def _plain(values: Tensor) -> Any:
    """Lists, with None for what is not a number."""
    if values.dim() > 1:
        return [_plain(row) for row in values]
    return [None if math.isnan(value) else value for value in values.tolist()]


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """How alike the first and the last layer are, and the last layers of this model and of the first one."""
    found = {"CKA of first and last layer": model["cka"][0][-1]}
    if model["cka_with"]:
        with_first = next(iter(model["cka_with"].values()))
        found["CKA of the last layer with that of the first model"] = with_first[-1][-1]
    return {name: value for name, value in found.items() if value is not None}


def _pairs(numbers: dict[str, Any]) -> list[tuple[str, str, list[list[float | None]]]]:
    """Every two models: names of rows and of columns, and their map."""
    models = numbers["models"]
    return [(model["name"], other, cka) for model in models for other, cka in model["cka_with"].items()]


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; models, then pairs of them."""
    models = numbers["models"]
    title = f"linear CKA, {POOLING_WORDS[numbers['pooling']]}, {models[0]['num_images']} images"
    header = ["layers of", "first and last", "least alike neighbours", "last and last"]
    rows = [
        [model["name"], _shown(model["cka"][0][-1]), _shown(_lowest_of_neighbours(model["cka"])), ""]
        for model in models
    ]
    rows += [
        [f"{name} and {other}", _shown(cka[0][-1]), "", _shown(cka[-1][-1])]
        for name, other, cka in _pairs(numbers)
    ]
    return title, [header, *rows]


def _lowest_of_neighbours(cka: list[list[float | None]]) -> float | None:
    """Where a model changes most from one layer to the next."""
    known = [row[place] for place, row in enumerate(cka[:-1], start=1)]
    return min((value for value in known if value is not None), default=None)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """A map of layers by layers for each model, then for each two models, all on one scale of 0 to 1.

    numbers: as `analyze` gives them; width: inches.
    """
    models, pairs = numbers["models"], _pairs(numbers)
    figure, axes = panels(len(models) + len(pairs), width=width, height=3.0 if width > NARROW else 3.6)
    fits = round(11 * width / columns_of(figure))
    for place, model in zip(axes, models, strict=False):
        shown = _draw_map(place, model["cka"])
        place.set_title(wrapped(model["name"], figure))
        place.set(xlabel="layer", ylabel="layer")
    for place, (name, other, cka) in zip(axes[len(models) :], pairs, strict=True):
        shown = _draw_map(place, cka)
        place.set_title(wrapped("between two models", figure))
        place.set_xlabel(textwrap.fill(f"layer of {other}", fits))
        place.set_ylabel(textwrap.fill(f"layer of {name}", fits))
    # Where panels stand below each other, the scale is seen first.
    location = "bottom" if width > NARROW else "top"
    bar = figure.colorbar(shown, ax=axes, location=location, shrink=0.7, aspect=30, pad=0.02)
    bar.set_label("linear CKA (1: alike, 0: independent)")
    bar.outline.set_visible(False)
    return figure


def _draw_map(axes: "Axes", cka: list[list[float | None]]) -> "AxesImage":
    import matplotlib

    values = [[math.nan if value is None else value for value in row] for row in cka]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#dddddd")
    extent = (0.5, len(values[0]) + 0.5, 0.5, len(values) + 0.5)
    shown = axes.imshow(
        values,
        cmap=colours,
        vmin=0,
        vmax=1,
        origin="lower",
        extent=extent,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_box_aspect(1)
    axes.grid(visible=False)
    axes.locator_params(integer=True, nbins=6)
    return shown
