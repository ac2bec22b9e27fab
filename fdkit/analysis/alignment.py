"""Alignment and uniformity: whether views of an image stay close while images spread over the sphere.

Both are of final features scaled to length 1. Alignment is the mean squared distance of two augmented views of an
image; uniformity is the log of the mean of exp(-2 squared distance) over different images. Either is easy alone: a
model that says the same of all images aligns perfectly, random features are uniform.
Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.1, with their alpha 2 and t 2.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._features import POOLING_WORDS, FeatureConfig, final_features, need_models
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure
from fdkit.analysis._lines import colour_of, marker_of
from fdkit.analysis._views import ViewConfig, draw_views
from fdkit.analysis.observe import Observed, first_images
from fdkit.models.representation import alignment, uniformity, unit_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "Further down, views of one image lie closer together; further left, different images lie further apart; the lower "
    "left is better, while a model at the lower right says nearly the same of every image."
)
NUM_RESAMPLES = 500
BLOCK = 1024


class AlignmentConfig(ViewConfig, FeatureConfig):
    """Which features are looked at, on how many images, and how their views are drawn."""

    num_images: int = Field(default=512, ge=2)
    """Images read, drawn from the data with the seed, two views of each."""


class Interval(NamedTuple):
    """Where 95 % of the resamples of the images lie."""

    low: float
    high: float


def analyze(observed: Sequence[Observed], config: AlignmentConfig) -> Analysis:
    """Alignment and uniformity of every model, on the same views of the same images.

    Memory: the features of both views, 2 N x D float32, and blocks of N x 1024 of their distances.
    The numbers hold, for each model, "alignment", in [0, 4], "uniformity", the mean of those of the first and of the
    second views, in [-8, 0], and of each "..._interval", [low, high], from 500 bootstrap resamples of the images. Pairs
    that an image drawn twice makes with itself are left out of the uniformity of a resample.
    Raises ConfigError for the class token of a model without one, DataError for fewer than 2 images, NumericsError for
    features that are not finite.
    """
    need_models(observed, "alignment")
    numbers = {
        "analysis": "alignment",
        "pooling": config.pooling,
        "models": [_measure(one, config) for one in observed],
    }
    return Analysis(numbers, partial(draw, numbers))


def _measure(observed: Observed, config: AlignmentConfig) -> dict[str, Any]:
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    num_images = 0
    for images in first_images(observed, config.num_images, at_least=2):
        for view, features in enumerate(views):
            pixels = draw_views(images.pixels, first=num_images, view=view, config=config)
            features.append(final_features(observed, pixels, config.pooling))
        num_images += len(images.pixels)
    first, second = (torch.cat(parts) for parts in views)
    weights = resample_weights(num_images, NUM_RESAMPLES)
    of_both = (uniformities(first, weights) + uniformities(second, weights)) / 2
    return {
        "name": observed.name,
        "num_images": num_images,
        "alignment": alignment(first, second).item(),
        "alignment_interval": list(_interval(alignments(first, second, weights))),
        "uniformity": ((uniformity(first) + uniformity(second)) / 2).item(),
        "uniformity_interval": list(_interval(of_both)),
    }


def resample_weights(num_images: int, num_resamples: int) -> Tensor:
    """How often each image is drawn in each resample of N images with replacement; (R, N) float64, the same each time.

    A resample that draws one image alone has no pair and is drawn again.
    """
    generator = torch.Generator().manual_seed(0)
    rows: list[Tensor] = []
    while len(rows) < num_resamples:
        drawn = torch.randint(num_images, (num_images,), generator=generator)
        counts = torch.bincount(drawn, minlength=num_images)
        if (counts > 0).sum() > 1:
            rows.append(counts)
    return torch.stack(rows).double()


def alignments(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Alignment of two views (N, D) in each resample, (R,); weights: (R, N), how often each image counts."""
    distances = (unit_rows(first) - unit_rows(second)).square().sum(1).double()
    return weights @ distances / weights.sum(1)


def uniformities(features: Tensor, weights: Tensor, *, block: int = BLOCK) -> Tensor:
    """Uniformity of features (N, D) in each resample, (R,): the mean goes over pairs of different images."""
    rows = unit_rows(features).double()
    total, count = torch.zeros(2, len(weights), dtype=torch.float64)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        potentials = (
            -2 * torch.cdist(rows[part], rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        ).exp()
        own = weights[:, part]
        # Of images with themselves both the potential and the square of the weight go.
        total += (own * (weights @ potentials.T)).sum(1) - own.square().sum(1)
        count += own.sum(1) * weights.sum(1) - own.square().sum(1)
    return (total / count).log()


def _interval(values: Tensor) -> Interval:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(low, high)


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """Alignment and uniformity, both better if lower."""
    return {"alignment": model["alignment"], "uniformity": model["uniformity"]}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    rows = [
        [model["name"], _with_interval(model, "alignment"), _with_interval(model, "uniformity")]
        for model in numbers["models"]
    ]
    count = numbers["models"][0]["num_images"]
    title = f"alignment and uniformity, {POOLING_WORDS[numbers['pooling']]}, {count} images, 95 % intervals"
    return title, [["model", "alignment", "uniformity"], *rows]


def _with_interval(model: dict[str, Any], name: str) -> str:
    low, high = model[f"{name}_interval"]
    return f"{model[name]:.3f} [{low:.3f}, {high:.3f}]"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """A point a model at its uniformity and alignment, with the intervals of both.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    side = width if width <= NARROW else 0.62 * width
    figure = new_figure(width, 0.8 * side + (0.22 * len(models) if width <= NARROW else 0))
    axes = figure.subplots()
    for number, model in enumerate(models):
        x, y = model["uniformity"], model["alignment"]
        axes.errorbar(
            x,
            y,
            xerr=_arms(x, model["uniformity_interval"]),
            yerr=_arms(y, model["alignment_interval"]),
            fmt=marker_of(number),
            color=colour_of(number),
            markersize=7,
            elinewidth=1.3,
            label=model["name"],
        )
    axes.set_xlabel("← better        uniformity")
    axes.set_ylabel("← better        alignment")
    axes.margins(0.15)
    axes.set_ylim(bottom=0)
    place = "outside lower left" if width <= NARROW else "outside right upper"
    figure.legend(loc=place, ncols=1)
    return figure


def _arms(value: float, interval: Sequence[float]) -> list[list[float]]:
    """How far an interval goes to either side, never less than nothing: resamples may lie to one side of the value."""
    low, high = interval
    return [[max(value - low, 0)], [max(high - value, 0)]]
